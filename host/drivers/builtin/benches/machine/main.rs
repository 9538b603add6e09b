//! Figures of the built-in monitor beside QEMU's, in one run: `cargo xtask bench` runs it where KVM works, or in the lab.
//! It prints one JSON object.
//!
//! The guest's init is `guest-probe`, which prints the guest's clock at its first instruction.

#[path = "../../tests/guest/mod.rs"]
mod guest;
mod saved;

use std::collections::BTreeMap;
use std::path::Path;

use coracle_driver_builtin::Builtin;
use coracle_driver_qemu::{Config as QemuConfig, MachineType, Qemu};
use coracle_machine::{Accelerator, Device, Driver, Machine, MachineSpec, MemoryKind};
use guest::{Given, given, initrd_of, says};
use serde_json::{Value, json};

/// Boots of each kind, in turn.
const ROUNDS: usize = 7;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let Some(given) = given() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let mut report = BTreeMap::new();
    report.insert("boot_to_init_us", boots(&given, folder.path()).await);
    report.insert("disk_reads", disk_reads(&given, folder.path()).await);
    report.insert("idle", idle(&given, folder.path()).await);
    report.insert("agent_ready", agent_ready(&given, folder.path()).await);
    report.insert("saved", saved::restores(&given, folder.path()).await);
    report.insert("sizes", saved::sizes(&given, folder.path()).await);
    report.insert("kvm_calls_to_first_entry", kvm_calls(&given, folder.path()).await);
    println!("{:#}", json!(report));
}

/// Machines of each kind whose disk is read, and how many times.
const DISK_ROUNDS: usize = 3;
const READS: u64 = 4096;

/// A machine that boots to `guest-probe` as quietly as can be.
fn spec(given: &Given, folder: &Path) -> MachineSpec {
    let mut spec = given.spec(folder, &[], "");
    let probe = std::fs::read(std::env::var_os("CORACLE_TEST_PROBE").expect("CORACLE_TEST_PROBE")).expect("the probe");
    // One MiB in all, as the figure's definition has it, where the program is smaller.
    let filling = vec![0; (1_usize << 20).saturating_sub(probe.len())];
    let files = [("init", probe), ("filling", filling)];
    std::fs::write(&spec.initrd, initrd_of(&files)).expect("the RAM disk");
    // The figure's definition names the newer kernel.
    if let Some(guest) = std::env::var_os("CORACLE_TEST_OTHER_GUEST") {
        spec.kernel.path = Path::new(&guest).join("vmlinux");
    }
    spec.command_line = "panic=-1 quiet loglevel=0 cryptomgr.notests".into();
    spec.devices = vec![Device::Rng];
    spec
}

/// QEMU on KVM.
fn qemu(machine_type: MachineType) -> Qemu {
    Qemu::new(QemuConfig {
        program: "/usr/bin/qemu-system-x86_64".into(),
        machine_type,
        accelerator: Accelerator::Kvm,
        vsock_server: Vec::new(),
        kernel_vsock: true,
        jail: true,
        extra_arguments: Vec::new(),
    })
}

/// The one in the middle.
fn median(series: &[u64]) -> u64 {
    let mut sorted = series.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or(0)
}

/// The guest's clock at the first instruction of its init, by each monitor in turn.
async fn boots(given: &Given, folder: &Path) -> Value {
    let qemu = qemu(MachineType::Microvm);
    let (jailed, free) = (given.driver(true), given.driver(false));
    let mut series: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    for _ in 0..ROUNDS {
        let drivers: [(&str, &dyn Driver); 3] =
            [("qemu_microvm", &qemu), ("builtin", &jailed), ("builtin_unjailed", &free)];
        for (name, driver) in drivers {
            let machine = driver.boot(spec(given, folder)).await.expect("boot");
            series.entry(name).or_default().push(clock_at_init(&*machine).await);
            machine.stop().await.expect("stop");
        }
    }
    let median = |name: &str| series.get(name).map_or(0, |values| median(values));
    #[expect(clippy::cast_precision_loss, reason = "a ratio of microseconds")]
    let ratio = |one: &str, other: &str| median(one) as f64 / median(other) as f64;
    json!({
        "series": series,
        "ratio_to_qemu_microvm": ratio("builtin", "qemu_microvm"),
        "ratio_jailed_to_unjailed": ratio("builtin", "builtin_unjailed"),
    })
}

/// 4 KiB reads of a disk in the host's memory, one at a time past the guest's cache, with the jail and without it in turn.
async fn disk_reads(given: &Given, folder: &Path) -> Value {
    let disk = folder.join("disk");
    std::fs::File::create(&disk).and_then(|file| file.set_len(READS * 4096)).expect("a disk");
    let mut series: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for _ in 0..DISK_ROUNDS {
        for (name, jail) in [("jailed", true), ("unjailed", false)] {
            series.entry(name).or_default().push(microseconds_of_a_read(given, folder, &disk, jail).await);
        }
    }
    let least = |name: &str| series[name].iter().copied().fold(f64::INFINITY, f64::min);
    json!({
        "microseconds_for_4_kib": series,
        "ratio_of_the_least_jailed_to_unjailed": least("jailed") / least("unjailed"),
    })
}

/// Of the second time, when the host has the file in its memory; by the guest's own clock, which counts in 10 ms.
async fn microseconds_of_a_read(given: &Given, folder: &Path, disk: &Path, jail: bool) -> f64 {
    let read = format!("dd if=/dev/vda of=/dev/null bs=4k count={READS} iflag=direct 2>/dev/null");
    let script = format!("{read}; cat /proc/uptime; {read} && cat /proc/uptime && echo was read; sleep 1000");
    let mut spec = given.spec(folder, &guest::DISK, &script);
    spec.devices = vec![Device::Block { path: disk.into(), read_only: true, direct: false, serial: String::new() }];
    let machine = given.driver(jail).boot_owned(spec).await;
    says(&*machine, "was read").await;
    let console = machine.console(50);
    machine.stop().await.expect("stop");
    let uptime = |line: &String| line.split_once(' ').and_then(|(up, _)| up.parse::<f64>().ok());
    let times: Vec<f64> = console.iter().filter_map(uptime).collect();
    let [before, after] = times[..] else { panic!("no two times: {console:?}") };
    #[expect(clippy::cast_precision_loss, reason = "a count of thousands")]
    let reads = READS as f64;
    (after - before) * 1e6 / reads
}

async fn clock_at_init(machine: &dyn Machine) -> u64 {
    // The line to its end.
    says(machine, " us (0)").await;
    let console = machine.console(50);
    let line = console.iter().find_map(|line| line.split_once("init after "));
    line.and_then(|(_, rest)| rest.split(' ').next()?.parse().ok()).expect("a clock")
}

/// What a monitor takes whose guest does nothing.
async fn idle(given: &Given, folder: &Path) -> Value {
    let machine = given.driver(true).boot_owned(spec(given, folder)).await;
    clock_at_init(&*machine).await;
    let pid = guest::children().pop().expect("the monitor");
    let before = (machine.stats().await.expect("stats").monitor, guest::switches(pid));
    // The figure is what happens in a span of time, not an event.
    tokio::time::sleep(std::time::Duration::from_secs(10)).await;
    let after = (machine.stats().await.expect("stats").monitor, guest::switches(pid));
    let woken: BTreeMap<_, _> =
        after.1.iter().map(|(name, count)| (name, count - before.1.get(name).copied().unwrap_or(0))).collect();
    let memory = guest::memory(pid);
    let report = json!({
        "memory_kib": { "resident": memory.resident, "anonymous": memory.anonymous, "of_files": memory.of_files },
        "guest_memory_resident_bytes": after.0["memory_resident_bytes"],
        "threads": after.1.len(),
        "wakeups_in_10_s_by_thread": woken,
        "exits_to_the_monitor_in_10_s": guest::exits(&after.0) - guest::exits(&before.0),
    });
    machine.stop().await.expect("stop");
    report
}

/// From the monitor's start to the agent's greeting, with the guest image under test.
async fn agent_ready(given: &Given, folder: &Path) -> Value {
    let mut spec = given.image(folder);
    spec.memory.kind = MemoryKind::Shared;
    let machine = given.driver(true).boot_owned(spec).await;
    let greeted = tokio::time::timeout(guest::PATIENCE, machine.guest_connection()).await;
    greeted.expect("a greeting in time").expect("a greeting");
    let figures = machine.stats().await.expect("stats").monitor;
    machine.stop().await.expect("stop");
    json!(figures)
}

/// The calls of KVM until a processor first enters the guest, by strace; null where that is not installed.
async fn kvm_calls(given: &Given, folder: &Path) -> Value {
    let log = folder.join("strace");
    let mut words: Vec<std::ffi::OsString> = ["strace", "-f", "-e", "trace=ioctl", "-o"].map(Into::into).into();
    words.push(log.clone().into());
    let driver = given.driver_behind(words);
    // The tracer is not in the jail: what is counted is the same.
    let Ok(machine) = driver.boot(spec(given, folder)).await else { return Value::Null };
    clock_at_init(&*machine).await;
    machine.stop().await.expect("stop");
    let text = std::fs::read_to_string(&log).unwrap_or_default();
    let calls = text.lines().filter(|line| line.contains("KVM_"));
    json!(calls.take_while(|line| !line.contains("KVM_RUN")).count())
}

/// A driver that gives a machine without being borrowed from.
trait Boot {
    async fn boot_owned(self, spec: MachineSpec) -> Box<dyn Machine>;
}

impl Boot for Builtin {
    async fn boot_owned(self, spec: MachineSpec) -> Box<dyn Machine> {
        self.boot(spec).await.expect("boot")
    }
}
