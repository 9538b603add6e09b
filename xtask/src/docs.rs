//! `cargo xtask docs`: writes the pages of docs/reference, by the tests that hold them against the declarations each time.

use anyhow::Result;

use crate::steps::{self, command};

/// The tests that hold a page, by cargo's words.
const PAGES: [&[&str]; 6] = [
    &["-p", "coracle-settings", "--test", "documents"],
    &["-p", "coracle-cli", "the_help_of_every_command_is_in_the_reference"],
    &["-p", "coracle-cli", "no_command_goes_unannounced"],
    &["-p", "xtask", "parity_is_what_the_tests_show"],
    &["-p", "xtask", "what_crosses_is_what_the_reference_says"],
    &["-p", "xtask", "the_inventory_of_unsafe_code_is_what_the_source_has"],
];

pub(crate) fn run() -> Result<()> {
    for words in PAGES {
        let mut write = command("cargo", &["test", "--locked", "--quiet"]);
        write.args(words).env("CORACLE_DOCS", "write");
        steps::run(write)?;
    }
    println!("docs/reference is what the declarations say");
    Ok(())
}
