//! Where on the host a machine runs.

use coracle_machine::{Error, Result};
use serde_json::Value;

use crate::qmp;

/// Lets QEMU's threads run on these processors alone, and each of the machine's processors on one of them, in turn.
///
/// # Errors
/// [`Error::Invalid`] where the host has no such processor.
pub(crate) async fn pin(qemu: i32, control: &qmp::Client, cpus: &[u32]) -> Result<()> {
    if cpus.is_empty() {
        return Ok(());
    }
    on(qemu, cpus)?;
    let refused = refused(cpus);
    let own = processors(control).await?;
    // QEMU tells the numbers of its own namespace.
    let threads = coracle_process::threads_of(qemu).map_err(&refused)?;
    for (index, number) in own {
        let gone = || refused(std::io::Error::other(format!("it has no thread {number} any more")));
        let thread = *threads.get(&number).ok_or_else(gone)?;
        let own = cpus.get(index % cpus.len()).copied();
        coracle_process::run_thread_on(thread, own.as_slice()).map_err(&refused)?;
    }
    Ok(())
}

/// Lets QEMU's threads run on these processors, or on any; each of the machine's on one of its own where there are as many of both.
///
/// # Errors
/// As [`pin`].
pub(crate) async fn place(qemu: i32, control: &qmp::Client, cpus: &[u32]) -> Result<()> {
    if !cpus.is_empty() && processors(control).await?.len() == cpus.len() {
        return pin(qemu, control, cpus).await;
    }
    on(qemu, cpus)
}

fn on(qemu: i32, cpus: &[u32]) -> Result<()> {
    coracle_process::run_on(qemu, cpus).map_err(refused(cpus))
}

fn refused(cpus: &[u32]) -> impl Fn(std::io::Error) -> Error {
    move |error| {
        Error::Invalid(format!(
            "QEMU can't run on the processors {cpus:?} (`machine.host_cpus`, or a container's cpuset): {error}"
        ))
    }
}

/// The machine's processors: the number of each, and its thread.
async fn processors(control: &qmp::Client) -> Result<Vec<(usize, i32)>> {
    let all = control.execute("query-cpus-fast", Value::Null).await?;
    let of = |cpu: &Value| {
        let number = |name: &str| cpu.get(name).and_then(Value::as_i64);
        Some((usize::try_from(number("cpu-index")?).ok()?, i32::try_from(number("thread-id")?).ok()?))
    };
    Ok(all.as_array().into_iter().flatten().filter_map(of).collect())
}
