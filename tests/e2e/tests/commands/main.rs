//! Commands that look at pods and at the host, each as its user types it.
//!
//! Lane: open: what they say does not depend on how files come.

mod printed;

use std::path::Path;

use coracle_e2e::{Host, Outcome, becomes};

fn json(outcome: &Outcome) -> serde_json::Value {
    serde_json::from_str(&outcome.stdout).unwrap_or_else(|error| panic!("{error}: {outcome:?}"))
}

/// All regular files below a folder.
fn files(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().unwrap().is_dir() {
            found.extend(files(&entry.path()));
        } else {
            found.push(entry.path().display().to_string());
        }
    }
    found.sort();
    found
}

#[test]
fn a_container_is_looked_at_by_each_command() {
    let host = Host::new();
    std::fs::create_dir_all(host.root().join("images")).unwrap();
    let secret = "hunter2-planted";
    let image = host.image();
    // A log of the shim's, for it makes one for containers where that is asked for.
    let mut run = host.coracle(&["run", "--detach", "--name", "looked", "-e", &format!("PASSWORD={secret}"), &image]);
    run.args(["sh", "-c", &format!("trap 'echo got it; exit 9' TERM; echo {secret}; while :; do sleep 0.2; done")]);
    run.env("CORACLE_DEBUG", "1");
    let started = Outcome::of(run, b"");
    assert_eq!(started.code, 0, "{started:?}");
    let id = started.line().to_owned();
    let listed = json(&host.coracle_outcome(&["ps", "--json"]));
    assert!(listed[0]["id"] == id.as_str() && listed[0]["state"] == "running", "{listed}");
    let pods = json(&host.coracle_outcome(&["pods", "--json"]));
    assert!(pods[0]["id"] == id.as_str() && pods[0]["containers"][0] == id.as_str(), "{pods}");
    assert!(host.coracle_outcome(&["pods"]).stdout.contains(&id));
    let used = json(&host.coracle_outcome(&["stats", "--json", &id]));
    assert!(used[0]["usage"]["memory_bytes"].as_u64().is_some_and(|bytes| bytes > 0), "{used}");
    assert!(used[0]["usage"]["processes"].as_u64().is_some_and(|count| count >= 1), "{used}");
    assert!(host.coracle_outcome(&["stats"]).stdout.contains("MEMORY"));
    let images = json(&host.coracle_outcome(&["images", "--json"]));
    assert!(
        images[0]["name"] == image.as_str() && images[0]["digest"].as_str().unwrap().starts_with("sha256:"),
        "{images}"
    );
    let pulled = host.coracle_outcome(&["pull", &image]);
    assert_eq!(pulled.line(), images[0]["digest"].as_str().unwrap());
    // The guest image has no such tools, and says so.
    let rules = host.coracle_outcome(&["iptables", "get", &id]);
    assert!(
        rules.code != 0 && rules.stderr.contains("iptables-save, which the guest image does not have"),
        "{rules:?}"
    );
    jail(&host, &id);
    levels(&host, &id);
    bundle(&host, &id, secret);
    // Whoever attaches sees what comes from then on, and passes signals on.
    let mut attached = coracle_e2e::Running::start(host.coracle(&["attach", "looked"]));
    let is_attached = || {
        let children = std::fs::read_to_string(format!("/proc/{}/status", attached.child.id())).unwrap_or_default();
        children.lines().any(|line| {
            line.starts_with("SigCgt:") && u64::from_str_radix(line[7..].trim(), 16).unwrap() & 1 << 14 != 0
        })
    };
    becomes("who is attached watches for signals", is_attached, |is_so| *is_so);
    attached.signal(rustix::process::Signal::TERM);
    attached.read_until("got it");
    let ended = attached.finish();
    assert!(ended.code == 9 && !ended.stdout.contains(secret), "{ended:?}");
    becomes("its end", || host.coracle_outcome(&["ps"]).stdout, |text| !text.contains("looked"));
    let all = json(&host.coracle_outcome(&["ps", "--all", "--json"]));
    assert!(all[0]["state"] == "exited" && all[0]["exit"] == 9, "{all}");
    assert_eq!(host.coracle_outcome(&["rm", "looked"]).code, 0);
    let nobody = host.coracle_outcome(&["stats", "nobody"]);
    assert!(nobody.code != 0 && nobody.stderr.contains("no pod nobody runs; `coracle pods`"), "{nobody:?}");
    host.audit();
}

/// Each process of the pod has what it needs, and nothing of its memory would be in a core file.
fn jail(host: &Host, id: &str) {
    let outcome = host.coracle_outcome(&["check", "--jail", id]);
    assert!(
        outcome.code == 0 && outcome.stdout.contains("the shim") && outcome.stdout.contains("the monitor"),
        "{outcome:?}"
    );
    // Who is not root gets no further than this, whatever mode a socket in it has.
    let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(host.pod()).unwrap());
    assert_eq!(mode & 0o077, 0, "{mode:o}");
    let found = json(&host.coracle_outcome(&["check", "--jail", id, "--json"]));
    for process in found["processes"].as_array().unwrap() {
        assert!(process["no_new_privileges"] == true && process["seccomp"] == 2, "{process}");
        let names = process["capability_names"].as_array().unwrap();
        assert!(!names.iter().any(|name| name == "sys_module" || name == "sys_rawio" || name == "bpf"), "{process}");
        let folder = Path::new("/proc").join(process["pid"].to_string());
        assert_eq!(std::fs::read_to_string(folder.join("coredump_filter")).unwrap().trim(), "00000000", "{process}");
        let limits = std::fs::read_to_string(folder.join("limits")).unwrap();
        let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
        assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
    }
    let nobody = host.coracle_outcome(&["check", "--jail", "nobody"]);
    assert!(nobody.code != 0 && nobody.stderr.contains("no pod nobody runs"), "{nobody:?}");
}

/// More is written from the moment at which it is asked for.
fn levels(host: &Host, id: &str) {
    let log = || std::fs::read_to_string(host.root().join("containers/looked/log")).unwrap();
    let set = |levels: &str| host.coracle_outcome(&["levels", id, levels]);
    assert_eq!(set("warn").code, 0);
    let before = log().len();
    assert_eq!(host.coracle_outcome(&["stats"]).code, 0);
    assert_eq!(log().len(), before, "nothing that happens is as much as a warning");
    let shown = set("info,sandbox=debug");
    assert!(shown.stdout.contains("sandbox   debug") && shown.stdout.contains("shim      info"), "{shown:?}");
    assert_eq!(host.coracle_outcome(&["stats"]).code, 0);
    let text = log();
    let line = text[before..].lines().find(|line| line.contains("StatsContainer")).expect(&text);
    assert!(
        line.contains("component=sandbox") && line.contains(&format!("pod={id}")) && line.contains("request="),
        "{line}"
    );
    let levels = json(&host.coracle_outcome(&["levels", id, "--json"]));
    assert!(levels["sandbox"] == "debug" && levels["shim"] == "info", "{levels}");
    let wrong = set("loud");
    assert!(wrong.code != 0 && wrong.stderr.contains("is no list of levels"), "{wrong:?}");
}

/// It has what helps, and no secrets.
fn bundle(host: &Host, id: &str, secret: &str) {
    let archive = host.folder.join("support.tar.gz");
    let made = host.coracle_outcome(&["support-bundle", "--output", archive.to_str().unwrap()]);
    assert_eq!(made.code, 0, "{made:?}");
    for name in [
        "env.json",
        "settings.txt",
        "pods.json",
        "metrics.txt",
        &format!("pods/{id}/console.txt"),
        &format!("containers/{id}/log"),
    ] {
        assert!(made.stdout.lines().any(|line| line == name), "{name}: {made:?}");
    }
    let unpacked = host.folder.join("support");
    std::fs::create_dir(&unpacked).unwrap();
    let _ = coracle_e2e::bundles::tool("tar", &["-xzf", archive.to_str().unwrap(), "-C", unpacked.to_str().unwrap()]);
    for file in files(&unpacked) {
        let bytes = std::fs::read(&file).unwrap();
        assert!(!bytes.windows(secret.len()).any(|window| window == secret.as_bytes()), "{file} holds the secret");
    }
    // It is nobody else's, and another is not written over it.
    let again = host.coracle_outcome(&["support-bundle", "--output", archive.to_str().unwrap()]);
    assert!(again.code != 0 && again.stderr.contains("support.tar.gz"), "{again:?}");
}

#[test]
fn the_host_is_described_for_people_and_programs() {
    let host = Host::new();
    let version = json(&host.coracle_outcome(&["version", "--json"]));
    assert!(version["coracle"] == version["shim"] && version["guest"]["agent"] == version["coracle"], "{version}");
    let environment = json(&host.coracle_outcome(&["env", "--json"]));
    assert!(environment["host"]["kernel"].is_string() && environment["places"]["guest"].is_string(), "{environment}");
    assert!(environment["changed_settings"].to_string().contains("guest.folder"), "{environment}");
    assert!(host.coracle_outcome(&["env"]).stdout.contains("versions.coracle"));
    let settings = json(&host.coracle_outcome(&["settings", "check", "--json"]));
    assert!(settings["ok"] == true && settings["error"].is_null(), "{settings}");
    let broken = host.folder.join("broken.toml");
    std::fs::write(&broken, "[machine]\nmemory = 1\n").unwrap();
    let broken = host.coracle_outcome(&["settings", "check", "--json", broken.to_str().unwrap()]);
    assert!(broken.code != 0 && json(&broken)["error"].as_str().unwrap().contains("machine.memory"), "{broken:?}");
    let check = json(&host.coracle_outcome(&["check", "--json"]));
    let lines = check["lines"].as_array().unwrap();
    for name in ["settings", "monitor", "guest image", "accelerator", "kvm", "kernel", "cgroups", "containerd"] {
        assert!(lines.iter().any(|line| line["name"] == name && line["state"].is_string()), "{name}: {check}");
    }
    let inspected = json(&host.coracle_outcome(&["image", "inspect", "--json"]));
    assert!(inspected["kernel_release"].is_string(), "{inspected}");
    assert_eq!(host.coracle_outcome(&["image", "verify"]).code, 0);
    // An image that somebody has changed.
    let changed = host.folder.join("guest");
    std::fs::create_dir(&changed).unwrap();
    for name in ["vmlinux", "initrd.img", "manifest.json"] {
        std::fs::copy(coracle_e2e::path("CORACLE_TEST_GUEST").join(name), changed.join(name)).unwrap();
    }
    let mut initrd = std::fs::read(changed.join("initrd.img")).unwrap();
    initrd[100] ^= 1;
    std::fs::write(changed.join("initrd.img"), initrd).unwrap();
    let refused = host.coracle_outcome(&["image", "verify", changed.to_str().unwrap()]);
    assert!(refused.code != 0 && refused.stderr.contains("initrd.img has the SHA-256"), "{refused:?}");
    for shell in ["bash", "zsh", "fish"] {
        let outcome = host.coracle_outcome(&["completion", shell]);
        assert!(outcome.code == 0 && outcome.stdout.contains("support-bundle"), "{shell}");
        // For fish clap's generator completes no positions.
        assert!(
            shell == "fish" || outcome.stdout.contains("machine.memory_mib"),
            "{shell} completes names of settings"
        );
    }
    let pages = host.folder.join("man");
    assert_eq!(host.coracle_outcome(&["man", pages.to_str().unwrap()]).code, 0);
    assert!(files(&pages).iter().any(|page| page.ends_with("coracle-run.1")), "{:?}", files(&pages));
    volumes(host);
}

/// A description comes and goes.
fn volumes(host: Host) {
    let direct = host.folder.join("direct");
    let host = host.set("storage.direct_volumes", &format!("{:?}", direct.display().to_string()));
    let describe = |text: &str| host.coracle_outcome(&["volume", "add", "/var/lib/pods/v/", text]);
    assert_eq!(describe(r#"{"volume-type":"block","device":"/dev/x","fstype":"ext4"}"#).code, 0);
    assert!(files(&direct).len() == 1 && files(&direct)[0].ends_with("/mountInfo.json"), "{:?}", files(&direct));
    for (text, word) in [
        ("{", "no JSON"),
        (r#"{"volume-type":"fs"}"#, "volume-type"),
        (r#"{"volume-type":"block","device":"x"}"#, "absolute"),
    ] {
        let refused = describe(text);
        assert!(refused.code != 0 && refused.stderr.contains(word), "{refused:?}");
    }
    assert_eq!(host.coracle_outcome(&["volume", "remove", "/var/lib/pods/v"]).code, 0);
    assert_eq!(files(&direct), Vec::<String>::new());
    assert!(host.coracle_outcome(&["volume", "remove", "/var/lib/pods/v"]).code != 0);
    host.audit();
}

#[test]
fn what_is_installed_goes_away_without_a_trace() {
    let host = Host::new();
    let root = host.folder.join("system");
    let destdir = root.to_str().unwrap();
    let install = || {
        let outcome = host.coracle_outcome(&["install", "--destdir", destdir, "--containerd"]);
        assert_eq!(outcome.code, 0, "{outcome:?}");
    };
    install();
    let first = files(&root);
    for name in [
        "usr/local/bin/coracle",
        "usr/local/bin/containerd-shim-coracle-v2",
        "usr/local/lib/coracle/coracle-agent",
        "etc/coracle/config.toml",
        "etc/containerd/conf.d/coracle.toml",
        "usr/local/share/man/man1/coracle.1",
    ] {
        assert!(first.contains(&root.join(name).display().to_string()), "{name}: {first:?}");
    }
    // The settings that it writes are ones that it reads.
    let settings = root.join("etc/coracle/config.toml");
    assert_eq!(host.coracle_outcome(&["settings", "check", settings.to_str().unwrap()]).code, 0);
    install();
    assert_eq!(files(&root), first, "a second time changes nothing");
    let uninstall = |more: &[&str]| host.coracle_outcome(&[&["uninstall", "--destdir", destdir], more].concat());
    assert_eq!(uninstall(&[]).code, 0);
    assert_eq!(files(&root), Vec::<String>::new());
    let none = uninstall(&[]);
    assert!(none.code != 0 && none.stderr.contains("has installed nothing here"), "{none:?}");
    // What the administrator has changed stays, until that is to go as well.
    install();
    std::fs::write(&settings, "[machine]\nvcpus = 2\n").unwrap();
    install();
    assert!(uninstall(&[]).stdout.contains("kept "), "changed settings stay");
    assert_eq!(files(&root), [settings.display().to_string()]);
    host.audit();
}
