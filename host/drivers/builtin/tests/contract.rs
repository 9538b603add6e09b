//! The machine contract on the built-in monitor. It needs KVM, a guest image and our shim, whose word `vmm` is the monitor:
//! `cargo xtask test --lane builtin` gives them, in the lab where this machine has no KVM.

use std::cell::Cell;
use std::path::PathBuf;

use coracle_driver_builtin::{Builtin, Config};
use coracle_machine::{
    Architecture, Cpus, Device, Kernel, KernelForm, MachineSpec, Memory, MemoryKind, Platform, contract,
};

fn given(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).map(PathBuf::from)
}

#[tokio::test]
async fn the_builtin_monitor_keeps_the_contract() {
    let (Some(guest), Some(shim), Some(_)) =
        (given("CORACLE_TEST_GUEST"), given("CORACLE_TEST_SHIM"), given("CORACLE_TEST_KVM"))
    else {
        println!(
            "left out: CORACLE_TEST_GUEST, CORACLE_TEST_SHIM and CORACLE_TEST_KVM are not all set; \
             `cargo xtask test --lane builtin` sets them"
        );
        return;
    };
    let driver = Builtin::new(Config { monitor: vec![shim.into(), "vmm".into()], jail: true });
    let folder = tempfile::tempdir().unwrap();
    let count = Cell::new(0);
    let spec = || {
        count.set(count.get() + 1);
        let own = folder.path().join(count.get().to_string());
        std::fs::create_dir(&own).unwrap();
        MachineSpec {
            name: "contract-builtin".into(),
            folder: own,
            architecture: Architecture::X86_64,
            platform: Platform::Plain,
            firmware: None,
            kernel: Kernel { path: guest.join("vmlinux"), form: KernelForm::PvhElf },
            initrd: guest.join("initrd.img"),
            // Memory that it gains stays off: what a kernel puts into it, it might not give back.
            command_line: "panic=-1 reboot=t quiet loglevel=4 cryptomgr.notests memhp_default_state=offline".into(),
            cpus: Cpus { boot: 1, max: 1 },
            memory: Memory { size_mib: 256, max_mib: 256, kind: MemoryKind::Shared, huge_pages: false },
            devices: vec![Device::Vsock, Device::Rng],
            console: true,
            access_platform: false,
            host_cpus: Vec::new(),
            host_nodes: Vec::new(),
        }
    };
    contract::all(&driver, spec).await;
}
