//! The same pages as files, for a host that serves nothing but files. Filters that only leave rows out work there, too, by a script; what a server
//! works out on request (another order, other days, two commits compared) does not, and is not offered.

use std::collections::{BTreeSet, VecDeque};
use std::path::Path;

use crate::error::{Result, of};
use crate::pages::{self, Form, Links, Page};
use crate::settings::Settings;
use crate::store::Store;
use crate::views::{self, Filter};

/// What was written.
#[derive(Debug, Default, Clone, Copy, serde::Serialize)]
pub struct Exported {
    /// How many pages.
    pub pages: u64,
    /// How many bytes in all.
    pub bytes: u64,
}

/// Writes all pages into a folder, which is made. What is in it already and has another name stays.
///
/// # Errors
/// Of the store, and of files.
pub fn export(store: &Store, settings: &Settings, folder: &Path) -> Result<Exported> {
    // All of one moment, whatever is collected meanwhile.
    store.read(|connection| connection.execute_batch("BEGIN"))?;
    let done = all_pages(store, settings, folder);
    store.read(|connection| connection.execute_batch("COMMIT"))?;
    done
}

fn all_pages(store: &Store, settings: &Settings, folder: &Path) -> Result<Exported> {
    let mut exported = Exported::default();
    for (name, _, contents) in pages::ASSETS {
        write(folder, &Path::new("assets").join(name), contents, &mut exported)?;
    }
    let mut rest: VecDeque<Page> =
        [Page::Overview, Page::Flakes, Page::Failures, Page::Pulls, Page::Performance, Page::Cost, Page::Security]
            .into();
    let mut known: BTreeSet<String> = rest.iter().map(Page::path).collect();
    let filter = Filter::default();
    while let Some(page) = rest.pop_front() {
        let file = pages::file(&page);
        let links = Links::Files(file.components().count() - 1);
        let text = pages::write(store, settings, &page, &filter, Form::Html(&links))?;
        write(folder, &file, &text, &mut exported)?;
        exported.pages += 1;
        for next in linked(store, settings, &page)? {
            if known.insert(next.path()) {
                rest.push_back(next);
            }
        }
    }
    let overview = pages::write(store, settings, &Page::Overview, &filter, Form::Json)?;
    write(folder, Path::new("api/v1/overview.json"), &overview, &mut exported)?;
    Ok(exported)
}

/// The pages that a page links to.
fn linked(store: &Store, settings: &Settings, page: &Page) -> Result<Vec<Page>> {
    let filter = Filter::default();
    let pull = |repository: &str, id: i64| {
        repository.split_once('/').map(|(owner, name)| Page::Pull(owner.to_owned(), name.to_owned(), id))
    };
    Ok(match page {
        Page::Overview => views::overview(store, &filter)?.jobs.iter().map(|job| Page::Job(job.id)).collect(),
        Page::Job(id) => {
            let executions = views::job(store, *id)?.executions;
            let failed = executions.iter().flat_map(|execution| &execution.failed);
            failed
                .flat_map(|failed| {
                    let test = (failed.id > 0).then_some(Page::Test(failed.id));
                    test.into_iter().chain((failed.cluster > 0).then_some(Page::Failure(failed.cluster)))
                })
                .collect()
        }
        Page::Flakes => {
            let flakes = views::flakes(store, &filter)?;
            flakes.tests.iter().map(|flake| Page::Test(flake.test)).collect()
        }
        Page::Failures => {
            views::failures(store, &filter)?.clusters.iter().map(|cluster| Page::Failure(cluster.id)).collect()
        }
        Page::Failure(id) => {
            let failures = views::cluster(store, *id)?.failures;
            failures.iter().filter(|failure| failure.test > 0).map(|failure| Page::Test(failure.test)).collect()
        }
        Page::Pulls => {
            let view = views::pulls(store, &filter)?;
            view.pulls.iter().filter_map(|one| pull(&one.repository, one.pull)).collect()
        }
        Page::Cost => {
            let view = views::cost(store, &filter, &settings.minute_costs)?;
            view.pulls.iter().filter_map(|one| pull(&one.repository, one.pull)).collect()
        }
        Page::Performance => {
            views::performance(store, &filter)?.series.iter().map(|series| Page::Series(series.id)).collect()
        }
        Page::Test(_) | Page::Pull(..) | Page::Series(_) | Page::Security => Vec::new(),
    })
}

fn write(folder: &Path, file: &Path, text: &str, exported: &mut Exported) -> Result<()> {
    let path = folder.join(file);
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(of(parent))?;
    }
    // Whole or not at all: who serves the folder meanwhile serves the older page.
    let beside = path.with_extension("new");
    std::fs::write(&beside, text).map_err(of(&beside))?;
    std::fs::rename(&beside, &path).map_err(of(&path))?;
    exported.bytes += text.len() as u64;
    Ok(())
}
