//! Exec, output, identity, capabilities, memory, shared namespaces.

use coracle_e2e::cri::msg;
use protobuf::MessageField;

use crate::{Check, holds, resources, same, security};

pub(crate) const CHECKS: &[Check] = &[
    ("exec_gives_the_exit_code", |b| same(b.exec("exit 42")?.0, 42)),
    ("exec_of_true_is_zero", |b| same(b.exec("true")?.0, 0)),
    ("exec_keeps_streams_apart", |b| same(b.exec("echo o; echo e >&2")?, (0, "o\n".into(), "e\n".into()))),
    ("exec_killed_by_a_signal_is_128_and_it", |b| same(b.exec("kill -9 $$")?.0, 137)),
    ("exec_of_a_missing_command_says_so", |b| {
        let error = b.cri.exec(&b.sleeper, &["nosuch"]).map(drop).unwrap_err().1;
        holds(&error, "executable file not found in $PATH")
    }),
    ("exec_of_a_missing_path_says_so", |b| {
        let error = b.cri.exec(&b.sleeper, &["/no/such"]).map(drop).unwrap_err().1;
        holds(&error, "no such file or directory")
    }),
    ("exec_of_a_useless_file_says_so", |b| {
        let error = b.cri.exec(&b.sleeper, &["/etc/not-a-program"]).map(drop).unwrap_err().1;
        holds(&error, "permission denied")
    }),
    ("exec_passes_a_megabyte", |b| same(b.exec("head -c 1000000 /dev/zero | tr '\\0' x")?.1.len(), 1_000_000)),
    ("exec_is_in_the_containers_pid_namespace", |b| holds(&b.exec("cat /proc/1/cmdline")?.1, "sleep")),
    ("exec_sees_the_containers_files", |b| {
        same(b.exec("echo x >/kept")?.0, 0)?;
        same(b.exec("cat /kept")?.1, "x\n".into())
    }),
    ("output_is_logged_by_stream", |b| {
        b.run("streams", "echo o; echo e >&2", |_| {})?;
        let text = std::fs::read_to_string(b.folder.join("streams.log")).map_err(|error| error.to_string())?;
        holds(&text, " stdout F o\n")?;
        holds(&text, " stderr F e\n")
    }),
    ("a_container_has_its_exit_code", |b| same(b.run("code", "exit 7", |_| {})?.0, 7)),
    ("an_end_with_zero_is_completed", |b| {
        let id = b.pod.start("completed", &["true"], |_| {}).map_err(|error| error.1)?;
        same(b.cri.ended(&id).reason, "Completed".into())
    }),
    ("an_end_with_another_code_is_an_error", |b| {
        let id = b.pod.start("error", &["false"], |_| {}).map_err(|error| error.1)?;
        let status = b.cri.ended(&id);
        if status.finished_at <= status.created_at {
            return Err(format!("it ended at {}, before {}", status.finished_at, status.created_at));
        }
        same((status.exit_code, status.reason), (1, "Error".into()))
    }),
    ("a_missing_command_fails_the_start", |b| {
        let error = b.pod.start("missing", &["nosuch"], |_| {}).map(drop).unwrap_err().1;
        holds(&error, "executable file not found in $PATH")
    }),
    ("variables_are_set", |b| {
        let variable = msg::KeyValue { key: "A".into(), value: "two words".into(), ..Default::default() };
        same(b.printed("env", "echo $A", |config| config.envs.push(variable))?, "two words\n".into())
    }),
    ("arguments_follow_the_command", |b| {
        let output = b.printed("args", "echo $1", |config| config.args = vec!["x".into(), "one".into()])?;
        same(output, "one\n".into())
    }),
    ("the_working_directory_is_entered", |b| {
        same(b.printed("cwd", "pwd", |config| config.working_dir = "/tmp".into())?, "/tmp\n".into())
    }),
    ("a_user_by_number", |b| {
        let number = |value| MessageField::some(msg::Int64Value { value, ..Default::default() });
        let change = |config: &mut msg::ContainerConfig| {
            security(config).run_as_user = number(1000);
            security(config).run_as_group = number(50);
        };
        same(b.printed("uid", "id -u; id -g", change)?, "1000\n50\n".into())
    }),
    ("a_user_by_name", |b| {
        same(b.printed("name", "id -un", |config| security(config).run_as_username = "app".into())?, "app\n".into())
    }),
    ("supplementary_groups", |b| {
        let output = b.printed("groups", "id -G", |config| security(config).supplemental_groups = vec![4242])?;
        holds(&output, "4242")
    }),
    ("the_host_name_is_the_pods", |b| same(b.printed("hostname", "hostname", |_| {})?, "checks\n".into())),
    ("the_host_name_is_in_the_file", |b| {
        same(b.printed("etc-hostname", "cat /etc/hostname", |_| {})?, "checks\n".into())
    }),
    ("resolv_conf_is_the_pods", |b| {
        holds(&b.printed("resolv", "cat /etc/resolv.conf", |_| {})?, "nameserver 10.9.8.7")
    }),
    ("a_root_that_is_read_only", |b| {
        let script = "echo x >/new 2>&1; echo x >/dev/shm/ok && echo shm";
        let output = b.printed("ro", script, |config| security(config).readonly_rootfs = true)?;
        holds(&output, "Read-only file system")?;
        holds(&output, "shm\n")
    }),
    ("a_folder_of_the_host_both_ways", |b| {
        std::fs::write(b.folder.join("in"), "from the host\n").map_err(|error| error.to_string())?;
        let mount = msg::Mount {
            container_path: "/data".into(),
            host_path: b.folder.display().to_string(),
            ..Default::default()
        };
        let output = b.printed("mount", "cat /data/in; echo back >/data/out", |config| config.mounts.push(mount))?;
        same(output, "from the host\n".into())?;
        same(std::fs::read_to_string(b.folder.join("out")).unwrap_or_default(), "back\n".into())
    }),
    ("a_folder_of_the_host_read_only", |b| {
        let mount = msg::Mount {
            container_path: "/data".into(),
            host_path: b.folder.display().to_string(),
            readonly: true,
            ..Default::default()
        };
        holds(&b.printed("mount-ro", "echo x 2>&1 >/data/no || true", |config| config.mounts.push(mount))?, "Read-only")
    }),
    ("a_file_of_the_host", |b| {
        std::fs::write(b.folder.join("file"), "one file\n").map_err(|error| error.to_string())?;
        let mount = msg::Mount {
            container_path: "/etc/one".into(),
            host_path: b.folder.join("file").display().to_string(),
            ..Default::default()
        };
        same(b.printed("mount-file", "cat /etc/one", |config| config.mounts.push(mount))?, "one file\n".into())
    }),
    ("the_usual_capabilities", |b| {
        holds(&b.printed("caps", "grep CapEff /proc/self/status", |_| {})?, "00000000a80425fb")
    }),
    ("a_capability_more", |b| {
        let change = |config: &mut msg::ContainerConfig| {
            security(config).capabilities.mut_or_insert_default().add_capabilities = vec!["NET_ADMIN".into()];
        };
        holds(&b.printed("caps-add", "grep CapEff /proc/self/status", change)?, "00000000a80435fb")
    }),
    ("no_capability_at_all", |b| {
        let change = |config: &mut msg::ContainerConfig| {
            security(config).capabilities.mut_or_insert_default().drop_capabilities = vec!["ALL".into()];
        };
        holds(&b.printed("caps-none", "grep CapEff /proc/self/status", change)?, "0000000000000000")
    }),
    ("no_new_privileges", |b| {
        let output =
            b.printed("nnp", "grep NoNewPrivs /proc/self/status", |config| security(config).no_new_privs = true)?;
        holds(&output, "NoNewPrivs:\t1")
    }),
    ("new_privileges_where_they_are_allowed", |b| {
        holds(&b.printed("np", "grep NoNewPrivs /proc/self/status", |_| {})?, "NoNewPrivs:\t0")
    }),
    ("masked_files_are_empty", |b| {
        let change = |config: &mut msg::ContainerConfig| security(config).masked_paths = vec!["/proc/version".into()];
        same(b.printed("masked", "wc -c </proc/version", change)?, "0\n".into())
    }),
    ("read_only_paths_are_so", |b| {
        let change = |config: &mut msg::ContainerConfig| security(config).readonly_paths = vec!["/proc/sys".into()];
        holds(&b.printed("ro-path", "echo x 2>&1 >/proc/sys/kernel/domainname || true", change)?, "Read-only")
    }),
    ("a_memory_limit_is_the_cgroups", |b| {
        let script = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || true";
        let output = b.printed("memory", script, |config| resources(config).memory_limit_in_bytes = 32 << 20)?;
        holds(&output, "33554432")
    }),
    ("too_much_memory_is_oom_killed", |b| {
        let script = "head -c 200000000 /dev/zero | tail -c 150000000 | wc -c";
        let change = |config: &mut msg::ContainerConfig| resources(config).memory_limit_in_bytes = 16 << 20;
        let id = b.pod.start("oom", &["sh", "-c", &format!("exec {script}")], change);
        // The shell that starts the pipe lives or dies with it; what counts is who is said to have done it.
        let id = id.map_err(|error| error.1)?;
        let status = b.cri.ended(&id);
        same(status.reason, "OOMKilled".into())
    }),
    ("cpu_time_and_memory_are_counted", |b| {
        let stats = b.cri.stats(&b.sleeper).map_err(|error| error.1)?;
        let cpu = stats.cpu.usage_core_nano_seconds.value;
        let memory = stats.memory.working_set_bytes.value;
        if cpu > 0 && memory > 0 { Ok(()) } else { Err(format!("{cpu} ns, {memory} bytes")) }
    }),
    ("stop_sends_sigterm_once", |b| {
        let script = "n=0; trap 'n=$((n+1)); echo term $n' TERM; echo ready; while :; do sleep 0.2; done";
        let id = b.pod.start("once", &["sh", "-c", script], |_| {}).map_err(|error| error.1)?;
        b.pod.await_log("once", "ready");
        b.cri.stop(&id, 3).map_err(|error| error.1)?;
        same(b.cri.status(&id).map_err(|error| error.1)?.exit_code, 137)?;
        same(b.pod.await_log("once", "term 1\n"), "ready\nterm 1\n".into())
    }),
    ("stop_lets_a_container_end_by_itself", |b| {
        let script = "trap 'echo bye; exit 5' TERM; echo ready; while :; do sleep 0.2; done";
        let id = b.pod.start("bye", &["sh", "-c", script], |_| {}).map_err(|error| error.1)?;
        b.pod.await_log("bye", "ready");
        b.cri.stop(&id, 30).map_err(|error| error.1)?;
        same(b.cri.status(&id).map_err(|error| error.1)?.exit_code, 5)?;
        b.pod.await_log("bye", "bye");
        Ok(())
    }),
    ("exec_in_a_container_that_has_ended_is_refused", |b| {
        let id = b.pod.start("gone", &["true"], |_| {}).map_err(|error| error.1)?;
        let _ = b.cri.ended(&id);
        match b.cri.exec(&id, &["true"]) {
            Ok(outcome) => Err(format!("it ran: {outcome:?}")),
            Err(_) => Ok(()),
        }
    }),
    ("shared_memory_is_the_pods", |b| {
        same(b.exec("echo shared >/dev/shm/between")?.0, 0)?;
        same(b.printed("shm", "cat /dev/shm/between", |_| {})?, "shared\n".into())
    }),
    ("pid_namespaces_are_apart", |b| {
        let output = b.printed("pids", "ls /proc | grep -c '^[0-9]*$'", |_| {})?;
        if output.trim().parse::<u32>().is_ok_and(|count| count <= 5) { Ok(()) } else { Err(output) }
    }),
    ("a_shared_pid_namespace", |b| {
        let share = |config: &mut msg::ContainerConfig| {
            // 0 is the pod's.
            security(config).namespace_options = MessageField::some(msg::NamespaceOption::new());
        };
        let text = |error: coracle_e2e::cri::CriError| error.1;
        let one = b.pod.start("seen", &["sleep", "4321"], share).map_err(text)?;
        let output = b.printed("sees", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '", share)?;
        b.cri.stop(&one, 0).map_err(text)?;
        holds(&output, "sleep 4321")
    }),
    ("a_name_is_taken_once", |b| {
        let text = |error: coracle_e2e::cri::CriError| error.1;
        let id = b.pod.create("twice", &["true"], |_| {}).map_err(text)?;
        let error = b.pod.create("twice", &["true"], |_| {}).map(drop).unwrap_err().1;
        b.cri.remove(&id).map_err(text)?;
        holds(&error, "reserved")
    }),
    ("a_created_container_is_removed", |b| {
        let text = |error: coracle_e2e::cri::CriError| error.1;
        let id = b.pod.create("unstarted", &["true"], |_| {}).map_err(text)?;
        same(b.cri.status(&id).map_err(text)?.state, 0)?;
        b.cri.remove(&id).map_err(text)
    }),
    ("a_running_container_is_removed", |b| {
        let text = |error: coracle_e2e::cri::CriError| error.1;
        let id = b.pod.start("running", &["sleep", "1000"], |_| {}).map_err(text)?;
        b.cri.remove(&id).map_err(text)
    }),
    ("an_update_reaches_the_cgroup", |b| {
        let text = |error: coracle_e2e::cri::CriError| error.1;
        let change = |config: &mut msg::ContainerConfig| resources(config).memory_limit_in_bytes = 64 << 20;
        let id = b.pod.start("update", &["sleep", "1000"], change).map_err(text)?;
        let linux = msg::LinuxContainerResources { memory_limit_in_bytes: 48 << 20, ..Default::default() };
        let request = msg::UpdateContainerResourcesRequest {
            container_id: id.clone(),
            linux: MessageField::some(linux),
            ..Default::default()
        };
        b.cri.call::<msg::Empty>("UpdateContainerResources", &request).map_err(text)?;
        let script = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null";
        let found = b.cri.exec(&id, &["sh", "-c", script]).map_err(text)?.1;
        b.cri.stop(&id, 0).map_err(text)?;
        holds(&found, "50331648")
    }),
    ("the_runtimes_seccomp_profile", |b| {
        let text = |error: coracle_e2e::cri::CriError| error.1;
        let change = |config: &mut msg::ContainerConfig| {
            // Type 0 is the runtime's default.
            security(config).seccomp = MessageField::some(msg::SecurityProfile::new());
        };
        let id = b
            .pod
            .start("seccomp", &["sh", "-c", "grep Seccomp: /proc/self/status; sleep 1000"], change)
            .map_err(text)?;
        holds(&b.pod.await_log("seccomp", "\n"), "Seccomp:\t2")?;
        let beside = b.cri.exec(&id, &["sh", "-c", "grep Seccomp: /proc/self/status"]).map_err(text)?.1;
        b.cri.stop(&id, 0).map_err(text)?;
        holds(&beside, "Seccomp:\t2")
    }),
    ("the_runtimes_seccomp_profile_refuses", |b| {
        let change = |config: &mut msg::ContainerConfig| {
            security(config).seccomp = MessageField::some(msg::SecurityProfile::new());
            // The capability alone does not do it: the profile lets mount through only with it, and keyctl never.
            security(config).no_new_privs = true;
        };
        let output = b.printed("seccomp-no", "guest-probe call keyctl 0; guest-probe call getpid 0", change)?;
        same(output, "Operation not permitted (os error 1)\nok\n".into())
    }),
    ("no_seccomp_where_none_is_asked_for", |b| {
        let change = |config: &mut msg::ContainerConfig| {
            let none = msg::SecurityProfile { profile_type: 1, ..Default::default() };
            security(config).seccomp = MessageField::some(none);
        };
        holds(&b.printed("seccomp-none", "grep Seccomp: /proc/self/status", change)?, "Seccomp:\t0")
    }),
    ("exec_streams_carry_input_and_both_outputs", |b| {
        let text = |error: coracle_e2e::cri::CriError| error.1;
        let script = "read line; echo got $line; echo err >&2; exit 3";
        let mut streams = b.cri.exec_streams(&b.sleeper, &["sh", "-c", script], false).map_err(text)?;
        streams.write("word\n");
        let (end, stdout, stderr) = streams.finish();
        same((stdout.as_str(), stderr.as_str()), ("got word\n", "err\n"))?;
        holds(&end, "\"message\":\"3\"")
    }),
    ("exec_with_a_terminal_has_one_and_its_size_changes", |b| {
        let text = |error: coracle_e2e::cri::CriError| error.1;
        let script = "tty; echo ready; read x; stty size; echo over";
        let mut streams = b.cri.exec_streams(&b.sleeper, &["sh", "-c", script], true).map_err(text)?;
        streams.read_until("ready");
        streams.resize(101, 37);
        // The size is another request than the input, and nothing says when it has arrived.
        for _ in 0..100 {
            let script = "stty size </dev/pts/0";
            if b.exec(script)?.1.starts_with("37 101") {
                break;
            }
        }
        streams.write("go\n");
        let (_, stdout, _) = streams.finish();
        holds(&stdout, "/dev/pts/0")?;
        holds(&stdout, "37 101")
    }),
    ("attach_joins_the_first_process", |b| {
        let text = |error: coracle_e2e::cri::CriError| error.1;
        let change = |config: &mut msg::ContainerConfig| (config.stdin, config.stdin_once) = (true, true);
        let script = "read line; echo attached $line";
        let id = b.pod.start("attach", &["sh", "-c", script], change).map_err(text)?;
        let mut streams = b.cri.attach(&id, false).map_err(text)?;
        streams.write("word\n");
        streams.read_until("attached word");
        same(b.cri.ended(&id).exit_code, 0)?;
        b.pod.await_log("attach", "attached word");
        Ok(())
    }),
    ("attach_to_a_terminal", |b| {
        let text = |error: coracle_e2e::cri::CriError| error.1;
        let change = |config: &mut msg::ContainerConfig| (config.stdin, config.tty) = (true, true);
        let id = b.pod.start("attach-tty", &["sh", "-c", "read x; tty; sleep 1000"], change).map_err(text)?;
        let mut streams = b.cri.attach(&id, true).map_err(text)?;
        streams.write("x\n");
        streams.read_until("/dev/pts/0");
        drop(streams);
        // A client that goes takes nothing along.
        same(b.cri.status(&id).map_err(text)?.state, 1)?;
        b.cri.stop(&id, 0).map_err(text)
    }),
    ("sysctls_of_the_pod", |b| same(b.exec("cat /proc/sys/kernel/shm_rmid_forced")?.1, "1\n".into())),
];
