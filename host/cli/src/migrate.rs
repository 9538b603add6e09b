//! `coracle migrate`.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use coracle_settings::{Migration, Moved, migrate};
use serde_json::{Value, json};

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
        /// Print JSON: what has become of each key, the settings, and what was refused.
        #[arg(long, conflicts_with = "output")]
        json: bool,
    },
}

pub(crate) fn run(command: Command) -> Result<()> {
    let Command::Kata { files, output, json } = command;
    let paths: Vec<_> = files.iter().map(PathBuf::as_path).collect();
    let migration = migrate(&paths)?;
    if json {
        println!("{:#}", described(&migration));
    }
    for moved in migration.moved.iter().filter(|_| !json) {
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
        None if json => {}
        None => print!("{}", migration.text()),
    }
    Ok(())
}

/// All of it for programs. What is refused has no settings.
fn described(migration: &Migration) -> Value {
    let key = |moved: &Moved| json!({ "position": moved.position.to_string(), "key": moved.key, "fate": moved.fate, "text": moved.text });
    let refused = migration.refused();
    json!({
        "keys": migration.moved.iter().map(key).collect::<Vec<_>>(),
        "refused": refused.map(key),
        "settings": refused.is_none().then(|| migration.text()),
    })
}
