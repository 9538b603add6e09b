//! Machines that start where another was saved, beside such that boot; and what growing takes.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use coracle_driver_qemu::MachineType;
use coracle_machine::{Driver, MachineSpec};
use serde_json::{Value, json};

use super::guest::{self, Given, greets};
use super::{median, qemu};

/// Starts of each kind, in turn.
const ROUNDS: usize = 7;
/// Machines that run at once.
const CLONES: usize = 5;
/// By how much a machine grows, in MiB.
const GROWTH_MIB: u64 = 1024;

/// A machine with the guest image under test, in a folder of its own.
fn spec(given: &Given, folder: &Path, name: &str) -> MachineSpec {
    let own = folder.join(name);
    std::fs::create_dir_all(&own).expect("a folder");
    given.image(&own)
}

fn microseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

/// The processor time of all threads of the newest monitor so far, in microseconds.
fn processor_time() -> u64 {
    let monitor = guest::children().into_iter().max().expect("a monitor");
    let tasks = std::fs::read_dir(format!("/proc/{monitor}/task")).expect("tasks").flatten();
    let nanoseconds = tasks.filter_map(|task| {
        let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    });
    nanoseconds.sum::<u64>() / 1000
}

/// From the command to the agent's greeting, booted and restored in turn; and what clones take of the host's memory.
pub(crate) async fn restores(given: &Given, folder: &Path) -> Value {
    let (driver, saved) = (given.driver(true), folder.join("saved"));
    let machine = driver.boot(spec(given, folder, "saved-one")).await.expect("boot");
    let stream = greets(&*machine).await;
    machine.save(saved.clone()).await.expect("save");
    machine.stop().await.expect("stop");
    drop(stream);
    let mut series: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for round in 0..ROUNDS {
        for name in ["boot", "restore"] {
            let spec = spec(given, folder, &format!("{name}{round}"));
            let began = Instant::now();
            let started = if name == "boot" { driver.boot(spec) } else { driver.restore(spec, saved.clone()) };
            let machine = started.await.expect("a machine");
            let (running, time) = (microseconds(began), processor_time());
            let _greeting = greets(&*machine).await;
            for (what, value) in
                [("us_to_running", running), ("cpu_us_to_running", time), ("us_to_agent", microseconds(began))]
            {
                series.entry(format!("{name}_{what}")).or_default().push(value);
            }
            machine.stop().await.expect("stop");
        }
    }
    let of = |name: &str| series.get(name).map_or(0, |values| median(values));
    #[expect(clippy::cast_precision_loss, reason = "a ratio of microseconds")]
    let ratio = of("restore_us_to_agent") as f64 / of("boot_us_to_agent") as f64;
    let memory = std::fs::metadata(saved.join("memory")).expect("the saved memory");
    json!({
        "ratio_of_restore_to_boot_until_the_agent_greets": ratio,
        "saved_kib": std::os::unix::fs::MetadataExt::blocks(&memory) / 2,
        "clones": clones(given, folder, &saved).await,
        "series": series,
    })
}

/// The guest's memory that each of some machines has for itself, in KiB, when all their agents have greeted.
async fn clones(given: &Given, folder: &Path, saved: &Path) -> Value {
    let driver = given.driver(true);
    let mut machines = Vec::new();
    for number in 0..CLONES {
        let machine =
            driver.restore(spec(given, folder, &format!("clone{number}")), saved.into()).await.expect("restore");
        let stream = greets(&*machine).await;
        machines.push((machine, stream));
    }
    let dirty: Vec<u64> = guest::children().into_iter().map(private_dirty).collect();
    for (machine, _) in &machines {
        machine.stop().await.expect("stop");
    }
    json!({ "machines": CLONES, "private_dirty_kib_of_the_guests": dirty })
}

/// What a process has written of its mappings of a saved memory, a file of that name, in KiB.
fn private_dirty(pid: i32) -> u64 {
    let map = std::fs::read_to_string(format!("/proc/{pid}/smaps")).expect("smaps");
    let (mut dirty, mut is_guest) = (0, false);
    for line in map.lines() {
        if line.split_whitespace().next().is_some_and(|range| range.contains('-') && !range.ends_with(':')) {
            is_guest = line.ends_with("/memory");
        } else if let Some(size) = line.strip_prefix("Private_Dirty:").filter(|_| is_guest) {
            dirty += size.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0);
        }
    }
    dirty
}

/// What a machine's growing and shrinking takes, by each monitor.
pub(crate) async fn sizes(given: &Given, folder: &Path) -> Value {
    let qemu = qemu(MachineType::Q35);
    let builtin = given.driver(true);
    let mut report = BTreeMap::new();
    let drivers: [(&str, &dyn Driver); 2] = [("builtin", &builtin), ("qemu", &qemu)];
    for (name, driver) in drivers {
        let mut spec = spec(given, folder, &format!("sizes-{name}"));
        let least = spec.memory.size_mib;
        (spec.cpus.max, spec.memory.max_mib) = (spec.cpus.boot + 1, least + GROWTH_MIB);
        let machine = driver.boot(spec).await.expect("boot");
        let _greeting = greets(&*machine).await;
        let mut times = BTreeMap::new();
        for (what, cpus, memory_mib) in [
            ("us_to_gain_1_gib", 1, least + GROWTH_MIB),
            ("us_to_give_1_gib_back", 1, least),
            ("us_to_gain_a_processor", 2, least),
            ("us_to_give_a_processor_back", 1, least),
        ] {
            let began = Instant::now();
            machine.resize(cpus, memory_mib).await.expect("resize");
            while machine.stats().await.expect("stats").memory_bytes != memory_mib << 20 {
                tokio::task::yield_now().await;
            }
            times.insert(what, microseconds(began));
        }
        report.insert(name, json!({ "us": times, "bytes_gained_and_given": GROWTH_MIB << 20 }));
        machine.stop().await.expect("stop");
    }
    json!(report)
}
