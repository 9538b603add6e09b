//! A child that is nobody of the host's: a user of its own, in namespaces of its own, from which little of the host is seen and nothing of it is
//! written to. What it needs of the host it inherits open.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::process::{Gid, Pid, Resource, Rlimit, Uid};
use rustix::thread::UnshareFlags;

/// The first of the users under which monitors run, one a process that starts them; above those of a host's own users and
/// of the ranges that are given to containers.
const FIRST_USER: u32 = 0x7000_0000;

/// The user, and the group of the same number, as which the monitors of this process run.
#[must_use]
pub fn monitor_user() -> u32 {
    FIRST_USER + std::process::id()
}

/// The most groups of a confined child.
const GROUPS_MAX: usize = 4;

/// Folders in which a confined child finds nothing: sockets, and what is somebody's own.
const HIDDEN: [&str; 6] = ["/home", "/root", "/run", "/srv", "/tmp", "/var"];

/// How a child is confined; see the module.
#[derive(Debug, Clone)]
pub struct Confinement {
    user: u32,
    groups: Vec<u32>,
    namespaces: UnshareFlags,
    hidden: Vec<CString>,
    /// The most bytes that it may keep in memory (RLIMIT_MEMLOCK); none here is what this process may.
    kept: Option<u64>,
}

impl Confinement {
    /// One for a monitor, whose program is at `program`: the folder that it is in stays as it is.
    #[must_use]
    pub fn of_monitor(program: &Path) -> Self {
        let namespaces = UnshareFlags::NEWNS
            | UnshareFlags::NEWNET
            | UnshareFlags::NEWIPC
            | UnshareFlags::NEWUTS
            | UnshareFlags::NEWCGROUP;
        let program = program.canonicalize().unwrap_or_else(|_| program.to_owned());
        let is_hidden = |folder: &&str| {
            // One that is a link leads to what is hidden elsewhere, or is no mount's place.
            let is_folder = std::fs::symlink_metadata(folder).is_ok_and(|data| data.is_dir());
            is_folder && !program.starts_with(folder)
        };
        let hidden = HIDDEN.into_iter().filter(is_hidden).filter_map(|folder| CString::new(folder).ok()).collect();
        Self { user: monitor_user(), groups: Vec::new(), namespaces, hidden, kept: None }
    }

    /// Lets it keep the host's network.
    #[must_use]
    pub fn with_network(mut self) -> Self {
        self.namespaces.remove(UnshareFlags::NEWNET);
        self
    }

    /// Lets it open a file that its group may open (`/dev/kvm`); at most four of them. One that is not there is no group's.
    #[must_use]
    pub fn in_group_of(mut self, file: &Path) -> Self {
        if let Ok(data) = std::fs::metadata(file)
            && data.gid() != 0
            && self.groups.len() < GROUPS_MAX
        {
            self.groups.push(data.gid());
        }
        self
    }

    /// Lets it keep so much of its memory where it is; see [`lock_memory`].
    #[must_use]
    pub fn keeping(mut self, bytes: u64) -> Self {
        self.kept = Some(bytes);
        self
    }

    /// The user as which it runs.
    #[must_use]
    pub fn user(&self) -> u32 {
        self.user
    }

    /// Leaves the host's namespaces. It makes system calls only, and can be called between fork and exec.
    pub(crate) fn leave(&self) -> std::io::Result<()> {
        // SAFETY: none of the flags is CLONE_FILES: the process keeps its descriptors.
        #[expect(unsafe_code, reason = "unshare of descriptors would be another matter")]
        unsafe { rustix::thread::unshare_unsafe(self.namespaces) }?;
        rustix::mount::mount_change(c"/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        // It sees its own processes. Where a host hides some of its own files of the kernel's, it lets nobody see them anew: then those stay.
        let _ = rustix::mount::mount(c"proc", c"/proc", c"proc", flags, None::<&CStr>);
        let mut empty: Option<&CStr> = None;
        for folder in &self.hidden {
            match empty {
                None => rustix::mount::mount(c"tmpfs", folder.as_c_str(), c"tmpfs", flags, Some(c"size=4k,mode=755"))?,
                Some(first) => rustix::mount::mount_bind(first, folder.as_c_str())?,
            }
            empty.get_or_insert(folder);
        }
        if let Some(bytes) = self.kept {
            rustix::process::setrlimit(Resource::Memlock, locked(bytes))?;
        }
        all_read_only()
    }

    /// Becomes that user, for good. For this thread, and before there is another.
    pub(crate) fn become_user(&self) -> std::io::Result<()> {
        let mut groups = [Gid::ROOT; GROUPS_MAX];
        for (place, group) in groups.iter_mut().zip(&self.groups) {
            *place = Gid::from_raw(*group);
        }
        rustix::thread::set_thread_groups(groups.get(..self.groups.len()).unwrap_or_default())?;
        let (user, group) = (Uid::from_raw(self.user), Gid::from_raw(self.user));
        rustix::thread::set_thread_res_gid(group, group, group)?;
        Ok(rustix::thread::set_thread_res_uid(user, user, user)?)
    }
}

/// `struct mount_attr` (linux/mount.h).
#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// Makes all mounts of this namespace read-only, and without what raises privileges (mount_setattr(2), Linux 5.12).
fn all_read_only() -> std::io::Result<()> {
    const READ_ONLY: u64 = 0x1;
    const NO_SET_USER: u64 = 0x2;
    let attributes = MountAttributes { set: READ_ONLY | NO_SET_USER, clear: 0, propagation: 0, user_namespace: 0 };
    // SAFETY: the path ends with a zero, and the structure lives during the call and has the size that is told.
    #[expect(unsafe_code, reason = "a system call without a wrapper")]
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            c"/".as_ptr(),
            libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<MountAttributes>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Lets a monitor keep so much of its memory where it is: what devices of the host's reach does not move.
///
/// # Errors
/// Where this process may not allow it.
pub fn lock_memory(monitor: i32, bytes: u64) -> std::io::Result<()> {
    Ok(rustix::process::prlimit(Pid::from_raw(monitor), Resource::Memlock, locked(bytes)).map(drop)?)
}

/// A limit for so much memory of a guest's, and what its monitor keeps beside that.
fn locked(bytes: u64) -> Rlimit {
    const BESIDE: u64 = 64 << 20;
    let most = Some(bytes.saturating_add(BESIDE));
    Rlimit { current: most, maximum: most }
}

/// A file that everybody who has it open may open again (through `/proc/self/fd`), with the same content: the file itself where its mode says
/// so, else a copy in memory.
///
/// # Errors
/// The system's.
pub fn for_everybody(mut file: File) -> std::io::Result<File> {
    if file.metadata()?.mode() & 0o004 != 0 {
        return Ok(file);
    }
    let mut copy = File::from(rustix::fs::memfd_create(c"copy", rustix::fs::MemfdFlags::CLOEXEC)?);
    std::io::copy(&mut file, &mut copy)?;
    rustix::fs::fchmod(&copy, rustix::fs::Mode::from_raw_mode(0o444))?;
    Ok(copy)
}

/// The host's number for a thread of a process that has a pid namespace of its own, by the number that it has there.
#[must_use]
pub fn thread_of(process: i32, own: i32) -> Option<i32> {
    let threads = std::fs::read_dir(format!("/proc/{process}/task")).ok()?.flatten();
    let numbers = |thread: std::fs::DirEntry| {
        let status = std::fs::read_to_string(thread.path().join("status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
        let (first, last) = (line.split_whitespace().next()?, line.split_whitespace().last()?);
        Some((first.parse().ok()?, last.parse().ok()?))
    };
    threads.filter_map(numbers).find_map(|(host, inner): (i32, i32)| (inner == own).then_some(host))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};
    use std::os::fd::AsRawFd;

    use crate::{CapabilitySet, Spawn};

    /// What a confined shell says on the descriptor 5.
    async fn confined(script: &str) -> String {
        let said = rustix::fs::memfd_create("said", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut said = File::from(said);
        let mut spawn = Spawn::new("/bin/sh").arguments(["-c", script]);
        spawn.capabilities = Some(CapabilitySet::empty());
        spawn.confinement = Some(Confinement::of_monitor(Path::new("/bin/sh")));
        let child = spawn.in_own_pid_namespace().descriptor(5, said.try_clone().unwrap().into()).start().unwrap();
        child.wait().await;
        said.rewind().unwrap();
        let mut text = String::new();
        said.read_to_string(&mut text).unwrap();
        text
    }

    fn can_confine() -> bool {
        let is_root = rustix::process::geteuid().is_root();
        if !is_root {
            println!("left out: only root can confine");
        }
        is_root
    }

    #[tokio::test]
    async fn a_confined_child_is_nobody_and_sees_nobody() {
        if !can_confine() {
            return;
        }
        let script = "cat /proc/self/status; for d in /run /tmp /var /root; do ls -A $d; done | wc -l; ls /proc | grep -c '^[0-9]'";
        let status = confined(&format!("({script}) >&5")).await;
        let user = monitor_user();
        for line in [
            format!("Uid:\t{user}\t{user}\t{user}\t{user}"),
            "CapEff:\t0000000000000000".into(),
            "CapBnd:\t0000000000000000".into(),
        ] {
            assert!(status.contains(&line), "{line}: {status}");
        }
        assert!(status.contains("NoNewPrivs:\t1") && status.contains("Groups:\t \n"), "{status}");
        let counts: Vec<u32> = status.lines().rev().take(2).map(|line| line.parse().unwrap()).collect();
        assert!(counts[1] == 0 && (1..6).contains(&counts[0]), "processes, and what hidden folders have: {counts:?}");
    }

    #[tokio::test]
    async fn a_confined_child_writes_nothing_and_has_no_network() {
        if !can_confine() {
            return;
        }
        let open = std::env::temp_dir().join(format!("open-{}", std::process::id()));
        std::fs::create_dir(&open).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o1777);
        std::fs::set_permissions(&open, mode).unwrap();
        let script = format!(
            "for f in {}/x /dev/shm/x /run/x; do (: > $f) 2>/dev/null && echo wrote $f >&5; done; cat /proc/net/dev | grep -c : >&5; \
             echo done >&5",
            open.display()
        );
        let said = confined(&script).await;
        std::fs::remove_dir_all(&open).unwrap();
        // Its own loopback, which is down.
        assert_eq!(said, "1\ndone\n");
    }

    #[test]
    fn what_is_roots_alone_is_copied() {
        let path = std::env::temp_dir().join(format!("private-{}", std::process::id()));
        std::fs::write(&path, "words").unwrap();
        for (mode, is_same) in [(0o600, false), (0o644, true)] {
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
            let file = File::open(&path).unwrap();
            let number = file.metadata().unwrap().ino();
            let given = for_everybody(file).unwrap();
            assert_eq!(given.metadata().unwrap().ino() == number, is_same, "{mode:o}");
            let again = std::fs::read_to_string(format!("/proc/self/fd/{}", given.as_raw_fd())).unwrap();
            assert_eq!((again.as_str(), given.metadata().unwrap().mode() & 0o004), ("words", 0o004));
        }
        std::fs::remove_file(&path).unwrap();
    }

    #[tokio::test]
    async fn threads_are_found_by_their_inner_numbers() {
        if !can_confine() {
            return;
        }
        let child = Spawn::new("sleep").argument("1000").in_own_pid_namespace().start().unwrap();
        let pid = i32::try_from(child.pid()).unwrap();
        assert_eq!((thread_of(pid, 1), thread_of(pid, 2)), (Some(pid), None));
        let own = i32::try_from(std::process::id()).unwrap();
        assert_eq!(thread_of(own, own), Some(own), "in no namespace of its own they are the same");
        child.kill();
        child.wait().await;
    }
}
