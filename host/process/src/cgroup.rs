//! The control group of a pod on the host: this process joins it, and all that it starts from then on is in it, too. Both
//! versions, and hosts that have both (Linux: Documentation/admin-guide/cgroup-v1 and cgroup-v2.rst).

use std::io::{Error, ErrorKind, Result};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags};

/// The file through which processes are moved.
const MEMBERS: &str = "cgroup.procs";

/// What a new group of the cpuset controller has to be given before it takes a process (version 1).
const CPUSET: [&str; 2] = ["cpuset.cpus", "cpuset.mems"];

/// One group, in every hierarchy of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    /// Mount point of a hierarchy, and the group's path below it.
    places: Vec<(PathBuf, PathBuf)>,
}

impl Cgroup {
    /// The group at `path`, as the OCI specification has it (`linux.cgroupsPath`): a path, or `SLICE:PREFIX:NAME` as systemd
    /// has it. Nothing is made yet.
    ///
    /// # Errors
    /// `InvalidInput` for a path that leads elsewhere; whatever the list of mounts says.
    pub fn at(path: &str) -> Result<Self> {
        let path = relative(path)
            .ok_or_else(|| Error::new(ErrorKind::InvalidInput, format!("{path:?} is no path of a control group")))?;
        let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
        Ok(Self { places: hierarchies(&mounts).into_iter().map(|mount| (mount, path.clone())).collect() })
    }

    /// Makes the group where it is missing, and moves this process into it with all its threads.
    ///
    /// # Errors
    /// With the folder that refuses.
    pub fn join(&self) -> Result<()> {
        for (mount, path) in &self.places {
            let mut folder = mount.clone();
            for part in path {
                let parent = folder.clone();
                folder.push(part);
                match std::fs::create_dir(&folder) {
                    Ok(()) => inherit_cpuset(&parent, &folder)?,
                    Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                    Err(error) => return Err(named(&folder, &error)),
                }
            }
            std::fs::write(folder.join(MEMBERS), "0").map_err(|error| named(&folder, &error))?;
        }
        Ok(())
    }

    /// Moves this process back to the top, and removes the group as [`Self::remove`] does.
    pub fn leave(&self) {
        for (mount, _) in &self.places {
            if let Err(error) = std::fs::write(mount.join(MEMBERS), "0") {
                log::debug!("leave the control group below {}: {error}", mount.display());
            }
        }
        self.remove();
    }

    /// Removes the group, once the last of its processes has ended; it waits for that, but not for ever. What is gone is as it
    /// should be.
    pub fn remove(&self) {
        let deadline = Instant::now() + PATIENCE;
        for (mount, path) in &self.places {
            let folder = mount.join(path);
            if let Err(error) = remove_when_empty(&folder, deadline) {
                log::warn!("the control group {} stays: {error}", folder.display());
            }
        }
    }
}

/// How long processes that were killed may take to be gone.
const PATIENCE: Duration = Duration::from_secs(5);

fn remove_when_empty(folder: &Path, deadline: Instant) -> Result<()> {
    loop {
        match std::fs::remove_dir(folder) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == ErrorKind::ResourceBusy && Instant::now() < deadline => {}
            other => return other,
        }
        let members = std::fs::read_to_string(folder.join(MEMBERS)).unwrap_or_default();
        for pid in members.lines().filter_map(|line| line.parse().ok()).filter_map(Pid::from_raw) {
            // One that cannot be opened has ended.
            if let Ok(process) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
                let left = deadline.saturating_duration_since(Instant::now());
                let left = Timespec::try_from(left).map_err(Error::other)?;
                poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&left))?;
            }
        }
        // The kernel lets go of the last one a moment after its end is told.
        std::thread::yield_now();
    }
}

fn named(folder: &Path, error: &Error) -> Error {
    Error::new(error.kind(), format!("{}: {error}", folder.display()))
}

/// The path below a hierarchy's top.
fn relative(path: &str) -> Option<PathBuf> {
    let path = match path.split(':').collect::<Vec<_>>().as_slice() {
        [slice, prefix, name] if !path.contains('/') => slice_path(slice)?.join(format!("{prefix}-{name}.scope")),
        [path] => PathBuf::from(path.trim_start_matches('/')),
        _ => return None,
    };
    let plain = path.components().all(|part| matches!(part, Component::Normal(_)));
    (plain && path.components().next().is_some()).then_some(path)
}

/// `a-b.slice` lies in `a.slice` (systemd.slice(5)).
fn slice_path(slice: &str) -> Option<PathBuf> {
    let name = slice.strip_suffix(".slice")?;
    let mut path = PathBuf::new();
    for (at, _) in name.match_indices('-').chain([(name.len(), "")]) {
        path.push(format!("{}.slice", name.get(..at)?));
    }
    Some(path)
}

/// The mount points of all hierarchies (proc(5), mountinfo): version 2 counts where it is the only one, or has controllers
/// beside version 1.
fn hierarchies(mounts: &str) -> Vec<PathBuf> {
    let of = |kind: &str| -> Vec<PathBuf> {
        let lines = mounts.lines().filter_map(|line| line.split_once(" - "));
        lines
            .filter(|(_, after)| after.split(' ').next() == Some(kind))
            .filter_map(|(before, _)| before.split(' ').nth(4).map(PathBuf::from))
            .collect()
    };
    let mut all = of("cgroup");
    all.extend(of("cgroup2"));
    all.sort();
    // The same hierarchy may be mounted at several places.
    all.dedup();
    all
}

/// A new cpuset has no processors and no memory; it gets its parent's.
fn inherit_cpuset(parent: &Path, folder: &Path) -> Result<()> {
    for file in CPUSET {
        let (from, to) = (parent.join(file), folder.join(file));
        // Version 2 has an empty file mean the parent's, too.
        if let (Ok(value), Ok(own)) = (std::fs::read_to_string(&from), std::fs::read_to_string(&to))
            && own.trim().is_empty()
            && !value.trim().is_empty()
        {
            std::fs::write(&to, value.trim()).map_err(|error| named(&to, &error))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_below_the_top() {
        assert_eq!(relative("/k8s.io/abc"), Some("k8s.io/abc".into()));
        assert_eq!(relative("kubepods/pod1/abc"), Some("kubepods/pod1/abc".into()));
        for bad in ["", "/", "/../x", "a/../../b", "a:b", "a:b:c:d", "x.slice:cri:../up"] {
            assert_eq!(relative(bad), None, "{bad}");
        }
    }

    #[test]
    fn slices_lie_in_one_another() {
        let path = relative("kubepods-burstable-pod1.slice:cri-containerd:abc").unwrap();
        let expected = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-abc.scope";
        assert_eq!(path, Path::new(expected));
    }

    #[test]
    fn every_hierarchy_is_found() {
        let mounts = "1 2 0:1 / /sys/fs/cgroup/cpu rw shared:1 - cgroup cgroup rw,cpu\n\
            3 2 0:2 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n4 2 0:3 / /sys rw - sysfs sysfs rw\n";
        assert_eq!(hierarchies(mounts), [Path::new("/sys/fs/cgroup/cpu"), Path::new("/sys/fs/cgroup/unified")]);
    }
}
