//! Machines that are saved, and others that go on where they stood, with real guests.

mod guest;

use std::path::Path;
use std::time::{Duration, Instant};

use coracle_machine::{Cpus, Device, Driver, Error, Machine, MachineSpec};
use guest::{Given, PATIENCE, given, greets, says};

/// A guest that counts, with random bytes and what its disk begins with behind each number, and its agent beside that.
const COUNTS: &str = "(/bin/agent serve; poweroff -f) &\n\
                      n=0; while :; do n=$((n+1))\n\
                      echo \"tick $n $(head -c 8 /dev/urandom | md5sum | head -c 16) \
                      $(dd if=/dev/vda iflag=direct bs=512 count=1 2>/dev/null | head -c 4) $(cut -d' ' -f1 /proc/uptime) .\"\n\
                      sleep 0.1; done";

/// A machine with such a guest in a folder below `folder`, whose disk begins with `disk`.
fn counting(given: &Given, folder: &Path, disk: &str) -> MachineSpec {
    let own = folder.join(disk);
    std::fs::create_dir(&own).unwrap();
    std::fs::write(own.join("disk"), format!("{disk}{}", " ".repeat(1 << 20))).unwrap();
    let modules: Vec<_> = guest::DISK.into_iter().chain(guest::AGENT).collect();
    let mut spec = given.spec(&own, &modules, COUNTS);
    let disk = Device::Block { path: own.join("disk"), read_only: true, direct: false, serial: String::new() };
    spec.devices = vec![Device::Vsock, Device::Rng, Device::Balloon, disk];
    spec
}

/// One line of the guest's: its number, its random bytes, its disk, the seconds that it has been up.
#[derive(Debug, Clone)]
struct Tick(u64, String, String, f64);

/// What the guest has counted on this console.
fn ticks(machine: &dyn Machine) -> Vec<Tick> {
    let console = machine.console(400);
    let parse = |line: &String| {
        let mut words = line.strip_prefix("tick ")?.strip_suffix(" .")?.split(' ');
        let mut next = || words.next().map(ToOwned::to_owned);
        Some(Tick(next()?.parse().ok()?, next()?, next()?, next()?.parse().ok()?))
    };
    console.iter().filter_map(parse).collect()
}

/// Waits until the guest has counted to `number` at least; what it has counted.
async fn counts_to(machine: &dyn Machine, number: u64) -> Vec<Tick> {
    let wait = async {
        loop {
            let ticks = ticks(machine);
            if ticks.last().is_some_and(|tick| tick.0 >= number) {
                return ticks;
            }
            tokio::task::yield_now().await;
        }
    };
    let counted = tokio::time::timeout(PATIENCE, wait).await;
    counted.unwrap_or_else(|_| panic!("the guest does not count to {number}: {:?}", machine.console(30)))
}

#[tokio::test]
async fn clones_go_on_where_the_saved_one_stood_each_as_itself() {
    let Some(given) = given() else { return };
    let folder = tempfile::tempdir().unwrap();
    let (driver, saved) = (given.driver(true), folder.path().join("saved"));
    let machine = driver.boot(counting(&given, folder.path(), "aaaa")).await.unwrap();
    let _greeting = greets(&*machine).await;
    let stood = counts_to(&*machine, 3).await.last().unwrap().0;
    machine.save(saved.clone()).await.unwrap();
    // The one that was saved goes on, and is gone when the others begin.
    counts_to(&*machine, stood + 3).await;
    machine.stop().await.unwrap();
    let restore = |disk| driver.restore(counting(&given, folder.path(), disk), saved.clone());
    let (one, other) = tokio::join!(restore("bbbb"), restore("cccc"));
    let (one, other) = (one.unwrap(), other.unwrap());
    let mut found = Vec::new();
    for (clone, disk) in [(&one, "bbbb"), (&other, "cccc")] {
        let _greeting = greets(&**clone).await;
        let greeted = ticks(&**clone).last().map_or(stood, |tick| tick.0);
        let ticks = counts_to(&**clone, greeted + 3).await;
        let first = ticks.first().unwrap();
        assert!((stood..stood + 5).contains(&first.0), "{ticks:?} after {stood}");
        assert!(ticks.iter().skip(1).all(|tick| tick.2 == disk), "{disk}: {ticks:?}");
        // The guest's clock stood still while nobody ran it.
        assert!(ticks.windows(2).all(|pair| (0.0..30.0).contains(&(pair[1].3 - pair[0].3))), "{ticks:?}");
        found.push((greeted, ticks));
    }
    let from = found.iter().map(|(greeted, _)| greeted + 1).max().unwrap();
    let both: Vec<_> = found[0].1.iter().filter(|tick| tick.0 >= from).collect();
    let twins = both.iter().filter(|tick| found[1].1.iter().any(|other| other.1 == tick.1));
    assert_eq!(twins.count(), 0, "the same random bytes in two machines: {found:?}");
    one.stop().await.unwrap();
    other.stop().await.unwrap();
}

#[tokio::test]
async fn what_a_machine_has_gained_it_has_elsewhere_and_gives_back() {
    let Some(given) = given() else { return };
    let folder = tempfile::tempdir().unwrap();
    let (driver, saved) = (given.driver(true), folder.path().join("saved"));
    let script = "echo 1 >/sys/devices/system/memory/auto_online_blocks; echo online >/sys/devices/system/memory/auto_online_blocks\n\
                  echo ready; cpu=/sys/devices/system/cpu/cpu1; until [ -d $cpu ]; do sleep 0.1; done; echo 1 >$cpu/online\n\
                  mount -t tmpfs t /proc/sys/fs/binfmt_misc 2>/dev/null; mkdir -p /mem; mount -t tmpfs -o size=90% t /mem\n\
                  until [ $(awk '/MemFree/ { print int($2 / 1024) }' /proc/meminfo) -gt 400 ]; do sleep 0.1; done\n\
                  dd if=/dev/urandom of=/mem/f bs=1M count=300 2>/dev/null; sum=$(md5sum </mem/f); echo full $(nproc)\n\
                  while :; do sleep 0.2; [ \"$(md5sum </mem/f)\" = \"$sum\" ] && echo same $(nproc) || echo differs\n\
                  [ -e /sys/block/vda ] && rm -f /mem/f && echo empty && break; done; while :; do sleep 1; done";
    let spec = |name: &str| {
        let own = folder.path().join(name);
        std::fs::create_dir(&own).unwrap();
        let modules: Vec<_> = guest::DISK.into_iter().chain(["virtio_mem"]).collect();
        let mut spec = given.spec(&own, &modules, script);
        spec.cpus = Cpus { boot: 1, max: 2 };
        spec.memory.max_mib = spec.memory.size_mib + 512;
        spec
    };
    let first = spec("first");
    let (least, most) = (first.memory.size_mib, first.memory.max_mib);
    let machine = driver.boot(first).await.unwrap();
    says(&*machine, "ready").await;
    machine.resize(2, most).await.unwrap();
    says(&*machine, "full 2").await;
    machine.save(saved.clone()).await.unwrap();
    machine.stop().await.unwrap();
    let clone = driver.restore(spec("second"), saved.clone()).await.unwrap();
    let stats = clone.stats().await.unwrap();
    assert_eq!((stats.memory_bytes, stats.cpus), (most << 20, 2));
    says(&*clone, "same 2").await;
    // It is a machine as any other: it gains a disk, and gives back what it has gained.
    let disk = folder.path().join("disk");
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let device = Device::Block { path: disk, read_only: true, direct: false, serial: "late".into() };
    clone.attach(device.clone()).await.unwrap();
    says(&*clone, "empty").await;
    let other = folder.path().join("other");
    assert!(matches!(clone.save(other.clone()).await, Err(Error::Unsupported(_))), "with another device");
    assert!(!other.exists());
    clone.resize(1, least).await.unwrap();
    let shrunk = async {
        while clone.stats().await.unwrap().memory_bytes > (least + 256) << 20 {
            tokio::task::yield_now().await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, shrunk).await.is_ok(), "{:?}", clone.stats().await);
    clone.detach(device).await.unwrap();
    // And it can be saved itself.
    clone.save(other.clone()).await.unwrap();
    let size = clone.stats().await.unwrap().memory_bytes;
    clone.stop().await.unwrap();
    let third = driver.restore(spec("third"), other).await.unwrap();
    assert_eq!((third.stats().await.unwrap().memory_bytes, third.stats().await.unwrap().cpus), (size, 1));
    third.resize(2, least).await.unwrap();
    assert_eq!(third.stats().await.unwrap().cpus, 2);
    third.stop().await.unwrap();
}

#[tokio::test]
async fn a_full_disk_leaves_nothing_and_the_machine_runs_on() {
    let Some(given) = given() else { return };
    let folder = tempfile::tempdir().unwrap();
    let small = folder.path().join("small");
    std::fs::create_dir(&small).unwrap();
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=8m", "small"])
        .arg(&small)
        .status()
        .unwrap();
    assert!(mounted.success());
    let machine = given.driver(true).boot(counting(&given, folder.path(), "aaaa")).await.unwrap();
    let _greeting = greets(&*machine).await;
    let stood = counts_to(&*machine, 1).await.last().unwrap().0;
    let failed = machine.save(small.join("saved")).await;
    assert!(matches!(&failed, Err(Error::Monitor(text)) if text.contains("No space left")), "{failed:?}");
    assert_eq!(std::fs::read_dir(&small).unwrap().count(), 0);
    counts_to(&*machine, stood + 3).await;
    // One that is paused stays so.
    machine.pause().await.unwrap();
    machine.save(small.join("saved")).await.unwrap_err();
    let stood = ticks(&*machine).last().unwrap().0;
    let saved = folder.path().join("saved");
    machine.save(saved.clone()).await.unwrap();
    machine.resume().await.unwrap();
    counts_to(&*machine, stood + 3).await;
    machine.stop().await.unwrap();
    let unmounted = std::process::Command::new("umount").arg(&small).status().unwrap();
    assert!(unmounted.success());
}

/// Lives of one machine, each in another process than the one before.
const LIVES: u32 = 100;
/// What the guest's clock may be off the time for which it was run, in seconds a life: the test looks on from outside, and sees the ends of a save and of
/// a restore a moment late. Measured: 0.07 on a busy host.
const DRIFT_MAX: f64 = 0.5;

#[tokio::test]
async fn a_hundred_lives_of_one_machine() {
    let Some(given) = given() else { return };
    let folder = tempfile::tempdir().unwrap();
    let driver = given.driver(true);
    let mut machine = driver.boot(counting(&given, folder.path(), "aaaa")).await.unwrap();
    let mut greeting = greets(&*machine).await;
    let first = counts_to(&*machine, 1).await.last().unwrap().clone();
    let (mut stood, mut began, mut ran) = (first.0, Instant::now(), Duration::ZERO);
    let mut sizes = Vec::new();
    for life in 1..=LIVES {
        let own = folder.path().join(format!("{life}"));
        std::fs::create_dir(&own).unwrap();
        // It stands from the beginning of a save to the end of a restore, however long a busy host takes over them.
        ran += began.elapsed();
        machine.save(own.join("saved")).await.unwrap();
        machine.stop().await.unwrap();
        assert!(guest::children().is_empty(), "a monitor is left");
        sizes.push(std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(own.join("saved/memory")).unwrap()) / 2);
        let spec = counting(&given, &own, "aaaa");
        machine = driver.restore(spec, own.join("saved")).await.unwrap();
        began = Instant::now();
        drop(std::mem::replace(&mut greeting, greets(&*machine).await));
        stood = counts_to(&*machine, stood + 1).await.last().unwrap().0;
        std::fs::remove_dir_all(own.join("saved")).unwrap();
    }
    let last = counts_to(&*machine, stood + 1).await.last().unwrap().clone();
    ran += began.elapsed();
    let drift = (last.3 - first.3) - ran.as_secs_f64();
    println!(
        "{LIVES} lives: {} s by the guest, {:.1} s by the host; KiB saved: {sizes:?}",
        last.3 - first.3,
        ran.as_secs_f64()
    );
    assert!(drift.abs() < DRIFT_MAX * f64::from(LIVES), "{drift} s");
    let (early, late) = (sizes[LIVES as usize / 10], *sizes.last().unwrap());
    assert!(late < early + 32 * 1024, "the guest's memory grows with its lives: {sizes:?}");
    machine.stop().await.unwrap();
}

/// Lives of a machine of two processors, and pauses that go before.
const LIVES_OF_TWO: u32 = 10;

#[tokio::test]
async fn two_processors_go_on_where_they_stood() {
    let Some(given) = given() else { return };
    let folder = tempfile::tempdir().unwrap();
    let driver = given.driver(true);
    let two = |name: &str| {
        let own = folder.path().join(name);
        std::fs::create_dir(&own).unwrap();
        let mut spec = counting(&given, &own, "aaaa");
        spec.cpus = Cpus { boot: 2, max: 2 };
        spec
    };
    let mut machine = driver.boot(two("0")).await.unwrap();
    let mut greeting = greets(&*machine).await;
    let mut stood = counts_to(&*machine, 1).await.last().unwrap().0;
    for _ in 0..LIVES_OF_TWO {
        machine.pause().await.unwrap();
        machine.resume().await.unwrap();
        stood = counts_to(&*machine, stood + 1).await.last().unwrap().0;
    }
    for life in 1..=LIVES_OF_TWO {
        let saved = folder.path().join(format!("saved{life}"));
        machine.save(saved.clone()).await.unwrap();
        machine.stop().await.unwrap();
        machine = driver.restore(two(&life.to_string()), saved.clone()).await.unwrap();
        drop(std::mem::replace(&mut greeting, greets(&*machine).await));
        stood = counts_to(&*machine, stood + 2).await.last().unwrap().0;
        println!("life {life}: {stood}");
        std::fs::remove_dir_all(saved).unwrap();
    }
    machine.stop().await.unwrap();
}

/// Times that a machine grows and shrinks.
const CYCLES: u32 = 200;

#[tokio::test]
async fn a_machine_grows_and_shrinks_two_hundred_times() {
    let Some(given) = given() else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut spec = given.image(folder.path());
    spec.cpus = Cpus { boot: 1, max: 2 };
    let least = spec.memory.size_mib;
    spec.memory.max_mib = least + 128;
    // What a kernel may put anywhere it can't give back; some kernels turn memory on so by themselves.
    spec.command_line.push_str(" memhp_default_state=online_movable");
    let machine = given.driver(true).boot(spec).await.unwrap();
    let _greeting = greets(&*machine).await;
    let monitor = guest::children().pop().unwrap();
    let mut seen = Vec::new();
    for cycle in 0..CYCLES {
        for (cpus, memory_mib) in [(2, least + 128), (1, least)] {
            machine.resize(cpus, memory_mib).await.unwrap_or_else(|error| panic!("cycle {cycle}: {error}"));
            let settled = async {
                while machine.stats().await.unwrap().memory_bytes != memory_mib << 20 {
                    tokio::task::yield_now().await;
                }
            };
            assert!(tokio::time::timeout(PATIENCE, settled).await.is_ok(), "cycle {cycle}: {:?}", machine.console(30));
            assert_eq!(machine.stats().await.unwrap().cpus, cpus, "cycle {cycle}: {:?}", machine.console(30));
        }
        let descriptors = std::fs::read_dir(format!("/proc/{monitor}/fd")).unwrap().count();
        let threads = std::fs::read_dir(format!("/proc/{monitor}/task")).unwrap().count();
        seen.push((descriptors, threads, guest::memory(monitor).anonymous));
    }
    let (early, late) = (seen[10], *seen.last().unwrap());
    println!("descriptors, threads, KiB of the monitor's own: {early:?} after 10 cycles, {late:?} after {CYCLES}");
    assert_eq!((early.0, early.1), (late.0, late.1), "{seen:?}");
    assert!(late.2 < early.2 + 512, "{seen:?}");
    machine.stop().await.unwrap();
}
