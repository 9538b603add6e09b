//! `coracle exec`.

use anyhow::{Context, Result};

use crate::attach::Attachment;
use crate::container::{self, Root};
use crate::spec;
use crate::task::Task;

/// Run a command in a container that runs.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The container: its name or id.
    container: String,
    /// The command.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    command: Vec<String>,
    /// Pass standard input on.
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal.
    #[arg(short, long)]
    tty: bool,
    /// Set a variable.
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// The working directory.
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// The user, and a group: names or numbers.
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
}

pub(crate) async fn run(root: &Root, args: Args) -> Result<u8> {
    let (folder, record) = root.find(&args.container)?;
    let task = Task::connect(&record).await?;
    let bundle: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.join("config.json")).context("read the bundle")?)?;
    let container = &bundle["process"];
    let texts = |value: &serde_json::Value| -> Vec<String> {
        value.as_array().into_iter().flatten().filter_map(|item| item.as_str().map(str::to_owned)).collect()
    };
    let env = spec::environment(&texts(&container["env"]), &args.env, &record.id, args.tty);
    let user = args.user.as_deref().or(container["user"]["username"].as_str()).unwrap_or_default();
    let cwd = args.workdir.as_deref().or(container["cwd"].as_str()).unwrap_or_default();
    let process = spec::process(args.tty, user, &args.command, &env, cwd);
    let exec_id = format!("exec-{}", container::new_id()?);
    let attachment = Attachment::new(folder.path(), &exec_id, args.interactive, args.tty)?;
    task.exec(&exec_id, &process, attachment.streams()).await?;
    let ended = attachment.run(&task, &exec_id).await;
    // The container, and all that runs in it, may have gone meanwhile.
    let _ = task.delete(&exec_id).await;
    Ok(u8::try_from(ended?).unwrap_or(u8::MAX))
}
