//! The size of a pod's machine: what the machine itself takes, and what its containers may use together. It follows them.

use std::sync::Arc;

use coracle_protocol::agent::OnlineCPUMemRequest;
use coracle_protocol::agent_ttrpc::AgentServiceClient;
use coracle_protocol::oci;

use crate::agent::Patience;
use crate::pod::Pod;
use crate::state::State;
use crate::to_its_end::to_its_end;
use crate::{Error, Result, Sandbox};

/// What a container may use; 0 is as much as there is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Thousandths of a processor.
    cpu_milli: u64,
    memory_bytes: u64,
    /// In huge pages of the guest, beside the rest.
    huge_bytes: u64,
    /// Processors of the host (`cpuset`); none is all.
    host_cpus: Vec<u32>,
    /// Of the guest's swap.
    swap_bytes: u64,
}

/// The kernel's period for a quota of processor time, in microseconds.
const PERIOD: u64 = 100_000;

impl Limits {
    /// Those of a specification.
    pub(crate) fn of(spec: &oci::Spec) -> Self {
        let resources = spec.Linux.as_ref().and_then(|linux| linux.Resources.as_ref());
        resources.map_or_else(Self::default, |resources| Self::default().changed(resources))
    }

    /// With so much swap.
    pub(crate) fn with_swap(self, swap_bytes: u64) -> Self {
        Self { swap_bytes, ..self }
    }

    /// The swap that it may use, in bytes.
    pub(crate) fn swap_bytes(&self) -> u64 {
        self.swap_bytes
    }

    /// With what `resources` names; what it does not name stays.
    pub(crate) fn changed(&self, resources: &oci::LinuxResources) -> Self {
        let cpu = resources.CPU.as_ref().filter(|cpu| cpu.Quota != 0).map(|cpu| {
            let period = if cpu.Period == 0 { PERIOD } else { cpu.Period };
            // Below 0 it is none.
            u64::try_from(cpu.Quota).unwrap_or(0).saturating_mul(1000).div_ceil(period)
        });
        let memory = resources.Memory.as_ref().map(|memory| memory.Limit).filter(|limit| *limit != 0);
        let huge = resources.HugepageLimits.iter().map(|limit| limit.Limit).reduce(u64::saturating_add);
        Self {
            cpu_milli: cpu.unwrap_or(self.cpu_milli),
            memory_bytes: memory.map_or(self.memory_bytes, |limit| u64::try_from(limit).unwrap_or(0)),
            huge_bytes: huge.unwrap_or(self.huge_bytes),
            swap_bytes: self.swap_bytes,
            // What is no list was refused before.
            host_cpus: resources
                .CPU
                .as_ref()
                .filter(|cpu| !cpu.Cpus.is_empty())
                .map_or_else(|| self.host_cpus.clone(), |cpu| processors(&cpu.Cpus).unwrap_or_default()),
        }
    }
}

/// A list of processors as the kernel writes it (cpuset(7), "List format"): `0-3,8`. None where it is no list.
fn processors(text: &str) -> Option<Vec<u32>> {
    let mut all = std::collections::BTreeSet::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if first > last || last >= HOST_CPUS_MAX {
            return None;
        }
        all.extend(first..=last);
    }
    Some(all.into_iter().collect())
}

/// The most processors of a host (Linux: `CPU_SETSIZE`).
const HOST_CPUS_MAX: u32 = 1024;

/// The processors of the host on which a machine for these containers runs: those that all of them together may use, and any where one
/// of them may use all.
fn host_cpus(containers: &[Limits]) -> Vec<u32> {
    if containers.iter().any(|limits| limits.host_cpus.is_empty()) {
        return Vec::new();
    }
    let all: std::collections::BTreeSet<u32> =
        containers.iter().flat_map(|limits| &limits.host_cpus).copied().collect();
    all.into_iter().collect()
}

/// A machine's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) cpus: u32,
    pub(crate) memory_mib: u64,
}

/// Between which sizes a machine can be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Range {
    /// What it has where no container asks for anything.
    pub(crate) base: Size,
    /// What it has from its start.
    pub(crate) least: Size,
    /// What it has at most.
    pub(crate) most: Size,
}

/// The size for containers with these limits, before what the machine can be.
fn asked(range: &Range, containers: &[Limits]) -> Size {
    let sum = |each: fn(&Limits) -> u64| containers.iter().map(each).fold(0, u64::saturating_add);
    let cpus = u32::try_from(sum(|limits| limits.cpu_milli).div_ceil(1000)).unwrap_or(u32::MAX);
    let memory_mib = sum(|limits| limits.memory_bytes.saturating_add(limits.huge_bytes)).div_ceil(1 << 20);
    Size { cpus: cpus.max(range.base.cpus), memory_mib: range.base.memory_mib.saturating_add(memory_mib) }
}

/// The nearest that the machine can be.
fn within(range: &Range, size: Size) -> Size {
    Size {
        cpus: size.cpus.clamp(range.least.cpus, range.most.cpus),
        memory_mib: size.memory_mib.clamp(range.least.memory_mib, range.most.memory_mib),
    }
}

/// Whether more is asked for than the machine can have.
fn is_beyond(range: &Range, size: Size) -> bool {
    size.cpus > range.most.cpus || size.memory_mib > range.most.memory_mib
}

/// Limits that a container is to have, and has not yet.
pub(crate) type Proposed = (String, Limits);

/// Gives the pod's machine the size that its containers ask for, as far as it can have it, by itself: nobody waits for that. Nothing is
/// done where it can't change.
pub(crate) fn fit(sandbox: &Sandbox, pod: &Arc<Pod>) {
    let (sandbox, pod) = (sandbox.clone(), Arc::clone(pod));
    tokio::spawn(async move {
        if let Err(error) = change(&sandbox, &pod, None, false).await {
            log::warn!("the pod's machine keeps its size: {error}");
        }
    });
}

/// Gives the machine what its containers ask for, with limits that are only proposed, and takes nothing away: what still uses it has
/// to be told first. Whoever stops waiting does not stop it.
pub(crate) async fn grow(sandbox: &Sandbox, pod: &Arc<Pod>, proposed: Option<Proposed>) -> Result<()> {
    let (sandbox, pod) = (sandbox.clone(), Arc::clone(pod));
    to_its_end(async move { change(&sandbox, &pod, proposed, true).await }).await
}

async fn change(sandbox: &Sandbox, pod: &Pod, proposed: Option<Proposed>, only_more: bool) -> Result<()> {
    let mut size = pod.size.lock().await;
    // Looked at only now: whoever changed it meanwhile has had its turn.
    let containers = containers(sandbox, proposed).await?;
    resize(pod, &mut size, &containers, only_more).await?;
    let cpus = size.map(|size| size.cpus);
    place(pod, Place { host_cpus: host_cpus(&containers), cpus }).await
}

/// Where a machine runs: on which processors of the host, none is any, and how many of its own that was told of.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Place {
    host_cpus: Vec<u32>,
    cpus: Option<u32>,
}

/// Lets the machine run where its containers may. One that can't be told runs where it does.
async fn place(pod: &Pod, wanted: Place) -> Result<()> {
    let mut placed = pod.placed.lock().await;
    let was_anywhere = placed.as_ref().is_some_and(|placed| placed.host_cpus.is_empty());
    if placed.as_ref() == Some(&wanted) || was_anywhere && wanted.host_cpus.is_empty() {
        return Ok(());
    }
    // Until it is through nobody knows where it runs.
    *placed = None;
    match pod.machine.place(wanted.host_cpus.clone()).await {
        Err(coracle_machine::Error::Unsupported(what)) => log::info!("the pod's machine runs where it did: {what}"),
        outcome => outcome?,
    }
    *placed = Some(wanted);
    Ok(())
}

/// Refuses a list of processors that is none.
pub(crate) fn check_host_cpus(resources: &oci::LinuxResources) -> Result<()> {
    let cpus = resources.CPU.as_ref().map(|cpu| cpu.Cpus.as_str()).unwrap_or_default();
    if cpus.is_empty() || processors(cpus).is_some() {
        return Ok(());
    }
    Err(Error::Invalid(format!("{} is no list of processors (cpuset)", cpus.escape_default())))
}

async fn resize(pod: &Pod, size: &mut Option<Size>, containers: &[Limits], only_more: bool) -> Result<()> {
    let Some(range) = &pod.range else { return Ok(()) };
    let asked = asked(range, containers);
    if is_beyond(range, asked) {
        log::warn!(
            "the pod's containers may use {} processors and {} MiB together, and its machine can have {} and {} at most \
             (`machine.max_vcpus`, `machine.max_memory_mib`)",
            asked.cpus,
            asked.memory_mib,
            range.most.cpus,
            range.most.memory_mib
        );
    }
    let mut wanted = within(range, asked);
    if let Some(now) = size.filter(|_| only_more) {
        wanted = Size { cpus: wanted.cpus.max(now.cpus), memory_mib: wanted.memory_mib.max(now.memory_mib) };
    }
    if *size == Some(wanted) {
        return Ok(());
    }
    // Until it is through nobody knows what there is.
    let before = size.take();
    pod.machine.resize(wanted.cpus, wanted.memory_mib).await?;
    let stats = pod.machine.stats().await?;
    if before.is_none_or(|before| stats.cpus > before.cpus) {
        let request = OnlineCPUMemRequest { wait: true, nb_cpus: stats.cpus, cpu_only: true, ..Default::default() };
        let online = async |agent: &AgentServiceClient, ctx| agent.online_cpu_mem(ctx, &request).await;
        pod.agent.call("OnlineCPUMem", Patience::Bounded, online).await?;
    }
    // Memory that the guest has not given yet it gives by itself when it can: it is not asked again.
    *size = Some(Size { cpus: stats.cpus, memory_mib: wanted.memory_mib });
    let found = Size { cpus: stats.cpus, memory_mib: stats.memory_bytes >> 20 };
    if found != wanted {
        log::info!(
            "the pod's machine has {found:?}, and was to have {wanted:?}: its guest has not taken, or given, all"
        );
    }
    Ok(())
}

/// The limits of all containers, those that are proposed for one in the place of its own.
async fn containers(sandbox: &Sandbox, proposed: Option<Proposed>) -> Result<Vec<Limits>> {
    let of = move |id: &String, limits: &Limits| match &proposed {
        Some((name, proposed)) if name == id => proposed.clone(),
        _ => limits.clone(),
    };
    // What stands for the pod has no limits, and runs nothing.
    let all = move |state: &mut State| {
        let containers = state.containers.iter().filter(|(_, container)| !container.is_pod);
        containers.map(|(id, container)| of(id, &container.limits)).collect()
    };
    sandbox.ask(all).await
}

/// The swap that all containers ask for together.
pub(crate) async fn swap_bytes(sandbox: &Sandbox) -> Result<u64> {
    let all = containers(sandbox, None).await?;
    Ok(all.iter().map(|limits| limits.swap_bytes).fold(0, u64::saturating_add))
}

/// Refuses limits by which a container would get more, and more than the machine of the pod can ever have.
pub(crate) async fn check(sandbox: &Sandbox, pod: &Pod, proposed: Proposed) -> Result<()> {
    let Some(range) = &pod.range else { return Ok(()) };
    let before = asked(range, &containers(sandbox, None).await?);
    let after = asked(range, &containers(sandbox, Some(proposed)).await?);
    if !raises_beyond(range, before, after) {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "the containers of the pod would be allowed {} processors and {} MiB together, and its machine can have {} and {} at most \
         (`machine.max_vcpus`, `machine.max_memory_mib`, and what the host has)",
        after.cpus, after.memory_mib, range.most.cpus, range.most.memory_mib
    )))
}

fn raises_beyond(range: &Range, before: Size, after: Size) -> bool {
    let (most, raised) = (&range.most, |before: u64, after: u64, most: u64| after > before && after > most);
    raised(before.cpus.into(), after.cpus.into(), most.cpus.into())
        || raised(before.memory_mib, after.memory_mib, most.memory_mib)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGE: Range = Range {
        base: Size { cpus: 1, memory_mib: 256 },
        least: Size { cpus: 2, memory_mib: 512 },
        most: Size { cpus: 4, memory_mib: 4096 },
    };

    fn limits(cpu_milli: u64, memory_mib: u64) -> Limits {
        Limits { cpu_milli, memory_bytes: memory_mib << 20, ..Limits::default() }
    }

    fn wanted(containers: &[Limits]) -> (u32, u64) {
        let size = within(&RANGE, asked(&RANGE, containers));
        (size.cpus, size.memory_mib)
    }

    #[test]
    fn a_machine_follows_its_containers_between_its_ends() {
        assert_eq!(wanted(&[]), (2, 512), "not below what it has from its start");
        // Halves of processors come together before they are rounded.
        assert_eq!(wanted(&[limits(1500, 300), limits(1500, 300)]), (3, 856));
        assert_eq!(wanted(&[limits(0, 0), limits(2100, 1)]), (3, 512));
        assert_eq!(wanted(&[limits(64_000, 1 << 20)]), (4, 4096), "not above what it has at most");
        assert_eq!(wanted(&[limits(u64::MAX, u64::MAX >> 20), limits(u64::MAX, u64::MAX >> 20)]), (4, 4096));
        assert!(is_beyond(&RANGE, asked(&RANGE, &[limits(4001, 0)])));
        assert!(is_beyond(&RANGE, asked(&RANGE, &[limits(0, 3841)])));
        assert!(!is_beyond(&RANGE, asked(&RANGE, &[limits(4000, 3840)])));
    }

    #[test]
    fn every_sum_of_limits_is_within_and_more_limits_never_ask_for_less() {
        // All pairs of a set that has the ends of every range.
        let edges = [0, 1, 999, 1000, 1001, 4000, 1 << 20, u64::MAX >> 21];
        let all: Vec<Limits> = edges.iter().flat_map(|cpu| edges.iter().map(|memory| limits(*cpu, *memory))).collect();
        for one in &all {
            let alone = wanted(std::slice::from_ref(one));
            for other in &all {
                let both = wanted(&[one.clone(), other.clone()]);
                assert!((2..=4).contains(&both.0) && (512..=4096).contains(&both.1));
                assert!(both.0 >= alone.0 && both.1 >= alone.1, "{one:?} {other:?}");
                assert_eq!(both, wanted(&[other.clone(), one.clone()]), "the order does not count");
            }
        }
    }

    #[test]
    fn a_machine_runs_where_all_its_containers_may() {
        let of = |text: &str| Limits { host_cpus: processors(text).unwrap_or_default(), ..Limits::default() };
        assert_eq!(host_cpus(&[of("2-3"), of("5,2")]), [2, 3, 5]);
        assert!(host_cpus(&[of("2-3"), of("")]).is_empty(), "one of them may run anywhere");
        assert!(host_cpus(&[]).is_empty());
        for text in ["", "x", "3-1", "0-5000", "1,,2", "-1"] {
            assert_eq!(processors(text), None, "{text}");
        }
    }

    #[test]
    fn only_what_asks_for_more_is_refused() {
        let refused = |before: Limits, after: Limits| {
            let others = limits(3500, 4000);
            raises_beyond(&RANGE, asked(&RANGE, &[others.clone(), before]), asked(&RANGE, &[others, after]))
        };
        // The pod has more than its machine can have already: a create may.
        assert!(!refused(limits(1500, 100), limits(1500, 100)));
        assert!(!refused(limits(1500, 100), limits(1200, 50)));
        assert!(!refused(limits(1500, 100), limits(0, 0)));
        assert!(refused(limits(1500, 100), limits(2600, 100)));
        assert!(refused(limits(1500, 100), limits(100, 101)));
        assert!(refused(limits(0, 0), limits(0, 8000)));
    }

    #[test]
    fn an_update_changes_what_it_names() {
        let resources = |json: &str| coracle_protocol::from_json::<oci::LinuxResources>(json).unwrap();
        let first = Limits::default().changed(&resources(r#"{"cpu":{"quota":150000},"memory":{"limit":1048576}}"#));
        assert_eq!(first, limits(1500, 1));
        assert_eq!(first.changed(&resources(r#"{"memory":{"limit":2097152}}"#)), limits(1500, 2));
        assert_eq!(first.changed(&resources(r#"{"cpu":{"quota":50000,"period":200000}}"#)), limits(250, 1));
        assert_eq!(first.changed(&resources(r#"{"cpu":{"quota":-1},"memory":{"limit":-1}}"#)), Limits::default());
    }
}
