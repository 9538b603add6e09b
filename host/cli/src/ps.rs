//! `coracle ps`.

use anyhow::Result;
use containerd_shim_protos::api::Status;
use serde_json::json;

use crate::container::{Record, Root};
use crate::table;
use crate::task::Task;

/// List containers.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Those that have ended, too.
    #[arg(short, long)]
    all: bool,
    /// Only ids.
    #[arg(short, long)]
    quiet: bool,
    /// Print JSON.
    #[arg(long, conflicts_with = "quiet")]
    json: bool,
}

/// What a container does now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum State {
    Created,
    Running,
    Paused,
    Exited(u32),
    /// Its shim has gone without a word.
    Dead,
}

impl std::fmt::Display for State {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exited(code) => write!(formatter, "exited ({code})"),
            other => formatter.write_str(other.word()),
        }
    }
}

impl State {
    /// Its word, for programs.
    fn word(&self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Exited(_) => "exited",
            Self::Dead => "dead",
        }
    }

    fn exit(&self) -> Option<u32> {
        if let Self::Exited(code) = self { Some(*code) } else { None }
    }
}

/// Asks the shim, where there is one.
pub(crate) async fn state(record: &Record) -> State {
    if let Some(code) = record.exit {
        return State::Exited(code);
    }
    if record.address.is_none() {
        return State::Created;
    }
    let Ok(task) = Task::connect(record).await else { return State::Dead };
    match task.state().await {
        Ok(state) => match state.status.enum_value_or_default() {
            Status::RUNNING => State::Running,
            Status::PAUSED | Status::PAUSING => State::Paused,
            Status::STOPPED => State::Exited(state.exit_status),
            _ => State::Created,
        },
        Err(error) if crate::task::is_not_found(&error) => State::Created,
        Err(_) => State::Dead,
    }
}

pub(crate) async fn run(root: &Root, args: Args) -> Result<()> {
    let (mut rows, mut all) = (Vec::new(), Vec::new());
    for (_, record) in root.all()? {
        let state = state(&record).await;
        if !args.all && matches!(state, State::Exited(_)) {
            continue;
        }
        if args.quiet {
            println!("{}", record.id);
            continue;
        }
        if args.json {
            all.push(json!({
                "id": record.id, "name": record.name, "image": record.image, "command": record.command,
                "created": record.created, "state": state.word(), "exit": state.exit(), "machine": record.accelerator,
            }));
            continue;
        }
        rows.push([
            record.id,
            record.name,
            record.image,
            table::short(&record.command.join(" "), 30),
            table::age(record.created),
            state.to_string(),
            record.accelerator,
        ]);
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&all)?);
    } else if !args.quiet {
        table::print(["ID", "NAME", "IMAGE", "COMMAND", "AGE", "STATE", "MACHINE"], &rows);
    }
    Ok(())
}
