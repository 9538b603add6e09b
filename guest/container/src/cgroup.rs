//! Control groups, version 2 (kernel: Documentation/admin-guide/cgroup-v2.rst).

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use oci_spec::runtime::{LinuxBlockIo, LinuxDeviceCgroup, LinuxResources};

use crate::error::Step;
use crate::init::write_existing;
use crate::{Error, Result};

/// The longest wait for the kernel to stop a cgroup's tasks.
const FREEZE_DEADLINE: Duration = Duration::from_secs(10);

/// One container's cgroup. It is the engine's own: nobody else writes to it.
#[derive(Debug, Clone)]
pub struct Cgroup(PathBuf);

/// What a cgroup has used. Sizes are bytes, times microseconds.
#[derive(Debug, Default, Clone)]
pub struct Stats {
    /// `cpu.stat`.
    pub cpu: BTreeMap<String, u64>,
    /// `memory.current`.
    pub memory_usage: u64,
    /// `memory.peak`, where the kernel has it.
    pub memory_peak: u64,
    /// `memory.max`; the greatest number where there is none.
    pub memory_limit: u64,
    /// `memory.swap.current`.
    pub swap_usage: u64,
    /// `memory.stat`.
    pub memory: BTreeMap<String, u64>,
    /// `memory.events`.
    pub memory_events: BTreeMap<String, u64>,
    /// `pids.current`.
    pub pids: u64,
    /// `pids.max`; 0 where there is none.
    pub pids_limit: u64,
    /// `io.stat`: device as `MAJOR:MINOR`, then counter.
    pub io: BTreeMap<String, BTreeMap<String, u64>>,
}

impl Cgroup {
    /// Makes the cgroup `name` below `parent`, a folder of a cgroup2 mount, with all controllers that there are.
    ///
    /// # Errors
    /// [`Error::System`] where the kernel refuses. One of that name that is there already is what could not be removed once: whoever asks has
    /// no container of that name, so its processes are ended and it is removed.
    pub fn create(parent: &Path, name: &str) -> Result<Self> {
        std::fs::create_dir_all(parent).step(|| format!("make cgroup {}", parent.display()))?;
        if let Some(root) = parent.parent() {
            enable_controllers(root);
        }
        enable_controllers(parent);
        let path = parent.join(name);
        match std::fs::create_dir(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                let stale = Self(path.clone());
                stale.kill()?;
                stale.remove()?;
                std::fs::create_dir(&path)
            }
            made => made,
        }
        .step(|| format!("make cgroup {}", path.display()))?;
        Ok(Self(path))
    }

    /// Its folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Sets the limits that `resources` names.
    ///
    /// # Errors
    /// [`Error::System`] with the file that could not be written.
    pub fn apply(&self, resources: &LinuxResources) -> Result<()> {
        if let Some(cpu) = resources.cpu() {
            if let Some(shares) = cpu.shares().filter(|shares| *shares > 0) {
                self.write("cpu.weight", &weight(shares).to_string())?;
            }
            let quota = cpu.quota().filter(|quota| *quota != 0);
            let period = cpu.period().filter(|period| *period > 0);
            match (quota, period) {
                (Some(quota), period) if quota > 0 => {
                    self.write("cpu.max", &format!("{quota} {}", period.unwrap_or(100_000)))?;
                }
                (Some(_), period) => self.write("cpu.max", &format!("max {}", period.unwrap_or(100_000)))?,
                (None, Some(period)) => self.write("cpu.max", &format!("max {period}"))?,
                (None, None) => {}
            }
            for (file, list) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
                if let Some(list) = list.as_ref().filter(|list| !list.is_empty()) {
                    self.write(file, list)?;
                }
            }
        }
        if let Some(memory) = resources.memory() {
            let limit = memory.limit().filter(|limit| *limit != 0);
            if let Some(limit) = limit {
                self.write("memory.max", &number_or_max(limit))?;
            }
            if let Some(reservation) = memory.reservation().filter(|value| *value != 0) {
                self.write("memory.low", &number_or_max(reservation))?;
            }
            // OCI's figure is memory and swap together, the kernel's swap alone.
            match (memory.swap().filter(|swap| *swap != 0), limit) {
                (Some(swap), Some(limit)) if swap > 0 && limit > 0 => {
                    self.write_where_there("memory.swap.max", &(swap - limit).max(0).to_string())?;
                }
                (Some(swap), _) if swap < 0 => self.write_where_there("memory.swap.max", "max")?,
                _ => {}
            }
        }
        if let Some(pids) = resources.pids().filter(|pids| pids.limit() != 0) {
            self.write("pids.max", &number_or_max(pids.limit()))?;
        }
        if let Some(io) = resources.block_io() {
            self.apply_io(io)?;
        }
        for huge in resources.hugepage_limits().iter().flatten() {
            self.write(&format!("hugetlb.{}.max", huge.page_size()), &number_or_max(huge.limit()))?;
        }
        for (file, value) in resources.unified().iter().flatten() {
            if file.contains('/') {
                return Err(Error::Invalid(format!("{file} is no cgroup file")));
            }
            self.write(file, value)?;
        }
        Ok(())
    }

    /// Lets its processes use the devices that `rules` allow, and those that every container has. Once, before the first one
    /// joins.
    ///
    /// # Errors
    /// [`Error::Invalid`] for what is no rule, [`Error::System`] where the kernel refuses.
    pub fn restrict_devices(&self, rules: &[LinuxDeviceCgroup]) -> Result<()> {
        crate::device_cgroup::restrict(&self.0, rules)
    }

    fn apply_io(&self, io: &LinuxBlockIo) -> Result<()> {
        if let Some(weight) = io.weight().filter(|weight| *weight > 0) {
            let files = ["io.bfq.weight", "io.weight"];
            let Some(file) = files.into_iter().find(|file| self.0.join(file).exists()) else {
                return Err(Error::Invalid("the guest's kernel knows no weights of block I/O".into()));
            };
            self.write(file, &io_weight(weight, file).to_string())?;
        }
        for (key, list) in [
            ("rbps", io.throttle_read_bps_device()),
            ("wbps", io.throttle_write_bps_device()),
            ("riops", io.throttle_read_iops_device()),
            ("wiops", io.throttle_write_iops_device()),
        ] {
            for limit in list.iter().flatten() {
                let rate = if limit.rate() == 0 { "max".into() } else { limit.rate().to_string() };
                self.write("io.max", &format!("{}:{} {key}={rate}", limit.major(), limit.minor()))?;
            }
        }
        Ok(())
    }

    /// Reads what has been used. A file that is not there counts as zero.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats {
            cpu: self.keyed("cpu.stat"),
            memory_usage: self.number("memory.current", 0),
            memory_peak: self.number("memory.peak", 0),
            memory_limit: self.number("memory.max", u64::MAX),
            swap_usage: self.number("memory.swap.current", 0),
            memory: self.keyed("memory.stat"),
            memory_events: self.keyed("memory.events"),
            pids: self.number("pids.current", 0),
            pids_limit: self.number("pids.max", 0),
            io: self.nested("io.stat"),
        }
    }

    /// How many of its tasks the kernel has killed for want of memory.
    #[must_use]
    pub fn oom_kills(&self) -> u64 {
        self.keyed("memory.events").get("oom_kill").copied().unwrap_or(0)
    }

    /// The file that becomes readable (with priority) when a count of [`Self::oom_kills`] may have changed.
    ///
    /// # Errors
    /// [`Error::System`] where there is no memory controller.
    pub fn oom_events(&self) -> Result<File> {
        File::open(self.0.join("memory.events")).step(|| "open memory.events".into())
    }

    /// The pids in it, in the agent's pid namespace.
    ///
    /// # Errors
    /// [`Error::System`].
    pub fn pids(&self) -> Result<Vec<i32>> {
        let text = std::fs::read_to_string(self.0.join("cgroup.procs")).step(|| "read cgroup.procs".into())?;
        Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
    }

    /// Stops all its tasks and waits until they stand.
    ///
    /// # Errors
    /// [`Error::System`]; `ETIMEDOUT` where a task would not stop.
    pub fn freeze(&self) -> Result<()> {
        self.set_frozen(true)
    }

    /// Lets all its tasks go on.
    ///
    /// # Errors
    /// [`Error::System`].
    pub fn thaw(&self) -> Result<()> {
        self.set_frozen(false)
    }

    /// Kills all its tasks.
    ///
    /// # Errors
    /// [`Error::System`].
    pub fn kill(&self) -> Result<()> {
        self.write("cgroup.kill", "1")
    }

    /// Removes it once it is empty, waiting for the last task.
    ///
    /// # Errors
    /// [`Error::System`].
    pub fn remove(&self) -> Result<()> {
        self.await_event("populated", "0", FREEZE_DEADLINE)?;
        for entry in std::fs::read_dir(&self.0).step(|| "list the cgroup".into())?.flatten() {
            // A container with a cgroup namespace may have made groups of its own.
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                Self(entry.path()).remove()?;
            }
        }
        std::fs::remove_dir(&self.0).step(|| format!("remove cgroup {}", self.0.display()))
    }

    fn set_frozen(&self, frozen: bool) -> Result<()> {
        let value = if frozen { "1" } else { "0" };
        self.write("cgroup.freeze", value)?;
        self.await_event("frozen", value, FREEZE_DEADLINE)
    }

    /// Waits until `key` of `cgroup.events` is `value`. The kernel marks each change of that file with POLLPRI.
    fn await_event(&self, key: &str, value: &str, patience: Duration) -> Result<()> {
        let step = || format!("wait for {key} {value} in {}", self.0.display());
        let deadline = Instant::now() + patience;
        let path = self.0.join("cgroup.events");
        let file = File::open(&path).step(step)?;
        loop {
            let mut text = String::new();
            std::io::Read::read_to_string(&mut &file, &mut text).step(step)?;
            std::io::Seek::rewind(&mut &file).step(step)?;
            if text.lines().any(|line| line.split_once(' ') == Some((key, value))) {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut watched = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
            if poll(&mut watched, left).step(step)? == 0 {
                return Err(nix::errno::Errno::ETIMEDOUT).step(step);
            }
        }
    }

    fn write(&self, file: &str, value: &str) -> Result<()> {
        write_existing(&self.0.join(file), value).step(|| format!("set {file} to {value}"))
    }

    fn write_where_there(&self, file: &str, value: &str) -> Result<()> {
        if self.0.join(file).exists() { self.write(file, value) } else { Ok(()) }
    }

    fn read(&self, file: &str) -> String {
        std::fs::read_to_string(self.0.join(file)).unwrap_or_default()
    }

    fn number(&self, file: &str, absent: u64) -> u64 {
        self.read(file).trim().parse().unwrap_or(absent)
    }

    fn keyed(&self, file: &str) -> BTreeMap<String, u64> {
        parse_keyed(&self.read(file))
    }

    fn nested(&self, file: &str) -> BTreeMap<String, BTreeMap<String, u64>> {
        parse_nested(&self.read(file))
    }
}

/// Turns on every controller for the groups below. One that is refused stays off: a limit that needs it fails later, by
/// name.
fn enable_controllers(group: &Path) {
    let controllers = std::fs::read_to_string(group.join("cgroup.controllers")).unwrap_or_default();
    for controller in controllers.split_whitespace() {
        let _ = write_existing(&group.join("cgroup.subtree_control"), &format!("+{controller}"));
    }
}

fn number_or_max(value: i64) -> String {
    if value < 0 { "max".into() } else { value.to_string() }
}

/// CPU shares (2 to 262144) as a weight (1 to 10000), by the formula that the field has agreed on (runtime-spec).
fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

/// OCI's weight (10 to 1000) as the kernel's: BFQ has the same scale, and `io.weight` goes from 1 to 10000.
fn io_weight(weight: u16, file: &str) -> u64 {
    let weight = u64::from(weight.clamp(10, 1000));
    if file == "io.weight" { 1 + (weight - 10) * 9999 / 990 } else { weight }
}

fn parse_keyed(text: &str) -> BTreeMap<String, u64> {
    text.lines()
        .filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_owned(), value.trim().parse().ok()?))
        })
        .collect()
}

fn parse_nested(text: &str) -> BTreeMap<String, BTreeMap<String, u64>> {
    text.lines()
        .filter_map(|line| {
            let (device, counters) = line.split_once(' ')?;
            let counters = counters
                .split_whitespace()
                .filter_map(|pair| {
                    let (key, value) = pair.split_once('=')?;
                    Some((key.to_owned(), value.parse().ok()?))
                })
                .collect();
            Some((device.to_owned(), counters))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_become_weights() {
        assert_eq!([weight(0), weight(2), weight(1024), weight(262_144), weight(u64::MAX)], [1, 1, 39, 10000, 10000]);
    }

    #[test]
    fn weights_of_block_io_keep_their_ends() {
        assert_eq!([10, 1000].map(|weight| io_weight(weight, "io.weight")), [1, 10000]);
        assert_eq!([1, 500, 2000].map(|weight| io_weight(weight, "io.bfq.weight")), [10, 500, 1000]);
    }

    #[test]
    fn the_kernels_tables_are_read() {
        assert_eq!(parse_keyed("usage_usec 12\nbad\nuser_usec 7\n")["user_usec"], 7);
        let io = parse_nested("8:0 rbytes=10 wbytes=x rios=2\n");
        assert_eq!(io["8:0"]["rbytes"], 10);
        assert!(!io["8:0"].contains_key("wbytes"));
    }
}
