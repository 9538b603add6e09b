//! The life of containers and pods, as the runtime tells it.

use coracle_e2e::cri::msg;
use protobuf::MessageField;

use crate::{Bench, Check, holds, resources, same};

fn text(error: coracle_e2e::cri::CriError) -> String {
    error.1
}

fn list(b: &Bench<'_>, filter: msg::ContainerFilter) -> Result<Vec<msg::Container>, String> {
    let request = msg::ListContainersRequest { filter: MessageField::some(filter), ..Default::default() };
    Ok(b.cri.call::<msg::ListContainersResponse>("ListContainers", &request).map_err(text)?.containers)
}

fn pod_id(b: &Bench<'_>) -> msg::PodId {
    msg::PodId { pod_sandbox_id: b.pod.id.clone(), ..Default::default() }
}

fn update(b: &Bench<'_>, id: &str, linux: msg::LinuxContainerResources) -> Result<(), String> {
    let request = msg::UpdateContainerResourcesRequest {
        container_id: id.into(),
        linux: MessageField::some(linux),
        ..Default::default()
    };
    b.cri.call::<msg::Empty>("UpdateContainerResources", &request).map(drop).map_err(text)
}

/// A container that holds 20 MiB, and is seen to.
fn hog(b: &Bench<'_>, name: &str, change: impl FnOnce(&mut msg::ContainerConfig)) -> Result<String, String> {
    // What is read stays in one buffer, for nobody takes it.
    let script = "dd if=/dev/zero bs=20M count=1 2>/dev/null | sleep 1000";
    let id = b.pod.start(name, &["sh", "-c", script], change).map_err(text)?;
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    loop {
        let used = b.cri.stats(&id).map_err(text)?.memory.working_set_bytes.value;
        if used > 19_000_000 {
            return Ok(id);
        }
        if std::time::Instant::now() > deadline {
            return Err(format!("{used} bytes"));
        }
        // Figures that grow are no event.
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
}

pub(crate) const CHECKS: &[Check] = &[
    ("a_container_is_created_then_runs_then_has_ended", |b| {
        let id = b.pod.create("states", &["sh", "-c", "echo up; sleep 1000"], |_| {}).map_err(text)?;
        let status = b.cri.status(&id).map_err(text)?;
        same((status.state, status.started_at, status.finished_at), (0, 0, 0))?;
        b.cri.start(&id).map_err(text)?;
        b.pod.await_log("states", "up");
        let status = b.cri.status(&id).map_err(text)?;
        same((status.state, status.started_at >= status.created_at, status.finished_at), (1, true, 0))?;
        b.cri.stop(&id, 0).map_err(text)?;
        let status = b.cri.status(&id).map_err(text)?;
        same((status.state, status.exit_code, status.finished_at > status.started_at), (2, 137, true))?;
        b.cri.remove(&id).map_err(text)?;
        same(b.cri.status(&id).is_err(), true)
    }),
    ("a_container_starts_once", |b| {
        let id = b.pod.start("start-once", &["sleep", "1000"], |_| {}).map_err(text)?;
        let again = b.cri.start(&id);
        b.cri.stop(&id, 0).map_err(text)?;
        same(again.is_err(), true)
    }),
    ("stop_may_be_asked_for_twice", |b| {
        let id = b.pod.start("stop-twice", &["sleep", "1000"], |_| {}).map_err(text)?;
        b.cri.stop(&id, 0).map_err(text)?;
        b.cri.stop(&id, 0).map_err(text)?;
        b.cri.remove(&id).map_err(text)?;
        // What is gone is as it should be.
        b.cri.remove(&id).map_err(text)
    }),
    ("a_first_process_that_knows_no_sigterm_is_killed", |b| {
        let id = b.pod.start("deaf", &["sleep", "1000"], |_| {}).map_err(text)?;
        b.cri.stop(&id, 1).map_err(text)?;
        same(b.cri.status(&id).map_err(text)?.exit_code, 137)
    }),
    ("labels_and_annotations_come_back", |b| {
        let change = |config: &mut msg::ContainerConfig| {
            config.labels.insert("tier".into(), "front".into());
            config.annotations.insert("why".into(), "because".into());
        };
        let id = b.pod.create("labelled", &["true"], change).map_err(text)?;
        let status = b.cri.status(&id).map_err(text)?;
        let found = list(
            b,
            msg::ContainerFilter { label_selector: [("tier".into(), "front".into())].into(), ..Default::default() },
        )?;
        b.cri.remove(&id).map_err(text)?;
        same((status.labels["tier"].as_str(), status.annotations["why"].as_str()), ("front", "because"))?;
        same(found.iter().map(|container| container.id.clone()).collect::<Vec<_>>(), vec![id])
    }),
    ("mounts_are_told", |b| {
        let mount = msg::Mount {
            container_path: "/told".into(),
            host_path: b.folder.display().to_string(),
            readonly: true,
            ..Default::default()
        };
        let id = b.pod.create("told", &["true"], |config| config.mounts.push(mount)).map_err(text)?;
        let mounts = b.cri.status(&id).map_err(text)?.mounts;
        b.cri.remove(&id).map_err(text)?;
        same(mounts.iter().any(|mount| mount.container_path == "/told" && mount.readonly), true)
    }),
    ("containers_of_a_pod_are_listed", |b| {
        let all = list(b, msg::ContainerFilter { pod_sandbox_id: b.pod.id.clone(), ..Default::default() })?;
        same(all.iter().any(|container| container.id == b.sleeper && container.state == 1), true)
    }),
    ("one_container_is_listed_by_its_id", |b| {
        same(list(b, msg::ContainerFilter { id: b.sleeper.clone(), ..Default::default() })?.len(), 1)
    }),
    ("pods_are_listed_by_label", |b| {
        let with = |value: &str| msg::PodSandboxFilter {
            label_selector: [("app".into(), value.into())].into(),
            ..Default::default()
        };
        let count = |filter: msg::PodSandboxFilter| {
            let request = msg::ListPodSandboxRequest { filter: MessageField::some(filter), ..Default::default() };
            b.cri.call::<msg::ListPodSandboxResponse>("ListPodSandbox", &request).map(|answer| answer.items.len())
        };
        same((count(with("checks")).map_err(text)?, count(with("other")).map_err(text)?), (1, 0))
    }),
    ("a_pod_tells_what_it_was_given", |b| {
        let status = b.pod.status().map_err(text)?;
        same(status.state, 0)?;
        same((status.labels["app"].as_str(), status.annotations["note"].as_str()), ("checks", "kept"))?;
        same(status.created_at > 0 && !status.network.ip.is_empty(), true)
    }),
    ("a_second_attempt_in_the_same_place", |b| {
        let attempt = |number: u32| {
            move |config: &mut msg::ContainerConfig| config.metadata.mut_or_insert_default().attempt = number
        };
        let one = b.pod.start("again", &["sh", "-c", "exit 1"], attempt(0)).map_err(text)?;
        same(b.cri.ended(&one).exit_code, 1)?;
        let two = b.pod.start("again", &["sh", "-c", "exit 2"], attempt(1)).map_err(text)?;
        same(b.cri.ended(&two).exit_code, 2)?;
        b.cri.remove(&one).map_err(text)?;
        b.cri.remove(&two).map_err(text)
    }),
    ("a_log_is_opened_again_where_it_was_moved", |b| {
        let script = "echo one; until [ -e /tmp/go ]; do sleep 0.05; done; echo two; sleep 1000";
        let id = b.pod.start("rotate", &["sh", "-c", script], |_| {}).map_err(text)?;
        b.pod.await_log("rotate", "one");
        let path = b.folder.join("rotate.log");
        std::fs::rename(&path, b.folder.join("rotate.old")).map_err(|error| error.to_string())?;
        let request = msg::ContainerId { container_id: id.clone(), ..Default::default() };
        b.cri.call::<msg::Empty>("ReopenContainerLog", &request).map_err(text)?;
        same(b.cri.exec(&id, &["touch", "/tmp/go"]).map_err(text)?.0, 0)?;
        let log = b.pod.await_log("rotate", "two");
        b.cri.stop(&id, 0).map_err(text)?;
        same(log, "two\n".into())
    }),
    ("a_line_without_its_end_is_logged_as_a_part", |b| {
        let id = b.pod.start("part", &["sh", "-c", "printf unfinished"], |_| {}).map_err(text)?;
        same(b.cri.ended(&id).exit_code, 0)?;
        b.pod.await_log("part", "unfinished");
        let log = std::fs::read_to_string(b.folder.join("part.log")).map_err(|error| error.to_string())?;
        holds(&log, "unfinished")
    }),
    ("ten_thousand_lines_are_logged_in_order", |b| {
        let output = b.printed("lines-10k", "seq 10000", |_| {})?;
        let expected: String = (1..=10_000).map(|number| format!("{number}\n")).collect();
        same(output == expected, true)
    }),
    ("what_is_logged_at_the_end_is_not_lost", |b| {
        let output = b.printed("last-words", "head -c 300000 /dev/zero | tr '\\0' w; echo; echo last", |_| {})?;
        holds(&output, "last\n")?;
        same(output.matches('w').count(), 300_000)
    }),
    ("statistics_of_all_containers", |b| {
        let filter = msg::ContainerStatsFilter { pod_sandbox_id: b.pod.id.clone(), ..Default::default() };
        let request = msg::ListContainerStatsRequest { filter: MessageField::some(filter), ..Default::default() };
        let answer: msg::ListContainerStatsResponse = b.cri.call("ListContainerStats", &request).map_err(text)?;
        let of = answer.stats.iter().find(|stats| stats.attributes.id == b.sleeper).ok_or("the sleeper is missing")?;
        same(of.memory.working_set_bytes.value > 0 && of.cpu.timestamp > 0, true)
    }),
    ("statistics_of_the_pod", |b| {
        let stats: msg::PodSandboxStatsResponse = b.cri.call("PodSandboxStats", &pod_id(b)).map_err(text)?;
        let linux = stats.stats.linux.clone().unwrap_or_default();
        let (time, memory) = (linux.cpu.usage_core_nano_seconds.value, linux.memory.usage_bytes.value);
        let is_listed = linux.containers.iter().any(|container| container.attributes.id == b.sleeper);
        if time > 0 && memory > 0 && is_listed {
            return Ok(());
        }
        Err(format!("{time} ns, {memory} bytes; its container is listed: {is_listed}"))
    }),
    ("processor_time_grows_with_work", |b| {
        let used = || b.cri.stats(&b.sleeper).map(|stats| stats.cpu.usage_core_nano_seconds.value).map_err(text);
        let before = used()?;
        same(b.exec("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done")?.0, 0)?;
        let after = used()?;
        if after > before + 1_000_000 { Ok(()) } else { Err(format!("{before} and then {after}")) }
    }),
    ("memory_grows_with_use", |b| {
        let id = hog(b, "grows", |_| {})?;
        b.cri.stop(&id, 0).map_err(text)
    }),
    ("an_update_of_processor_time", |b| {
        let id = b.pod.start("update-cpu", &["sleep", "1000"], |_| {}).map_err(text)?;
        let limits = msg::LinuxContainerResources { cpu_quota: 30_000, cpu_period: 100_000, ..Default::default() };
        update(b, &id, limits)?;
        let script = "cat /sys/fs/cgroup/cpu.max /sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us /sys/fs/cgroup/cpu/cpu.cfs_quota_us 2>/dev/null";
        let found = b.cri.exec(&id, &["sh", "-c", script]).map_err(text)?.1;
        b.cri.stop(&id, 0).map_err(text)?;
        holds(&found, "30000")
    }),
    ("an_update_below_use_is_refused_and_the_container_goes_on", |b| {
        let id = hog(b, "below", |config| resources(config).memory_limit_in_bytes = 64 << 20)?;
        let limits = msg::LinuxContainerResources { memory_limit_in_bytes: 8 << 20, ..Default::default() };
        let refused = update(b, &id, limits);
        let state = b.cri.status(&id).map_err(text)?.state;
        b.cri.stop(&id, 0).map_err(text)?;
        same((refused.is_err(), state), (true, 1))
    }),
    ("attach_to_a_container_that_has_ended_is_refused", |b| {
        let id = b.pod.start("attach-gone", &["true"], |_| {}).map_err(text)?;
        let _ = b.cri.ended(&id);
        same(b.cri.attach(&id, false).map(drop).is_err(), true)
    }),
    ("what_is_unknown_is_not_found", |b| {
        let errors = [
            b.cri.status("0123").map(drop).unwrap_err(),
            b.cri.stats("0123").map(drop).unwrap_err(),
            b.cri.exec("0123", &["true"]).map(drop).unwrap_err(),
        ];
        // 5 is NotFound.
        same(errors.map(|(code, _)| code), [5; 3])
    }),
    ("a_container_that_fails_to_start_can_be_removed", |b| {
        let id = b.pod.create("unstartable", &["nosuch"], |_| {}).map_err(text)?;
        same(b.cri.start(&id).is_err(), true)?;
        let status = b.cri.status(&id).map_err(text)?;
        same((status.state, status.exit_code != 0), (2, true))?;
        b.cri.remove(&id).map_err(text)
    }),
    ("ten_containers_one_after_another", |b| {
        for number in 0..10 {
            let (code, output) = b.run(&format!("row-{number}"), &format!("echo {number}; exit {number}"), |_| {})?;
            same((code, output), (number, format!("{number}\n")))?;
        }
        Ok(())
    }),
    ("ten_containers_at_once", |b| {
        let start = |number: i32| {
            let script = format!("until [ -e /dev/shm/all ]; do sleep 0.5; done; exit {number}");
            b.pod.start(&format!("crowd-{number}"), &["sh", "-c", &script], |_| {}).map_err(text)
        };
        let ids = (0..10).map(start).collect::<Result<Vec<_>, _>>()?;
        same(b.exec("touch /dev/shm/all")?.0, 0)?;
        for (number, id) in (0..).zip(&ids) {
            same(b.cri.ended(id).exit_code, number)?;
            b.cri.remove(id).map_err(text)?;
        }
        same(b.exec("rm /dev/shm/all")?.0, 0)
    }),
];
