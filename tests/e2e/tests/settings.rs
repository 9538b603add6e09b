//! Settings of a pod's own, by its annotations, and Kata's in the place of ours.
//!
//! Lane: open: the shim is spoken to without an image.

use std::path::Path;

use containerd_shim_protos::ttrpc::Code;
use coracle_e2e::bundles::{busybox_folder, end, ext4, script_config};
use coracle_e2e::{Host, Shim, path};

/// How a container ended that exits with the guest's memory in units of 16 MiB; or what its create was answered.
fn memory(host: &Host, id: &str, annotations: serde_json::Value) -> Result<u32, (Code, String)> {
    let base = host.folder.join("base");
    busybox_folder(&base);
    let whole = ext4(&host.folder.join("whole.ext4"), Some(&base));
    let script = "exit $(( $(busybox grep MemTotal /proc/meminfo | busybox tr -dc 0-9) / 16384 ))";
    let mut config = script_config(script);
    config["annotations"] = annotations;
    created(Shim::start(host, id, config.to_string().as_bytes()), id, &whole)
}

/// How a container ended whose root is a disk; or what its create was answered.
fn created(shim: Shim, id: &str, whole: &str) -> Result<u32, (Code, String)> {
    match shim.create_with_root(id, &[("ext4", whole, &[])]) {
        Ok(()) => Ok(end(shim)),
        Err(refused) => {
            shim.finish();
            Err(refused)
        }
    }
}

#[test]
fn a_pod_sets_what_the_administrator_lets_it_and_nothing_else() {
    let host = Host::with_own_network();
    let host = host.set("annotations.allow", "[\"machine.memory_mib\"]");
    let plain = memory(&host, "plain", serde_json::json!({})).unwrap();
    let ours = serde_json::json!({ "io.coracle.config.machine.memory_mib": "512" });
    assert!(memory(&host, "ours", ours).unwrap() >= plain + 14, "{plain} before");
    let katas = serde_json::json!({ "io.katacontainers.config.hypervisor.default_memory": "512" });
    assert!(memory(&host, "katas", katas).unwrap() >= plain + 14);
    for (id, name, text, code, word) in [
        ("vcpus", "io.coracle.config.machine.vcpus", "2", Code::INVALID_ARGUMENT, "annotations.allow"),
        ("path", "io.coracle.config.qemu.path", "/bin/sh", Code::INVALID_ARGUMENT, "a pod can't set"),
        ("much", "io.coracle.config.machine.memory_mib", "much", Code::INVALID_ARGUMENT, "above 0"),
        ("kernel", "io.katacontainers.config.hypervisor.kernel", "/k", Code::INVALID_ARGUMENT, "coracle image build"),
        ("policy", "io.katacontainers.config.agent.policy", "cGFj", Code::UNIMPLEMENTED, "would run without"),
        ("init", "io.katacontainers.config.hypervisor.cc_init_data", "H4s", Code::UNIMPLEMENTED, "would run without"),
    ] {
        let refused = memory(&host, id, serde_json::json!({ name: text })).unwrap_err();
        assert!(refused.0 == code && refused.1.contains(word), "{name}: {refused:?}");
    }
    host.audit();
}

#[test]
fn settings_that_contradict_themselves_or_are_wrong_start_nothing() {
    for (key, value, word) in [
        ("machine.memory_mib", "512\nmachine.max_memory_mib = 256", "machine.max_memory_mib"),
        ("machine.memory_mb", "1", "did you mean machine.memory_mib?"),
    ] {
        let host = Host::with_own_network().set(key, value);
        let config = script_config("exit 0").to_string();
        let (_, outcome) = Shim::start_in(&host, "wrong", config.as_bytes());
        assert!(outcome.code != 0 && outcome.stderr.contains(word), "{outcome:?}");
        let checked = host.coracle_outcome(&["settings", "check"]);
        assert!(checked.code != 0 && checked.stderr.contains(word), "{checked:?}");
        host.audit();
    }
}

#[test]
fn settings_show_says_what_counts_and_where_it_stands() {
    let host = Host::new().set("machine.vcpus", "2");
    let shown = host.coracle_outcome(&["settings", "show", "machine.vcpus"]);
    assert!(shown.stdout.starts_with("machine.vcpus = 2") && shown.stdout.contains("settings.toml:"), "{shown:?}");
    let shown = host.coracle_outcome(&["settings", "show", "--json"]);
    let all: serde_json::Value = serde_json::from_str(&shown.stdout).unwrap();
    assert_eq!(all["machine.vcpus"]["value"], "2");
    assert!(all["machine.vcpus"]["origin"]["line"].is_number() && all["machine.memory_mib"]["origin"].is_null());
    host.audit();
}

#[test]
fn katas_configuration_moves_over_or_says_why_not() {
    let host = Host::new();
    let file = |name: &str, text: &str| {
        let path = host.folder.join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let plain = file("plain.toml", "[hypervisor.qemu]\ndefault_memory = 512\nenable_debug = true\n");
    let protected = file("protected.toml", "[hypervisor.qemu]\nconfidential_guest = true\n");
    let output = host.folder.join("coracle.toml").display().to_string();
    let moved = host.coracle_outcome(&["migrate", "kata", &plain, "--output", &output]);
    assert_eq!(moved.code, 0, "{moved:?}");
    assert!(moved.stderr.contains("plain.toml:2:1: hypervisor.qemu.default_memory: renamed"), "{moved:?}");
    assert!(moved.stderr.contains("enable_debug: dropped"), "{moved:?}");
    let checked = host.coracle_outcome(&["settings", "check", &output]);
    assert_eq!(checked.code, 0, "{checked:?}");
    std::fs::remove_file(&output).unwrap();
    let refused = host.coracle_outcome(&["migrate", "kata", &plain, &protected, "--output", &output]);
    assert!(refused.code != 0 && refused.stderr.contains("a confidential guest is not supported"), "{refused:?}");
    assert!(!Path::new(&output).exists());
    host.audit();
}

#[test]
fn a_link_by_katas_name_reads_katas_configuration() {
    let host = Host::with_own_network();
    let program = host.folder.join("containerd-shim-kata-v2");
    std::os::unix::fs::symlink(path("CORACLE_TEST_SHIM"), &program).unwrap();
    let base = host.folder.join("base");
    busybox_folder(&base);
    let whole = ext4(&host.folder.join("whole.ext4"), Some(&base));
    let script = "exit $(( $(busybox grep MemTotal /proc/meminfo | busybox tr -dc 0-9) / 16384 ))";
    let end = |id: &str, text: &str| {
        let file = host.folder.join(format!("{id}.toml"));
        std::fs::write(&file, text).unwrap();
        let environment = [("KATA_CONF_FILE", file.to_str().unwrap())];
        let shim = Shim::start_as(&host, &program, &environment, id, script_config(script).to_string().as_bytes());
        created(shim, id, &whole)
    };
    let few = end("few", "[runtime]\nsandbox_cgroup_only = true\n").unwrap();
    let many = end("many", "[hypervisor.other]\ndefault_memory = 512\n[runtime]\nsandbox_cgroup_only = true\n");
    assert!(matches!(&many, Ok(many) if *many >= few + 14), "{many:?} after {few}");
    let refused = end("protected", "[hypervisor.qemu]\nconfidential_guest = true\n").unwrap_err();
    assert!(refused.0 == Code::UNIMPLEMENTED && refused.1.contains("confidential_guest"), "{refused:?}");
    host.audit();
}
