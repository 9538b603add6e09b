//! `coracle settings`.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::builder::{PossibleValue, TypedValueParser};
use coracle_settings::{Loaded, Origin, default_file, schema};
use serde_json::{Map, Value, json};

/// Settings.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Print each setting with its value and where that stands.
    Show {
        /// As JSON.
        #[arg(long)]
        json: bool,
        /// Only those whose names hold this.
        #[arg(value_parser = Name, hide_possible_values = true)]
        name: Option<String>,
    },
    /// Check the settings: errors, and what is used that is deprecated.
    Check {
        /// A file to check by itself, in the place of the host's.
        file: Option<PathBuf>,
        /// Print JSON: whether they are well-formed, the error, and what is used that is deprecated.
        #[arg(long)]
        json: bool,
    },
    /// Print a settings file with all settings, their texts and defaults.
    Default,
    /// Print a JSON schema of a settings file, for editors.
    Schema,
}

/// A setting's name, or a part of one: whole ones are what shells complete.
#[derive(Debug, Clone)]
struct Name;

impl TypedValueParser for Name {
    type Value = String;

    fn parse_ref(
        &self,
        command: &clap::Command,
        argument: Option<&clap::Arg>,
        value: &std::ffi::OsStr,
    ) -> std::result::Result<String, clap::Error> {
        clap::builder::StringValueParser::new().parse_ref(command, argument, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(coracle_settings::reference().into_iter().map(|entry| PossibleValue::new(entry.key))))
    }
}

pub(crate) fn run(command: Command) -> Result<()> {
    match command {
        Command::Show { json, name } => show(json, name.as_deref().unwrap_or_default())?,
        Command::Check { file, json } => {
            let loaded = match file {
                Some(file) => Loaded::from_file(&file),
                None => Loaded::of_host(None),
            };
            if json {
                let (error, deprecated) = match &loaded {
                    Ok(loaded) => (None, loaded.deprecated.iter().map(ToString::to_string).collect()),
                    Err(error) => (Some(error.to_string()), Vec::new()),
                };
                let report = json!({ "ok": error.is_none(), "error": error, "deprecated": deprecated });
                println!("{}", serde_json::to_string_pretty(&report)?);
                return loaded.map(drop).map_err(Into::into);
            }
            let loaded = loaded?;
            for used in &loaded.deprecated {
                println!("{used}");
            }
            println!("the settings are well-formed");
        }
        Command::Default => print!("{}", default_file()),
        Command::Schema => println!("{}", serde_json::to_string_pretty(&schema()).context("the schema")?),
    }
    Ok(())
}

fn show(as_json: bool, name: &str) -> Result<()> {
    let loaded = Loaded::of_host(None)?;
    let values = loaded.settings.values();
    let wanted: Vec<_> = values.iter().filter(|(key, _)| key.contains(name)).collect();
    if as_json {
        let of = |(key, value): &&(&str, String)| {
            let place = match loaded.origin(key) {
                Origin::BuiltIn => Value::Null,
                Origin::At(position) => {
                    json!({ "path": position.path, "line": position.line, "column": position.column })
                }
            };
            ((*key).to_owned(), json!({ "value": value, "origin": place }))
        };
        let all: Map<String, Value> = wanted.iter().map(of).collect();
        println!("{}", serde_json::to_string_pretty(&all).context("the settings")?);
        return Ok(());
    }
    let rows: Vec<_> = wanted.iter().map(|(key, value)| (format!("{key} = {value}"), loaded.origin(key))).collect();
    let width = rows.iter().map(|(text, _)| text.chars().count()).filter(|width| *width < 60).max().unwrap_or(0);
    for (text, origin) in rows {
        println!("{text:width$}  # {origin}");
    }
    Ok(())
}
