//! StatsContainer: what a container's cgroup has used, in the wire's form.

use std::collections::BTreeMap;
use std::sync::Arc;

use coracle_container::cgroup::Stats;
use coracle_protocol::agent::{
    BlkioStats, BlkioStatsEntry, CgroupStats, CpuStats, CpuUsage, MemoryData, MemoryStats, NetworkStats, PidsStats,
    StatsContainerRequest, StatsContainerResponse, ThrottlingData,
};
use coracle_protocol::protobuf::MessageField;

use crate::Result;
use crate::state::Agent;

/// Reads the figures.
pub(crate) async fn stats(agent: &Arc<Agent>, request: StatsContainerRequest) -> Result<StatsContainerResponse> {
    let stats = agent.container(&request.container_id)?.cgroup.stats();
    // The pod's: its containers share it.
    let links = std::fs::read_to_string("/proc/net/dev").unwrap_or_default();
    Ok(StatsContainerResponse {
        cgroup_stats: MessageField::some(to_wire(&stats)),
        network_stats: network(&links),
        ..Default::default()
    })
}

/// The links but loopback, from the kernel's table (proc(5), /proc/net/dev): received are bytes, packets, errors, dropped and four
/// others, then the same sent.
fn network(table: &str) -> Vec<NetworkStats> {
    let line = |line: &str| {
        let (name, counts) = line.split_once(':')?;
        let counts: Vec<u64> = counts.split_whitespace().map_while(|count| count.parse().ok()).collect();
        let &[rx_bytes, rx_packets, rx_errors, rx_dropped, _, _, _, _, tx_bytes, tx_packets, tx_errors, tx_dropped, ..] =
            counts.as_slice()
        else {
            return None;
        };
        Some(NetworkStats {
            name: name.trim().to_owned(),
            rx_bytes,
            rx_packets,
            rx_errors,
            rx_dropped,
            tx_bytes,
            tx_packets,
            tx_errors,
            tx_dropped,
            ..Default::default()
        })
    };
    table.lines().filter_map(line).filter(|link| link.name != "lo").collect()
}

fn to_wire(stats: &Stats) -> CgroupStats {
    CgroupStats {
        cpu_stats: MessageField::some(cpu(&stats.cpu)),
        memory_stats: MessageField::some(memory(stats)),
        pids_stats: MessageField::some(PidsStats {
            current: stats.pids,
            limit: stats.pids_limit,
            ..Default::default()
        }),
        blkio_stats: MessageField::some(blkio(&stats.io)),
        ..Default::default()
    }
}

/// The kernel counts microseconds, the wire nanoseconds.
fn cpu(counters: &BTreeMap<String, u64>) -> CpuStats {
    let get = |key: &str| counters.get(key).copied().unwrap_or(0);
    let nanoseconds = |key: &str| get(key).saturating_mul(1000);
    CpuStats {
        cpu_usage: MessageField::some(CpuUsage {
            total_usage: nanoseconds("usage_usec"),
            usage_in_kernelmode: nanoseconds("system_usec"),
            usage_in_usermode: nanoseconds("user_usec"),
            ..Default::default()
        }),
        throttling_data: MessageField::some(ThrottlingData {
            periods: get("nr_periods"),
            throttled_periods: get("nr_throttled"),
            throttled_time: nanoseconds("throttled_usec"),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn memory(stats: &Stats) -> MemoryStats {
    let mut table: std::collections::HashMap<String, u64> = stats.memory.clone().into_iter().collect();
    table.extend(stats.memory_events.iter().map(|(key, value)| (format!("events.{key}"), *value)));
    MemoryStats {
        cache: stats.memory.get("file").copied().unwrap_or(0),
        usage: MessageField::some(MemoryData {
            usage: stats.memory_usage,
            max_usage: stats.memory_peak,
            failcnt: stats.memory_events.get("max").copied().unwrap_or(0),
            limit: stats.memory_limit,
            ..Default::default()
        }),
        swap_usage: MessageField::some(MemoryData { usage: stats.swap_usage, ..Default::default() }),
        stats: table,
        ..Default::default()
    }
}

fn blkio(io: &BTreeMap<String, BTreeMap<String, u64>>) -> BlkioStats {
    let entries = |read: &str, write: &str| {
        io.iter()
            .flat_map(|(device, counters)| {
                let (major, minor) = device.split_once(':').unwrap_or(("0", "0"));
                let entry = move |op: &str, key: &str| BlkioStatsEntry {
                    major: major.parse().unwrap_or(0),
                    minor: minor.parse().unwrap_or(0),
                    op: op.into(),
                    value: counters.get(key).copied().unwrap_or(0),
                    ..Default::default()
                };
                [entry("Read", read), entry("Write", write)]
            })
            .collect::<Vec<_>>()
    };
    BlkioStats {
        io_service_bytes_recursive: entries("rbytes", "wbytes"),
        io_serviced_recursive: entries("rios", "wios"),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_counted_but_loopback() {
        let table = "Inter-|   Receive  |  Transmit\n face |bytes packets\n    lo: 9 9 0 0 0 0 0 0 9 9 0 0 0 0 0 0\n  \
            eth0: 1 2 3 4 0 0 0 0 5 6 7 8 0 0 0 0\n  bad: 1 2\n";
        let links = network(table);
        assert_eq!(links.len(), 1);
        let link = &links[0];
        assert_eq!(
            (link.name.as_str(), link.rx_bytes, link.rx_dropped, link.tx_bytes, link.tx_dropped),
            ("eth0", 1, 4, 5, 8)
        );
    }

    #[test]
    fn microseconds_become_nanoseconds() {
        let stats = Stats { cpu: [("usage_usec".to_owned(), 5)].into(), ..Default::default() };
        assert_eq!(to_wire(&stats).cpu_stats.cpu_usage.total_usage, 5000);
    }

    #[test]
    fn devices_keep_their_numbers() {
        let io = [("254:16".to_owned(), [("wbytes".to_owned(), 9)].into())].into();
        let entries = blkio(&io).io_service_bytes_recursive;
        assert_eq!((entries[1].major, entries[1].minor, entries[1].value), (254, 16, 9));
    }
}
