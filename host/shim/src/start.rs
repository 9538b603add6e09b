//! The action `start`: a daemon for the pod, or the address of the one that is there.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use coracle_protocol::protobuf::Message;
use coracle_protocol::protobuf::well_known_types::any::Any;
use coracle_settings::Settings;

use crate::args::Args;
use crate::bundle::{self, Membership};
use crate::folder;
use crate::task::config_path;

/// The descriptor on which the daemon finds its listening socket.
pub(crate) const LISTENER_FD: i32 = 3;

/// The most that is read from containerd, in bytes.
const INPUT_BYTES_MAX: u64 = 4 << 20;

/// The newest version of the Task API that the daemon serves.
const TASK_VERSION: i32 = 3;

/// The folder of containerd 2's state in which bundles of the Sandbox API are.
const SANDBOX_BUNDLES: &str = "io.containerd.sandbox.controller.v1.shim";

/// How long a shim of the same container may take to be gone.
const PREDECESSOR_PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);

/// How containerd wants the answer.
#[derive(Debug, PartialEq, Eq)]
enum Reply {
    /// containerd 1.6 and 1.7: the address.
    Address,
    /// containerd 2.0 to 2.2: JSON with this version.
    Json(i32),
    /// containerd 2.3 and later: a protobuf message.
    Protobuf,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut input = Vec::new();
    std::io::stdin().take(INPUT_BYTES_MAX).read_to_end(&mut input).context("read standard input")?;
    let maximum = std::env::var("MAX_SHIM_VERSION").ok();
    let mut reply = reply_form(&input, args, maximum.as_deref());
    let settings = Settings::load()?;
    let cwd = std::env::current_dir().context("find the bundle")?;
    let address = if bundle::has_config(&cwd) {
        match bundle::membership(&bundle::read(&cwd)?) {
            Membership::Of(sandbox) => {
                let socket = folder::socket(&folder::pod(&settings, &args.namespace, &sandbox));
                if UnixStream::connect(&socket).is_err() {
                    bail!("the pod {sandbox} has no shim: it has ended, or was never started");
                }
                address(&socket)
            }
            Membership::Own | Membership::Pod => start_daemon(args, &settings, None)?,
        }
    } else {
        // Of the Sandbox API. containerd 2 means a shim of version 3 there, though it asks for one of version 2 at most.
        if reply != Reply::Protobuf && cwd.components().any(|part| part.as_os_str() == SANDBOX_BUNDLES) {
            reply = Reply::Json(TASK_VERSION);
        }
        let settings_file = options_of(&input).and_then(|options| config_path(&options));
        start_daemon(args, &settings, settings_file.as_deref())?
    };
    // containerd 1.6 finds the shim again by this file after a restart.
    std::fs::write("address", &address).context("write the bundle's address file")?;
    print_reply(&reply, &address)
}

fn address(socket: &Path) -> String {
    format!("unix://{}", socket.display())
}

/// A legacy `Any` parses as `BootstrapParams` and the other way round; only the latter repeats the flags.
fn reply_form(input: &[u8], args: &Args, maximum: Option<&str>) -> Reply {
    let repeats = |params: &BootstrapParams| params.instance_id == args.id && params.namespace == args.namespace;
    if BootstrapParams::parse_from_bytes(input).is_ok_and(|params| repeats(&params)) {
        return Reply::Protobuf;
    }
    match maximum.and_then(|text| text.parse::<i32>().ok()) {
        Some(version) => Reply::Json(version.min(TASK_VERSION)),
        None => Reply::Address,
    }
}

fn print_reply(reply: &Reply, address: &str) -> Result<()> {
    let bytes = match reply {
        Reply::Address => address.as_bytes().to_vec(),
        Reply::Json(version) => {
            serde_json::json!({ "version": version, "address": address, "protocol": "ttrpc" }).to_string().into_bytes()
        }
        Reply::Protobuf => BootstrapResult {
            version: TASK_VERSION,
            address: address.to_owned(),
            protocol: "ttrpc".to_owned(),
            ..Default::default()
        }
        .write_to_bytes()?,
    };
    std::io::stdout().write_all(&bytes).context("answer containerd")
}

/// The runtime options that containerd gives at the start of a pod: of a task they come later.
fn options_of(input: &[u8]) -> Option<Vec<u8>> {
    let any = Any::parse_from_bytes(input).ok()?;
    any.type_url.ends_with("runtimeoptions.v1.Options").then_some(any.value)
}

/// Starts the pod's daemon, with its settings in `settings_file` where there is one.
fn start_daemon(args: &Args, settings: &Settings, settings_file: Option<&str>) -> Result<String> {
    let pod = folder::pod(settings, &args.namespace, &args.id);
    let socket = folder::socket(&pod);
    // One that is about to end, after its last delete, gets the time for it.
    if folder::is_served(&pod, PREDECESSOR_PATIENCE) {
        bail!("{} has a shim already", args.id);
    }
    // A predecessor that was killed, and after which nobody has cleaned up.
    crate::delete::give_links_back(args, &pod);
    folder::remove(&pod).with_context(|| format!("remove {}", pod.display()))?;
    std::fs::create_dir_all(folder::machine(&pod)).with_context(|| format!("make {}", pod.display()))?;
    rustix::fs::chmod(&pod, rustix::fs::Mode::from_raw_mode(0o700)).context("protect the pod's folder")?;
    // It listens before the daemon runs, so containerd can connect at once.
    let listener = UnixListener::bind(&socket).with_context(|| format!("listen at {}", socket.display()))?;
    let mut command = Command::new(std::env::current_exe().context("find this program")?);
    // By its name it knows whose settings it reads.
    command.arg0(std::env::args_os().next().unwrap_or_default());
    command.args(["-namespace", &args.namespace, "-id", &args.id]);
    if args.debug {
        command.arg("-debug");
    }
    if let Some(file) = settings_file {
        command.args(["-settings", file]);
    }
    command.arg("serve").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let fd = listener.as_raw_fd();
    let detach = move || {
        rustix::process::setsid()?;
        // SAFETY: dup2 takes no pointers, and the number is unused in the freshly forked child.
        #[expect(unsafe_code, reason = "the safe wrappers own the target, which here is only a number")]
        let result =
            unsafe { if fd == LISTENER_FD { libc::fcntl(fd, libc::F_SETFD, 0) } else { libc::dup2(fd, LISTENER_FD) } };
        if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: between fork and exec the closure makes setsid, fcntl and dup2 calls only, all of them async-signal-safe.
    #[expect(unsafe_code, reason = "pre_exec is unsafe by declaration")]
    unsafe {
        command.pre_exec(detach);
    }
    let child = command.spawn();
    if child.is_err() {
        folder::remove(&pod)?;
    }
    child.context("start the daemon")?;
    Ok(address(&socket))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Action;

    fn args() -> Args {
        Args {
            action: Action::Start,
            namespace: "n".into(),
            id: "i".into(),
            bundle: None,
            debug: false,
            settings: None,
        }
    }

    #[test]
    fn each_containerd_gets_its_form() {
        let params = BootstrapParams { instance_id: "i".into(), namespace: "n".into(), ..Default::default() };
        let message = params.write_to_bytes().unwrap();
        assert_eq!(reply_form(&message, &args(), None), Reply::Protobuf);
        assert_eq!(reply_form(&message, &args(), Some("3")), Reply::Protobuf);
        assert_eq!(reply_form(b"", &args(), Some("3")), Reply::Json(3));
        assert_eq!(reply_form(b"", &args(), Some("2")), Reply::Json(2));
        assert_eq!(reply_form(b"", &args(), Some("9")), Reply::Json(3));
        assert_eq!(reply_form(b"", &args(), None), Reply::Address);
    }

    #[test]
    fn legacy_options_are_not_taken_for_parameters() {
        let mut any = coracle_protocol::protobuf::well_known_types::any::Any::new();
        any.type_url = "containerd.runc.v1.Options".into();
        any.value = vec![8, 1];
        let options = any.write_to_bytes().unwrap();
        assert_eq!(reply_form(&options, &args(), None), Reply::Address);
        assert_eq!(reply_form(&options, &args(), Some("2")), Reply::Json(2));
    }
}
