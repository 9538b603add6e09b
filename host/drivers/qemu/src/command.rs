//! QEMU's command line.

use std::ffi::OsString;

use coracle_machine::{
    Accelerator, Descriptor, Device, Error, Forward, KernelForm, MachineSpec, MemoryKind, NETS_MAX, Result, mac_text,
};

use crate::{Config, MachineType};

/// The descriptor on which QEMU finds its control channel, and that of the kernel's vsock.
pub(crate) const QMP_FD: i32 = 3;
pub(crate) const VHOST_FD: i32 = 4;
/// The descriptor of the first network link; the others follow.
const FIRST_NET_FD: i32 = 5;

/// The descriptors of a machine's network links, each with the number at which QEMU finds it.
pub(crate) fn nets(spec: &MachineSpec) -> Result<Vec<(i32, &Descriptor)>> {
    let nets = spec.devices.iter().filter_map(|device| match device {
        Device::Net { tap: descriptor, .. } | Device::NetStream { stream: descriptor, .. } => Some(descriptor),
        _ => None,
    });
    let nets: Vec<_> = (FIRST_NET_FD..).zip(nets).collect();
    if nets.len() > NETS_MAX {
        return Err(Error::Unsupported(format!("more than {NETS_MAX} network devices")));
    }
    Ok(nets)
}

/// How the guest's vsock is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum VsockKind {
    /// By the kernel, with this context identifier; the open device is [`VHOST_FD`].
    Kernel(u32),
    /// By a vhost-user server at the machine's [`crate::vsock::MONITOR_SOCKET`].
    Server,
}

/// All arguments. `tsc_mhz` is the rate of the host's time-stamp counter, if the guest is to be told
/// (see [`needs_clock_rate`]).
pub(crate) fn arguments(
    config: &Config,
    spec: &MachineSpec,
    vsock: VsockKind,
    tsc_mhz: Option<u32>,
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
    add(&["-smp", &format!("{},maxcpus={}", spec.cpus.boot, spec.cpus.max)]);
    add(&["-m", &format!("{memory}M")]);
    let pages = if spec.memory.huge_pages { ",hugetlb=on,hugetlbsize=2M" } else { "" };
    add(&["-object", &format!("memory-backend-memfd,id=ram,size={memory}M,share={share}{pages}")]);
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
    let bus = |device: &str| format!("{device}-{}", if pci { "pci" } else { "device" });
    let modern = if pci { ",disable-legacy=on" } else { "" };
    let mut net_fds = FIRST_NET_FD..;
    for (number, device) in spec.devices.iter().enumerate() {
        match device {
            Device::Rng => add(&["-device", &format!("{}{modern}", bus("virtio-rng"))]),
            Device::Vsock => match vsock {
                VsockKind::Kernel(cid) => {
                    add(&["-device", &format!("{},guest-cid={cid},vhostfd={VHOST_FD}{modern}", bus("vhost-vsock"))]);
                }
                VsockKind::Server => {
                    let socket = spec.folder.join(crate::vsock::MONITOR_SOCKET);
                    let socket = plain(&socket)?;
                    add(&["-chardev", &format!("socket,id=vsock,path={socket}")]);
                    add(&["-device", &format!("{},chardev=vsock", bus("vhost-user-vsock"))]);
                }
            },
            Device::SharedFs { tag, socket, queue_size } => {
                let socket = plain(socket)?;
                add(&["-chardev", &format!("socket,id=fs{number},path={socket}")]);
                let fs = bus("vhost-user-fs");
                add(&["-device", &format!("{fs},chardev=fs{number},tag={tag},queue-size={queue_size}")]);
            }
            Device::Net { mac, .. } | Device::NetStream { mac, .. } | Device::NetUser { mac, .. } => {
                let mut next = || net_fds.next().unwrap_or(FIRST_NET_FD);
                let end = match device {
                    Device::NetUser { forwards, .. } => user_network(forwards),
                    Device::NetStream { .. } => format!("stream,addr.type=fd,addr.str={},server=off", next()),
                    _ => format!("tap,fd={}", next()),
                };
                let mac = mac_text(*mac);
                // Without the ROM for booting over the network, which is a package of its own.
                let rom = if pci { ",romfile=" } else { "" };
                let net = bus("virtio-net");
                add(&["-netdev", &format!("{end},id=net{number}")]);
                add(&["-device", &format!("{net},netdev=net{number},mac={mac}{rom}{modern}")]);
            }
            Device::Block { path, read_only, direct, serial } => {
                let on = |flag: bool| if flag { "on" } else { "off" };
                let kind = if is_block_device(path) { "host_device" } else { "file" };
                let (path, serial) = (escaped(path)?, escaped(std::path::Path::new(serial))?);
                // What the guest frees is freed on the host.
                let discard = if *read_only { "ignore" } else { "unmap" };
                add(&[
                    "-blockdev",
                    &format!(
                        "driver=raw,node-name=disk{number},read-only={},discard={discard},cache.direct={},\
                         file.driver={kind},file.filename={path}",
                        on(*read_only),
                        on(*direct)
                    ),
                ]);
                let disk = bus("virtio-blk");
                add(&["-device", &format!("{disk},drive=disk{number},serial={serial}{modern}")]);
            }
            other => return Err(Error::Unsupported(format!("the device {:?}", other.kind()))),
        }
    }
    arguments.extend(config.extra_arguments.iter().map(Into::into));
    arguments.extend(["-kernel".into(), spec.kernel.path.clone().into_os_string()]);
    arguments.extend(["-initrd".into(), spec.initrd.clone().into_os_string()]);
    arguments.extend(["-append".into(), command_line(spec, tsc_mhz).into()]);
    Ok(arguments)
}

/// QEMU's own network, with the addresses that it has where nobody gives others.
fn user_network(forwards: &[Forward]) -> String {
    let mut text = "user,ipv6=off".to_owned();
    for Forward { is_udp, host, guest } in forwards {
        let protocol = if *is_udp { "udp" } else { "tcp" };
        // An address of IPv6 has brackets around it.
        text.push_str(&format!(",hostfwd={protocol}:{host}-:{guest}"));
    }
    text
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

/// A path as it may stand in an option: QEMU's options have commas between them.
fn plain(path: &std::path::Path) -> Result<&str> {
    path.to_str()
        .filter(|text| !text.contains(','))
        .ok_or_else(|| Error::Invalid(format!("QEMU can't take the path {}", path.display())))
}

/// A path in an option that may have any: a comma is written twice.
fn escaped(path: &std::path::Path) -> Result<String> {
    let text = path.to_str().ok_or_else(|| Error::Invalid(format!("QEMU can't take the path {}", path.display())))?;
    Ok(text.replace(',', ",,"))
}

fn is_block_device(path: &std::path::Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device())
}

#[cfg(test)]
mod tests {
    use coracle_machine::{Architecture, Cpus, Kernel, Memory, Platform};

    use super::*;

    fn config(machine_type: MachineType) -> Config {
        Config {
            program: "qemu".into(),
            machine_type,
            accelerator: Accelerator::Emulation,
            vsock_server: vec!["server".into()],
            kernel_vsock: false,
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
            memory: Memory { size_mib: 256, kind: MemoryKind::Shared, huge_pages: false },
            devices: vec![Device::Vsock, Device::Rng, Device::SharedFs { tag: "t".into(), socket, queue_size: 128 }],
            console: true,
        }
    }

    fn after(arguments: &[OsString], option: &str) -> Vec<OsString> {
        arguments.windows(2).filter(|pair| pair[0] == option).map(|pair| pair[1].clone()).collect()
    }

    #[test]
    fn two_pods_boot_the_same_bytes() {
        let config = config(MachineType::Q35);
        let one = arguments(&config, &spec("one"), VsockKind::Server, Some(2600)).unwrap();
        let two = arguments(&config, &spec("two"), VsockKind::Server, Some(2600)).unwrap();
        for option in ["-kernel", "-initrd", "-append", "-machine", "-cpu"] {
            assert_eq!(after(&one, option), after(&two, option), "{option}");
            assert_eq!(after(&one, option).len(), 1, "{option}");
        }
        assert_ne!(one, two);
    }

    #[test]
    fn devices_are_on_the_machines_bus() {
        let on = |machine_type| {
            let all = arguments(&config(machine_type), &spec("x"), VsockKind::Server, Some(2600)).unwrap();
            after(&all, "-device").into_iter().map(|device| device.into_string().unwrap()).collect::<Vec<_>>()
        };
        assert!(on(MachineType::Q35).iter().all(|device| device.split(',').next().unwrap().ends_with("-pci")));
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
    fn networks_of_users_need_no_tap() {
        let mut spec = spec("x");
        let forward = |is_udp, host: &str, guest| Forward { is_udp, host: host.parse().unwrap(), guest };
        let forwards = vec![forward(false, "0.0.0.0:8080", 80), forward(true, "127.0.0.1:53", 5353)];
        spec.devices.push(Device::NetUser { mac: [2, 0, 0, 0, 0, 1], forwards });
        let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
        spec.devices.push(Device::NetStream { mac: [2, 0, 0, 0, 0, 2], stream: Descriptor::new(socket.into()) });
        let all = arguments(&config(MachineType::Q35), &spec, VsockKind::Server, None).unwrap();
        let nets = after(&all, "-netdev");
        let user = "user,ipv6=off,hostfwd=tcp:0.0.0.0:8080-:80,hostfwd=udp:127.0.0.1:53-:5353,id=net3";
        assert_eq!(nets, [user, "stream,addr.type=fd,addr.str=5,server=off,id=net4"]);
    }

    #[test]
    fn disks_have_their_paths_whole() {
        let disk = |path: &str, read_only| Device::Block {
            path: path.into(),
            read_only,
            direct: !read_only,
            serial: "root-0".into(),
        };
        let mut spec = spec("x");
        spec.devices.extend([disk("/images/a,readonly=off", true), disk("/c/rw", false)]);
        let all = arguments(&config(MachineType::Microvm), &spec, VsockKind::Server, None).unwrap();
        let blocks = after(&all, "-blockdev");
        let expected = "driver=raw,node-name=disk3,read-only=on,discard=ignore,cache.direct=off,file.driver=file,\
            file.filename=/images/a,,readonly=off";
        assert_eq!(blocks[0], expected);
        assert!(blocks[1].to_str().unwrap().contains("read-only=off,discard=unmap,cache.direct=on"));
        let devices = after(&all, "-device");
        assert_eq!(devices[3], "virtio-blk-device,drive=disk3,serial=root-0");
    }

    #[test]
    fn a_path_that_would_be_options_is_refused() {
        let error = arguments(&config(MachineType::Q35), &spec("a,b"), VsockKind::Server, Some(2600)).unwrap_err();
        assert!(matches!(error, Error::Invalid(_)));
    }
}
