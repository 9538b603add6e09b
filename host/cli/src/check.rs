//! `coracle check`: what is there and what is missing, each with its mend.

use std::path::Path;

use anyhow::Result;
use coracle_settings::Loaded;
use serde::Serialize;
use serde_json::Value;

use crate::{jail, network, place, rootfs, shim};

/// Say what this host offers and what is missing.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print JSON: an object with the state and the text of each line.
    #[arg(long)]
    json: bool,
    /// Look at what the processes of this pod may, and fail where that is more than they need.
    #[arg(long, value_name = "POD")]
    jail: Option<String>,
}

/// How good something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Ok,
    /// It works without.
    Warning,
    /// Nothing runs before it is mended.
    Failing,
}

/// A thing that was looked at.
#[derive(Debug, Clone, Serialize)]
struct Line {
    name: &'static str,
    state: State,
    text: String,
    /// What mends it; empty where that is in the text, or nothing is to be mended.
    mend: &'static str,
}

impl Line {
    fn ok(name: &'static str, text: impl Into<String>) -> Self {
        Self { name, state: State::Ok, text: text.into(), mend: "" }
    }

    fn of(name: &'static str, outcome: Result<String>) -> Self {
        match outcome {
            Ok(text) => Self::ok(name, text),
            Err(error) => Self { name, state: State::Failing, text: format!("{error:#}"), mend: "" },
        }
    }

    fn warning(name: &'static str, text: impl Into<String>, mend: &'static str) -> Self {
        Self { name, state: State::Warning, text: text.into(), mend }
    }
}

pub(crate) async fn run(args: &Args) -> Result<u8> {
    if let Some(pod) = &args.jail {
        return Ok(u8::from(!jail::run(pod, args.json).await?));
    }
    let lines = lines()?;
    let failed = lines.iter().any(|line| line.state == State::Failing);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&serde_json::json!({ "ok": !failed, "lines": lines }))?);
        return Ok(u8::from(failed));
    }
    for Line { name, state, text, mend } in lines {
        let word = match state {
            State::Ok => "ok",
            State::Warning => "warning",
            State::Failing => "failing",
        };
        println!("{word:<8} {name}: {text}");
        if !mend.is_empty() {
            println!("         {mend}");
        }
    }
    Ok(u8::from(failed))
}

fn lines() -> Result<Vec<Line>> {
    let mut lines = vec![settings()];
    if lines.iter().any(|line| line.state == State::Failing) {
        // Nobody can say what would be done by settings that can't be read.
        return Ok(lines);
    }
    let report = shim::probe("")?;
    let part = |name: &'static str, part: &Value, good: &str| {
        let text = |key: &str, other: &str| part[key].as_str().unwrap_or(other).to_owned();
        let is_there = part["ok"] == true;
        Line {
            name,
            state: if is_there { State::Ok } else { State::Failing },
            text: if is_there { text(good, "found") } else { text("problem", "unknown") },
            mend: "",
        }
    };
    lines.push(part("monitor", &report["monitor"], "name"));
    // The built-in monitor needs no other program.
    if report["monitor"]["name"] != "builtin" {
        lines.push(part("qemu", &report["qemu"], "path"));
    }
    // Only volumes of an ordinary user's containers need it (and roots, where they are shared), and not each host has one that such a
    // user can start.
    if place::is_root() || report["virtiofsd"]["ok"] == true {
        lines.push(part("virtiofsd", &report["virtiofsd"], "path"));
    } else {
        let text = report["virtiofsd"]["problem"].as_str().unwrap_or("no virtiofsd");
        lines.push(Line::warning("volumes", text, ""));
    }
    lines.push(part("guest image", &report["guest"], "kernel"));
    lines.push(part("accelerator", &report["accelerator"], "name"));
    lines.push(Line::of("roots", rootfs::readiness()));
    lines.push(Line::of("network", network::readiness()));
    lines.push(kvm(&report));
    lines.push(Line::ok("vsock", vsock(&report)));
    lines.extend([kernel(), cgroups()]);
    if place::is_root() {
        lines.extend([vhost_net(), containerd()]);
    }
    Ok(lines)
}

fn settings() -> Line {
    match Loaded::of_host(None) {
        Ok(loaded) if loaded.deprecated.is_empty() => Line::ok("settings", "well-formed"),
        Ok(loaded) => {
            let uses: Vec<_> = loaded.deprecated.iter().map(ToString::to_string).collect();
            Line::warning("settings", uses.join("; "), "coracle settings check")
        }
        Err(error) => Line { name: "settings", state: State::Failing, text: error.to_string(), mend: "" },
    }
}

fn kvm(report: &Value) -> Line {
    if report["kvm"]["usable"] == true {
        return Line::ok("kvm", "usable");
    }
    Line::warning(
        "kvm",
        report["kvm"]["reason"].as_str().unwrap_or("not usable"),
        "machines are emulated, which is slow and no security boundary; containerd is refused it unless the administrator sets \
         `accelerator = \"any\"` in the table [machine] of /etc/coracle/config.toml",
    )
}

fn vsock(report: &Value) -> &'static str {
    match (&report["monitor"]["name"], &report["kernel_vsock"]) {
        (name, _) if name == "builtin" => "the monitor's own",
        (_, kernel) if kernel == true => "the kernel's",
        _ => "our own server",
    }
}

/// The oldest kernel on which the tests run.
const KERNEL: (u32, u32) = (5, 12);

fn kernel() -> Line {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map(|part| part.parse().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= KERNEL {
        Line::ok("kernel", release)
    } else {
        Line::warning(
            "kernel",
            format!("{release} is older than {}.{}", KERNEL.0, KERNEL.1),
            "QEMU's jail can't be made there, nobody has tried the rest: set `jail = false` in the table [qemu]",
        )
    }
}

fn cgroups() -> Line {
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        return Line::ok("cgroups", "version 2");
    }
    if Path::new("/sys/fs/cgroup/memory").exists() {
        return Line::ok("cgroups", "version 1");
    }
    Line::warning("cgroups", "none are mounted at /sys/fs/cgroup", "pods are not accounted for on the host")
}

fn vhost_net() -> Line {
    if Path::new("/dev/vhost-net").exists() {
        return Line::ok("vhost-net", "/dev/vhost-net");
    }
    Line::warning("vhost-net", "/dev/vhost-net is not there: links of QEMU's machines are slower", "modprobe vhost_net")
}

/// containerd's configuration: where it names no runtime of ours, pods can't ask for one.
fn containerd() -> Line {
    const FILE: &str = "/etc/containerd/config.toml";
    let ours = "io.containerd.coracle.v2";
    let files = std::fs::read_dir("/etc/containerd/conf.d").into_iter().flatten().flatten().map(|entry| entry.path());
    let named = [FILE.into()]
        .into_iter()
        .chain(files)
        .find(|path: &std::path::PathBuf| std::fs::read_to_string(path).is_ok_and(|text| text.contains(ours)));
    match named {
        Some(path) => Line::ok("containerd", format!("{} names {ours}", path.display())),
        None => Line::warning(
            "containerd",
            format!("{FILE} names no runtime {ours}: `ctr run --runtime {ours}` works, pods of Kubernetes need it"),
            "coracle install --containerd",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_json_of_their_own_words() {
        let line = Line::warning("kvm", "none", "mend");
        let text = serde_json::to_string(&line).unwrap();
        assert_eq!(text, r#"{"name":"kvm","state":"warning","text":"none","mend":"mend"}"#);
        assert!(kernel().text.contains('.'));
    }
}
