//! Artefacts: archives of reports.

use std::collections::BTreeSet;
use std::io::{Cursor, Read, Seek as _, SeekFrom};

use super::Report;
use crate::error::{Error, Result, of};
use crate::github::Job;
use crate::times;

/// The most bytes of an archive, and of what is read out of one.
pub(super) const ARCHIVE_MAX: u64 = 64 << 20;
const CONTENT_MAX: u64 = 128 << 20;
const ENTRIES_MAX: usize = 10_000;

/// The job that an artefact is of: the only one there is, or the one whose name is in the artefact's, spelt with letters and digits alone; of several
/// the longest name. Of several attempts it is the one that ran when the artefact was made.
pub(super) fn job_of(artifact: &str, made: Option<i64>, jobs: &[Job]) -> Option<i64> {
    let plain =
        |text: &str| text.chars().filter(|one| one.is_ascii_alphanumeric()).collect::<String>().to_ascii_lowercase();
    let names: BTreeSet<&str> = jobs.iter().map(|job| job.name.as_str()).collect();
    let artifact = plain(artifact);
    let name = if names.len() == 1 {
        names.first().copied()
    } else {
        let fits = |name: &&&str| !plain(name).is_empty() && artifact.contains(&plain(name));
        names.iter().filter(fits).max_by_key(|name| plain(name).len()).copied()
    }?;
    let begun = |job: &Job| job.started_at.as_deref().and_then(times::parse);
    let attempts = jobs.iter().filter(|job| job.name == name);
    let before = attempts.clone().filter(|job| made.is_none_or(|made| begun(job).is_none_or(|begun| begun <= made)));
    before.max_by_key(|job| (job.run_attempt, job.id)).or_else(|| attempts.min_by_key(|job| job.id)).map(|job| job.id)
}

/// Hands over the reports in an archive, one after another. It is put into a file without a name first: its list is at its end.
pub(super) fn reports(
    archive: impl Read,
    what: &str,
    take: &mut dyn FnMut(Result<Report>) -> Result<()>,
) -> Result<()> {
    let fault = |reason: String| Error::Malformed { what: what.to_owned(), reason };
    let mut file = tempfile::tempfile().map_err(of(what))?;
    let length = std::io::copy(&mut archive.take(ARCHIVE_MAX + 1), &mut file).map_err(of(what))?;
    if length > ARCHIVE_MAX {
        return Err(fault(format!("larger than {} MiB", ARCHIVE_MAX >> 20)));
    }
    file.seek(SeekFrom::Start(0)).map_err(of(what))?;
    let mut archive = zip::ZipArchive::new(file).map_err(|error| fault(error.to_string()))?;
    let names: Vec<String> =
        archive.file_names().take(ENTRIES_MAX).filter_map(|name| Some(name.ok()?.into_owned())).collect();
    let mut rest = CONTENT_MAX;
    for name in names.into_iter().filter(|name| [".xml", ".tap", ".json"].iter().any(|end| name.ends_with(end))) {
        let what = format!("{what}: {name}");
        let entry = match archive.by_name(&name) {
            Ok(entry) if entry.is_file() => entry,
            Ok(_) => continue,
            Err(error) => {
                take(Err(Error::Malformed { what, reason: error.to_string() }))?;
                continue;
            }
        };
        let mut content = Vec::new();
        if let Err(error) = entry.take(rest + 1).read_to_end(&mut content) {
            take(Err(Error::Malformed { what, reason: error.to_string() }))?;
            continue;
        }
        rest = rest
            .checked_sub(content.len() as u64)
            .ok_or_else(|| fault(format!("what is in it is larger than {} MiB", CONTENT_MAX >> 20)))?;
        take(Ok(Report { what, name, body: Box::new(Cursor::new(content)) }))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn job(id: i64, name: &str, attempt: i64, started: &str) -> Job {
        Job {
            id,
            name: name.to_owned(),
            run_attempt: Some(attempt),
            started_at: Some(started.to_owned()),
            ..Job::default()
        }
    }

    #[test]
    fn an_artefact_goes_to_the_job_that_it_names_and_to_the_attempt_that_made_it() {
        let (first, second) = ("2026-01-01T00:00:00Z", "2026-01-01T02:00:00Z");
        let jobs = [
            job(1, "run-tests (qemu)", 1, first),
            job(2, "run-tests (qemu, tdx)", 1, first),
            job(3, "lint", 1, first),
            job(4, "run-tests (qemu)", 2, second),
        ];
        let at = |text: &str| times::parse(text);
        assert_eq!(job_of("junit-run-tests-qemu-tdx", at("2026-01-01T00:10:00Z"), &jobs), Some(2));
        assert_eq!(job_of("junit-run-tests-qemu", at("2026-01-01T00:10:00Z"), &jobs), Some(1));
        assert_eq!(job_of("junit-run-tests-qemu", at("2026-01-01T02:10:00Z"), &jobs), Some(4));
        assert_eq!(job_of("junit", None, &jobs), None);
        // The only job there is, in two attempts.
        let one = [job(5, "test", 1, first), job(6, "test", 2, second)];
        assert_eq!(job_of("junit", at("2026-01-01T00:10:00Z"), &one), Some(5));
        assert_eq!(job_of("junit", None, &one), Some(6));
    }

    /// The names of the reports in an archive, and what was wrong with others.
    fn read(archive: &[u8]) -> Result<Vec<String>> {
        let mut found = Vec::new();
        reports(archive, "x", &mut |report| {
            found.push(report.map_or_else(|error| error.to_string(), |report| report.name));
            Ok(())
        })?;
        Ok(found)
    }

    #[test]
    fn reports_are_taken_and_bombs_are_not() {
        let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
        let options = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Deflated);
        for (name, content) in [("a/report.xml", "<x/>"), ("core.bin", "no report"), ("b.tap", "ok 1 x")] {
            writer.start_file(name, options).unwrap();
            writer.write_all(content.as_bytes()).unwrap();
        }
        let archive = writer.finish().unwrap().into_inner();
        let mut names = read(&archive).unwrap();
        names.sort();
        assert_eq!(names, ["a/report.xml", "b.tap"]);
        assert!(read(&archive[..archive.len() / 2]).is_err());

        let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
        writer.start_file("bomb.xml", options).unwrap();
        let zeros = vec![0; 1 << 20];
        for _ in 0..=(CONTENT_MAX >> 20) {
            writer.write_all(&zeros).unwrap();
        }
        let archive = writer.finish().unwrap().into_inner();
        assert!(archive.len() < 1 << 20);
        let error = read(&archive).unwrap_err();
        assert!(error.to_string().contains("larger than"), "{error}");
    }
}
