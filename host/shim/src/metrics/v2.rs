//! Figures in containerd's form for hosts with version 2 of control groups.

use std::collections::HashMap;

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};
use coracle_protocol::agent::{BlkioStatsEntry, StatsContainerResponse};
use coracle_protocol::protobuf::MessageField;

use super::Figures;

/// The message's full name.
pub(super) const NAME: &str = "io.containerd.cgroups.v2.Metrics";

pub(super) fn convert(stats: &StatsContainerResponse) -> Metrics {
    let Figures { usage, throttling, memory, used, pids, io } = stats.into();
    Metrics {
        pids: MessageField::some(PidsStat { current: pids.current, limit: pids.limit, ..Default::default() }),
        cpu: MessageField::some(CPUStat {
            usage_usec: usage.total_usage / 1000,
            user_usec: usage.usage_in_usermode / 1000,
            system_usec: usage.usage_in_kernelmode / 1000,
            nr_periods: throttling.periods,
            nr_throttled: throttling.throttled_periods,
            throttled_usec: throttling.throttled_time / 1000,
            ..Default::default()
        }),
        memory: MessageField::some(memory_stat(&memory.stats, used.usage, used.limit, used.max_usage)),
        memory_events: MessageField::some(memory_events(&memory.stats)),
        io: MessageField::some(IOStat {
            usage: io_entries(&io.io_service_bytes_recursive, &io.io_serviced_recursive),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn memory_stat(table: &HashMap<String, u64>, usage: u64, limit: u64, max: u64) -> MemoryStat {
    let get = |key: &str| table.get(key).copied().unwrap_or(0);
    MemoryStat {
        anon: get("anon"),
        file: get("file"),
        kernel_stack: get("kernel_stack"),
        slab: get("slab"),
        sock: get("sock"),
        shmem: get("shmem"),
        file_mapped: get("file_mapped"),
        file_dirty: get("file_dirty"),
        file_writeback: get("file_writeback"),
        anon_thp: get("anon_thp"),
        inactive_anon: get("inactive_anon"),
        active_anon: get("active_anon"),
        inactive_file: get("inactive_file"),
        active_file: get("active_file"),
        unevictable: get("unevictable"),
        slab_reclaimable: get("slab_reclaimable"),
        slab_unreclaimable: get("slab_unreclaimable"),
        pgfault: get("pgfault"),
        pgmajfault: get("pgmajfault"),
        usage,
        usage_limit: limit,
        max_usage: max,
        ..Default::default()
    }
}

fn memory_events(table: &HashMap<String, u64>) -> MemoryEvents {
    let get = |key: &str| table.get(&format!("events.{key}")).copied().unwrap_or(0);
    MemoryEvents {
        low: get("low"),
        high: get("high"),
        max: get("max"),
        oom: get("oom"),
        oom_kill: get("oom_kill"),
        ..Default::default()
    }
}

fn io_entries(bytes: &[BlkioStatsEntry], counts: &[BlkioStatsEntry]) -> Vec<IOEntry> {
    let mut entries: Vec<IOEntry> = Vec::new();
    for (list, is_bytes) in [(bytes, true), (counts, false)] {
        for item in list {
            let found = entries.iter().position(|entry| entry.major == item.major && entry.minor == item.minor);
            let at = found.unwrap_or_else(|| {
                entries.push(IOEntry { major: item.major, minor: item.minor, ..Default::default() });
                entries.len() - 1
            });
            let entry = &mut entries[at];
            match (item.op.as_str(), is_bytes) {
                ("Read", true) => entry.rbytes = item.value,
                ("Write", true) => entry.wbytes = item.value,
                ("Read", false) => entry.rios = item.value,
                ("Write", false) => entry.wios = item.value,
                _ => {}
            }
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use coracle_protocol::agent::{CgroupStats, CpuStats, CpuUsage};

    use super::*;

    #[test]
    fn units_are_converted() {
        let stats = StatsContainerResponse {
            cgroup_stats: MessageField::some(CgroupStats {
                cpu_stats: MessageField::some(CpuStats {
                    cpu_usage: MessageField::some(CpuUsage { total_usage: 5_000_000, ..Default::default() }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        assert_eq!(convert(&stats).cpu.usage_usec, 5000);
    }

    #[test]
    fn a_device_is_one_entry() {
        let entry =
            |op: &str, value| BlkioStatsEntry { major: 8, minor: 1, op: op.into(), value, ..Default::default() };
        let entries = io_entries(&[entry("Read", 1), entry("Write", 2)], &[entry("Read", 3)]);
        assert_eq!(entries.len(), 1);
        assert_eq!((entries[0].rbytes, entries[0].wbytes, entries[0].rios), (1, 2, 3));
    }
}
