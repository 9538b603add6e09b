//! In quantity: what the shim's side and the agent have in memory, descriptors and threads stays as it is. Both are in this process.
//! `cargo xtask test --lane soak`.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use coracle_flow::{Bench, beside, captured, event_loop, first, in_own_mounts, own_mounts, spec};
use coracle_sandbox::{Sandbox, Stdio};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// How often the process is looked at.
const SAMPLES: usize = 50;

/// A look at this process.
#[derive(Debug, Clone, Copy)]
struct Sample {
    /// Anonymous memory that is resident, in KiB (proc(5), `RssAnon`).
    memory: f64,
    descriptors: f64,
    threads: f64,
}

impl Sample {
    fn now() -> Self {
        let status = std::fs::read_to_string("/proc/self/status").expect("the status");
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a field");
            line.split_whitespace().next().and_then(|word| word.parse().ok()).expect("a number")
        };
        let count = std::fs::read_dir("/proc/self/fd").expect("the descriptors").count();
        Self {
            memory: field("RssAnon:"),
            descriptors: f64::from(u32::try_from(count).expect("few")),
            threads: field("Threads:"),
        }
    }
}

/// The slope of a straight line through values at even distances, by least squares, times the whole distance: how much more there is at
/// the end than at the beginning.
fn growth(values: &[f64]) -> f64 {
    let count = values.len() as f64;
    let (mean_x, mean_y) = ((count - 1.0) / 2.0, values.iter().sum::<f64>() / count);
    let (mut above, mut below) = (0.0, 0.0);
    for (x, y) in values.iter().enumerate() {
        let x = x as f64 - mean_x;
        above += x * (y - mean_y);
        below += x * x;
    }
    above / below * (count - 1.0)
}

/// What may come on top over a whole series: an allocator's mood, a thread that lives on for a while. What leaks with each of thousands is more.
const MEMORY_KIB: f64 = 1024.0;
const FEW: f64 = 3.0;

/// Longer than a thread without work stays.
const REST: Duration = Duration::from_millis(200);

/// How often something is done, and what this process has meanwhile.
struct Series {
    what: &'static str,
    count: usize,
    done: usize,
    begun: Instant,
    samples: Vec<Sample>,
}

impl Series {
    fn new(what: &'static str, count: usize) -> Self {
        Self { what, count, done: 0, begun: Instant::now(), samples: Vec::new() }
    }

    /// It was done once more.
    fn once(&mut self) {
        self.done += 1;
        if self.done.is_multiple_of(self.count.div_ceil(SAMPLES)) {
            // Threads that have nothing to do are gone then.
            std::thread::sleep(REST);
            self.samples.push(Sample::now());
        }
    }

    /// Says what there is more than at first. The first third is for warming up.
    fn judge(self, memory_kib: f64) {
        let (what, samples) = (self.what, &self.samples);
        let warm = &samples[samples.len() / 3..];
        let of = |field: fn(&Sample) -> f64| growth(&warm.iter().map(field).collect::<Vec<_>>());
        let (memory, descriptors, threads) = (of(|one| one.memory), of(|one| one.descriptors), of(|one| one.threads));
        let (last, seconds) = (samples.last().expect("samples"), self.begun.elapsed().as_secs());
        println!("soak\t{what}\t{}\t{seconds}\t{memory:.0}\t{descriptors:.1}\t{threads:.1}\t{last:?}", self.count);
        assert!(memory < memory_kib, "{what}: memory grows by {memory:.0} KiB: {samples:?}");
        assert!(
            descriptors < FEW && threads < FEW,
            "{what}: {descriptors} descriptors, {threads} threads more: {samples:?}"
        );
    }
}

/// How many of something are tried: less where `CORACLE_SOAK_PART` says by what to divide.
fn count(whole: usize) -> usize {
    let part = std::env::var("CORACLE_SOAK_PART").ok().and_then(|part| part.parse().ok()).unwrap_or(1);
    whole / part
}

#[test]
fn five_thousand_pods_leave_nothing() {
    own_mounts();
    let mounts = || std::fs::read_to_string("/proc/thread-self/mountinfo").expect("the mounts").lines().count();
    // The hierarchy is the host's: other tests' groups are in it, too.
    let groups = || {
        let all = std::fs::read_dir("/run/cgroup").expect("cgroups").flatten().map(|entry| entry.file_name());
        all.filter(|name| name.to_string_lossy().starts_with("flow")).collect::<BTreeSet<_>>()
    };
    let (before, known) = (mounts(), groups());
    let mut series = Series::new("pods made and removed", count(5000));
    for number in 0..series.count {
        // A pod has a shim of its own, and a guest that ends with it: an event loop for both, which ends as these do.
        event_loop().block_on(async {
            let bench = Bench::real();
            let (exit, output) = bench.run("c1", "echo hello; exit 7").await;
            assert_eq!((exit.status, output.as_str()), (7, "hello\n"), "pod {number}");
            bench.sandbox.stop().await.expect("a stop");
            assert!(!bench.folder.path().join("m").exists(), "pod {number}: the machine's folder is gone");
        });
        series.once();
    }
    series.judge(MEMORY_KIB);
    assert!(mounts() <= before + 1, "{} mounts, {before} before", mounts());
    let left: Vec<_> = groups().difference(&known).cloned().collect();
    assert!(left.is_empty(), "control groups are left: {left:?}");
}

/// A pod with a container that does nothing.
async fn running() -> Bench {
    let mut bench = Bench::real();
    let mut events = std::mem::replace(&mut bench.events, tokio::sync::mpsc::unbounded_channel().1);
    // As the shim does; they would be kept otherwise.
    tokio::spawn(async move { while events.recv().await.is_some() {} });
    bench.create("c1", "sleep 100000", Stdio::default()).await.expect("a container");
    bench.sandbox.start(&first("c1")).await.expect("a start");
    bench
}

/// The end of it.
async fn end(bench: Bench) {
    bench.sandbox.kill(&first("c1"), 9).await.expect("a kill");
    bench.sandbox.wait(&first("c1")).await.expect("an end");
    bench.sandbox.delete(&first("c1")).await.expect("a delete");
    bench.sandbox.stop().await.expect("a stop");
}

async fn exec(sandbox: &Sandbox, name: &str) {
    let process = spec(&serde_json::json!(["/bin/echo", name])).Process.unwrap_or_default();
    let (id, (stdio, output)) = (beside("c1", name), captured());
    sandbox.exec(&id, process, stdio).await.expect("an exec");
    sandbox.start(&id).await.expect("a start");
    assert_eq!(sandbox.wait(&id).await.expect("an end").status, 0, "{name}");
    sandbox.delete(&id).await.expect("a delete");
    assert_eq!(output.text(), format!("{name}\n"));
}

#[test]
fn a_pod_lives_while_ten_thousand_execs_pass() {
    in_own_mounts(async {
        let bench = running().await;
        let mut series = Series::new("execs in one pod", count(10_000));
        for number in 0..series.count {
            exec(&bench.sandbox, &format!("e{number}")).await;
            series.once();
        }
        series.judge(MEMORY_KIB);
        end(bench).await;
    });
}

#[test]
fn two_hundred_execs_at_once_all_answer() {
    // Shim and agent raise theirs; here both are this process.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).expect("the limit of descriptors");
    setrlimit(Resource::RLIMIT_NOFILE, most, most).expect("more descriptors");
    in_own_mounts(async {
        let bench = running().await;
        let names: Vec<String> = (0..200).map(|number| format!("e{number}")).collect();
        let mut series = Series::new("rounds of 200 execs at once", count(60).max(10));
        for _ in 0..series.count {
            futures::future::join_all(names.iter().map(|name| exec(&bench.sandbox, name))).await;
            series.once();
        }
        // Some two hundred threads at a time, whose arenas the allocator fills by turns.
        series.judge(16.0 * MEMORY_KIB);
        assert_eq!(bench.sandbox.processes("c1").await.expect("the processes"), [""], "only its first process is left");
        end(bench).await;
    });
}

#[test]
fn growth_is_found() {
    let flat: Vec<f64> = (0..40).map(|number| 100.0 + f64::from(number % 3)).collect();
    assert!(growth(&flat).abs() < 1.0, "{}", growth(&flat));
    let leaking: Vec<f64> = (0..40).map(|number| 100.0 + f64::from(number % 3) + f64::from(number)).collect();
    assert!((growth(&leaking) - 39.0).abs() < 1.0, "{}", growth(&leaking));
}
