//! What a container's root is made of: the time and the host's processor time that reading and writing it takes, against runc on
//! the same disk.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{Bench, cost_kib, cpu_milliseconds};
use crate::image;
use crate::steps::{command, run};

/// The size of the image's file, and of what is written, in bytes.
const BYTES: usize = 64 << 20;
/// Random reads and writes of 4 KiB, and small files.
const READS: usize = 4096;
const WRITES: usize = 1024;
const FILES: usize = 10_000;
/// How often each is measured, in turn.
const ROUNDS: usize = 3;

/// The roots, each with its settings.
const KINDS: [(&str, &str); 3] = [
    ("erofs", "run.rootfs = \"erofs\""),
    ("erofs_verified", "run.rootfs = \"erofs\"\nrun.verity = true"),
    ("virtiofs", "run.rootfs = \"virtiofs\""),
];
const RUNC: &str = "runc";

/// What is measured, in this order in one container, and the program that does it. The start has no time of its own.
fn steps() -> [(&'static str, String); 7] {
    let read = format!("guest-probe read /bin/data {BYTES}");
    [
        ("start", "echo 0".into()),
        ("read", read.clone()),
        ("read_again", read),
        ("random_read", format!("guest-probe random /bin/data {READS}")),
        ("write", format!("guest-probe write /written {BYTES}")),
        ("random_write", format!("guest-probe random-write /written {WRITES}")),
        ("files", format!("guest-probe files /many {FILES}")),
    ]
}

fn script() -> String {
    steps().map(|(_, command)| command).join(" && ")
}

/// A step's time in microseconds, and the milliseconds of the host's processors.
type Taken = (u64, u64);

pub(super) fn measure(bench: &Bench, guest: &Path, run_folder: &Path) -> Result<Value> {
    let image = bench.root.join("rootfs-image");
    std::fs::create_dir_all(&bench.root).context("the bench's folder")?;
    let data = bench.root.join("data");
    // Bytes without a pattern, the same each time.
    let mut state = 1_u64;
    let bytes = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()[0]
    });
    std::fs::write(&data, bytes.take(BYTES).collect::<Vec<u8>>()).context("the image's data")?;
    image::make(&image, &[("guest-probe", bench.built.guest_probe()), ("data", data)])?;
    let reference = format!("oci:{}", image.display());
    let mut series: BTreeMap<&str, BTreeMap<&str, Vec<Taken>>> = BTreeMap::new();
    let (mut idle, mut shared) = (BTreeMap::new(), BTreeMap::new());
    for round in 0..ROUNDS {
        for (kind, settings) in KINDS {
            bench.write_settings(guest, run_folder, settings)?;
            if round == 0 {
                idle.insert(kind, idle_cost(bench, &reference)?);
                shared.insert(kind, page_cache(bench, &reference)?);
            }
            let container = bench.coracle(&["run", "--rm", "--network", "none", &reference, "sh", "-c", &script()]);
            take(container, series.entry(kind).or_default())?;
        }
        take(runc(bench, &image)?, series.entry(RUNC).or_default())?;
    }
    bench.write_settings(guest, run_folder, "")?;
    let bundle = bench.root.join("runc-rootfs");
    let _ = run(command("umount", &[&bundle.join("rootfs").display().to_string()]));
    let mut report = report(&series, &idle);
    report["page_cache"] = json!(shared);
    Ok(report)
}

/// Memory of a container that does nothing, when it has started.
fn idle_cost(bench: &Bench, image: &str) -> Result<Value> {
    let mut start =
        bench.coracle(&["run", "--detach", "--network", "none", "--name", "idle", image, "sleep", "100000"]);
    start.stdout(Stdio::null());
    run(start)?;
    let (anonymous, guest) = cost_kib();
    bench.remove("idle")?;
    Ok(json!({ "anonymous_kib": anonymous, "guest_memory_kib": guest }))
}

/// What it takes that two pods of one image read the same file of it, one after the other, from a host that has none of it in memory: in
/// the pods (their processes' anonymous memory, and guest memory in use) and in the host's cache of files.
fn page_cache(bench: &Bench, image: &str) -> Result<Value> {
    let names = ["first", "second"];
    for name in names {
        let mut start =
            bench.coracle(&["run", "--detach", "--network", "none", "--name", name, image, "sleep", "100000"]);
        start.stdout(Stdio::null());
        run(start)?;
    }
    rustix::fs::sync();
    std::fs::write("/proc/sys/vm/drop_caches", "1").context("empty the host's cache of files")?;
    let taken = || -> Result<(u64, u64)> {
        let (anonymous, guest) = cost_kib();
        Ok((anonymous + guest, file_cache_kib()?))
    };
    let mut before = taken()?;
    let mut steps = serde_json::Map::new();
    for name in names {
        let bytes = BYTES.to_string();
        let mut read = bench.coracle(&["exec", name, "guest-probe", "read", "/bin/data", &bytes]);
        read.stdout(Stdio::null());
        run(read)?;
        let now = taken()?;
        let more = |now: u64, before: u64| i64::try_from(now).unwrap_or(0) - i64::try_from(before).unwrap_or(0);
        steps.insert(
            name.to_owned(),
            json!({ "pods_kib": more(now.0, before.0), "host_cache_kib": more(now.1, before.1) }),
        );
        before = now;
    }
    names.into_iter().try_for_each(|name| bench.remove(name))?;
    Ok(steps.into())
}

/// The host's cache of files: what of its cached memory is no shared memory, such as a guest's (proc(5), `/proc/meminfo`).
fn file_cache_kib() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").context("the host's memory")?;
    let figure = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).with_context(|| format!("no {name}"))
    };
    Ok(figure("Cached:")?.saturating_sub(figure("Shmem:")?))
}

/// Runs the steps and adds what each takes.
fn take(mut container: Command, series: &mut BTreeMap<&'static str, Vec<Taken>>) -> Result<()> {
    // Of pods that others run, too.
    let mut before = cpu_milliseconds()["sum"].as_u64().unwrap_or(0);
    let mut child = container.stdout(Stdio::piped()).spawn().context("start a container")?;
    let output = BufReader::new(child.stdout.take().context("its output")?);
    let mut steps = steps().into_iter();
    for line in output.lines() {
        let (line, cpu) = (line?, cpu_milliseconds()["sum"].as_u64().unwrap_or(0));
        let microseconds: u64 = line.trim().parse().with_context(|| format!("a time, not {line}"))?;
        let (name, _) = steps.next().context("more times than steps")?;
        series.entry(name).or_default().push((microseconds, cpu.saturating_sub(before)));
        before = cpu;
    }
    anyhow::ensure!(child.wait()?.success() && steps.next().is_none(), "a container did not come to its end");
    Ok(())
}

/// The same container by runc, its root an overlay of the unpacked image on the same disk.
fn runc(bench: &Bench, image: &Path) -> Result<Command> {
    let bundle = bench.root.join("runc-rootfs");
    let part = |name: &str| -> Result<PathBuf> {
        let folder = bundle.join(name);
        std::fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        Ok(folder)
    };
    let (root, lower) = (part("rootfs")?, super::unpacked(bench, image)?);
    let _ = Command::new("umount").arg(&root).stderr(Stdio::null()).status();
    let _ = std::fs::remove_dir_all(bundle.join("upper"));
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.display(),
        part("upper")?.display(),
        part("work")?.display()
    );
    run(command("mount", &["-t", "overlay", "overlay", "-o", &options, &root.display().to_string()]))?;
    let arguments = json!(["sh", "-c", script()]);
    super::runc_bundle(&bundle, &root, false, &arguments)?;
    let mut runc = Command::new("runc");
    runc.args(["run", "--bundle"]).arg(&bundle).arg("coracle-bench-rootfs");
    runc.stdin(Stdio::null()).stderr(Stdio::null());
    Ok(runc)
}

fn least(all: &[Taken]) -> u64 {
    all.iter().map(|(microseconds, _)| *microseconds).min().unwrap_or(0)
}

fn report(series: &BTreeMap<&str, BTreeMap<&str, Vec<Taken>>>, idle: &BTreeMap<&str, Value>) -> Value {
    let mut kinds = serde_json::Map::new();
    for (kind, taken) in series {
        let mut steps = serde_json::Map::new();
        for (step, all) in taken {
            let runc = series.get(RUNC).and_then(|taken| taken.get(step)).map_or(0, |all| least(all));
            #[expect(clippy::cast_precision_loss, reason = "a ratio")]
            let ratio = (runc > 0).then(|| least(all) as f64 / runc as f64);
            let entry = json!({
                "us": all.iter().map(|(us, _)| us).collect::<Vec<_>>(),
                "host_cpu_ms": all.iter().map(|(_, ms)| ms).collect::<Vec<_>>(),
                "least_to_runc": ratio,
            });
            steps.insert((*step).to_owned(), entry);
        }
        steps.insert("idle".into(), idle.get(kind).cloned().unwrap_or(Value::Null));
        kinds.insert((*kind).to_owned(), steps.into());
    }
    json!({ "bytes": BYTES, "random_reads": READS, "random_writes": WRITES, "files": FILES, "kinds": kinds })
}
