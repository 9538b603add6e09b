//! As many pods as there is memory for, all there at once, removed all at once, several times (Kata's soak:
//! tests/stability/soak_parallel_rm.sh; the same figures are compared).

use std::sync::Mutex;
use std::time::Instant;

use coracle_e2e::{Containerd, Host, Pod};

/// How much of the host's memory is left alone, in bytes.
const LEFT: u64 = 2 << 30;

/// How many pods are started at a time.
const AT_ONCE: usize = 4;

pub(crate) fn crowd(most: usize, rounds: usize) {
    let host = Host::with_own_network();
    let containerd = Containerd::with_cri(&host);
    let before = mounts();
    for round in 1..=rounds {
        let start = Instant::now();
        let pods = all(&containerd, most, round);
        let count = pods.len();
        assert!(count > 0, "not one pod: {} bytes are free", free());
        let found = Found::of(&host);
        assert_eq!(found, Found { shims: count, monitors: count, folders: count }, "of {count} pods");
        let started = start.elapsed().as_secs_f64();
        std::thread::scope(|scope| {
            for pod in pods {
                scope.spawn(move || pod.remove().expect("removed"));
            }
        });
        assert_eq!(Found::of(&host), Found::default(), "after all {count} were removed at once");
        assert_eq!(mounts(), before, "mounts");
        let seconds = start.elapsed().as_secs_f64();
        println!("round {round} of {rounds}: {count} pods at once, up after {started:.0} s, gone after {seconds:.0} s");
    }
    drop(containerd);
    host.audit();
    println!("nothing is left");
}

/// What there is of pods.
#[derive(Debug, Default, PartialEq, Eq)]
struct Found {
    shims: usize,
    monitors: usize,
    folders: usize,
}

impl Found {
    fn of(host: &Host) -> Self {
        let folders = std::fs::read_dir(&host.run).map_or(0, |folders| folders.flatten().count());
        Self { shims: host.processes(" serve").len(), monitors: host.processes("qemu-system").len(), folders }
    }
}

fn all(containerd: &Containerd, most: usize, round: usize) -> Vec<Pod<'static>> {
    let (next, made) = (Mutex::new(0), Mutex::new(Vec::new()));
    let take = || {
        let mut next = next.lock().expect("the number");
        *next += 1;
        (*next <= most && free() > LEFT).then_some(*next)
    };
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(number) = take() {
                    let pod =
                        Pod::run(crate::connection(containerd), "coracle", &format!("crowd-{round}-{number}"), |_| {})
                            .expect("a pod");
                    drop(pod.start("one", &["sleep", "100000"], |_| {}).expect("a container"));
                    made.lock().expect("the pods").push(pod);
                }
            });
        }
    });
    made.into_inner().expect("the pods")
}

/// What the host can give to more processes, in bytes.
fn free() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) << 10
}

fn mounts() -> usize {
    std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default().lines().count()
}
