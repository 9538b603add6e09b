//! What a bare Debian lacks: looked for by what it brings, installed by package.

use std::path::Path;

use anyhow::{Result, bail};

use crate::steps::{command, run, step};

/// A program and the package that brings it.
struct Need {
    /// Any of these files.
    files: &'static [&'static str],
    package: &'static str,
}

const fn need(files: &'static [&'static str], package: &'static str) -> Need {
    Need { files, package }
}

/// Where virtiofsd is, if it is anywhere.
pub(crate) const VIRTIOFSD: [&str; 3] =
    ["/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd", "/usr/local/bin/virtiofsd"];

/// What building and running takes.
const RUN: [Need; 6] = [
    need(&["/usr/bin/gcc"], "gcc"),
    need(&["/usr/lib/x86_64-linux-gnu/libc.a", "/usr/lib/aarch64-linux-gnu/libc.a"], "libc6-dev"),
    need(&["/usr/bin/qemu-system-x86_64"], "qemu-system-x86"),
    need(&VIRTIOFSD, "virtiofsd"),
    need(&["/bin/busybox", "/usr/bin/busybox"], "busybox-static"),
    need(&["/usr/sbin/mkfs.ext4", "/sbin/mkfs.ext4"], "e2fsprogs"),
];

const CONTAINERD: [Need; 2] =
    [need(&["/usr/bin/containerd"], "containerd"), need(&["/usr/sbin/runc", "/usr/bin/runc"], "runc")];

const TEST: [Need; 8] = [
    need(&["/usr/bin/valgrind"], "valgrind"),
    need(&["/usr/sbin/iptables", "/sbin/iptables"], "iptables"),
    need(&["/usr/bin/docker-registry"], "docker-registry"),
    need(&["/usr/lib/cni/bridge"], "containernetworking-plugins"),
    need(&["/usr/sbin/ip", "/usr/bin/ip", "/sbin/ip"], "iproute2"),
    need(&["/usr/bin/mkfs.erofs", "/usr/sbin/mkfs.erofs"], "erofs-utils"),
    need(&["/usr/bin/passt"], "passt"),
    need(&["/usr/sbin/veritysetup", "/sbin/veritysetup"], "cryptsetup-bin"),
];

/// Which things are to be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    Run,
    Containerd,
    Test,
}

/// Installs what is missing, and nothing else.
pub(crate) fn ensure(level: Level) -> Result<()> {
    let mut needs: Vec<&Need> = RUN.iter().collect();
    if level >= Level::Containerd {
        needs.extend(&CONTAINERD);
    }
    if level >= Level::Test {
        needs.extend(&TEST);
    }
    let missing: Vec<&str> = needs
        .into_iter()
        .filter(|need| !need.files.iter().any(|file| Path::new(file).exists()))
        .map(|need| need.package)
        // Debian 12's virtiofsd comes with QEMU.
        .filter(|package| *package != "virtiofsd" || has_package("virtiofsd"))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    step(&format!("installing {}", missing.join(" ")), || install(&missing))
}

/// Installs one program by its package where its file is missing.
pub(crate) fn ensure_program(file: &str, package: &str) -> Result<()> {
    if Path::new(file).exists() {
        return Ok(());
    }
    step(&format!("installing {package}"), || install(&[package]))
}

/// Whether apt knows the package.
fn has_package(name: &str) -> bool {
    let known = || {
        let output = command("apt-cache", &["show", name]).output();
        output.is_ok_and(|output| output.status.success() && !output.stdout.is_empty())
    };
    known() || (update_lists().is_ok() && known())
}

fn install(packages: &[&str]) -> Result<()> {
    let mut arguments = vec!["install", "-q", "-y", "--no-install-recommends"];
    arguments.extend(packages);
    if apt(&arguments).is_ok() {
        return Ok(());
    }
    // The lists may be missing or old.
    update_lists()?;
    apt(&arguments)
}

/// Fetches the lists of what there is to install.
pub(crate) fn update_lists() -> Result<()> {
    apt(&["update", "-q"])
}

/// apt-get as root.
fn apt(arguments: &[&str]) -> Result<()> {
    if !Path::new("/usr/bin/apt-get").exists() {
        bail!("this system has no apt-get: install QEMU, virtiofsd, gcc and busybox (static) by hand");
    }
    let mut words = privileged(&["env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]);
    words.extend(arguments);
    let (program, rest) = words.split_first().map_or(("apt-get", &[][..]), |(program, rest)| (*program, rest));
    let mut command = command(program, rest);
    command.stdout(std::process::Stdio::null());
    run(command)
}

/// The words that run a command as root.
pub(crate) fn privileged<'a>(words: &[&'a str]) -> Vec<&'a str> {
    let mut all =
        if is_root() { Vec::new() } else { vec!["sudo", "--preserve-env=CORACLE_CONFIG,CORACLE_ROOT,CORACLE_DEBUG"] };
    all.extend(words);
    all
}

/// Whether this process is root.
pub(crate) fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0)
}
