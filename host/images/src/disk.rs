//! An image's layers as disks, each made once and shared by all images that have the layer.

use std::path::Path;

use sha2::{Digest, Sha256};

use crate::erofs::{self, Stands};
use crate::layout::{Layer, hex_of};
use crate::{Disk, Error, Result, Verity, verity};

/// The most disks of an image: a machine's slots are few. What an image has more of goes into its lowest one.
const DISKS_MAX: usize = 6;

/// The disks of `layers`, the lowest first, in `folder`; those that are missing are made in `work`, which is on the same file
/// system.
pub(crate) fn disks(
    folder: &Path,
    layers: &[Layer],
    work: &Path,
    progress: &(dyn Fn(&str) + Sync),
) -> Result<Vec<Disk>> {
    // Layers that can't lie on others were found out when all of them together were made.
    let whole = Group { layers, is_lowest: true };
    if layers.len() <= 1 || whole.record(folder)?.exists() {
        return Ok(vec![whole.disk(folder, work, progress)?.0]);
    }
    let mut disks = Vec::new();
    let lowest = layers.len().saturating_sub(DISKS_MAX - 1).max(1);
    let (first, others) = layers.split_at(lowest);
    let groups = std::iter::once(Group { layers: first, is_lowest: true })
        .chain(others.iter().map(|layer| Group { layers: std::slice::from_ref(layer), is_lowest: false }));
    for group in groups {
        match group.disk(folder, work, progress)? {
            (disk, Stands::Alone) => disks.push(disk),
            (_, Stands::OnOthers) => return Ok(vec![whole.disk(folder, work, progress)?.0]),
        }
    }
    Ok(disks)
}

/// Layers that become one disk.
struct Group<'a> {
    layers: &'a [Layer],
    /// Whether nothing is below it.
    is_lowest: bool,
}

/// The form in which disks are made, in the name of their folder: what another one has made is not used.
pub(crate) const FORM: &str = "1";

/// What is known of a disk that was made: `<name>.json`. It is written last.
#[derive(serde::Serialize, serde::Deserialize)]
struct Record {
    /// None of one that can't lie on others.
    verity: Option<Verity>,
}

impl Group<'_> {
    /// The digest of the contents; of several, or of one that hides nothing, that of a list of them.
    fn name(&self) -> Result<String> {
        match self.layers {
            [layer] if !self.is_lowest => Ok(hex_of(&layer.diff_id)?.to_owned()),
            layers => {
                let mut list = Sha256::new();
                for layer in layers {
                    list.update(hex_of(&layer.diff_id)?);
                    list.update("\n");
                }
                Ok(hex::encode(list.finalize()))
            }
        }
    }

    fn record(&self, folder: &Path) -> Result<std::path::PathBuf> {
        Ok(folder.join(self.name()? + ".json"))
    }

    /// The disk, made where it is missing.
    fn disk(&self, folder: &Path, work: &Path, progress: &(dyn Fn(&str) + Sync)) -> Result<(Disk, Stands)> {
        let path = folder.join(self.name()? + ".erofs");
        let record = self.record(folder)?;
        let known = std::fs::read(&record).ok().and_then(|text| serde_json::from_slice::<Record>(&text).ok());
        let known = known.filter(|known| known.verity.is_none() || path.exists());
        let made = match known {
            Some(known) => known.verity,
            None => {
                progress(&format!("unpacking {} of the image's layers", self.layers.len()));
                let made = self.make(folder, &path, work)?;
                let text = serde_json::to_vec(&Record { verity: made.clone() }).unwrap_or_default();
                let beside = work.join("record");
                std::fs::write(&beside, text).map_err(Error::file(&beside))?;
                std::fs::rename(&beside, &record).map_err(Error::file(&record))?;
                made
            }
        };
        Ok(match made {
            Some(verity) => (Disk { path, verity }, Stands::Alone),
            None => (Disk { path, verity: Verity { blocks: 0, root_hash: String::new() } }, Stands::OnOthers),
        })
    }

    fn make(&self, folder: &Path, path: &Path, work: &Path) -> Result<Option<Verity>> {
        let making = work.join("disk");
        // One that has lost its disk would speak of another.
        match std::fs::remove_file(self.record(folder)?) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(Error::file(path)(error)),
            _ => {}
        }
        let (size, stands) = erofs::write(self.layers, self.is_lowest, &making)?;
        std::fs::create_dir_all(folder).map_err(Error::file(folder))?;
        if stands == Stands::OnOthers {
            return Ok(None);
        }
        let verity = verity::append(&making, size.blocks).map_err(Error::file(&making))?;
        std::fs::rename(&making, path).map_err(Error::file(path))?;
        Ok(Some(verity))
    }
}
