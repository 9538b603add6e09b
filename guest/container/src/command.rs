//! From a command's first argument to the file that exec gets.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::unistd::{AccessFlags, access};

use crate::error::{CommandProblem, Step};
use crate::{Error, Result};

/// Finds `name` as execvp does, in the root and with the rights that this process has by now.
pub(crate) fn find(name: &str, environment: &[String]) -> Result<CString> {
    let problem = |problem| Error::Command { command: name.to_owned(), problem };
    if name.is_empty() {
        return Err(Error::Invalid("the process has no command".into()));
    }
    let found = if name.contains('/') {
        check(Path::new(name)).map_err(problem)?;
        PathBuf::from(name)
    } else {
        let path = environment.iter().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or_default();
        let mut last = CommandProblem::NotInPath;
        let mut found = None;
        for folder in path.split(':') {
            let candidate = Path::new(if folder.is_empty() { "." } else { folder }).join(name);
            match check(&candidate) {
                Ok(()) => {
                    found = Some(candidate);
                    break;
                }
                Err(CommandProblem::NotExecutable) => last = CommandProblem::NotExecutable,
                Err(_) => {}
            }
        }
        found.ok_or_else(|| problem(last))?
    };
    CString::new(found.as_os_str().as_bytes()).map_err(|_| problem(CommandProblem::NotFound))
}

fn check(path: &Path) -> std::result::Result<(), CommandProblem> {
    let metadata = std::fs::metadata(path).map_err(|error| match error.raw_os_error() {
        Some(libc::EACCES) => CommandProblem::NotExecutable,
        _ => CommandProblem::NotFound,
    })?;
    if metadata.is_dir() {
        return Err(CommandProblem::Directory);
    }
    access(path, AccessFlags::X_OK).map_err(|_| CommandProblem::NotExecutable)
}

/// What exec's error number means for the user.
pub(crate) fn exec_error(name: &str, errno: Errno) -> Error {
    let problem = match errno {
        // The file was there a moment ago, so it is its interpreter that is missing.
        Errno::ENOENT => CommandProblem::NotFound,
        Errno::EACCES | Errno::EPERM => CommandProblem::NotExecutable,
        Errno::ENOEXEC => CommandProblem::Format,
        other => {
            return Err::<(), _>(other).step(|| format!("exec: \"{name}\"")).err().unwrap_or(Error::InitGone);
        }
    };
    Error::Command { command: name.to_owned(), problem }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn problem(name: &str, path: &str) -> Option<CommandProblem> {
        match find(name, &[format!("PATH={path}")]) {
            Err(Error::Command { problem, .. }) => Some(problem),
            Ok(_) => None,
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn each_kind_of_command() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tool");
        std::fs::write(&file, "").unwrap();
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o644)).unwrap();
        let path = folder.path().to_str().unwrap();
        assert_eq!(problem("nothing", path), Some(CommandProblem::NotInPath));
        assert_eq!(problem("/nowhere/tool", path), Some(CommandProblem::NotFound));
        assert_eq!(problem(path, path), Some(CommandProblem::Directory));
        assert_eq!(problem("tool", path), Some(CommandProblem::NotExecutable));
        assert_eq!(problem(file.to_str().unwrap(), path), Some(CommandProblem::NotExecutable));
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o755)).unwrap();
        assert_eq!(problem("tool", path), None);
        assert!(matches!(find("", &[]), Err(Error::Invalid(_))));
    }
}
