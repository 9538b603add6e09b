//! Networks and volumes, by the program `figures` of the end-to-end tests.

use anyhow::{Context, Result};
use serde_json::Value;

use crate::build::Built;
use crate::pods;
use crate::steps::output;

/// How often each is measured, in turn.
const ROUNDS: usize = 3;

/// What `figures PART` has found.
pub(super) fn measure(built: &Built, part: &str) -> Result<Value> {
    let found = output(pods::program(built, "figures", &[part.to_owned(), ROUNDS.to_string()])?)?;
    let line = found.lines().last().context("nothing was measured")?;
    serde_json::from_str(line).with_context(|| format!("the figures of {part}"))
}
