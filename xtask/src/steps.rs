//! Running programs, with a line for each step that takes time.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

/// The top of the checkout.
pub(crate) fn top() -> PathBuf {
    // xtask lies directly below it.
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own).to_owned()
}

/// Says what is being done, runs it, and says how long it took.
pub(crate) fn step<T>(text: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    eprintln!("==> {text}");
    let start = Instant::now();
    let result = work();
    let seconds = start.elapsed().as_secs_f64();
    match &result {
        Ok(_) if seconds > 1.0 => eprintln!("    {text}: {seconds:.0} s"),
        Ok(_) => {}
        Err(_) => eprintln!("    {text}: failed after {seconds:.0} s"),
    }
    result
}

/// A command in the checkout, its output passed on.
pub(crate) fn command(program: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(arguments).current_dir(top());
    command
}

/// Runs a command; a failure names it.
pub(crate) fn run(mut command: Command) -> Result<()> {
    let status = command.status().with_context(|| format!("start {command:?}"))?;
    succeeded(&command, status)
}

/// A failure that names the command, where it has ended with one.
pub(crate) fn succeeded(command: &Command, status: ExitStatus) -> Result<()> {
    if !status.success() {
        bail!("{command:?} ended with {status}");
    }
    Ok(())
}

/// The files of the checkout that match these patterns of git's, those that are not committed yet, too.
pub(crate) fn files(patterns: &[&str]) -> Result<Vec<String>> {
    let mut list = command("git", &["ls-files", "--cached", "--others", "--exclude-standard"]);
    list.args(patterns);
    Ok(output(list)?.lines().map(str::to_owned).collect())
}

/// Runs a command and gives its output.
pub(crate) fn output(mut command: Command) -> Result<String> {
    let output = command.stderr(Stdio::inherit()).output().with_context(|| format!("start {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?} ended with {}", output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
