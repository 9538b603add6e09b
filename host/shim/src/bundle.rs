//! A bundle: the folder with a container's `config.json` (runtime-spec, bundle.md).

use std::io::Read;
use std::path::Path;

use coracle_protocol::oci;
use coracle_sandbox::Error;

/// A bundle's specification.
const CONFIG: &str = "config.json";

/// The largest `config.json` that is read, in bytes.
const CONFIG_BYTES_MAX: u64 = 32 << 20;

/// Whose pod a container belongs to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Membership {
    /// Its own: it is alone.
    Own,
    /// Its own: it stands for the pod, whose containers come later.
    Pod,
    /// That of another sandbox.
    Of(String),
}

/// Reads and checks a bundle's specification.
pub(crate) fn read(bundle: &Path) -> Result<oci::Spec, Error> {
    let path = bundle.join(CONFIG);
    let failed = |text: String| Error::Invalid(format!("{}: {text}", path.display()));
    let file = std::fs::File::open(&path).map_err(|error| failed(error.to_string()))?;
    let mut text = String::new();
    file.take(CONFIG_BYTES_MAX + 1).read_to_string(&mut text).map_err(|error| failed(error.to_string()))?;
    if text.len() as u64 > CONFIG_BYTES_MAX {
        return Err(failed(format!("it is larger than {CONFIG_BYTES_MAX} bytes")));
    }
    let spec: oci::Spec = coracle_protocol::from_json(&text).map_err(|error| failed(error.to_string()))?;
    if spec.Process.as_ref().is_none_or(|process| process.Args.is_empty()) {
        return Err(failed("it has no process.args".into()));
    }
    Ok(spec)
}

/// Writes a specification to a bundle that has none.
pub(crate) fn write(bundle: &Path, text: &str) -> Result<(), Error> {
    let path = bundle.join(CONFIG);
    std::fs::write(&path, text).map_err(|error| Error::Failed(format!("write {}: {error}", path.display())))
}

/// Whether a bundle has a specification. One of the Sandbox API's has none until the pod is described.
pub(crate) fn has_config(bundle: &Path) -> bool {
    bundle.join(CONFIG).exists()
}

/// The path of the container's control group on the host; empty where it names none.
pub(crate) fn cgroup(spec: &oci::Spec) -> &str {
    spec.Linux.as_ref().map(|linux| linux.CgroupsPath.as_str()).unwrap_or_default()
}

/// The pod that the annotations of containerd's CRI, or of CRI-O, name.
pub(crate) fn membership(spec: &oci::Spec) -> Membership {
    let annotation = |key: &str| spec.Annotations.get(key).map(String::as_str);
    let kind =
        annotation("io.kubernetes.cri.container-type").or_else(|| annotation("io.kubernetes.cri-o.ContainerType"));
    let sandbox = annotation("io.kubernetes.cri.sandbox-id").or_else(|| annotation("io.kubernetes.cri-o.SandboxID"));
    match (kind, sandbox) {
        (Some("container"), Some(sandbox)) => Membership::Of(sandbox.to_owned()),
        (Some("sandbox"), Some(_)) => Membership::Pod,
        _ => Membership::Own,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(text: &str) -> (tempfile::TempDir, Result<oci::Spec, Error>) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), text).unwrap();
        let spec = read(folder.path());
        (folder, spec)
    }

    #[test]
    fn a_broken_configuration_is_a_clear_error() {
        for text in ["", "{", "[]", "{\"process\":{}}", "{\"process\":{\"args\":\"sh\"}}", "\u{0}"] {
            let (_folder, spec) = bundle(text);
            assert!(matches!(&spec, Err(Error::Invalid(text)) if text.contains("config.json")), "{text}: {spec:?}");
        }
        assert!(matches!(read(Path::new("/nowhere")), Err(Error::Invalid(_))));
    }

    #[test]
    fn unknown_fields_and_five_megabytes_are_accepted() {
        let padding = "x".repeat(5 << 20);
        let text = format!(
            "{{\"future\":{{\"a\":[]}},\"process\":{{\"args\":[\"a\"]}},\"annotations\":{{\"p\":\"{padding}\"}}}}"
        );
        let (_folder, spec) = bundle(&text);
        assert_eq!(spec.unwrap().Annotations["p"].len(), 5 << 20);
    }

    #[test]
    fn pods_of_both_runtimes_are_found() {
        let spec = |json: &str| coracle_protocol::from_json::<oci::Spec>(json).unwrap();
        let containerd =
            r#"{"annotations":{"io.kubernetes.cri.container-type":"container","io.kubernetes.cri.sandbox-id":"p"}}"#;
        assert_eq!(membership(&spec(containerd)), Membership::Of("p".into()));
        let crio =
            r#"{"annotations":{"io.kubernetes.cri-o.ContainerType":"container","io.kubernetes.cri-o.SandboxID":"q"}}"#;
        assert_eq!(membership(&spec(crio)), Membership::Of("q".into()));
        let sandbox =
            r#"{"annotations":{"io.kubernetes.cri.container-type":"sandbox","io.kubernetes.cri.sandbox-id":"p"}}"#;
        assert_eq!(membership(&spec(sandbox)), Membership::Pod);
        assert_eq!(membership(&spec("{}")), Membership::Own);
    }
}
