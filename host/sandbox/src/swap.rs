//! Swap for the guest, as Kata's annotations ask for it: a disk of the machine. Its file has no name any more once the machine has it, and
//! goes with the machine.

use std::fs::{DirBuilder, File};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use coracle_machine::Device;
use coracle_protocol::agent::AddSwapRequest;
use coracle_protocol::oci;

use crate::agent::Patience;
use crate::pod::Pod;
use crate::to_its_end::to_its_end;
use crate::{Error, Result, Sandbox, size};

/// The annotations of a container (Kata Containers: docs/how-to/how-to-setup-swap-devices-in-guest-kernel.md).
const SWAPPINESS: &str = "io.katacontainers.container.resource.swappiness";
const SWAP_IN_BYTES: &str = "io.katacontainers.container.resource.swap_in_bytes";

/// The swap that a container asks for, in bytes: what it may have of memory and swap together, less its limit of memory. Without the
/// first as much as its limit, without both `base_bytes`. 0 where it asks for none.
///
/// # Errors
/// [`Error::Invalid`] for what is no number.
pub(crate) fn wanted(spec: &oci::Spec, base_bytes: u64) -> Result<u64> {
    let number = |name: &str| {
        let text = spec.Annotations.get(name);
        text.map(|text| {
            text.trim().parse::<u64>().map_err(|_| Error::Invalid(format!("the annotation {name} is no number")))
        })
        .transpose()
    };
    let (swappiness, together) = (number(SWAPPINESS)?, number(SWAP_IN_BYTES)?);
    if swappiness.is_none_or(|swappiness| swappiness == 0) {
        return Ok(0);
    }
    let resources = spec.Linux.as_ref().and_then(|linux| linux.Resources.as_ref());
    let limit =
        resources.and_then(|resources| u64::try_from(resources.Memory.as_ref()?.Limit).ok()).filter(|limit| *limit > 0);
    let bytes = match (together, limit) {
        (Some(together), Some(limit)) => together.saturating_sub(limit),
        (Some(together), None) => together,
        (None, Some(limit)) => limit,
        (None, None) => base_bytes,
    };
    if bytes > SWAP_BYTES_MAX {
        return Err(Error::Invalid(format!(
            "{bytes} bytes of swap, and {SWAP_BYTES_MAX} are the most that a container can have"
        )));
    }
    // Whole pages.
    Ok(bytes.next_multiple_of(PAGE))
}

/// The most swap of one container: 1 TiB.
const SWAP_BYTES_MAX: u64 = 1 << 40;

/// Lets a container use so much of the guest's swap, where `resources` limits its memory; otherwise nothing limits its swap.
pub(crate) fn allow(resources: Option<&mut oci::LinuxResources>, bytes: u64) {
    let memory = resources.and_then(|resources| resources.Memory.as_mut());
    let Some(memory) = memory.filter(|memory| memory.Limit > 0) else { return };
    // OCI's figure is memory and swap together.
    memory.Swap = memory.Limit.saturating_add(i64::try_from(bytes).unwrap_or(i64::MAX));
}

/// Gives the guest what its containers ask for together, and it has not yet. What it has it keeps. Whoever stops waiting does not stop
/// it: halfway nobody would know of the disk.
pub(crate) async fn grow(sandbox: &Sandbox, pod: &Arc<Pod>) -> Result<()> {
    let Some(folder) = sandbox.config.swap_folder.clone() else { return Ok(()) };
    let (sandbox, pod) = (sandbox.clone(), Arc::clone(pod));
    to_its_end(async move {
        let mut has = pod.swap_bytes.lock().await;
        let more = size::swap_bytes(&sandbox).await?.saturating_sub(*has);
        if more > 0 {
            add(&pod, folder, more).await?;
            *has += more;
        }
        Ok(())
    })
    .await
}

async fn add(pod: &Pod, folder: PathBuf, bytes: u64) -> Result<()> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let name = format!("{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
    let made = tokio::task::spawn_blocking(move || make(&folder, &name, bytes)).await;
    let path = made.map_err(|error| Error::Failed(error.to_string()))??;
    let serial = coracle_storage::serial(&path);
    let disk = Device::Block { serial, path: path.clone(), read_only: false, direct: false };
    let attached = pod.machine.attach(disk.clone()).await;
    // The machine has it open, or nobody.
    if let Err(error) = std::fs::remove_file(&path) {
        log::warn!("{} stays: {error}", path.display());
    }
    let swapped = swap_on(pod, attached?).await;
    if swapped.is_err()
        && let Err(error) = pod.machine.detach(disk).await
    {
        log::warn!("a disk for swap stays in the machine: {error}");
    }
    swapped
}

/// Has the guest swap on the disk at a place.
async fn swap_on(pod: &Pod, place: Option<String>) -> Result<()> {
    let place =
        place.ok_or_else(|| Error::Unsupported("swap on a machine whose disks have no place on a bus".into()))?;
    let slots: std::result::Result<Vec<u32>, _> = place.split('/').map(|slot| u32::from_str_radix(slot, 16)).collect();
    let slots = slots.map_err(|_| Error::Failed(format!("{place} is no place on a bus")))?;
    let request = AddSwapRequest { PCIPath: slots, ..Default::default() };
    pod.agent.call("AddSwap", Patience::Bounded, async |agent, ctx| agent.add_swap(ctx, &request).await).await.map(drop)
}

/// The unit of swap, in bytes.
const PAGE: u64 = 4096;

/// Makes a file with swap of so many bytes beside its first page (Linux: `union swap_header` in include/linux/swap.h). What a guest
/// swaps is nobody else's to read.
fn make(folder: &Path, name: &str, bytes: u64) -> Result<PathBuf> {
    let path = folder.join(name);
    let failed = |error: std::io::Error| Error::Failed(format!("make {}: {error}", path.display()));
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
    // One that a killed process of this number has left.
    let _ = std::fs::remove_file(&path);
    let write = |file: File| {
        let pages = bytes.div_ceil(PAGE);
        let last = u32::try_from(pages).map_err(std::io::Error::other)?;
        file.set_len((pages + 1) * PAGE)?;
        // The version, the number of the last page, and no bad ones.
        file.write_all_at(&[1_u32.to_ne_bytes(), last.to_ne_bytes(), 0_u32.to_ne_bytes()].concat(), 1024)?;
        file.write_all_at(b"SWAPSPACE2", PAGE - 10)
    };
    let made = File::options().write(true).create_new(true).mode(0o600).open(&path).and_then(write);
    match made {
        Ok(()) => Ok(path),
        Err(error) => {
            let _ = std::fs::remove_file(&path);
            Err(failed(error))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted_by(annotations: &[(&str, &str)], limit: &str) -> Result<u64> {
        let spec: oci::Spec =
            coracle_protocol::from_json(&format!(r#"{{"linux":{{"resources":{{"memory":{{{limit}}}}}}}}}"#)).unwrap();
        let annotations = annotations.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        wanted(&oci::Spec { Annotations: annotations, ..spec }, 7)
    }

    #[test]
    fn swap_is_what_kata_gives() {
        let (limited, free) = (r#""limit":1048576"#, "");
        let (on, both) = ((SWAPPINESS, "60"), (SWAP_IN_BYTES, "3145728"));
        assert_eq!(wanted_by(&[on, both], limited).unwrap(), 2 << 20);
        assert_eq!(wanted_by(&[on], limited).unwrap(), 1 << 20);
        assert_eq!(wanted_by(&[on, both], free).unwrap(), 3 << 20);
        assert_eq!(wanted_by(&[on], free).unwrap(), 4096);
        assert_eq!(wanted_by(&[both], limited).unwrap(), 0);
        assert_eq!(wanted_by(&[(SWAPPINESS, "0"), both], limited).unwrap(), 0);
        assert!(matches!(wanted_by(&[on, (SWAP_IN_BYTES, "1G")], limited), Err(Error::Invalid(_))));
        let huge = [on, (SWAP_IN_BYTES, "18446744073709551615")];
        assert!(matches!(wanted_by(&huge, free), Err(Error::Invalid(_))), "more than a kernel can address");
    }

    #[test]
    fn a_file_of_swap_is_one_to_the_kernels_tools() {
        let folder = tempfile::tempdir().unwrap();
        let path = make(folder.path(), "x", 1 << 20).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), (1 << 20) + 4096);
        let told = std::process::Command::new("blkid").args(["-p", "-s", "TYPE", "-o", "value"]).arg(&path).output();
        assert_eq!(String::from_utf8_lossy(&told.unwrap().stdout).trim(), "swap");
        make(folder.path(), "x", 8192).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 12288);
    }
}
