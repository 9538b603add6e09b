//! The debug console: a shell of the guest's on a terminal, for each connection of the host's. It is served where the kernel's command line says so, which
//! whoever measures the guest sees, and nowhere else.

use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use coracle_protocol::ports::DEBUG_CONSOLE;
use rustix::process::{Pid, Signal};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_vsock::VsockListener;

use crate::from_host::FromHost;
use crate::guest::serve_each;
use crate::process::Stream;
use crate::thread::on_thread;
use crate::{Error, Result, gate, program};

/// The most shells at one time; further ones wait.
const SHELLS_MAX: usize = 4;

/// Shells, the best first.
const SHELLS: [&str; 3] = ["/bin/bash", "/bin/sh", BUSYBOX];
const BUSYBOX: &str = "/bin/busybox";

/// How long busybox may take to make links for its programs.
const LINKS_PATIENCE: Duration = Duration::from_secs(10);

/// Whether the kernel's command line asks for it.
pub(crate) fn is_enabled() -> bool {
    let line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    line.split_whitespace().any(|word| word == DEBUG_CONSOLE)
}

/// Takes connections until the task ends.
pub(crate) async fn serve(listener: VsockListener) {
    serve_each(listener, SHELLS_MAX, |mut host| async move {
        if let Err(error) = run(&mut host).await {
            let _ = host.write_all(format!("coracle-agent: {error}\r\n").as_bytes()).await;
        }
    })
    .await;
}

/// A shell until it, or the host, has gone.
async fn run(host: &mut FromHost) -> Result<()> {
    gate::admit_debug_console()?;
    let shell = SHELLS.into_iter().find(|path| Path::new(path).exists());
    let shell = shell.ok_or_else(|| {
        Error::Unsupported("a shell, which the guest image does not have (`coracle image build --shell FILE`),".into())
    })?;
    let (terminal, child) = on_thread(move || start(shell)).await?;
    relay(host, &Stream::new(terminal)?).await;
    end(child).await;
    Ok(())
}

fn start(shell: &'static str) -> Result<(OwnedFd, Child)> {
    if shell == BUSYBOX && !Path::new("/bin/ls").exists() {
        let mut links = Command::new(BUSYBOX);
        links.args(["--install", "-s", "/bin"]);
        // Without them its programs go by `busybox NAME`.
        let _ = program::run(links, &[], LINKS_PATIENCE);
    }
    let failed = |error: rustix::io::Errno| Error::system("open a terminal")(std::io::Error::from(error));
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let ours = openpt(flags).map_err(failed)?;
    unlockpt(&ours).map_err(failed)?;
    let theirs = ioctl_tiocgptpeer(&ours, flags).map_err(failed)?;
    let copy = || theirs.try_clone().map(Stdio::from).map_err(Error::system("open a terminal"));
    let mut command = Command::new(shell);
    command.arg0("sh").current_dir("/").env_clear().env("PATH", program::PATH).env("TERM", "linux").env("HOME", "/");
    command.stdin(copy()?).stdout(copy()?).stderr(copy()?);
    let own_session = || {
        rustix::process::setsid()?;
        rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes two system calls and touches no memory of others.
    #[expect(unsafe_code, reason = "pre_exec is unsafe by declaration")]
    unsafe {
        command.pre_exec(own_session);
    }
    let child = command.spawn().map_err(Error::system(format!("start {shell}")))?;
    Ok((ours, child))
}

/// Moves bytes both ways until one side has gone.
async fn relay(host: &mut FromHost, terminal: &Stream) {
    let (mut from_host, mut from_shell) = ([0; 1024], [0; 4096]);
    loop {
        tokio::select! {
            read = host.read(&mut from_host) => {
                let Ok(count @ 1..) = read else { return };
                if terminal.write_all(from_host.get(..count).unwrap_or_default()).await.is_err() {
                    return;
                }
            }
            read = terminal.read(&mut from_shell) => {
                let Ok(count @ 1..) = read else { return };
                if host.write_all(from_shell.get(..count).unwrap_or_default()).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// Ends what is left of the shell's session, and reaps the shell.
async fn end(mut child: Child) {
    if let Some(own) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        // Nobody has reaped it yet, so the number is its own, and its group's.
        let _ = rustix::process::kill_process_group(own, Signal::KILL);
    }
    let _ = on_thread(move || child.wait().map_err(Error::system("reap the shell"))).await;
}
