//! The children that this process has now, whichever of its threads has started them.

use std::path::PathBuf;

/// A child.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Running {
    /// Its folder, `/proc/PID`.
    pub folder: PathBuf,
    /// The words that it was started with. It can change them itself.
    pub words: Vec<String>,
}

impl Running {
    /// The process of this number; none where there is none.
    #[must_use]
    pub fn of(pid: u32) -> Option<Self> {
        let folder = PathBuf::from(format!("/proc/{pid}"));
        let line = std::fs::read(folder.join("cmdline")).ok()?;
        let words = line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
        Some(Self { folder, words })
    }

    /// Its children, oldest first.
    #[must_use]
    pub fn children(&self) -> Vec<Self> {
        listed(&self.folder).into_iter().filter_map(Self::of).collect()
    }

    /// The process that does the work: a program that puts itself into a namespace of processes leaves one behind that only waits for it.
    #[must_use]
    pub fn at_work(&self) -> Self {
        let only = |folder: &std::path::Path| {
            let mut pids = listed(folder);
            (pids.len() == 1).then(|| pids.remove(0))
        };
        match only(&self.folder).and_then(Self::of) {
            Some(child) if child.words == self.words => child,
            _ => self.clone(),
        }
    }
}

/// The pids of the children of a process.
fn listed(process: &std::path::Path) -> Vec<u32> {
    let threads = std::fs::read_dir(process.join("task")).into_iter().flatten().flatten();
    let lists = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    let mut pids: Vec<u32> =
        lists.flat_map(|list| list.split_whitespace().flat_map(str::parse).collect::<Vec<_>>()).collect();
    pids.sort_unstable();
    pids
}

/// The children, oldest first. Empty where the kernel does not list them (Linux: `CONFIG_PROC_CHILDREN`).
#[must_use]
pub fn children() -> Vec<Running> {
    listed(std::path::Path::new("/proc/self")).into_iter().filter_map(Running::of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_is_listed_while_it_runs() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let folder = PathBuf::from(format!("/proc/{}", child.id()));
        // Its words are its own once it runs; until then they are ours.
        let listed = || children().into_iter().find(|running| running.folder == folder);
        assert!(listed().is_some_and(|running| !running.words.is_empty()));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(listed(), None);
    }
}
