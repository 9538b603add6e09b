//! The file system that a pod's machine shares with its host: virtio-fs, served by virtiofsd.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use coracle_machine::Device;
use coracle_protocol::agent::Storage;
use coracle_protocol::paths;

use crate::Error;

/// Entries of the request queue.
const QUEUE_SIZE: u16 = 128;

/// The descriptor on which virtiofsd finds its listening socket.
pub const SOCKET_FD: i32 = 3;

/// A virtiofsd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Virtiofsd {
    /// Its program.
    pub path: PathBuf,
    /// Whether it is the older program in C, whose options are spelled otherwise.
    pub is_c: bool,
}

/// What the shared file system needs.
#[derive(Debug, Clone)]
pub struct SharedFsPlan {
    /// The folder that is shared.
    pub folder: PathBuf,
    /// The socket at which the server listens.
    pub socket: PathBuf,
    /// The server's program.
    pub program: PathBuf,
    /// Its arguments; it finds its listening socket at [`SOCKET_FD`].
    pub arguments: Vec<OsString>,
    /// The device for the machine.
    pub device: Device,
    /// The storage for the guest.
    pub storage: Storage,
}

/// What only the program in C says of itself when it is asked for its version.
const C_PROGRAM: &str = "FUSE kernel interface";

/// The first virtiofsd of `candidates` that is there, asked for its version, which tells the two programs apart. It waits
/// for that program's answer.
///
/// # Errors
/// [`Error::Missing`] with the mend.
pub fn find_virtiofsd(candidates: &[String]) -> Result<Virtiofsd, Error> {
    let mend =
        "install the package virtiofsd (or Debian 12's qemu-system-common, for root only), or set `virtiofsd.paths`";
    let path = candidates.iter().map(PathBuf::from).find(|path| path.is_file()).ok_or_else(|| {
        Error::Missing(format!("virtiofsd is missing: it is neither of {}; {mend}", candidates.join(", ")))
    })?;
    let answer = Command::new(&path).arg("--version").stdin(Stdio::null()).output();
    match answer {
        Ok(answer) if answer.status.success() => {
            let is_c = String::from_utf8_lossy(&answer.stdout).contains(C_PROGRAM);
            Ok(Virtiofsd { path, is_c })
        }
        Ok(answer) => {
            let (status, words) = (answer.status, String::from_utf8_lossy(&answer.stderr).trim().to_owned());
            let words = if words.is_empty() { words } else { format!(": {words}") };
            // The program in C needs root for as much as this.
            Err(Error::Missing(format!("{} --version ended with {status}{words}; {mend}", path.display())))
        }
        Err(error) => Err(Error::Missing(format!("{} can't be run: {error}; {mend}", path.display()))),
    }
}

/// Plans the shared file system of a pod in `folder`, whose server listens at `socket` and has `open_files` at most.
#[must_use]
pub fn shared_fs(server: &Virtiofsd, folder: &Path, socket: &Path, open_files: u64) -> SharedFsPlan {
    let mut arguments: Vec<OsString> = Vec::new();
    if server.is_c {
        let mut source = OsString::from("source=");
        source.push(folder);
        arguments.push(format!("--fd={SOCKET_FD}").into());
        arguments.extend(["-f", "-o", "sandbox=namespace,cache=auto,announce_submounts,xattr", "-o"].map(Into::into));
        arguments.push(source);
        arguments.push("--thread-pool-size=1".into());
    } else {
        let mut shared = OsString::from("--shared-dir=");
        shared.push(folder);
        arguments.push(format!("--fd={SOCKET_FD}").into());
        arguments.push(shared);
        arguments.extend(
            ["--sandbox=namespace", "--cache=auto", "--announce-submounts", "--xattr", "--thread-pool-size=1"]
                .map(Into::into),
        );
    }
    arguments.push(format!("--rlimit-nofile={open_files}").into());
    SharedFsPlan {
        folder: folder.to_owned(),
        socket: socket.to_owned(),
        program: server.path.clone(),
        arguments,
        device: Device::SharedFs { tag: paths::SHARED_TAG.into(), socket: socket.to_owned(), queue_size: QUEUE_SIZE },
        storage: Storage {
            driver: "virtio-fs".into(),
            source: paths::SHARED_TAG.into(),
            fstype: "virtiofs".into(),
            options: vec!["nodev".into()],
            mount_point: paths::SHARED.into(),
            ..Default::default()
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_server_names_its_mend() {
        let error = find_virtiofsd(&["/nowhere/virtiofsd".into()]).unwrap_err().to_string();
        assert!(error.contains("/nowhere/virtiofsd") && error.contains("install") && error.contains("virtiofsd.paths"));
    }

    #[test]
    fn the_programs_are_told_apart_by_what_they_say() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let program = |name: &str, script: &str, mode| {
            let path = folder.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            find_virtiofsd(&["/nowhere/virtiofsd".into(), path.display().to_string()])
        };
        let c = "echo virtiofsd version 7.2.22; echo using FUSE kernel interface version 7.36";
        assert!(program("c", c, 0o755).unwrap().is_c);
        assert!(!program("rust", "echo virtiofsd 1.13.2", 0o755).unwrap().is_c);
        for (name, script, mode) in [("broken", "exit 1", 0o755), ("plain", "", 0o644)] {
            let error = program(name, script, mode).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("virtiofsd.paths"), "{error}");
        }
    }

    #[test]
    fn both_programs_get_their_own_options() {
        let plan = |is_c| {
            let server = Virtiofsd { path: "/v".into(), is_c };
            shared_fs(&server, Path::new("/run/s"), Path::new("/run/fs.sock"), 4000).arguments
        };
        assert!(plan(true).contains(&"source=/run/s".into()));
        assert!([true, false].into_iter().all(|is_c| plan(is_c).contains(&"--rlimit-nofile=4000".into())));
        assert!(plan(false).contains(&"--shared-dir=/run/s".into()));
    }
}
