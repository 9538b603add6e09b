//! `coracle migrate`.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use coracle_settings::migrate;

/// Moving over from another runtime.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Turn Kata's configuration into Coracle's.
    ///
    /// The settings go to standard output, or to the file that `--output` names; what has become of each key, and why, to standard error. Where
    /// something asks for what Coracle has not, protection above all, the exit code is not 0, and no file is written.
    Kata {
        /// Kata's files, of the Go or the Rust runtime, drop-ins behind the file that they change.
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Write the settings there.
        #[arg(long, short, value_name = "FILE")]
        output: Option<PathBuf>,
    },
}

pub(crate) fn run(command: Command) -> Result<()> {
    let Command::Kata { files, output } = command;
    let paths: Vec<_> = files.iter().map(PathBuf::as_path).collect();
    let migration = migrate(&paths)?;
    for moved in &migration.moved {
        eprintln!("{}: {}: {}: {}", moved.position, moved.key, moved.fate, moved.text);
    }
    if let Some(refused) = migration.refused() {
        bail!(
            "{}: {}: {}: the settings would be something else than what was asked for",
            refused.position,
            refused.key,
            refused.text
        );
    }
    migration.check()?;
    match output {
        Some(path) => std::fs::write(&path, migration.text()).with_context(|| format!("write {}", path.display()))?,
        None => print!("{}", migration.text()),
    }
    Ok(())
}
