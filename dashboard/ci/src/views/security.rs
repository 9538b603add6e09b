//! What gates have found, what will be taken away, and what a person has to decide.

use schemars::JsonSchema;
use serde::Serialize;

use super::all;
use crate::error::Result;
use crate::evidence::{Rename, renames};
use crate::settings::{Deprecation, Settings};
use crate::store::Store;

/// A gate's newest finding.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Assessment {
    /// Owner and name.
    pub repository: String,
    /// The gate.
    pub gate: String,
    /// When.
    pub at: i64,
    /// On which commit.
    pub sha: String,
    /// passed, failed, not run.
    pub state: String,
    /// In a sentence.
    pub summary: String,
}

/// All of it.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Security {
    /// Each gate's newest finding.
    pub assessments: Vec<Assessment>,
    /// What will be taken away.
    pub deprecations: Vec<Deprecation>,
    /// Jobs that may be called otherwise now.
    pub renames: Vec<Rename>,
}

/// What gates have found.
///
/// # Errors
/// [`crate::error::Error::Database`].
pub fn security(store: &Store, settings: &Settings) -> Result<Security> {
    let sql = "SELECT p.name, a.gate, a.at, a.sha, a.state, a.summary FROM assessment a JOIN repository p ON p.id = a.repository
         WHERE a.at = (SELECT max(n.at) FROM assessment n WHERE n.repository = a.repository AND n.gate = a.gate) ORDER BY p.name, a.state = 'passed', a.gate";
    let assessments = all(store, sql, &[], |row| {
        Ok(Assessment {
            repository: row.get(0)?,
            gate: row.get(1)?,
            at: row.get(2)?,
            sha: row.get(3)?,
            state: row.get(4)?,
            summary: row.get(5)?,
        })
    })?;
    Ok(Security { assessments, deprecations: settings.deprecations.clone(), renames: renames(store)? })
}
