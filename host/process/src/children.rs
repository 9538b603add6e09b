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

/// The children, oldest first. Empty where the kernel does not list them (Linux: `CONFIG_PROC_CHILDREN`).
#[must_use]
pub fn children() -> Vec<Running> {
    let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let lists = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    let mut pids: Vec<u32> =
        lists.flat_map(|list| list.split_whitespace().flat_map(str::parse).collect::<Vec<_>>()).collect();
    pids.sort_unstable();
    let running = pids.into_iter().filter_map(|pid| {
        let folder = PathBuf::from(format!("/proc/{pid}"));
        let line = std::fs::read(folder.join("cmdline")).ok()?;
        let words = line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
        Some(Running { folder, words })
    });
    running.collect()
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
