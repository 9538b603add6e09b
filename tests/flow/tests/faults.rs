//! Each point of a pod's life times each fault that can happen there, over a machine that is none: every request is answered in time, the pod
//! reaches its end, and nothing of it is left. `cargo xtask test --lane faults`. `CORACLE_FAULTS_ONLY` names points or faults.

mod faults {
    pub(crate) mod host;
    pub(crate) mod pod;
}

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use coracle_faults::inject::{Fault, Passed, Passing};
use coracle_flow::{Hands, Wire};
use faults::host::{Disk, Host};
use faults::pod::{Kind, Life, live};

/// How often a point's passings are each made to fail: the first is a pod's boot or first container, the second comes to a running machine.
const PASSINGS: usize = 2;

/// How long a step takes that is delayed.
const DELAY: Duration = Duration::from_millis(50);

/// What can happen at a point. Its name is in the report.
const FAULTS: [&str; 11] = [
    "fails",
    "takes time",
    "hangs",
    "caller gone",
    "monitor killed",
    "agent killed",
    "connection cut",
    "guest stands still",
    "disk full",
    "no descriptors",
    "no processes",
];

/// Points of the host's at which a hang is given up by Kill or the boot's deadline. Others are calls of the host's kernel, or answer to nobody.
const HOST_HANGS: [&str; 6] = [
    "host.boot.files",
    "host.boot.network",
    "host.boot.machine",
    "host.boot.greeting",
    "host.boot.agent",
    "machine.boot",
];

/// Whether a fault can be at a point.
fn can_be(fault: &str, point: &str, passed: Passed, kind: Kind) -> bool {
    match fault {
        "fails" => passed.may_fail,
        "hangs" => point.starts_with("guest.") || HOST_HANGS.contains(&point),
        // Only the real agent has a life and a wire of its own.
        "agent killed" | "connection cut" | "guest stands still" => kind == Kind::Containers,
        _ => true,
    }
}

fn fault(name: &str, hands: &Hands, host: &Arc<Host>, disk: &Arc<Disk>) -> Fault {
    let act = |act: Box<dyn Fn() + Send + Sync>| Fault::Act(Arc::from(act));
    let (hands, host, disk) = (hands.clone(), Arc::clone(host), Arc::clone(disk));
    match name {
        "fails" => Fault::Fail,
        "takes time" => Fault::Delay(DELAY),
        "hangs" => Fault::Hang,
        "caller gone" => act(Box::new(move || hands.hang_up())),
        "monitor killed" => act(Box::new(move || hands.kill_monitor())),
        "agent killed" => act(Box::new(move || hands.kill_agent())),
        "connection cut" => act(Box::new(move || hands.set_wire(Wire::Cut))),
        "guest stands still" => act(Box::new(move || hands.set_wire(Wire::Still))),
        "disk full" => act(Box::new(move || disk.fill())),
        "no descriptors" => act(Box::new(move || host.exhaust_descriptors())),
        "no processes" => act(Box::new(move || host.exhaust_processes())),
        other => panic!("there is no fault {other}"),
    }
}

/// What came of a pair.
struct Outcome {
    slowest: Duration,
    problems: Vec<String>,
}

/// One pod with one fault, on a thread of its own.
fn tried(kind: Kind, host: &Arc<Host>, armed: Option<(Passing, &'static str)>) -> (Outcome, Life) {
    let (descriptors, shared) = (host.descriptors(), Arc::clone(host));
    let thread = std::thread::spawn(move || live(kind, &shared, armed, &fault));
    let mut life = thread.join().unwrap_or_else(|_| Life::failed(host, "the test itself has failed: see above"));
    host.relieve();
    life.problems.extend(host.left(descriptors));
    (Outcome { slowest: life.slowest, problems: std::mem::take(&mut life.problems) }, life)
}

/// How many processes share the pairs: most of the time they wait for deadlines, and what a host runs out of is a process's own.
const PARTS: usize = 12;

/// Which of the pairs this process tries, from 0 on; none in the process that was started first.
fn part() -> Option<usize> {
    std::env::var("CORACLE_FAULTS_PART").ok().map(|part| part.parse().expect("CORACLE_FAULTS_PART is a number"))
}

/// Has processes try a part of the pairs each, and shows what they say.
fn share_out(test: &str) {
    let program = std::env::current_exe().expect("this program");
    let start = |part: usize| {
        let mut command = Command::new(&program);
        command.args(["--exact", test, "--nocapture"]).env("CORACLE_FAULTS_PART", part.to_string());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("a process for a part of the pairs")
    };
    let parts: Vec<_> = (0..PARTS).map(start).collect();
    let mut report: BTreeMap<(String, String), (usize, u64)> = BTreeMap::new();
    let mut problems = Vec::new();
    for part in parts {
        let outcome = part.wait_with_output().expect("its end");
        let text = String::from_utf8_lossy(&outcome.stdout);
        for line in text.lines() {
            if let ["pair", point, fault, count, milliseconds] = line.split('\t').collect::<Vec<_>>()[..] {
                let entry = report.entry((point.into(), fault.into())).or_default();
                entry.0 += count.parse::<usize>().expect("a count");
                entry.1 = entry.1.max(milliseconds.parse().expect("a time"));
            } else if line.starts_with("left out") {
                println!("{line}");
            }
        }
        problems.extend(text.lines().filter(|line| line.starts_with("problem\t")).map(str::to_owned));
        if !outcome.status.success() && !text.contains("\nproblem\t") {
            problems.push(format!("{text}\n{}", String::from_utf8_lossy(&outcome.stderr)));
        }
    }
    for ((point, fault), (count, milliseconds)) in &report {
        println!("pair\t{point}\t{fault}\t{count}\t{milliseconds}");
    }
    let pairs: usize = report.values().map(|(count, _)| count).sum();
    let slowest = report.values().map(|(_, slowest)| *slowest).max().unwrap_or_default();
    println!("{pairs} pairs tried, slowest answer {slowest} ms, {} problems", problems.len());
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    if std::env::var_os("CORACLE_DOCS").is_some_and(|wish| wish == "write") {
        let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/faults.md");
        std::fs::write(page, written(&report, pairs, slowest)).expect("the page");
    }
}

/// The report as a page of the documentation.
fn written(report: &BTreeMap<(String, String), (usize, u64)>, pairs: usize, slowest: u64) -> String {
    let mut page = format!(
        "# Faults tried\n\nMade by `CORACLE_DOCS=write cargo xtask test --lane faults`; not written by hand. Each point of a pod's life over a machine that is none, \
         times each fault there: how many pods, and the slowest answer of any request in them, in ms. In all of them every request was answered within its limit, the \
         pod could be deleted and stopped, and no process, mount, descriptor or file was left. The agent's time-out is 1 s there, that of a boot 3 s. A dash: it can't be there.\n\n\
         {pairs} pods, slowest answer {slowest} ms.\n\n| point | {} |\n|---|{}\n",
        FAULTS.join(" | "),
        "---|".repeat(FAULTS.len())
    );
    let points: std::collections::BTreeSet<&String> = report.keys().map(|(point, _)| point).collect();
    for point in points {
        let cell = |fault: &&str| match report.get(&(point.clone(), (*fault).to_owned())) {
            Some((count, milliseconds)) => format!("{count}: {milliseconds}"),
            None => "-".into(),
        };
        page.push_str(&format!("| `{point}` | {} |\n", FAULTS.iter().map(cell).collect::<Vec<_>>().join(" | ")));
    }
    page
}

#[test]
fn every_fault_at_every_point_has_an_end() {
    let Some(part) = part() else { return share_out("every_fault_at_every_point_has_an_end") };
    let host = Arc::new(Host::new());
    let only = std::env::var("CORACLE_FAULTS_ONLY").unwrap_or_default();
    let (mut number, mut problems, mut unfired) = (0, Vec::new(), Vec::new());
    let mut report: BTreeMap<(&str, &str), (usize, Duration)> = BTreeMap::new();
    for kind in [Kind::Containers, Kind::Disks] {
        let (clean, life) = tried(kind, &host, None);
        assert!(clean.problems.is_empty(), "without a fault: {:?}", clean.problems);
        for (&point, passed) in &life.passed {
            for fault in FAULTS.into_iter().filter(|fault| can_be(fault, point, *passed, kind)) {
                if fault == "no processes" && !host.limits_processes() {
                    continue;
                }
                for passing in 1..=passed.count.min(PASSINGS) {
                    number += 1;
                    let name = format!("{point}#{passing} {fault}");
                    if number % PARTS != part || !name.contains(&only) {
                        continue;
                    }
                    let (outcome, life) = tried(kind, &host, Some(((point, passing), fault)));
                    println!("{name}: {:.0?}", outcome.slowest);
                    let entry = report.entry((point, fault)).or_default();
                    *entry = (entry.0 + 1, entry.1.max(outcome.slowest));
                    for problem in &outcome.problems {
                        println!("problem\t{kind:?}: {name}: {problem}");
                    }
                    problems.extend(outcome.problems);
                    if !life.fired {
                        unfired.push(name);
                    }
                }
            }
        }
    }
    if !host.limits_processes() {
        println!("left out: \"no processes\", for this host has no control group that limits them");
    }
    for ((point, fault), (count, slowest)) in &report {
        println!("pair\t{point}\t{fault}\t{count}\t{}", slowest.as_millis());
    }
    // What depends on how tasks take turns is passed a time more or less; most must have been.
    assert!(unfired.len() * 10 <= number / PARTS + 10, "points that were not passed again: {unfired:?}");
    assert!(problems.is_empty(), "see the lines that begin with \"problem\"");
}
