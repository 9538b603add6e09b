//! QEMU's command line.

use std::ffi::OsString;
use std::os::fd::RawFd;

use coracle_machine::{Accelerator, Error, KernelForm, MachineSpec, MemoryKind, Result};

use crate::handed::Handed;
use crate::{Config, MachineType, devices};

/// The descriptor on which QEMU finds its control channel, and that of the kernel's vsock.
pub(crate) const QMP_FD: i32 = 3;
pub(crate) const VHOST_FD: i32 = 4;
/// How the guest's vsock is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum VsockKind {
    /// By the kernel, with this context identifier; the open device is [`VHOST_FD`].
    Kernel(u32),
    /// By a vhost-user server at the machine's [`crate::vsock::MONITOR_SOCKET`].
    Server,
}

/// What was found on the host.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Found {
    /// The rate of its time-stamp counter, in MHz, where the guest is to be told (see [`needs_clock_rate`]).
    pub(crate) tsc_mhz: Option<u32>,
    /// Whether its kernel serves network links.
    pub(crate) has_net_servers: bool,
}

/// All arguments.
pub(crate) fn arguments(
    config: &Config,
    spec: &MachineSpec,
    (vsock, handed): (VsockKind, &Handed),
    found: &Found,
) -> Result<Vec<OsString>> {
    let mut arguments: Vec<OsString> = Vec::new();
    let mut add = |words: &[&str]| arguments.extend(words.iter().map(|word| OsString::from(*word)));
    let pci = config.machine_type == MachineType::Q35;
    let accelerator = match config.accelerator {
        Accelerator::Kvm => "kvm",
        Accelerator::Emulation => "tcg",
    };
    let machine = match config.machine_type {
        MachineType::Q35 => "q35,usb=off,sata=off,smbus=off,i8042=on,vmport=off,graphics=off",
        MachineType::Microvm => "microvm,acpi=on,rtc=on,isa-serial=on,auto-kernel-cmdline=off",
    };
    let memory = spec.memory.size_mib;
    // Our own server of the vsock maps it, too.
    let is_shared = spec.memory.kind == MemoryKind::Shared || vsock == VsockKind::Server;
    let share = if is_shared { "on" } else { "off" };
    let processor = if config.accelerator == Accelerator::Kvm { "host" } else { "max" };
    add(&["-name", &spec.name]);
    add(&["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    add(&["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]);
    add(&["-machine", &format!("{machine},memory-backend=ram")]);
    if !pci {
        // Virtio 1, as all our device servers speak it.
        add(&["-global", "virtio-mmio.force-legacy=false"]);
    }
    add(&["-accel", accelerator, "-cpu", processor]);
    let grows = can_grow(config, spec);
    let most = if grows { spec.cpus.max } else { spec.cpus.boot };
    add(&["-smp", &format!("{},maxcpus={most}", spec.cpus.boot)]);
    let growth = if grows { spec.memory.max_mib - memory } else { 0 };
    add(&[
        "-m",
        &format!("{memory}M{}", if growth > 0 { format!(",maxmem={}M", memory + growth) } else { String::new() }),
    ]);
    let pages = if spec.memory.huge_pages { ",hugetlb=on,hugetlbsize=2M" } else { "" };
    // What nobody else maps needs no file: a private mapping of one would have pages twice.
    let backend = if is_shared || spec.memory.huge_pages {
        format!("memory-backend-memfd,share={share}{pages}")
    } else {
        "memory-backend-ram".to_owned()
    };
    let backend = format!("{backend}{}", bound(&spec.host_nodes));
    add(&["-object", &format!("{backend},id=ram,size={memory}M")]);
    if growth > 0 {
        add(&["-object", &format!("{backend},id=growth,size={growth}M,reserve=off")]);
        add(&["-device", &format!("virtio-mem-pci,id={GROWTH},memdev=growth,requested-size=0,disable-legacy=on")]);
    }
    add(&["-chardev", &format!("socket,id=qmp,fd={QMP_FD}"), "-mon", "chardev=qmp,mode=control"]);
    if spec.console {
        add(&["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]);
    }
    match spec.kernel.form {
        KernelForm::PvhElf | KernelForm::BzImage => {}
        other => return Err(Error::Unsupported(format!("a kernel of the form {other:?}"))),
    }
    if spec.firmware.is_some() {
        return Err(Error::Unsupported("firmware".into()));
    }
    devices::add(&mut arguments, config, spec, (vsock, handed), found)?;
    arguments.extend(config.extra_arguments.iter().map(Into::into));
    // Opened again by their numbers: QEMU reads them more than once.
    let file = |number: RawFd| OsString::from(format!("/proc/self/fd/{number}"));
    arguments.extend(["-kernel".into(), file(handed.kernel)]);
    arguments.extend(["-initrd".into(), file(handed.initrd)]);
    arguments.extend(["-append".into(), command_line(spec, found.tsc_mhz).into()]);
    Ok(arguments)
}

/// Where on the host memory comes from.
fn bound(nodes: &[u32]) -> String {
    let each: String = nodes.iter().map(|node| format!(",host-nodes={node}")).collect();
    if nodes.is_empty() { each } else { format!("{each},policy=bind") }
}

/// The device by which memory grows (virtio-mem), by QEMU's name.
pub(crate) const GROWTH: &str = "growth0";

/// Whether this machine can change its size: one of virtio-mmio devices has no way to tell its guest.
pub(crate) fn can_grow(config: &Config, spec: &MachineSpec) -> bool {
    let has_room = spec.cpus.max > spec.cpus.boot || spec.memory.max_mib > spec.memory.size_mib;
    config.machine_type == MachineType::Q35 && has_room
}

/// Whether the guest can't find out its clock's rate dependably (see [`crate::clock`]).
pub(crate) fn needs_clock_rate(config: &Config) -> bool {
    config.machine_type == MachineType::Microvm && config.accelerator == Accelerator::Emulation
}

/// The kernel's command line: the specification's, and what this machine adds.
fn command_line(spec: &MachineSpec, tsc_mhz: Option<u32>) -> String {
    let mut line = spec.command_line.clone();
    if let Some(mhz) = tsc_mhz {
        line.push_str(&format!(" tsc_early_khz={mhz}000"));
    }
    if spec.console {
        line.push_str(" console=ttyS0");
    }
    line
}

#[cfg(test)]
mod tests {
    use coracle_machine::{Architecture, Cpus, Descriptor, Device, Forward, Kernel, Memory, Platform};

    use super::*;

    fn config(machine_type: MachineType) -> Config {
        Config {
            program: "qemu".into(),
            machine_type,
            accelerator: Accelerator::Emulation,
            vsock_server: vec!["server".into()],
            kernel_vsock: false,
            jail: true,
            extra_arguments: Vec::new(),
        }
    }

    fn spec(name: &str) -> MachineSpec {
        let socket = std::path::PathBuf::from(format!("/run/coracle/{name}/fs.sock"));
        MachineSpec {
            name: name.into(),
            folder: format!("/run/coracle/{name}").into(),
            architecture: Architecture::X86_64,
            platform: Platform::Plain,
            firmware: None,
            kernel: Kernel { path: "/k/vmlinux".into(), form: KernelForm::PvhElf },
            initrd: "/k/initrd.img".into(),
            command_line: "quiet".into(),
            cpus: Cpus { boot: 1, max: 1 },
            memory: Memory { size_mib: 256, max_mib: 256, kind: MemoryKind::Shared, huge_pages: false },
            devices: vec![Device::Vsock, Device::Rng, Device::SharedFs { tag: "t".into(), socket, queue_size: 128 }],
            console: true,
            access_platform: false,
            host_cpus: Vec::new(),
            host_nodes: Vec::new(),
        }
    }

    /// All arguments; the first number that is free is `first`.
    fn from(
        first: RawFd,
        config: &Config,
        spec: &MachineSpec,
        vsock: VsockKind,
        found: &Found,
    ) -> Result<Vec<OsString>> {
        super::arguments(config, spec, (vsock, &Handed::of(spec, vsock, first)), found)
    }

    fn arguments(config: &Config, spec: &MachineSpec, vsock: VsockKind, found: &Found) -> Result<Vec<OsString>> {
        from(0, config, spec, vsock, found)
    }

    fn after(arguments: &[OsString], option: &str) -> Vec<OsString> {
        arguments.windows(2).filter(|pair| pair[0] == option).map(|pair| pair[1].clone()).collect()
    }

    #[test]
    fn two_pods_boot_the_same_bytes() {
        let config = config(MachineType::Q35);
        let one =
            arguments(&config, &spec("one"), VsockKind::Server, &Found { tsc_mhz: Some(2600), ..Found::default() })
                .unwrap();
        let two =
            arguments(&config, &spec("two"), VsockKind::Server, &Found { tsc_mhz: Some(2600), ..Found::default() })
                .unwrap();
        for option in ["-kernel", "-initrd", "-append", "-machine", "-cpu"] {
            assert_eq!(after(&one, option), after(&two, option), "{option}");
            assert_eq!(after(&one, option).len(), 1, "{option}");
        }
        assert_ne!(one, two);
    }

    #[test]
    fn devices_are_on_the_machines_bus() {
        let on = |machine_type| {
            let all = arguments(
                &config(machine_type),
                &spec("x"),
                VsockKind::Server,
                &Found { tsc_mhz: Some(2600), ..Found::default() },
            )
            .unwrap();
            after(&all, "-device").into_iter().map(|device| device.into_string().unwrap()).collect::<Vec<_>>()
        };
        let q35 = on(MachineType::Q35);
        assert_eq!(q35[0], "pcie-pci-bridge,id=hotplug,bus=pcie.0,addr=0x1e", "a place for what comes later");
        assert!(q35[1..].iter().all(|device| device.split(',').next().unwrap().ends_with("-pci")));
        assert!(on(MachineType::Microvm).iter().all(|device| device.split(',').next().unwrap().ends_with("-device")));
    }

    #[test]
    fn only_an_emulated_microvm_is_told_its_clocks_rate() {
        let needs = |machine_type, accelerator| needs_clock_rate(&Config { accelerator, ..config(machine_type) });
        assert!(needs(MachineType::Microvm, Accelerator::Emulation));
        assert!(!needs(MachineType::Microvm, Accelerator::Kvm));
        assert!(!needs(MachineType::Q35, Accelerator::Emulation));
        assert_eq!(command_line(&spec("x"), Some(2600)), "quiet tsc_early_khz=2600000 console=ttyS0");
        assert_eq!(command_line(&spec("x"), None), "quiet console=ttyS0");
    }

    #[test]
    fn only_a_machine_with_pci_has_room_to_grow() {
        let mut spec = spec("x");
        let words = |spec: &MachineSpec, machine_type| {
            let all = arguments(&config(machine_type), spec, VsockKind::Kernel(3), &Found::default()).unwrap();
            all.into_iter().map(|word| word.into_string().unwrap()).collect::<Vec<_>>().join(" ")
        };
        let fixed = words(&spec, MachineType::Q35);
        assert!(fixed.contains("-smp 1,maxcpus=1 -m 256M ") && !fixed.contains("virtio-mem"), "{fixed}");
        spec.memory = Memory { max_mib: 1024, kind: MemoryKind::Private, ..spec.memory };
        spec.cpus.max = 4;
        let grows = words(&spec, MachineType::Q35);
        assert!(grows.contains("-smp 1,maxcpus=4 -m 256M,maxmem=1024M "), "{grows}");
        assert!(grows.contains("memory-backend-ram,id=growth,size=768M,reserve=off"), "{grows}");
        assert!(words(&spec, MachineType::Microvm).contains("-smp 1,maxcpus=1 -m 256M "));
    }

    #[test]
    fn memory_is_of_the_nodes_that_were_asked_for() {
        let mut spec = spec("x");
        spec.host_nodes = vec![0, 3];
        let all = arguments(&config(MachineType::Q35), &spec, VsockKind::Server, &Found::default()).unwrap();
        let ram = after(&all, "-object")[0].clone().into_string().unwrap();
        assert!(ram.contains(",host-nodes=0,host-nodes=3,policy=bind,id=ram"), "{ram}");
    }

    #[test]
    fn several_queues_have_a_descriptor_and_a_server_each() {
        let mut spec = spec("x");
        let end = || Descriptor::new(std::os::unix::net::UnixStream::pair().unwrap().0.into());
        spec.devices.push(Device::Net { mac: [2, 0, 0, 0, 0, 1], taps: vec![end(), end()] });
        spec.devices.push(Device::NetStream { mac: [2, 0, 0, 0, 0, 2], stream: end() });
        spec.devices.push(Device::Net { mac: [2, 0, 0, 0, 0, 3], taps: vec![end()] });
        let of = |machine_type, has_net_servers| {
            let found = Found { has_net_servers, ..Found::default() };
            let all = arguments(&config(machine_type), &spec, VsockKind::Server, &found).unwrap();
            let devices = after(&all, "-device").into_iter().map(|word| word.into_string().unwrap());
            let devices: Vec<_> = devices.filter(|word| word.starts_with("virtio-net")).collect();
            (after(&all, "-netdev"), devices)
        };
        let (nets, devices) = of(MachineType::Q35, true);
        assert_eq!(nets[0], "tap,fds=5:6,vhost=on,vhostfds=9:10,id=net-020000000001");
        assert_eq!(nets[1], "stream,addr.type=fd,addr.str=7,server=off,id=net4");
        assert_eq!(nets[2], "tap,fd=8,vhost=on,vhostfd=11,id=net-020000000003");
        assert!(devices[0].contains(",mq=on,vectors=6,") && !devices[1].contains("mq"), "{devices:?}");
        let (nets, devices) = of(MachineType::Microvm, false);
        assert_eq!(nets[0], "tap,fds=5:6,id=net3");
        assert!(devices[0].contains(",mq=on") && !devices[0].contains("vectors"), "{devices:?}");
    }

    #[test]
    fn devices_of_the_host_have_a_port_each() {
        let mut spec = spec("x");
        let vfio = |address: &str, by_iommufd| Device::Vfio { address: address.parse().unwrap(), by_iommufd };
        spec.devices.extend([vfio("0000:01:00.0", false), vfio("0000:02:00.1", true)]);
        let all = arguments(&config(MachineType::Q35), &spec, VsockKind::Server, &Found::default()).unwrap();
        let devices: Vec<_> = after(&all, "-device").into_iter().map(|word| word.into_string().unwrap()).collect();
        // Before those that QEMU finds a place for.
        let [port, first, _, second, ..] = devices.as_slice() else { panic!("{devices:?}") };
        assert_eq!(port, "pcie-root-port,id=port-vfio-0000-01-00-0,bus=pcie.0,addr=0x10,chassis=1,slot=1");
        assert_eq!(first, "vfio-pci,host=0000:01:00.0,id=vfio-0000-01-00-0,bus=port-vfio-0000-01-00-0");
        assert_eq!(
            second,
            "vfio-pci,host=0000:02:00.1,id=vfio-0000-02-00-1,bus=port-vfio-0000-02-00-1,iommufd=iommufd"
        );
        assert!(after(&all, "-object").contains(&"iommufd,id=iommufd,fd=3".into()));
        // And while it runs.
        assert_eq!(
            crate::vfio::front("0000:02:00.1".parse().unwrap(), true),
            serde_json::json!({ "driver": "vfio-pci", "host": "0000:02:00.1", "iommufd": "iommufd" })
        );
        assert!(arguments(&config(MachineType::Microvm), &spec, VsockKind::Server, &Found::default()).is_err());
        spec.access_platform = true;
        assert!(arguments(&config(MachineType::Q35), &spec, VsockKind::Server, &Found::default()).is_err());
    }

    #[test]
    fn networks_of_users_need_no_tap() {
        let mut spec = spec("x");
        let forward = |is_udp, host: &str, guest| Forward { is_udp, host: host.parse().unwrap(), guest };
        let forwards = vec![forward(false, "0.0.0.0:8080", 80), forward(true, "127.0.0.1:53", 5353)];
        spec.devices.push(Device::NetUser { mac: [2, 0, 0, 0, 0, 1], forwards });
        let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
        spec.devices.push(Device::NetStream { mac: [2, 0, 0, 0, 0, 2], stream: Descriptor::new(socket.into()) });
        let all = arguments(&config(MachineType::Q35), &spec, VsockKind::Server, &Found::default()).unwrap();
        let nets = after(&all, "-netdev");
        let user = "user,ipv6=off,hostfwd=tcp:0.0.0.0:8080-:80,hostfwd=udp:127.0.0.1:53-:5353,id=net3";
        assert_eq!(nets, [user, "stream,addr.type=fd,addr.str=5,server=off,id=net4"]);
    }

    #[test]
    fn nothing_of_a_pod_is_a_path_to_qemu() {
        let disk = |path: &str, read_only, serial: &str| Device::Block {
            path: path.into(),
            read_only,
            direct: !read_only,
            serial: serial.into(),
        };
        let mut spec = spec("a,b");
        spec.devices.extend([disk("/images/a,readonly=off", true, "layer-0"), disk("/c/rw", false, "rw")]);
        let all = from(20, &config(MachineType::Microvm), &spec, VsockKind::Server, &Found::default()).unwrap();
        assert_eq!(
            (&after(&all, "-kernel")[0], &after(&all, "-initrd")[0]),
            (&"/proc/self/fd/20".into(), &"/proc/self/fd/21".into())
        );
        let chardevs = after(&all, "-chardev");
        assert!(chardevs.contains(&"socket,id=vsock,fd=22".into()), "{chardevs:?}");
        assert!(chardevs.contains(&"socket,id=fs2,fd=23".into()), "{chardevs:?}");
        assert_eq!(after(&all, "-add-fd"), ["fd=24,set=24", "fd=25,set=25"]);
        let blocks = after(&all, "-blockdev");
        let expected = "driver=raw,node-name=disk-layer-0,read-only=on,discard=ignore,cache.direct=off,file.driver=file,\
            file.filename=/dev/fdset/24";
        assert_eq!(blocks[0], expected);
        assert!(blocks[1].to_str().unwrap().contains("read-only=off,discard=unmap,cache.direct=on"));
        let devices = after(&all, "-device");
        assert_eq!(devices[3], "virtio-blk-device,id=disk-layer-0,drive=disk-layer-0,serial=layer-0");
        for text in all.iter().map(|word| word.to_str().unwrap()) {
            assert!(!text.contains("/images") && !text.contains("/run/coracle") && !text.contains("/k/"), "{text}");
        }
    }

    #[test]
    fn devices_of_a_sealed_machine_reach_what_is_lent_to_them_and_none_can_come() {
        let mut spec = spec("x");
        spec.devices.push(Device::Block { path: "/d".into(), read_only: true, direct: false, serial: "d".into() });
        spec.access_platform = true;
        for machine_type in [MachineType::Q35, MachineType::Microvm] {
            let all = arguments(&config(machine_type), &spec, VsockKind::Server, &Found::default()).unwrap();
            let devices = after(&all, "-device");
            let all_sealed = devices.iter().all(|device| device.to_str().unwrap().contains("iommu_platform=on"));
            assert!(all_sealed && devices.len() == spec.devices.len(), "{devices:?}");
        }
    }

    #[test]
    fn a_disks_number_is_no_option() {
        for serial in ["", "a,b", "a=b", "a b", "123456789012345678901"] {
            assert!(matches!(devices::disk_name(serial), Err(Error::Invalid(_))), "{serial}");
        }
        assert_eq!(devices::disk_name("12345678901234567890").unwrap(), "disk-12345678901234567890");
    }
}
