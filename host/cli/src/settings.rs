//! `coracle settings`.

use anyhow::Result;
use coracle_settings::{Settings, reference};

/// Settings.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Check the settings file.
    Check,
    /// Print a settings file with all settings, their texts and defaults.
    Default,
}

pub(crate) fn run(command: Command) -> Result<()> {
    match command {
        Command::Check => {
            Settings::load()?;
            println!("the settings are well-formed");
        }
        Command::Default => {
            let mut table = "";
            for entry in reference() {
                let (own, key) = entry.key.split_once('.').unwrap_or(("", entry.key));
                if own != table {
                    println!("{}[{own}]", if table.is_empty() { "" } else { "\n" });
                    table = own;
                }
                println!("# {}\n# Expected: {}.\n#{key} = {}", entry.text, entry.expected, entry.default);
            }
        }
    }
    Ok(())
}
