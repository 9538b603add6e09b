//! The debug console: a shell in a guest, where settings and image have one.
//!
//! Lane: open: a guest whose image is another one than that under test.

use std::path::Path;

use coracle_e2e::{Host, path};

/// The guest image under test, with busybox behind it: a kernel unpacks one archive after the other.
fn with_shell(folder: &Path) {
    std::fs::create_dir(folder).unwrap();
    for name in ["vmlinux", "initrd.img", "manifest.json"] {
        std::fs::copy(path("CORACLE_TEST_GUEST").join(name), folder.join(name)).unwrap();
    }
    let busybox = std::fs::read("/bin/busybox").unwrap();
    let mut initrd = std::fs::read(folder.join("initrd.img")).unwrap();
    let pad = |bytes: &mut Vec<u8>| bytes.resize(bytes.len().next_multiple_of(4), 0);
    pad(&mut initrd);
    let entries: [(&str, u32, &[u8]); 3] =
        [("bin", 0o040_755, &[]), ("bin/busybox", 0o100_755, &busybox), ("TRAILER!!!", 0, &[])];
    for (number, (name, mode, content)) in entries.into_iter().enumerate() {
        // newc (Linux: driver-api/early-userspace/buffer-format.rst): magic, then 13 fields of eight digits.
        let fields = [900 + number, mode as usize, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0];
        initrd.extend(b"070701");
        fields.iter().for_each(|field| initrd.extend(format!("{field:08x}").as_bytes()));
        initrd.extend(name.as_bytes());
        initrd.push(0);
        pad(&mut initrd);
        initrd.extend(content);
        pad(&mut initrd);
    }
    std::fs::write(folder.join("initrd.img"), initrd).unwrap();
}

#[test]
fn a_guest_has_a_shell_where_that_is_enabled() {
    let host = Host::new();
    let guest = host.folder.join("guest");
    with_shell(&guest);
    let host = host.set("guest.folder", &format!("{:?}", guest.display().to_string())).set("debug.console", "true");
    host.detached("shell", "exec sleep 100000");
    let id = host.coracle_outcome(&["ps", "--quiet"]).line().to_owned();
    let debug = |command: &[&str]| host.coracle_outcome(&[&["debug", &id, "--"], command].concat());
    let seen = debug(&["sh", "-c", "cat /proc/1/comm; echo err >&2; pidof sleep >/dev/null && echo sees it; exit 7"]);
    assert_eq!((seen.code, seen.stdout.as_str()), (7, "init\nerr\nsees it\n"), "{seen:?}");
    let words = debug(&["printf", "%s|", "a b", "it's", "$HOME"]);
    assert_eq!((words.code, words.stdout.as_str()), (0, "a b|it's|$HOME|"), "{words:?}");
    assert_eq!(debug(&["nothing-of-this-name"]).code, 127);
    let much = debug(&["sh", "-c", "seq 1 20000 | md5sum; seq 1 20000"]);
    assert_eq!((much.code, much.stdout.lines().count()), (0, 20_001));
    assert_eq!(host.coracle_outcome(&["rm", "--force", "shell"]).code, 0);
    host.audit();
}

#[test]
fn a_guest_has_none_where_it_is_off_and_says_what_is_missing() {
    let host = Host::new();
    host.detached("off", "exec sleep 100000");
    let id = host.coracle_outcome(&["ps", "--quiet"]).line().to_owned();
    let refused = host.coracle_outcome(&["debug", &id, "--", "id"]);
    assert!(refused.code != 0 && refused.stderr.contains("has no debug console: set `console = true`"), "{refused:?}");
    assert_eq!(host.coracle_outcome(&["rm", "--force", "off"]).code, 0);
    // Enabled, and an image without a shell.
    let host = host.set("debug.console", "true");
    host.detached("bare", "exec sleep 100000");
    let id = host.coracle_outcome(&["ps", "--quiet"]).line().to_owned();
    let bare = host.coracle_outcome(&["debug", &id, "--", "id"]);
    assert!(bare.code != 0 && bare.stderr.contains("coracle image build --shell"), "{bare:?}");
    assert_eq!(host.coracle_outcome(&["rm", "--force", "bare"]).code, 0);
    host.audit();
}
