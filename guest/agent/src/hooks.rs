//! Hooks of the guest: programs of the guest image that are told of each container's life (runtime-spec, config.md, "POSIX-platform
//! Hooks"). The host names their folder once, when it sets the pod up; in it are the folders of [`Point`].

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::{Error, Result, program};

/// How long one hook may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// When hooks run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Point {
    /// After a container was made, before its process may start. One that fails, fails the create.
    Prestart,
    /// After its process was started.
    Poststart,
    /// After it was removed.
    Poststop,
}

impl Point {
    /// The folder's name, and the container's state for the hook.
    fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Prestart => ("prestart", "created"),
            Self::Poststart => ("poststart", "running"),
            Self::Poststop => ("poststop", "stopped"),
        }
    }
}

/// The programs of the folder for `point`, in the order of their names.
pub(crate) fn find(folder: &Path, point: Point) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder.join(point.names().0)).into_iter().flatten().flatten();
    let mut programs: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(|path| is_program(path)).collect();
    programs.sort();
    programs
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

/// Runs the hooks of `folder` for a container, one after the other, each with its state (runtime-spec, runtime.md, "State") as
/// input. It blocks.
///
/// # Errors
/// [`Error::State`] at the first that fails or takes too long.
pub(crate) fn run(folder: &Path, point: Point, id: &str, pid: i32, root: &Path) -> Result<()> {
    let (_, status) = point.names();
    let state = serde_json::json!({
        "ociVersion": "1.0.2", "id": id, "status": status, "pid": pid, "bundle": root.parent().unwrap_or(root),
    });
    for program in find(folder, point) {
        let failed = |what: String| Error::State(format!("the hook {}: {what}", program.display()));
        let outcome = program::run(Command::new(&program), state.to_string().as_bytes(), PATIENCE);
        let status = outcome.map_err(|error| failed(error.to_string()))?.status;
        if !status.success() {
            return Err(failed(format!("it ended with {status}")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn hook(folder: &Path, name: &str, script: &str) {
        let at = folder.join("prestart");
        std::fs::create_dir_all(&at).unwrap();
        std::fs::write(at.join(name), format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(at.join(name), std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn hooks_get_the_state_in_their_order() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        hook(folder.path(), "20-second", &format!("echo two >>{}", log.display()));
        hook(folder.path(), "10-first", &format!("cat >{0}; echo >>{0}", log.display()));
        std::fs::write(folder.path().join("prestart/README"), "no program").unwrap();
        run(folder.path(), Point::Prestart, "c", 7, Path::new("/s/c/rootfs")).unwrap();
        let text = std::fs::read_to_string(log).unwrap();
        let (state, rest) = text.split_once('\n').unwrap();
        let state: serde_json::Value = serde_json::from_str(state).unwrap();
        assert_eq!(
            (state["id"].as_str(), state["pid"].as_i64(), state["status"].as_str()),
            (Some("c"), Some(7), Some("created"))
        );
        assert_eq!((state["bundle"].as_str(), rest), (Some("/s/c"), "two\n"));
    }

    #[test]
    fn one_that_fails_is_named_and_the_rest_is_not_run() {
        let folder = tempfile::tempdir().unwrap();
        hook(folder.path(), "1", "exit 3");
        hook(folder.path(), "2", &format!("touch {}", folder.path().join("ran").display()));
        let error = run(folder.path(), Point::Prestart, "c", 7, Path::new("/r")).unwrap_err().to_string();
        assert!(error.contains("prestart/1") && error.contains('3'), "{error}");
        assert!(!folder.path().join("ran").exists());
        run(folder.path(), Point::Poststop, "c", 7, Path::new("/r")).unwrap();
    }
}
