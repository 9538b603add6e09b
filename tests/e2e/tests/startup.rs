//! What it takes to start a shim, in instructions, by callgrind: a count that does not depend on who else is on the machine.
//!
//! Lane: open: no machine is started.

use std::path::Path;
use std::process::Command;

use coracle_e2e::bundles::script_config;
use coracle_e2e::{Host, path};

/// The most instructions that something may take, from the file that all of CI is held to.
fn budget(name: &str) -> u64 {
    let budgets: toml::Table = toml::from_str(include_str!("../../../xtask/budgets.toml")).unwrap();
    budgets["instructions"][name].as_integer().unwrap().try_into().unwrap()
}

/// Instructions of a program of ours; none, with a printed reason, where there is no valgrind.
fn instructions(host: &Host, program: &str, arguments: &[&str], folder: &Path, settings: &Path) -> Option<u64> {
    let mut command = Command::new("valgrind");
    command.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]).arg(path(program)).args(arguments);
    let output = match command.current_dir(folder).env("CORACLE_CONFIG", settings).output() {
        Ok(output) => output,
        Err(error) => {
            println!("left out: valgrind does not start: {error}");
            return None;
        }
    };
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{text}");
    let line = text.lines().find_map(|line| line.split("Collected : ").nth(1));
    let count = line.and_then(|count| count.trim().parse().ok()).unwrap_or_else(|| panic!("{}: {text}", host.mark()));
    Some(count)
}

#[test]
fn a_shim_starts_within_its_budget() {
    let host = Host::new();
    let bundle = host.folder.join("budget");
    std::fs::create_dir(&bundle).unwrap();
    std::fs::write(bundle.join("config.json"), script_config("true").to_string()).unwrap();
    let arguments = ["-namespace", "test", "-id", "budget", "start"];
    let started = instructions(&host, "CORACLE_TEST_SHIM", &arguments, &bundle, &host.settings_file());
    host.kill("-id budget");
    let mut delete = Command::new(path("CORACLE_TEST_SHIM"));
    delete.args(["-namespace", "test", "-id", "budget", "-bundle"]).arg(&bundle).arg("delete").current_dir(&bundle);
    assert!(delete.env("CORACLE_CONFIG", host.settings_file()).output().unwrap().status.success());
    if let Some(count) = started {
        println!("instructions of a shim's start: {count}");
        assert!((100_000..budget("shim_start")).contains(&count), "{count}");
    }
    host.audit();
}

#[test]
fn settings_are_read_within_their_budget() {
    let host = Host::new();
    let (empty, whole) = (host.folder.join("empty.toml"), host.folder.join("whole.toml"));
    std::fs::write(&empty, "").unwrap();
    let default = host.coracle_outcome(&["settings", "default"]).stdout;
    // Each of them set, as somebody might.
    let set = |line: &str| line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')).unwrap_or(line).to_owned();
    let default: Vec<_> = default.lines().map(set).collect();
    assert!(default.iter().filter(|line| line.contains(" = ") && !line.starts_with('#')).count() > 50);
    std::fs::write(&whole, default.join("\n")).unwrap();
    let count = |file: &Path| instructions(&host, "CORACLE_TEST_BINARY", &["settings", "check"], &host.folder, file);
    if let (Some(without), Some(with)) = (count(&empty), count(&whole)) {
        println!("instructions of reading all settings: {}", with - without);
        assert!(with - without < budget("settings"), "{with} against {without}");
    }
    host.audit();
}
