//! Pods through containerd, in numbers and in quantity; `cargo xtask bench` and `cargo xtask churn` run it.
//!
//! `pods measure PAIRS` prints JSON: execs beside runc's, a further container, figures, memory, a stream. `pods churn COUNT AT-ONCE`
//! makes so many pods of two containers, removes them, and looks for what is left. `pods crowd MOST ROUNDS` has as many at once as there is
//! memory for, and `pods stress` runs stress-ng in one.

mod crowd;
mod stress;

use std::io::Read;
use std::time::Instant;

use coracle_e2e::cri::msg;
use coracle_e2e::{Containerd, Cri, Host, Pod, Running};
use serde_json::{Value, json};

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| words.get(at).and_then(|word| word.parse::<usize>().ok());
    match (words.first().map(String::as_str), number(1), number(2)) {
        (Some("measure"), Some(pairs), None) => println!("{}", measure(pairs)),
        (Some("churn"), Some(count), Some(at_once)) if at_once > 0 => churn(count, at_once),
        (Some("crowd"), Some(most), Some(rounds)) if most > 0 => crowd::crowd(most, rounds),
        (Some("stress"), None, None) => stress::stress(),
        _ => {
            eprintln!("usage: pods measure PAIRS | pods churn COUNT AT-ONCE | pods crowd MOST ROUNDS | pods stress");
            std::process::exit(2);
        }
    }
}

/// How many bytes go through one stream.
const STREAM_BYTES: usize = 1 << 30;

/// How many containers are added to tell what one takes.
const FURTHER: usize = 5;

fn measure(pairs: usize) -> Value {
    let host = Host::with_own_network();
    let containerd = Containerd::with_cri(&host);
    let cri = Cri::connect(&containerd);
    let run = |runtime: &str| {
        let pod = Pod::run(&cri, runtime, runtime, |_| {}).expect("a pod");
        let sleeper = pod.start("sleeper", &["sleep", "100000"], |_| {}).expect("a container");
        (pod, sleeper)
    };
    let (ours, our_sleeper) = run("coracle");
    let (theirs, their_sleeper) = run("runc");
    let exec = |id: &str| seconds(|| assert_eq!(cri.exec(id, &["true"]).expect("an exec").0, 0));
    // One of each to warm caches.
    let (_, _) = (exec(&our_sleeper), exec(&their_sleeper));
    let cpu = processor_milliseconds(&host);
    let mut execs = Vec::new();
    for _ in 0..pairs {
        execs.push((exec(&our_sleeper), exec(&their_sleeper)));
    }
    let cpu = processor_milliseconds(&host) - cpu;
    let mut further = Vec::new();
    for number in 0..FURTHER {
        let name = format!("further-{number}");
        let start =
            |pod: &Pod<'_>| seconds(|| drop(pod.start(&name, &["sleep", "100000"], |_| {}).expect("a container")));
        further.push((start(&ours), start(&theirs)));
    }
    let stats = |id: &str| seconds(|| drop(cri.stats(id).expect("figures")));
    let figures: Vec<(f64, f64)> = (0..pairs).map(|_| (stats(&our_sleeper), stats(&their_sleeper))).collect();
    let memory = memory(&host, &cri, &ours, &our_sleeper);
    ours.remove().expect("removed");
    theirs.remove().expect("removed");
    let log = containerd.stop();
    let stream = stream(&host);
    host.audit();
    json!({
        "exec": {
            "against_runc": ratio(&execs),
            "host_cpu_ms_each": cpu / pairs as u64,
            // One to warm caches, and two that look at the guest's memory.
            "agent_calls_each": calls(&log, pairs + 3),
        },
        "further_container": { "against_runc": ratio(&further) },
        "stats": { "against_runc": ratio(&figures) },
        "further_idle_container": memory,
        "stream": stream,
    })
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

fn ratio(pairs: &[(f64, f64)]) -> Value {
    let mut ratios: Vec<f64> = pairs.iter().map(|(ours, theirs)| ours / theirs).collect();
    ratios.sort_by(f64::total_cmp);
    json!({
        "ratio_median": ratios.get(ratios.len() / 2), "ratio_min": ratios.first(), "ratio_max": ratios.last(),
        "seconds": pairs.iter().map(|(ours, theirs)| json!([ours, theirs])).collect::<Vec<_>>(),
    })
}

/// Processor time of all that this host runs, in milliseconds (proc(5), stat: fields 14 and 15, in ticks of 10 ms).
fn processor_milliseconds(host: &Host) -> u64 {
    let of = |pid: &i32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
        (ticks(11) + ticks(12)) * 10
    };
    ["containerd-shim-coracle", "qemu-system", "virtiofsd"]
        .iter()
        .flat_map(|word| host.processes(word))
        .map(|pid| of(&pid))
        .sum()
}

/// The agent's calls that could stand before an exec's first byte: ExecProcess for each of `count`, and all that there were of those
/// which move streams.
fn calls(log: &str, count: usize) -> Value {
    let of = |name: &str| log.lines().filter(|line| line.contains("agent call ") && line.contains(name)).count();
    json!({
        "ExecProcess": of(": ExecProcess") as f64 / count as f64,
        "ReadStdout": of(": ReadStdout"),
        "WriteStdin": of(": WriteStdin"),
        "CloseStdin": of(": CloseStdin"),
    })
}

/// What further idle containers take, on the host (proportional set of all processes, guest memory among them) and in the guest.
fn memory(host: &Host, cri: &Cri, pod: &Pod<'_>, sleeper: &str) -> Value {
    let on_host = || -> u64 {
        let of = |pid: i32| {
            let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
            let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
            line.and_then(|rest| rest.trim().split(' ').next()?.parse::<u64>().ok()).unwrap_or(0)
        };
        host.processes("").into_iter().filter(|pid| !is_containerd(*pid)).map(of).sum()
    };
    let in_guest = || -> i64 {
        let (_, text, _) = cri.exec(sleeper, &["cat", "/proc/meminfo"]).expect("an exec");
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap_or_default().to_owned();
        line.trim().split(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0)
    };
    let before = (on_host(), in_guest());
    for number in 0..FURTHER {
        pod.start(&format!("idle-{number}"), &["sleep", "100000"], |_| {}).expect("a container");
    }
    let after = (on_host(), in_guest());
    let count = FURTHER as i64;
    json!({
        "host_kib_each": (i64::try_from(after.0).unwrap_or(0) - i64::try_from(before.0).unwrap_or(0)) / count,
        "guest_kib_each": (before.1 - after.1) / count,
        "containers": FURTHER,
    })
}

fn is_containerd(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/comm"))
        .is_ok_and(|name| name.trim() == "containerd" || name.trim() == "runc")
}

/// One stream of a gigabyte, every byte of which is looked at.
fn stream(host: &Host) -> Value {
    // Not `head`: busybox's takes one byte at a time.
    let count = format!("count={}", STREAM_BYTES / (64 * 1024));
    let mut running = Running::start(host.run_command(&[], &["dd", "if=/dev/zero", "bs=64k", &count]));
    let mut stdout = running.child.stdout.take().expect("a pipe");
    let mut buffer = vec![0; 1 << 20];
    let (mut count, mut first) = (0, None);
    loop {
        let read = stdout.read(&mut buffer).expect("output");
        if read == 0 {
            break;
        }
        assert!(buffer.iter().take(read).all(|byte| *byte == 0), "a byte was changed");
        first.get_or_insert_with(Instant::now);
        count += read;
    }
    let seconds = first.map_or(0.0, |first| first.elapsed().as_secs_f64());
    assert_eq!((running.finish().code, count), (0, STREAM_BYTES), "bytes were lost");
    json!({ "bytes": count, "seconds": seconds, "mib_per_second": (count >> 20) as f64 / seconds })
}

fn churn(count: usize, at_once: usize) {
    let host = Host::with_own_network();
    let containerd = Containerd::with_cri(&host);
    let cri = Cri::connect(&containerd);
    let start = Instant::now();
    let mut made = 0;
    while made < count {
        let batch = at_once.min(count - made);
        let pods: Vec<Pod<'_>> = std::thread::scope(|scope| {
            let run = |number: usize| {
                let containerd = &containerd;
                scope.spawn(move || one_pod(connection(containerd), number))
            };
            let threads: Vec<_> = (made..made + batch).map(run).collect();
            threads.into_iter().map(|thread| thread.join().expect("a pod")).collect()
        });
        for pod in pods {
            pod.remove().expect("removed");
        }
        made += batch;
        println!("{made} of {count} pods, {at_once} at a time: {:.0} s", start.elapsed().as_secs_f64());
    }
    let left: msg::ListPodSandboxResponse = cri.call("ListPodSandbox", &msg::Empty::new()).expect("a list");
    assert!(left.items.is_empty(), "{left}");
    drop(containerd);
    host.audit();
    println!("nothing is left of {count} pods");
}

/// A connection of a pod's own: one carries one request at a time here. It stays as long as the program.
fn connection(containerd: &Containerd) -> &'static Cri {
    Box::leak(Box::new(Cri::connect(containerd)))
}

fn one_pod(cri: &'static Cri, number: usize) -> Pod<'static> {
    let pod = Pod::run(cri, "coracle", &format!("churn-{number}"), |_| {}).expect("a pod");
    let one = pod.start("one", &["sleep", "100000"], |_| {}).expect("a container");
    let two = pod.start("two", &["sh", "-c", "exit 3"], |_| {}).expect("a container");
    assert_eq!(cri.ended(&two).exit_code, 3);
    assert_eq!(cri.exec(&one, &["echo", "alive"]).expect("an exec").1, "alive\n");
    pod
}
