//! The lane of the built-in monitor: its own tests, and the end-to-end tests with it, on this machine's KVM or in the lab.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::build::Built;
use crate::lab;
use crate::steps::{command, output, run, step, succeeded};

/// The tests that run each time: their program, and the beginnings of their names. What is not here runs by `--all`.
const EACH_TIME: [(&str, &[&str]); 12] = [
    ("contract", &["the_builtin_monitor_keeps_the_contract"]),
    (
        "machine",
        &[
            "the_ends_of_a_guest_are_told_apart",
            "the_agent_greets_on_every_kernel",
            "a_compressed_kernel_boots_too",
            "processors_and_memory_are_those",
            "a_disk_is_read_and_written",
            "a_disk_comes_to_a_running_guest",
            "a_disk_is_held_to_a_rate",
            "a_file_is_memory",
            "a_guest_in_need",
            "processors_come_and_go",
            "what_is_no_kernel_is_refused",
        ],
    ),
    ("killed", &["killed_at_any_moment", "what_a_machine_takes"]),
    (
        "run",
        &[
            "prints_and_exits_with_zero",
            "passes_exit_codes_on",
            "the_process_is_alone_and_holds",
            "a_volume_shows_files_both_ways",
            "execs_have_codes_users_and_streams",
            "one_call_writes_four_megabytes_to_the_host",
            "a_terminal_has_a_size",
        ],
    ),
    ("failures", &["the_monitor_killed_is_an_exit", "the_guests_kernel_panicking", "virtiofsd_killed_is_an_exit"]),
    ("containerd", &["exec_kill_pause_stats_and_update"]),
    ("network", &["links_of_every_kind"]),
    ("storage", &["layers_show_what_they_say", "layers_are_memory", "a_changed_block_is_never_read"]),
    ("pods", &["a_pod_has_the_network_that_cni_has_made", "a_pod_whose_monitor_is_killed"]),
    ("sizes", &["a_machine_follows_the_limits", "memory_that_was_freed"]),
    ("snapshot", &["clones_go_on", "a_full_disk", "a_machine_grows_and_shrinks"]),
    ("volumes", &["a_direct_volume_is_mounted"]),
];

/// Those of them that run once more on sealed machines: their program, and the beginnings of their names.
const SEALED: [(&str, &[&str]); 1] = [("run", &["prints_and_exits_with_zero", "execs_have_codes_users_and_streams"])];

/// What is tested in a clone of its own, on QEMU: devices of the host that are passed on.
const PASSTHROUGH: &str = "passthrough";

/// The time limits of the lab, in seconds: the set that runs each time, and all.
const LIMIT: u32 = 20 * 60;
const LIMIT_ALL: u32 = 4 * 60 * 60;

/// The monitor under test, its guests and the programs that test it.
pub(crate) struct Lane<'a> {
    /// What was built.
    pub(crate) built: &'a Built,
    /// The package that stands for the guest's kernel.
    pub(crate) kernel: String,
    /// The guest image with that kernel.
    pub(crate) guest: PathBuf,
    /// The guest image of another kernel, where there is one.
    pub(crate) other: Option<PathBuf>,
    /// That of a distribution's usual kernel, which is not made for clouds, where there is one.
    pub(crate) usual: Option<PathBuf>,
    /// The image that containers are made of.
    pub(crate) image: PathBuf,
}

impl Lane<'_> {
    /// Runs the set that runs each time, or all; only what holds `filter` where it has words.
    pub(crate) fn run(&self, all: bool, filter: &[&str]) -> Result<()> {
        let programs = step("building the tests of the built-in monitor", programs)?;
        let package = lab::newest_kernel(&self.kernel)?;
        let programs: Vec<_> = programs.into_iter().filter(|(name, _)| name != PASSTHROUGH).collect();
        let mut words = if all { every(&programs) } else { chosen(&programs, &EACH_TIME, filter) };
        let sealed = chosen(&programs, &SEALED, if all { &[] } else { filter });
        words.extend(sealed.into_iter().map(|ran| Ran {
            tests: if all { Vec::new() } else { ran.tests },
            is_sealed: true,
            ..ran
        }));
        if words.is_empty() {
            println!("no test of the built-in monitor holds {}", filter.join(", "));
            return Ok(());
        }
        let in_lab = !has_kvm(self.built)?;
        let limit = if all { LIMIT_ALL } else { LIMIT };
        // A clone for each program in the lab: where one fails, little has to run again.
        let groups = words.chunks(if in_lab { 1 } else { words.len() });
        let mut failed = Vec::new();
        for group in groups {
            let script = script(group, if all { filter } else { &[] }, in_lab);
            let (place, mut tests) = self.where_kvm_works(&["sh", "-c", &script], limit)?;
            self.give(&mut tests, &package);
            let names: Vec<_> = group.iter().map(Ran::shown).collect();
            // The others run all the same: whoever reads wants to know what else has failed.
            failed.extend(step(&format!("lane builtin ({place}): {}", names.join(" ")), || in_a_clone(tests)).err());
        }
        failed.into_iter().next().map_or(Ok(()), Err)
    }

    /// Passes a device of the host on, in a clone that has one behind an IOMMU: whoever has KVM may have none to spare.
    pub(crate) fn pass_devices_on(&self, filter: &[&str]) -> Result<()> {
        let programs = step("building the tests of devices", programs)?;
        let passthrough = programs.into_iter().find(|(name, _)| name == PASSTHROUGH);
        let (name, program) = passthrough.context("there is no test program for passing devices on")?;
        let tests = filter.iter().map(|word| (*word).to_owned()).collect();
        let script = script(&[Ran { name, program, tests, is_sealed: false }], &[], true);
        let mut tests = lab::clone_for(&["sh", "-c", &script], LIMIT, true)?;
        self.give(&mut tests, &lab::newest_kernel(&self.kernel)?);
        step("lane passthrough (the lab)", || in_a_clone(tests))
    }

    /// The figures of the built-in monitor beside QEMU's.
    pub(crate) fn measure(&self) -> Result<Value> {
        // The program only looks on: its own speed counts for nothing.
        let program = bench_program("coracle-driver-builtin", "machine", &["--profile=dev"])?;
        let program = program.display().to_string();
        let (_, mut measure) = self.where_kvm_works(&[&program], LIMIT)?;
        self.give(&mut measure, &lab::newest_kernel(&self.kernel)?);
        let text = output(measure)?;
        let start = text.find('{').context("nothing was measured")?;
        serde_json::from_str(&text[start..]).context("the figures of the built-in monitor")
    }

    /// A command on this machine's KVM, or in the lab for so many seconds; and which of the two.
    fn where_kvm_works(&self, words: &[&str], seconds: u32) -> Result<(&'static str, Command)> {
        if has_kvm(self.built)? {
            let (program, arguments) = words.split_first().context("no command")?;
            return Ok(("this machine's KVM", command(program, arguments)));
        }
        Ok(("the lab", lab::clone_for(words, seconds, false)?))
    }

    fn give(&self, tests: &mut Command, package: &std::path::Path) {
        tests
            .env("CORACLE_TEST_KVM", "1")
            .env("CORACLE_TEST_MONITOR", "builtin")
            .env("CORACLE_TEST_KERNEL_PACKAGE", package)
            .env("CORACLE_TEST_GUEST", &self.guest)
            .env("CORACLE_TEST_IMAGE", &self.image)
            .env("CORACLE_TEST_SHIM", self.built.shim())
            .env("CORACLE_TEST_BINARY", self.built.coracle())
            .env("CORACLE_TEST_AGENT", self.built.agent())
            .env("CORACLE_TEST_PROBE", self.built.guest_probe());
        let guests = [Some(&self.guest), self.other.as_ref(), self.usual.as_ref()];
        tests.env("CORACLE_TEST_GUESTS", std::env::join_paths(guests.into_iter().flatten()).unwrap_or_default());
        if let Some(other) = &self.other {
            tests.env("CORACLE_TEST_OTHER_GUEST", other);
        }
    }
}

/// How often tests are begun whose clone fails under them.
const CLONES_MAX: u32 = 3;

/// Runs tests, in another clone of the lab where theirs has failed, and not a test.
fn in_a_clone(mut tests: Command) -> Result<()> {
    for _ in 1..CLONES_MAX {
        let status = tests.status().with_context(|| format!("start {tests:?}"))?;
        if status.code() != Some(lab::FAILED.into()) {
            return succeeded(&tests, status);
        }
        // The clone's kernel has crashed, which is the emulator's fault or the kernel's.
        eprintln!("xtask: the lab's clone itself has failed (see docs/reliability.md): once more, in a new one");
    }
    run(tests)
}

/// Whether KVM works here, as our own shim finds it.
fn has_kvm(built: &Built) -> Result<bool> {
    let report = output(command(&built.shim().display().to_string(), &["probe"]))?;
    let report: Value = serde_json::from_str(&report).context("the shim's report")?;
    Ok(report["kvm"]["usable"] == true)
}

/// The test programs, by name.
fn programs() -> Result<Vec<(String, PathBuf)>> {
    let packages = ["test", "--locked", "--no-run", "--message-format=json", "-p", "coracle-driver-builtin"];
    let mut build = command("cargo", &packages);
    build.args(["-p", "coracle-e2e", "--tests"]);
    executables(build, "test")
}

/// The program `name` of a package's benches.
pub(crate) fn bench_program(package: &str, name: &str, options: &[&str]) -> Result<PathBuf> {
    let mut build = command("cargo", &["bench", "--locked", "--no-run", "--message-format=json", "-p", package]);
    build.args(["--bench", name]).args(options);
    let (_, program) =
        executables(build, "bench")?.into_iter().next().context("cargo has built no program that measures")?;
    Ok(program)
}

/// What cargo builds of targets of a kind, by name.
fn executables(build: Command, wanted: &str) -> Result<Vec<(String, PathBuf)>> {
    let text = output(build)?;
    let mut programs = Vec::new();
    for line in text.lines() {
        let message: Value = serde_json::from_str(line).context("cargo's messages")?;
        let mut kinds = message["target"]["kind"].as_array().into_iter().flatten();
        let is_wanted = kinds.any(|kind| kind == wanted);
        if let (true, Some(name), Some(path)) =
            (is_wanted, message["target"]["name"].as_str(), message["executable"].as_str())
        {
            programs.push((name.to_owned(), path.into()));
        }
    }
    if programs.is_empty() {
        bail!("cargo has built no programs of the kind {wanted}");
    }
    Ok(programs)
}

/// A program of tests that runs.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Ran {
    name: String,
    program: PathBuf,
    /// The beginnings of the names of its tests; all of them where there are none.
    tests: Vec<String>,
    /// Whether its machines are sealed.
    is_sealed: bool,
}

impl Ran {
    /// What it is called, for people.
    fn shown(&self) -> String {
        if self.is_sealed { format!("{} (sealed)", self.name) } else { self.name.clone() }
    }
}

/// The programs of a set with those of their tests that hold one of `filter`.
fn chosen(programs: &[(String, PathBuf)], set: &[(&str, &[&str])], filter: &[&str]) -> Vec<Ran> {
    let wanted = |test: &&&str| filter.is_empty() || filter.iter().any(|word| test.contains(word));
    let of = |name: &str| programs.iter().find(|(program, _)| program == name).map(|(_, path)| path.clone());
    let chosen = set.iter().filter_map(|(name, tests)| {
        let tests: Vec<String> = tests.iter().filter(wanted).map(|test| (*test).to_owned()).collect();
        let program = of(name).filter(|_| !tests.is_empty())?;
        Some(Ran { name: (*name).to_owned(), program, tests, is_sealed: false })
    });
    chosen.collect()
}

fn every(programs: &[(String, PathBuf)]) -> Vec<Ran> {
    let all = |(name, path): &(String, PathBuf)| Ran {
        name: name.clone(),
        program: path.clone(),
        tests: Vec::new(),
        is_sealed: false,
    };
    programs.iter().map(all).collect()
}

/// Programs of which one test runs at a time: their machines gain processors, and two at once made the lab's clone stand still.
const ALONE: [&str; 3] = ["sizes", "machine", "snapshot"];

/// What runs a program of tests, in so many threads. In the lab what has failed runs once more, alone: the emulated processor makes guests crash and hang now
/// and then (docs/reliability.md). Both are shown, and the first one is not counted as a result.
const RUN_ONCE: &str = "failed=0\nlane() { threads=$1; shift; \"$@\" --test-threads=$threads || failed=1; }\n";
const RUN_AGAIN: &str = r#"failed=0
again=
lane() {
    threads=$1
    shift
    if "$@" --test-threads=$threads >/tmp/lane.out 2>&1; then cat /tmp/lane.out; return; fi
    sed 's/^/first try | /' /tmp/lane.out
    names=$(awk '/^test .* \.\.\. FAILED$/ { print $2 }' /tmp/lane.out)
    if [ -n "$names" ] && "$1" --test-threads=1 --exact $names; then again="$again $names"; else failed=1; fi
}
"#;

/// A script that runs the programs one after another, those with sealed machines last, and fails where one of them has.
fn script(programs: &[Ran], filter: &[&str], in_lab: bool) -> String {
    let mut script = String::from(if in_lab { RUN_AGAIN } else { RUN_ONCE });
    let mut is_sealed = false;
    for ran in programs {
        if ran.is_sealed && !std::mem::replace(&mut is_sealed, true) {
            script.push_str("export CORACLE_TEST_SEALED=1\n");
        }
        let words: Vec<String> =
            ran.tests.iter().cloned().chain(filter.iter().map(|word| (*word).to_owned())).collect();
        let threads = if ALONE.contains(&&*ran.name) { 1 } else { 2 };
        script.push_str(&format!("lane {threads} '{}' {}\n", ran.program.display(), words.join(" ")));
    }
    if in_lab {
        script.push_str("[ -z \"$again\" ] || echo \"failed in the lab, and passed when they ran again:\" $again\n");
    }
    script.push_str("exit $failed\n");
    script
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_set_is_small_and_a_filter_makes_it_smaller() {
        let programs: Vec<(String, PathBuf)> =
            EACH_TIME.iter().map(|(name, _)| ((*name).to_owned(), format!("/t/{name}-1").into())).collect();
        let all = chosen(&programs, &EACH_TIME, &[]);
        let count: usize = all.iter().map(|ran| ran.tests.len()).sum();
        assert!((15..=38).contains(&count), "{count}");
        let mut some = chosen(&programs, &EACH_TIME, &["kernel"]);
        let names: Vec<_> = some.iter().map(|ran| ran.program.to_str().unwrap()).collect();
        assert_eq!(names, ["/t/machine-1", "/t/failures-1"]);
        some.push(Ran { is_sealed: true, ..some[1].clone() });
        let script = script(&some, &[], false);
        let plain = "lane 2 '/t/failures-1' the_guests_kernel_panicking\n";
        assert!(script.contains(&format!("{plain}export CORACLE_TEST_SEALED=1\n{plain}")), "{script}");
        let sizes = Ran { name: "sizes".into(), program: "/t/sizes-1".into(), tests: Vec::new(), is_sealed: false };
        assert!(super::script(&[sizes], &[], true).contains("lane 1 '/t/sizes-1' \n"));
    }

    /// Runs a script of one program, which fails as often as its file of tries says, and gives what it prints and whether it passed.
    fn run_script(fails: u32, in_lab: bool) -> (String, bool) {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let (program, tries) = (folder.path().join("program"), folder.path().join("tries"));
        let text = format!(
            "#!/bin/sh\necho x >>{0}\nif [ $(wc -l <{0}) -le {fails} ]; then echo 'test one ... FAILED'; exit 101; fi\necho \"ran $*\"\n",
            tries.display()
        );
        std::fs::write(&program, text).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let script = script(
            &[Ran { name: "program".into(), program, tests: vec!["one".into()], is_sealed: false }],
            &[],
            in_lab,
        );
        let script = script.replace("/tmp/lane.out", &folder.path().join("out").display().to_string());
        let ran = Command::new("sh").args(["-c", &script]).output().unwrap();
        (String::from_utf8_lossy(&ran.stdout).into_owned(), ran.status.success())
    }

    #[test]
    fn in_the_lab_what_fails_runs_once_more_and_is_shown() {
        assert_eq!(run_script(0, true), ("ran one --test-threads=2\n".into(), true));
        let (text, passed) = run_script(1, true);
        assert!(passed && text.contains("first try | test one ... FAILED"), "{text}");
        assert!(text.contains("ran --test-threads=1 --exact one\n") && text.ends_with("ran again: one\n"), "{text}");
        let (text, passed) = run_script(2, true);
        assert!(!passed && !text.contains("ran again"), "{text}");
        assert!(!run_script(1, false).1, "elsewhere nothing runs again");
    }
}
