//! A child that is nobody of the host's: a user of its own, in namespaces of its own, from which little of the host is seen and nothing of it is
//! written to. What it needs of the host it inherits open.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{Gid, Pid, Resource, Rlimit, Uid};
use rustix::thread::UnshareFlags;
use seccompiler::BpfProgram;

use crate::mountinfo;
use crate::spawn::FIRST_COPY;
use crate::syscalls::local_sockets;

/// The first of the users under which monitors run, one a process that starts them; above those of a host's own users and
/// of the ranges that are given to containers.
const FIRST_USER: u32 = 0x7000_0000;

/// The user, and the group of the same number, as which the monitors of this process run.
#[must_use]
pub fn monitor_user() -> u32 {
    FIRST_USER + std::process::id()
}

/// Folders in which a confined monitor finds nothing: sockets, and what is somebody's own.
const HIDDEN: [&str; 9] = ["/home", "/media", "/mnt", "/opt", "/root", "/run", "/srv", "/tmp", "/var"];

/// What a monitor's program and its files are in, or need: no folder above one of these is hidden.
const NEEDED: [&str; 7] = ["/dev", "/etc", "/lib", "/lib64", "/proc", "/sys", "/usr"];

/// What a monitor is shown of the host's devices as its own.
const KVM: &CStr = c"/dev/kvm";

/// How a child is confined; see the module.
#[derive(Debug, Clone)]
pub struct Confinement {
    /// The user as which it runs, and the group of the same number; none is as this process.
    user: Option<u32>,
    namespaces: UnshareFlags,
    hidden: Vec<CString>,
    /// What is mounted below those: it is let go of, for hidden it would be held for the life of the child.
    mounts: Vec<CString>,
    /// The number of `/dev/kvm`, where there is one.
    kvm: Option<u64>,
    /// The most bytes that it may keep in memory (RLIMIT_MEMLOCK); none here is what this process may.
    kept: Option<u64>,
    /// What it may write to (Landlock); none where the kernel has none of that.
    rules: Option<Arc<OwnedFd>>,
    /// Its system calls.
    filter: Option<BpfProgram>,
}

/// Namespaces for which nothing needs to be made.
const PLAIN: UnshareFlags =
    UnshareFlags::NEWNET.union(UnshareFlags::NEWIPC).union(UnshareFlags::NEWUTS).union(UnshareFlags::NEWCGROUP);

impl Confinement {
    /// One for a monitor, whose program is at `program`: the folder that it is in stays as it is. It has no sockets but those of the host's
    /// programs that it is handed, and local ones.
    ///
    /// # Errors
    /// Where there can't be a list of system calls.
    pub fn of_monitor(program: &Path) -> std::io::Result<Self> {
        let program = program.canonicalize().unwrap_or_else(|_| program.to_owned());
        let needed = NEEDED.map(Path::new);
        let can_hide = |folder: &PathBuf| {
            folder.is_dir() && !needed.iter().chain([&program.as_path()]).any(|needed| needed.starts_with(folder))
        };
        // Where one is a link, what it leads to.
        let mut hidden: Vec<PathBuf> =
            HIDDEN.iter().filter_map(|folder| Path::new(folder).canonicalize().ok()).filter(can_hide).collect();
        hidden.sort();
        hidden.dedup();
        let mounts = mounts_below(&hidden, &mountinfo::table()?);
        let hidden = hidden.into_iter().filter_map(|folder| CString::new(folder.into_os_string().into_vec()).ok());
        Ok(Self {
            user: Some(monitor_user()),
            namespaces: PLAIN | UnshareFlags::NEWNS,
            hidden: hidden.collect(),
            mounts,
            kvm: None,
            kept: None,
            rules: written_nowhere()?,
            filter: Some(local_sockets()?),
        })
    }

    /// One for a server of this process's own program, which does the rest itself: it has no network, and neither names nor messages of the
    /// host's.
    #[must_use]
    pub fn of_server() -> Self {
        Self {
            user: None,
            namespaces: PLAIN,
            hidden: Vec::new(),
            mounts: Vec::new(),
            kvm: None,
            kept: None,
            rules: None,
            filter: None,
        }
    }

    /// Gives it a `/dev/kvm` of its own, where the host has one.
    #[must_use]
    pub fn with_kvm(mut self) -> Self {
        let kvm = std::fs::metadata("/dev/kvm").ok().filter(|data| data.file_type().is_char_device());
        self.kvm = kvm.map(|data| data.rdev());
        self
    }

    /// Lets it keep so much of its memory where it is; see [`lock_memory`].
    #[must_use]
    pub fn keeping(mut self, bytes: u64) -> Self {
        self.kept = Some(bytes);
        self
    }

    /// Whether this process can give a child away like that: where root is an ordinary user's, there is no other user.
    #[must_use]
    pub fn is_possible() -> bool {
        let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
        rustix::process::geteuid().is_root() && has_user(&map, monitor_user())
    }

    /// Leaves the host's namespaces. It makes system calls only, and can be called between fork and exec.
    pub(crate) fn leave(&self) -> std::io::Result<()> {
        // SAFETY: none of the flags is CLONE_FILES: the process keeps its descriptors.
        #[expect(unsafe_code, reason = "unshare of descriptors would be another matter")]
        unsafe { rustix::thread::unshare_unsafe(self.namespaces) }?;
        rustix::process::chdir(c"/")?;
        if let Some(bytes) = self.kept {
            rustix::process::setrlimit(Resource::Memlock, locked(bytes))?;
        }
        if self.namespaces.contains(UnshareFlags::NEWNS) { self.hide_files() } else { Ok(()) }
    }

    fn hide_files(&self) -> std::io::Result<()> {
        // What the host unmounts goes here, too: a file system that is in use in no other place would be held for the life of the child.
        rustix::mount::mount_change(c"/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?;
        for place in &self.mounts {
            // One that the host has unmounted meanwhile is gone.
            let _ = rustix::mount::unmount(place.as_c_str(), UnmountFlags::DETACH);
        }
        let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
        // It sees its own processes. Where a host hides some of its own files of the kernel's, it lets nobody see them anew: then those stay.
        let _ = rustix::mount::mount(c"proc", c"/proc", c"proc", flags | MountFlags::NODEV, None::<&CStr>);
        let mut empty: Option<&CStr> = None;
        for folder in &self.hidden {
            match empty {
                None => rustix::mount::mount(c"tmpfs", folder.as_c_str(), c"tmpfs", flags, Some(c"size=8k,mode=755"))?,
                Some(first) => rustix::mount::mount_bind(first, folder.as_c_str())?,
            }
            empty.get_or_insert(folder);
        }
        if let (Some(folder), Some(number), Some(user)) = (empty, self.kvm, self.user) {
            // Where it may not be made, the host's is left, with its owner and mode.
            let _ = own_device(folder, number, user);
        }
        all_read_only()
    }

    /// Becomes that user, for good. For this thread, and before there is another.
    pub(crate) fn become_user(&self) -> std::io::Result<()> {
        let Some(user) = self.user else { return Ok(()) };
        let (user, group) = (Uid::from_raw(user), Gid::from_raw(user));
        rustix::thread::set_thread_groups(&[])?;
        rustix::thread::set_thread_res_gid(group, group, group)?;
        Ok(rustix::thread::set_thread_res_uid(user, user, user)?)
    }

    /// Gives up to write, and system calls. No privileges can be gained any more by then.
    pub(crate) fn give_up_calls(&self) -> std::io::Result<()> {
        if let Some(rules) = &self.rules {
            // SAFETY: the call takes no pointers.
            #[expect(unsafe_code, reason = "a system call without a wrapper")]
            let result = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, rules.as_raw_fd(), 0) };
            if result < 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        let Some(filter) = &self.filter else { return Ok(()) };
        seccompiler::apply_filter(filter).map_err(|_| std::io::Error::from_raw_os_error(libc::EPERM))
    }
}

/// Rules by which nothing is written to, made or removed but below `/dev`: mounts that the host makes later come with its own flags. None where the
/// kernel has no Landlock. The descriptor is out of the way of those that a child inherits.
fn written_nowhere() -> std::io::Result<Option<Arc<OwnedFd>>> {
    use landlock::{ABI, AccessFs, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr};
    const NEWEST: ABI = ABI::V6;
    let failed = |error: landlock::RulesetError| std::io::Error::other(format!("landlock: {error}"));
    let writes = AccessFs::from_write(NEWEST);
    let rules = Ruleset::default().handle_access(writes).and_then(Ruleset::create).map_err(failed)?;
    let devices = PathFd::new("/dev").map_err(|error| std::io::Error::other(format!("landlock: {error}")))?;
    let rules = rules.add_rule(PathBeneath::new(devices, writes)).map_err(failed)?;
    let Some(rules) = Option::<OwnedFd>::from(rules) else { return Ok(None) };
    Ok(Some(Arc::new(rustix::io::fcntl_dupfd_cloexec(rules, FIRST_COPY)?)))
}

/// Puts a device of this number and user in the place of [`KVM`]: whom the host lets use its own is another matter. `folder` is an empty one of
/// this namespace's own, and is empty again.
fn own_device(folder: &CStr, number: u64, user: u32) -> rustix::io::Result<()> {
    use rustix::fs::{AtFlags, FileType, Mode, OFlags};
    let folder = rustix::fs::open(folder, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mode = Mode::RUSR | Mode::WUSR;
    rustix::fs::mknodat(&folder, c"kvm", FileType::CharacterDevice, mode, number)?;
    let (owner, group) = (Some(Uid::from_raw(user)), Some(Gid::from_raw(user)));
    let mounted = rustix::fs::chownat(&folder, c"kvm", owner, group, AtFlags::SYMLINK_NOFOLLOW)
        .and_then(|()| {
            rustix::mount::open_tree(
                &folder,
                c"kvm",
                rustix::mount::OpenTreeFlags::OPEN_TREE_CLONE | rustix::mount::OpenTreeFlags::OPEN_TREE_CLOEXEC,
            )
        })
        .and_then(|device| {
            let flags = rustix::mount::MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
            rustix::mount::move_mount(device, c"", rustix::fs::CWD, KVM, flags)
        });
    rustix::fs::unlinkat(&folder, c"kvm", AtFlags::empty())?;
    mounted
}

/// The uppermost places below these folders at which something is mounted, by a table of mounts.
fn mounts_below(folders: &[PathBuf], table: &[u8]) -> Vec<CString> {
    let is_below = |folder: &Path, place: &Path| place != folder && place.starts_with(folder);
    let mut below: Vec<PathBuf> = mountinfo::mounts(table).into_iter().map(|mount| mount.point).collect();
    below.retain(|place| folders.iter().any(|folder| is_below(folder, place)));
    // By its parts, a path comes before those below it, and nothing else between.
    below.sort();
    below.dedup_by(|next, before| next.starts_with(before));
    below.into_iter().filter_map(|place| CString::new(place.into_os_string().into_vec()).ok()).collect()
}

/// Whether a map of a user namespace (user_namespaces(7)) has this user.
fn has_user(map: &str, user: u32) -> bool {
    map.lines().any(|line| {
        let mut numbers = line.split_whitespace().map(str::parse::<u64>);
        match (numbers.next(), numbers.next(), numbers.next()) {
            (Some(Ok(first)), Some(Ok(_)), Some(Ok(count))) => {
                (first..first.saturating_add(count)).contains(&user.into())
            }
            _ => false,
        }
    })
}

/// Makes all mounts of this namespace read-only, and without what raises privileges.
fn all_read_only() -> std::io::Result<()> {
    const READ_ONLY: u64 = 0x1;
    const NO_SET_USER: u64 = 0x2;
    set_mount_attributes(rustix::fs::CWD, c"/", libc::AT_RECURSIVE, [READ_ONLY | NO_SET_USER, 0, 0, 0])
}

/// mount_setattr(2), Linux 5.12, of the mount at `path` from `folder`; `attributes` are those of struct mount_attr: attr_set, attr_clr,
/// propagation, userns_fd. One system call and nothing else.
///
/// # Errors
/// The system's.
pub fn set_mount_attributes(
    folder: BorrowedFd<'_>,
    path: &CStr,
    flags: libc::c_int,
    attributes: [u64; 4],
) -> std::io::Result<()> {
    // SAFETY: the path is NUL-terminated, and the structure lives through the call and has the size that is given.
    #[expect(unsafe_code, reason = "no safe wrapper is at hand")]
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            folder.as_raw_fd(),
            path.as_ptr(),
            flags,
            attributes.as_ptr(),
            size_of_val(&attributes),
        )
    };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
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

/// The host's numbers for the threads of a process, by those that they have in its own pid namespace.
///
/// # Errors
/// Where there is no such process.
pub fn threads_of(process: i32) -> std::io::Result<BTreeMap<i32, i32>> {
    let numbers = |thread: std::fs::DirEntry| {
        // One that has ended meanwhile is none.
        let status = std::fs::read_to_string(thread.path().join("status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
        let (first, last) = (line.split_whitespace().next()?, line.split_whitespace().last()?);
        Some((last.parse().ok()?, first.parse().ok()?))
    };
    Ok(std::fs::read_dir(format!("/proc/{process}/task"))?.flatten().filter_map(numbers).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};

    use crate::{CapabilitySet, Spawn};

    /// What a confined shell says on the descriptor 5.
    async fn confined(script: &str) -> String {
        let said = rustix::fs::memfd_create("said", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut said = File::from(said);
        let mut spawn = Spawn::new("/bin/sh").arguments(["-c", script]);
        spawn.capabilities = Some(CapabilitySet::empty());
        spawn.confinement = Some(Confinement::of_monitor(Path::new("/bin/sh")).unwrap());
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

    #[tokio::test]
    async fn what_the_host_unmounts_goes_from_a_confined_child_too() {
        if !can_confine() {
            return;
        }
        // Not in a folder that is hidden, where nothing is mounted any more.
        let place = Path::new("/dev/shm").join(format!("place-{}", std::process::id()));
        std::fs::create_dir(&place).unwrap();
        // A thread's own namespace stands for the host's.
        let path = place.clone();
        let inner = tokio::task::spawn_blocking(move || {
            // SAFETY: the flag is not CLONE_FILES; the thread is this closure's alone.
            #[expect(unsafe_code, reason = "unshare of descriptors would be another matter")]
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }.unwrap();
            let kind = MountPropagationFlags::SHARED | MountPropagationFlags::REC;
            rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
            rustix::mount::mount_change("/", kind).unwrap();
            rustix::mount::mount("tmpfs", &path, "tmpfs", MountFlags::empty(), None).unwrap();
            let mut spawn = Spawn::new("/bin/sleep").argument("1000");
            spawn.confinement = Some(Confinement::of_monitor(Path::new("/bin/sleep")).unwrap());
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let child = spawn.in_own_pid_namespace().start().unwrap();
                let has_it = || {
                    let mounts = std::fs::read_to_string(format!("/proc/{}/mountinfo", child.pid())).unwrap();
                    mounts.lines().any(|line| line.split(' ').nth(4) == path.to_str())
                };
                let before = has_it();
                rustix::mount::unmount(&path, rustix::mount::UnmountFlags::empty()).unwrap();
                let after = has_it();
                child.kill();
                child.wait().await;
                (before, after)
            })
        });
        let found = inner.await.unwrap();
        std::fs::remove_dir(&place).unwrap();
        assert_eq!(found, (true, false));
    }

    #[test]
    fn what_is_mounted_in_hidden_folders_is_known_by_its_uppermost_places() {
        let line = |place: &str| format!("36 35 98:0 / {place} rw,noatime shared:1 - ext4 /dev/root rw\n");
        let places = [
            "/",
            "/run",
            "/run/a\\040b",
            "/run/a\\040b/c",
            "/run-not",
            "/var/lib/x",
            "/var/lib/x/y",
            "/usr/z",
            "/var/lib/x",
        ];
        let table: String = places.iter().map(|place| line(place)).collect();
        let mut table = table.into_bytes();
        // The kernel escapes no byte for being no text.
        table.extend(b"36 35 98:0 / /run/\xff rw - tmpfs x rw\n");
        let expected = [c"/run/a b", c"/run/\xff", c"/var/lib/x"].map(CStr::to_owned);
        assert_eq!(mounts_below(&["/run".into(), "/var".into()], &table), expected);
    }

    #[test]
    fn the_rules_are_out_of_the_way_of_what_a_child_inherits() {
        match written_nowhere().unwrap() {
            Some(rules) => assert!(rules.as_raw_fd() >= FIRST_COPY),
            None => println!("left out: this kernel has no Landlock"),
        }
    }

    #[test]
    fn who_is_root_of_a_few_users_alone_gives_nobody_away() {
        assert!(has_user("         0          0 4294967295\n", monitor_user()));
        assert!(!has_user("0 1000 1\n1 100000 65536\n", monitor_user()));
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
        assert_eq!(threads_of(pid).unwrap(), [(1, pid)].into());
        let own = i32::try_from(std::process::id()).unwrap();
        assert_eq!(threads_of(own).unwrap()[&own], own, "in no namespace of its own they are the same");
        child.kill();
        child.wait().await;
    }
}
