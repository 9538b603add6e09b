//! PCI devices of the host's that a pod's machine has for itself. The lab has one behind an emulated IOMMU (xtask/src/lab/machine.rs):
//! a network link, on one wire with another one.
//!
//! Lane: open: a device of the host's reaches all of the guest's memory.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use coracle_e2e::{Containerd, Host, Netns, Outcome, Running, ip, run_in};

/// The link that can be passed on, and the other one, by their hardware addresses.
const PASSED: &str = "52:54:00:c0:ac:01";
const FAR: &str = "52:54:00:c0:ac:02";

/// The host's link of a hardware address.
fn link(mac: &str) -> Option<String> {
    let links = std::fs::read_dir("/sys/class/net").ok()?.flatten();
    let is_it = |path: &Path| std::fs::read_to_string(path.join("address")).is_ok_and(|text| text.trim() == mac);
    links.map(|entry| entry.path()).find(|path| is_it(path))?.file_name()?.to_str().map(str::to_owned)
}

/// The device of the link that can be passed on; where this host has none, that is said.
fn passable() -> Option<PathBuf> {
    for module in ["virtio_net", "vfio_pci"] {
        // Where it is built in there is none.
        let _ = Command::new("modprobe").arg(module).status();
    }
    let device = link(PASSED).and_then(|name| {
        let device = Path::new("/sys/class/net").join(name).join("device/..").canonicalize().ok()?;
        device.join("iommu_group").exists().then_some(device)
    });
    if device.is_none() {
        println!("left out: this host has no device {PASSED} behind an IOMMU; the lab has");
    }
    device
}

fn driver(device: &Path) -> Option<String> {
    std::fs::read_link(device.join("driver")).ok()?.file_name()?.to_str().map(str::to_owned)
}

fn container(containerd: &Containerd, options: &[&str], id: &str, script: &str) -> Command {
    let run = ["run", "--rm", "--runtime", "io.containerd.coracle.v2"];
    containerd.command(&[&run, options, &["test:latest", id, "sh", "-c", script]].concat())
}

#[test]
fn a_device_of_the_host_is_the_machines_and_comes_back_on_qemu() {
    goes_and_comes_back("qemu");
}

#[test]
fn a_device_of_the_host_is_the_machines_and_comes_back_on_the_builtin_monitor() {
    goes_and_comes_back("builtin");
}

/// There is one device.
static TURN: Mutex<()> = Mutex::new(());

fn goes_and_comes_back(monitor: &str) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(device) = passable() else { return };
    let host = Host::new().set("machine.monitor", &format!("\"{monitor}\""));
    let containerd = Containerd::start(&host);
    let (pod, far) = (Netns::new(&host, "pod"), Netns::new(&host, "far"));
    let (own, other) = (link(PASSED).unwrap(), link(FAR).unwrap());
    ip(&format!("link set {own} netns {} name net1", pod.name()));
    ip(&format!("link set {other} netns {}", far.name()));
    for (netns, link, number) in [(&pod, "net1", 2), (&far, &*other, 1)] {
        netns.ip(&format!("address add 10.77.1.{number}/24 dev {link}"));
        netns.ip(&format!("link set {link} up"));
    }
    let before = driver(&device);
    assert_eq!(before.as_deref(), Some("virtio-pci"));

    // A link of the pod's namespace.
    let namespace = format!("network:{}", pod.path());
    let is_back = || {
        let found = ip(&format!("-netns {} -o link show", pod.name()));
        driver(&device) == before && found.contains(": net1: ") && found.contains(PASSED)
    };
    let script = "cat /sys/class/net/net1/address; ping -c 3 -W 10 10.77.1.1 >/dev/null && echo REACHES; \
        until [ -e /tmp/done ]; do sleep 0.1; done";
    let mut inside = Running::start(container(&containerd, &["--with-ns", &namespace], "link", script));
    let told = inside.read_until("REACHES");
    assert!(told.contains(PASSED), "{told}");
    assert_eq!(driver(&device).as_deref(), Some("vfio-pci"));
    assert!(!pod.ip("-o link show").contains("net1"), "the machine has it");
    let answer = run_in(&far, "busybox", &["ping", "-c", "2", "-W", "10", "10.77.1.2"]);
    assert_eq!(answer.code, 0, "{answer:?}");
    assert_eq!(containerd.ctr(&["task", "exec", "--exec-id", "done", "link", "touch", "/tmp/done"]).code, 0);
    assert_eq!(inside.finish().code, 0);
    assert!(is_back(), "{:?} {}", driver(&device), pod.ip("-o link show"));

    // The same where the shim was killed.
    pod.ip("address add 10.77.1.2/24 dev net1");
    let mut inside =
        Running::start(container(&containerd, &["--with-ns", &namespace], "killed", "echo UP; sleep 100000"));
    let _ = inside.read_until("UP");
    host.kill("containerd-shim-coracle");
    let _ = inside.finish();
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_back() {
        assert!(Instant::now() < deadline, "{:?} {}", driver(&device), pod.ip("-o link show"));
        // containerd hears of the end, and cleans up, by itself.
        std::thread::sleep(Duration::from_millis(100));
    }

    // A file of /dev/vfio, whose device the guest's own driver has.
    let address = device.file_name().unwrap().to_str().unwrap();
    let put = |path: &str, text: &str| std::fs::write(path, text).unwrap_or_else(|error| panic!("{path}: {error}"));
    put(&device.join("driver_override").display().to_string(), "vfio-pci");
    put(&device.join("driver/unbind").display().to_string(), address);
    put("/sys/bus/pci/drivers_probe", address);
    let group = std::fs::read_link(device.join("iommu_group")).unwrap();
    let file = format!("/dev/vfio/{}", group.file_name().unwrap().to_str().unwrap());
    let script = format!("cat /sys/class/net/*/address | grep -c {PASSED}; ls /dev/vfio 2>&1 | grep -c 'No such'");
    let outcome = Outcome::of(container(&containerd, &["--device", &file], "file", &script), b"");
    assert_eq!((outcome.code, outcome.stdout.as_str()), (0, "1\n1\n"), "{outcome:?}");
    // It is the host's own driver's again, by the hand that took it.
    put(&device.join("driver_override").display().to_string(), "\n");
    put(&device.join("driver/unbind").display().to_string(), address);
    put("/sys/bus/pci/drivers_probe", address);
    assert_eq!(driver(&device), before);
    drop((pod, far, containerd));
    // A namespace's end gives its devices back to the host's, and is no event.
    let deadline = Instant::now() + Duration::from_secs(60);
    while link(PASSED).is_none() || link(FAR).is_none() {
        assert!(Instant::now() < deadline, "the links are not the host's again");
        std::thread::sleep(Duration::from_millis(50));
    }
    host.audit();
}
