//! A guest for tests: a distribution's kernel, and an init that is a script.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use coracle_driver_builtin::{Builtin, Config};
use coracle_machine::{
    Architecture, Cpus, Device, Driver, GuestStream, Kernel, KernelForm, Machine, MachineSpec, Memory, MemoryKind,
    Platform,
};
use cpio::newc;
use tokio::io::AsyncReadExt;

/// How long a guest may take to say or do something; it runs nested under emulation.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// What the tests are given by `cargo xtask test --lane builtin`.
pub(crate) struct Given {
    guest: PathBuf,
    shim: PathBuf,
    /// A folder with a kernel package's files.
    package: PathBuf,
}

/// `None`, with a printed reason, where this is not the lane of the built-in monitor.
pub(crate) fn given() -> Option<Given> {
    let path = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let given = || {
        path("CORACLE_TEST_KVM")?;
        let guest = path("CORACLE_TEST_GUEST")?;
        Some(Given { guest, shim: path("CORACLE_TEST_SHIM")?, package: path("CORACLE_TEST_KERNEL_PACKAGE")? })
    };
    let found = given();
    if found.is_none() {
        println!(
            "left out: CORACLE_TEST_KVM, _GUEST, _SHIM and _KERNEL_PACKAGE are not all set; \
             `cargo xtask test --lane builtin` sets them"
        );
    }
    found
}

impl Given {
    /// The driver; `jail` as in its configuration.
    pub(crate) fn driver(&self, jail: bool) -> Builtin {
        Builtin::new(Config { monitor: vec![self.shim.clone().into(), "vmm".into()], jail })
    }

    /// The driver with a monitor that another program starts and looks at, without a jail.
    pub(crate) fn driver_behind(&self, mut words: Vec<std::ffi::OsString>) -> Builtin {
        words.extend([self.shim.clone().into(), "vmm".into()]);
        Builtin::new(Config { monitor: words, jail: false })
    }

    /// The compressed kernel, as the package has it.
    pub(crate) fn bzimage(&self) -> PathBuf {
        let boot = std::fs::read_dir(self.package.join("boot")).unwrap().flatten().map(|entry| entry.path());
        boot.into_iter().find(|path| path.file_name().unwrap().to_string_lossy().starts_with("vmlinuz-")).unwrap()
    }

    /// A module of the kernel's, unpacked.
    fn module(&self, name: &str) -> Option<Vec<u8>> {
        fn find(folder: &Path, name: &str) -> Option<PathBuf> {
            for entry in std::fs::read_dir(folder).ok()?.flatten() {
                let path = entry.path();
                if path.is_dir() && !path.is_symlink() {
                    if let Some(found) = find(&path, name) {
                        return Some(found);
                    }
                } else if path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(name)) {
                    return Some(path);
                }
            }
            None
        }
        let path = find(&self.package, &format!("{name}.ko"))?;
        let bytes = std::fs::read(&path).unwrap();
        match path.extension()?.to_str()? {
            "ko" => Some(bytes),
            "xz" => {
                let mut unpacked = Vec::new();
                liblzma::read::XzDecoder::new(bytes.as_slice()).read_to_end(&mut unpacked).unwrap();
                Some(unpacked)
            }
            other => panic!("{}: a module packed as {other}", path.display()),
        }
    }

    /// A machine in `folder` whose init runs `script`, with /proc and /sys mounted and these modules loaded. In the script `opens DISK...` waits until
    /// each can be read: its device file comes before its entry in /sys/block, and that before it can be opened (Linux: `device_add_disk`).
    pub(crate) fn spec(&self, folder: &Path, modules: &[&str], script: &str) -> MachineSpec {
        let initrd = folder.join("initrd");
        std::fs::write(&initrd, self.initrd(modules, script)).unwrap();
        let own = folder.join("machine");
        std::fs::create_dir_all(&own).unwrap();
        MachineSpec {
            name: "test".into(),
            folder: own,
            architecture: Architecture::X86_64,
            platform: Platform::Plain,
            firmware: None,
            kernel: Kernel { path: self.guest.join("vmlinux"), form: KernelForm::PvhElf },
            initrd,
            command_line: "panic=-1 quiet loglevel=4 cryptomgr.notests".into(),
            cpus: Cpus { boot: 1, max: 1 },
            memory: Memory { size_mib: 256, max_mib: 256, kind: MemoryKind::Private, huge_pages: false },
            devices: vec![Device::Rng],
            console: true,
            access_platform: false,
            host_cpus: Vec::new(),
            host_nodes: Vec::new(),
        }
    }

    fn initrd(&self, modules: &[&str], script: &str) -> Vec<u8> {
        let mut files: Vec<(String, u32, Vec<u8>)> = Vec::new();
        for folder in ["bin", "dev", "proc", "sys", "modules"] {
            files.push((folder.into(), 0o040_755, Vec::new()));
        }
        files.push(("bin/busybox".into(), 0o100_755, std::fs::read("/bin/busybox").unwrap()));
        if let Some(agent) = std::env::var_os("CORACLE_TEST_AGENT") {
            files.push(("bin/agent".into(), 0o100_755, std::fs::read(agent).unwrap()));
        }
        let mut load = String::new();
        for name in modules {
            // What a kernel has built in is no file.
            if let Some(module) = self.module(name) {
                files.push((format!("modules/{name}.ko"), 0o100_644, module));
                load.push_str(&format!("insmod /modules/{name}.ko\n"));
            }
        }
        let init = format!(
            "#!/bin/busybox sh\n/bin/busybox --install -s /bin\nexport PATH=/bin\nmount -t proc p /proc\n\
             mount -t sysfs s /sys\nmount -t devtmpfs d /dev\n\
             opens() {{ for disk; do tries=0; until head -c 1 /dev/$disk >/dev/null 2>&1 || [ $tries = 100 ]; do\n\
             sleep 0.1; tries=$((tries+1)); done; done; }}\n{load}{script}\n"
        );
        files.push(("init".into(), 0o100_755, init.into_bytes()));
        archive(&files)
    }

    /// A machine in `folder` with the guest image under test.
    pub(crate) fn image(&self, folder: &Path) -> MachineSpec {
        self.image_of(&self.guest, folder)
    }

    /// A machine in `folder` with another guest image.
    pub(crate) fn image_of(&self, guest: &Path, folder: &Path) -> MachineSpec {
        let mut spec = self.spec(folder, &[], "");
        spec.kernel.path = guest.join("vmlinux");
        spec.initrd = guest.join("initrd.img");
        spec.devices = vec![Device::Vsock, Device::Rng];
        spec
    }

    /// Runs a machine to its end: why it has ended, and its console.
    pub(crate) async fn run(&self, spec: MachineSpec) -> (String, Vec<String>) {
        let machine = self.driver(true).boot(spec).await.expect("boot");
        let end = tokio::time::timeout(PATIENCE, machine.wait()).await;
        let console = machine.console(200);
        (end.unwrap_or_else(|_| panic!("no end within {PATIENCE:?}: {console:?}")).reason, console)
    }
}

/// A RAM disk with these programs.
pub(crate) fn initrd_of(files: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let files: Vec<_> = files.iter().map(|(name, content)| ((*name).to_owned(), 0o100_755, content.clone())).collect();
    archive(&files)
}

fn archive(files: &[(String, u32, Vec<u8>)]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (inode, (name, mode, content)) in (1..).zip(files) {
        let builder = newc::Builder::new(name).ino(inode).mode(*mode).nlink(1);
        let mut writer = builder.write(&mut archive, u32::try_from(content.len()).unwrap());
        writer.write_all(content).unwrap();
        writer.finish().unwrap();
    }
    newc::trailer(&mut archive).unwrap();
    archive
}

/// The process ids of this process's children: the monitors that it has started.
pub(crate) fn children() -> Vec<i32> {
    let own = std::process::id().to_string();
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    processes
        .filter_map(|entry| entry.file_name().to_string_lossy().parse::<i32>().ok())
        .filter(|pid| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.split(' ').nth(1) == Some(&own))
        })
        .collect()
}

/// The name of the guest's memory in a process's map.
const GUEST_MEMORY: &str = "memfd:coracle-guest";

/// A monitor's memory without its guest's, in KiB.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MonitorMemory {
    pub(crate) resident: u64,
    pub(crate) anonymous: u64,
    pub(crate) of_files: u64,
}

/// All exits to the monitor, of its figures.
pub(crate) fn exits(figures: &BTreeMap<String, u64>) -> u64 {
    figures.iter().filter(|(name, _)| name.starts_with("exits_")).map(|(_, count)| count).sum()
}

/// Voluntary switches of each thread.
pub(crate) fn switches(pid: i32) -> BTreeMap<String, u64> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("tasks").flatten();
    tasks
        .map(|task| {
            let read = |file: &str| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
            let status = read("status");
            let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            (read("comm").trim().to_owned(), count.and_then(|count| count.trim().parse().ok()).unwrap_or(0))
        })
        .collect()
}

/// The modules of a virtio disk, in their order.
pub(crate) const DISK: [&str; 7] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
];

/// Those that the agent needs beside the disk's, in their order.
pub(crate) const AGENT: [&str; 6] = [
    "vsock",
    "vmw_vsock_virtio_transport_common",
    "vmw_vsock_virtio_transport",
    "rng-core",
    "virtio-rng",
    "virtio_balloon",
];

/// No mapping of the monitor itself is as large in bytes; the guest's memory is larger.
const LARGEST_OF_THE_MONITOR: u64 = 64 << 20;

/// How large the mapping is whose line of smaps this is.
fn bytes_of(line: &str) -> u64 {
    let range = line.split_whitespace().next().and_then(|range| range.split_once('-'));
    let number = |text: &str| u64::from_str_radix(text, 16).expect("an address");
    range.map_or(0, |(start, end)| number(end) - number(start))
}

/// Memory without the guest's: resident, of it anonymous, and of it shared with the program's file.
pub(crate) fn memory(pid: i32) -> MonitorMemory {
    let map = std::fs::read_to_string(format!("/proc/{pid}/smaps")).expect("smaps");
    let (mut resident, mut anonymous, mut file) = (0, 0, 0);
    let mut guest = false;
    for line in map.lines() {
        let kib = |name: &str| {
            line.strip_prefix(name).and_then(|rest| rest.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok())
        };
        if line.split_whitespace().next().is_some_and(|range| range.contains('-') && !range.ends_with(':')) {
            guest = line.contains(GUEST_MEMORY) || bytes_of(line) >= LARGEST_OF_THE_MONITOR;
        } else if guest {
        } else if let Some(size) = kib("Rss:") {
            resident += size;
            file += size;
        } else if let Some(size) = kib("Anonymous:") {
            anonymous += size;
            file -= size;
        }
    }
    MonitorMemory { resident, anonymous, of_files: file }
}

/// Waits for the guest's greeting. The guest ends where it is dropped.
pub(crate) async fn greets(machine: &dyn Machine) -> GuestStream {
    let greeting = tokio::time::timeout(PATIENCE, machine.guest_connection()).await;
    let mut greeting = greeting.unwrap_or_else(|_| panic!("no greeting: {:?}", machine.console(30))).expect("greeting");
    greeting.read_exact(&mut [0]).await.expect("the guest speaks first");
    greeting
}

/// Waits until the guest has written `text` to its console.
pub(crate) async fn says(machine: &dyn Machine, text: &str) {
    says_any(machine, &[text]).await;
}

/// Waits until the guest has written one of these to its console.
pub(crate) async fn says_any(machine: &dyn Machine, texts: &[&str]) {
    let wait = async {
        while !machine.console(200).iter().any(|line| texts.iter().any(|text| line.contains(text))) {
            tokio::task::yield_now().await;
        }
    };
    let said = tokio::time::timeout(PATIENCE, wait).await;
    assert!(said.is_ok(), "the guest has said none of {texts:?}: {:?}", machine.console(50));
}
