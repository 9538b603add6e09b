//! A detached container's own process: there is no daemon, so somebody must wait for its end, note the exit code, give its
//! machine's memory back, and remove it where `--rm` asks for that.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::container::{Folder, Record, Root};
use crate::run;
use crate::task::Streams;

/// The file of the container's folder with what its process warns of.
const WARNINGS: &str = "warnings.log";

/// Serve a detached container.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    name: String,
}

/// Starts the process and waits until the container runs, or can't. Prints the container's id.
pub(crate) fn spawn(root: &Root, folder: &Folder, record: &Record) -> Result<u8> {
    let warnings = folder.join(WARNINGS);
    let file = std::fs::File::create(&warnings).with_context(|| format!("make {}", warnings.display()))?;
    let mut command = Command::new(std::env::current_exe().context("find this program")?);
    command
        .arg("--root")
        .arg(root.path())
        .args(["supervise", &record.name])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(file);
    // SAFETY: setsid is async-signal-safe and takes nothing.
    #[expect(unsafe_code, reason = "pre_exec is unsafe by declaration")]
    unsafe {
        command.pre_exec(|| rustix::process::setsid().map(drop).map_err(Into::into));
    }
    let mut child = command.spawn().context("start the container's process")?;
    let mut answer = String::new();
    let stdout = child.stdout.take().context("the container's process has no output")?;
    BufReader::new(stdout).read_line(&mut answer).context("hear from the container's process")?;
    // Its folder may have gone with it. What it failed of is its answer.
    let said = std::fs::read_to_string(&warnings).unwrap_or_default();
    said.lines().filter(|line| line.starts_with("coracle: warning:")).for_each(|line| eprintln!("{line}"));
    if answer.trim() == "started" {
        println!("{}", record.id);
        return Ok(0);
    }
    let _ = child.wait();
    // The process has left no address; what it says is the reason.
    let text = answer.trim();
    drop(folder.read());
    bail!("{}", if text.is_empty() { "the container's process ended without a word" } else { text })
}

pub(crate) async fn run(root: &Root, args: Args) -> Result<u8> {
    let (folder, record) = root.find(&args.name)?;
    let log = |name: &str| format!("file://{}", folder.join(name).display());
    let streams = Streams { stdout: log("stdout.log"), stderr: log("stderr.log"), ..Default::default() };
    let say = |text: &str| {
        let mut stdout = std::io::stdout();
        // Who started this may have gone; the container goes on.
        let _ = writeln!(stdout, "{}", text.replace('\n', " "));
        let _ = stdout.flush();
    };
    let (remove, id) = (record.remove, record.id.clone());
    let started = async {
        let (record, task) = run::create(&folder, record, &streams).await?;
        // Before the start: nothing of the process's end may be missed.
        let waiting = tokio::spawn({
            let task = task.clone();
            async move { task.wait("").await }
        });
        match task.start("").await {
            Ok(()) => Ok((record, task, waiting)),
            Err(error) => {
                run::finish(&folder, record, &task, Some(255)).await?;
                Err(error)
            }
        }
    };
    let (record, task, waiting) = match started.await {
        Ok(started) => started,
        Err(error) => {
            say(&format!("{error:#}"));
            folder.discard(&id).await?;
            return Err(error);
        }
    };
    say("started");
    let exit = waiting.await?.ok();
    // The folder may have been removed by `coracle rm --force` by now.
    let finished = run::finish(&folder, record, &task, exit).await;
    if remove {
        folder.discard(&id).await?;
    }
    finished.map(|()| 0)
}
