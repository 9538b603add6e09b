//! `coracle completion`, and the man pages: from the commands' own declarations.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Print completions for a shell, to be read by it.
///
/// bash: `coracle completion bash >/usr/share/bash-completion/completions/coracle`.
#[derive(Debug, clap::Args)]
pub(crate) struct Completion {
    /// The shell.
    shell: clap_complete::Shell,
}

/// Write the man pages into a folder.
#[derive(Debug, clap::Args)]
pub(crate) struct Man {
    /// The folder, which is made where it is missing.
    pub(crate) folder: PathBuf,
}

pub(crate) fn completion(args: &Completion, mut command: clap::Command) {
    clap_complete::generate(args.shell, &mut command, "coracle", &mut std::io::stdout());
}

pub(crate) fn man(folder: &Path, command: clap::Command) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    clap_mangen::generate_to(command, folder).with_context(|| format!("write to {}", folder.display()))
}
