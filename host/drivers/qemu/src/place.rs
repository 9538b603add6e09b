//! Where on the host a machine runs.

use coracle_machine::{Error, Result};
use rustix::io::Errno;
use rustix::thread::{CpuSet, Pid, sched_setaffinity};
use serde_json::Value;

use crate::qmp;

/// Lets QEMU's threads run on these processors alone, and each of the machine's processors on one of them.
///
/// # Errors
/// [`Error::Invalid`] where the host has no such processor.
pub(crate) async fn pin(qemu: i32, control: &qmp::Client, cpus: &[u32]) -> Result<()> {
    if cpus.is_empty() {
        return Ok(());
    }
    let folder = format!("/proc/{qemu}/task");
    let threads = std::fs::read_dir(&folder).map_err(Error::system("list QEMU's threads"))?.flatten();
    // One that ends meanwhile runs nowhere.
    for thread in threads.filter_map(|thread| thread.file_name().to_str()?.parse().ok()) {
        set(thread, cpus, true)?;
    }
    let all = control.execute("query-cpus-fast", Value::Null).await?;
    for cpu in all.as_array().into_iter().flatten() {
        let number = |name: &str| cpu.get(name).and_then(Value::as_i64).and_then(|number| usize::try_from(number).ok());
        let (Some(index), Some(thread)) = (number("cpu-index"), number("thread-id")) else { continue };
        let own = cpus.get(index % cpus.len()).copied();
        set(i32::try_from(thread).unwrap_or_default(), own.as_slice(), false)?;
    }
    Ok(())
}

fn set(thread: i32, cpus: &[u32], may_be_gone: bool) -> Result<()> {
    let mut wanted = CpuSet::new();
    for cpu in cpus.iter().filter_map(|cpu| usize::try_from(*cpu).ok()).filter(|cpu| *cpu < CpuSet::MAX_CPU) {
        wanted.set(cpu);
    }
    match sched_setaffinity(Pid::from_raw(thread), &wanted) {
        Err(Errno::SRCH) if may_be_gone => Ok(()),
        other => other.map_err(|errno| {
            Error::Invalid(format!("QEMU can't run on the processors {cpus:?} (`machine.host_cpus`): {errno}"))
        }),
    }
}
