//! The recipe in `guest/image/recipe.toml`.

use serde::Deserialize;

const TEXT: &str = include_str!("../../../guest/image/recipe.toml");

/// What goes into an image.
#[derive(Debug, Deserialize)]
pub struct Recipe {
    /// Kernel modules by name.
    pub modules: Vec<String>,
    /// Those of devices that not every machine has, by name; with the beginning of the device's modalias.
    pub device_modules: std::collections::BTreeMap<String, String>,
    /// Those of devices that a machine has from its start or never, likewise.
    pub start_modules: std::collections::BTreeMap<String, String>,
    /// Words of the kernel's command line.
    pub command_line: Vec<String>,
}

impl Recipe {
    /// The project's own.
    ///
    /// # Panics
    /// Where the file that was compiled in is malformed, which a test excludes.
    #[must_use]
    pub fn ours() -> Self {
        toml::from_str(TEXT).expect("guest/image/recipe.toml is checked by a test")
    }
}

/// The kernel's command line, the same for every pod.
#[must_use]
pub fn command_line() -> String {
    Recipe::ours().command_line.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_recipe_is_well_formed() {
        let recipe = Recipe::ours();
        assert!(recipe.modules.iter().any(|name| name == "virtiofs"));
        assert!(command_line().contains("panic=-1"));
        assert!(recipe.command_line.iter().all(|word| !word.contains(' ')));
    }
}
