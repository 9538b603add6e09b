//! The pod's figures: of the shim, of the processes that run the machine, of the machine, and what the guest says of itself.

use std::path::Path;

use coracle_process::Role;
use coracle_protocol::metrics::{Families, Kind, Process, count_of, process};

use crate::shim::Shim;
use crate::trace;

/// Reads all of them.
pub(crate) async fn collect(shim: &Shim) -> Families {
    let mut families = Families::default();
    process(&mut families, prefix(Role::Shim), Role::Shim.name(), &Process::of(Path::new("/proc/self")));
    for running in coracle_process::children() {
        // One that is starting has the shim's own words still.
        if let Some(role) = Role::of(&running.words).filter(|role| *role != Role::Shim) {
            process(&mut families, prefix(role), role.name(), &Process::of(&running.at_work().folder));
        }
    }
    let since = shim.started.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let help = "When the shim has started, in seconds since 1970.";
    families.figure("coracle_shim_start_time_seconds", Kind::Gauge, help, since.as_secs_f64());
    shim.latencies.figures(&mut families);
    shim.counts.figures(&mut families);
    if let Some(lost) = trace::lost() {
        let help = "Spans that the collector has not taken.";
        families.figure("coracle_spans_lost_total", Kind::Counter, help, count_of(lost));
    }
    let Ok(sandbox) = shim.sandbox() else { return families };
    if let Ok(containers) = sandbox.containers().await {
        let count = count_of(containers.len() as u64);
        families.figure("coracle_pod_containers", Kind::Gauge, "Containers of the pod.", count);
    }
    let figures = sandbox.figures().await.ok();
    families.figure(
        "coracle_machine_up",
        Kind::Gauge,
        "Whether the pod's machine runs.",
        f64::from(u8::from(figures.is_some())),
    );
    let Some(figures) = figures else { return families };
    if let Some(machine) = figures.machine {
        for (name, help, value) in [
            ("coracle_machine_memory_bytes", "Memory that the guest has.", machine.memory_bytes),
            ("coracle_machine_balloon_bytes", "Of it, what the guest has left to the host.", machine.balloon_bytes),
            ("coracle_machine_cpus", "Processors that the guest has.", machine.cpus.into()),
        ] {
            families.figure(name, Kind::Gauge, help, count_of(value));
        }
        let counts = families.family("coracle_monitor_events", Kind::Counter, "What the monitor counts by itself.");
        for (event, count) in &machine.monitor {
            counts.sample(&[("event", event)], count_of(*count));
        }
    }
    let help = "Whether the guest's agent has answered.";
    families.figure("coracle_agent_up", Kind::Gauge, help, f64::from(u8::from(figures.guest.is_some())));
    if let Some(guest) = figures.guest {
        let help = "Lines of the guest's figures that were not what they may be.";
        families.figure("coracle_guest_figures_refused", Kind::Gauge, help, count_of(guest.refused as u64));
        // Last, and only names of its own: what is ours is not the guest's to say.
        families.merge(guest.families);
    }
    families
}

/// Under which names a child's figures are: Kata's for what Kata has, too.
fn prefix(role: Role) -> &'static str {
    match role {
        Role::Monitor | Role::Qemu => "kata_hypervisor",
        Role::Virtiofsd => "kata_virtiofsd",
        Role::Passt => "coracle_passt",
        Role::Vsock => "coracle_vsock",
        Role::Shim => "kata_shim",
    }
}
