//! What a project says of itself: one TOML file.

use std::path::{Path, PathBuf};

use regex::{Regex, RegexSet};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, of};

/// The file, as it is written. All of it may be left out.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Written {
    title: String,
    repository: Vec<Repository>,
    test_steps: Vec<String>,
    owner: Vec<WrittenOwner>,
    known_issue: Vec<WrittenIssue>,
    policy: Policy,
    alerts: Alerts,
    minute_costs: std::collections::BTreeMap<String, f64>,
    deprecation: Vec<Deprecation>,
}

impl Default for Written {
    fn default() -> Self {
        Self {
            title: "CI".to_owned(),
            repository: Vec::new(),
            test_steps: vec!["(?i)\\btests?\\b".to_owned(), "(?i)^run ".to_owned()],
            owner: Vec::new(),
            known_issue: Vec::new(),
            policy: Policy::default(),
            alerts: Alerts::default(),
            minute_costs: std::collections::BTreeMap::new(),
            deprecation: Vec::new(),
        }
    }
}

/// A repository to collect from.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Repository {
    /// Owner and name.
    pub name: String,
    /// The branch whose runs tell how the project is.
    #[serde(default = "main_branch")]
    pub branch: String,
    /// Files of the workflows to collect; all where there is none.
    #[serde(default)]
    pub workflows: Vec<String>,
    /// Names of artefacts that have reports in them (JUnit, TAP, figures), as a regular expression; others are not fetched.
    #[serde(default = "usual_reports")]
    pub reports: String,
    /// Names of the checks that must pass before a change is merged; where none are given the API is asked for the branch's.
    #[serde(default)]
    pub required: Vec<String>,
}

fn main_branch() -> String {
    "main".to_owned()
}

fn usual_reports() -> String {
    "(?i)junit|test.?(result|report)|bench|\\btap\\b".to_owned()
}

impl Repository {
    /// A repository of which nothing is said but its name.
    #[must_use]
    pub fn named(name: &str) -> Self {
        let (branch, reports) = (main_branch(), usual_reports());
        Self { name: name.to_owned(), branch, reports, workflows: Vec::new(), required: Vec::new() }
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenOwner {
    jobs: String,
    name: String,
    #[serde(default)]
    contact: String,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenIssue {
    pattern: String,
    link: String,
}

/// Who looks after jobs.
#[derive(Debug, Clone)]
pub struct Owner {
    /// The jobs, by their names.
    pub jobs: Regex,
    /// Who.
    pub name: String,
    /// How to reach them.
    pub contact: String,
}

/// When a check should become required, or stop being so.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// A check can become required after so many days of the branch's runs without a failure.
    pub promote_after_green_days: u32,
    /// A required check that failed on so many of its last ten days should not be required any more.
    pub demote_after_red_days: u32,
    /// At most this share of commits may be flaky for a check to become required.
    pub flaky_at_most: f64,
}

impl Default for Policy {
    fn default() -> Self {
        Self { promote_after_green_days: 10, demote_after_red_days: 5, flaky_at_most: 0.02 }
    }
}

/// Who is told of what.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Alerts {
    /// After how many failures in a row on the branch.
    pub after: u32,
    /// Whether only required checks are told of.
    pub required_only: bool,
    /// Whereto.
    pub sink: Vec<Sink>,
}

impl Default for Alerts {
    fn default() -> Self {
        Self { after: 2, required_only: false, sink: Vec::new() }
    }
}

/// Where alerts go: one of the two.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sink {
    /// A file, to which one line of JSON each is added.
    pub file: Option<PathBuf>,
    /// An address, to which each is posted as JSON.
    pub webhook: Option<String>,
}

/// Something that will be taken away.
#[derive(Debug, Clone, Deserialize, Serialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Deprecation {
    /// What it is called: a setting, an annotation, a command, a job.
    pub what: String,
    /// The version that announced it.
    pub since: String,
    /// The version that will not have it.
    pub removed_in: String,
    /// What to use.
    #[serde(default)]
    pub replacement: String,
    /// Why.
    #[serde(default)]
    pub reason: String,
    /// Who.
    #[serde(default)]
    pub owner: String,
}

/// The settings, ready to use.
#[derive(Debug, Clone)]
pub struct Settings {
    /// What the pages are called.
    pub title: String,
    /// From where to collect.
    pub repositories: Vec<Repository>,
    /// Names of steps that test.
    pub test_steps: RegexSet,
    /// Who looks after which jobs; the first that fits counts.
    pub owners: Vec<Owner>,
    /// Failures that are known: their text, and where they are spoken about.
    pub known_issues: Vec<(Regex, String)>,
    /// When checks become required.
    pub policy: Policy,
    /// Who is told.
    pub alerts: Alerts,
    /// What a minute of a runner costs, by its label.
    pub minute_costs: std::collections::BTreeMap<String, f64>,
    /// What will be taken away.
    pub deprecations: Vec<Deprecation>,
}

impl Settings {
    /// Reads a file; without one, what holds where nothing is said.
    ///
    /// # Errors
    /// [`Error::File`] and [`Error::Settings`], which names the line or the entry.
    pub fn read(path: Option<&Path>) -> Result<Self> {
        let Some(path) = path else { return Self::from_text("", Path::new("settings")) };
        let text = std::fs::read_to_string(path).map_err(of(path))?;
        Self::from_text(&text, path)
    }

    fn from_text(text: &str, path: &Path) -> Result<Self> {
        let fault = |reason: String| Error::Settings { path: path.to_owned(), reason };
        let written: Written = toml::from_str(text).map_err(|error| fault(error.to_string()))?;
        let regex = |what: &str, text: &str| Regex::new(text).map_err(|error| fault(format!("{what}: {error}")));
        for repository in &written.repository {
            if !crate::collect::is_repository(&repository.name) {
                return Err(fault(format!("repository: {:?} is not owner/name", repository.name)));
            }
            regex("repository.reports", &repository.reports)?;
        }
        for sink in &written.alerts.sink {
            if sink.file.is_some() == sink.webhook.is_some() {
                return Err(fault("alerts.sink: give either file or webhook".to_owned()));
            }
        }
        Ok(Self {
            test_steps: RegexSet::new(&written.test_steps).map_err(|error| fault(format!("test_steps: {error}")))?,
            owners: written
                .owner
                .iter()
                .map(|owner| {
                    let jobs = regex("owner.jobs", &owner.jobs)?;
                    Ok(Owner { jobs, name: owner.name.clone(), contact: owner.contact.clone() })
                })
                .collect::<Result<_>>()?,
            known_issues: written
                .known_issue
                .iter()
                .map(|issue| Ok((regex("known_issue.pattern", &issue.pattern)?, issue.link.clone())))
                .collect::<Result<_>>()?,
            title: written.title,
            repositories: written.repository,
            policy: written.policy,
            alerts: written.alerts,
            minute_costs: written.minute_costs,
            deprecations: written.deprecation,
        })
    }

    /// Who looks after a job.
    #[must_use]
    pub fn owner(&self, job: &str) -> Option<&Owner> {
        self.owners.iter().find(|owner| owner.jobs.is_match(job))
    }

    /// The branch that tells how a repository is.
    #[must_use]
    pub fn branch(&self, repository: &str) -> &str {
        self.repositories
            .iter()
            .find(|known| known.name == repository)
            .map_or("main", |repository| repository.branch.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_said_is_a_project_with_usual_names() {
        let settings = Settings::read(None).unwrap();
        assert!(settings.test_steps.is_match("Run tests") && settings.test_steps.is_match("unit test"));
        assert!(!settings.test_steps.is_match("Deploy"));
        assert_eq!(settings.branch("a/b"), "main");
    }

    #[test]
    fn what_is_said_wrongly_is_named() {
        let cases = [
            ("titel = 'x'", "unknown field `titel`"),
            ("[[repository]]\nname = 'x'", "\"x\" is not owner/name"),
            ("[[owner]]\njobs = '('\nname = 'a'", "owner.jobs"),
            ("[[alerts.sink]]", "either file or webhook"),
            ("test_steps = ['[']", "test_steps"),
        ];
        for (text, expected) in cases {
            let error = Settings::from_text(text, Path::new("ci.toml")).unwrap_err().to_string();
            assert!(error.starts_with("ci.toml: ") && error.contains(expected), "{error}");
        }
    }

    #[test]
    fn the_first_owner_that_fits_counts() {
        let text = "[[owner]]\njobs = 'tdx'\nname = 'Ann'\n[[owner]]\njobs = '.*'\nname = 'Bob'";
        let settings = Settings::from_text(text, Path::new("ci.toml")).unwrap();
        assert_eq!(settings.owner("run-tdx").unwrap().name, "Ann");
        assert_eq!(settings.owner("lint").unwrap().name, "Bob");
    }
}
