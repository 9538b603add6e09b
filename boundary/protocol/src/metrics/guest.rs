//! What a guest says of itself: the names on which both sides agree, and to what the host holds it.

use super::{Bounds, Families, Family, Kind};

/// What a guest may say, of which kind, and what that is: it speaks of itself, and not in others' names.
const FAMILIES: [(&str, Kind, &str); 16] = [
    ("kata_agent_scrape_count", Kind::Counter, "How often the agent was asked for figures."),
    ("kata_agent_threads", Kind::Gauge, "Threads of the agent."),
    ("kata_agent_proc_stat", Kind::Gauge, "Processor time of the agent and of its children, in 10 ms."),
    (
        "kata_agent_proc_status",
        Kind::Gauge,
        "What /proc says of the agent: memory in bytes, switches between processes.",
    ),
    ("kata_agent_io_stat", Kind::Gauge, "What the agent has read and written, in bytes and calls."),
    ("kata_agent_process_resident_memory_bytes", Kind::Gauge, "Resident memory of the agent."),
    ("kata_agent_process_anonymous_memory_bytes", Kind::Gauge, "Anonymous memory of the agent."),
    ("coracle_agent_containers", Kind::Gauge, "Containers that the agent has."),
    ("coracle_guest_tsc_at_ready", Kind::Gauge, "Time stamp counter when the agent began to serve."),
    ("kata_guest_load", Kind::Gauge, "The guest's load over 1, 5 and 15 minutes."),
    ("kata_guest_tasks", Kind::Gauge, "The guest's tasks: that run, and all."),
    ("kata_guest_cpu_time", Kind::Gauge, "Processor time of the guest, in milliseconds."),
    ("kata_guest_meminfo", Kind::Gauge, "Memory of the guest, in bytes or in pages."),
    ("kata_guest_vm_stat", Kind::Gauge, "The guest's /proc/vmstat."),
    ("kata_guest_netdev_stat", Kind::Gauge, "Counts of the guest's links."),
    ("kata_guest_diskstat", Kind::Gauge, "Counts of the guest's disks; times in ms."),
];

/// To what the guest's text is held. Its samples are the most series that there can be of one guest, over all its life.
pub const GUEST: Bounds<'_> = Bounds {
    prefixes: &[],
    families: &FAMILIES,
    labels: &["item", "cpu", "disk", "interface"],
    reserved: &[],
    bytes: 512 << 10,
    samples: 4000,
};

impl Families {
    /// The family of a name that a guest may say; of another name the host takes nothing.
    pub fn of_guest(&mut self, name: &str) -> &mut Family {
        let known = FAMILIES.iter().find(|(known, ..)| *known == name);
        let (kind, help) = known.map_or((Kind::Gauge, ""), |(_, kind, help)| (*kind, *help));
        self.family(name, kind, help)
    }
}
