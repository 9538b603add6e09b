//! The control group of a pod on the host: this process joins it, and all that it starts from then on is in it, too. Both
//! versions, and hosts that have both (Linux: Documentation/admin-guide/cgroup-v1 and cgroup-v2.rst).

use std::io::{Error, ErrorKind, Result};
use std::os::fd::OwnedFd;
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
    places: Vec<Place>,
}

/// A group in one hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    /// Where the hierarchy is mounted.
    mount: PathBuf,
    /// The group that this process was in, below the mount.
    before: PathBuf,
    /// The group, below the mount.
    path: PathBuf,
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
        let mounts = crate::mountinfo::table()?;
        let own = std::fs::read_to_string("/proc/self/cgroup")?;
        let place = |hierarchy: Hierarchy| Place {
            before: membership(&own, &hierarchy),
            mount: hierarchy.mount,
            path: path.clone(),
        };
        Ok(Self { places: hierarchies(&String::from_utf8_lossy(&mounts)).into_iter().map(place).collect() })
    }

    /// Makes the group where it is missing, and moves this process into it with all its threads.
    ///
    /// # Errors
    /// With the folder that refuses; this process is then where it was.
    pub fn join(&self) -> Result<()> {
        let joined = self.places.iter().try_for_each(join);
        if joined.is_err() {
            self.go_back();
            for place in &self.places {
                // One that has other members is not this process's to remove.
                let _ = std::fs::remove_dir(place.folder());
            }
        }
        joined
    }

    /// Moves this process back to where it was, and removes the group as [`Self::remove`] does.
    pub fn leave(&self) {
        self.go_back();
        self.remove();
    }

    fn go_back(&self) {
        for place in &self.places {
            let folder = place.mount.join(&place.before);
            if let Err(error) = std::fs::write(folder.join(MEMBERS), "0") {
                log::warn!("go back to the control group {}: {error}", folder.display());
            }
        }
    }

    /// Removes the group, once the last of its processes has ended; it waits for that, but not for ever. What is gone is as it
    /// should be.
    pub fn remove(&self) {
        let deadline = Instant::now() + PATIENCE;
        for folder in self.places.iter().map(Place::folder) {
            if let Err(error) = remove_when_empty(&folder, deadline) {
                log::warn!("the control group {} stays: {error}", folder.display());
            }
        }
    }
}

impl Place {
    fn folder(&self) -> PathBuf {
        self.mount.join(&self.path)
    }
}

fn join(place: &Place) -> Result<()> {
    let mut folder = place.mount.clone();
    for part in &place.path {
        let parent = folder.clone();
        pass_controllers_on(&parent);
        folder.push(part);
        match std::fs::create_dir(&folder) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(named(&folder, &error)),
            // Another pod may have made it this moment, and not come to this yet.
            _ => inherit_cpuset(&parent, &folder)?,
        }
    }
    std::fs::write(folder.join(MEMBERS), "0").map_err(|error| named(&folder, &error))
}

/// Lets groups below this one be counted and limited by all that it is itself (version 2): without it they have no figures of memory, and no
/// limits. A group that has processes of its own can't, nor can whoever may not; then they go without.
fn pass_controllers_on(folder: &Path) {
    // Of version 1 there is no such file.
    let controllers = std::fs::read_to_string(folder.join("cgroup.controllers")).unwrap_or_default();
    for controller in controllers.split_whitespace() {
        if let Err(error) = std::fs::write(folder.join("cgroup.subtree_control"), format!("+{controller}")) {
            log::debug!("{} passes {controller} on to nobody: {error}", folder.display());
        }
    }
}

/// How long processes that were killed may take to be gone.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long to leave a group alone that is busy, but shows no member that could be waited for: the kernel lets go of one a
/// moment after its end is told, and nothing tells when. Groups below it, or processes of another pid namespace, look the same.
const KERNEL_PAUSE: Duration = Duration::from_millis(10);

fn remove_when_empty(folder: &Path, deadline: Instant) -> Result<()> {
    let own = Pid::from_raw(std::process::id().cast_signed());
    loop {
        match std::fs::remove_dir(folder) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == ErrorKind::ResourceBusy && Instant::now() < deadline => {}
            other => return other,
        }
        let members = std::fs::read_to_string(folder.join(MEMBERS)).unwrap_or_default();
        let members = members.lines().filter_map(|line| line.parse().ok()).filter_map(Pid::from_raw);
        let mut waited = false;
        for pid in members.filter(|pid| Some(*pid) != own) {
            // One that cannot be opened has ended.
            if let Ok(process) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
                wait(&process, deadline)?;
                waited = true;
            }
        }
        if !waited {
            std::thread::sleep(KERNEL_PAUSE);
        }
    }
}

/// Waits for the end of `process`, until `deadline`.
fn wait(process: &OwnedFd, deadline: Instant) -> Result<()> {
    loop {
        let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now())).map_err(Error::other)?;
        match poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&left)) {
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => return Ok(()),
        }
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

/// A hierarchy, as a mount shows it.
#[derive(Debug, PartialEq, Eq)]
struct Hierarchy {
    mount: PathBuf,
    /// The group that lies at the mount point: `/` unless a part is mounted.
    root: PathBuf,
    /// Of version 1: the controllers, or the name, that tell it from others. Version 2 has none.
    controllers: Option<String>,
}

/// Each hierarchy once (proc(5), mountinfo), though it may be mounted at several places: whole ones go before parts.
fn hierarchies(mounts: &str) -> Vec<Hierarchy> {
    let mut found: Vec<(&str, Hierarchy)> = Vec::new();
    for (before, after) in mounts.lines().filter_map(|line| line.split_once(" - ")) {
        let before: Vec<&str> = before.split(' ').collect();
        let after: Vec<&str> = after.split(' ').collect();
        let (&[_, _, device, root, mount, ..], &[kind, _, options, ..]) = (before.as_slice(), after.as_slice()) else {
            continue;
        };
        let controllers = match kind {
            "cgroup" => Some(options.to_owned()),
            "cgroup2" => None,
            _ => continue,
        };
        found.push((device, Hierarchy { mount: mount.into(), root: root.into(), controllers }));
    }
    found.sort_by(|(device, a), (other, b)| {
        let order = |hierarchy: &Hierarchy| (hierarchy.root != Path::new("/"), hierarchy.mount.clone());
        (device, order(a)).cmp(&(other, order(b)))
    });
    found.dedup_by_key(|(device, _)| *device);
    found.into_iter().map(|(_, hierarchy)| hierarchy).collect()
}

/// The group below `hierarchy`'s mount that `/proc/self/cgroup` has this process in: its top, where that is out of sight.
fn membership(own: &str, hierarchy: &Hierarchy) -> PathBuf {
    let options: Vec<&str> = hierarchy.controllers.as_deref().unwrap_or_default().split(',').collect();
    let group = own.lines().find_map(|line| {
        let (controllers, group) = line.split_once(':')?.1.split_once(':')?;
        let same = match &hierarchy.controllers {
            Some(_) => !controllers.is_empty() && controllers.split(',').all(|name| options.contains(&name)),
            None => controllers.is_empty(),
        };
        same.then_some(group)
    });
    let below = group.and_then(|group| Path::new(group).strip_prefix(&hierarchy.root).ok()).unwrap_or(Path::new(""));
    // Outside of this process's cgroup namespace, groups are shown as `/../…`.
    if below.components().all(|part| matches!(part, Component::Normal(_))) { below.into() } else { PathBuf::new() }
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

    const MOUNTS: &str = "1 2 0:1 / /sys/fs/cgroup/cpu rw shared:1 - cgroup cgroup rw,cpu\n\
        3 2 0:2 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n4 2 0:3 / /sys rw - sysfs sysfs rw\n\
        5 2 0:2 /box /box rw - cgroup2 cgroup2 rw\n6 2 0:1 / /z rw - cgroup cgroup rw,cpu\n";

    #[test]
    fn every_hierarchy_is_found_once() {
        let mounts: Vec<PathBuf> = hierarchies(MOUNTS).into_iter().map(|hierarchy| hierarchy.mount).collect();
        assert_eq!(mounts, [Path::new("/sys/fs/cgroup/cpu"), Path::new("/sys/fs/cgroup/unified")]);
    }

    #[test]
    fn the_way_back_is_known() {
        let before = |own: &str| -> Vec<PathBuf> {
            hierarchies(MOUNTS).iter().map(|hierarchy| membership(own, hierarchy)).collect()
        };
        assert_eq!(
            before("3:cpu:/a/b\n2:cpuset:/c\n0::/system.slice/x\n"),
            [Path::new("a/b"), Path::new("system.slice/x")]
        );
        assert_eq!(before("3:cpu:/../up\n"), [Path::new(""), Path::new("")]);
    }
}
