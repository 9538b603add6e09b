//! Kernel modules, in the order that the image's builder has found out.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// The folder of the initrd that holds the modules and `order`, a list of their file names. Behind a name may stand the
/// beginning of the modalias of the device that it is for: without such a device it is not loaded. And behind that may stand [`START`].
const FOLDER: &str = "/modules";

/// Of a module whose device a machine has from its start or never.
const START: &str = "start";

/// Where the kernel shows the devices that matter here.
const DEVICES: &str = "/sys/bus/virtio/devices";

/// Where it shows the slots that its hotplug drivers tend, native and ACPI's: into these devices may come later, whether behind bridges or not
/// (Linux: Documentation/ABI/testing/sysfs-bus-pci).
const SLOTS: &str = "/sys/bus/pci/slots";

/// What the devices that are there call themselves.
fn modaliases() -> Vec<String> {
    let devices = std::fs::read_dir(DEVICES).into_iter().flatten().flatten();
    devices.filter_map(|device| std::fs::read_to_string(device.path().join("modalias")).ok()).collect()
}

/// Loads all that there is a use for, and frees their files' memory. What devices may yet need stays for [`load_more`].
pub(crate) fn load() -> Result<(), String> {
    let order = order();
    // Those of all machines first: by some of them the kernel finds its devices.
    lines(&order).filter(|line| line.device.is_none()).try_for_each(|line| load_one(line.name, false))?;
    let may_gain = std::fs::read_dir(SLOTS).is_ok_and(|mut slots| slots.next().is_some());
    let unused = load_for_devices(&order, false)?;
    for line in unused.iter().filter(|line| !may_gain || line.only_from_start) {
        let _ = std::fs::remove_file(file(line.name));
    }
    Ok(())
}

/// Loads the modules of devices that have come since the boot.
///
/// # Errors
/// Which module can't be loaded, and why.
pub fn load_more() -> Result<(), String> {
    load_for_devices(&order(), true).map(drop)
}

/// Loads what the devices that are there have a use for, and gives the rest. A module whose file is gone was loaded,
/// where it `may_be_gone`.
fn load_for_devices(order: &str, may_be_gone: bool) -> Result<Vec<Line<'_>>, String> {
    // Looked at once: a device that comes meanwhile would be given the later ones of its modules without those that they need.
    let aliases = modaliases();
    let (wanted, unused) = by_devices(order, &aliases);
    wanted.into_iter().try_for_each(|line| load_one(line.name, may_be_gone))?;
    Ok(unused)
}

/// The modules of devices, in their order: those for devices of these modaliases, and the others.
fn by_devices<'a>(order: &'a str, aliases: &[String]) -> (Vec<Line<'a>>, Vec<Line<'a>>) {
    let is_there = |device: &str| aliases.iter().any(|alias| alias.starts_with(device));
    lines(order).filter(|line| line.device.is_some()).partition(|line| line.device.is_some_and(is_there))
}

/// The list of the modules; empty where the initrd has none.
fn order() -> String {
    std::fs::read_to_string(file("order")).unwrap_or_default()
}

/// A module of the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Line<'a> {
    /// Its file.
    name: &'a str,
    /// The beginning of its device's modalias. One that all machines need has none, and needs none that has.
    device: Option<&'a str>,
    only_from_start: bool,
}

fn lines(order: &str) -> impl Iterator<Item = Line<'_>> {
    order.lines().filter_map(|line| {
        let mut words = line.split(' ').filter(|word| !word.is_empty());
        Some(Line { name: words.next()?, device: words.next(), only_from_start: words.next() == Some(START) })
    })
}

fn file(name: &str) -> PathBuf {
    Path::new(FOLDER).join(name)
}

fn load_one(name: &str, may_be_gone: bool) -> Result<(), String> {
    let path = &file(name);
    // One at a time: who comes second finds it loaded, and no file.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if may_be_gone && error.kind() == std::io::ErrorKind::NotFound => return is_loaded(name),
        Err(error) => return Err(format!("can't open {}: {error}", path.display())),
    };
    match rustix::system::finit_module(&file, c"", 0) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => {}
        Err(error) => return Err(format!("can't load the module {}: {error}", path.display())),
    }
    // The initrd is memory.
    let _ = std::fs::remove_file(path);
    Ok(())
}

/// Whether a module without a file is in the kernel: it calls modules by their file's name, with `_` for `-`.
fn is_loaded(name: &str) -> Result<(), String> {
    let module = name.trim_end_matches(".ko").replace('-', "_");
    if Path::new("/sys/module").join(&module).exists() {
        return Ok(());
    }
    Err(format!(
        "the module {module} was given up at the boot, for this machine had no slot that a device can come into"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_for_the_devices_that_there_are() {
        let order = "a.ko\ndm.ko virtio:d00000002v\n\nverity.ko virtio:d00000002v\nnet.ko virtio:d00000001v\n";
        let of = |aliases: &[&str]| {
            let aliases: Vec<_> = aliases.iter().map(|&alias| alias.to_owned()).collect();
            let (wanted, unused) = by_devices(order, &aliases);
            let names = |lines: &[Line<'_>]| lines.iter().map(|line| line.name).collect::<Vec<_>>().join(" ");
            format!("{} | {}", names(&wanted), names(&unused))
        };
        assert_eq!(of(&[]), " | dm.ko verity.ko net.ko");
        assert_eq!(of(&["virtio:d00000002v00001AF4\n"]), "dm.ko verity.ko | net.ko");
        assert_eq!(of(&["virtio:d00000001v00001AF4\n", "virtio:d00000002v00001AF4\n"]), "dm.ko verity.ko net.ko | ");
        assert_eq!(lines(order).filter(|line| line.device.is_none()).count(), 1);
        let line = lines("a.ko virtio:d1v start\n").next().unwrap();
        assert!(line.only_from_start && line.device == Some("virtio:d1v") && line.name == "a.ko");
        assert!(!lines(order).any(|line| line.only_from_start));
    }
}
