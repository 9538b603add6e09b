//! From the agent's figures to containerd's, and times.
//!
//! The guest always has version 2 of control groups. containerd reads the form of its host's version, and so do its clients.

mod v1;
mod v2;

use std::path::Path;
use std::time::SystemTime;

use coracle_protocol::agent::{
    BlkioStats, CgroupStats, CpuUsage, MemoryData, MemoryStats, PidsStats, StatsContainerResponse, ThrottlingData,
};
use coracle_protocol::management::Usage;
use coracle_protocol::protobuf::Message;
use coracle_protocol::protobuf::well_known_types::any::Any;
use coracle_protocol::protobuf::well_known_types::timestamp::Timestamp;

/// A time as containerd has it.
pub(crate) fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
        ..Default::default()
    }
}

/// Which form is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    V1,
    V2,
}

/// That of a host whose control groups are mounted at `mount`: only version 2 has this file at the top.
fn form(mount: &Path) -> Form {
    if mount.join("cgroup.controllers").exists() { Form::V2 } else { Form::V1 }
}

/// The figures, packed in this host's form.
///
/// # Errors
/// Never in practice: the message is complete.
pub(crate) fn pack(stats: &StatsContainerResponse) -> Result<Any, containerd_shim_protos::protobuf::Error> {
    let (name, value) = match form(Path::new("/sys/fs/cgroup")) {
        Form::V1 => (v1::NAME, v1::convert(stats).write_to_bytes()?),
        Form::V2 => (v2::NAME, v2::convert(stats).write_to_bytes()?),
    };
    Ok(Any { type_url: name.into(), value, ..Default::default() })
}

/// The parts of the agent's figures that both forms read; what was not sent is zero.
struct Figures {
    usage: CpuUsage,
    throttling: ThrottlingData,
    memory: MemoryStats,
    used: MemoryData,
    pids: PidsStats,
    io: BlkioStats,
}

impl From<&StatsContainerResponse> for Figures {
    fn from(stats: &StatsContainerResponse) -> Self {
        let cgroup = stats.cgroup_stats.clone().unwrap_or_default();
        let cpu = cgroup.cpu_stats.unwrap_or_default();
        let memory = cgroup.memory_stats.unwrap_or_default();
        Self {
            usage: cpu.cpu_usage.unwrap_or_default(),
            throttling: cpu.throttling_data.unwrap_or_default(),
            used: memory.usage.clone().unwrap_or_default(),
            memory,
            pids: cgroup.pids_stats.unwrap_or_default(),
            io: cgroup.blkio_stats.unwrap_or_default(),
        }
    }
}

/// What a container has used, for `coracle stats`.
pub(crate) fn usage(container: String, stats: &StatsContainerResponse) -> Usage {
    let Figures { usage, used, pids, io, .. } = stats.into();
    let bytes = |operation: &str| {
        let entries = io.io_service_bytes_recursive.iter().filter(|entry| entry.op == operation);
        entries.fold(0_u64, |sum, entry| sum.saturating_add(entry.value))
    };
    let links = || stats.network_stats.iter().filter(|link| link.name != "lo");
    Usage {
        container,
        cpu_nanoseconds: usage.total_usage,
        memory_bytes: used.usage,
        // Without one it is the greatest number, or that of whole pages.
        memory_limit_bytes: Some(used.limit).filter(|limit| (1..1 << 62).contains(limit)),
        processes: pids.current,
        read_bytes: bytes("Read"),
        written_bytes: bytes("Write"),
        received_bytes: links().fold(0, |sum, link| sum.saturating_add(link.rx_bytes)),
        sent_bytes: links().fold(0, |sum, link| sum.saturating_add(link.tx_bytes)),
    }
}

/// What a pod's containers have used together. A limit is the sum of theirs; without one for each there is none.
pub(crate) fn sum(all: &[StatsContainerResponse]) -> StatsContainerResponse {
    let mut total = StatsContainerResponse::new();
    for (number, stats) in all.iter().enumerate() {
        let Some(from) = stats.cgroup_stats.as_ref() else { continue };
        let into = total.cgroup_stats.mut_or_insert_default();
        add_cpu(into, from);
        add_memory(into, from, number == 0);
        let (pids, more) = (into.pids_stats.mut_or_insert_default(), from.pids_stats.clone().unwrap_or_default());
        pids.current += more.current;
        let io = from.blkio_stats.clone().unwrap_or_default();
        let into = into.blkio_stats.mut_or_insert_default();
        into.io_service_bytes_recursive.extend(io.io_service_bytes_recursive);
        into.io_serviced_recursive.extend(io.io_serviced_recursive);
        // The pod's links are the same for all.
        total.network_stats.clone_from(&stats.network_stats);
    }
    total
}

fn add_cpu(into: &mut CgroupStats, from: &CgroupStats) {
    let more = from.cpu_stats.clone().unwrap_or_default();
    let cpu = into.cpu_stats.mut_or_insert_default();
    let (usage, used) = (cpu.cpu_usage.mut_or_insert_default(), more.cpu_usage.unwrap_or_default());
    usage.total_usage += used.total_usage;
    usage.usage_in_kernelmode += used.usage_in_kernelmode;
    usage.usage_in_usermode += used.usage_in_usermode;
    let (throttling, throttled) =
        (cpu.throttling_data.mut_or_insert_default(), more.throttling_data.unwrap_or_default());
    throttling.periods += throttled.periods;
    throttling.throttled_periods += throttled.throttled_periods;
    throttling.throttled_time += throttled.throttled_time;
}

fn add_memory(into: &mut CgroupStats, from: &CgroupStats, is_first: bool) {
    let more = from.memory_stats.clone().unwrap_or_default();
    let memory = into.memory_stats.mut_or_insert_default();
    memory.cache += more.cache;
    let (usage, used) = (memory.usage.mut_or_insert_default(), more.usage.unwrap_or_default());
    usage.usage += used.usage;
    usage.max_usage += used.max_usage;
    usage.limit = if is_first { used.limit } else { usage.limit.saturating_add(used.limit) };
    memory.swap_usage.mut_or_insert_default().usage += more.swap_usage.unwrap_or_default().usage;
    for (key, value) in more.stats {
        *memory.stats.entry(key).or_default() += value;
    }
}

#[cfg(test)]
mod tests {
    use coracle_protocol::agent::CpuStats;
    use coracle_protocol::protobuf::MessageField;

    use super::*;

    /// So many milliseconds of processor time, MiB of memory, and no limit.
    pub(super) fn stats(milliseconds: u64, mebibytes: u64) -> StatsContainerResponse {
        let usage = CpuUsage { total_usage: milliseconds * 1_000_000, ..Default::default() };
        let memory = MemoryData { usage: mebibytes << 20, limit: u64::MAX, ..Default::default() };
        StatsContainerResponse {
            cgroup_stats: MessageField::some(CgroupStats {
                cpu_stats: MessageField::some(CpuStats { cpu_usage: MessageField::some(usage), ..Default::default() }),
                memory_stats: MessageField::some(MemoryStats {
                    usage: MessageField::some(memory),
                    stats: [("anon".to_owned(), 4096), ("inactive_file".to_owned(), 8192)].into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn the_form_is_the_hosts() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(form(folder.path()), Form::V1);
        std::fs::write(folder.path().join("cgroup.controllers"), "cpu").unwrap();
        assert_eq!(form(folder.path()), Form::V2);
    }

    #[test]
    fn a_container_without_a_limit_has_none() {
        let found = usage("c".into(), &stats(5, 10));
        assert_eq!((found.cpu_nanoseconds, found.memory_bytes), (5_000_000, 10 << 20));
        assert_eq!(found.memory_limit_bytes, None);
    }

    #[test]
    fn a_pod_is_the_sum_of_its_containers() {
        let total = sum(&[stats(5, 10), stats(7, 1), StatsContainerResponse::new()]);
        let cgroup = total.cgroup_stats.unwrap();
        assert_eq!(cgroup.cpu_stats.cpu_usage.total_usage, 12_000_000);
        let memory = cgroup.memory_stats.unwrap();
        assert_eq!((memory.usage.usage, memory.usage.limit), (11 << 20, u64::MAX));
        assert_eq!(memory.stats["anon"], 8192);
    }
}
