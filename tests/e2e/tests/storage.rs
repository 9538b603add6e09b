//! Roots of containers: disks and shared folders, what is in them, and what is written to them.
//!
//! Lane: open: disks come later, and some roots are folders of the host's.

use std::path::{Path, PathBuf};

use containerd_shim_protos::ttrpc::Code;
use coracle_e2e::bundles::{busybox_folder, end, ext4, let_go, open_files, pod, script_config, tool};
use coracle_e2e::{Host, LayerEntry, Outcome, RootMount, Shim, copy_layout_with_layers, monitor, path};
use tar::EntryType::{Directory, Link, Regular, Symlink};

/// The test image with more layers, as `coracle run` names it.
fn image(host: &Host, name: &str, layers: &[&[LayerEntry<'_>]]) -> String {
    let folder = host.folder.join(name);
    copy_layout_with_layers(&path("CORACLE_TEST_IMAGE"), &folder, layers);
    format!("oci:{}", folder.display())
}

fn run(host: &Host, image: &str, script: &str) -> Outcome {
    host.coracle_outcome(&["run", "--rm", image, "sh", "-c", script])
}

/// The disks of a host's images.
fn disks(host: &Host) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(host.root().join("images/disks/1")).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|end| end == "erofs")).collect()
}

/// What a tree has, in an order of its own: each path with what it is, and the contents of files.
const LIST: &str = "cd /data && for f in $(busybox find . | busybox sort); do \
    if [ -L $f ]; then echo $f '->' $(readlink $f); elif [ -d $f ]; then echo $f/ $(stat -c %a $f); \
    else echo $f $(stat -c '%a %h' $f) $(cat $f); fi; done";

/// Layers of which each changes something of those below it.
const LAYERS: [&[LayerEntry<'static>]; 3] = [
    &[
        ("data/", Directory, ""),
        ("data/kept", Regular, "first"),
        ("data/gone", Regular, "first"),
        ("data/changed", Regular, "first"),
        ("data/sub/", Directory, ""),
        ("data/sub/old", Regular, "first"),
        ("data/tree/", Directory, ""),
        ("data/tree/old", Regular, "first"),
        ("data/link", Symlink, "kept"),
        ("data/hard", Link, "data/kept"),
    ],
    &[
        ("data/", Directory, ""),
        ("data/.wh.gone", Regular, ""),
        ("data/changed", Regular, "second"),
        ("data/tree/", Directory, ""),
        ("data/tree/.wh..wh..opq", Regular, ""),
        ("data/tree/new", Regular, "second"),
    ],
    &[("data/", Directory, ""), ("data/.wh.sub", Regular, ""), ("data/last", Regular, "third")],
];

const LISTED: &str = "./ 755\n./changed 755 1 second\n./hard 755 2 first\n./kept 755 2 first\n./last 755 1 third\n\
    ./link -> kept\n./tree/ 755\n./tree/new 755 1 second\n";

#[test]
fn layers_show_what_they_say_whatever_the_root_is_made_of() {
    let host = Host::new();
    let image = image(&host, "layered", &LAYERS);
    let outcome = run(&host, &image, LIST);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (0, LISTED), "{outcome:?}");
    assert_eq!(disks(&host).len(), 4, "a disk for each layer");
    let host = host.set("run.rootfs", "\"virtiofs\"");
    let outcome = run(&host, &image, LIST);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (0, LISTED), "{outcome:?}");
    host.audit();
}

/// By how many KiB the guest's page cache grows as a file is read.
const CACHED: &str = "cached() { awk '/^Cached/ { print $2 }' /proc/meminfo; }; cd /data; a=$(cached); \
    busybox md5sum big >/dev/null; busybox md5sum big; echo $(($(cached) - a))";

#[test]
fn layers_are_memory_of_the_machine_where_it_can_have_that() {
    const MIB: usize = 24;
    let host = Host::new();
    let big = "some text of a file, over and over\n".repeat(MIB * 30_000);
    let image = image(&host, "mapped", &[&[("data/", Directory, ""), ("data/big", Regular, &big)]]);
    let read = |host: &Host| {
        let outcome = run(host, &image, CACHED);
        let mut lines = outcome.stdout.lines().map(str::to_owned);
        let (Some(sum), Some(grown), 0) = (lines.next(), lines.next(), outcome.code) else { panic!("{outcome:?}") };
        (sum, grown.parse::<i64>().unwrap())
    };
    let (sum, copied) = read(&host);
    let host = host.set("storage.layers", "\"memory\"");
    let (same, kept) = read(&host);
    assert_eq!(sum, same);
    // QEMU has them as disks all the same.
    let has_memory = monitor() != "qemu-system";
    let bounds = if has_memory { -4096..4096 } else { 16 * 1024..64 * 1024 };
    assert!(copied > 16 * 1024 && bounds.contains(&kept), "KiB cached by the guest: {copied}, then {kept}");
    host.detached("mapped", "sleep 1000");
    let maps =
        host.processes(monitor()).into_iter().map(|pid| std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap());
    assert_eq!(maps.filter(|map| map.contains(".erofs")).count(), usize::from(has_memory));
    // What is shared makes layers disks again.
    let folder = host.folder.join("volume");
    std::fs::create_dir(&folder).unwrap();
    let volume = format!("{}:/volume", folder.display());
    let outcome = host.coracle_outcome(&[
        "run",
        "--rm",
        "--volume",
        &volume,
        &image,
        "sh",
        "-c",
        "cat /data/big | wc -c >/volume/size",
    ]);
    assert_eq!(outcome.code, 0, "{outcome:?}");
    assert_eq!(std::fs::read_to_string(folder.join("size")).unwrap().trim(), big.len().to_string());
    assert_eq!(host.coracle_outcome(&["rm", "--force", "mapped"]).code, 0);
    host.audit();
}

#[test]
fn more_layers_than_disks_and_layers_that_need_others() {
    let host = Host::new();
    let names: Vec<[String; 2]> = (0..12).map(|number| [format!("many/{number}"), number.to_string()]).collect();
    let each: Vec<[LayerEntry<'_>; 2]> =
        names.iter().map(|[name, text]| [("many/", Directory, ""), (name.as_str(), Regular, text.as_str())]).collect();
    let layers: Vec<&[LayerEntry<'_>]> = each.iter().map(<[_; 2]>::as_slice).collect();
    let outcome = run(&host, &image(&host, "many", &layers), "cat /many/*; ls /many | wc -l");
    assert_eq!((outcome.code, outcome.stdout.as_str()), (0, "0110112345678912\n"), "{outcome:?}");
    assert_eq!(disks(&host).len(), 6);
    // A hard link to a file of the layer below, and a file in a folder of which the layer says nothing more.
    let needing: [&[LayerEntry<'_>]; 2] = [
        &[("data/", Directory, ""), ("data/below", Regular, "b")],
        &[("data/hard", Link, "data/below"), ("home/app/new", Regular, "n")],
    ];
    let image = image(&host, "needing", &needing);
    for _ in 0..2 {
        let outcome = run(&host, &image, "cat /data/hard /home/app/new; stat -c %h /data/below; ls /home/app");
        assert_eq!((outcome.code, outcome.stdout.as_str()), (0, "bn2\nnew\n"), "{outcome:?}");
    }
    // Two that were made before the last layer turned out to need others, and one of all of them.
    assert_eq!(disks(&host).len(), 6 + 3);
    host.audit();
}

#[test]
fn a_root_of_disks_shares_nothing_and_writes_stay_with_their_container() {
    let host = Host::new();
    host.detached("one", "echo mine >/own; echo changed >>/etc/passwd; sync; echo up; exec sleep 1000");
    let outcome = host.coracle_outcome(&["exec", "one", "sh", "-c", "until [ -e /own ]; do sleep 0.1; done; cat /own"]);
    assert_eq!(outcome.stdout, "mine\n", "{outcome:?}");
    assert!(host.processes("virtiofsd").is_empty(), "nothing is shared");
    let [disk] = disks(&host).try_into().unwrap();
    let before = std::fs::read(&disk).unwrap();
    let outcome = host.sh("ls /own; grep -c . /etc/passwd");
    assert_eq!(outcome.stdout, "2\n", "{outcome:?}");
    // A volume is shared, and no more than it.
    let folder = host.folder.join("volume");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("f"), "from the host").unwrap();
    let volume = format!("{}:/v", folder.display());
    let image = host.image();
    let outcome = host.coracle_outcome(&["run", "-d", "--name", "two", "-v", &volume, &image, "sleep", "1000"]);
    assert_eq!(outcome.code, 0, "{outcome:?}");
    assert!(!host.processes("virtiofsd").is_empty());
    let outcome = host.coracle_outcome(&["exec", "two", "cat", "/v/f"]);
    assert_eq!(outcome.stdout, "from the host", "{outcome:?}");
    for name in ["one", "two"] {
        assert_eq!(host.coracle_outcome(&["rm", "--force", name]).code, 0);
    }
    assert!(std::fs::read(&disk).unwrap() == before, "the image's disk is as it was");
    host.audit();
}

#[test]
fn a_full_disk_is_an_error_and_what_is_freed_is_the_hosts_again() {
    use std::os::unix::fs::MetadataExt;
    let host = Host::new().set("run.writable_mib", "256");
    host.detached("c", "exec sleep 1000");
    let exec = |script: &str| host.coracle_outcome(&["exec", "c", "sh", "-c", script]);
    let used = || std::fs::metadata(host.root().join("containers/c/writable.ext4")).unwrap().blocks() / 2048;
    let least = used();
    let outcome = exec("dd if=/dev/zero of=/big bs=1M count=400 2>&1; sync");
    assert!(outcome.stdout.contains("No space left"), "{outcome:?}");
    assert!(used() > 200, "{} MiB", used());
    // The container goes on, and has its room again.
    let outcome = exec("rm /big && sync && dd if=/dev/zero of=/small bs=1M count=100 2>/dev/null && echo room");
    assert_eq!(outcome.stdout, "room\n", "{outcome:?}");
    let outcome = exec("rm /small; sync");
    assert_eq!(outcome.code, 0, "{outcome:?}");
    assert!(used() < least + 20, "{} MiB of the host after {least}", used());
    assert_eq!(host.coracle_outcome(&["rm", "--force", "c"]).code, 0);
    host.audit();
}

#[test]
fn a_changed_block_is_never_read_where_layers_are_verified() {
    let content = "the true content ".repeat(1000);
    let layers: [&[LayerEntry<'_>]; 1] = [&[("data/", Directory, ""), ("data/file", Regular, &content)]];
    let host = Host::new().set("run.verity", "true");
    let image = image(&host, "verified", &layers);
    let outcome = run(&host, &image, "cat /data/file | wc -c; grep -c dm- /proc/partitions");
    assert_eq!(outcome.stdout, format!("{}\n2\n", content.len()), "{outcome:?}");
    let (disk, at) = disks(&host)
        .into_iter()
        .find_map(|disk| {
            let bytes = std::fs::read(&disk).unwrap();
            let at = bytes.windows(16).position(|window| window == &content.as_bytes()[..16])?;
            Some((disk, at as u64))
        })
        .unwrap();
    let file = std::fs::File::options().write(true).open(&disk).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"a lie", at + 100).unwrap();
    drop(file);
    let outcome = run(&host, &image, "cat /data/file; echo still here");
    assert!(outcome.stdout.ends_with("still here\n") && !outcome.stdout.contains("a lie"), "{outcome:?}");
    assert!(outcome.stderr.contains("Input/output error"), "{outcome:?}");
    let host = host.set("run.verity", "false");
    let outcome = run(&host, &image, "cat /data/file");
    assert!(outcome.stdout.contains("a lie"), "what is not verified is what it is: {outcome:?}");
    host.audit();
}

#[test]
fn layers_of_erofs_utils_with_a_tree_of_hashes_are_a_root() {
    let host = Host::new();
    let (base, top) = (host.folder.join("base"), host.folder.join("top"));
    busybox_folder(&base);
    std::fs::write(base.join("word"), "below").unwrap();
    std::fs::create_dir_all(&top).unwrap();
    std::fs::write(top.join("word"), "above").unwrap();
    let image = |folder: &Path| {
        let file = folder.with_extension("erofs").display().to_string();
        let _ = tool("mkfs.erofs", &[&file, &folder.display().to_string()]);
        file
    };
    let (base, top) = (image(&base), image(&top));
    let offset = std::fs::metadata(&base).unwrap().len().next_multiple_of(4096).to_string();
    let text = tool("veritysetup", &["format", &base, &base, &format!("--hash-offset={offset}")]);
    let root = text.lines().find_map(|line| line.strip_prefix("Root hash:")).unwrap().trim();
    let writable = ext4(&host.folder.join("writable.ext4"), None);
    let verity = [format!("verity.roothash={root}"), format!("verity.hashoffset={offset}")];
    let verified: [&str; 4] = ["ro", "loop", &verity[0], &verity[1]];
    let mounts: [RootMount<'_>; 4] = [
        ("erofs", &top, &["ro", "loop"]),
        ("erofs", &base, &verified),
        ("ext4", &writable, &["rw", "loop"]),
        ("format/mkdir/overlay", "overlay", &["lowerdir={{ overlay 0 1 }}", "upperdir={{ mount 2 }}/upper"]),
    ];
    let script = "test $(cat /word) = above && busybox grep -q dm- /proc/partitions && echo x >/new && exit 7";
    let shim = Shim::start(&host, "layers", script_config(script).to_string().as_bytes());
    shim.create_with_root("layers", &mounts).unwrap();
    assert!(host.processes("virtiofsd").is_empty(), "nothing is shared");
    // Two roots are not written to one disk.
    let (code, text) = shim.create_with_root("second", &mounts).unwrap_err();
    assert!(code == Code::UNIMPLEMENTED && text.contains("another container"), "{code:?} {text}");
    assert_eq!(end(shim), 7);
    // The wrong root hash verifies nothing.
    let wrong = ["ro", "loop", &format!("verity.roothash={}", "0".repeat(64)), &verity[1]];
    let mut mounts = mounts;
    mounts[1] = ("erofs", &base, &wrong);
    let shim = Shim::start(&host, "wrong", script_config("exit 0").to_string().as_bytes());
    let (code, text) = shim.create_with_root("wrong", &mounts).unwrap_err();
    assert!(text.contains("mount"), "{code:?} {text}");
    shim.finish();
    host.audit();
}

#[test]
fn one_file_system_is_a_root_and_a_missing_one_is_named() {
    let host = Host::new();
    let folder = host.folder.join("whole");
    busybox_folder(&folder);
    let whole = ext4(&host.folder.join("whole.ext4"), Some(&folder));
    let shim = Shim::start(&host, "whole", script_config("echo x >/new && exit 5").to_string().as_bytes());
    shim.create_with_root("whole", &[("ext4", &whole, &["loop"])]).unwrap();
    assert!(host.processes("virtiofsd").is_empty(), "nothing is shared");
    assert_eq!(end(shim), 5);
    let dump = tool("debugfs", &["-R", "cat /new", &whole]);
    assert_eq!(dump, "x\n", "what was written is there when the machine has gone");
    // Read-only is read-only on the host already.
    let shim = Shim::start(&host, "ro", script_config("echo x >/other || exit 6").to_string().as_bytes());
    shim.create_with_root("ro", &[("ext4", &whole, &["loop", "ro"])]).unwrap();
    assert_eq!(end(shim), 6);
    let shim = Shim::start(&host, "none", script_config("exit 0").to_string().as_bytes());
    let (_, text) = shim.create_with_root("none", &[("ext4", "/nowhere/disk", &[])]).unwrap_err();
    assert!(text.contains("/nowhere/disk"), "{text}");
    shim.finish();
    host.audit();
}

#[test]
fn roots_of_disks_come_and_go_with_the_containers_of_a_pod() {
    let host = Host::with_own_network();
    let base = host.folder.join("base");
    busybox_folder(&base);
    let layer = base.with_extension("erofs").display().to_string();
    let _ = tool("mkfs.erofs", &[&layer, &base.display().to_string()]);
    let whole = ext4(&host.folder.join("whole.ext4"), Some(&base));
    let (netns, pod) = pod(&host, "disks");
    let writable: Vec<String> = (0..3).map(|number| ext4(&host.folder.join(format!("w{number}.ext4")), None)).collect();
    let root = |writable: &'static str| -> [RootMount<'_>; 3] {
        [
            ("erofs", &layer, &["ro", "loop"]),
            ("ext4", writable, &["rw", "loop"]),
            ("overlay", "overlay", &["lowerdir=x"]),
        ]
    };
    let writable: Vec<&'static str> = writable.into_iter().map(|path| &*path.leak()).collect();
    for round in 0..2 {
        let names: Vec<String> = (0..3).map(|number| format!("c{number}-{round}")).collect();
        for (name, writable) in names.iter().zip(&writable) {
            pod.run_with_root(name, script_config("echo here >>/new && exec /bin/busybox sleep 1000"), &root(writable))
                .unwrap();
        }
        let open = open_files(&host);
        assert_eq!(open.iter().filter(|file| file.ends_with(".erofs")).count(), 1, "one disk for all: {open:?}");
        assert_eq!(open.iter().filter(|file| file.starts_with('w')).count(), 3, "{open:?}");
        // What one of them uses is not another's root.
        let (_, text) = pod.run_with_root("thief", script_config("exit 0"), &root(writable[0])).unwrap_err();
        assert!(text.contains("another container"), "{text}");
        let name = format!("whole-{round}");
        let output =
            pod.run_with_root(&name, script_config("echo x >>/new; exit 9"), &[("ext4", &whole, &["loop"])]).unwrap();
        assert_eq!(pod.end_of(&name, true).unwrap(), 9, "{:?}", std::fs::read_to_string(output));
        for name in &names {
            pod.kill(name);
            pod.end_of(name, true).unwrap();
        }
        let_go(&host, |file| file.ends_with(".erofs") || file.ends_with(".ext4"));
        // The host may read them while the pod goes on.
        let lines = "here\n".repeat(round + 1);
        assert_eq!(tool("debugfs", &["-R", "cat /upper/new", writable[0]]), lines);
        assert_eq!(tool("debugfs", &["-R", "cat /new", &whole]), "x\n".repeat(round + 1));
    }
    // More than the machine has places for: said, and nothing stays.
    let many: Vec<String> = (0..40).map(|number| ext4(&host.folder.join(format!("m{number}.ext4")), None)).collect();
    let mut mounts: Vec<RootMount<'_>> = many[1..].iter().map(|path| ("erofs", path.as_str(), [].as_slice())).collect();
    mounts.push(("ext4", &many[0], &[]));
    mounts.push(("overlay", "overlay", &[]));
    let (code, text) = pod.run_with_root("many", script_config("exit 0"), &mounts).unwrap_err();
    let what = if monitor() == "qemu-system" { "links and disks that come and go" } else { "devices" };
    assert!(text.contains(&format!("more than 31 {what} is not supported")), "{code:?} {text}");
    let_go(&host, |file| file.ends_with(".ext4"));
    pod.run_with_root("last", script_config("exit 4"), &root(writable[1])).unwrap();
    assert_eq!(pod.end_of("last", true).unwrap(), 4);
    pod.stop().unwrap();
    pod.shutdown().unwrap();
    drop(netns);
    host.audit();
}
