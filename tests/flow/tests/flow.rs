//! Create, start, exec, kill, delete: the whole way, without a machine.

use std::sync::Arc;
use std::time::{Duration, Instant};

use coracle_flow::{Bench, Scripted, beside, captured, first, greet, in_own_mounts};
use coracle_machine::fake::FakeGuest;
use coracle_protocol::oci;
use coracle_sandbox::{Error, Event, Status, Stdio};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Answers that are due within 100 ms are given ten times as long: the machine is shared.
const SOON: Duration = Duration::from_secs(1);

async fn soon<T>(what: &str, answer: impl Future<Output = T>) -> T {
    let start = Instant::now();
    let answer = answer.await;
    assert!(start.elapsed() < SOON, "{what} took {:?}", start.elapsed());
    answer
}

#[test]
fn a_container_prints_and_ends() {
    in_own_mounts(async {
        let bench = Bench::real();
        let (exit, output) = bench.run("c1", "echo out; echo err >&2; exit 7").await;
        assert_eq!(exit.status, 7);
        assert!(output.contains("out\n") && output.contains("err\n"), "{output:?}");
        // A pod takes a new container after its last one has ended.
        assert_eq!(bench.run("c1", "exit 0").await.0.status, 0);
        bench.sandbox.stop().await.unwrap();
        assert!(!bench.folder.path().join("m").exists(), "the machine's folder is gone");
    });
}

#[test]
fn states_follow_one_another() {
    in_own_mounts(async {
        let mut bench = Bench::real();
        let process = first("c1");
        assert!(matches!(bench.sandbox.state(&process).await, Err(Error::NotFound(_))));
        bench.create("c1", "cat", Stdio::default()).await.unwrap();
        assert_eq!(bench.sandbox.state(&process).await.unwrap().status, Status::Created);
        assert!(matches!(bench.create("c1", "cat", Stdio::default()).await, Err(Error::Exists(_))));
        bench.sandbox.start(&process).await.unwrap();
        assert!(matches!(bench.sandbox.start(&process).await, Err(Error::State(_))));
        bench.sandbox.wait(&process).await.unwrap();
        assert_eq!(bench.sandbox.state(&process).await.unwrap().status, Status::Stopped);
        assert!(matches!(bench.sandbox.kill(&process, 9).await, Err(Error::NotFound(_))));
        assert!(matches!(bench.events.recv().await, Some(Event::Exited { .. })));
        bench.sandbox.delete(&process).await.unwrap();
        assert!(matches!(bench.sandbox.delete(&process).await, Err(Error::NotFound(_))));
        bench.sandbox.stop().await.unwrap();
    });
}

#[test]
fn killed_as_soon_as_it_has_started_it_has_ended() {
    in_own_mounts(async {
        let bench = Bench::real();
        let rounds = std::env::var("CORACLE_TEST_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(20);
        for number in 0..rounds {
            let process = first(&format!("c{number}"));
            let script = if number % 2 == 0 { "sleep 1000" } else { "sleep 1000 & sleep 1000" };
            bench.create(&process.container, script, Stdio::default()).await.unwrap();
            bench.sandbox.start(&process).await.unwrap();
            bench.sandbox.kill(&process, 9).await.unwrap();
            let exit = tokio::time::timeout(Duration::from_secs(20), bench.sandbox.wait(&process)).await;
            assert_eq!(exit.unwrap_or_else(|_| panic!("round {number}: no end")).unwrap().status, 137);
            bench.sandbox.delete(&process).await.unwrap();
        }
        bench.sandbox.stop().await.unwrap();
    });
}

#[test]
fn execs_are_processes_of_their_own() {
    in_own_mounts(async {
        let bench = Bench::real();
        let process = first("c1");
        bench.create("c1", "sleep 1000", Stdio::default()).await.unwrap();
        bench.sandbox.start(&process).await.unwrap();
        let exec = |script: &str| -> oci::Process {
            let json =
                serde_json::json!({ "args": ["/bin/sh", "-c", script], "cwd": "/", "user": {}, "env": ["PATH=/bin"] });
            coracle_protocol::from_json(&json.to_string()).unwrap()
        };
        for (number, code) in [(1, 0), (2, 42)] {
            let id = beside("c1", &format!("e{number}"));
            let (stdio, output) = captured();
            bench.sandbox.exec(&id, exec(&format!("echo {number}; exit {code}")), stdio).await.unwrap();
            bench.sandbox.start(&id).await.unwrap();
            assert_eq!(bench.sandbox.wait(&id).await.unwrap().status, code);
            bench.sandbox.delete(&id).await.unwrap();
            assert_eq!(output.text(), format!("{number}\n"));
        }
        let id = beside("c1", "missing");
        let missing: oci::Process =
            coracle_protocol::from_json(r#"{"args":["nosuch"],"cwd":"/","user":{},"env":["PATH=/bin"]}"#).unwrap();
        bench.sandbox.exec(&id, missing, Stdio::default()).await.unwrap();
        let error = soon("a missing command", bench.sandbox.start(&id)).await.unwrap_err();
        assert!(error.to_string().contains("executable file not found in $PATH"), "{error}");
        assert_eq!(bench.sandbox.wait(&id).await.unwrap().status, 255);
        bench.sandbox.kill(&process, 9).await.unwrap();
        assert_eq!(bench.sandbox.wait(&process).await.unwrap().status, 137);
        bench.sandbox.delete(&process).await.unwrap();
        bench.sandbox.stop().await.unwrap();
    });
}

#[test]
fn an_end_is_told_after_the_last_words_were_taken() {
    in_own_mounts(async {
        let bench = Bench::real();
        let process = first("c1");
        // Holds one byte: what was written was read, but for the last one.
        let (ours, mut theirs) = tokio::io::duplex(1);
        let stdio = Stdio { stdout: Some(Box::pin(ours)), ..Default::default() };
        bench.create("c1", "echo 0123456789", stdio).await.unwrap();
        bench.sandbox.start(&process).await.unwrap();
        let taken = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let count = Arc::clone(&taken);
        // A reader that has other things to do.
        let reader = tokio::spawn(async move {
            while theirs.read(&mut [0]).await.unwrap() == 1 {
                count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
        assert_eq!(bench.sandbox.wait(&process).await.unwrap().status, 0);
        assert!(taken.load(std::sync::atomic::Ordering::Relaxed) >= 10, "{taken:?} of 11 bytes");
        reader.await.unwrap();
        bench.sandbox.delete(&process).await.unwrap();
        // Where nobody reads, the end is told all the same.
        let (ours, theirs) = tokio::io::duplex(1);
        let stdio = Stdio { stdout: Some(Box::pin(ours)), ..Default::default() };
        bench.create("c1", "echo 0123456789; exit 3", stdio).await.unwrap();
        bench.sandbox.start(&process).await.unwrap();
        let exit = tokio::time::timeout(Duration::from_secs(30), bench.sandbox.wait(&process)).await;
        assert_eq!(exit.expect("an end").unwrap().status, 3);
        drop(theirs);
        bench.sandbox.delete(&process).await.unwrap();
        bench.sandbox.stop().await.unwrap();
    });
}

#[test]
fn a_command_that_is_missing_fails_the_create_and_leaves_nothing() {
    in_own_mounts(async {
        let bench = Bench::real();
        for (args, text) in [
            (serde_json::json!(["nosuch"]), "executable file not found in $PATH"),
            (serde_json::json!(["/no/such"]), "no such file or directory"),
            (serde_json::json!(["/bin"]), "is a directory"),
            (serde_json::json!([""]), "no command"),
        ] {
            let error = bench.create_command("c1", &args, Stdio::default()).await.unwrap_err();
            assert!(matches!(&error, Error::Invalid(found) if found.contains(text)), "{args}: {error}");
            assert!(matches!(bench.sandbox.state(&first("c1")).await, Err(Error::NotFound(_))));
        }
        let shared = bench.folder.path().join("m/shared");
        assert_eq!(std::fs::read_dir(shared).unwrap().count(), 0);
        bench.sandbox.stop().await.unwrap();
    });
}

#[test]
fn a_guest_of_another_version_is_refused_with_both() {
    in_own_mounts(async {
        let program = Arc::new(|guest| {
            Box::pin(async move {
                greet(&guest, "{\"version\":\"9.9.9\"}\n").await;
                String::new()
            }) as futures::future::BoxFuture<'static, String>
        });
        let bench = Bench::with(program, |_| {});
        let error = bench.create("c1", "true", Stdio::default()).await.unwrap_err().to_string();
        for word in ["9.9.9", coracle_protocol::VERSION, "coracle image build"] {
            assert!(error.contains(word), "{word}: {error}");
        }
    });
}

#[test]
fn a_guest_that_says_nothing_or_rubbish_fails_the_create_in_time() {
    in_own_mounts(async {
        let silent = Arc::new(|_| Box::pin(std::future::pending()) as futures::future::BoxFuture<'static, String>);
        let bench = Bench::with(silent, |config| config.boot_timeout = Duration::from_millis(100));
        let error = soon("the time-out", bench.create("c1", "true", Stdio::default())).await.unwrap_err();
        assert!(matches!(&error, Error::Timeout(text) if text.contains("guest.boot_timeout_seconds")), "{error}");
        let rubbish = Arc::new(|guest| {
            Box::pin(async move {
                greet(&guest, &"x".repeat(100_000)).await;
                String::new()
            }) as futures::future::BoxFuture<'static, String>
        });
        let bench = Bench::with(rubbish, |_| {});
        let error = bench.create("c1", "true", Stdio::default()).await.unwrap_err();
        assert!(error.to_string().contains("malformed"), "{error}");
    });
}

#[test]
fn a_greeting_that_breaks_off_is_followed_by_another_one() {
    in_own_mounts(async {
        let agent = Scripted::hanging_in("");
        let inner = agent.program();
        let program = Arc::new(move |guest: FakeGuest| {
            let (agent, hello) = (inner(guest.clone()), guest.hello_socket());
            Box::pin(async move {
                for words in ["", "{\"version\":"] {
                    let mut host = tokio::net::UnixStream::connect(&hello).await.unwrap();
                    host.write_all(words.as_bytes()).await.unwrap();
                }
                agent.await
            }) as futures::future::BoxFuture<'static, String>
        });
        let bench = Bench::with(program, |_| {});
        soon("the create", bench.create("c1", "true", Stdio::default())).await.unwrap();
        bench.sandbox.stop().await.unwrap();
    });
}

#[test]
fn the_machines_end_ends_all_that_ran_in_it() {
    in_own_mounts(async {
        let agent = Scripted::hanging_in("");
        let (end, ended) = tokio::sync::watch::channel(false);
        let inner = agent.program();
        let program = Arc::new(move |guest| {
            let (agent, mut ended) = (inner(guest), ended.clone());
            Box::pin(async move {
                tokio::select! {
                    reason = agent => reason,
                    _ = ended.wait_for(|ended| *ended) => "the guest's kernel panicked".to_owned(),
                }
            }) as futures::future::BoxFuture<'static, String>
        });
        let mut bench = Bench::with(program, |_| {});
        bench.create("c1", "sleep 1000", Stdio::default()).await.unwrap();
        bench.sandbox.start(&first("c1")).await.unwrap();
        end.send_replace(true);
        assert_eq!(bench.sandbox.wait(&first("c1")).await.unwrap().status, 137);
        assert!(matches!(bench.events.recv().await, Some(Event::Exited { .. })));
        let reason = bench.events.recv().await;
        assert!(matches!(&reason, Some(Event::MachineEnded { reason }) if reason.contains("panicked")), "{reason:?}");
        let error = bench.create("c2", "true", Stdio::default()).await.unwrap_err();
        assert!(matches!(&error, Error::Ended(text) if text.contains("panicked")), "{error}");
        bench.sandbox.delete(&first("c1")).await.unwrap();
        bench.sandbox.stop().await.unwrap();
        assert!(!bench.folder.path().join("m").exists());
    });
}

/// An agent that hangs while it makes something: everything else answers, Kill ends it, nothing is left.
async fn hangs_in_create(method: &str) {
    let bench = Bench::with(Scripted::hanging_in(method).program(), |_| {});
    let process = first("c1");
    let creating = tokio::spawn({
        let sandbox = bench.sandbox.clone();
        let request = coracle_sandbox::CreateRequest {
            id: "c1".into(),
            spec: coracle_flow::spec(&serde_json::json!(["true"])),
            root: bench.rootfs(),
            rootfs: Vec::new(),
            stdio: Stdio::default(),
        };
        async move { sandbox.create(request).await }
    });
    while bench.sandbox.state(&process).await.is_err() {
        tokio::task::yield_now().await;
    }
    let state = soon("State", bench.sandbox.state(&process)).await.unwrap();
    assert_eq!(state.status, Status::Created);
    assert!(soon("Stats", bench.sandbox.stats("c1")).await.is_err());
    soon("Kill", bench.sandbox.kill(&process, 9)).await.unwrap();
    let error = soon("the create", creating).await.unwrap().unwrap_err();
    assert!(error.to_string().contains("killed"), "{method}: {error}");
    assert!(matches!(soon("Delete", bench.sandbox.delete(&process)).await, Err(Error::NotFound(_))));
    soon("stop", bench.sandbox.stop()).await.unwrap();
    assert!(!bench.folder.path().join("m").exists(), "{method}: nothing is left");
}

#[test]
fn an_agent_that_hangs_in_create_sandbox_is_got_rid_of() {
    in_own_mounts(hangs_in_create("CreateSandbox"));
}

#[test]
fn an_agent_that_hangs_in_create_container_is_got_rid_of() {
    in_own_mounts(hangs_in_create("CreateContainer"));
}

/// An agent that hangs in a call for a container that runs: State, Stats, Kill and Delete answer, Kill ends it.
async fn hangs_while_running(method: &str) {
    let bench = Bench::with(Scripted::hanging_in(method).program(), |_| {});
    let process = first("c1");
    bench.create("c1", "sleep 1000", Stdio::default()).await.unwrap();
    let starting = tokio::spawn({
        let (sandbox, process) = (bench.sandbox.clone(), process.clone());
        async move { sandbox.start(&process).await }
    });
    if method != "StartContainer" {
        starting.await.unwrap().unwrap();
    }
    soon("State", bench.sandbox.state(&process)).await.unwrap();
    // Figures or "ask again", but soon.
    let _ = soon("Stats", bench.sandbox.stats("c1")).await;
    soon("Kill", bench.sandbox.kill(&process, 9)).await.unwrap();
    if method != "StartContainer" && method != "WaitProcess" {
        let exit = tokio::time::timeout(Duration::from_secs(30), bench.sandbox.wait(&process)).await;
        assert_eq!(exit.expect("Kill ends it").unwrap().status, 137, "{method}");
        soon("Delete", bench.sandbox.delete(&process)).await.unwrap();
    }
    soon("stop", bench.sandbox.stop()).await.unwrap();
    assert_eq!(bench.sandbox.wait(&process).await.map_or(137, |exit| exit.status), 137);
    assert!(!bench.folder.path().join("m").exists(), "{method}: nothing is left");
}

#[test]
fn an_agent_that_hangs_in_start_is_got_rid_of() {
    in_own_mounts(hangs_while_running("StartContainer"));
}

#[test]
fn an_agent_that_hangs_in_stats_keeps_nobody_waiting() {
    in_own_mounts(hangs_while_running("StatsContainer"));
}

#[test]
fn an_agent_that_hangs_in_signal_loses_its_machine() {
    in_own_mounts(hangs_while_running("SignalProcess"));
}

#[test]
fn an_agent_that_hangs_in_wait_is_got_rid_of() {
    in_own_mounts(hangs_while_running("WaitProcess"));
}

#[test]
fn an_agent_that_ends_no_stream_keeps_nobody_waiting() {
    in_own_mounts(hangs_while_running(coracle_flow::STREAMS));
}

#[test]
fn an_agent_that_hangs_in_remove_keeps_nobody_waiting() {
    in_own_mounts(hangs_while_running("RemoveContainer"));
}

#[test]
fn a_boot_that_hangs_is_given_up_by_kill() {
    in_own_mounts(async {
        let silent = Arc::new(|_| Box::pin(std::future::pending()) as futures::future::BoxFuture<'static, String>);
        let bench = Bench::with(silent, |config| config.boot_timeout = Duration::from_secs(600));
        let process = first("c1");
        let create = bench.create("c1", "true", Stdio::default());
        let kill = async {
            while bench.sandbox.state(&process).await.is_err() {
                tokio::task::yield_now().await;
            }
            soon("Kill", bench.sandbox.kill(&process, 15)).await.unwrap();
        };
        let (created, ()) = tokio::join!(create, kill);
        assert!(created.unwrap_err().to_string().contains("killed"));
        bench.sandbox.stop().await.unwrap();
        assert!(!bench.folder.path().join("m").exists());
    });
}

#[test]
fn a_delete_that_was_answered_counts_for_a_shutdown() {
    in_own_mounts(async {
        let bench = Bench::with(Scripted::hanging_in("RemoveContainer").program(), |_| {});
        let process = first("c1");
        bench.create("c1", "sleep 1000", Stdio::default()).await.unwrap();
        bench.sandbox.start(&process).await.unwrap();
        bench.sandbox.kill(&process, 9).await.unwrap();
        bench.sandbox.wait(&process).await.unwrap();
        assert!(!bench.sandbox.is_empty().await.unwrap());
        bench.sandbox.delete(&process).await.unwrap();
        // The removal goes on behind the answer; the pod may end all the same, and a second delete finds nothing.
        assert!(bench.sandbox.is_empty().await.unwrap());
        assert!(matches!(bench.sandbox.delete(&process).await, Err(Error::NotFound(_))));
        bench.sandbox.stop().await.unwrap();
    });
}

#[test]
fn a_container_that_is_killed_before_its_start_has_ended() {
    in_own_mounts(async {
        let bench = Bench::real();
        let process = first("c1");
        bench.create("c1", "sleep 1000", Stdio::default()).await.unwrap();
        bench.sandbox.kill(&process, 15).await.unwrap();
        assert_eq!(bench.sandbox.wait(&process).await.unwrap().status, 143);
        bench.sandbox.delete(&process).await.unwrap();
        assert_eq!(bench.run("c1", "exit 4").await.0.status, 4);
        bench.sandbox.stop().await.unwrap();
    });
}

#[test]
fn the_guest_can_not_write_beside_what_it_is_lent() {
    in_own_mounts(async {
        let bench = Bench::real();
        bench.create("c1", "sleep 1000", Stdio::default()).await.unwrap();
        let seen = bench.folder.path().join("m/shared");
        for path in ["evil", "c1/evil"] {
            let error = std::fs::write(seen.join(path), "x").unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem, "{path}");
        }
        std::fs::write(seen.join("c1/rootfs/own"), "x").unwrap();
        bench.sandbox.stop().await.unwrap();
    });
}

/// The clock is set when the pod comes up and from then on; a policy that does not allow it is normal life.
async fn clock_is_set(method: &str) {
    let agent = Scripted::hanging_in(method);
    let bench = Bench::with(agent.program(), |config| config.clock_period = Duration::from_millis(20));
    bench.create("c1", "true", Stdio::default()).await.unwrap();
    let mut clocks = agent.clocks.subscribe();
    let often = tokio::time::timeout(Duration::from_secs(60), clocks.wait_for(|count| *count >= 3)).await;
    assert!(often.is_ok_and(|count| count.is_ok()), "{method}");
    bench.sandbox.stop().await.unwrap();
}

#[test]
fn the_guests_clock_follows_the_hosts() {
    in_own_mounts(clock_is_set(""));
}

#[test]
fn a_guest_that_keeps_its_clock_is_a_pod_all_the_same() {
    in_own_mounts(clock_is_set(coracle_flow::DENIED_CLOCK));
}

#[test]
fn an_agent_that_answers_nobody_any_more_is_noticed_and_loses_its_machine() {
    in_own_mounts(async {
        let agent = Scripted::hanging_in(coracle_flow::SILENT_CLOCK);
        let mut bench = Bench::with(agent.program(), |config| {
            config.clock_period = Duration::from_millis(20);
            config.agent_timeout = Duration::from_millis(200);
        });
        bench.create("c1", "true", Stdio::default()).await.unwrap();
        let ended = async {
            while let Some(event) = bench.events.recv().await {
                if let Event::MachineEnded { reason } = event {
                    return reason;
                }
            }
            String::new()
        };
        let reason = tokio::time::timeout(Duration::from_secs(60), ended).await.expect("an end");
        assert!(reason.contains("has not answered 2 times"), "{reason}");
        bench.sandbox.delete(&first("c1")).await.unwrap();
        bench.sandbox.stop().await.unwrap();
        assert!(!bench.folder.path().join("m").exists());
    });
}
