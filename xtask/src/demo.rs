//! `cargo xtask demo`: from nothing to a container in a machine of its own.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::build::{self, Built};
use crate::containerd::Containerd;
use crate::image;
use crate::setup::{self, Level};
use crate::steps::{output, step};
use crate::tests;

/// Run a container in a machine of its own.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Through a private containerd.
    #[arg(long)]
    containerd: bool,
}

/// The demo needs root: namespaces, mounts and machines of others' images.
fn become_root(args: &Args) -> Result<bool> {
    if setup::is_root() {
        return Ok(false);
    }
    // What was built stays the user's; the run itself is root's.
    let own = std::env::current_exe().context("find this program")?;
    let own = own.display().to_string();
    let mut words = vec!["sudo", "--preserve-env=PATH,HOME,CARGO_HOME,RUSTUP_HOME", own.as_str(), "demo"];
    if args.containerd {
        words.push("--containerd");
    }
    crate::steps::run(crate::steps::command(words[0], &words[1..]))?;
    Ok(true)
}

fn prepare(args: &Args) -> Result<(Built, PathBuf, PathBuf)> {
    setup::ensure(if args.containerd { Level::Containerd } else { Level::Run })?;
    let built = build::all()?;
    let guest = built.guest(tests::KERNEL)?;
    let folder = built.work().join("image");
    if !folder.join("index.json").exists() {
        step("making a small image from busybox", || image::make(&folder, &[]))?;
    }
    let settings = built.work().join("demo.toml");
    std::fs::write(
        &settings,
        format!("[machine]\naccelerator = \"any\"\n[guest]\nfolder = {:?}\n", guest.display().to_string()),
    )
    .context("write the demo's settings")?;
    Ok((built, folder, settings))
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let (built, folder, settings) = prepare(args)?;
    if become_root(args)? {
        return Ok(());
    }
    let host = output(crate::steps::command("uname", &["-r"]))?;
    // One line to see, then the machine stays for a look at its memory, until its input ends.
    let script = "uname -r; cat >/dev/null";
    let (start, mut child, _containerd);
    if args.containerd {
        let containerd = step("starting a private containerd", || Containerd::start(&built, &settings))?;
        let image = containerd.import(&folder, &built.work())?;
        eprintln!("==> ctr run --runtime io.containerd.coracle.v2");
        start = Instant::now();
        let arguments = ["run", "--rm", "--runtime", "io.containerd.coracle.v2", &image, "demo", "sh", "-c", script];
        child = spawn(containerd.ctr(&arguments))?;
        _containerd = Some(containerd);
    } else {
        eprintln!("==> coracle run");
        let mut command = Command::new(built.coracle());
        command.arg("--root").arg(built.work().join("root")).args(["run", "--rm", "-i", "--network", "none"]);
        command.arg(format!("oci:{}", folder.display())).args(["sh", "-c", script]);
        command.env("CORACLE_CONFIG", &settings);
        start = Instant::now();
        child = spawn(command)?;
        _containerd = None;
    }
    let mut first = String::new();
    let stdout = child.stdout.take().context("the container has no output")?;
    let mut reader = BufReader::new(stdout);
    reader.read_line(&mut first).context("read the container's output")?;
    let seconds = start.elapsed().as_secs_f64();
    let processes = processes();
    drop(child.stdin.take());
    let status = child.wait().context("wait for the container")?;
    if first.trim().is_empty() || !status.success() {
        bail!("the container ended with {status} and printed {first:?}");
    }
    println!("host kernel           {}", host.trim());
    println!("guest kernel          {}", first.trim());
    println!("accelerator           {}", accelerator(&built, &settings)?);
    println!("time to first output  {seconds:.2} s");
    println!("memory                resident  anonymous  threads");
    for process in processes {
        println!(
            "  {:20} {:>6} KiB {:>6} KiB {:>5}",
            process.name, process.resident_kib, process.anonymous_kib, process.threads
        );
    }
    Ok(())
}

fn spawn(mut command: Command) -> Result<std::process::Child> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    command.spawn().with_context(|| format!("start {command:?}"))
}

fn accelerator(built: &Built, settings: &std::path::Path) -> Result<String> {
    let mut probe = Command::new(built.shim());
    probe.arg("probe").env("CORACLE_CONFIG", settings);
    let report: serde_json::Value = serde_json::from_str(&output(probe)?).context("the shim's report")?;
    let name = report["accelerator"]["name"].as_str().unwrap_or("unknown").to_owned();
    Ok(match report["kvm"]["reason"].as_str() {
        Some(reason) if name != "kvm" => format!("{name}, no security boundary ({reason})"),
        _ => name,
    })
}

/// One process of a pod.
pub(crate) struct Process {
    pub(crate) name: String,
    pub(crate) pid: u32,
    pub(crate) resident_kib: u64,
    pub(crate) anonymous_kib: u64,
    pub(crate) threads: u64,
}

/// The processes of all pods of this machine, by what they are.
pub(crate) fn processes() -> Vec<Process> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let words = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words = String::from_utf8_lossy(&words).replace('\0', " ");
        let own = words.split(' ').next().is_some_and(|program| program.ends_with("/coracle"));
        let name = if words.contains("qemu-system") && words.contains("-name coracle-") {
            "qemu"
        } else if words.contains("virtiofsd") && words.contains("/shared") {
            "virtiofsd"
        } else if words.contains("containerd-shim-coracle-v2") && words.contains(" vsock ") {
            "vsock server"
        } else if words.contains("containerd-shim-coracle-v2") && words.contains("serve") {
            "shim"
        } else if own && words.contains(" run ") {
            "coracle run"
        } else if own && words.contains(" supervise ") {
            "coracle supervise"
        } else {
            continue;
        };
        let status = std::fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        let figure = |key: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default();
            line.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or(0)
        };
        found.push(Process {
            name: name.to_owned(),
            pid,
            resident_kib: figure("VmRSS:"),
            anonymous_kib: figure("RssAnon:"),
            threads: figure("Threads:"),
        });
    }
    found.sort_by(|a, b| (&a.name, a.pid).cmp(&(&b.name, b.pid)));
    found
}
