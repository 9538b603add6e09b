//! Artefacts: archives of reports.

use std::io::{Cursor, Read, Seek as _, SeekFrom};

use super::Report;
use crate::error::{Error, Result, of};

/// The most bytes of an archive, and of what is read out of one.
pub(super) const ARCHIVE_MAX: u64 = 64 << 20;
const CONTENT_MAX: u64 = 128 << 20;
const ENTRIES_MAX: usize = 10_000;

/// The job that an artefact is of: the only one there is, or the one whose name is in the artefact's, spelt with letters and digits alone; of several
/// the longest name.
pub(super) fn job_of(artifact: &str, jobs: &[(i64, String)]) -> Option<i64> {
    if let [(job, _)] = jobs {
        return Some(*job);
    }
    let plain =
        |text: &str| text.chars().filter(|one| one.is_ascii_alphanumeric()).collect::<String>().to_ascii_lowercase();
    let artifact = plain(artifact);
    jobs.iter()
        .map(|(job, name)| (*job, plain(name)))
        .filter(|(_, name)| !name.is_empty() && artifact.contains(name.as_str()))
        .max_by_key(|(job, name)| (name.len(), *job))
        .map(|(job, _)| job)
}

/// The reports in an archive. It is put into a file without a name first: its list is at its end.
pub(super) fn reports(archive: impl Read, what: &str) -> Result<Vec<Report>> {
    let fault = |reason: String| Error::Malformed { what: what.to_owned(), reason };
    let mut file = tempfile::tempfile().map_err(of(what))?;
    let length = std::io::copy(&mut archive.take(ARCHIVE_MAX + 1), &mut file).map_err(of(what))?;
    if length > ARCHIVE_MAX {
        return Err(fault(format!("larger than {} MiB", ARCHIVE_MAX >> 20)));
    }
    file.seek(SeekFrom::Start(0)).map_err(of(what))?;
    let mut archive = zip::ZipArchive::new(file).map_err(|error| fault(error.to_string()))?;
    let mut rest = CONTENT_MAX;
    let mut reports = Vec::new();
    for index in 0..archive.len().min(ENTRIES_MAX) {
        let entry = archive.by_index(index).map_err(|error| fault(error.to_string()))?;
        let name = entry.name().map_err(|error| fault(error.to_string()))?.into_owned();
        if !entry.is_file() || ![".xml", ".tap", ".json"].iter().any(|end| name.ends_with(end)) {
            continue;
        }
        let mut content = Vec::new();
        entry.take(rest + 1).read_to_end(&mut content).map_err(of(what))?;
        rest = rest
            .checked_sub(content.len() as u64)
            .ok_or_else(|| fault(format!("what is in it is larger than {} MiB", CONTENT_MAX >> 20)))?;
        reports.push(Report { what: format!("{what}: {name}"), name, body: Box::new(Cursor::new(content)) });
    }
    Ok(reports)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn an_artefact_goes_to_the_job_that_it_names() {
        let jobs =
            [(1, "run-tests (qemu)".to_owned()), (2, "run-tests (qemu, tdx)".to_owned()), (3, "lint".to_owned())];
        assert_eq!(job_of("junit-run-tests-qemu-tdx", &jobs), Some(2));
        assert_eq!(job_of("junit-run-tests-qemu", &jobs), Some(1));
        assert_eq!(job_of("junit", &jobs), None);
        assert_eq!(job_of("junit", &jobs[2..]), Some(3));
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
        let names: Vec<String> =
            reports(archive.as_slice(), "x").unwrap().into_iter().map(|report| report.name).collect();
        assert_eq!(names, ["a/report.xml", "b.tap"]);
        assert!(reports(&archive[..archive.len() / 2], "x").is_err());

        let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
        writer.start_file("bomb.xml", options).unwrap();
        let zeros = vec![0; 1 << 20];
        for _ in 0..=(CONTENT_MAX >> 20) {
            writer.write_all(&zeros).unwrap();
        }
        let archive = writer.finish().unwrap().into_inner();
        assert!(archive.len() < 1 << 20);
        let error = reports(archive.as_slice(), "x").err().unwrap();
        assert!(error.to_string().contains("larger than"), "{error}");
    }
}
