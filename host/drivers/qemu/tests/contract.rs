//! The machine contract on QEMU, both machine types. It needs a guest image and our vsock server:
//! `cargo xtask test --lane contract` gives them.

use std::cell::Cell;
use std::path::PathBuf;

use coracle_driver_qemu::{Config, KvmState, MachineType, Qemu, probe_kvm};
use coracle_machine::{
    Accelerator, Architecture, Cpus, Device, Kernel, KernelForm, MachineSpec, Memory, MemoryKind, Platform, contract,
};

fn given(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).map(PathBuf::from)
}

async fn keeps_the_contract(machine_type: MachineType) {
    let (Some(guest), Some(shim)) = (given("CORACLE_TEST_GUEST"), given("CORACLE_TEST_SHIM")) else {
        println!(
            "left out: CORACLE_TEST_GUEST and CORACLE_TEST_SHIM are not set; `cargo xtask test --lane contract` sets them"
        );
        return;
    };
    let accelerator = if probe_kvm() == KvmState::Usable { Accelerator::Kvm } else { Accelerator::Emulation };
    let driver = Qemu::new(Config {
        program: "/usr/bin/qemu-system-x86_64".into(),
        machine_type,
        accelerator,
        vsock_server: vec![shim.into(), "vsock".into()],
        kernel_vsock: true,
        jail: true,
        extra_arguments: Vec::new(),
    });
    let folder = tempfile::tempdir().unwrap();
    let count = Cell::new(0);
    let spec = || {
        count.set(count.get() + 1);
        let own = folder.path().join(count.get().to_string());
        std::fs::create_dir(&own).unwrap();
        MachineSpec {
            name: format!("contract-{}", machine_type.name()),
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

#[tokio::test]
async fn q35_keeps_the_contract() {
    keeps_the_contract(MachineType::Q35).await;
}

#[tokio::test]
async fn microvm_keeps_the_contract() {
    keeps_the_contract(MachineType::Microvm).await;
}
