//! Huge pages for a volume of them (Linux: admin-guide/mm/hugetlbpage.rst).

use std::path::Path;

use crate::{Error, Result};

/// Where the kernel has a folder for each size of page.
const SIZES: &str = "/sys/kernel/mm/hugepages";

/// Sets pages aside for a volume with these options, `pagesize=` and `size=` in bytes, beside those that there are. They stay as long as
/// the guest: a volume of them is the pod's.
pub(super) fn reserve(options: &[String]) -> Result<()> {
    let text = std::fs::read_to_string("/proc/meminfo").map_err(Error::system("look how much memory there is"))?;
    reserve_in(Path::new(SIZES), options, available(&text))
}

/// The memory that can be had without swapping, in bytes (proc(5), `MemAvailable`).
fn available(meminfo: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

fn reserve_in(sizes: &Path, options: &[String], available: u64) -> Result<()> {
    let value = |name: &str| options.iter().find_map(|option| option.strip_prefix(name)?.parse::<u64>().ok());
    let (Some(page), Some(size)) = (value("pagesize=").filter(|page| *page > 0), value("size=")) else {
        return Err(Error::Invalid(
            "a volume of huge pages gets as many as its first container may use, and that has no limit of those: give it one".into(),
        ));
    };
    let file = sizes.join(format!("hugepages-{}kB/nr_hugepages", page / 1024));
    let read = || -> std::io::Result<u64> {
        let text = std::fs::read_to_string(&file)?;
        text.trim().parse().map_err(std::io::Error::other)
    };
    let before = read().map_err(|error| {
        Error::Invalid(format!("the guest has no pages of {page} bytes ({}: {error})", file.display()))
    })?;
    let more = size.div_ceil(page);
    let missing = |found: u64| {
        Error::State(format!(
            "the guest has memory for {found} of the {more} pages of {page} bytes that a volume needs: give the container a limit of \
             huge pages, or the machine more memory"
        ))
    };
    // The kernel would look for them until nothing is left.
    if available / page < more {
        return Err(missing(available / page));
    }
    let wanted = before.saturating_add(more);
    let changed = std::fs::write(&file, wanted.to_string()).and_then(|()| read());
    let after = changed.map_err(Error::system("set huge pages aside"))?;
    if after >= wanted {
        return Ok(());
    }
    // What it has found is nobody's.
    let _ = std::fs::write(&file, before.to_string());
    Err(missing(after.saturating_sub(before)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_set_aside_beside_those_that_there_are() {
        let sizes = tempfile::tempdir().unwrap();
        let folder = sizes.path().join("hugepages-2048kB");
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("nr_hugepages"), "3\n").unwrap();
        let of = |options: &[&str]| {
            let options: Vec<String> = options.iter().map(|&option| option.to_owned()).collect();
            reserve_in(sizes.path(), &options, available("MemTotal: 1 kB\nMemAvailable:   20000 kB\n"))
        };
        of(&["mode=777", "pagesize=2097152", "size=5000000"]).unwrap();
        assert_eq!(std::fs::read_to_string(folder.join("nr_hugepages")).unwrap(), "6");
        for options in [&["size=1"][..], &["pagesize=0", "size=1"], &["pagesize=1073741824", "size=1"], &[]] {
            assert!(matches!(of(options), Err(Error::Invalid(_))), "{options:?}");
        }
        assert!(matches!(of(&["pagesize=2097152", "size=20971520"]), Err(Error::State(_))), "more than there is");
        assert_eq!(available(""), 0);
    }
}
