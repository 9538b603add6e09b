//! `coracle completion`, and the man pages: from the commands' own declarations.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap_complete::Shell;

/// Print completions for a shell, to be read by it.
///
/// bash: `coracle completion bash >/usr/share/bash-completion/completions/coracle`.
#[derive(Debug, clap::Args)]
pub(crate) struct Completion {
    /// The shell.
    shell: Shell,
}

/// Write the man pages into a folder.
#[derive(Debug, clap::Args)]
pub(crate) struct Man {
    /// The folder, which is made where it is missing.
    pub(crate) folder: PathBuf,
}

pub(crate) fn completion(args: &Completion, command: clap::Command) -> Result<()> {
    std::io::stdout().write_all(&completed(args.shell, command)).context("print the completions")
}

/// What a shell reads to complete commands.
pub(crate) fn completed(shell: Shell, mut command: clap::Command) -> Vec<u8> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut command, "coracle", &mut text);
    text
}

/// The man pages, of each command one, by their names.
pub(crate) fn rendered(command: clap::Command) -> Result<Vec<(String, Vec<u8>)>> {
    fn render(command: &clap::Command, all: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
        let mut page = Vec::new();
        clap_mangen::Man::new(command.clone()).render(&mut page).context("a man page")?;
        all.push((format!("{}.1", command.get_display_name().unwrap_or(command.get_name())), page));
        command.get_subcommands().filter(|below| !below.is_hide_set()).try_for_each(|below| render(below, all))
    }
    let mut command = command.disable_help_subcommand(true);
    command.build();
    let mut all = Vec::new();
    render(&command, &mut all)?;
    Ok(all)
}

pub(crate) fn man(folder: &Path, command: clap::Command) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    for (name, page) in rendered(command)? {
        let file = folder.join(name);
        std::fs::write(&file, page).with_context(|| format!("write {}", file.display()))?;
    }
    Ok(())
}
