//! What a process gets: arguments, variables, directory, signals, streams; and how its end is told.

use coracle_e2e::cri::msg;

use crate::{Bench, Check, holds, resources, same, security};

fn variable(key: &str, value: &str) -> msg::KeyValue {
    msg::KeyValue { key: key.into(), value: value.into(), ..Default::default() }
}

/// Runs a script that ends by itself, and gives its exit code.
fn code(b: &Bench<'_>, name: &str, script: &str) -> Result<i32, String> {
    Ok(b.run(name, script, |_| {})?.0)
}

pub(crate) const CHECKS: &[Check] = &[
    ("a_crash_is_128_and_the_signal", |b| same(b.exec("kill -11 $$")?.0, 139)),
    ("an_abort_is_134", |b| same(b.exec("kill -6 $$")?.0, 134)),
    ("the_highest_code_is_255", |b| same(code(b, "high", "exit 255")?, 255)),
    ("the_image_has_a_path_by_default", |b| holds(&b.printed("path", "echo $PATH", |_| {})?, "/bin")),
    ("home_is_the_users", |b| {
        let change = |config: &mut msg::ContainerConfig| security(config).run_as_username = "app".into();
        same(b.printed("home", "echo $HOME", change)?, "/home/app\n".into())
    }),
    ("an_empty_variable_is_there", |b| {
        let change = |config: &mut msg::ContainerConfig| config.envs.push(variable("EMPTY", ""));
        same(b.printed("empty", "echo \"[${EMPTY-unset}]\"", change)?, "[]\n".into())
    }),
    ("a_value_may_hold_anything", |b| {
        let value = "a=b 'c' \"d\" $e \\ é\ttab";
        let change = |config: &mut msg::ContainerConfig| config.envs.push(variable("ODD", value));
        same(b.printed("odd", "printf '%s' \"$ODD\"; echo", change)?, format!("{value}\n"))
    }),
    ("a_large_environment", |b| {
        let change = |config: &mut msg::ContainerConfig| config.envs.push(variable("BIG", &"x".repeat(100_000)));
        same(b.printed("big-env", "echo ${#BIG}", change)?, "100000\n".into())
    }),
    ("a_hundred_arguments", |b| {
        let change = |config: &mut msg::ContainerConfig| {
            config.args = std::iter::once("x".to_owned()).chain((1..=100).map(|number| number.to_string())).collect();
        };
        same(b.printed("many-args", "echo $# ${100}", change)?, "100 100\n".into())
    }),
    ("an_argument_may_hold_newlines", |b| {
        let change = |config: &mut msg::ContainerConfig| config.args = vec!["x".into(), "one\ntwo".into()];
        same(b.printed("lines", "echo \"$1\"", change)?, "one\ntwo\n".into())
    }),
    ("a_missing_working_directory_is_made", |b| {
        let change = |config: &mut msg::ContainerConfig| config.working_dir = "/made/for/it".into();
        same(b.printed("made", "pwd", change)?, "/made/for/it\n".into())
    }),
    ("a_file_is_no_working_directory", |b| {
        let change = |config: &mut msg::ContainerConfig| config.working_dir = "/etc/passwd".into();
        match b.pod.start("no-cwd", &["true"], change) {
            Ok(id) => Err(format!("{id} started")),
            Err(error) => holds(&error.1.to_lowercase(), "not a directory"),
        }
    }),
    ("exec_has_the_containers_variables", |b| {
        let change = |config: &mut msg::ContainerConfig| config.envs.push(variable("OWN", "yes"));
        let id = b.pod.start("exec-env", &["sleep", "1000"], change).map_err(|error| error.1)?;
        let output = b.cri.exec(&id, &["sh", "-c", "echo $OWN"]).map_err(|error| error.1)?.1;
        b.cri.stop(&id, 0).map_err(|error| error.1)?;
        same(output, "yes\n".into())
    }),
    ("exec_has_the_containers_user_and_directory", |b| {
        let change = |config: &mut msg::ContainerConfig| {
            security(config).run_as_username = "app".into();
            config.working_dir = "/tmp".into();
        };
        let id = b.pod.start("exec-user", &["sleep", "1000"], change).map_err(|error| error.1)?;
        let output = b.cri.exec(&id, &["sh", "-c", "id -un; pwd"]).map_err(|error| error.1)?.1;
        b.cri.stop(&id, 0).map_err(|error| error.1)?;
        same(output, "app\n/tmp\n".into())
    }),
    ("exec_without_input_reads_its_end", |b| same(b.exec("cat; echo end")?.1, "end\n".into())),
    ("exec_keeps_a_megabyte_of_errors_apart", |b| {
        let (code, out, err) = b.exec("head -c 1000000 /dev/zero | tr '\\0' e >&2; echo done")?;
        same((code, out.as_str(), err.len()), (0, "done\n", 1_000_000))
    }),
    ("exec_gets_a_long_argument", |b| {
        let long = "y".repeat(100_000);
        let output = b.cri.exec(&b.sleeper, &["sh", "-c", "echo ${#1}", "x", &long]).map_err(|error| error.1)?.1;
        same(output, "100000\n".into())
    }),
    ("twenty_execs_one_after_another", |b| {
        for number in 0..20 {
            same(b.exec(&format!("echo {number}; exit {number}"))?, (number, format!("{number}\n"), String::new()))?;
        }
        Ok(())
    }),
    ("exec_that_takes_too_long_is_ended", |b| {
        let request = msg::ExecSyncRequest {
            container_id: b.sleeper.clone(),
            cmd: ["sleep", "7654"].map(str::to_owned).to_vec(),
            timeout: 1,
            ..Default::default()
        };
        let error = b.cri.call::<msg::ExecSyncResponse>("ExecSync", &request).map(drop).unwrap_err();
        holds(&error.1, "timeout")?;
        // Killed, and gone before the next one looks.
        let left = b.exec("ps | grep '[s]leep 7654' | wc -l")?.1;
        same(left.trim(), "0")
    }),
    ("exec_streams_carry_a_megabyte_in", |b| {
        let mut streams =
            b.cri.exec_streams(&b.sleeper, &["sh", "-c", "head -c 1000000 | wc -c"], false).map_err(|error| error.1)?;
        for _ in 0..100 {
            streams.write(&"z".repeat(10_000));
        }
        let (_, stdout, _) = streams.finish();
        same(stdout.trim(), "1000000")
    }),
    ("no_process_outlives_the_first_one", |b| {
        let folder = b.folder.join("outlive");
        std::fs::create_dir_all(&folder).map_err(|error| error.to_string())?;
        let mount = msg::Mount {
            container_path: "/data".into(),
            host_path: folder.display().to_string(),
            ..Default::default()
        };
        let script = "(while :; do date +%s%N >/data/beat; sleep 0.1; done) & sleep 0.5";
        let (code, _) = b.run("outlive", script, |config| config.mounts.push(mount))?;
        same(code, 0)?;
        let beat = || std::fs::read_to_string(folder.join("beat")).unwrap_or_default();
        let last = beat();
        // Five beats of one that lived on: what does not happen is no event.
        std::thread::sleep(std::time::Duration::from_millis(500));
        same(beat(), last)
    }),
    ("orphans_are_reaped", |b| {
        // The shell that starts them is the container's first process, and waits for nobody in particular.
        let script = "for i in 1 2 3 4 5; do (sleep 0.1 &) ; done; sleep 1; cat /proc/[0-9]*/status 2>/dev/null | grep -c 'zombie' || true";
        same(b.printed("orphans", script, |_| {})?, "0\n".into())
    }),
    ("fifty_processes", |b| {
        let script = "i=0; while [ $i -lt 50 ]; do sleep 100 & i=$((i+1)); done; ls -d /proc/[0-9]* | wc -l";
        let count: u32 = b.printed("many", script, |_| {})?.trim().parse().map_err(|error| format!("{error}"))?;
        same((50..60).contains(&count), true)
    }),
    ("the_clock_is_the_hosts", |b| {
        let inside: u64 = b.exec("date +%s")?.1.trim().parse().map_err(|error| format!("{error}"))?;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs();
        if now.abs_diff(inside) <= 3 { Ok(()) } else { Err(format!("{inside} there and {now} here")) }
    }),
    ("a_quota_of_processor_time", |b| {
        let change = |config: &mut msg::ContainerConfig| {
            (resources(config).cpu_quota, resources(config).cpu_period) = (50_000, 100_000);
        };
        let script = "cat /sys/fs/cgroup/cpu.max /sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us /sys/fs/cgroup/cpu/cpu.cfs_quota_us \
            2>/dev/null || true";
        holds(&b.printed("quota", script, change)?, "50000")
    }),
    ("a_share_of_processor_time", |b| {
        let change = |config: &mut msg::ContainerConfig| resources(config).cpu_shares = 2048;
        let script = "cat /sys/fs/cgroup/cpu.weight /sys/fs/cgroup/cpu,cpuacct/cpu.shares /sys/fs/cgroup/cpu/cpu.shares 2>/dev/null || true";
        let output = b.printed("shares", script, change)?;
        if output.contains("2048") || output.contains("79") { Ok(()) } else { Err(output) }
    }),
    ("a_script_without_an_interpreter_is_no_program", |b| {
        let script = "printf '#!/no/such\\n' >/tmp/x; chmod 755 /tmp/x";
        same(b.exec(script)?.0, 0)?;
        match b.cri.exec(&b.sleeper, &["/tmp/x"]) {
            // Which of the two is the runtime's choice.
            Ok((code, _, text)) => same((code != 0, text.contains("no such file")), (true, true)),
            Err(error) => holds(&error.1, "no such file or directory"),
        }
    }),
    ("a_user_that_is_not_there_is_named", |b| {
        let change = |config: &mut msg::ContainerConfig| security(config).run_as_username = "ghost".into();
        match b.pod.start("ghost", &["true"], change) {
            Ok(id) => Err(format!("{id} started")),
            Err(error) => holds(&error.1, "user"),
        }
    }),
    ("a_terminal_of_the_first_process_ends_lines_its_way", |b| {
        let change = |config: &mut msg::ContainerConfig| config.tty = true;
        let (code, output) = b.run("tty-log", "tty; [ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo all", change)?;
        same(code, 0)?;
        holds(&output, "/dev/pts/0")?;
        holds(&output, "all")
    }),
];
