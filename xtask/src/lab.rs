//! `cargo xtask lab`: a command in a throw-away clone of this machine, in which KVM works.
//!
//! QEMU emulates a processor that has AMD's SVM, a distribution's kernel loads kvm-amd on it, and what that starts are guests
//! of a real KVM. The clone's root is this machine's, shared read-only by virtio-fs, with a tmpfs laid over it.
//!
//! ```text
//! qemu-system-*.deb ── emulator.rs (where this machine's is too old) ──────┐
//! linux-image-*.deb ── kernel.rs ──┬─ vmlinuz ────────────┐                │
//!                                  └─ modules.rs ─┐       │                │
//! COMMAND ──────────── script.rs ── initrd.rs ────┴───────┤                │
//! / and --out ──────── virtiofsd ─────────────────────────┴─▶ machine.rs ◀─┘ ── output.rs ──▶ stdout, exit status
//! ```

mod cache;
mod emulator;
mod held;
mod initrd;
mod kernel;
mod machine;
mod modules;
mod output;
mod script;

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::setup::{self, Level};
use crate::tests;
pub(crate) use cache::package;
use emulator::Emulator;
pub(crate) use held::hold as hold_machine;
use kernel::Kernel;
use machine::{Machine, Plan};
use output::End;
use script::Job;

/// The lab itself has failed.
pub(crate) const FAILED: u8 = 125;
/// The time limit has ended the command.
const TIMED_OUT: u8 = 124;

/// What the clone has a file system of its own at: the caller's is out of sight there.
const OWN_MOUNTS: [&str; 5] = ["/dev", "/proc", "/run", "/sys", "/tmp"];

/// Run a command in a throw-away clone of this machine in which KVM works.
///
/// The command runs as root, in the same folder, with the same HOME and PATH, and with the variables that begin with CORACLE_,
/// CARGO_, RUST_ or RUSTUP_. It sees this machine's files; what it writes is gone afterwards, except in --out. It has
/// /dev/kvm, /dev/vhost-vsock, /dev/vhost-net, /dev/net/tun and cgroup v2, and no network but loopback. /tmp and /run are
/// empty at the start; an overlay (a containerd's root) can be mounted only there.
///
/// Its output, both streams in their order, is on standard output. The exit status is the command's own; 124 where the time
/// limit ended it, 125 where the lab failed, 128 and the signal's number where one ended the lab.
#[derive(Debug, clap::Args)]
#[command(override_usage = "cargo xtask lab [OPTIONS] -- COMMAND [ARG]...")]
pub(crate) struct Args {
    /// The kernel: a .deb file of a linux-image-* package. With none, the newest linux-image-cloud-amd64 that apt knows,
    /// downloaded once.
    #[arg(long, value_name = "DEB")]
    kernel: Option<PathBuf>,
    /// How many processors the clone has.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,
    /// The clone's memory, in MiB; what the command writes is in it.
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(512..))]
    memory_mib: u32,
    /// The time limit from the clone's start, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u32).range(1..))]
    timeout: u32,
    /// An emulated IOMMU, and two network links on one wire, of which one is behind it: 52:54:00:c0:ac:01, and :02.
    #[arg(long)]
    iommu: bool,
    /// A folder for files to bring out: it is made where it is missing, and shared read-write at /lab-out.
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// The unpacked kernel. The lab sets this where it starts itself again as root.
    #[arg(long, hide = true)]
    prepared: Option<PathBuf>,
    /// The command and its arguments.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// The whole task: its exit status is the command's, not xtask's.
pub(crate) fn run(args: &Args) -> ExitCode {
    match lab(args) {
        Ok(End::Status(status)) => ExitCode::from(status),
        Ok(End::Limit { started }) => {
            let what = if started { "the command had not ended" } else { "the clone had not come up" };
            eprintln!("xtask: lab: {what} after {} s: give it more by --timeout SECONDS", args.timeout);
            ExitCode::from(TIMED_OUT)
        }
        Ok(End::Signal(number)) => {
            eprintln!("xtask: lab: ended by signal {number}");
            ExitCode::from(128_u8.saturating_add(number))
        }
        Err(error) => {
            eprintln!("xtask: lab: {error:#}");
            ExitCode::from(FAILED)
        }
    }
}

fn lab(args: &Args) -> Result<End> {
    let folder = std::env::current_dir().context("the working directory")?;
    if let Some(own) = OWN_MOUNTS.iter().find(|own| folder.starts_with(own)) {
        bail!("the working directory lies below {own}, which the clone has for itself: run this from elsewhere");
    }
    let kernel = match &args.prepared {
        Some(folder) => {
            // The one who asked for root may be killed; nobody else would end this process then.
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
            Kernel::open(folder)?
        }
        None => prepare(args)?,
    };
    // By whoever has started this, so that the cache is theirs.
    let emulator = Emulator::find(&cache()?)?;
    if !setup::is_root() {
        return Err(become_root(&kernel));
    }
    let out = args.out.as_deref().map(make_out).transpose()?;
    let mark = output::mark()?;
    let own = std::env::current_exe().context("find this program")?;
    let job = Job {
        command: &args.command,
        own: &own,
        folder: &folder,
        home: &std::env::var_os("HOME").unwrap_or_else(|| "/root".into()),
        environment: script::passed_on(std::env::vars_os()),
        kernel: &kernel,
        shares_out: out.is_some(),
        mark: &mark,
    };
    let modules = modules::choose(&kernel)?;
    let initrd = initrd::pack(&modules, &job)?;
    let plan = Plan {
        emulator: &emulator,
        kernel: &kernel.vmlinuz,
        initrd: &initrd,
        cpus: args.cpus,
        memory_mib: args.memory_mib,
        out: out.as_deref(),
        name: &mark,
        iommu: args.iommu,
    };
    eprintln!("==> starting the clone: Linux {}, {} processors, {} MiB", kernel.release, args.cpus, args.memory_mib);
    // From here on a signal ends the clone first.
    let signals = output::catch_signals()?;
    let mut machine = Machine::start(&plan)?;
    let end = output::follow(&mut machine, &mark, &signals, Duration::from_secs(args.timeout.into()));
    let last_words = machine.stop();
    let end = end?.with_context(|| format!("the clone ended before the command did; its last words:\n{last_words}"))?;
    if let (End::Limit { .. }, false) = (&end, last_words.is_empty()) {
        eprintln!("xtask: lab: the clone's last words:\n{last_words}");
    }
    Ok(end)
}

/// What needs no root of its own: whoever may build may do this.
fn prepare(args: &Args) -> Result<Kernel> {
    setup::ensure(Level::Run)?;
    setup::ensure_program("/sbin/depmod", "kmod")?;
    let cache = cache()?;
    match &args.kernel {
        Some(file) => kernel::from_file(&cache, file),
        None => kernel::newest(&cache, tests::KERNEL),
    }
}

/// Where the lab keeps what it has unpacked.
fn cache() -> Result<PathBuf> {
    Ok(crate::build::target()?.join("xtask/lab"))
}

/// Becomes the same task under sudo; it gives back only why it could not.
fn become_root(kernel: &Kernel) -> anyhow::Error {
    let own = match std::env::current_exe().context("find this program") {
        Ok(own) => own,
        Err(error) => return error,
    };
    let environment = script::passed_on(std::env::vars_os());
    let names: Vec<&str> = environment.iter().filter_map(|(name, _)| name.to_str()).collect();
    // This program's name, the word lab, and the rest as it was given.
    let given = std::env::args_os().skip(2);
    let error = Command::new("sudo")
        .arg(format!("--preserve-env=PATH,HOME,{}", names.join(",")))
        .arg(own)
        .arg("lab")
        .arg("--prepared")
        .arg(&kernel.folder)
        .args(given)
        .exec();
    anyhow::Error::new(error).context("the lab needs root, and sudo does not start")
}

fn make_out(folder: &Path) -> Result<PathBuf> {
    std::fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    folder.canonicalize().with_context(|| format!("find {}", folder.display()))
}

/// The unpacked package of the newest kernel that the package `of` stands for.
pub(crate) fn newest_kernel(of: &str) -> Result<PathBuf> {
    setup::ensure_program("/sbin/depmod", "kmod")?;
    Ok(kernel::newest(&cache()?, of)?.folder)
}

/// The command that runs `words` in the lab, for `seconds` at most.
///
/// With `iommu` it has what devices are passed on by.
pub(crate) fn clone_for(words: &[&str], seconds: u32, iommu: bool) -> Result<Command> {
    let own = std::env::current_exe().context("find this program")?;
    let mut lab = Command::new(own);
    lab.args(["lab", "--timeout", &seconds.to_string()]).args(iommu.then_some("--iommu")).arg("--").args(words);
    Ok(lab)
}
