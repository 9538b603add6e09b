//! Kata 4.1's configuration templates, moved over: every key is accounted for, and what comes out is a settings file.

use std::path::Path;

use coracle_settings::{Loaded, Migration, Settings, migrate};

const KEYS: &str = include_str!("kata-4.1-keys.tsv");

/// The templates of each dialect, with the monitor in whose section the keys are.
const TEMPLATES: [(&str, &[(&str, &str)]); 2] = [
    (
        "rust",
        &[
            ("qemu", "qemu"),
            ("dragonball", "dragonball"),
            ("clh", "cloud-hypervisor"),
            ("clh-azure", "cloud-hypervisor"),
            ("openvmm-azure", "openvmm"),
            ("rs-fc", "firecracker"),
            ("qemu-nvidia-cpu", "qemu"),
            ("qemu-nvidia-gpu", "qemu"),
            ("qemu-coco-dev", "qemu"),
            ("qemu-se", "qemu"),
            ("qemu-snp", "qemu"),
            ("qemu-tdx", "qemu"),
            ("qemu-nvidia-gpu-snp", "qemu"),
            ("qemu-nvidia-gpu-tdx", "qemu"),
            ("remote", "remote"),
        ],
    ),
    (
        "go",
        &[
            ("qemu", "qemu"),
            ("clh", "clh"),
            ("clh-azure", "clh"),
            ("fc", "firecracker"),
            ("stratovirt", "stratovirt"),
            ("qemu-nvidia-cpu", "qemu"),
            ("qemu-nvidia-gpu", "qemu"),
            ("qemu-coco-dev", "qemu"),
            ("qemu-se", "qemu"),
            ("qemu-snp", "qemu"),
            ("qemu-tdx", "qemu"),
            ("qemu-nvidia-gpu-snp", "qemu"),
            ("qemu-nvidia-gpu-tdx", "qemu"),
            ("remote", "remote"),
        ],
    ),
];

/// Those that make confidential guests, or leave machines to another service.
const REFUSED: [&str; 6] = ["qemu-se", "qemu-snp", "qemu-tdx", "qemu-nvidia-gpu-snp", "qemu-nvidia-gpu-tdx", "remote"];

/// A template's file. Of keys of which only is known how many templates have them it has all.
fn file(dialect: &str, template: &str, monitor: &str) -> (String, usize) {
    let mut sections: Vec<(String, Vec<String>)> = Vec::new();
    let mut count = 0;
    for line in KEYS.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let [of, section, key, value, templates] = line.split('\t').collect::<Vec<_>>()[..] else { panic!("{line}") };
        let named = templates.split(", ").any(|name| name == template);
        if of != dialect || !(named || templates == "all" || templates.contains(" of ")) {
            continue;
        }
        let section = section.replace('*', monitor);
        let section = if section.ends_with("images") { format!("[[{section}]]") } else { format!("[{section}]") };
        let own_name = format!("{monitor:?}");
        let value = match key {
            // What a template of confidential guests says, in whichever dialect.
            "confidential_guest" if REFUSED.contains(&template) => "true",
            "hypervisor_name" => own_name.as_str(),
            _ => value,
        };
        count += 1;
        match sections.iter_mut().find(|(name, _)| *name == section) {
            Some((_, lines)) => lines.push(format!("{key} = {value}")),
            None => sections.push((section, vec![format!("{key} = {value}")])),
        }
    }
    let text: Vec<_> = sections.into_iter().map(|(name, lines)| format!("{name}\n{}\n", lines.join("\n"))).collect();
    (text.join("\n"), count)
}

fn moved(folder: &Path, text: &str) -> Migration {
    let path = folder.join("configuration.toml");
    std::fs::write(&path, text).unwrap();
    migrate(&[&path]).unwrap()
}

#[test]
fn every_key_of_every_template_is_accounted_for() {
    let folder = tempfile::tempdir().unwrap();
    for (dialect, templates) in TEMPLATES {
        for (template, monitor) in templates {
            let (text, keys) = file(dialect, template, monitor);
            let migration = moved(folder.path(), &text);
            let what = format!("{dialect}, {template}");
            assert!(keys > 60, "{what}: {keys} keys");
            // The section of the monitor is accounted for, too.
            assert_eq!(migration.moved.len(), keys + 1, "{what}");
            for moved in &migration.moved {
                assert!(!moved.text.is_empty() && !moved.text.contains("no such key"), "{what}: {moved:?}");
            }
            assert_eq!(migration.refused().is_some(), REFUSED.contains(template), "{what}: {:?}", migration.refused());
            let path = folder.path().join("coracle.toml");
            std::fs::write(&path, migration.text()).unwrap();
            let loaded =
                Loaded::from_file(&path).unwrap_or_else(|error| panic!("{what}: {error}: {}", migration.text()));
            assert_eq!(loaded.settings.machine_memory_mib, 2048, "{what}");
            assert_ne!(loaded.settings, Settings::default(), "{what}");
        }
    }
}
