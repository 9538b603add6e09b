//! On which processors of the host a process runs.

use rustix::io::Errno;
use rustix::thread::{CpuSet, Pid, sched_setaffinity};

/// Lets all threads of a process run on these processors alone; on any where there are none. Threads that they start follow them.
///
/// # Errors
/// Where the host has none of these processors, or the process is gone.
pub fn run_on(process: i32, cpus: &[u32]) -> std::io::Result<()> {
    // Who starts a thread meanwhile has been told by the second time.
    for _ in 0..2 {
        for thread in std::fs::read_dir(format!("/proc/{process}/task"))?.flatten() {
            let Some(thread) = thread.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            match run_thread_on(thread, cpus) {
                // One that ends meanwhile runs nowhere.
                Err(error) if error.raw_os_error() != Some(Errno::SRCH.raw_os_error()) => return Err(error),
                _ => {}
            }
        }
    }
    Ok(())
}

/// The same for one thread.
///
/// # Errors
/// As [`run_on`].
pub fn run_thread_on(thread: i32, cpus: &[u32]) -> std::io::Result<()> {
    let mut wanted = CpuSet::new();
    let numbers = cpus.iter().filter_map(|cpu| usize::try_from(*cpu).ok()).filter(|cpu| *cpu < CpuSet::MAX_CPU);
    if cpus.is_empty() {
        (0..CpuSet::MAX_CPU).for_each(|cpu| wanted.set(cpu));
    } else {
        numbers.for_each(|cpu| wanted.set(cpu));
    }
    Ok(sched_setaffinity(Pid::from_raw(thread), &wanted)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(process: u32) -> String {
        let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
        status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim().to_owned()
    }

    #[test]
    fn a_process_runs_where_it_is_told() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let before = allowed(child.id());
        run_on(pid, &[0]).unwrap();
        assert_eq!(allowed(child.id()), "0");
        assert!(run_on(pid, &[1000]).is_err(), "one that the host has not");
        run_on(pid, &[]).unwrap();
        assert_eq!(allowed(child.id()), before);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(run_on(pid, &[0]).is_err());
    }
}
