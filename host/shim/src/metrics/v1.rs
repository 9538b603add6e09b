//! Figures in containerd's form for hosts with version 1 of control groups. The guest has version 2: its names are translated.

use containerd_shim_protos::cgroups::metrics::{
    BlkIOEntry, BlkIOStat, CPUStat, CPUUsage, HugetlbStat, MemoryEntry, MemoryOomControl, MemoryStat, Metrics,
    NetworkStat, PidsStat, Throttle,
};
use coracle_protocol::agent::{self, BlkioStatsEntry, StatsContainerResponse};
use coracle_protocol::protobuf::MessageField;

use super::Figures;

/// The message's full name.
pub(super) const NAME: &str = "io.containerd.cgroups.v1.Metrics";

/// A limit that is none, as version 1 shows it: the greatest number of bytes in whole pages.
const UNLIMITED: u64 = 0x7fff_ffff_ffff_f000;

pub(super) fn convert(stats: &StatsContainerResponse) -> Metrics {
    let Figures { usage, throttling, memory, used, pids, io } = stats.into();
    Metrics {
        pids: MessageField::some(PidsStat { current: pids.current, limit: pids.limit, ..Default::default() }),
        cpu: MessageField::some(CPUStat {
            usage: MessageField::some(CPUUsage {
                total: usage.total_usage,
                kernel: usage.usage_in_kernelmode,
                user: usage.usage_in_usermode,
                ..Default::default()
            }),
            throttling: MessageField::some(Throttle {
                periods: throttling.periods,
                throttled_periods: throttling.throttled_periods,
                throttled_time: throttling.throttled_time,
                ..Default::default()
            }),
            ..Default::default()
        }),
        memory_oom_control: MessageField::some(MemoryOomControl {
            oom_kill: memory.stats.get("events.oom_kill").copied().unwrap_or(0),
            ..Default::default()
        }),
        memory: MessageField::some(memory_stat(&memory, &used)),
        blkio: MessageField::some(BlkIOStat {
            io_service_bytes_recursive: io.io_service_bytes_recursive.iter().map(io_entry).collect(),
            io_serviced_recursive: io.io_serviced_recursive.iter().map(io_entry).collect(),
            ..Default::default()
        }),
        hugetlb: stats
            .cgroup_stats
            .get_or_default()
            .hugetlb_stats
            .iter()
            .map(|(size, stats)| HugetlbStat {
                usage: stats.usage,
                max: stats.max_usage,
                failcnt: stats.failcnt,
                pagesize: size.clone(),
                ..Default::default()
            })
            .collect(),
        network: stats.network_stats.iter().map(network).collect(),
        ..Default::default()
    }
}

fn memory_stat(memory: &agent::MemoryStats, used: &agent::MemoryData) -> MemoryStat {
    let get = |key: &str| memory.stats.get(key).copied().unwrap_or(0);
    let swap = memory.swap_usage.clone().unwrap_or_default();
    let limit = used.limit.min(UNLIMITED);
    MemoryStat {
        cache: get("file"),
        rss: get("anon"),
        rss_huge: get("anon_thp"),
        mapped_file: get("file_mapped"),
        dirty: get("file_dirty"),
        writeback: get("file_writeback"),
        pg_fault: get("pgfault"),
        pg_maj_fault: get("pgmajfault"),
        inactive_anon: get("inactive_anon"),
        active_anon: get("active_anon"),
        inactive_file: get("inactive_file"),
        active_file: get("active_file"),
        unevictable: get("unevictable"),
        hierarchical_memory_limit: limit,
        // Version 2 counts all that is below in the first place.
        total_cache: get("file"),
        total_rss: get("anon"),
        total_rss_huge: get("anon_thp"),
        total_mapped_file: get("file_mapped"),
        total_dirty: get("file_dirty"),
        total_writeback: get("file_writeback"),
        total_pg_fault: get("pgfault"),
        total_pg_maj_fault: get("pgmajfault"),
        total_inactive_anon: get("inactive_anon"),
        total_active_anon: get("active_anon"),
        total_inactive_file: get("inactive_file"),
        total_active_file: get("active_file"),
        total_unevictable: get("unevictable"),
        usage: MessageField::some(MemoryEntry {
            limit,
            usage: used.usage,
            max: used.max_usage,
            failcnt: used.failcnt,
            ..Default::default()
        }),
        swap: MessageField::some(MemoryEntry {
            limit: UNLIMITED,
            // Version 1 counts memory and swap together.
            usage: used.usage.saturating_add(swap.usage),
            ..Default::default()
        }),
        kernel: MessageField::some(MemoryEntry {
            limit: UNLIMITED,
            usage: get("kernel_stack") + get("slab"),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn io_entry(entry: &BlkioStatsEntry) -> BlkIOEntry {
    BlkIOEntry {
        op: entry.op.clone(),
        device: format!("{}:{}", entry.major, entry.minor),
        major: entry.major,
        minor: entry.minor,
        value: entry.value,
        ..Default::default()
    }
}

fn network(link: &agent::NetworkStats) -> NetworkStat {
    NetworkStat {
        name: link.name.clone(),
        rx_bytes: link.rx_bytes,
        rx_packets: link.rx_packets,
        rx_errors: link.rx_errors,
        rx_dropped: link.rx_dropped,
        tx_bytes: link.tx_bytes,
        tx_packets: link.tx_packets,
        tx_errors: link.tx_errors,
        tx_dropped: link.tx_dropped,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_twos_names_are_translated() {
        let metrics = convert(&super::super::tests::stats(5, 10));
        assert_eq!(metrics.cpu.usage.total, 5_000_000, "nanoseconds");
        assert_eq!((metrics.memory.rss, metrics.memory.total_inactive_file), (4096, 8192));
        assert_eq!((metrics.memory.usage.usage, metrics.memory.usage.limit), (10 << 20, UNLIMITED));
    }

    #[test]
    fn devices_and_links_are_named() {
        let entry = BlkioStatsEntry { major: 8, minor: 1, op: "Read".into(), value: 7, ..Default::default() };
        assert_eq!(io_entry(&entry).device, "8:1");
        let link = agent::NetworkStats { name: "eth0".into(), rx_bytes: 3, tx_bytes: 4, ..Default::default() };
        let stats = StatsContainerResponse { network_stats: vec![link], ..Default::default() };
        assert_eq!((convert(&stats).network[0].rx_bytes, convert(&stats).network[0].tx_bytes), (3, 4));
    }
}
