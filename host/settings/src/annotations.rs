//! Settings of one pod, by its annotations, as far as the administrator lets it.

use std::collections::BTreeMap;

use crate::declare::{ANNOTATIONS, Set};
use crate::error::Error;
use crate::kinds::Given;
use crate::load::nearest;
use crate::{Settings, contradictions, kata, reference};

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
                Some(key) => vec![(key, text.clone())],
                None => kata::annotation(name, text)?,
            };
            for (key, text) in wanted {
                let problem = |problem: String| Error::Annotation { name: name.clone(), problem };
                match asked.get(key) {
                    Some((other, before)) if *before != text => {
                        return Err(problem(format!("{other} asks for something else")));
                    }
                    _ => {}
                }
                self.set_by_annotation(key, &text).map_err(problem)?;
                asked.insert(key, (name, text));
            }
        }
        let of_pod = |error: Error| Error::Annotation { name: "of this pod".into(), problem: error.to_string() };
        contradictions::check(&self).map_err(of_pod)?;
        Ok(self)
    }

    /// Sets one, where the administrator lets a pod do that; else why not.
    fn set_by_annotation(&mut self, key: &str, text: &str) -> Result<(), String> {
        let Some(entry) = reference().into_iter().find(|entry| entry.key == key) else {
            return Err(format!("there is no setting {key}; did you mean {}?", nearest(key)));
        };
        if !entry.by_annotation {
            return Err(format!("a pod can't set {key}"));
        }
        if !self.annotations_allow.iter().any(|allowed| allowed == key) {
            return Err(format!("the administrator has not allowed it: `annotations.allow` would name {key}"));
        }
        match self.set(key, &Given::Bare(text.to_owned())) {
            Set::Done(_) => Ok(()),
            Set::Unknown => Err(format!("there is no setting {key}")),
            Set::Expected(expected) => Err(format!("{key} must be {expected}")),
        }
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
        assert!(refused("io.coracle.config.qemu.path", "/evil").contains("a pod can't set qemu.path"));
        assert!(refused("io.katacontainers.config_path", "/opt/snp.toml").contains("would run without"));
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
