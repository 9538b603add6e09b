//! Figures of the agent and of the guest, under Kata's names (Kata: docs/design/kata-2-0-metrics.md).

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use coracle_protocol::agent::{GetMetricsRequest, Metrics};
use coracle_protocol::metrics::{Families, Process, count_of, number, process};

use crate::Result;
use crate::state::Agent;

/// Fields of `/proc/stat` (proc(5)), in units of 10 ms; Kata's are in milliseconds.
const TIMES: [&str; 10] =
    ["user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guest_nice"];

/// Fields of `/proc/net/dev`.
const LINK: [&str; 16] = [
    "recv_bytes",
    "recv_packets",
    "recv_errs",
    "recv_drop",
    "recv_fifo",
    "recv_frame",
    "recv_compressed",
    "recv_multicast",
    "sent_bytes",
    "sent_packets",
    "sent_errs",
    "sent_drop",
    "sent_fifo",
    "sent_colls",
    "sent_carrier",
    "sent_compressed",
];

/// Fields of `/proc/diskstats` (Linux: admin-guide/iostats.rst).
const DISK: [&str; 11] = [
    "reads",
    "merged",
    "sectors_read",
    "time_reading",
    "writes",
    "writes_merged",
    "sectors_written",
    "time_writing",
    "in_progress",
    "time_in_progress",
    "weighted_time_in_progress",
];

/// The most processors, links and disks that are told apart.
const ROWS_MAX: usize = 64;

/// All figures, as the text of the exposition format.
pub(crate) async fn metrics(agent: &Arc<Agent>, _: GetMetricsRequest) -> Result<Metrics> {
    static SCRAPES: AtomicU64 = AtomicU64::new(0);
    let mut families = Families::default();
    let scrapes = SCRAPES.fetch_add(1, Ordering::Relaxed) + 1;
    families.of_guest("kata_agent_scrape_count").sample(&[], count_of(scrapes));
    own(&mut families, agent.all().len());
    guest(&mut families, Path::new("/proc"));
    Ok(Metrics { metrics: families.to_string(), ..Default::default() })
}

/// The agent's own.
fn own(families: &mut Families, containers: usize) {
    // Kata's agent says nothing of its open files.
    let own = Process { open_files: None, ..Process::of(Path::new("/proc/self")) };
    process(families, "kata_agent", "the agent", &own);
    for (name, value) in [
        ("kata_agent_process_resident_memory_bytes", own.status("VmRSS")),
        ("kata_agent_process_anonymous_memory_bytes", own.status("RssAnon")),
        ("coracle_agent_containers", Some(containers as u64)),
        ("coracle_guest_tsc_at_ready", crate::guest::ready_tsc()),
    ] {
        if let Some(value) = value {
            families.of_guest(name).sample(&[], count_of(value));
        }
    }
}

/// The guest's, from its `/proc`.
fn guest(families: &mut Families, proc: &Path) {
    let text = |name: &str| std::fs::read_to_string(proc.join(name)).unwrap_or_default();
    load(families, &text("loadavg"));
    times(families, &text("stat"));
    memory(families, &text("meminfo"));
    let family = families.of_guest("kata_guest_vm_stat");
    for (name, value) in text("vmstat").lines().filter_map(|line| line.split_once(' ')) {
        if let Ok(value) = value.parse() {
            family.sample(&[("item", name)], count_of(value));
        }
    }
    let family = families.of_guest("kata_guest_netdev_stat");
    let links = text("net/dev");
    for (name, values) in links.lines().filter_map(|line| line.split_once(':')).take(ROWS_MAX) {
        for (item, value) in LINK.iter().zip(values.split_whitespace()) {
            if let Ok(value) = value.parse() {
                family.sample(&[("interface", name.trim()), ("item", item)], count_of(value));
            }
        }
    }
    let family = families.of_guest("kata_guest_diskstat");
    for line in text("diskstats").lines().take(ROWS_MAX) {
        let mut words = line.split_whitespace().skip(2);
        let Some(name) = words.next() else { continue };
        for (item, value) in DISK.iter().zip(words) {
            if let Ok(value) = value.parse() {
                family.sample(&[("disk", name), ("item", item)], count_of(value));
            }
        }
    }
}

/// `/proc/loadavg`: three loads, and running and all tasks.
fn load(families: &mut Families, text: &str) {
    let mut words = text.split_whitespace();
    let family = families.of_guest("kata_guest_load");
    for item in ["load1", "load5", "load15"] {
        if let Some(value) = words.next().and_then(|word| word.parse().ok()) {
            family.sample(&[("item", item)], value);
        }
    }
    let Some((now, most)) = words.next().and_then(|tasks| tasks.split_once('/')) else { return };
    let family = families.of_guest("kata_guest_tasks");
    for (item, value) in [("cur", now), ("max", most)] {
        if let Ok(value) = value.parse() {
            family.sample(&[("item", item)], count_of(value));
        }
    }
}

/// Processor times in `/proc/stat`: of all, and of each.
fn times(families: &mut Families, text: &str) {
    let family = families.of_guest("kata_guest_cpu_time");
    for line in text.lines().filter_map(|line| line.strip_prefix("cpu")).take(ROWS_MAX) {
        let Some((number, values)) = line.split_once(' ') else { continue };
        let name = if number.is_empty() { "total" } else { number };
        for (item, value) in TIMES.iter().zip(values.split_whitespace()) {
            if let Ok(value) = value.parse::<u64>() {
                family.sample(&[("cpu", name), ("item", item)], count_of(value.saturating_mul(10)));
            }
        }
    }
}

/// `/proc/meminfo`, in bytes.
fn memory(families: &mut Families, text: &str) {
    let family = families.of_guest("kata_guest_meminfo");
    for (name, value) in text.lines().filter_map(|line| line.split_once(':')) {
        if let Some(value) = number(value) {
            family.sample(&[("item", &item(name))], count_of(value));
        }
    }
}

/// Names that Kata has by no rule.
const ITEMS: [(&str, &str); 7] = [
    ("AnonHugePages", "anon_hugepages"),
    ("ShmemHugePages", "shmem_hugepages"),
    ("DirectMap4k", "direct_map_4k"),
    ("DirectMap2M", "direct_map_2M"),
    ("DirectMap4M", "direct_map_4M"),
    ("DirectMap1G", "direct_map_1G"),
    ("Percpu", "per_cpu"),
];

/// A name of `/proc/meminfo` as Kata has it: `MemTotal` is `mem_total`, `SReclaimable` `s_reclaimable`, `HugePages_Free` `hugepages_free`.
fn item(name: &str) -> String {
    if let Some((_, item)) = ITEMS.iter().find(|(known, _)| *known == name) {
        return (*item).to_owned();
    }
    let name = name.replace("HugePages_", "hugepages_").replace('(', "_").replace(')', "");
    let mut item = String::new();
    let (mut before, mut letters) = ('_', name.chars().peekable());
    while let Some(c) = letters.next() {
        let begins_word = before.is_ascii_lowercase()
            || before.is_ascii_uppercase() && letters.peek().is_some_and(char::is_ascii_lowercase);
        if c.is_ascii_uppercase() && begins_word {
            item.push('_');
        }
        before = c;
        item.push(c.to_ascii_lowercase());
    }
    item
}

#[cfg(test)]
mod tests {
    use coracle_protocol::metrics::{GUEST, read};

    use super::*;

    #[test]
    fn figures_have_katas_names() {
        for (name, expected) in [
            ("MemTotal", "mem_total"),
            ("Active(anon)", "active_anon"),
            ("HugePages_Free", "hugepages_free"),
            ("SwapCached", "swap_cached"),
            ("SReclaimable", "s_reclaimable"),
            ("AnonHugePages", "anon_hugepages"),
            ("NFS_Unstable", "nfs_unstable"),
            ("DirectMap4k", "direct_map_4k"),
            ("Committed_AS", "committed_as"),
        ] {
            assert_eq!(item(name), expected);
        }
        let mut families = Families::default();
        load(&mut families, "0.25 0.5 1 2/77 900\n");
        times(&mut families, "cpu  1 2 3 4\ncpu0 5 6 7 8\nintr 9\n");
        memory(&mut families, "MemFree:  2 kB\nHugePages_Total:  3\n");
        for (name, labels, value) in [
            ("load", "item=\"load5\"", 0.5),
            ("tasks", "item=\"max\"", 77.0),
            ("cpu_time", "cpu=\"total\",item=\"system\"", 30.0),
            ("cpu_time", "cpu=\"0\",item=\"idle\"", 80.0),
            ("meminfo", "item=\"mem_free\"", 2048.0),
            ("meminfo", "item=\"hugepages_total\"", 3.0),
        ] {
            assert_eq!(families.value(&format!("kata_guest_{name}"), labels), Some(value), "{families}");
        }
    }

    #[test]
    fn the_host_takes_all_of_it() {
        let mut families = Families::default();
        own(&mut families, 2);
        guest(&mut families, Path::new("/proc"));
        let text = families.to_string();
        for family in ["agent_threads", "guest_vm_stat", "guest_netdev_stat", "guest_meminfo"] {
            assert!(text.contains(&format!("# TYPE kata_{family} gauge")), "{family}: {text}");
        }
        assert_eq!(read(&text, &GUEST).refused, 0, "{text}");
    }
}
