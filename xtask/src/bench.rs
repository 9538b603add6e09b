//! `cargo xtask bench`: the figures, with their raw series and the environment they were taken in.

mod against;
mod agent;
mod calls;
mod devices;
mod figures;
mod reference;
mod rootfs;
mod series;
mod syscalls;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use coracle_ci_statistics::compare_pairs;
use serde_json::{Value, json};

use crate::budgets::Budgets;
use crate::build::{self, Built};
use crate::builtin::Lane;
use crate::demo::{Process, processes};
use crate::image;
use crate::pods;
use crate::setup::{self, Level};
use crate::steps::{command, output, step};
use crate::tests;

/// By which orders are drawn where not all are tried.
const SEED: u64 = 1;

/// Measure sizes, memory, calls, instructions and times.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print JSON only.
    #[arg(long)]
    json: bool,
    /// Only this part of the report, by its name there.
    #[arg(long, value_name = "PART")]
    only: Option<String>,
    /// Only these suites: size, memory, start, exec, guest-boot, io, net, monitor.
    #[arg(long, value_delimiter = ',')]
    suite: Vec<String>,
    /// Take the counts that CI holds to a budget, and fail where one is beyond it (xtask/budgets.toml).
    #[arg(long)]
    gate: bool,
    /// Measure beside another commit, which is built in a checkout of its own: counts, and `coracle run` of true in pairs.
    #[arg(long, value_name = "REVISION", conflicts_with_all = ["only", "suite", "gate"])]
    against: Option<String>,
    /// Time `ctr run` beside another runtime that containerd knows, such as io.containerd.runc.v2 or io.containerd.kata.v2.
    #[arg(long, value_name = "RUNTIME", conflicts_with_all = ["only", "suite", "gate", "against"])]
    reference: Option<String>,
    /// How many pairs of `coracle run` and `runc run` (or the other commit's) are timed.
    #[arg(long, default_value_t = 20)]
    pairs: usize,
}

/// The suites, and the parts of the report that belong to each.
const SUITES: [(&str, &[&str]); 8] = [
    ("size", &["sizes_bytes"]),
    ("memory", &["idle_pod", "memory"]),
    ("start", &["run_true_against_runc", "system_calls"]),
    ("exec", &["pods"]),
    ("guest-boot", &["guest_instructions_to_ready"]),
    ("io", &["rootfs", "volumes"]),
    ("net", &["networks"]),
    ("monitor", &["device_instructions", "monitor"]),
];

/// The suite of a part.
fn suite(part: &str) -> &'static str {
    SUITES.iter().find(|(_, parts)| parts.contains(&part)).map_or("other", |(suite, _)| suite)
}

impl Args {
    /// The parts that are to be measured.
    fn chosen(&self) -> Result<Vec<&'static str>> {
        if let Some(wrong) = self.suite.iter().find(|suite| !SUITES.iter().any(|(known, _)| known == suite)) {
            bail!("there is no suite {wrong}; there are {}", SUITES.map(|(name, _)| name).join(", "));
        }
        let budgets = Budgets::read()?;
        let gated = budgets.parts();
        let parts = SUITES.iter().flat_map(|(suite, parts)| parts.iter().map(move |part| (*suite, *part)));
        let is_chosen = |(suite, part): &(&str, &str)| {
            self.only.as_deref().is_none_or(|only| only == *part)
                && (self.suite.is_empty() || self.suite.iter().any(|wanted| wanted == suite))
                && (!self.gate || gated.contains(part))
        };
        let chosen: Vec<_> = parts.clone().filter(is_chosen).map(|(_, part)| part).collect();
        if let Some(only) = self.only.as_ref().filter(|_| chosen.is_empty()) {
            bail!("--only {only}: the parts are {}", parts.map(|(_, part)| part).collect::<Vec<_>>().join(", "));
        }
        Ok(chosen)
    }
}

/// Pods that run at once where memory is measured.
const PODS: usize = 5;

/// Boots under the instruction counter.
const BOOTS: usize = 3;

/// QEMU's arguments for them: time is instructions, the calendar starts at the same date, and randomness at the same seed.
const COUNTING: [&str; 6] = ["-icount", "shift=0,sleep=off", "-rtc", "base=2026-01-01T00:00:00,clock=vm", "-seed", "1"];

/// A place to run pods in.
struct Bench {
    built: Built,
    image: PathBuf,
    root: PathBuf,
    settings: PathBuf,
}

impl Bench {
    fn coracle(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.built.coracle());
        command.args(arguments).env("CORACLE_CONFIG", &self.settings).env("CORACLE_ROOT", &self.root);
        command.stdin(Stdio::null()).stderr(Stdio::null());
        command
    }

    fn image(&self) -> String {
        format!("oci:{}", self.image.display())
    }

    /// How long a container of `true` takes, from the command to its end.
    fn run_true(&self) -> Result<f64> {
        timed(self.coracle(&["run", "--rm", "--network", "none", &self.image(), "true"]))
    }

    fn detached(&self, name: &str) -> Result<()> {
        let image = self.image();
        let mut run =
            self.coracle(&["run", "--detach", "--network", "none", "--name", name, &image, "sleep", "100000"]);
        run.env("CORACLE_DEBUG", "1").stdout(Stdio::null());
        crate::steps::run(run)
    }

    fn remove(&self, name: &str) -> Result<()> {
        let mut remove = self.coracle(&["rm", "--force", name]);
        remove.stdout(Stdio::null());
        crate::steps::run(remove)
    }

    /// Removes whatever runs still, where something has failed on the way.
    fn clear(&self) {
        for entry in std::fs::read_dir(self.root.join("containers")).into_iter().flatten().flatten() {
            if let Some(name) = entry.file_name().to_str() {
                let _ = self.remove(name);
            }
        }
        let _ = std::fs::remove_dir_all(&self.root);
    }

    fn write_settings(&self, guest: &Path, run: &Path, more: &str) -> Result<()> {
        let text = format!(
            "run.folder = {:?}\nguest.folder = {:?}\nmachine.monitor = \"qemu\"\nmachine.accelerator = {:?}\n{more}\n",
            run.display().to_string(),
            guest.display().to_string(),
            if more.contains("icount") { "emulation" } else { "any" }
        );
        std::fs::write(&self.settings, text).context("write the settings")
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let chosen = args.chosen()?;
    setup::ensure(Level::Test)?;
    let built = build::all()?;
    if !setup::is_root() {
        bail!("pods need root: run this by sudo");
    }
    let guest = built.guest(tests::KERNEL)?;
    let work = built.work();
    let image = work.join("image");
    image::make(&image, &[])?;
    let run_folder = PathBuf::from(format!("/run/coracle-bench-{}", std::process::id()));
    let bench = Bench { image, root: work.join("bench-root"), settings: work.join("bench.toml"), built };
    bench.write_settings(&guest, &run_folder, "")?;
    let outcome = match (&args.against, &args.reference) {
        (Some(revision), _) => against::measure(&bench, revision, args.pairs, &run_folder),
        (None, Some(runtime)) => reference::measure(&bench, runtime, args.pairs),
        (None, None) => measure(&bench, args, &chosen, &guest, &run_folder),
    };
    bench.clear();
    let _ = std::fs::remove_dir_all(&run_folder);
    let report = outcome?;
    if args.against.is_none() && args.reference.is_none() {
        series::give(&report)?;
    }
    if args.gate {
        return Budgets::read()?.hold(&report);
    }
    if args.json {
        println!("{report:#}");
    } else if args.against.is_some() {
        against::print(&report)?;
    } else if args.reference.is_some() {
        reference::print(&report);
    } else {
        print_report(&report);
    }
    Ok(())
}

fn measure(bench: &Bench, args: &Args, chosen: &[&str], guest: &Path, run_folder: &Path) -> Result<Value> {
    let part = |name: &str, text: &str, work: &dyn Fn() -> Result<Value>| -> Result<(String, Value)> {
        let wanted = chosen.contains(&name);
        let value = if wanted { step(text, work)? } else { Value::Null };
        Ok((name.to_owned(), value))
    };
    let lane = || -> Result<Value> {
        let lane = Lane {
            built: &bench.built,
            kernel: tests::KERNEL.to_owned(),
            guest: guest.to_owned(),
            other: Some(tests::other_guest(&bench.built, tests::OTHER_KERNEL)?),
            usual: None,
            image: bench.image.clone(),
        };
        lane.measure()
    };
    let pairs = args.pairs;
    let parts = [
        part("sizes_bytes", "sizes", &|| sizes(bench))?,
        part("idle_pod", "an idle pod", &|| idle_pod(bench, run_folder))?,
        part("memory", &format!("memory of {PODS} pods"), &|| memory(bench))?,
        part("guest_instructions_to_ready", "instructions to ready", &|| instructions(bench, guest, run_folder))?,
        part("run_true_against_runc", &format!("{pairs} pairs with runc"), &|| ratio(bench, pairs))?,
        part("system_calls", "system calls of the command line", &|| syscalls::measure(bench))?,
        part("rootfs", "what roots are made of", &|| rootfs::measure(bench, guest, run_folder))?,
        part("networks", "networks", &|| figures::measure(&bench.built, "networks"))?,
        part("volumes", "volumes", &|| figures::measure(&bench.built, "volumes"))?,
        part("pods", "pods through containerd", &|| pods::measure(&bench.built, pairs))?,
        part("device_instructions", "instructions of the built-in monitor's devices", &devices::measure)?,
        part("monitor", "the built-in monitor", &lane)?,
    ];
    let mut report = serde_json::Map::from_iter(parts);
    report.insert("environment".into(), environment(bench)?);
    Ok(report.into())
}

fn environment(bench: &Bench) -> Result<Value> {
    let text =
        |program: &str, arguments: &[&str]| output(command(program, arguments)).map(|text| text.trim().to_owned());
    let mut probe = Command::new(bench.built.shim());
    probe.arg("probe").env("CORACLE_CONFIG", &bench.settings);
    let probe: Value = serde_json::from_str(&output(probe)?)?;
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    Ok(json!({
        "kernel": text("uname", &["-srm"])?,
        "qemu": text("qemu-system-x86_64", &["--version"])?.lines().next().unwrap_or_default(),
        "rustc": text("rustc", &["--version"])?,
        "commit": text("git", &["rev-parse", "HEAD"]).unwrap_or_default(),
        "processor": model.trim_start_matches(['\t', ' ', ':']),
        "processors": std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
        "accelerator": probe["accelerator"]["name"],
    }))
}

fn sizes(bench: &Bench) -> Result<Value> {
    let size = |path: PathBuf| {
        std::fs::metadata(&path).map(|metadata| metadata.len()).with_context(|| format!("{}", path.display()))
    };
    let (shim, agent) = (size(bench.built.shim())?, size(bench.built.agent())?);
    Ok(json!({
        "shim": { "stripped": shim, "at_most": 10_000_000 },
        "agent": { "stripped": agent, "at_most": 6_000_000 },
        "coracle": { "stripped": size(bench.built.coracle())? },
    }))
}

/// The only pod's folder below the run folder.
fn pod(run_folder: &Path) -> Result<PathBuf> {
    let mut pods = std::fs::read_dir(run_folder).context("the run folder")?.flatten();
    Ok(pods.next().context("there is no pod")?.path())
}

fn idle_pod(bench: &Bench, run_folder: &Path) -> Result<Value> {
    let start = Instant::now();
    bench.detached("idle")?;
    let seconds = start.elapsed().as_secs_f64();
    let cpu = cpu_milliseconds();
    let socket = pod(run_folder)?.join("m/vsock.sock");
    let metrics = agent::metrics(&socket)?;
    let figure = |name: &str| metrics.iter().find(|(found, _)| found == name).map(|(_, value)| *value);
    let all = processes();
    let shim = all.iter().find(|process| process.name == "shim").context("there is no shim")?;
    let log = std::fs::read_to_string(bench.root.join("containers/idle/log")).context("the shim's log")?;
    let counted = calls::count(&log)?;
    let report = json!({
        "shim": {
            "anonymous_kib": shim.anonymous_kib, "anonymous_kib_at_most": 1600,
            "resident_kib": shim.resident_kib,
            "threads": shim.threads, "threads_at_most": 4,
        },
        "agent": {
            "resident_bytes": figure("kata_agent_process_resident_memory_bytes"), "resident_bytes_at_most": 6_000_000,
            "anonymous_bytes": figure("kata_agent_process_anonymous_memory_bytes"),
            "threads": figure("kata_agent_threads"),
        },
        "agent_calls_to_first_output": counted,
        "fixed_sleeps": crate::sleeps::report()?,
        "host_cpu_ms_to_start": cpu,
        "seconds_to_start": seconds,
        "processes": all.iter().map(|process| json!({
            "name": process.name, "resident_kib": process.resident_kib,
            "anonymous_kib": process.anonymous_kib, "threads": process.threads,
        })).collect::<Vec<_>>(),
    });
    bench.remove("idle")?;
    Ok(report)
}

/// Processor time of each kind of process so far, in milliseconds (proc(5), stat: fields 14 and 15, in ticks of 10 ms).
fn cpu_milliseconds() -> Value {
    let mut by_name = serde_json::Map::new();
    let mut sum = 0;
    for process in processes() {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.pid)).unwrap_or_default();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
        let milliseconds = (ticks(11) + ticks(12)) * 10;
        sum += milliseconds;
        let entry = by_name.entry(process.name).or_insert(json!(0));
        *entry = json!(entry.as_u64().unwrap_or(0) + milliseconds);
    }
    json!({ "sum": sum, "by_process": by_name })
}

/// Bytes that a QEMU's guest memory takes: the blocks of its memory file.
fn guest_memory_kib(process: &Process) -> u64 {
    let mut kib = 0;
    for entry in std::fs::read_dir(format!("/proc/{}/fd", process.pid)).into_iter().flatten().flatten() {
        let target = std::fs::read_link(entry.path()).unwrap_or_default();
        if target.to_string_lossy().starts_with("/memfd:") {
            let blocks =
                std::fs::metadata(entry.path()).map(|metadata| std::os::unix::fs::MetadataExt::blocks(&metadata));
            kib += blocks.unwrap_or(0) / 2;
        }
    }
    kib
}

/// All that the pods that run now cost: anonymous memory of every process, and guest memory in use.
fn cost_kib() -> (u64, u64) {
    let all = processes();
    let anonymous = all.iter().map(|process| process.anonymous_kib).sum();
    (anonymous, all.iter().filter(|process| process.name == "qemu").map(guest_memory_kib).sum())
}

fn memory(bench: &Bench) -> Result<Value> {
    let mut series = Vec::new();
    for number in 1..=PODS {
        bench.detached(&format!("m{number}"))?;
        let (anonymous, guest) = cost_kib();
        series.push(json!({ "pods": number, "anonymous_kib": anonymous, "guest_memory_kib": guest }));
    }
    for number in 1..=PODS {
        bench.remove(&format!("m{number}"))?;
    }
    let total =
        |entry: &Value| entry["anonymous_kib"].as_u64().unwrap_or(0) + entry["guest_memory_kib"].as_u64().unwrap_or(0);
    let further = (total(&series[PODS - 1]) - total(&series[0])) / (PODS as u64 - 1);
    Ok(json!({
        "each_further_pod_kib": further,
        "of_which_anonymous_kib": (series[PODS - 1]["anonymous_kib"].as_u64().unwrap_or(0) - series[0]["anonymous_kib"].as_u64().unwrap_or(0)) / (PODS as u64 - 1),
        "note": "under emulation QEMU's translation cache is part of its anonymous memory",
        "series": series,
    }))
}

/// The guest's time stamp counter when the agent serves, where QEMU counts instructions.
fn instructions(bench: &Bench, guest: &Path, run_folder: &Path) -> Result<Value> {
    bench.write_settings(guest, run_folder, &format!("qemu.arguments = {COUNTING:?}"))?;
    let mut series = Vec::new();
    for _ in 0..BOOTS {
        bench.detached("count")?;
        let metrics = agent::metrics(&pod(run_folder)?.join("m/vsock.sock"))?;
        let ready = metrics.iter().find(|(name, _)| name == "coracle_guest_tsc_at_ready").map(|(_, value)| *value);
        series.push(ready.context("the agent tells no counter")?);
        bench.remove("count")?;
    }
    bench.write_settings(guest, run_folder, "")?;
    let (least, most) = (series.iter().copied().min().unwrap_or(0), series.iter().copied().max().unwrap_or(0));
    #[expect(clippy::cast_precision_loss, reason = "a share of two like numbers")]
    let spread = if least == 0 { 0.0 } else { (most - least) as f64 / least as f64 * 100.0 };
    Ok(json!({ "series": series, "spread_percent": spread }))
}

/// The image's root as a folder.
fn unpacked(bench: &Bench, image: &Path) -> Result<PathBuf> {
    let folder = bench.root.join("unpacked").join(image.file_name().unwrap_or_default());
    if !folder.exists() {
        let read = |digest: &Value| -> Result<Vec<u8>> {
            let path =
                image.join("blobs/sha256").join(digest.as_str().unwrap_or_default().trim_start_matches("sha256:"));
            std::fs::read(&path).with_context(|| format!("read {}", path.display()))
        };
        let index: Value = serde_json::from_slice(&std::fs::read(image.join("index.json"))?)?;
        let manifest: Value = serde_json::from_slice(&read(&index["manifests"][0]["digest"])?)?;
        let layer = read(&manifest["layers"][0]["digest"])?;
        tar::Archive::new(layer.as_slice()).unpack(&folder).context("unpack the image")?;
    }
    Ok(folder)
}

/// Writes runc's bundle for a command in a root.
fn runc_bundle(bundle: &Path, root: &Path, readonly: bool, arguments: &Value) -> Result<()> {
    let path = bundle.join("config.json");
    let _ = std::fs::remove_file(&path);
    let mut spec = command("runc", &["spec", "--bundle"]);
    spec.arg(bundle);
    crate::steps::run(spec)?;
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    config["process"]["terminal"] = false.into();
    config["process"]["args"] = arguments.clone();
    config["process"]["env"] = json!(["PATH=/bin"]);
    config["root"] = json!({ "path": root, "readonly": readonly });
    std::fs::write(&path, config.to_string()).context("write runc's bundle")
}

/// `coracle run` of true against `runc run` of the same root, in turn.
fn ratio(bench: &Bench, pairs: usize) -> Result<Value> {
    let bundle = bench.root.join("runc");
    std::fs::create_dir_all(&bundle).context("runc's bundle")?;
    runc_bundle(&bundle, &unpacked(bench, &bench.image)?, true, &json!(["true"]))?;
    let ours = || bench.run_true();
    let runcs = || {
        let mut run = Command::new("runc");
        run.args(["run", "--bundle"]).arg(&bundle).arg("coracle-bench").stdin(Stdio::null()).stderr(Stdio::null());
        timed(run)
    };
    // One of each to warm caches.
    let (_, _) = (ours()?, runcs()?);
    let mut series = Vec::new();
    for _ in 0..pairs {
        series.push((ours()?, runcs()?));
    }
    let mut ratios: Vec<f64> = series.iter().map(|(ours, runcs)| ours / runcs).collect();
    ratios.sort_by(f64::total_cmp);
    let turned: Vec<(f64, f64)> = series.iter().map(|(ours, runcs)| (*runcs, *ours)).collect();
    let difference = compare_pairs(&turned, SEED);
    Ok(json!({
        // By which factor ours takes longer, and how probable that is where it does not.
        "slower": difference.map(|found| json!({ "factor": found.factor, "probability": found.probability })),
        "ratio_median": ratios.get(ratios.len() / 2),
        "ratio_min": ratios.first(),
        "ratio_max": ratios.last(),
        "seconds": series.iter().map(|(ours, runcs)| json!([ours, runcs])).collect::<Vec<_>>(),
        "target": null,
    }))
}

/// How long a command takes, in seconds; it must succeed.
fn timed(mut command: Command) -> Result<f64> {
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let start = Instant::now();
    crate::steps::run(command)?;
    Ok(start.elapsed().as_secs_f64())
}

/// Times of two things in pairs, after one of each to warm caches. Who comes first has it warmer, or colder: each is by turns.
fn in_turn(
    pairs: usize,
    mut first: impl FnMut() -> Result<f64>,
    mut second: impl FnMut() -> Result<f64>,
) -> Result<Vec<(f64, f64)>> {
    let (_, _) = (second()?, first()?);
    let mut series = Vec::new();
    for pair in 0..pairs {
        series.push(if pair % 2 == 0 {
            let one = first()?;
            (one, second()?)
        } else {
            let two = second()?;
            (first()?, two)
        });
    }
    Ok(series)
}

fn print_report(report: &Value) {
    let show = |name: &str, value: &Value| println!("{name:45} {value}");
    show("shim, stripped bytes (at most 10000000)", &report["sizes_bytes"]["shim"]["stripped"]);
    show("agent, stripped bytes (at most 6000000)", &report["sizes_bytes"]["agent"]["stripped"]);
    let idle = &report["idle_pod"];
    show("idle shim, anonymous KiB (at most 1600)", &idle["shim"]["anonymous_kib"]);
    show("idle shim, threads (at most 4)", &idle["shim"]["threads"]);
    show("agent at ready, resident bytes (at most 6000000)", &idle["agent"]["resident_bytes"]);
    show("agent calls to first output", &idle["agent_calls_to_first_output"]["calls"]);
    show("depth of their chain", &idle["agent_calls_to_first_output"]["depth"]);
    show("host CPU ms to start a pod", &idle["host_cpu_ms_to_start"]["sum"]);
    show("each further idle pod, KiB", &report["memory"]["each_further_pod_kib"]);
    show("guest instructions to ready", &report["guest_instructions_to_ready"]["series"]);
    show("their spread in percent", &report["guest_instructions_to_ready"]["spread_percent"]);
    show("run of true against runc, median ratio", &report["run_true_against_runc"]["ratio_median"]);
    show("how much slower, and by chance", &report["run_true_against_runc"]["slower"]);
    let pods = &report["pods"];
    show("exec in a pod against runc, median ratio", &pods["exec"]["against_runc"]["ratio_median"]);
    show("exec, host CPU ms", &pods["exec"]["host_cpu_ms_each"]);
    show("exec, agent calls", &pods["exec"]["agent_calls_each"]);
    show("further container against runc, median ratio", &pods["further_container"]["against_runc"]["ratio_median"]);
    show("figures against runc, median ratio", &pods["stats"]["against_runc"]["ratio_median"]);
    show("further idle container, KiB on the host", &pods["further_idle_container"]["host_kib_each"]);
    show("further idle container, KiB in the guest", &pods["further_idle_container"]["guest_kib_each"]);
    show("1 GiB of output, MiB/s", &pods["stream"]["mib_per_second"]);
    for (place, kind, step) in
        [("a stream from a pod", "tcfilter", "to_host_stream"), ("a byte there and back", "tcfilter", "to_host_pings")]
    {
        show(&format!("{place} against runc"), &report["networks"]["kinds"][kind][step]["least_to_runc"]);
    }
    for kind in ["folder", "empty_dir_disk"] {
        let steps = &report["volumes"]["kinds"][kind];
        show(&format!("10,000 files in a volume ({kind}) against runc"), &steps["files"]["least_to_runc"]);
    }
    let monitor = &report["monitor"];
    show(
        "guest clock at init against QEMU microvm (at most 0.7)",
        &monitor["boot_to_init_us"]["ratio_to_qemu_microvm"],
    );
    show("the same, jailed against not", &monitor["boot_to_init_us"]["ratio_jailed_to_unjailed"]);
    show("idle monitor, KiB without guest memory", &monitor["idle"]["memory_kib"]);
    show("idle monitor, threads (at most 4)", &monitor["idle"]["threads"]);
    show("idle monitor, wake-ups in 10 s", &monitor["idle"]["wakeups_in_10_s_by_thread"]);
    show("KVM calls before the first entry", &monitor["kvm_calls_to_first_entry"]);
    show("from start to agent ready", &monitor["agent_ready"]);
    let saved = &monitor["saved"];
    show(
        "to agent ready, restored against booted (at most 0.1)",
        &saved["ratio_of_restore_to_boot_until_the_agent_greets"],
    );
    show(
        "five restored machines, KiB that each guest has written",
        &saved["clones"]["private_dirty_kib_of_the_guests"],
    );
    show("growing by 1 GiB and a processor, and back", &monitor["sizes"]);
}
