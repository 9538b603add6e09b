//! `probe`: what this host offers, as JSON. The command line asks it, and links no driver itself.

use anyhow::Result;
use coracle_driver_qemu::{KvmState, probe_kvm};
use coracle_settings::Settings;
use serde_json::{Value, json};

use crate::machine;

pub(crate) fn run() -> Result<()> {
    let settings = Settings::load()?;
    let kvm = match probe_kvm() {
        KvmState::Usable => json!({ "usable": true }),
        KvmState::Unusable(reason) => json!({ "usable": false, "reason": reason }),
    };
    let accelerator = match machine::accelerator(&settings) {
        Ok(accelerator) => json!({ "ok": true, "name": accelerator.name() }),
        Err(error) => failure(&error),
    };
    let monitor = match machine::monitor(&settings) {
        Ok(name) => json!({ "ok": true, "name": name }),
        Err(error) => failure(&error),
    };
    let virtiofsd = match coracle_storage::find_virtiofsd(&settings.virtiofsd_path) {
        Ok(found) => json!({ "ok": true, "path": found.path }),
        Err(error) => failure(&error),
    };
    let qemu = match std::fs::metadata(&settings.qemu_path) {
        Ok(_) => json!({ "ok": true, "path": settings.qemu_path }),
        Err(error) => {
            failure(&format!("{}: {error}; install qemu-system-x86 or set `qemu.path`", settings.qemu_path.display()))
        }
    };
    let guest = match machine::config(&settings, "probe", &settings.run_folder) {
        Ok(config) => json!({ "ok": true, "kernel": config.kernel.path }),
        Err(error) => failure(&error),
    };
    let report = json!({
        "version": coracle_protocol::VERSION,
        "kvm": kvm,
        "accelerator": accelerator,
        "monitor": monitor,
        "qemu": qemu,
        "virtiofsd": virtiofsd,
        "guest": guest,
        "kernel_vsock": settings.qemu_kernel_vsock && std::path::Path::new("/dev/vhost-vsock").exists(),
    });
    println!("{report:#}");
    Ok(())
}

fn failure(error: &dyn std::fmt::Display) -> Value {
    json!({ "ok": false, "problem": error.to_string() })
}
