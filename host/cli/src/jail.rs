//! `coracle check --jail POD`: what each process of a pod may, and whether it is more than it needs.

use std::path::Path;

use anyhow::{Context, Result};
use coracle_process::{Bounds, CapabilitySet, Role, Running};
use coracle_protocol::management::Description;
use coracle_protocol::metrics::Process as Texts;
use serde::Serialize;

use crate::{place, pods, table};

/// A process, as the kernel describes it.
#[derive(Debug, Clone, Serialize)]
struct Process {
    role: &'static str,
    pid: u32,
    user: u64,
    /// Those that it has, or can have by a call: in hexadecimal as in `/proc/PID/status`, and by their names.
    capabilities: String,
    capability_names: Vec<String>,
    no_new_privileges: bool,
    /// 0 for none, 2 for a filter (proc(5)).
    seccomp: u64,
    /// Those that are not this command's.
    namespaces: Vec<&'static str>,
    open_files: usize,
    /// Of these, folders: each is a way to the files below it.
    open_folders: usize,
    /// What it has and needs not; empty where that is as it should be.
    excess: Vec<String>,
}

const NAMESPACES: [&str; 8] = ["mnt", "pid", "net", "ipc", "uts", "user", "cgroup", "time"];

/// The pod of this name, and its processes.
async fn of_pod(name: &str) -> Result<(Description, Vec<Process>)> {
    let (_, about) = pods::find(name).await?;
    let shim = Running::of(about.pid).with_context(|| format!("the shim of {} has ended", about.id))?;
    let mut found = Vec::new();
    look(&shim, &mut found)?;
    Ok((about, found))
}

/// The processes of the pod of this name: what each is, and its number.
pub(crate) async fn processes(name: &str) -> Result<Vec<(&'static str, u32)>> {
    Ok(of_pod(name).await?.1.into_iter().map(|process| (process.role, process.pid)).collect())
}

/// Looks at the pod of this name; whether nothing has too much.
pub(crate) async fn run(name: &str, as_json: bool) -> Result<bool> {
    let (about, found) = of_pod(name).await?;
    let mut missing = Vec::new();
    if !about.monitor.is_empty() && !found.iter().any(|process| process.role == Role::Monitor.name()) {
        missing.push(format!(
            "no process of {} was found that runs the machine: is it started by another name?",
            about.id
        ));
    }
    if !found.iter().any(|process| process.role == Role::Shim.name()) {
        missing.push(format!("{} is no shim's process", about.pid));
    }
    let is_fine = missing.is_empty() && found.iter().all(|process| process.excess.is_empty());
    if as_json {
        println!(
            "{}",
            serde_json::to_string_pretty(
                &serde_json::json!({ "ok": is_fine, "pod": about.id, "processes": found, "missing": missing })
            )?
        );
        return Ok(is_fine);
    }
    let rows: Vec<_> = found.iter().map(row).collect();
    table::print(["PROCESS", "PID", "USER", "CAPABILITIES", "SECCOMP", "NAMESPACES", "FILES", "STATE"], &rows);
    for missing in missing {
        println!("failing: {missing}");
    }
    for process in found {
        for excess in process.excess {
            println!("failing: {} ({}): {excess}", process.role, process.pid);
        }
    }
    Ok(is_fine)
}

fn row(process: &Process) -> [String; 8] {
    let many = process.capability_names.len();
    [
        process.role.to_owned(),
        process.pid.to_string(),
        process.user.to_string(),
        if many > 3 { format!("{many}") } else { process.capability_names.join(",") },
        if process.seccomp == 2 { "filter".into() } else { "none".into() },
        process.namespaces.join(","),
        process.open_files.to_string(),
        if process.excess.is_empty() { "ok".into() } else { "failing".into() },
    ]
}

/// The process and those below it that are of a pod.
fn look(running: &Running, found: &mut Vec<Process>) -> Result<()> {
    if let Some(role) = Role::of(&running.words) {
        // One that has ended meanwhile is none any more.
        found.extend(describe(running, role)?);
    }
    for child in running.children() {
        look(&child, found)?;
    }
    Ok(())
}

fn describe(running: &Running, role: Role) -> Result<Option<Process>> {
    let folder = &running.folder;
    let pid = folder.file_name().and_then(|pid| pid.to_str()?.parse().ok()).unwrap_or_default();
    let texts = Texts::of(folder);
    let number = |key: &str| texts.status(key).unwrap_or_default();
    let line =
        |key: &str| texts.status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default().trim().to_owned();
    // The real one, and three more.
    let Some(user) = line("Uid:").split_whitespace().next().and_then(|user| user.parse().ok()) else { return Ok(None) };
    // What it has, and what it can have by a call.
    let set = |key: &str| u64::from_str_radix(&line(key), 16).context("the capabilities of a process");
    let bits = set("CapEff:")? | set("CapPrm:")? | set("CapAmb:")?;
    let capabilities = CapabilitySet::from_bits_retain(bits);
    // One that hides from its own user, as passt does, is another's to look into.
    let files = std::fs::read_dir(folder.join("fd")).into_iter().flatten().flatten();
    let (mut open_files, mut open_folders) = (0, 0);
    for file in files {
        open_files += 1;
        open_folders += usize::from(std::fs::metadata(file.path()).is_ok_and(|data| data.is_dir()));
    }
    let mut process = Process {
        role: role.name(),
        pid,
        user,
        capabilities: format!("{bits:016x}"),
        capability_names: names(capabilities),
        no_new_privileges: number("NoNewPrivs") == 1,
        seccomp: least_filter(folder),
        namespaces: NAMESPACES.into_iter().filter(|name| differs(folder, name)).collect(),
        open_files,
        open_folders,
        excess: Vec::new(),
    };
    // virtiofsd leaves a process behind that only waits for the one in the sandbox, and has done nothing but start it.
    let waits = running.at_work() != *running;
    process.excess = excess(&process, capabilities, role.bounds(), role, waits);
    process.excess.extend(core(folder));
    Ok(Some(process))
}

/// Capabilities by their names.
fn names(capabilities: CapabilitySet) -> Vec<String> {
    capabilities.iter_names().map(|(name, _)| name.to_ascii_lowercase()).collect()
}

/// The least of its threads' modes of system call filters.
fn least_filter(folder: &Path) -> u64 {
    let threads = std::fs::read_dir(folder.join("task")).into_iter().flatten().flatten();
    let status = |thread: std::fs::DirEntry| std::fs::read_to_string(thread.path().join("status")).ok();
    let texts = threads.filter_map(status).map(|status| Texts { status, ..Texts::default() });
    texts.filter_map(|texts| texts.status("Seccomp")).min().unwrap_or_default()
}

/// Whether a namespace of the process is another than this command's.
fn differs(folder: &Path, name: &str) -> bool {
    let of = |folder: &Path| std::fs::read_link(folder.join("ns").join(name)).ok();
    of(folder) != of(Path::new("/proc/self"))
}

/// What there is beyond the bounds.
fn excess(process: &Process, capabilities: CapabilitySet, bounds: Bounds, role: Role, waits: bool) -> Vec<String> {
    let mut excess = Vec::new();
    let more = capabilities.difference(bounds.capabilities);
    // An ordinary user's shim has a user namespace, in which all of them are about nothing but its own.
    if !more.is_empty() && !process.namespaces.contains(&"user") {
        excess.push(format!("capabilities that it does not need: {}", names(more).join(", ")));
    }
    if !process.no_new_privileges {
        excess.push("programs that it starts may gain privileges".into());
    }
    if bounds.has_syscall_filter && process.seccomp != 2 && !waits {
        excess.push("no list of system calls".into());
    }
    if place::is_root() && bounds.is_other_user && process.user == 0 {
        excess.push("it runs as root (`qemu.jail`, `builtin.jail`)".into());
    }
    if place::is_root() && !waits {
        let missing: Vec<_> =
            bounds.namespaces.iter().filter(|name| !process.namespaces.contains(name)).copied().collect();
        if !missing.is_empty() {
            excess.push(format!("it is in the host's namespaces: {}", missing.join(", ")));
        }
    }
    if matches!(role, Role::Monitor | Role::Vsock) && process.open_folders > 0 {
        excess.push(format!("{} folders are open to it", process.open_folders));
    }
    excess
}

/// What of its memory a core file would have.
fn core(folder: &Path) -> Option<String> {
    let filter = std::fs::read_to_string(folder.join("coredump_filter")).ok()?;
    let is_none = u64::from_str_radix(filter.trim(), 16).is_ok_and(|filter| filter == 0);
    (!is_none).then(|| "its memory would be in a core file".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(change: impl FnOnce(&mut Process)) -> Process {
        let mut process = Process {
            role: "the monitor",
            pid: 1,
            user: 1000,
            capabilities: String::new(),
            capability_names: Vec::new(),
            no_new_privileges: true,
            seccomp: 2,
            namespaces: Role::Monitor.bounds().namespaces.to_vec(),
            open_files: 9,
            open_folders: 0,
            excess: Vec::new(),
        };
        change(&mut process);
        process
    }

    #[test]
    fn what_is_more_than_needed_is_said() {
        let none = CapabilitySet::empty();
        let found = |process: &Process, capabilities| {
            excess(process, capabilities, Role::Monitor.bounds(), Role::Monitor, false)
        };
        assert_eq!(found(&process(|_| {}), none), Vec::<String>::new());
        for (process, capabilities, word) in [
            (process(|_| {}), CapabilitySet::SYS_ADMIN, "sys_admin"),
            (process(|process| process.no_new_privileges = false), none, "may gain privileges"),
            (process(|process| process.seccomp = 0), none, "no list of system calls"),
            (process(|process| process.open_folders = 1), none, "1 folders"),
        ] {
            let found = found(&process, capabilities);
            assert!(found.len() == 1 && found[0].contains(word), "{word}: {found:?}");
        }
        // By an ordinary user nothing of the host's is lost with them.
        if place::is_root() {
            assert!(found(&process(|process| process.user = 0), none)[0].contains("root"));
            assert!(found(&process(|process| process.namespaces = vec!["mnt"]), none)[0].contains("pid, net"));
        }
    }
}
