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
        add(package, &module_name(name), &Need::Always, &mut chosen, &mut Vec::new())?;
    }
    for (name, device) in &recipe.device_modules {
        add(package, &module_name(name), &Need::Device(device.clone()), &mut chosen, &mut Vec::new())?;
    }
    for (name, device) in &recipe.start_modules {
        add(package, &module_name(name), &Need::FromStart(device.clone()), &mut chosen, &mut Vec::new())?;
    }
    Ok(chosen)
}

/// Adds a module behind those that it needs. `under_way` are those that wait for it themselves: two may wish for each other.
fn add(
    package: &Package,
    name: &str,
    need: &Need,
    chosen: &mut Vec<Module>,
    under_way: &mut Vec<String>,
) -> Result<(), Error> {
    let file = format!("{name}.ko");
    if package.is_builtin(name) || chosen.iter().any(|present| present.file == file) || under_way.contains(&file) {
        return Ok(());
    }
    let module = package.module(name)?.ok_or_else(|| Error::Package {
        package: package.path().to_owned(),
        problem: format!("the module {name} is neither there nor built in"),
    })?;
    under_way.push(file.clone());
    for dependency in dependencies(&module) {
        add(package, &dependency, need, chosen, under_way)?;
    }
    for wish in wishes(&module) {
        // An algorithm of the kernel's cryptography is asked for by its own name; the module that has it in C is called so.
        for name in [wish.clone(), format!("{wish}_generic")] {
            if package.is_builtin(&name) || package.module(&name)?.is_some() {
                add(package, &name, need, chosen, under_way)?;
                break;
            }
        }
    }
    under_way.pop();
    chosen.push(Module { file, content: module, need: need.clone() });
    Ok(())
}

/// The entries of a module's `.modinfo` section with this key: NUL-terminated texts, found without reading the ELF headers.
fn entries(module: &[u8], key: &[u8]) -> Vec<String> {
    let starts = module.windows(key.len()).enumerate().filter(|(_, window)| *window == key);
    let text = |start: usize| {
        let rest = &module[start + key.len()..];
        let end = rest.iter().position(|byte| *byte == 0).unwrap_or(0);
        String::from_utf8_lossy(&rest[..end]).into_owned()
    };
    starts.map(|(start, _)| text(start)).collect()
}

/// What a module can't be loaded without (`depends=`).
fn dependencies(module: &[u8]) -> Vec<String> {
    let list = entries(module, b"\0depends=").into_iter().next().unwrap_or_default();
    list.split(',').filter(|name| !name.is_empty()).map(module_name).collect()
}

/// What a module wants to be there before it, where there is such a thing (`softdep=`, modprobe.d(5)): some can't be loaded without it either.
fn wishes(module: &[u8]) -> Vec<String> {
    let mut names = Vec::new();
    for list in entries(module, b"\0softdep=") {
        let mut is_before = false;
        for word in list.split_whitespace() {
            match word {
                "pre:" => is_before = true,
                "post:" => is_before = false,
                name if is_before => names.push(module_name(name)),
                _ => {}
            }
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_a_comma_list() {
        assert_eq!(dependencies(b"x\0depends=vsock,virtio-ring\0name=y\0"), ["vsock", "virtio_ring"]);
        assert!(dependencies(b"x\0depends=\0").is_empty());
        assert!(dependencies(b"").is_empty());
        assert_eq!(wishes(b"x\0softdep=pre: crc32c post: later\0softdep=pre: a-b\0"), ["crc32c", "a_b"]);
        assert!(wishes(b"x\0depends=a\0").is_empty());
    }
}
