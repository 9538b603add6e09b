//! What each command prints, for people and for programs, against `tests/e2e/snapshots`. Its help is in `docs/reference/commands.md`.

use std::collections::BTreeSet;
use std::path::Path;

use coracle_e2e::{Host, Snapshot, becomes};

#[test]
fn what_is_printed_of_containers_is_as_it_was() {
    let host = Host::new();
    std::fs::create_dir_all(host.root().join("images")).unwrap();
    let image = host.image();
    let mut printed = Snapshot::default();
    printed.text(&host, &["pull", &image]);
    printed.json(&host, &["pull", "--json", &image]);
    printed.text(&host, &["run", "--rm", &image, "echo", "words of a container"]);
    printed.text(&host, &["run", "--detach", "--name", "looked", &image, "sh", "-c", "echo begun; exec sleep 100000"]);
    let id = host.coracle_outcome(&["ps", "--quiet"]).line().to_owned();
    for arguments in [&["ps"][..], &["pods"], &["stats"], &["images"], &["levels", &id]] {
        printed.text(&host, arguments);
        printed.json(&host, &[arguments, &["--json"]].concat());
    }
    printed.text(&host, &["exec", "looked", "echo", "words of an exec"]);
    becomes("its log", || host.coracle_outcome(&["logs", "looked"]).stdout, |log| log == "begun\n");
    printed.text(&host, &["logs", "looked"]);
    printed.parts(&host, &["check", "--jail", &id], |line| line.split("  ").next().map(str::to_owned));
    printed.json(&host, &["check", "--jail", &id, "--json"]);
    printed.parts(&host, &["metrics"], |line| line.strip_prefix("# TYPE ").map(str::to_owned));
    printed.refused(&host, &["debug", &id, "--", "id"]);
    printed.refused(&host, &["iptables", "get", &id]);
    printed.refused(&host, &["iptables", "set", &id, "/dev/null"]);
    let archive = |name: &str| host.folder.join(name).display().to_string();
    printed.text(&host, &["support-bundle", "--output", &archive("one.tar.gz")]);
    printed.json(&host, &["support-bundle", "--json", "--output", &archive("two.tar.gz")]);
    // Figures differ; what they are of does not.
    let report = host.folder.join("bench.html").display().to_string();
    let bench = ["bench", "--rounds", "2", "--report", &report, &image];
    printed.parts(&host, &bench, |line| {
        line.split("  ").next().filter(|name| !name.starts_with("these")).map(str::to_owned)
    });
    assert!(std::fs::read_to_string(&report).unwrap().matches("<circle").count() >= 5);
    printed.json_without(&host, &["bench", "--json", "--rounds", "1", &image], "environment");
    printed.refused(&host, &["bench", "oci:/nowhere"]);
    printed.text(&host, &["kill", "--signal", "CONT", "looked"]);
    printed.text(&host, &["stop", "--time", "0", "looked"]);
    printed.refused(&host, &["attach", "looked"]);
    printed.text(&host, &["ps", "--all"]);
    printed.text(&host, &["rm", "looked"]);
    for words in [&["stop"][..], &["kill"], &["rm"], &["logs"], &["exec"], &["attach"]] {
        let more = if words == ["exec"] { &["nobody", "true"][..] } else { &["nobody"] };
        printed.refused(&host, &[words, more].concat());
    }
    for words in [&["stats"][..], &["levels"], &["debug"], &["iptables", "get"], &["check", "--jail"]] {
        printed.refused(&host, &[words, &["nobody"]].concat());
    }
    printed.is("containers.txt");
    host.audit();
}

#[test]
fn what_is_printed_of_the_host_is_as_it_was() {
    let host = Host::new();
    let direct = format!("{:?}", host.folder.join("direct").display().to_string());
    let host = host.set("storage.direct_volumes", &direct);
    let mut printed = Snapshot::default();
    let guest = coracle_e2e::path("CORACLE_TEST_GUEST").display().to_string();
    printed.text(&host, &["version"]);
    printed.text(&host, &["settings", "check"]);
    printed.text(&host, &["settings", "show"]);
    printed.text(&host, &["image", "inspect", &guest]);
    printed.text(&host, &["image", "verify", &guest]);
    // What it prints is what `inspect` prints.
    printed.refused(&host, &["image", "build", "--json", "--kernel", "/dev/null/nothing.deb"]);
    // What a host is and has differs.
    let own = |line: &str| (!line.starts_with("shim.")).then(|| line.split("  ").next().map(str::to_owned))?;
    printed.parts(&host, &["env"], own);
    printed.json_without(&host, &["env", "--json"], "shim");
    let name = |line: &str| Some(line.get(9..)?.split(':').next()?.to_owned());
    printed.parts(&host, &["check"], move |line| if line.starts_with(' ') { None } else { name(line) });
    for arguments in [&["version"][..], &["settings", "check"], &["settings", "show"], &["check"]] {
        printed.json(&host, &[arguments, &["--json"]].concat());
    }
    for arguments in [&["image", "inspect"][..], &["image", "verify"]] {
        printed.json(&host, &[arguments, &["--json"]].concat());
    }
    let kata = host.folder.join("kata.toml");
    std::fs::write(&kata, "[hypervisor.qemu]\ndefault_vcpus = 2\ndisable_image_nvdimm = true\n").unwrap();
    printed.text(&host, &["migrate", "kata", kata.to_str().unwrap()]);
    printed.json(&host, &["migrate", "kata", "--json", kata.to_str().unwrap()]);
    // Whole, both are in docs/reference.
    printed.parts(&host, &["settings", "default"], |line| line.starts_with('[').then(|| line.to_owned()));
    printed.parts(&host, &["settings", "schema"], |line| line.contains("\"$schema\"").then(|| line.to_owned()));
    // Long, and made by a library.
    printed.parts(&host, &["completion", "zsh"], |line| line.starts_with("#compdef").then(|| line.to_owned()));
    let description = r#"{"volume-type":"block","device":"/dev/x","fstype":"ext4"}"#;
    printed.text(&host, &["volume", "add", "/var/lib/pods/v", description]);
    // With a guest that has one: volumes.rs.
    printed.refused(&host, &["volume", "stats", "/var/lib/pods/v"]);
    printed.refused(&host, &["volume", "stats", "/var/lib/pods/v", "--json"]);
    printed.refused(&host, &["volume", "resize", "/var/lib/pods/v", "1G"]);
    printed.text(&host, &["volume", "remove", "/var/lib/pods/v"]);
    printed.refused(&host, &["volume", "remove", "/var/lib/pods/v"]);
    printed.refused(&host, &["monitor", "--listen", "nonsense"]);
    let system = host.folder.join("system").display().to_string();
    printed.text(&host, &["install", "--destdir", &system, "--containerd"]);
    printed.text(&host, &["uninstall", "--destdir", &system]);
    printed.refused(&host, &["uninstall", "--destdir", &system]);
    printed.is("host.txt");
    host.audit();
}

/// No command is without: each of the reference is in a snapshot, and with `--json` where it has that.
#[test]
fn each_command_has_its_snapshot() {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| std::fs::read_to_string(own.join(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    let printed = read("snapshots/containers.txt") + &read("snapshots/host.txt");
    let lines: BTreeSet<&str> = printed.lines().filter_map(|line| line.strip_prefix("$ ")).collect();
    let page = read("../../docs/reference/commands.md");
    let mut missing = Vec::new();
    for section in page.split("\n## ").skip(1).filter(|section| !section.contains("\nCommands:")) {
        let name = section.lines().next().unwrap_or_default();
        let with = |word: &str| lines.iter().any(|line| line.starts_with(name) && line.contains(word));
        if !with("") {
            missing.push(name.to_owned());
        }
        if section.contains("--json") && !with("--json") {
            missing.push(format!("{name} --json"));
        }
    }
    assert!(page.matches("\n## ").count() > 40 && missing.is_empty(), "in no snapshot: {missing:?}");
}
