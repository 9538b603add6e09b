//! A monitor that is killed: told at once, whenever it happens, and nothing left.

mod guest;

use coracle_machine::Driver;
use guest::{children, given, says};

#[tokio::test]
async fn killed_at_any_moment_it_is_told_and_leaves_nothing() {
    let Some(given) = given() else { return };
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
