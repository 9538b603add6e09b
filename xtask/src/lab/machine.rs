//! The clone: QEMU, and a virtiofsd for each folder that it shares. Nothing of it has a name in a file system.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, unshare};
use rustix::io::FdFlags;
use rustix::process::{Pid, PidfdFlags, Signal};

use super::emulator::Emulator;
use super::script::{OUT_TAG, ROOT_TAG};
use crate::setup;

/// What a clone is made of.
pub(crate) struct Plan<'a> {
    pub(crate) emulator: &'a Emulator,
    pub(crate) kernel: &'a Path,
    pub(crate) initrd: &'a [u8],
    pub(crate) cpus: u32,
    pub(crate) memory_mib: u32,
    /// The folder that is shared read-write.
    pub(crate) out: Option<&'a Path>,
    /// What no other lab's sockets are called.
    pub(crate) name: &'a str,
    /// Whether it has an IOMMU, and links to pass on.
    pub(crate) iommu: bool,
}

/// How much of what a program says is kept, in bytes.
const WORDS_BYTES: usize = 8 << 10;

/// The kernel's command line: errors on the console, a panic ends the machine, no self-tests, which take long here.
///
/// The kernel takes such a processor's TSCs for different, which they are not here, and would read the HPET instead: so slow that on a
/// busy host the clone stood still in its timer interrupts.
const COMMAND_LINE: &str = "console=ttyS0 quiet loglevel=4 panic=-1 cryptomgr.notests random.trust_cpu=on tsc=reliable";

/// Two network links on one wire, by their hardware addresses. The first is behind the IOMMU, and can be passed to a guest.
const WIRE: [(&str, &str); 2] =
    [("52:54:00:c0:ac:01", ",iommu_platform=on,disable-legacy=on"), ("52:54:00:c0:ac:02", "")];

/// Its programs end when this is dropped, or when this process is killed.
pub(crate) struct Machine {
    /// In the order of their starts: QEMU last.
    programs: Vec<Program>,
    /// What the clone sends; its end is QEMU's.
    pub(crate) output: UnixStream,
}

struct Program {
    name: &'static str,
    child: Child,
    /// Readable when it has ended.
    end: OwnedFd,
    words: Vec<JoinHandle<Vec<u8>>>,
}

impl Machine {
    /// Starts it. It must be called on the main thread: the kernel kills the programs when the thread ends that started them.
    pub(crate) fn start(plan: &Plan<'_>) -> Result<Self> {
        let (output, inner) = UnixStream::pair().context("a pair of sockets")?;
        let mut machine = Self { programs: Vec::new(), output };
        let mut shares = vec![(ROOT_TAG, machine.share(plan.name, ROOT_TAG, Path::new("/"), Access::Read)?)];
        if let Some(folder) = plan.out {
            shares.push((OUT_TAG, machine.share(plan.name, OUT_TAG, folder, Access::Write)?));
        }
        let initrd =
            rustix::fs::memfd_create("coracle-lab", rustix::fs::MemfdFlags::CLOEXEC).context("a memory file")?;
        let mut file = std::fs::File::from(initrd);
        file.write_all(plan.initrd).context("write the initrd")?;
        let qemu = qemu(plan, &file, &inner, &shares);
        let mut inherited = vec![OwnedFd::from(file), inner.into()];
        inherited.extend(shares.into_iter().map(|(_, socket)| socket.into()));
        // The serial console is its standard output.
        machine.spawn("QEMU", qemu, inherited, Access::Write)?;
        Ok(machine)
    }

    /// Starts a server for `folder`, and gives the connection to it.
    fn share(&mut self, name: &str, tag: &'static str, folder: &Path, access: Access) -> Result<UnixStream> {
        // A server wants a socket that listens, but none needs a name in a file system.
        let address = SocketAddr::from_abstract_name(format!("{name}-{tag}"))?;
        let listener = UnixListener::bind_addr(&address).context("a socket for virtiofsd")?;
        // It is the only one to be taken, and the first.
        let connection = UnixStream::connect_addr(&address).context("a socket for virtiofsd")?;
        let server = virtiofsd(folder, &listener)?;
        self.spawn("virtiofsd", server, vec![listener.into()], access)?;
        Ok(connection)
    }

    fn spawn(
        &mut self,
        name: &'static str,
        mut command: Command,
        inherited: Vec<OwnedFd>,
        access: Access,
    ) -> Result<()> {
        let parent = rustix::process::getpid();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // A terminal's signals are for this process alone, which then ends the others.
        command.process_group(0);
        let setup = move || prepare(parent, &inherited, access);
        // SAFETY: between fork and exec the closure makes system calls only, and allocates nothing.
        #[expect(unsafe_code, reason = "pre_exec is unsafe by declaration")]
        unsafe {
            command.pre_exec(setup);
        }
        let mut child = command.spawn().with_context(|| format!("start {}", command.get_program().display()))?;
        let end = rustix::process::pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
        let mut words = Vec::new();
        words.extend(child.stdout.take().map(listen));
        words.extend(child.stderr.take().map(listen));
        let end = end.inspect_err(|_| drop(child.kill()))?;
        self.programs.push(Program { name, child, end, words });
        Ok(())
    }

    /// Descriptors, of which each is readable when a program has ended.
    pub(crate) fn ends(&self) -> impl Iterator<Item = &OwnedFd> {
        self.programs.iter().map(|program| &program.end)
    }

    /// Ends it, and gives what its programs said last.
    pub(crate) fn stop(mut self) -> String {
        self.kill();
        let mut said = Vec::new();
        for program in &mut self.programs {
            for words in program.words.drain(..) {
                let words = words.join().unwrap_or_default();
                for line in String::from_utf8_lossy(&words).lines().map(str::trim_end).filter(|line| !line.is_empty()) {
                    said.push(format!("  {}: {line}", program.name));
                }
            }
        }
        said.join("\n")
    }

    fn kill(&mut self) {
        // All before the first wait: those that are left would complain of one that is gone.
        self.programs.iter_mut().for_each(|program| drop(program.child.kill()));
        for program in &mut self.programs {
            let _ = program.child.wait();
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What a program may do to this machine's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    Write,
}

/// In the child, before exec.
fn prepare(parent: Pid, inherited: &[OwnedFd], access: Access) -> std::io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    if rustix::process::getppid() != Some(parent) {
        // The parent died before the line above.
        return Err(std::io::Error::from_raw_os_error(libc::ESRCH));
    }
    for fd in inherited {
        rustix::io::fcntl_setfd(fd, FdFlags::empty())?;
    }
    match access {
        Access::Read => make_read_only(),
        Access::Write => Ok(()),
    }
}

/// Makes every mount read-only for this process: one in the clone could mount the share once more, and writable. Not every
/// virtiofsd can do it for itself.
fn make_read_only() -> std::io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY,
        attr_clr: 0,
        // Not for others that see the same mounts.
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    // SAFETY: the path ends with a NUL, and the structure, whose size is told, is read only during the call.
    #[expect(unsafe_code, reason = "no crate of the workspace wraps mount_setattr(2)")]
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            c"/".as_ptr(),
            libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// Reads what a program says to its end, and keeps the last of it.
fn listen(mut pipe: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let (mut words, mut bytes) = (Vec::new(), [0; 4096]);
        while let Ok(count @ 1..) = pipe.read(&mut bytes) {
            words.extend(&bytes[..count]);
            words.drain(..words.len().saturating_sub(WORDS_BYTES));
        }
        words
    })
}

/// The server of a folder. Its own sandbox needs no more than the rights that it has.
fn virtiofsd(folder: &Path, listener: &UnixListener) -> Result<Command> {
    let program = setup::VIRTIOFSD.iter().find(|path| Path::new(path).exists());
    let program = program.context("virtiofsd is missing: install virtiofsd, or Debian 12's qemu-system-common")?;
    let version = Command::new(program).arg("--version").output().with_context(|| format!("run {program}"))?;
    // What only the older program, in C, says of itself.
    let is_c = String::from_utf8_lossy(&version.stdout).contains("FUSE kernel interface");
    let mut command = Command::new(program);
    command.arg(format!("--fd={}", listener.as_raw_fd()));
    let option = |name: &str| {
        let mut option = OsString::from(name);
        option.push(folder);
        option
    };
    if is_c {
        command.args(["-f", "-o", "sandbox=chroot,cache=auto,log_level=warn", "-o"]).arg(option("source="));
    } else {
        command.arg(option("--shared-dir=")).args(["--sandbox=chroot", "--cache=auto", "--log-level=warn"]);
    }
    command.arg("--thread-pool-size=2");
    Ok(command)
}

fn qemu(plan: &Plan<'_>, initrd: &impl AsRawFd, output: &impl AsRawFd, shares: &[(&str, UnixStream)]) -> Command {
    let mut command = plan.emulator.command();
    command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
    command.args(["-machine", "q35,memory-backend=memory", "-accel", "tcg,thread=multi", "-cpu", "max,+svm"]);
    command.args(["-smp", &plan.cpus.to_string(), "-m", &format!("{}M", plan.memory_mib)]);
    // The servers of the shares have it, too.
    command.args(["-object", &format!("memory-backend-memfd,id=memory,size={}M,share=on", plan.memory_mib)]);
    command.arg("-kernel").arg(plan.kernel).args(["-initrd", &format!("/proc/self/fd/{}", initrd.as_raw_fd())]);
    let more = if plan.iommu { " intel_iommu=on" } else { "" };
    command.args([
        "-append",
        &format!("{COMMAND_LINE}{more}"),
        "-chardev",
        "stdio,id=console,signal=off",
        "-serial",
        "chardev:console",
    ]);
    if plan.iommu {
        // Before all that it is to keep apart.
        command.args(["-device", "intel-iommu,intremap=on,caching-mode=on"]);
        for (number, (mac, more)) in WIRE.iter().enumerate() {
            command.args(["-netdev", &format!("hubport,id=wire{number},hubid=0")]);
            command.args(["-device", &format!("virtio-net-pci,netdev=wire{number},mac={mac},romfile={more}")]);
        }
    }
    command.args(["-device", "virtio-serial-pci", "-device", "virtserialport,chardev=output"]);
    command.args(["-chardev", &format!("socket,id=output,fd={}", output.as_raw_fd())]);
    for (tag, socket) in shares {
        command.args(["-chardev", &format!("socket,id={tag},fd={}", socket.as_raw_fd())]);
        command.args(["-device", &format!("vhost-user-fs-pci,chardev={tag},tag={tag},queue-size=1024")]);
    }
    command
}
