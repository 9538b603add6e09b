//! Figures of a process, from the texts of its folder in /proc, under Kata's names and in its units.

use std::io::Read;

use super::{Families, Kind};

/// The texts of `/proc/PID/{stat,status,io}`, and how many open files it has. What could not be read is empty, or none.
#[derive(Debug, Clone, Default)]
pub struct Process {
    /// `stat`.
    pub stat: String,
    /// `status`.
    pub status: String,
    /// `io`.
    pub io: String,
    /// How many entries `fd` has.
    pub open_files: Option<usize>,
}

impl Process {
    /// Reads them in a folder such as `/proc/self`.
    #[must_use]
    pub fn of(folder: &std::path::Path) -> Self {
        let text = |name: &str| text(&folder.join(name)).unwrap_or_default();
        let open_files = open_files(&folder.join("fd"));
        Self { stat: text("stat"), status: text("status"), io: text("io"), open_files }
    }

    /// A line's number in `status`, in bytes where it has a unit.
    #[must_use]
    pub fn status(&self, key: &str) -> Option<u64> {
        let lines = self.status.lines().filter_map(|line| line.split_once(':'));
        lines.into_iter().find(|(name, _)| *name == key).and_then(|(_, value)| number(value))
    }
}

/// How many entries the folder of open files has: its size, where the kernel says that (Linux 6.2), or counted.
fn open_files(folder: &std::path::Path) -> Option<usize> {
    let size = std::fs::metadata(folder).ok()?.len();
    if let Some(size) = usize::try_from(size).ok().filter(|size| *size > 0) {
        return Some(size);
    }
    std::fs::read_dir(folder).ok().map(Iterator::count)
}

/// A text of /proc, by two reads: such a file says that it is empty, from which a standard reader grows its buffer piece by piece. One that is longer
/// than 64 KiB is cut there.
fn text(path: &std::path::Path) -> std::io::Result<String> {
    let mut bytes = Vec::with_capacity(4096);
    std::fs::File::open(path)?.take(64 << 10).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A number as /proc has it, with its unit where there is one: `12 kB` is in bytes. None of another unit.
#[must_use]
pub fn number(text: &str) -> Option<u64> {
    let mut words = text.split_whitespace();
    let value: u64 = words.next()?.parse().ok()?;
    match words.next() {
        Some("kB") => value.checked_mul(1024),
        Some(_) => None,
        None => Some(value),
    }
}

/// Fields of `stat`, counted behind the name in parentheses (proc(5): `utime` is the 14th).
const STAT: [(&str, usize); 4] = [("utime", 11), ("stime", 12), ("cutime", 13), ("cstime", 14)];

/// Adds `PREFIX_{threads,fds,proc_stat,proc_status,io_stat}` (Kata: docs/design/kata-2-0-metrics.md). Times are in units of 10 ms, sizes in bytes.
pub fn process(families: &mut Families, prefix: &str, of: &str, process: &Process) {
    use super::count_of;
    if let Some(threads) = process.status("Threads") {
        let help = format!("Threads of {of}.");
        families.figure(&format!("{prefix}_threads"), Kind::Gauge, &help, count_of(threads));
    }
    if let Some(open) = process.open_files {
        let help = format!("Open files of {of}.");
        families.figure(&format!("{prefix}_fds"), Kind::Gauge, &help, count_of(open as u64));
    }
    let fields: Vec<_> = process.stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
    let help = format!("Processor time of {of} and of its children, in 10 ms.");
    let family = families.family(&format!("{prefix}_proc_stat"), Kind::Gauge, &help);
    for (item, at) in STAT {
        if let Some(value) = fields.get(at).and_then(|field| field.parse::<u64>().ok()) {
            family.sample(&[("item", item)], count_of(value));
        }
    }
    let help = format!("What /proc says of {of}: memory in bytes, switches between processes.");
    let family = families.family(&format!("{prefix}_proc_status"), Kind::Gauge, &help);
    for (name, value) in process.status.lines().filter_map(|line| line.split_once(':')) {
        let is_ours =
            ["Vm", "Rss", "Hugetlb"].iter().any(|start| name.starts_with(start)) || name.ends_with("_switches");
        let item = name.to_ascii_lowercase();
        if let Some(value) = number(value).filter(|_| is_ours) {
            family.sample(&[("item", &item)], count_of(value));
        }
    }
    let help = format!("What {of} has read and written, in bytes and calls.");
    let family = families.family(&format!("{prefix}_io_stat"), Kind::Gauge, &help);
    for (name, value) in process.io.lines().filter_map(|line| line.split_once(':')) {
        if let Some(value) = number(value) {
            // Kata's agent leaves them as they are.
            let item = if prefix == "kata_agent" { name.to_owned() } else { name.replace('_', "") };
            family.sample(&[("item", &item)], count_of(value));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_files_are_counted() {
        let folder = std::path::Path::new("/proc/self/fd");
        let files: Vec<_> = (0..100).map(|_| std::fs::File::open("/dev/null").unwrap()).collect();
        let (open, listed) = (open_files(folder).unwrap(), std::fs::read_dir(folder).unwrap().count());
        // Other tests open some meanwhile.
        assert!(open >= files.len() && open.abs_diff(listed) < 50, "{open} {listed}");
        assert_eq!(open_files(std::path::Path::new("/proc/none")), None);
    }

    #[test]
    fn figures_have_katas_names_and_units() {
        let own = Process {
            stat: "7 (a) b) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15".into(),
            status: "Name:\tx\nVmRSS:\t  12 kB\nThreads:\t3\nvoluntary_ctxt_switches:\t9\nCpus_allowed:\tff\n".into(),
            io: "rchar: 5\nread_bytes: 6\ncancelled_write_bytes: 7\n".into(),
            open_files: Some(4),
        };
        let mut families = Families::default();
        process(&mut families, "kata_shim", "the shim", &own);
        for (name, labels, value) in [
            ("threads", "", 3.0),
            ("fds", "", 4.0),
            ("proc_stat", "item=\"utime\"", 11.0),
            ("proc_stat", "item=\"cstime\"", 14.0),
            ("proc_status", "item=\"vmrss\"", 12.0 * 1024.0),
            ("proc_status", "item=\"voluntary_ctxt_switches\"", 9.0),
            ("io_stat", "item=\"readbytes\"", 6.0),
            ("io_stat", "item=\"cancelledwritebytes\"", 7.0),
        ] {
            assert_eq!(
                families.value(&format!("kata_shim_{name}"), labels),
                Some(value),
                "{name} {labels}: {families}"
            );
        }
        assert!(!families.to_string().contains("allowed"));
    }

    #[test]
    fn what_is_not_there_is_no_figure() {
        let mut families = Families::default();
        process(&mut families, "x", "nobody", &Process::of(std::path::Path::new("/nowhere")));
        assert_eq!(families.to_string(), "");
        assert!(Process::of(std::path::Path::new("/proc/self")).status("VmRSS").is_some_and(|bytes| bytes > 4096));
    }
}
