//! Which modules the guest loads, and in which order: found out from the modules' own `depends=` (no depmod needed).

use crate::package::module_name;
use crate::{Error, Package, Recipe};

/// A module of the image.
pub(crate) struct Module {
    /// Its file's name.
    pub(crate) file: String,
    pub(crate) content: Vec<u8>,
    pub(crate) need: Need,
}

/// When a module is loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Need {
    /// Always.
    Always,
    /// Where there is a device with this beginning of a modalias, or one comes.
    Device(String),
    /// Where there is one from the start.
    FromStart(String),
}

/// The recipe's modules, each after those that it depends on.
pub(crate) fn choose(package: &Package, recipe: &Recipe) -> Result<Vec<Module>, Error> {
    let mut chosen = Vec::new();
    for name in &recipe.modules {
        add(package, &module_name(name), &Need::Always, &mut chosen)?;
    }
    for (name, device) in &recipe.device_modules {
        add(package, &module_name(name), &Need::Device(device.clone()), &mut chosen)?;
    }
    for (name, device) in &recipe.start_modules {
        add(package, &module_name(name), &Need::FromStart(device.clone()), &mut chosen)?;
    }
    Ok(chosen)
}

fn add(package: &Package, name: &str, need: &Need, chosen: &mut Vec<Module>) -> Result<(), Error> {
    let file = format!("{name}.ko");
    if package.is_builtin(name) || chosen.iter().any(|present| present.file == file) {
        return Ok(());
    }
    let module = package.module(name)?.ok_or_else(|| Error::Package {
        package: package.path().to_owned(),
        problem: format!("the module {name} is neither there nor built in"),
    })?;
    for dependency in dependencies(&module) {
        add(package, &dependency, need, chosen)?;
    }
    chosen.push(Module { file, content: module, need: need.clone() });
    Ok(())
}

/// The `depends=` entry of a module's `.modinfo` section: NUL-terminated texts, found without reading the ELF headers.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(start) = module.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let rest = &module[start + KEY.len()..];
    let end = rest.iter().position(|byte| *byte == 0).unwrap_or(0);
    let list = String::from_utf8_lossy(&rest[..end]);
    list.split(',').filter(|name| !name.is_empty()).map(module_name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_a_comma_list() {
        assert_eq!(dependencies(b"x\0depends=vsock,virtio-ring\0name=y\0"), ["vsock", "virtio_ring"]);
        assert!(dependencies(b"x\0depends=\0").is_empty());
        assert!(dependencies(b"").is_empty());
    }
}
