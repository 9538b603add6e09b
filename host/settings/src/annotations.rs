//! Settings of one pod, by its annotations, as far as the administrator lets it.

use std::collections::BTreeMap;

use crate::declare::{ANNOTATIONS, Set};
use crate::error::Error;
use crate::load::nearest;
use crate::{Settings, contradictions, kata};

impl Settings {
    /// These settings, changed by a pod's annotations: ours, and Kata's that mean the same. Others are not looked at.
    ///
    /// # Errors
    /// [`Error::Annotation`] for one that is not allowed, not known, or has a wrong value; [`Error::Unprotected`] for one of Kata's that asks for
    /// protection that is not there.
    pub fn with_annotations<'a>(
        mut self,
        annotations: impl IntoIterator<Item = (&'a String, &'a String)>,
    ) -> Result<Self, Error> {
        // In an order of their own: a map has none.
        let annotations: BTreeMap<&String, &String> = annotations.into_iter().collect();
        let mut asked: BTreeMap<&str, (&String, String)> = BTreeMap::new();
        for (name, text) in annotations {
            let wanted = match name.strip_prefix(ANNOTATIONS) {
                Some(key) => Some((key, text.clone())),
                None => kata::annotation(name, text)?.map(|(key, value)| (key, value.trim_matches('"').to_owned())),
            };
            let Some((key, text)) = wanted else { continue };
            let problem = |problem: String| Error::Annotation { name: name.clone(), problem };
            match asked.get(key) {
                Some((other, before)) if *before != text => {
                    return Err(problem(format!("{other} asks for something else")));
                }
                _ => {}
            }
            if !self.annotations_allow.iter().any(|allowed| allowed == key) {
                return Err(match self.clone().set_text(key, &text) {
                    Set::Unknown => problem(format!("there is no setting {key}; did you mean {}?", nearest(key))),
                    _ => problem(format!("the administrator has not allowed it: `annotations.allow` would name {key}")),
                });
            }
            match self.set_text(key, &text) {
                Set::Done(_) => {}
                Set::Unknown => return Err(problem(format!("there is no setting {key}"))),
                Set::Expected(expected) => return Err(problem(format!("{key} must be {expected}"))),
            }
            asked.insert(key, (name, text));
        }
        contradictions::check(&self)?;
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::EmptyDir;

    fn with(pairs: &[(&str, &str)]) -> Result<Settings, Error> {
        let settings = Settings {
            annotations_allow: vec![
                "machine.memory_mib".into(),
                "storage.empty_dir".into(),
                "machine.guest_swap".into(),
            ],
            ..Settings::default()
        };
        let pairs: BTreeMap<String, String> = pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        settings.with_annotations(&pairs)
    }

    #[test]
    fn a_pod_sets_what_it_may() {
        let settings = with(&[
            ("io.coracle.config.machine.memory_mib", "512"),
            ("io.coracle.config.storage.empty_dir", "disk"),
            ("io.katacontainers.config.hypervisor.enable_guest_swap", "true"),
            ("io.kubernetes.cri.sandbox-name", "x"),
        ])
        .unwrap();
        assert_eq!((settings.machine_memory_mib, settings.storage_empty_dir), (512, EmptyDir::Disk));
        assert!(settings.machine_guest_swap);
        let both = [
            ("io.coracle.config.machine.memory_mib", "512"),
            ("io.katacontainers.config.hypervisor.default_memory", "512"),
        ];
        assert_eq!(with(&both).unwrap().machine_memory_mib, 512);
    }

    #[test]
    fn what_it_may_not_is_refused_by_name() {
        let refused = |name: &str, text: &str| with(&[(name, text)]).unwrap_err().to_string();
        assert!(refused("io.coracle.config.machine.vcpus", "2").contains("annotations.allow"));
        assert!(refused("io.coracle.config.qemu.path", "/evil").contains("annotations.allow"));
        assert!(refused("io.katacontainers.config.hypervisor.default_vcpus", "2").contains("annotations.allow"));
        assert!(refused("io.coracle.config.machine.memory_mb", "2").contains("did you mean machine.memory_mib?"));
        assert!(refused("io.coracle.config.machine.memory_mib", "much").contains("above 0"));
        assert!(refused("io.coracle.config.machine.memory_mib", "9999999").contains("max_memory_mib"));
        assert!(refused("io.katacontainers.config.agent.policy", "x").contains("would run without"));
        let both = [
            ("io.coracle.config.machine.memory_mib", "512"),
            ("io.katacontainers.config.hypervisor.default_memory", "256"),
        ];
        assert!(with(&both).unwrap_err().to_string().contains("something else"));
    }
}
