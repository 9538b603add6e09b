//! A folder of files as a source, for where there is no network, and for results of other systems:
//!
//! ```text
//! DIR/**/*.json           answers of the API: {"workflow_runs": […]}, {"jobs": […]}, any number, by any name
//! DIR/**/logs/JOB.txt     a job's log, by its number (also .log, either with .gz)
//! DIR/**/results/JOB/*    a job's reports: JUnit (.xml), TAP (.tap), figures (.json)
//! DIR/**/required.json    {"OWNER/NAME": ["a check", …]}
//! DIR/**/assessments.json {"OWNER/NAME": [{"gate", "at", "commit", "state", "summary"}, …]}
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufRead, BufReader, Read as _};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{Assessment, Report, Source, TakeReport};
use crate::error::{Error, Result, of};
use crate::github::{Job, Run, Runs};
use crate::settings::Repository;

/// The most bytes of one file of JSON, and how deep folders are looked through.
const JSON_MAX: u64 = 512 << 20;
const DEPTH_MAX: usize = 16;

/// A folder.
#[derive(Debug, Default)]
pub struct Files {
    runs: Vec<PathBuf>,
    /// Files that have jobs of a run.
    jobs: BTreeMap<i64, Vec<PathBuf>>,
    logs: BTreeMap<i64, PathBuf>,
    results: BTreeMap<i64, Vec<PathBuf>>,
    required: BTreeMap<String, Vec<String>>,
    assessments: BTreeMap<String, Vec<Assessment>>,
    /// The file of jobs that was read last.
    last: Option<(PathBuf, Vec<Job>)>,
    /// Files that are not what they should be.
    pub problems: Vec<String>,
}

impl Files {
    /// Looks a folder through.
    ///
    /// # Errors
    /// [`Error::File`], where the folder cannot be read. A file of it that cannot is one of its problems.
    pub fn open(folder: &Path) -> Result<Self> {
        let mut files = Self::default();
        std::fs::read_dir(folder).map_err(of(folder))?;
        files.look(folder, 0);
        files.runs.sort();
        Ok(files)
    }

    /// The repositories that runs are of.
    ///
    /// # Errors
    /// As [`Source::runs`].
    pub fn repositories(&mut self) -> Result<BTreeSet<String>> {
        let mut found = BTreeSet::new();
        for path in self.runs.clone() {
            match read::<Runs>(&path) {
                Ok(runs) => found.extend(runs.workflow_runs.iter().filter_map(of_repository)),
                Err(error) => self.problems.push(error.to_string()),
            }
        }
        Ok(found)
    }

    fn look(&mut self, folder: &Path, depth: usize) {
        let mut entries: Vec<PathBuf> = match std::fs::read_dir(folder) {
            Ok(entries) => entries.filter_map(|entry| Some(entry.ok()?.path())).collect(),
            Err(error) => return self.problems.push(format!("{}: {error}", folder.display())),
        };
        entries.sort();
        for path in entries {
            // A link could lead out of the folder, or round in a circle.
            let Ok(kind) = std::fs::symlink_metadata(&path) else { continue };
            if kind.is_dir() && depth < DEPTH_MAX {
                self.look(&path, depth + 1);
            } else if kind.is_file()
                && let Err(error) = self.file(&path)
            {
                self.problems.push(error.to_string());
            }
        }
    }

    fn file(&mut self, path: &Path) -> Result<()> {
        let part = |path: Option<&Path>| {
            path.and_then(Path::file_name).and_then(|name| name.to_str()).unwrap_or_default().to_owned()
        };
        let (name, parent, above) = (part(Some(path)), part(path.parent()), part(path.parent().and_then(Path::parent)));
        if above == "results"
            && let Ok(job) = parent.parse()
        {
            self.results.entry(job).or_default().push(path.to_owned());
        } else if parent == "logs" {
            if let Some(job) = name.split('.').next().and_then(|job| job.parse().ok()) {
                self.logs.insert(job, path.to_owned());
            }
        } else if name == "required.json" {
            self.required.extend(read::<BTreeMap<String, Vec<String>>>(path)?);
        } else if name == "assessments.json" {
            for (repository, found) in read::<BTreeMap<String, Vec<Assessment>>>(path)? {
                self.assessments.entry(repository).or_default().extend(found);
            }
        } else if name.ends_with(".json") {
            self.answer(path)?;
        }
        Ok(())
    }

    fn answer(&mut self, path: &Path) -> Result<()> {
        // Only what tells runs from jobs is kept; they are read again when their turn comes.
        #[derive(serde::Deserialize)]
        struct Either {
            workflow_runs: Option<serde::de::IgnoredAny>,
            #[serde(default)]
            jobs: Vec<OfRun>,
        }
        #[derive(serde::Deserialize)]
        struct OfRun {
            #[serde(default)]
            run_id: i64,
        }
        let either: Either = match read::<Either>(path) {
            Ok(either) => either,
            // Other JSON may lie here, too: what is none of ours is passed over, what is broken is told.
            Err(error) => return read::<Value>(path).map(|_| ()).map_err(|_| error),
        };
        if either.workflow_runs.is_some() {
            self.runs.push(path.to_owned());
        }
        for run in either.jobs.iter().map(|job| job.run_id).collect::<BTreeSet<_>>() {
            self.jobs.entry(run).or_default().push(path.to_owned());
        }
        Ok(())
    }
}

/// The repository of a run: what it says, or what its page's address says.
fn of_repository(run: &Run) -> Option<String> {
    let told = run.repository.as_ref().and_then(|repository| repository.full_name.clone());
    let from_link = || {
        let mut parts = run.html_url.as_deref()?.split('/').skip(3);
        Some(format!("{}/{}", parts.next()?, parts.next()?))
    };
    told.or_else(from_link).filter(|name| super::is_repository(name))
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let file = BufReader::new(File::open(path).map_err(of(path))?).take(JSON_MAX);
    serde_json::from_reader(file)
        .map_err(|error| Error::Malformed { what: path.display().to_string(), reason: error.to_string() })
}

fn body(path: &Path) -> Result<Box<dyn BufRead>> {
    let file = File::open(path).map_err(of(path))?;
    Ok(if path.extension().is_some_and(|end| end == "gz") {
        Box::new(BufReader::new(flate2::read::MultiGzDecoder::new(file)))
    } else {
        Box::new(BufReader::new(file))
    })
}

impl Source for Files {
    fn runs(&mut self, repository: &Repository, page: u32, _since: i64) -> Result<Option<Vec<Run>>> {
        let Some(path) = (page as usize).checked_sub(1).and_then(|page| self.runs.get(page)).cloned() else {
            return Ok(None);
        };
        let runs: Runs = match read(&path) {
            Ok(runs) => runs,
            Err(error) => {
                // The pages after this one are other files.
                self.problems.push(error.to_string());
                return Ok(Some(Vec::new()));
            }
        };
        let own = |run: &Run| of_repository(run).is_none_or(|name| name == repository.name);
        Ok(Some(runs.workflow_runs.into_iter().filter(own).collect()))
    }

    fn jobs(&mut self, _repository: &Repository, run: i64) -> Result<Option<Vec<Job>>> {
        let Some(paths) = self.jobs.get(&run).cloned() else { return Ok(None) };
        let mut found: BTreeMap<i64, Job> = BTreeMap::new();
        for path in paths {
            if self.last.as_ref().is_none_or(|(last, _)| *last != path) {
                self.last = Some((path.clone(), read::<crate::github::Jobs>(&path)?.jobs));
            }
            let jobs = self.last.iter().flat_map(|(_, jobs)| jobs);
            found.extend(jobs.filter(|job| job.run_id == run).map(|job| (job.id, job.clone())));
        }
        Ok(Some(found.into_values().collect()))
    }

    fn log(&mut self, _repository: &Repository, job: i64) -> Result<Option<Box<dyn BufRead>>> {
        self.logs.get(&job).map(|path| body(path)).transpose()
    }

    fn has_all_logs(&self) -> bool {
        true
    }

    fn reports(&mut self, _repository: &Repository, _run: i64, jobs: &[Job], take: &mut TakeReport<'_>) -> Result<()> {
        for job in jobs {
            for path in self.results.get(&job.id).into_iter().flatten() {
                let what = path.display().to_string();
                let name = what.strip_suffix(".gz").unwrap_or(&what).to_owned();
                // One is open at a time.
                take(body(path).map(|body| (job.id, Report { name, what, body })))?;
            }
        }
        Ok(())
    }

    fn required(&mut self, repository: &Repository) -> Result<Option<Vec<String>>> {
        Ok(self.required.get(&repository.name).cloned())
    }

    fn assessments(&mut self, repository: &Repository) -> Result<Vec<Assessment>> {
        Ok(self.assessments.get(&repository.name).cloned().unwrap_or_default())
    }
}
