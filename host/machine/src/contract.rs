//! The machine contract: what every driver's machines do alike. The fake passes it in this crate's tests, each driver in
//! its own lane. A failed expectation panics: these are tests.

use std::path::Path;
use std::time::Duration;

use tokio::io::AsyncReadExt;

use crate::{Cpus, Device, DeviceKind, Driver, Error, Limits, MachineSpec, MemoryKind, Rate};

/// How long a machine may take where only an event is waited for; emulation on a busy machine is slow.
const PATIENCE: Duration = Duration::from_secs(120);

async fn patiently<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what}: nothing within {PATIENCE:?}"),
    }
}

/// Runs the whole contract. `spec` gives a fresh, bootable specification each time, whose guest greets the host.
///
/// # Panics
/// Where the driver breaks the contract.
pub async fn all(driver: &dyn Driver, spec: impl Fn() -> MachineSpec) {
    lives_and_stops(driver, spec()).await;
    says_unsupported(driver, spec()).await;
    pauses_or_says_no(driver, spec()).await;
    grows_and_shrinks(driver, spec()).await;
    leaves_memory_to_its_host_or_says_no(driver, spec()).await;
    gains_and_loses_disks(driver, spec()).await;
    saves_and_restores_or_says_no(driver, &spec).await;
    is_gone_when_dropped(driver, spec()).await;
    names_what_is_missing(driver, spec()).await;
    leaves_nothing_when_boot_is_dropped(driver, spec()).await;
}

/// Boot, the guest's greeting, statistics, stop; then every verb knows the end.
pub async fn lives_and_stops(driver: &dyn Driver, spec: MachineSpec) {
    let folder = spec.folder.clone();
    let (memory_bytes, cpus) = (spec.memory.size_mib << 20, spec.cpus.boot);
    let machine = patiently("boot", driver.boot(spec)).await.expect("boot");
    let mut greeting = patiently("greeting", machine.guest_connection()).await.expect("greeting");
    let mut byte = [0];
    patiently("first byte", greeting.read_exact(&mut byte)).await.expect("the guest speaks first");
    let stats = patiently("stats", machine.stats()).await.expect("stats");
    assert_eq!((stats.memory_bytes, stats.cpus), (memory_bytes, cpus), "the machine has the size that was asked for");
    patiently("connect", machine.agent_address().connect(1024)).await.expect("the agent listens when it greets");
    let (first, second) = (machine.wait(), machine.wait());
    patiently("stop", machine.stop()).await.expect("stop");
    let (first, second) = (patiently("wait", first).await, patiently("wait", second).await);
    assert_eq!(first, second, "all who wait hear the same");
    assert!(!first.reason.is_empty());
    patiently("second stop", machine.stop()).await.expect("a second stop is no error");
    assert!(
        matches!(patiently("stats", machine.stats()).await, Err(Error::Ended(_))),
        "statistics of an ended machine"
    );
    drop(machine);
    let left: Vec<_> = std::fs::read_dir(&folder).expect("the folder").flatten().map(|entry| entry.path()).collect();
    assert!(left.is_empty(), "left in the machine's folder: {left:?}");
}

/// What the capabilities deny is answered Unsupported.
pub async fn says_unsupported(driver: &dyn Driver, spec: MachineSpec) {
    let capabilities = driver.capabilities(&spec);
    let machine = patiently("boot", driver.boot(spec)).await.expect("boot");
    let disk = Device::Block { path: "/dev/null".into(), read_only: true, direct: false, serial: "none".into() };
    for device in [Device::Rng, Device::Vsock, disk] {
        if !capabilities.hotplug.contains(&device.kind()) {
            assert!(matches!(machine.attach(device.clone()).await, Err(Error::Unsupported(_))), "attach {device:?}");
            assert!(matches!(machine.detach(device.clone()).await, Err(Error::Unsupported(_))), "detach {device:?}");
        }
    }
    for device in [Device::Rng, Device::Vsock] {
        let limited = machine.limit(device.clone(), Limits::default()).await;
        assert!(matches!(limited, Err(Error::Unsupported(_))), "limit {device:?}");
    }
    if !capabilities.resize {
        assert!(matches!(machine.resize(2, 1024).await, Err(Error::Unsupported(_))), "resize");
    }
    patiently("stop", machine.stop()).await.expect("stop");
}

/// What was promised to grow does, comes back, and no further than both its ends.
pub async fn grows_and_shrinks(driver: &dyn Driver, mut spec: MachineSpec) {
    spec.cpus.max = spec.cpus.boot + 1;
    spec.memory.max_mib = spec.memory.size_mib + GROWTH_MIB;
    if !driver.capabilities(&spec).resize {
        return;
    }
    let (cpus, memory_mib) = (spec.cpus.boot, spec.memory.size_mib);
    let machine = patiently("boot", driver.boot(spec)).await.expect("boot");
    let mut greeting = patiently("greeting", machine.guest_connection()).await.expect("greeting");
    patiently("first byte", greeting.read_exact(&mut [0])).await.expect("the guest speaks first");
    for (cpus, memory_mib) in [(cpus + 1, memory_mib + GROWTH_MIB), (cpus + 1, memory_mib), (cpus, memory_mib)] {
        patiently("resize", machine.resize(cpus, memory_mib)).await.expect("resize");
        assert_eq!(
            patiently("stats", machine.stats()).await.expect("stats").cpus,
            cpus,
            "processors that were asked for"
        );
        // A guest that does nothing can give back what it has gained.
        patiently("the size that was asked for", async {
            while machine.stats().await.expect("stats").memory_bytes != memory_mib << 20 {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
    for (cpus, memory_mib) in [(cpus + 2, memory_mib), (cpus, memory_mib + 2 * GROWTH_MIB), (cpus, memory_mib / 2)] {
        let refused = patiently("resize", machine.resize(cpus, memory_mib)).await;
        assert!(matches!(refused, Err(Error::Invalid(_))), "{cpus} processors and {memory_mib} MiB: {refused:?}");
    }
    patiently("stop", machine.stop()).await.expect("stop");
}

/// Disks come and go where that is promised, again and again by one name, and what can't be is refused.
pub async fn gains_and_loses_disks(driver: &dyn Driver, spec: MachineSpec) {
    let capabilities = driver.capabilities(&spec);
    if !capabilities.hotplug.contains(&DeviceKind::Block) {
        return;
    }
    let file = spec.folder.with_extension("disk");
    std::fs::write(&file, vec![0; 1 << 20]).expect("a file for a disk");
    let disk = |path: &std::path::Path, serial: &str| Device::Block {
        path: path.into(),
        read_only: false,
        direct: false,
        serial: serial.into(),
    };
    let machine = patiently("boot", driver.boot(spec)).await.expect("boot");
    let mut greeting = patiently("greeting", machine.guest_connection()).await.expect("greeting");
    patiently("first byte", greeting.read_exact(&mut [0])).await.expect("the guest speaks first");
    let first = disk(&file, "one");
    for round in 0..3_u64 {
        patiently("attach", machine.attach(first.clone())).await.expect("attach");
        let twice = patiently("attach", machine.attach(first.clone())).await;
        assert!(matches!(twice, Err(Error::Invalid(_))), "a second one of that name: {twice:?}");
        let larger = (round + 2) << 20;
        let rate = Rate { bytes_per_second: 1 << 20, operations_per_second: 100 * round };
        let limits = Limits { to_guest: rate, from_guest: rate };
        let limited = patiently("limit", machine.limit(first.clone(), limits)).await;
        if capabilities.limits.contains(&DeviceKind::Block) {
            limited.expect("a slower disk");
            let nobody = patiently("limit", machine.limit(disk(Path::new("/nowhere/disk"), "nobody"), limits)).await;
            assert!(matches!(nobody, Err(Error::Invalid(_))), "one that is not there: {nobody:?}");
        } else {
            assert!(matches!(limited, Err(Error::Unsupported(_))), "limit: {limited:?}");
        }
        patiently("resize", machine.resize_disk(first.clone(), larger)).await.expect("a larger disk");
        assert_eq!(std::fs::metadata(&file).expect("the file").len(), larger, "the file grows with the disk");
        let smaller = patiently("resize", machine.resize_disk(first.clone(), larger / 2)).await;
        assert!(matches!(smaller, Err(Error::Invalid(_))), "a smaller disk: {smaller:?}");
        // A guest that is asked before it has seen it may refuse: then it is asked again.
        patiently("detach", async { while machine.detach(first.clone()).await.is_err() {} }).await;
    }
    let gone = patiently("detach", machine.detach(first)).await;
    assert!(matches!(gone, Err(Error::Invalid(_))), "one that is not there: {gone:?}");
    let nowhere = patiently("attach", machine.attach(disk(std::path::Path::new("/nowhere/disk"), "two"))).await;
    assert!(nowhere.is_err(), "a disk without a file");
    patiently("attach", machine.attach(disk(&file, "two"))).await.expect("the name was not taken by what failed");
    patiently("stop", machine.stop()).await.expect("stop");
    std::fs::remove_file(&file).expect("the disk's file");
}

/// A machine is saved and goes on, others start where it stood, and what is no saved machine is refused; or all of it is Unsupported.
pub async fn saves_and_restores_or_says_no(driver: &dyn Driver, spec: &impl Fn() -> MachineSpec) {
    let private = || {
        let mut spec = spec();
        spec.memory.kind = MemoryKind::Private;
        spec
    };
    let first = private();
    let saved = first.folder.with_extension("saved");
    let can = driver.capabilities(&first).snapshot;
    let machine = patiently("boot", driver.boot(first)).await.expect("boot");
    let mut greeting = patiently("greeting", machine.guest_connection()).await.expect("greeting");
    patiently("first byte", greeting.read_exact(&mut [0])).await.expect("the guest speaks first");
    if !can {
        assert!(matches!(machine.save(saved.clone()).await, Err(Error::Unsupported(_))), "save");
        assert!(matches!(driver.restore(private(), saved.clone()).await, Err(Error::Unsupported(_))), "restore");
        assert!(!saved.exists(), "nothing is saved");
        return patiently("stop", machine.stop()).await.expect("stop");
    }
    patiently("save", machine.save(saved.clone())).await.expect("save");
    let again = patiently("save", machine.save(saved.clone())).await;
    assert!(matches!(again, Err(Error::Invalid(_))), "into a folder that is there: {again:?}");
    // It goes on, and its connections are as they were.
    patiently("connect", machine.agent_address().connect(1024)).await.expect("the agent of the saved machine");
    let shared = MachineSpec { folder: private().folder, ..spec() };
    if shared.memory.kind == MemoryKind::Shared {
        let refused = patiently("restore", driver.restore(shared, saved.clone())).await.map(drop);
        assert!(matches!(refused, Err(Error::Unsupported(_))), "with memory that others map: {refused:?}");
    }
    refuses_what_is_no_saved_machine(driver, &private, &saved).await;
    // Two at once, beside the one that was saved.
    let (one, other) = tokio::join!(driver.restore(private(), saved.clone()), driver.restore(private(), saved.clone()));
    for restored in [one.expect("restore"), other.expect("restore")] {
        let mut greeting = patiently("greeting", restored.guest_connection()).await.expect("it greets anew");
        patiently("first byte", greeting.read_exact(&mut [0])).await.expect("the guest speaks first");
        patiently("connect", restored.agent_address().connect(1024)).await.expect("the agent of the restored machine");
        patiently("stop", restored.stop()).await.expect("stop");
    }
    patiently("connect", machine.agent_address().connect(1024)).await.expect("the agent of the saved machine");
    patiently("stop", machine.stop()).await.expect("stop");
    std::fs::remove_dir_all(&saved).expect("the saved machine");
}

/// What is missing, cut off, changed, another machine's or another version's is [`Error::Missing`], and leaves nothing.
async fn refuses_what_is_no_saved_machine(driver: &dyn Driver, spec: &impl Fn() -> MachineSpec, saved: &Path) {
    let refused = async |what: &str, spec: MachineSpec, folder: &Path| {
        let own = spec.folder.clone();
        match patiently("restore", driver.restore(spec, folder.into())).await {
            Err(Error::Missing(_)) => {}
            Err(error) => panic!("{what}: {error}"),
            Ok(_) => panic!("{what}: restored"),
        }
        assert_eq!(std::fs::read_dir(&own).expect("the folder").count(), 0, "left after {what}");
    };
    refused("nothing", spec(), Path::new("/nowhere/saved")).await;
    let mut larger = spec();
    larger.memory.size_mib += 64;
    larger.memory.max_mib += 64;
    refused("another size", larger, saved).await;
    let mut more = spec();
    more.cpus = Cpus { boot: more.cpus.boot + 1, max: more.cpus.max + 1 };
    refused("more processors", more, saved).await;
    let mut other = spec();
    other.devices.push(Device::Balloon);
    refused("more devices", other, saved).await;
    let copy = saved.with_extension("copy");
    for name in ["state", "memory"] {
        for (what, change) in [
            ("half of it", (|bytes| bytes.truncate(bytes.len() / 2)) as fn(&mut Vec<u8>)),
            ("nothing of it", Vec::clear),
            ("more of it", |bytes| bytes.push(0)),
            ("its end changed", |bytes| {
                if let Some(last) = bytes.last_mut() {
                    *last ^= 1;
                }
            }),
        ] {
            std::fs::create_dir(&copy).expect("a copy's folder");
            for file in ["state", "memory"] {
                let mut bytes = std::fs::read(saved.join(file)).expect("a file of the saved machine");
                if file == name {
                    change(&mut bytes);
                }
                std::fs::write(copy.join(file), bytes).expect("a copy");
            }
            refused(&format!("{name}: {what}"), spec(), &copy).await;
            std::fs::remove_dir_all(&copy).expect("the copy");
        }
    }
}

/// What the guest of the contract leaves to its host, in bytes.
const BALLOON_BYTES: u64 = 16 << 20;

/// A guest leaves as much memory to its host as it is asked for, and has it again; or a balloon is Unsupported.
pub async fn leaves_memory_to_its_host_or_says_no(driver: &dyn Driver, mut spec: MachineSpec) {
    if driver.capabilities(&spec).coldplug.contains(&DeviceKind::Balloon) && !spec.devices.contains(&Device::Balloon) {
        spec.devices.push(Device::Balloon);
    }
    let (can, all) = (driver.capabilities(&spec).balloon, spec.memory.size_mib << 20);
    let machine = patiently("boot", driver.boot(spec)).await.expect("boot");
    let mut greeting = patiently("greeting", machine.guest_connection()).await.expect("greeting");
    patiently("first byte", greeting.read_exact(&mut [0])).await.expect("the guest speaks first");
    if !can {
        assert!(matches!(machine.balloon(BALLOON_BYTES).await, Err(Error::Unsupported(_))), "a balloon");
        return patiently("stop", machine.stop()).await.expect("stop");
    }
    for bytes in [all, u64::MAX] {
        assert!(matches!(machine.balloon(bytes).await, Err(Error::Invalid(_))), "a balloon of {bytes} bytes");
    }
    for bytes in [BALLOON_BYTES, BALLOON_BYTES / 2, 0] {
        patiently("balloon", machine.balloon(bytes)).await.expect("balloon");
        // The guest tells the monitor, and nobody tells who looks on.
        let left = async {
            while machine.stats().await.expect("stats").balloon_bytes != bytes {
                tokio::task::yield_now().await;
            }
        };
        patiently("what the guest leaves", left).await;
        assert_eq!(machine.stats().await.expect("stats").memory_bytes, all, "its size stays");
    }
    patiently("stop", machine.stop()).await.expect("stop");
}

/// By how much the machine of the contract grows.
const GROWTH_MIB: u64 = 256;

/// Pause and resume work where they are promised.
pub async fn pauses_or_says_no(driver: &dyn Driver, spec: MachineSpec) {
    let can = driver.capabilities(&spec).pause;
    let machine = patiently("boot", driver.boot(spec)).await.expect("boot");
    let paused = patiently("pause", machine.pause()).await;
    if can {
        paused.expect("pause");
        patiently("resume", machine.resume()).await.expect("resume");
        // The guest goes on: it comes to its greeting.
        patiently("greeting", machine.guest_connection()).await.expect("greeting");
    } else {
        assert!(matches!(paused, Err(Error::Unsupported(_))));
    }
    patiently("stop", machine.stop()).await.expect("stop");
}

/// A machine that nobody holds ends.
pub async fn is_gone_when_dropped(driver: &dyn Driver, spec: MachineSpec) {
    let machine = patiently("boot", driver.boot(spec)).await.expect("boot");
    let end = machine.wait();
    drop(machine);
    patiently("the end", end).await;
}

/// A missing kernel is named, and nothing is started.
pub async fn names_what_is_missing(driver: &dyn Driver, mut spec: MachineSpec) {
    let folder = spec.folder.clone();
    spec.kernel.path = "/nowhere/vmlinux".into();
    match patiently("boot", driver.boot(spec)).await {
        Err(Error::Missing(text)) => assert!(text.contains("/nowhere/vmlinux"), "{text}"),
        Err(other) => panic!("a missing kernel is not Missing: {other}"),
        Ok(_) => panic!("a machine without a kernel was booted"),
    }
    assert_eq!(std::fs::read_dir(&folder).expect("the folder").count(), 0, "left after a failed boot");
}

/// A boot that is given up leaves nothing.
pub async fn leaves_nothing_when_boot_is_dropped(driver: &dyn Driver, spec: MachineSpec) {
    let folder = spec.folder.clone();
    {
        let boot = driver.boot(spec);
        // Polled once at least, so that it has begun.
        let _ = tokio::time::timeout(Duration::from_millis(1), boot).await;
    }
    patiently("an empty folder", async {
        while std::fs::read_dir(&folder).expect("the folder").next().is_some() {
            // The machine's own clean-up runs on this event loop.
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::io::AsyncWriteExt;
    use tokio::net::{UnixListener, UnixStream};

    use super::*;
    use crate::fake::{FakeDriver, FakeGuest};
    use crate::{Architecture, Kernel, KernelForm, Memory, Platform};

    /// A guest that greets, listens, and lives on.
    fn guest(guest: FakeGuest) -> futures::future::BoxFuture<'static, String> {
        Box::pin(async move {
            let _agent = UnixListener::bind(guest.port_socket(1024)).unwrap();
            let mut host = UnixStream::connect(guest.hello_socket()).await.unwrap();
            host.write_all(b"{}\n").await.unwrap();
            std::future::pending().await
        })
    }

    #[tokio::test]
    async fn the_fake_keeps_the_contract() {
        let folder = tempfile::tempdir().unwrap();
        let kernel = folder.path().join("vmlinux");
        std::fs::write(&kernel, "").unwrap();
        let count = std::cell::Cell::new(0);
        let spec = || {
            count.set(count.get() + 1);
            let own = folder.path().join(count.get().to_string());
            std::fs::create_dir(&own).unwrap();
            MachineSpec {
                name: "fake".into(),
                folder: own,
                architecture: Architecture::X86_64,
                platform: Platform::Plain,
                firmware: None,
                kernel: Kernel { path: kernel.clone(), form: KernelForm::PvhElf },
                initrd: kernel.clone(),
                command_line: String::new(),
                cpus: Cpus { boot: 1, max: 1 },
                memory: Memory { size_mib: 128, max_mib: 128, kind: MemoryKind::Shared, huge_pages: false },
                devices: vec![Device::Vsock],
                console: true,
                access_platform: false,
                host_cpus: Vec::new(),
                host_nodes: Vec::new(),
            }
        };
        all(&FakeDriver::new(Arc::new(guest)), spec).await;
    }
}
