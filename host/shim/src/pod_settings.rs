//! The settings of a pod: the host's, changed by the file that containerd's configuration names and by the pod's annotations.

use std::collections::HashMap;
use std::path::Path;

use coracle_sandbox::Error;
use coracle_settings::deprecation::{self, Deprecation, Kind};
use coracle_settings::{self as settings, Loaded, Settings};

/// How this program's name begins where it stands for a runtime of Kata's (`io.containerd.kata.v2`, `io.containerd.kata-qemu.v2`).
const KATA: &str = "containerd-shim-kata";

/// The settings of the pod whose annotations these are, and what they use that is deprecated.
///
/// # Errors
/// [`Error::Unsupported`] for what is asked for and not there, [`Error::Invalid`] for annotations that may not be, [`Error::Missing`] for settings
/// that can't be read.
pub(crate) fn of(
    file: Option<&Path>,
    annotations: &HashMap<String, String>,
) -> Result<(Settings, Vec<&'static Deprecation>), Error> {
    let loaded = if is_kata() { Loaded::of_kata(file) } else { Loaded::of_host(file) }.map_err(refused)?;
    for used in &loaded.deprecated {
        log::warn!("{used}");
    }
    let mut deprecated: Vec<_> = loaded.deprecated.iter().map(|used| used.entry).collect();
    for name in annotations.keys() {
        let setting = name.strip_prefix(settings::ANNOTATIONS).unwrap_or_default();
        let entry = deprecation::of(Kind::Annotation, name).or_else(|| deprecation::of(Kind::Setting, setting));
        if let Some(entry) = entry {
            log::warn!("the annotation {name}: {entry}");
            deprecated.push(entry);
        }
    }
    let settings = loaded.settings.with_annotations(annotations).map_err(refused)?;
    Ok((settings, deprecated))
}

/// By the name that whoever started it has used: a link's, where it is one.
fn is_kata() -> bool {
    let own = std::env::args_os().next().unwrap_or_default();
    Path::new(&own).file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(KATA))
}

fn refused(error: settings::Error) -> Error {
    match error {
        settings::Error::Unprotected { .. } | settings::Error::Kata { .. } => Error::Unsupported(error.to_string()),
        settings::Error::Annotation { .. } => Error::Invalid(error.to_string()),
        other => Error::Missing(format!("the settings: {other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_pod_may_not_have_has_its_own_error() {
        let of = |name: &str, text: &str| {
            let annotations: HashMap<_, _> = [(name.to_owned(), text.to_owned())].into();
            Settings::default().with_annotations(&annotations).map(drop).map_err(refused)
        };
        assert!(matches!(of("io.katacontainers.config.agent.policy", "x"), Err(Error::Unsupported(_))));
        assert!(matches!(of("io.coracle.config.machine.vcpus", "1"), Err(Error::Invalid(_))));
        assert!(of("org.example", "1").is_ok());
        let missing = super::of(Some(Path::new("/nowhere.toml")), &HashMap::new());
        assert!(matches!(missing, Err(Error::Missing(text)) if text.contains("/nowhere.toml")));
    }
}
