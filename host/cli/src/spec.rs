//! The OCI specification of a container that `coracle run` starts: docker's defaults.

use anyhow::{Context, Result, bail};
use coracle_images::Config;
use serde_json::{Value, json};

use crate::run::Args;

const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Docker's default capabilities.
const CAPABILITIES: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// The command: what the user gave, else the image's.
pub(crate) fn command(args: &Args, image: &Config) -> Result<Vec<String>> {
    let rest = if args.command.is_empty() { &image.cmd } else { &args.command };
    let command: Vec<String> = image.entrypoint.iter().chain(rest).cloned().collect();
    if command.is_empty() {
        bail!("the image names no command: give one after the image");
    }
    Ok(command)
}

/// The process of a container, or of an exec: user, command, environment, directory.
pub(crate) fn process(terminal: bool, user: &str, command: &[String], env: &[String], cwd: &str) -> Value {
    json!({
        "terminal": terminal,
        // The guest looks names up in the container's own files.
        "user": { "uid": 0, "gid": 0, "username": user },
        "args": command,
        "env": env,
        "cwd": if cwd.is_empty() { "/" } else { cwd },
        "capabilities": {
            "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES
        },
        "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1_048_576, "soft": 1024 }],
        "noNewPrivileges": true
    })
}

/// Variables of the image, then those of the user, which win.
pub(crate) fn environment(image: &[String], given: &[String], hostname: &str, terminal: bool) -> Vec<String> {
    let mut all: Vec<String> = vec![DEFAULT_PATH.into(), format!("HOSTNAME={hostname}")];
    if terminal {
        all.push("TERM=xterm".into());
    }
    for entry in image.iter().chain(given) {
        let entry = match entry.split_once('=') {
            Some(_) => entry.clone(),
            // As docker does: a bare name takes the caller's value, where there is one.
            None => match std::env::var(entry) {
                Ok(value) => format!("{entry}={value}"),
                Err(_) => continue,
            },
        };
        let name = entry.split('=').next().unwrap_or_default().to_owned();
        all.retain(|present| present.split('=').next() != Some(&name));
        all.push(entry);
    }
    all
}

/// The whole specification.
pub(crate) fn build(args: &Args, image: &Config, hostname: &str) -> Result<Value> {
    let env = environment(&image.env, &args.env, hostname, args.tty);
    let user = args.user.as_deref().unwrap_or(&image.user);
    let cwd = args.workdir.as_deref().unwrap_or(&image.working_dir);
    let mut mounts = vec![
        json!({ "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] }),
        json!({ "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
            "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] }),
        json!({ "destination": "/dev/pts", "type": "devpts", "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] }),
        json!({ "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
            "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"] }),
        json!({ "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"] }),
        json!({ "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"] }),
        json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
            "options": ["nosuid", "noexec", "nodev", "ro"] }),
    ];
    for volume in &args.volume {
        mounts.push(volume_mount(volume)?);
    }
    let mut resources = json!({});
    if let Some(cpus) = args.cpus {
        if !(cpus > 0.0 && cpus <= 1024.0) {
            bail!("--cpus {cpus}: give a number above 0");
        }
        #[expect(clippy::cast_possible_truncation, reason = "it is bounded above")]
        let quota = (cpus * 100_000.0).round() as i64;
        resources["cpu"] = json!({ "quota": quota, "period": 100_000 });
    }
    if let Some(memory) = &args.memory {
        resources["memory"] = json!({ "limit": parse_size(memory)? });
    }
    Ok(json!({
        "ociVersion": "1.1.0",
        "process": process(args.tty, user, &command(args, image)?, &env, cwd),
        "root": { "path": "rootfs" },
        "hostname": hostname,
        "mounts": mounts,
        "linux": {
            "resources": resources,
            "namespaces": [
                { "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" }, { "type": "cgroup" },
                { "type": "network" }
            ],
            "maskedPaths": ["/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
        }
    }))
}

fn volume_mount(volume: &str) -> Result<Value> {
    let parts: Vec<&str> = volume.split(':').collect();
    let (source, destination, readonly) = match parts.as_slice() {
        [source, destination] | [source, destination, "rw"] => (source, destination, false),
        [source, destination, "ro"] => (source, destination, true),
        _ => bail!("--volume {volume}: give SRC:DST or SRC:DST:ro"),
    };
    if !destination.starts_with('/') {
        bail!("--volume {volume}: {destination} is not absolute");
    }
    let source = std::fs::canonicalize(source).with_context(|| format!("--volume {volume}: {source}"))?;
    let access = if readonly { "ro" } else { "rw" };
    Ok(
        json!({ "destination": destination, "type": "bind", "source": source, "options": ["rbind", "rprivate", access] }),
    )
}

/// The memory of a container in bytes: digits and one of the letters b, k, m, g, t.
pub(crate) fn parse_size(text: &str) -> Result<i64> {
    let bytes = parse_bytes(text)?;
    if bytes < 4 << 20 {
        bail!("{text}: a container needs 4 MiB at least");
    }
    Ok(bytes)
}

/// A number of bytes, likewise.
pub(crate) fn parse_bytes(text: &str) -> Result<i64> {
    let lower = text.to_ascii_lowercase();
    let digits = lower.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit: i64 = match &lower[digits.len()..] {
        "" | "b" => 1,
        "k" | "kb" | "kib" => 1 << 10,
        "m" | "mb" | "mib" => 1 << 20,
        "g" | "gb" | "gib" => 1 << 30,
        "t" | "tb" | "tib" => 1 << 40,
        other => bail!("{text}: unknown unit {other}; give for example 256m"),
    };
    let number: i64 = digits.parse().with_context(|| format!("{text} is no size"))?;
    number.checked_mul(unit).with_context(|| format!("{text} is too large"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("256m").unwrap(), 256 << 20);
        assert_eq!(parse_size("1G").unwrap(), 1 << 30);
        assert_eq!((parse_bytes("2T").unwrap(), parse_bytes("4k").unwrap()), (2 << 40, 4096));
        assert_eq!(parse_size("8388608").unwrap(), 8 << 20);
        for bad in ["", "m", "-5m", "5x", "1k", "99999999999g"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_users_variables_win() {
        let env =
            environment(&["PATH=/image".into(), "A=1".into()], &["A=2".into(), "NOT_SET_ANYWHERE".into()], "h", true);
        assert_eq!(env, ["HOSTNAME=h", "TERM=xterm", "PATH=/image", "A=2"]);
    }

    #[test]
    fn volumes() {
        assert_eq!(volume_mount("/tmp:/data:ro").unwrap()["options"][2], "ro");
        for bad in ["/tmp", "/tmp:data", "/tmp:/d:x", "/nowhere:/d"] {
            assert!(volume_mount(bad).is_err(), "{bad}");
        }
    }
}
