//! A seeded sample of what can be done to a pod's processes at any moment of its life: each request is answered, the pod can be removed, and
//! nothing of it is left. `CORACLE_FAULTS_SEED` makes another sample, `CORACLE_FAULTS_COUNT` a larger one. The matrix without machines
//! is in tests/flow.
//!
//! Lane: open: files come by the server that is killed.

use std::time::{Duration, Instant};

use coracle_e2e::{Host, Outcome, Refused, Shim, bundles, monitor, path};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

/// How long any answer may take: the settings below have a guest that hangs given up in less.
const ANSWER: Duration = Duration::from_secs(60);

/// How long a pod may take to be deleted, whatever was done to it.
const DELETED: Duration = Duration::from_secs(120);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Create,
    Start,
    Exec,
    Kill,
    Delete,
}

const STEPS: [Step; 5] = [Step::Create, Step::Start, Step::Exec, Step::Kill, Step::Delete];

/// Words of the command lines of a pod's processes.
fn processes() -> Vec<&'static str> {
    let mut all = vec![SHIM, monitor(), "virtiofsd"];
    // The built-in monitor serves the guest's sockets itself.
    all.extend((monitor() != "vmm").then_some(" vsock "));
    all
}

const SHIM: &str = "containerd-shim-coracle-v2 -namespace";

/// Numbers that look random and are the same for a seed (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((value ^ value >> 31) % end as u64).unwrap()
    }
}

fn of_environment(name: &str, usual: usize) -> usize {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(usual)
}

fn do_step(shim: &Shim, step: Step) -> Result<(), Refused> {
    match step {
        Step::Create => shim.create(),
        Step::Start => shim.start_process(""),
        Step::Exec => {
            let process = json!({ "args": ["/bin/busybox", "true"], "env": ["PATH=/bin"], "cwd": "/", "user": {} });
            shim.exec("e1", &process)?;
            shim.start_process("e1")
        }
        Step::Kill => shim.kill("", 9).and_then(|()| shim.wait("").map(drop)),
        Step::Delete => shim.delete().map(drop),
    }
}

/// A life; where something is done to a process, at this part of that step (of 100).
fn live(name: &str, done: Option<(Step, &str, Signal, Duration)>) -> Vec<Duration> {
    let host = Host::new().set("guest.boot_timeout_seconds", "20").set("agent.timeout_seconds", "5");
    bundles::busybox_folder(&host.folder.join("c1/rootfs"));
    let config = bundles::script_config("sleep 100000").to_string();
    let shim = Shim::start(&host, "c1", config.as_bytes());
    let mut took = Vec::new();
    for step in STEPS {
        let begun = Instant::now();
        let outcome = std::thread::scope(|scope| {
            let answer = scope.spawn(|| do_step(&shim, step));
            if let Some((at, word, signal, moment)) = done
                && at == step
            {
                // The moment is what is tried, not a wait for something.
                std::thread::sleep(moment);
                for process in host.processes(word) {
                    let _ = kill_process(Pid::from_raw(process).unwrap(), signal);
                }
                // Nobody answers for a shim that was stopped; its host's administrator kills it.
                if word == SHIM && signal == Signal::STOP {
                    host.kill(SHIM);
                }
            }
            answer.join().unwrap()
        });
        took.push(begun.elapsed());
        assert!(begun.elapsed() < ANSWER, "{name}: {step:?} took {:?}", begun.elapsed());
        if done.is_none() {
            outcome.unwrap_or_else(|error| panic!("{name}: {step:?}: {error:?}"));
        } else if outcome.is_err() || done.is_some_and(|(at, ..)| at == step) {
            break;
        }
    }
    remove(&host, &shim, name);
    host.audit();
    took
}

/// What containerd does with a pod that is to go, whether its shim lives or not.
fn remove(host: &Host, shim: &Shim, name: &str) {
    let begun = Instant::now();
    while !host.processes(SHIM).is_empty() {
        let _ = shim.kill("", 9);
        let gone = shim.delete();
        let is_gone = gone.is_ok() || gone.as_ref().is_err_and(|error| format!("{error:?}").contains("not found"));
        if is_gone && shim.shutdown().is_ok() {
            coracle_e2e::becomes("the shim's end", || host.processes(SHIM), Vec::is_empty);
            break;
        }
        assert!(begun.elapsed() < DELETED, "{name}: it can't be deleted: {gone:?}");
        // As containerd asks again; nothing tells when a refused delete would be taken.
        std::thread::sleep(Duration::from_millis(50));
    }
    let mut delete = std::process::Command::new(path("CORACLE_TEST_SHIM"));
    delete.args(["-namespace", "test", "-id", "c1", "delete"]).current_dir(shim.bundle());
    delete.env("CORACLE_CONFIG", host.settings_file());
    let deleted = Outcome::of(delete, b"");
    assert_eq!(deleted.code, 0, "{name}: {deleted:?}");
}

#[test]
fn whatever_is_done_to_a_pods_processes_it_can_be_removed() {
    let (seed, count) = (of_environment("CORACLE_FAULTS_SEED", 1), of_environment("CORACLE_FAULTS_COUNT", 10));
    let took = live("nothing done", None);
    let mut random = Random(seed as u64);
    for number in 0..count {
        let at = random.below(STEPS.len());
        let all = processes();
        let word = all[random.below(all.len())];
        let signal = if random.below(2) == 0 { Signal::KILL } else { Signal::STOP };
        let moment = took[at].mul_f64(random.below(100) as f64 / 100.0);
        let name = format!("{number} of seed {seed}: {signal:?} to {word} at {moment:?} of {:?}", STEPS[at]);
        let begun = Instant::now();
        live(&name, Some((STEPS[at], word, signal, moment)));
        println!("{name}: gone after {:.1?}", begun.elapsed());
    }
}
