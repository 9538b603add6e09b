//! What a container in a pod sees and gives back, by many small checks in one pod. All of them run on runc, too: a check that
//! fails there tests nothing.
//!
//! Lane: open: containers come later, and their roots are folders of the host's.

mod basics;
mod files;
mod life;
mod network;
mod process;
mod security;
mod volumes;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use coracle_e2e::cri::msg;
use coracle_e2e::{Containerd, Cri, Host, Pod, monitor};
use protobuf::MessageField;

/// What a check works with.
struct Bench<'a> {
    cri: &'a Cri,
    pod: Pod<'a>,
    /// A container that sleeps.
    sleeper: String,
    folder: PathBuf,
    /// Whether a script stays until its last word was read: containerd 1.6 closes its ends of the outputs when it hears of an end,
    /// and what is still in them is lost. runc tells an end at once; Coracle when all was taken, so there it is a check.
    stays: bool,
}

/// What each script of [`Bench::run`] says at its end on each of its streams: then its log is whole. The streams are pipes of their
/// own, and nothing keeps them in order.
const LAST_WORD: &str = "that-is-all-of-the-log";

type Check = (&'static str, fn(&Bench<'_>) -> Result<(), String>);

/// Equal, or the words of a failed check.
fn same<T: PartialEq + std::fmt::Debug>(found: T, expected: T) -> Result<(), String> {
    if found == expected { Ok(()) } else { Err(format!("{found:?} is not {expected:?}")) }
}

fn holds(text: &str, part: &str) -> Result<(), String> {
    if text.contains(part) { Ok(()) } else { Err(format!("{part:?} is not in {text:?}")) }
}

fn security(config: &mut msg::ContainerConfig) -> &mut msg::LinuxContainerSecurityContext {
    config.linux.mut_or_insert_default().security_context.mut_or_insert_default()
}

fn resources(config: &mut msg::ContainerConfig) -> &mut msg::LinuxContainerResources {
    config.linux.mut_or_insert_default().resources.mut_or_insert_default()
}

impl Bench<'_> {
    /// Runs a script in a fresh container to its end: exit code, and what it said on standard output and then on standard error.
    fn run(
        &self,
        name: &str,
        script: &str,
        change: impl FnOnce(&mut msg::ContainerConfig),
    ) -> Result<(i32, String), String> {
        let text = |error: coracle_e2e::cri::CriError| error.1;
        // With quotes inside, so that who prints the script's text does not say the word.
        let (first, rest) = LAST_WORD.split_at(4);
        let heard = format!("/dev/shm/heard-{name}");
        let stay = if self.stays { format!("; until [ -e {heard} ]; do sleep 0.1; done") } else { String::new() };
        let script = format!("trap 'echo {first}\"\"{rest}; echo {first}\"\"{rest} >&2{stay}' EXIT\n{script}");
        let mut streams = &["stdout", "stderr"][..];
        let change = |config: &mut msg::ContainerConfig| {
            change(config);
            if config.tty {
                // A terminal is one stream.
                streams = &["stdout"];
            }
        };
        let id = self.pod.start(name, &["sh", "-c", &script], change).map_err(text)?;
        if self.stays {
            let all_said = || streams.iter().all(|stream| self.pod.log_of(name, stream).contains(LAST_WORD));
            let deadline = Instant::now() + Duration::from_secs(60);
            // 2 is ended, as a script is that was killed.
            while !all_said() && self.cri.status(&id).map_err(text)?.state != 2 {
                assert!(Instant::now() < deadline, "{name} has said no last word: {:?}", self.pod.log(name));
                // A file that grows is no event: kubelet looks again, too.
                std::thread::sleep(Duration::from_millis(20));
            }
            same(self.exec(&format!("touch {heard}"))?.0, 0)?;
        }
        let code = self.cri.ended(&id).exit_code;
        let mut output = String::new();
        for stream in streams {
            // containerd tells the end before the log is whole, and gives the rest up where the container is removed meanwhile.
            // A killed script has no last word.
            let log =
                if code < 128 { self.pod.await_log_of(name, stream, LAST_WORD) } else { self.pod.log_of(name, stream) };
            output += log.split(LAST_WORD).next().unwrap_or_default();
            if !output.is_empty() && !output.ends_with('\n') {
                output.push('\n');
            }
        }
        self.cri.remove(&id).map_err(text)?;
        Ok((code, output))
    }

    /// What a script prints in a fresh container.
    fn printed(
        &self,
        name: &str,
        script: &str,
        change: impl FnOnce(&mut msg::ContainerConfig),
    ) -> Result<String, String> {
        let (code, output) = self.run(name, script, change)?;
        if code == 0 { Ok(output) } else { Err(format!("it ended with {code}: {output}")) }
    }

    /// Runs a script beside the sleeper.
    fn exec(&self, script: &str) -> Result<(i32, String, String), String> {
        self.cri.exec(&self.sleeper, &["sh", "-c", script]).map_err(|error| error.1)
    }
}

fn passes_on(runtime: &str) {
    let host = Host::with_own_network();
    let memory = volumes::Prepared::new(&host.folder);
    let containerd = Containerd::with_cri(&host);
    let cri = Cri::connect(&containerd);
    let pod = Pod::run(&cri, runtime, "checks", |config| {
        config.log_directory = host.folder.display().to_string();
        let dns = msg::DnsConfig {
            servers: vec!["10.9.8.7".into()],
            searches: vec!["one.example".into(), "two.example".into()],
            options: vec!["ndots:5".into()],
            ..Default::default()
        };
        let linux = config.linux.mut_or_insert_default();
        linux.cgroup_parent = format!("/{}", host.mark());
        // Without this no container of the pod may be privileged.
        linux.security_context.mut_or_insert_default().privileged = true;
        config.labels.insert("app".into(), "checks".into());
        config.annotations.insert("note".into(), "kept".into());
        config.dns_config = MessageField::some(dns);
        let sysctls = &mut config.linux.mut_or_insert_default().sysctls;
        sysctls.insert("kernel.shm_rmid_forced".into(), "1".into());
        sysctls.insert("net.ipv4.ip_unprivileged_port_start".into(), "80".into());
    })
    .unwrap();
    let sleeper = pod.start("sleeper", &["sleep", "100000"], |_| {}).unwrap();
    let folder = host.folder.clone();
    let bench = Bench { cri: &cri, pod, sleeper, folder, stays: runtime == "runc" };
    let mut failed = Vec::new();
    let all = [
        basics::CHECKS,
        process::CHECKS,
        files::CHECKS,
        volumes::CHECKS,
        security::CHECKS,
        life::CHECKS,
        network::CHECKS,
    ]
    .concat();
    // For people: one kind of check alone (`_` for all), each with its time.
    let only = std::env::var("CORACLE_TEST_CHECKS").unwrap_or_default();
    for (name, check) in all.iter().filter(|(name, _)| name.contains(&only)) {
        let start = Instant::now();
        let outcome = check(&bench);
        // For people who look for what is slow; nothing depends on it, and a test that fails has its failures alone to show.
        if !only.is_empty() {
            println!("check {name} on {runtime} ... {:.1} s ... {}", start.elapsed().as_secs_f32(), outcome.is_ok());
        }
        if let Err(text) = outcome {
            failed.push(format!("{name}: {text}"));
        }
    }
    let Bench { pod, .. } = bench;
    pod.remove().unwrap();
    drop((containerd, memory));
    host.audit();
    assert!(failed.is_empty(), "on {runtime}:\n  {}", failed.join("\n  "));
    println!("{} checks on {runtime}", all.len());
}

#[test]
fn the_checks_pass() {
    passes_on("coracle");
}

#[test]
fn the_checks_pass_on_runc_as_well() {
    if monitor() != "qemu-system" {
        println!("left out: runc runs no machine; the lane of QEMU holds it to the same checks");
        return;
    }
    passes_on("runc");
}
