//! What a monitor takes, and its end when it is killed: told at once, whenever it happens, and nothing left. Tests that look
//! at the only monitor there is take turns.

mod guest;

use coracle_machine::Driver;
use guest::{children, given, says};

/// Held by each test while it has a monitor.
static ONLY: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Exits to the monitor until the agent greets, counted as 867 (Linux 6.12) when this was written: growth shows, noise does not.
const EXITS_MAX: u64 = 1300;

#[tokio::test]
async fn what_a_machine_takes_stays_within_its_budget() {
    let Some(given) = given() else { return };
    let _turn = ONLY.lock().await;
    let folder = tempfile::tempdir().unwrap();
    let driver = given.driver(true);
    let machine = driver.boot(given.image(folder.path())).await.expect("boot");
    tokio::time::timeout(guest::PATIENCE, machine.guest_connection()).await.expect("in time").expect("a greeting");
    let figures = machine.stats().await.unwrap().monitor;
    let exits = guest::exits(&figures);
    let monitor = children().pop().unwrap();
    let (memory, threads) = (guest::memory(monitor), guest::switches(monitor).len());
    println!("{exits} exits, {threads} threads, {memory:?}");
    assert!(exits <= EXITS_MAX, "{figures:?}");
    assert!(threads <= 4, "{threads} threads");
    assert!(memory.anonymous <= 2 << 10 && memory.resident <= 8 << 10, "{memory:?}");
    machine.stop().await.unwrap();
}

#[tokio::test]
async fn killed_at_any_moment_it_is_told_and_leaves_nothing() {
    let Some(given) = given() else { return };
    let _turn = ONLY.lock().await;
    let folder = tempfile::tempdir().unwrap();
    let spec = given.spec(folder.path(), &[], "echo up; while :; do :; done");
    let driver = given.driver(true);
    for round in 0..20_u64 {
        let machine = driver.boot(spec.clone()).await.expect("boot");
        // From the first instruction of the guest to well after its kernel has started.
        let moment = std::time::Duration::from_millis(round * round * 20);
        if round == 19 {
            says(&*machine, "up").await;
        } else {
            let _ = tokio::time::timeout(moment, machine.wait()).await;
        }
        let end = machine.wait();
        let found = children();
        assert_eq!(found.len(), 1, "{found:?}");
        let killed = std::time::Instant::now();
        let pid = rustix::process::Pid::from_raw(found[0]).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        let end = tokio::time::timeout(std::time::Duration::from_secs(2), end).await;
        let end = end.unwrap_or_else(|_| panic!("round {round}: not told within 2 s"));
        assert_eq!(end.reason, "the monitor was killed by signal 9", "after {moment:?}");
        println!("round {round}: told after {:?}", killed.elapsed());
        drop(machine);
        assert_eq!(std::fs::read_dir(folder.path().join("machine")).unwrap().count(), 0);
        assert!(children().is_empty());
    }
}
