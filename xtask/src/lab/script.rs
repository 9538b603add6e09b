//! What runs in the clone: the initrd's `/init`, the first process after it, and the command. All are scripts of a shell.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::kernel::Kernel;

/// The tags of the shared file systems.
pub(crate) const ROOT_TAG: &str = "lab-root";
/// See [`ROOT_TAG`].
pub(crate) const OUT_TAG: &str = "lab-out";
/// Where files for the outside go.
const OUT: &str = "/lab-out";

/// Which variables the command gets, by the beginnings of their names.
const PASSED_ON: [&str; 4] = ["CORACLE_", "CARGO_", "RUST_", "RUSTUP_"];

/// Busybox commands of the scripts.
pub(crate) const APPLETS: [&str; 16] = [
    "cat",
    "cp",
    "env",
    "hostname",
    "insmod",
    "ip",
    "ln",
    "mkdir",
    "mkfifo",
    "mount",
    "poweroff",
    "setsid",
    "sh",
    "sleep",
    "switch_root",
    "sync",
];

/// The first process: it makes the root. Where a command fails, the machine ends, and what was said is told to the caller.
pub(crate) const INIT: &str = r#"#!/bin/sh
export PATH=/bin
trap 'poweroff -f' EXIT
set -e
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
# One that fails is missed where it is used.
while read -r module; do insmod "/modules/$module" || true; done </modules/order
[ -c /dev/kvm ] || { echo "the kernel has made no /dev/kvm"; exit 1; }
mount -t virtiofs -o ro lab-root /lower
mount -t tmpfs -o size=75%,mode=755 upper /upper
mkdir /upper/data /upper/work
# With redirect_dir a folder of the lower layer can be renamed.
mount -t overlay -o lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work,redirect_dir=on clone /clone
mount -t tmpfs -o mode=755 run /clone/run
mkdir /clone/run/lab
cp -a /bin /lab/* /clone/run/lab/
for folder in dev proc sys; do mount --move /$folder /clone/$folder; done
# The kernel's own helpers (modprobe) follow the first process into its root.
exec switch_root /clone /run/lab/bin/sh /run/lab/start
"#;

/// What the clone has to do.
pub(crate) struct Job<'a> {
    /// The command and its arguments.
    pub(crate) command: &'a [OsString],
    /// This program, which holds a machine there (see `held.rs`).
    pub(crate) own: &'a Path,
    /// Where it runs.
    pub(crate) folder: &'a Path,
    pub(crate) home: &'a OsStr,
    pub(crate) environment: Vec<(OsString, OsString)>,
    pub(crate) kernel: &'a Kernel,
    /// Whether there is a folder for files to bring out.
    pub(crate) shares_out: bool,
    /// What the output's own lines begin with, see `output.rs`.
    pub(crate) mark: &'a str,
}

/// The variables of `all` that the command gets.
pub(crate) fn passed_on(all: impl Iterator<Item = (OsString, OsString)>) -> Vec<(OsString, OsString)> {
    let wanted = |name: &OsStr| {
        let name = name.to_str().unwrap_or_default();
        // A shell takes no other names.
        let plain = name.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '_');
        plain && PASSED_ON.iter().any(|beginning| name.starts_with(beginning))
    };
    all.filter(|(name, _)| wanted(name)).collect()
}

/// One word of a shell's command, whatever is in it.
fn quote(word: &OsStr) -> Vec<u8> {
    let mut quoted = vec![b'\''];
    for byte in word.as_bytes() {
        match byte {
            b'\'' => quoted.extend(br"'\''"),
            byte => quoted.push(*byte),
        }
    }
    quoted.push(b'\'');
    quoted
}

/// The first process in the new root. The output goes through a pipe of its own: a port can be opened only once, and what the
/// command leaves running may write to it still; whatever comes after the last mark is of no interest.
pub(crate) fn start(job: &Job<'_>) -> Vec<u8> {
    let mut script = Vec::new();
    let mut line = |parts: &[&[u8]]| {
        script.extend(parts.concat());
        script.push(b'\n');
    };
    let release = format!("/lib/modules/{}", job.kernel.release);
    let (modules, release) = (quote(job.kernel.modules().as_os_str()), quote(OsStr::new(&release)));
    line(&[b"export PATH=/run/lab/bin\ntrap 'poweroff -f' EXIT\nset -e"]);
    // Before /tmp is covered: they may lie there.
    line(&[b"mkdir -p ", &release, b"\nmount --bind ", &modules, b" ", &release]);
    line(&[b": >/run/lab/xtask\nmount --bind ", &quote(job.own.as_os_str()), b" /run/lab/xtask"]);
    line(&[MOUNTS.as_bytes()]);
    line(&[HELD.as_bytes()]);
    if job.shares_out {
        line(&[format!("mkdir -p {OUT}\nmount -t virtiofs {OUT_TAG} {OUT}").as_bytes()]);
    }
    line(&[b"mark=", &quote(OsStr::new(job.mark))]);
    line(&[COMMAND.as_bytes()]);
    script
}

const MOUNTS: &str = "mkdir -p /dev/pts /dev/shm
mount -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t tmpfs -o mode=1777 tmp /tmp
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ln -s /proc/self/fd /dev/fd
for number in 0:stdin 1:stdout 2:stderr; do ln -s /proc/self/fd/${number%:*} /dev/${number#*:}; done
mkdir -m 1777 /run/lock
ip link set lo up
hostname coracle-lab
ulimit -Hn 1048576";

/// Its first line comes when the machine is there; where it fails, there is none.
const HELD: &str = "mkfifo /run/lab/held
/run/lab/xtask lab-machine </dev/null >/run/lab/held &
read -r word </run/lab/held";

const COMMAND: &str = r#"mkfifo /run/lab/output
# The kernel makes the port after it has talked with the host, and tells nobody where no udev runs; it is there by now.
until set -- /dev/vport*p1; [ -c "$1" ]; do sleep 0.05; done
cat /run/lab/output >"$1" &
exec 3>/run/lab/output
printf '%s started\n' "$mark" >&3
set +e
setsid env -i /bin/sh /run/lab/command </dev/null >&3 2>&1 3>&-
status=$?
sync
printf '%s ended %d\n' "$mark" "$status" >&3
# The host ends the machine.
while :; do sleep 1000; done
"#;

/// The script that becomes the command.
pub(crate) fn command(job: &Job<'_>) -> Vec<u8> {
    let mut script = Vec::new();
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into());
    let mut with_cargo = job.home.to_owned();
    with_cargo.push("/.cargo/bin:");
    with_cargo.push(path);
    let own = [("HOME".into(), job.home.to_owned()), ("PATH".into(), with_cargo)];
    for (name, value) in own.iter().chain(&job.environment) {
        script.extend([b"export ", name.as_bytes(), b"=", &quote(value), b"\n"].concat());
    }
    script.extend([b"cd ", quote(job.folder.as_os_str()).as_slice(), b" || exit 125\nexec"].concat());
    for word in job.command {
        script.push(b' ');
        script.extend(quote(word));
    }
    script.push(b'\n');
    script
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    /// What a shell prints that gets `script` as its input and no environment.
    fn shell(arguments: &[&str], script: &[u8]) -> Vec<u8> {
        let mut shell = Command::new("/bin/sh");
        shell.args(arguments).env_clear().stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = shell.spawn().unwrap();
        child.stdin.take().unwrap().write_all(script).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(script));
        output.stdout
    }

    fn with_job<T>(command: &[&[u8]], shares_out: bool, work: impl FnOnce(&Job<'_>) -> T) -> T {
        let words: Vec<OsString> = command.iter().map(|word| OsStr::from_bytes(word).to_owned()).collect();
        let kernel = Kernel { folder: "/cache/it's".into(), release: "6.1.0".into(), vmlinuz: "/v".into() };
        let variable = |name: &str, value: &str| (OsString::from(name), OsString::from(value));
        work(&Job {
            command: &words,
            own: Path::new("/target/it's/xtask"),
            folder: Path::new("/usr/bin"),
            home: OsStr::new("/home/o'neil"),
            environment: vec![variable("CORACLE_X", "$HOME `date`\n*")],
            kernel: &kernel,
            shares_out,
            mark: "mark",
        })
    }

    #[test]
    fn words_reach_the_command_as_they_are() {
        let words: [&[u8]; 7] = [b"plain", b"b'c''", b"", b"$x `y` \\ \"z\"", b"two\nlines", b"*", b"\xff-x"];
        let command = [&[b"printf", b"%s\\0".as_slice()][..], &words].concat();
        let printed = with_job(&command, false, |job| shell(&[], &super::command(job)));
        assert_eq!(printed, [words.join(&0), vec![0]].concat());
    }

    #[test]
    fn the_command_has_folder_home_path_and_variables() {
        let script = b"pwd; echo \"$HOME\"; echo \"$CORACLE_X\"; echo \"$PATH\"";
        let printed = with_job(&[b"sh", b"-c", script], false, |job| shell(&[], &super::command(job)));
        let printed = String::from_utf8(printed).unwrap();
        let begin = "/usr/bin\n/home/o'neil\n$HOME `date`\n*\n/home/o'neil/.cargo/bin:";
        assert!(printed.starts_with(begin), "{printed}");
    }

    #[test]
    fn some_variables_are_passed_on() {
        let names = ["CORACLE_TEST", "CARGO_HOME", "CARGO", "PATH", "MY_CARGO_HOME", "CARGO_A-B", "RUST_BACKTRACE"];
        let passed = passed_on(names.iter().map(|name| ((*name).into(), "1".into())));
        let passed: Vec<&str> = passed.iter().map(|(name, _)| name.to_str().unwrap()).collect();
        assert_eq!(passed, ["CORACLE_TEST", "CARGO_HOME", "RUST_BACKTRACE"]);
    }

    #[test]
    fn the_scripts_are_a_shells() {
        shell(&["-n"], INIT.as_bytes());
        for shares_out in [false, true] {
            let script = with_job(&[b"true"], shares_out, start);
            shell(&["-n"], &script);
            let script = String::from_utf8(script).unwrap();
            assert_eq!(script.contains(OUT), shares_out);
            assert!(script.contains(r"mount --bind '/target/it'\''s/xtask' /run/lab/xtask"), "{script}");
            assert!(
                script.contains(r"mount --bind '/cache/it'\''s/lib/modules/6.1.0' '/lib/modules/6.1.0'"),
                "{script}"
            );
        }
        assert!([ROOT_TAG, "switch_root"].iter().all(|word| INIT.contains(word)));
    }
}
