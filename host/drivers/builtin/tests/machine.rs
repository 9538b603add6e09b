//! The built-in monitor with real guests: what they find, how they end, and what is left.

mod guest;

use coracle_machine::{Cpus, Device, DeviceKind, Driver, Error, Kernel, KernelForm, Limits, MemoryKind, Rate};
use guest::given;

#[tokio::test]
async fn the_ends_of_a_guest_are_told_apart() {
    let Some(given) = given() else { return };
    for (script, expected) in [
        ("poweroff -f", "the guest has shut down"),
        ("reboot -f", "the guest has restarted"),
        ("echo c >/proc/sysrq-trigger", "the guest's kernel panicked"),
        ("exit 3", "the guest's kernel panicked"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let (reason, console) = given.run(given.spec(folder.path(), &[], script)).await;
        assert!(reason.starts_with(expected), "{script}: {reason}: {console:?}");
        assert_eq!(std::fs::read_dir(folder.path().join("machine")).unwrap().count(), 0, "left after {script}");
    }
}

#[tokio::test]
async fn a_compressed_kernel_boots_too() {
    let Some(given) = given() else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut spec = given.spec(folder.path(), &[], "echo booted; poweroff -f");
    spec.kernel = Kernel { path: given.bzimage(), form: KernelForm::BzImage };
    let (reason, console) = given.run(spec).await;
    assert_eq!(reason, "the guest has shut down", "{console:?}");
    assert!(console.iter().any(|line| line == "booted"), "{console:?}");
}

#[tokio::test]
async fn the_agent_greets_on_every_kernel() {
    let Some(given) = given() else { return };
    let guests = std::env::var_os("CORACLE_TEST_GUESTS").expect("CORACLE_TEST_GUESTS");
    for guest in std::env::split_paths(&guests) {
        let folder = tempfile::tempdir().unwrap();
        let manifest = std::fs::read_to_string(guest.join("manifest.json")).unwrap();
        let kernel = manifest.lines().find(|line| line.contains("kernel_release")).unwrap().trim().to_owned();
        let driver = given.driver(true);
        let machine = driver.boot(given.image_of(&guest, folder.path())).await.expect("boot");
        let greeted = tokio::time::timeout(guest::PATIENCE, machine.guest_connection()).await;
        greeted.unwrap_or_else(|_| panic!("{kernel}: {:?}", machine.console(30))).unwrap();
        machine.stop().await.unwrap();
        println!("greeted: {kernel}");
    }
}

#[tokio::test]
async fn processors_and_memory_are_those_that_were_asked_for() {
    let Some(given) = given() else { return };
    let folder = tempfile::tempdir().unwrap();
    let script = "echo cpus $(nproc) of $(cat /sys/devices/system/cpu/present)\n\
                  echo cores $(sort -u /sys/devices/system/cpu/cpu*/topology/core_id | wc -l) \
                  packages $(sort -u /sys/devices/system/cpu/cpu*/topology/physical_package_id | wc -l)\n\
                  awk '/MemTotal/ { print \"mib\", int($2 / 1024) }' /proc/meminfo; poweroff -f";
    let mut spec = given.spec(folder.path(), &[], script);
    spec.cpus = Cpus { boot: 3, max: 3 };
    // Beyond the hole below 4 GiB, and more than the lab has: pages are taken when they are touched.
    spec.memory.size_mib = 5000;
    let (reason, console) = given.run(spec).await;
    assert_eq!(reason, "the guest has shut down", "{console:?}");
    let has = |text: &str| console.iter().any(|line| line == text);
    assert!(has("cpus 3 of 0-2") && has("cores 3 packages 1"), "{console:?}");
    let memory = console.iter().find_map(|line| line.strip_prefix("mib ")?.parse::<u64>().ok()).unwrap();
    assert!((4800..5000).contains(&memory), "{memory} MiB");
}

#[tokio::test]
async fn processors_come_and_go_and_come_again() {
    let Some(given) = given() else { return };
    let folder = tempfile::tempdir().unwrap();
    let script = "cpu=/sys/devices/system/cpu/cpu1; echo ready\n\
                  for round in first second; do\n\
                  until [ -d $cpu ]; do sleep 0.1; done\n\
                  echo 1 >$cpu/online || dmesg | tail -n 15\n\
                  echo $round $(nproc)\n\
                  while [ -d $cpu ]; do sleep 0.1; done; echo $round gone\n\
                  done; poweroff -f";
    let mut spec = given.spec(folder.path(), &[], script);
    spec.cpus = Cpus { boot: 1, max: 2 };
    let memory_mib = spec.memory.size_mib;
    let machine = given.driver(true).boot(spec).await.unwrap();
    guest::says(&*machine, "ready").await;
    for round in ["first", "second"] {
        machine.resize(2, memory_mib).await.unwrap();
        guest::says(&*machine, &format!("{round} 2")).await;
        machine.resize(1, memory_mib).await.unwrap();
        assert_eq!(machine.stats().await.unwrap().cpus, 1, "{:?}", machine.console(30));
        guest::says(&*machine, &format!("{round} gone")).await;
    }
    assert_eq!(machine.wait().await.reason, "the guest has shut down");
}

#[tokio::test]
async fn a_disk_comes_to_a_running_guest_and_goes() {
    let Some(given) = given() else { return };
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    std::fs::write(&disk, vec![7; 1 << 20]).unwrap();
    let script = "echo ready\n\
                  for round in 0 1 2; do opens vda vdb\n\
                  [ -e /dev/vdb ] || dmesg | tail -n 40\n\
                  echo $round $(cat /sys/block/vda/serial) $(cat /sys/block/vdb/serial)\n\
                  while [ -e /dev/vda -o -e /dev/vdb ]; do sleep 0.1; done; echo $round gone; done; sleep 1000";
    let mut spec = given.spec(folder.path(), &guest::DISK, script);
    spec.devices = vec![Device::Rng];
    let machine = given.driver(true).boot(spec).await.unwrap();
    guest::says(&*machine, "ready").await;
    for round in 0..3 {
        let disk =
            |serial: &str| Device::Block { path: disk.clone(), read_only: true, direct: false, serial: serial.into() };
        // Two at once, of two names.
        let devices = [
            disk("one"),
            Device::Block { path: disk_of(&folder, round), read_only: false, direct: false, serial: "two".into() },
        ];
        for device in &devices {
            machine.attach(device.clone()).await.unwrap();
        }
        // Whichever the guest has seen first has the first name.
        guest::says_any(&*machine, &[&format!("{round} one two"), &format!("{round} two one")]).await;
        for device in devices {
            machine.detach(device).await.unwrap();
        }
        guest::says(&*machine, &format!("{round} gone")).await;
    }
    machine.stop().await.unwrap();
}

#[tokio::test]
async fn a_disk_is_held_to_a_rate_that_changes_while_it_is_read() {
    let Some(given) = given() else { return };
    let folder = tempfile::tempdir().unwrap();
    // Four MiB each time, by the guest's clock in seconds.
    let script = "n=0; while :; do a=$(cut -d. -f1 /proc/uptime)\n\
                  dd if=/dev/vda of=/dev/null bs=64k count=64 iflag=direct 2>/dev/null\n\
                  echo read $n in $(($(cut -d. -f1 /proc/uptime) - a)) s; n=$((n+1)); sleep 0.1; done";
    let path = folder.path().join("disk");
    std::fs::write(&path, vec![7; 4 << 20]).unwrap();
    let mut spec = given.spec(folder.path(), &guest::DISK, script);
    let disk = Device::Block { path, read_only: true, direct: false, serial: "slow".into() };
    spec.devices = vec![disk.clone()];
    let machine = given.driver(true).boot(spec).await.unwrap();
    let reads = || -> Vec<u64> {
        let console = machine.console(200);
        let lines =
            console.iter().filter_map(|line| line.strip_prefix("read ")?.strip_suffix(" s")?.split_once(" in "));
        lines.filter_map(|(_, seconds)| seconds.parse().ok()).collect()
    };
    guest::says(&*machine, "read 1 in").await;
    let rate = |bytes_per_second, operations_per_second| Limits {
        to_guest: Rate { bytes_per_second, operations_per_second },
        ..Limits::default()
    };
    machine.limit(disk.clone(), rate(1 << 20, 0)).await.unwrap();
    let before = reads().len();
    guest::says(&*machine, &format!("read {} in", before + 2)).await;
    // The one that was under way does not count. Another takes four seconds, less a bucket.
    let slow = reads().get(before + 1..).unwrap().to_vec();
    assert!(slow.iter().all(|seconds| *seconds >= 3), "{slow:?} of {:?}", reads());
    // Minutes for the next one, but for who changes his mind.
    machine.limit(disk.clone(), rate(0, 1)).await.unwrap();
    machine.limit(disk.clone(), rate(0, 0)).await.unwrap();
    let before = reads().len();
    guest::says(&*machine, &format!("read {} in", before + 3)).await;
    machine.stop().await.unwrap();
}

/// A disk of its own.
fn disk_of(folder: &tempfile::TempDir, number: u32) -> std::path::PathBuf {
    let path = folder.path().join(format!("disk-{number}"));
    std::fs::write(&path, vec![7; 1 << 20]).unwrap();
    path
}

#[tokio::test]
async fn a_disk_is_read_and_written() {
    let Some(given) = given() else { return };
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    let mut bytes = vec![7_u8; 4 << 20];
    bytes[..5].copy_from_slice(b"first");
    std::fs::write(&disk, &bytes).unwrap();
    let script = "echo size $(cat /sys/block/vda/size) serial $(cat /sys/block/vda/serial) ro $(cat /sys/block/vdb/ro)\n\
                  head -c 5 /dev/vda; echo\n\
                  echo written | dd of=/dev/vda bs=512 seek=1 conv=sync,fsync 2>/dev/null\n\
                  dd if=/dev/urandom of=/dev/vda bs=1M seek=1 count=2 conv=fsync 2>/dev/null\n\
                  echo 3 >/proc/sys/vm/drop_caches\n\
                  md5sum /dev/vda; blkdiscard -o 3145728 -l 1048576 /dev/vda && echo discarded\n\
                  echo x | dd of=/dev/vdb bs=512 count=1 conv=fsync 2>/dev/null || echo refused; poweroff -f";
    let mut spec = given.spec(folder.path(), &guest::DISK, script);
    let block =
        |read_only, serial: &str| Device::Block { path: disk.clone(), read_only, direct: false, serial: serial.into() };
    spec.devices = vec![block(false, "the-serial"), block(true, "")];
    let (reason, console) = given.run(spec).await;
    assert_eq!(reason, "the guest has shut down", "{console:?}");
    let has = |text: &str| console.iter().any(|line| line == text);
    assert!(has("size 8192 serial the-serial ro 1") && has("first") && has("refused"), "{console:?}");
    let found = std::fs::read(&disk).unwrap();
    assert_eq!((&found[..5], &found[512..519], found.len()), (&b"first"[..], &b"written"[..], 4 << 20));
    assert_ne!(found[1 << 20..(1 << 20) + 64], [7; 64]);
    if has("discarded") {
        assert_eq!(found[3 << 20..], vec![0; 1 << 20]);
    }
    let sum = console.iter().find(|line| line.ends_with("/dev/vda")).expect("a sum");
    println!("{sum}");
}

#[tokio::test]
async fn what_is_no_kernel_is_refused() {
    let Some(given) = given() else { return };
    let folder = tempfile::tempdir().unwrap();
    let good = given.spec(folder.path(), &[], "poweroff -f");
    let whole = std::fs::read(&good.kernel.path).unwrap();
    let path = folder.path().join("kernel");
    for (bytes, form, text) in [
        (&b""[..], KernelForm::PvhElf, "truncated"),
        (&whole[..whole.len() / 2], KernelForm::PvhElf, "truncated"),
        (&[b'x'; 4096][..], KernelForm::PvhElf, "not an uncompressed x86-64 kernel"),
        (&whole[..], KernelForm::BzImage, "not a 64-bit bzImage"),
    ] {
        std::fs::write(&path, bytes).unwrap();
        let mut spec = good.clone();
        spec.kernel = Kernel { path: path.clone(), form };
        match given.driver(true).boot(spec).await {
            Err(Error::Missing(found)) => assert!(found.contains(text), "{found}"),
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("booted"),
        }
        assert_eq!(std::fs::read_dir(folder.path().join("machine")).unwrap().count(), 0);
    }
}

#[tokio::test]
async fn a_file_is_memory_that_the_guest_reads_and_nobody_writes() {
    let Some(given) = given() else { return };
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    // Some 3.4 MB, which is no multiple of anything.
    let numbers: String = (1..=500_000).map(|number| format!("{number}\n")).collect();
    let (large, small) = (file("large", &numbers), file("small", "second\n"));
    let end = numbers.len();
    let script = format!(
        "opens pmem0 pmem1; for n in 0 1; do echo at $(basename $(readlink -f /sys/block/pmem$n/../../../../../..)) is $(head -n 1 /dev/pmem$n)\n\
         case $(head -n 1 /dev/pmem$n) in 1) large=/dev/pmem$n;; second) small=/dev/pmem$n;; esac; done\n\
         echo units $(($(cat /sys/block/${{large#/dev/}}/size) / 4096)) $(($(cat /sys/block/${{small#/dev/}}/size) / 4096))\n\
         echo sum $(head -c {end} $large | awk '{{ sum += $1 }} END {{ printf \"%.0f\", sum }}')\n\
         echo behind $(tail -c +{behind} $large | tr -d '\\0' | wc -c)\n\
         echo changed | dd of=$small bs=512 conv=sync,fsync 2>/dev/null\n\
         echo 3 >/proc/sys/vm/drop_caches; echo then $(head -n 1 $small); poweroff -f",
        behind = end + 1
    );
    let mut modules = guest::DISK.to_vec();
    modules.extend(["libnvdimm", "nd_btt", "nd_pmem", "nd_virtio", "virtio_pmem"]);
    let mut spec = given.spec(folder.path(), &modules, &script);
    spec.devices = vec![Device::Pmem { path: small.clone() }, Device::Rng, Device::Pmem { path: large }];
    // Behind what it could gain.
    spec.memory.max_mib = 512;
    assert!(given.driver(true).capabilities(&spec).coldplug.contains(&DeviceKind::Pmem));
    let (reason, console) = given.run(spec).await;
    let said = |line: &str| console.iter().any(|found| found == line);
    assert!(reason.contains("shut down"), "{reason}: {console:?}");
    for line in ["at 0000:00:01.0 is second", "at 0000:00:03.0 is 1", "units 2 1", "sum 125000250000", "behind 0"] {
        assert!(said(line), "{line}: {console:?}");
    }
    // What the guest writes goes nowhere.
    assert!(said("then second"), "{console:?}");
    assert_eq!(std::fs::read_to_string(small).unwrap(), "second\n");
}

#[tokio::test]
async fn memory_of_files_is_refused_where_others_reach_the_guests() {
    let Some(given) = given() else { return };
    let folder = tempfile::tempdir().unwrap();
    let spec = |path: &str, more: Option<Device>| {
        let mut spec = given.spec(folder.path(), &[], "poweroff -f");
        spec.devices = [Device::Pmem { path: path.into() }].into_iter().chain(more).collect();
        spec
    };
    let empty = folder.path().join("empty");
    std::fs::write(&empty, "").unwrap();
    let driver = given.driver(true);
    for (path, missing) in [("/nowhere", true), (empty.to_str().unwrap(), false)] {
        let refused = driver.boot(spec(path, None)).await.map(drop).unwrap_err();
        assert!(!missing || matches!(&refused, Error::Missing(text) if text.contains(path)), "{path}: {refused}");
    }
    let shared = Device::SharedFs { tag: "t".into(), socket: "/nowhere".into(), queue_size: 64 };
    let beside = spec("/bin/busybox", Some(shared));
    assert!(!driver.capabilities(&beside).coldplug.contains(&DeviceKind::Pmem));
    assert!(matches!(driver.boot(beside).await, Err(Error::Unsupported(_))));
}

#[tokio::test]
async fn a_guest_in_need_takes_back_what_it_has_left_to_its_host() {
    const MIB: u64 = 1 << 20;
    let Some(given) = given() else { return };
    let folder = tempfile::tempdir().unwrap();
    // 120 of 256 MiB, of which the balloon leaves some 40: more than is there without it, and no swap.
    let script = "echo ready; until [ $(awk '/MemFree/ { print int($2 / 1024) }' /proc/meminfo) -lt 80 ]; do sleep 0.1; done\n\
                  echo small; mkdir -p /mem; mount -t tmpfs -o size=90% t /mem\n\
                  dd if=/dev/zero of=/mem/f bs=1M count=120 2>/dev/null && echo filled $(ls -s /mem/f | cut -d' ' -f1); sleep 1000";
    let modules: Vec<_> = guest::DISK.into_iter().chain(["virtio_balloon"]).collect();
    let mut spec = given.spec(folder.path(), &modules, script);
    spec.devices = vec![Device::Rng, Device::Balloon];
    let machine = given.driver(true).boot(spec).await.unwrap();
    guest::says(&*machine, "ready").await;
    let wanted = 150 * MIB;
    machine.balloon(wanted).await.unwrap();
    guest::says(&*machine, "small").await;
    guest::says(&*machine, "filled").await;
    let left = machine.stats().await.unwrap().balloon_bytes;
    assert!(left < 110 * MIB, "{} MiB are left to the host: {:?}", left / MIB, machine.console(30));
    machine.stop().await.unwrap();
}

/// A file server for `folder` that listens at `socket`, and ends when this is dropped; none, with a printed reason, where there is no program.
struct FileServer(std::process::Child);

impl FileServer {
    fn start(folder: &std::path::Path, socket: &std::path::Path) -> Option<Self> {
        let (rust, c) = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd");
        let exists = |program: &str| std::path::Path::new(program).exists();
        let mut server = match () {
            () if exists(rust) => {
                let mut server = std::process::Command::new(rust);
                server.arg("--shared-dir").arg(folder);
                server
            }
            () if exists(c) => {
                let mut server = std::process::Command::new(c);
                server.args(["-f", "-o"]).arg(format!("source={}", folder.display()));
                server
            }
            () => {
                println!("left out: neither {rust} nor {c} is there");
                return None;
            }
        };
        let server = server.arg(format!("--socket-path={}", socket.display())).spawn().unwrap();
        let end = std::time::Instant::now() + guest::PATIENCE;
        // It tells nobody when it listens.
        while !socket.exists() && std::time::Instant::now() < end {
            std::thread::yield_now();
        }
        Some(Self(server))
    }
}

impl Drop for FileServer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn a_file_system_comes_to_a_running_guest_and_goes() {
    let Some(given) = given() else { return };
    let folder = tempfile::tempdir().unwrap();
    let shared = folder.path().join("shared");
    std::fs::create_dir(&shared).unwrap();
    std::fs::write(shared.join("file"), "of the host\n").unwrap();
    let script = "mkdir /mnt; echo ready; for round in 0 1; do\n\
                  until mount -t virtiofs late /mnt 2>/dev/null; do sleep 0.1; done\n\
                  echo $round reads $(cat /mnt/file); echo of the guest $round >/mnt/written; umount /mnt; echo $round done\n\
                  while [ -n \"$(ls /sys/bus/virtio/drivers/virtiofs | grep virtio)\" ]; do sleep 0.1; done; echo $round gone; done; sleep 1000";
    let modules: Vec<_> = guest::DISK.into_iter().chain(["fuse", "virtiofs"]).collect();
    let mut spec = given.spec(folder.path(), &modules, script);
    spec.devices = vec![Device::Rng];
    let driver = given.driver(true);
    assert!(!driver.capabilities(&spec).hotplug.contains(&DeviceKind::SharedFs), "nobody could map its memory");
    spec.memory.kind = MemoryKind::Shared;
    assert!(driver.capabilities(&spec).hotplug.contains(&DeviceKind::SharedFs));
    let machine = driver.boot(spec).await.unwrap();
    guest::says(&*machine, "ready").await;
    let device =
        |socket: &std::path::Path| Device::SharedFs { tag: "late".into(), socket: socket.into(), queue_size: 64 };
    let refused = machine.attach(device(&folder.path().join("nowhere"))).await.unwrap_err();
    assert!(matches!(&refused, Error::Missing(text) if text.contains("nowhere")), "{refused}");
    for round in 0..2 {
        let socket = folder.path().join(format!("socket{round}"));
        let Some(_server) = FileServer::start(&shared, &socket) else { return };
        machine.attach(device(&socket)).await.unwrap();
        assert!(matches!(machine.attach(device(&socket)).await, Err(Error::Invalid(_))), "twice");
        guest::says(&*machine, &format!("{round} done")).await;
        machine.detach(device(&socket)).await.unwrap();
        guest::says(&*machine, &format!("{round} gone")).await;
        assert!(machine.console(100).contains(&format!("{round} reads of the host")), "{:?}", machine.console(100));
        assert_eq!(std::fs::read_to_string(shared.join("written")).unwrap(), format!("of the guest {round}\n"));
    }
    machine.stop().await.unwrap();
}
