//! A pod as containerd's CRI describes it to the Sandbox API, where no bundle does: from `runtime.v1.PodSandboxConfig` to the
//! specification that a bundle would have, and the files that containerd makes otherwise.

use std::path::{Path, PathBuf};

use coracle_protocol::oci;
use coracle_protocol::protobuf::Message;
use coracle_protocol::protobuf::well_known_types::any::Any;
use coracle_sandbox::Error;
use nix::mount::{MsFlags, mount};
use serde_json::{Value, json};

use self::generated::pod_sandbox_config::{DNSConfig, PodSandboxConfig};

mod generated {
    #![expect(warnings, reason = "generated code")]
    include!(concat!(env!("OUT_DIR"), "/cri/mod.rs"));
}

/// The options' type.
const TYPE: &str = "runtime.v1.PodSandboxConfig";

/// A pod's description.
#[derive(Debug, Default)]
pub(crate) struct PodConfig(PodSandboxConfig);

/// Files of the pod that its containers see, where they bring none: name in the pod's folder, place in the container.
const FILES: [(&str, &str); 2] = [("resolv.conf", "/etc/resolv.conf"), ("hostname", "/etc/hostname")];

impl PodConfig {
    /// Reads the options of a CreateSandbox; without any the pod has nothing special.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for options of another type, [`Error::Invalid`] for what does not parse.
    pub(crate) fn read(options: Option<&Any>) -> Result<Self, Error> {
        let Some(options) = options.filter(|options| !options.value.is_empty()) else { return Ok(Self::default()) };
        if !options.type_url.ends_with(TYPE) {
            return Err(Error::Unsupported(format!("a pod described by {}: {TYPE} is known", options.type_url)));
        }
        let config = PodSandboxConfig::parse_from_bytes(&options.value);
        config.map(Self).map_err(|error| Error::Invalid(format!("the pod's description: {error}")))
    }

    /// The specification that a bundle of the pod would have, as JSON. `netns` is its network namespace.
    pub(crate) fn spec(&self, namespace: &str, id: &str, netns: &str) -> Value {
        let linux = self.0.linux.clone().unwrap_or_default();
        let mut annotations: serde_json::Map<String, Value> =
            self.0.annotations.iter().map(|(key, value)| (key.clone(), value.clone().into())).collect();
        let of = |key: &str| format!("io.kubernetes.cri.{key}");
        annotations.insert(of("container-type"), "sandbox".into());
        annotations.insert(of("sandbox-id"), id.into());
        if let Some(metadata) = self.0.metadata.as_ref() {
            annotations.insert(of("sandbox-name"), metadata.name.clone().into());
            annotations.insert(of("sandbox-namespace"), metadata.namespace.clone().into());
            annotations.insert(of("sandbox-uid"), metadata.uid.clone().into());
        }
        // What the containers may use; the machine's own overhead is not theirs.
        let resources = linux.resources.unwrap_or_default();
        let (period, quota) = (resources.cpu_period.max(0), resources.cpu_quota.max(0));
        let memory = resources.memory_limit_in_bytes.max(0);
        for (key, value) in [("cpu-period", period), ("cpu-quota", quota), ("memory", memory)] {
            annotations.insert(of(&format!("sandbox-{key}")), value.to_string().into());
        }
        json!({
            "ociVersion": "1.1.0",
            "hostname": self.0.hostname,
            // Nothing runs it: the machine is what holds the pod.
            "process": { "args": ["pause"], "cwd": "/", "user": {} },
            "annotations": annotations,
            "linux": {
                "cgroupsPath": cgroups_path(&linux.cgroup_parent, namespace, id),
                "namespaces": [{ "type": "network", "path": netns }],
                "sysctl": linux.sysctls,
            },
        })
    }

    /// Writes the pod's files to `folder`, a small file system of its own: containers may write to them, and so could fill the host's.
    ///
    /// # Errors
    /// [`Error::Failed`].
    pub(crate) fn write_files(&self, folder: &Path) -> Result<(), Error> {
        let failed =
            |error: std::io::Error| Error::Failed(format!("write the pod's files to {}: {error}", folder.display()));
        std::fs::create_dir_all(folder).map_err(failed)?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("files"), folder, Some("tmpfs"), flags, Some("size=256k,nr_inodes=64,mode=755"))
            .map_err(|errno| failed(errno.into()))?;
        let dns = self.0.dns_config.as_ref().map(resolv_conf).filter(|text| !text.is_empty());
        let dns = dns.unwrap_or_else(|| std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default());
        let hostname = if self.0.hostname.is_empty() { String::new() } else { format!("{}\n", self.0.hostname) };
        for ((name, _), text) in FILES.iter().zip([dns, hostname]).filter(|(_, text)| !text.is_empty()) {
            std::fs::write(folder.join(name), text).map_err(failed)?;
        }
        Ok(())
    }
}

/// Gives a container's specification what containerd gives it where it makes the pod's files itself: those of `folder`, and shared
/// memory that is the pod's.
pub(crate) fn complete(spec: &mut oci::Spec, folder: &Path) {
    let readonly = spec.Root.as_ref().is_some_and(|root| root.Readonly);
    let bind = |source: PathBuf, destination: &str, options: &[&str]| oci::Mount {
        destination: destination.to_owned(),
        source: source.display().to_string(),
        type_: "bind".into(),
        options: options.iter().map(|&option| option.to_owned()).collect(),
        ..Default::default()
    };
    for (name, place) in FILES {
        let source = folder.join(name);
        if source.exists() && !spec.Mounts.iter().any(|mount| mount.destination == place) {
            spec.Mounts.push(bind(source, place, &["rbind", "rprivate", if readonly { "ro" } else { "rw" }]));
        }
    }
    if let Some(own) = spec.Mounts.iter_mut().find(|mount| mount.destination == "/dev/shm" && mount.type_ == "tmpfs") {
        *own = bind("/dev/shm".into(), "/dev/shm", &["rbind"]);
    }
}

/// The text of resolv.conf(5), as containerd writes it.
fn resolv_conf(dns: &DNSConfig) -> String {
    let line = |key: &str, words: &[String]| {
        if words.is_empty() { String::new() } else { format!("{key} {}\n", words.join(" ")) }
    };
    let servers: String = dns.servers.iter().map(|server| format!("nameserver {server}\n")).collect();
    line("search", &dns.searches) + &servers + &line("options", &dns.options)
}

/// As containerd names the control group of a pod's first container.
fn cgroups_path(parent: &str, namespace: &str, id: &str) -> String {
    if parent.is_empty() {
        format!("/{namespace}/{id}")
    } else if parent.ends_with(".slice") {
        let slice = parent.rsplit('/').next().unwrap_or(parent);
        format!("{slice}:cri-containerd:{id}")
    } else {
        format!("{}/{id}", parent.trim_end_matches('/'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A description as containerd sends it.
    fn config() -> PodConfig {
        let mut config = PodSandboxConfig::new();
        config.hostname = "h".into();
        config.metadata.mut_or_insert_default().name = "web".into();
        config.annotations.insert("a".into(), "b".into());
        let linux = config.linux.mut_or_insert_default();
        linux.cgroup_parent = "/kubepods/pod1".into();
        linux.sysctls.insert("kernel.shm_rmid_forced".into(), "1".into());
        let resources = linux.resources.mut_or_insert_default();
        (resources.cpu_period, resources.cpu_quota, resources.memory_limit_in_bytes) = (100_000, 250_000, 128 << 20);
        let dns = config.dns_config.mut_or_insert_default();
        (dns.servers, dns.searches, dns.options) =
            (vec!["10.0.0.1".into()], vec!["x".into(), "y".into()], vec!["ndots:5".into()]);
        let any = Any { type_url: TYPE.into(), value: config.write_to_bytes().unwrap(), ..Default::default() };
        PodConfig::read(Some(&any)).unwrap()
    }

    struct Unmounted<'a>(&'a Path);

    impl Drop for Unmounted<'_> {
        fn drop(&mut self) {
            let _ = nix::mount::umount(self.0);
        }
    }

    #[test]
    fn a_description_is_what_a_bundle_would_say() {
        let spec = config().spec("k8s.io", "p", "/run/netns/x");
        let spec: oci::Spec = coracle_protocol::from_json(&spec.to_string()).unwrap();
        assert_eq!(crate::bundle::membership(&spec), crate::bundle::Membership::Pod);
        assert_eq!(spec.Annotations["io.kubernetes.cri.sandbox-cpu-quota"], "250000");
        assert_eq!(spec.Annotations["io.kubernetes.cri.sandbox-memory"], "134217728");
        assert_eq!((spec.Hostname.as_str(), spec.Annotations["a"].as_str()), ("h", "b"));
        assert_eq!(spec.Linux.Namespaces[0].Path, "/run/netns/x");
        assert_eq!((crate::bundle::cgroup(&spec), spec.Linux.Sysctl.len()), ("/kubepods/pod1/p", 1));
    }

    #[test]
    fn control_groups_are_named_as_containerd_names_them() {
        assert_eq!(cgroups_path("", "k8s.io", "p"), "/k8s.io/p");
        assert_eq!(cgroups_path("/a/", "k8s.io", "p"), "/a/p");
        assert_eq!(
            cgroups_path("/kubepods.slice/kubepods-pod1.slice", "k8s.io", "p"),
            "kubepods-pod1.slice:cri-containerd:p"
        );
    }

    #[test]
    fn containers_get_the_pods_files_and_memory() {
        let folder = tempfile::tempdir().unwrap();
        if config().write_files(folder.path()).is_err() {
            println!("left out: a file system of its own needs root");
            return;
        }
        let _unmounted = Unmounted(folder.path());
        let text = std::fs::read_to_string(folder.path().join("resolv.conf")).unwrap();
        assert_eq!(text, "search x y\nnameserver 10.0.0.1\noptions ndots:5\n");
        let json = r#"{"root":{"path":"r","readonly":true},"mounts":[{"destination":"/dev/shm","type":"tmpfs","source":"shm"},
            {"destination":"/etc/hostname","type":"bind","source":"/own"}]}"#;
        let mut spec: oci::Spec = coracle_protocol::from_json(json).unwrap();
        complete(&mut spec, folder.path());
        assert_eq!((spec.Mounts[0].type_.as_str(), spec.Mounts[0].source.as_str()), ("bind", "/dev/shm"));
        assert_eq!(spec.Mounts[1].source, "/own", "what a container brings along is kept");
        assert_eq!(spec.Mounts.len(), 3);
        assert!(spec.Mounts[2].destination == "/etc/resolv.conf" && spec.Mounts[2].options.contains(&"ro".into()));
    }

    #[test]
    fn other_options_are_refused() {
        assert!(PodConfig::read(None).is_ok());
        let other = Any { type_url: "x.Y".into(), value: vec![1], ..Default::default() };
        assert!(matches!(PodConfig::read(Some(&other)), Err(Error::Unsupported(text)) if text.contains("x.Y")));
        let broken = Any { type_url: TYPE.into(), value: vec![0xff], ..Default::default() };
        assert!(matches!(PodConfig::read(Some(&broken)), Err(Error::Invalid(_))));
    }
}
