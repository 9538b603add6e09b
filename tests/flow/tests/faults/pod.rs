//! A pod's life, in which one thing goes wrong.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use coracle_faults::inject::{self, Fault, Passed, Passing};
use coracle_flow::{Bench, Hands, Scripted, Wire, beside, first, in_own_mounts, remove_cgroups, spec};
use coracle_machine::DeviceKind;
use coracle_machine::fake::FakeDriver;
use coracle_sandbox::{CreateRequest, Error, ProcessId, Status, Stdio};
use coracle_storage::HostMount;

use super::host::{Disk, Host};

/// The limits that such a pod has, and how long any answer may take: what the sandbox itself allows for a removal and for the end of a
/// machine comes on top.
const AGENT_TIMEOUT: Duration = Duration::from_secs(1);
const BOOT_TIMEOUT: Duration = Duration::from_secs(3);
const ANSWER: Duration = Duration::from_secs(40);

/// How long a process that ends by itself is waited for.
const ENDS: Duration = Duration::from_secs(5);

/// How often it is looked whether something is so.
const LOOK: Duration = Duration::from_millis(10);

/// Kinds of pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Two containers and an exec, with the real agent.
    Containers,
    /// Containers whose roots are disks, the second one's come to the running machine; the agent only pretends.
    Disks,
}

/// What came of a life.
pub(crate) struct Life {
    host: Arc<Host>,
    hands: Hands,
    pub(crate) slowest: Duration,
    pub(crate) problems: Vec<String>,
    pub(crate) passed: BTreeMap<&'static str, Passed>,
    pub(crate) fired: bool,
}

impl Life {
    fn new(host: &Arc<Host>, hands: Hands) -> Self {
        let host = Arc::clone(host);
        Self { host, hands, slowest: Duration::ZERO, problems: Vec::new(), passed: BTreeMap::new(), fired: false }
    }

    /// One of which nothing else is known.
    pub(crate) fn failed(host: &Arc<Host>, problem: &str) -> Self {
        Self { problems: vec![problem.into()], ..Self::new(host, Hands::default()) }
    }

    /// A step's answer, which must come in time.
    async fn step<T>(
        &mut self,
        name: &str,
        answer: impl Future<Output = coracle_sandbox::Result<T>>,
    ) -> coracle_sandbox::Result<T> {
        let begun = Instant::now();
        let answer = tokio::select! {
            biased;
            // The request is dropped where it is, as a server's is whose connection ends.
            () = self.hands.hung_up() => Ok(Err(Error::Gone)),
            answer = tokio::time::timeout(ANSWER, answer) => answer,
        };
        self.slowest = self.slowest.max(begun.elapsed());
        // What the host ran out of comes back after the step that met it: whoever cleans up can open files.
        if inject::has_fired() {
            self.host.relieve();
        }
        answer.unwrap_or_else(|_| {
            self.problems.push(format!("{name} was not answered within {ANSWER:?}"));
            Err(Error::Timeout(name.to_owned()))
        })
    }
}

type Make = dyn Fn(&str, &Hands, &Arc<Host>, &Arc<Disk>) -> Fault;

/// Lives a pod's life on this thread, in which the fault `armed` happens.
pub(crate) fn live(
    kind: Kind,
    host: &Arc<Host>,
    armed: Option<(Passing, &'static str)>,
    make: &(impl Fn(&str, &Hands, &Arc<Host>, &Arc<Disk>) -> Fault + 'static),
) -> Life {
    in_own_mounts(async {
        let (hands, disk) = (Hands::default(), Arc::new(Disk::new()));
        let folder = tempfile::TempDir::new_in(disk.path()).expect("a folder");
        let config = |config: &mut coracle_sandbox::Config| {
            config.agent_timeout = AGENT_TIMEOUT;
            config.boot_timeout = BOOT_TIMEOUT;
        };
        let driver = match kind {
            Kind::Containers => FakeDriver::new(hands.program()),
            Kind::Disks => FakeDriver::new(Scripted::hanging_in("").program()).taking(vec![DeviceKind::Block]),
        };
        let bench = Bench::of(driver, folder, config);
        let _ = bench.rootfs();
        let mounts = mounts();
        let make: &Make = make;
        inject::arm(armed.map(|(passing, name)| (passing, make(name, &hands, host, &disk))));
        let mut life = Life::new(host, hands.clone());
        let _ = begin(&bench, kind, &mut life).await;
        host.relieve();
        let is_full = armed.is_some_and(|(_, name)| name == "disk full");
        end(&bench, &mut life).await;
        (life.passed, life.fired) = (inject::passed(), inject::has_fired());
        disk.relieve();
        inject::arm(None);
        let lives_on = armed.is_none_or(|(_, name)| {
            ["fails", "takes time", "caller gone", "no descriptors", "no processes"].contains(&name)
        });
        if (lives_on || is_full) && kind == Kind::Containers {
            again(&bench, &mut life).await;
        }
        stop(&bench, &hands, &mut life).await;
        audit(&bench, &mounts, &mut life).await;
        life
    })
}

fn mounts() -> Vec<String> {
    let table = std::fs::read_to_string("/proc/thread-self/mountinfo").expect("the mounts");
    table.lines().filter_map(|line| line.split(' ').nth(4).map(str::to_owned)).collect()
}

const ALL: [(&str, &str); 4] = [("c1", "e1"), ("c2", ""), ("c1", ""), ("c3", "")];

fn id(container: &str, exec: &str) -> ProcessId {
    if exec.is_empty() { first(container) } else { beside(container, exec) }
}

/// What is done with a pod, up to what goes wrong.
async fn begin(bench: &Bench, kind: Kind, life: &mut Life) -> coracle_sandbox::Result<()> {
    let sandbox = &bench.sandbox;
    let (c1, c2, e1) = (first("c1"), first("c2"), beside("c1", "e1"));
    if kind == Kind::Disks {
        life.step("create c1", create_with_disk(bench, "c1")).await?;
        life.step("start c1", sandbox.start(&c1)).await?;
        life.step("create c2", create_with_disk(bench, "c2")).await?;
        life.step("stats", sandbox.figures()).await?;
        life.step("kill c2", sandbox.kill(&c2, 9)).await?;
        return life.step("delete c2", sandbox.delete(&c2)).await.map(drop);
    }
    life.step("create c1", bench.create("c1", "sleep 1000", Stdio::default())).await?;
    life.step("start c1", sandbox.start(&c1)).await?;
    let process = spec(&serde_json::json!(["/bin/echo", "hello"])).Process.unwrap_or_default();
    life.step("exec e1", sandbox.exec(&e1, process, Stdio::default())).await?;
    life.step("start e1", sandbox.start(&e1)).await?;
    let _ = tokio::time::timeout(ENDS, sandbox.wait(&e1)).await;
    life.step("delete e1", sandbox.delete(&e1)).await?;
    life.step("stats", sandbox.stats("c1")).await?;
    life.step("figures", sandbox.figures()).await?;
    life.step("create c2", bench.create("c2", "sleep 1000", Stdio::default())).await?;
    life.step("start c2", sandbox.start(&c2)).await?;
    life.step("pause c2", sandbox.pause("c2")).await?;
    life.step("resume c2", sandbox.resume("c2")).await?;
    life.step("kill c2", sandbox.kill(&c2, 9)).await?;
    life.step("wait for c2", sandbox.wait(&c2)).await?;
    life.step("delete c2", sandbox.delete(&c2)).await?;
    Ok(())
}

async fn create_with_disk(bench: &Bench, id: &str) -> coracle_sandbox::Result<()> {
    let file = bench.folder.path().join(format!("{id}.disk"));
    std::fs::write(&file, [0; 4096]).map_err(|error| Error::Failed(error.to_string()))?;
    let disk =
        HostMount { kind: "ext4".into(), source: file, target: "/".into(), options: vec!["loop".into()], owners: None };
    let spec = spec(&serde_json::json!(["/bin/sleep", "1000"]));
    let request =
        CreateRequest { id: id.into(), spec, root: "/nowhere".into(), rootfs: vec![disk], stdio: Stdio::default() };
    bench.sandbox.create(request).await
}

/// Whether something becomes true before long, while this pod's tasks go on.
async fn becomes(is_so: impl Fn() -> bool) -> bool {
    let begun = Instant::now();
    while !is_so() {
        if begun.elapsed() > ENDS {
            return false;
        }
        tokio::time::sleep(LOOK).await;
    }
    true
}

/// What containerd does with a pod that is to go: each process is killed, waited for and deleted, whatever state it is in.
async fn end(bench: &Bench, life: &mut Life) {
    for (container, exec) in ALL {
        let (sandbox, id) = (&bench.sandbox, id(container, exec));
        let begun = Instant::now();
        loop {
            let _ = life.step("kill", sandbox.kill(&id, 9)).await;
            let state = life.step("state", sandbox.state(&id)).await;
            if matches!(&state, Ok(state) if state.status != Status::Stopped && state.status != Status::Created) {
                let _ = life.step(&format!("wait for {container} {exec} after SIGKILL"), sandbox.wait(&id)).await;
            }
            match life.step("delete", sandbox.delete(&id)).await {
                Ok(_) | Err(Error::NotFound(_)) => break,
                Err(error) if begun.elapsed() > ANSWER => {
                    life.problems.push(format!("{container} {exec} can't be deleted: {error}"));
                    break;
                }
                Err(_) => tokio::time::sleep(LOOK).await,
            }
        }
    }
}

/// A pod whose machine runs on takes a container of the same name, and has nothing left of those before.
async fn again(bench: &Bench, life: &mut Life) {
    let begun = Instant::now();
    // A removal goes on after its answer.
    while !bench.sandbox.is_empty().await.unwrap_or(true)
        || !bench.sandbox.containers().await.unwrap_or_default().is_empty()
    {
        if begun.elapsed() > ANSWER {
            return life.problems.push("containers stay in the pod".into());
        }
        tokio::time::sleep(LOOK).await;
    }
    if bench.sandbox.end_reason().await.is_ok_and(|reason| reason.is_some()) {
        return;
    }
    let run = async || {
        bench.create("c1", "exit 3", Stdio::default()).await?;
        bench.sandbox.start(&first("c1")).await?;
        let exit = bench.sandbox.wait(&first("c1")).await?;
        bench.sandbox.delete(&first("c1")).await?;
        Ok(exit.status)
    };
    let mut outcome = life.step("another container", run()).await;
    // One that was made after the host had given it up is removed a little later.
    while matches!(outcome, Err(Error::Exists(_))) && begun.elapsed() < ANSWER {
        tokio::time::sleep(LOOK).await;
        outcome = life.step("another container, again", run()).await;
    }
    match outcome {
        Ok(3) => {}
        other => life.problems.push(format!("another container of the pod's: {other:?}")),
    }
    let own = bench.folder.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
    let groups = Path::new("/run/cgroup").join(format!("flow{own}"));
    let below =
        || std::fs::read_dir(&groups).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir()).count();
    if !becomes(|| below() == 0).await {
        life.problems.push(format!("{} control groups are left in the guest", below()));
    }
}

async fn stop(bench: &Bench, hands: &Hands, life: &mut Life) {
    // The sockets of a guest that could not remove them itself; where there is a machine they are its monitor's.
    let _ = std::fs::remove_dir_all(bench.folder.path().join("m/fake"));
    if life.step("stop", bench.sandbox.stop()).await.is_err()
        && let Err(error) = life.step("stop, again", bench.sandbox.stop()).await
    {
        life.problems.push(format!("it can't be stopped: {error}"));
    }
    // What was cut or stands still goes with the guest.
    hands.set_wire(Wire::Cut);
    hands.kill_monitor();
}

/// What must be gone by then.
async fn audit(bench: &Bench, mounts: &[String], life: &mut Life) {
    let own = bench.folder.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
    let groups = Path::new("/run/cgroup").join(format!("flow{own}"));
    let power_off = || {
        let _ = std::fs::write(groups.join("cgroup.kill"), "1");
        !groups.exists() || remove_cgroups(&groups).is_ok()
    };
    if !becomes(power_off).await {
        life.problems.push("processes are left in the guest's control groups".into());
    }
    // The guest's own mounts are where a guest would have them; those of the host's are in the pod's folder.
    let of_host = |mount: &&String| mount.starts_with(&bench.folder.path().display().to_string());
    let left: Vec<_> = self::mounts().into_iter().filter(|mount| of_host(&mount) && !mounts.contains(mount)).collect();
    if !left.is_empty() {
        life.problems.push(format!("mounts are left: {left:?}"));
    }
    let folder = bench.folder.path().join("m");
    if folder.exists() {
        let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.file_name());
        life.problems.push(format!("the machine's folder is left: {:?}", entries.collect::<Vec<_>>()));
    }
}
