//! Images in every form, and images that try something.
//!
//! Lane: open: some roots are folders of the host's.

use std::process::{Command, Stdio};

use coracle_e2e::{Host, LayerEntry, Outcome, copy_layout, docker_archive, layout_archive, layout_with_layer, path};
use tar::EntryType;

fn run_image(host: &Host, image: &str) -> Outcome {
    host.coracle_outcome(&["run", "--rm", image, "echo", "from the image"])
}

#[test]
fn an_oci_archive_runs() {
    let host = Host::new();
    let archive = host.folder.join("image.tar");
    layout_archive(&path("CORACLE_TEST_IMAGE"), &archive);
    let outcome = run_image(&host, &format!("oci-archive:{}", archive.display()));
    assert_eq!(outcome.line(), "from the image", "{outcome:?}");
    host.audit();
}

#[test]
fn a_docker_archive_runs() {
    let host = Host::new();
    let archive = host.folder.join("image.tar");
    docker_archive(&path("CORACLE_TEST_IMAGE"), &archive);
    let outcome = run_image(&host, &format!("docker-archive:{}", archive.display()));
    assert_eq!(outcome.line(), "from the image", "{outcome:?}");
    host.audit();
}

/// A registry on loopback that holds one image, stopped when it is dropped.
struct Registry {
    child: std::process::Child,
    address: String,
}

impl Registry {
    fn start(host: &Host) -> Self {
        Self::start_with(host, "")
    }

    /// The same, with more lines of configuration.
    fn start_with(host: &Host, more: &str) -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let config = format!(
            "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: 127.0.0.1:{port}\n{more}",
            host.folder.join("registry").display()
        );
        let file = host.folder.join("registry.yml");
        std::fs::write(&file, config).unwrap();
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&file).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().expect("docker-registry");
        let registry = Self { child, address: format!("127.0.0.1:{port}") };
        // It says nothing when it listens.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while std::net::TcpStream::connect(&registry.address).is_err() {
            assert!(std::time::Instant::now() < deadline, "docker-registry does not listen");
            std::thread::yield_now();
        }
        registry
    }

    /// One request; the answer's head.
    fn request(&self, method: &str, target: &str, kind: &str, body: &[u8]) -> String {
        use std::io::{Read, Write};
        let mut stream = std::net::TcpStream::connect(&self.address).unwrap();
        let head = format!(
            "{method} {target} HTTP/1.1\r\nHost: {}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            self.address,
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// Pushes a layout's only image as `test:latest`.
    fn push(&self, layout: &std::path::Path) {
        let index: serde_json::Value =
            serde_json::from_slice(&std::fs::read(layout.join("index.json")).unwrap()).unwrap();
        let manifest = index["manifests"][0]["digest"].as_str().unwrap().to_owned();
        for entry in std::fs::read_dir(layout.join("blobs/sha256")).unwrap().flatten() {
            let digest = format!("sha256:{}", entry.file_name().to_string_lossy());
            if digest == manifest {
                continue;
            }
            let started = self.request("POST", "/v2/test/blobs/uploads/", "application/octet-stream", b"");
            let location = started.lines().find_map(|line| line.strip_prefix("Location: ")).expect("a location").trim();
            let target = location.strip_prefix(&format!("http://{}", self.address)).unwrap_or(location);
            let put = format!("{target}&digest={digest}");
            let answer = self.request("PUT", &put, "application/octet-stream", &std::fs::read(entry.path()).unwrap());
            assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");
        }
        let bytes = std::fs::read(layout.join("blobs/sha256").join(&manifest[7..])).unwrap();
        let answer =
            self.request("PUT", "/v2/test/manifests/latest", "application/vnd.oci.image.manifest.v1+json", &bytes);
        assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn an_image_from_a_registry_runs_and_a_missing_one_is_named() {
    let host = Host::new();
    let registry = Registry::start(&host);
    registry.push(&path("CORACLE_TEST_IMAGE"));
    let name = format!("{}/test:latest", registry.address);
    let outcome = host.coracle_outcome(&["run", "--rm", "--plain-http", &name, "echo", "pulled"]);
    assert_eq!(outcome.line(), "pulled", "{outcome:?}");
    let missing =
        host.coracle_outcome(&["run", "--rm", "--plain-http", &format!("{}/none:x", registry.address), "true"]);
    assert!(missing.code == 125 && missing.stderr.contains("registry"), "{missing:?}");
    drop(registry);
    host.audit();
}

#[test]
fn a_registry_that_asks_for_credentials_gets_dockers() {
    let host = Host::new();
    let open = Registry::start(&host);
    open.push(&path("CORACLE_TEST_IMAGE"));
    drop(open);
    // The same images, behind the user `tester` with the password `secret`.
    let passwords = host.folder.join("htpasswd");
    std::fs::write(&passwords, "tester:$2b$04$93wEuW/4A1iIszEWLbukd.Sb6wzF/M7P.P0jmZbQhCYKnCTz.zbce\n").unwrap();
    let auth = format!("auth:\n  htpasswd:\n    realm: test\n    path: {}\n", passwords.display());
    let registry = Registry::start_with(&host, &auth);
    let name = format!("{}/test:latest", registry.address);
    let run = || {
        let mut command = host.coracle(&["run", "--rm", "--plain-http", &name, "echo", "pulled"]);
        command.env("DOCKER_CONFIG", &host.folder);
        Outcome::of(command, b"")
    };
    let refused = run();
    assert!(refused.code == 125 && refused.stderr.contains("registry"), "{refused:?}");
    let config = serde_json::json!({ "auths": { registry.address.as_str(): { "auth": "dGVzdGVyOnNlY3JldA==" } } });
    std::fs::write(host.folder.join("config.json"), config.to_string()).unwrap();
    let allowed = run();
    assert_eq!((allowed.code, allowed.line()), (0, "pulled"), "{allowed:?}");
    drop(registry);
    host.audit();
}

/// An image with this layer is refused, leaves nothing outside the store, and the store goes on working.
fn refused(entries: &[LayerEntry<'_>], word: &str) {
    let host = Host::new();
    let layout = host.folder.join("bad");
    layout_with_layer(&layout, entries);
    let outcome = host.coracle_outcome(&["run", "--rm", &format!("oci:{}", layout.display())]);
    assert!(outcome.code == 125 && outcome.stderr.contains("refused") && outcome.stderr.contains(word), "{outcome:?}");
    let store = host.root().join("images");
    let left: Vec<_> = std::fs::read_dir(&store).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert!(left.iter().all(|name| name == "lock"), "{left:?}");
    assert!(!host.root().join("evil").exists() && !host.folder.join("evil").exists());
    assert_eq!(run_image(&host, &host.image()).code, 0, "the store is usable");
    host.audit();
}

#[test]
fn a_path_that_escapes_is_refused() {
    refused(&[("../../evil", EntryType::Regular, "x")], "leaves the image's root");
}

#[test]
fn a_hard_link_that_escapes_is_refused() {
    refused(&[("link", EntryType::Link, "../../../../../../../etc/passwd")], "leaves the image's root");
}

#[test]
fn a_link_that_is_written_through_stays_inside() {
    let host = Host::new();
    let layout = host.folder.join("sly");
    let target = host.folder.display().to_string();
    layout_with_layer(&layout, &[("out", EntryType::Symlink, &target), ("out/evil", EntryType::Regular, "x")]);
    // The image has no program to run; what counts is what unpacking it has written.
    let outcome = host.coracle_outcome(&["run", "--rm", &format!("oci:{}", layout.display())]);
    assert_ne!(outcome.code, 0, "{outcome:?}");
    assert!(!host.folder.join("evil").exists());
    host.audit();
}

/// Spoils one blob of the test image and gives what running it says.
fn spoiled(host: &Host, spoil: impl Fn(&mut Vec<u8>)) -> Outcome {
    let layout = host.folder.join("spoiled");
    copy_layout(&path("CORACLE_TEST_IMAGE"), &layout);
    let largest = std::fs::read_dir(layout.join("blobs/sha256"))
        .unwrap()
        .flatten()
        .max_by_key(|entry| entry.metadata().unwrap().len())
        .unwrap()
        .path();
    let mut bytes = std::fs::read(&largest).unwrap();
    spoil(&mut bytes);
    std::fs::write(&largest, bytes).unwrap();
    run_image(host, &format!("oci:{}", layout.display()))
}

#[test]
fn a_layer_with_another_digest_is_refused() {
    let host = Host::new();
    let outcome = spoiled(&host, |bytes| bytes[1000] ^= 1);
    assert!(outcome.code == 125 && outcome.stderr.contains("has the digest"), "{outcome:?}");
    assert_eq!(run_image(&host, &host.image()).code, 0, "the store is usable");
    host.audit();
}

#[test]
fn a_truncated_layer_is_refused() {
    let host = Host::new();
    let outcome = spoiled(&host, |bytes| bytes.truncate(bytes.len() / 2));
    assert!(outcome.code == 125 && outcome.stderr.contains("refused"), "{outcome:?}");
    host.audit();
}

#[test]
fn another_platform_is_refused_by_name() {
    let host = Host::new();
    let image = host.image();
    let outcome = host.coracle_outcome(&["run", "--rm", "--platform", "linux/arm64", &image, "true"]);
    assert!(outcome.code == 125 && outcome.stderr.contains("linux/arm64"), "{outcome:?}");
    host.audit();
}

#[test]
fn a_name_that_names_nothing_is_said() {
    let host = Host::new();
    for name in ["oci:", "oci:/nowhere", "docker-archive:/nowhere"] {
        let outcome = host.coracle_outcome(&["run", "--rm", name, "true"]);
        assert_eq!(outcome.code, 125, "{outcome:?}");
    }
    host.audit();
}
