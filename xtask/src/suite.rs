//! `cargo xtask suite`: another release's containerd, in a root of its own. Run by name, for it downloads that release.

use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::build::{self, Built};
use crate::image;
use crate::setup;
use crate::steps::{self, command, output, step};
use crate::tests;

/// Try the shim on another Debian release's containerd.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// trixie (containerd 1.7) or sid (containerd 2.x).
    suite: String,
}

const PACKAGES: &str = "containerd runc qemu-system-x86 virtiofsd procps containernetworking-plugins iproute2 iptables";

/// The end-to-end tests that are run there, too: pods through containerd's CRI.
const TESTS: [&str; 2] = ["pods", "pod_checks"];

/// Where the root has them.
const TEST_FOLDER: &str = "opt/coracle-test";

/// What is run in the root; it stops at the first surprise.
const SCRIPT: &str = r#"set -eu
cd /
containerd -c /tmp/cd.toml >/tmp/cd.log 2>&1 & daemon=$!
ctr() { timeout 120 /usr/bin/ctr -a /run/cd.sock "$@"; }
until ctr version >/dev/null 2>&1; do kill -0 $daemon; done
run="--runtime io.containerd.coracle.v2 test:latest"
containerd --version
ctr images import --base-name test /tmp/image.tar >/dev/null
echo "run:      $(ctr run --rm $run c1 uname -r)"
code=0; ctr run --rm $run c2 sh -c 'exit 3' || code=$?; test $code = 3; echo "exit:     $code"
ctr run -d $run c3 sleep 1000
echo "exec:     $(ctr tasks exec --exec-id e1 c3 echo beside)"
ctr tasks pause c3; ctr tasks ls | grep -q 'c3.*PAUSED'; ctr tasks resume c3; echo "pause:    ok"
ctr tasks metrics c3 >/dev/null; echo "metrics:  ok"
ctr tasks kill -s 9 c3
until ctr tasks ls | grep -q 'c3.*STOPPED'; do :; done
ctr tasks rm c3 >/dev/null 2>&1 || true; ctr c rm c3; echo "delete:   ok"
kill $daemon; wait $daemon || true
until ! pgrep -f 'qemu-system|virtiofsd|containerd-shim-coracle' >/dev/null; do :; done
test -z "$(ls /run/coracle)"; echo "left:     nothing"
"#;

pub(crate) fn run(args: &Args) -> Result<()> {
    if !matches!(args.suite.as_str(), "trixie" | "sid") {
        bail!("there is trixie and sid");
    }
    setup::ensure(setup::Level::Run)?;
    let built = build::all()?;
    if !setup::is_root() {
        bail!("a root of its own needs root: run this by sudo");
    }
    let guest = built.guest(tests::KERNEL)?;
    let root = built.work().join(format!("root-{}", args.suite));
    if !root.join("usr/bin/containerd").exists() || !root.join("usr/sbin/iptables").exists() {
        step(&format!("making a root of {}", args.suite), || make_root(&root, &args.suite))?;
    }
    let at = |path: &str| root.join(path);
    std::fs::copy(built.shim(), at("usr/local/bin/containerd-shim-coracle-v2")).context("copy the shim")?;
    let copy =
        command("cp", &["-aT", &guest.display().to_string(), &at("var/lib/coracle-guest").display().to_string()]);
    steps::run(copy)?;
    let layout = built.work().join("image");
    image::make(&layout, &[])?;
    image::archive(&layout, &at("tmp/image.tar"))?;
    std::fs::create_dir_all(at("etc/coracle")).context("the settings")?;
    std::fs::write(
        at("etc/coracle/config.toml"),
        "machine.accelerator = \"any\"\nguest.folder = \"/var/lib/coracle-guest\"\n",
    )?;
    let config = "version = 2\nroot = \"/tmp/cd\"\nstate = \"/run/cd\"\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = \"/run/cd.sock\"\n";
    std::fs::write(at("tmp/cd.toml"), config)?;
    std::fs::write(at("tmp/suite.sh"), SCRIPT)?;
    let outcome = step(&format!("containerd of {}", args.suite), || steps::run(inside(&root, "bash /tmp/suite.sh")));
    if outcome.is_err() {
        eprintln!("containerd's log: {}", at("tmp/cd.log").display());
    }
    outcome?;
    // containerd copies it for each pod; a root as debootstrap leaves it has none.
    std::fs::write(at("etc/hosts"), "127.0.0.1 localhost\n").context("the hosts file")?;
    copy_tests(&built, &root)?;
    step("pods through CRI", || run_tests(&root, None))?;
    if args.suite == "sid" {
        step("pods through CRI by the Sandbox API", || run_tests(&root, Some("shim")))?;
    } else {
        println!("left out: the Sandbox API (containerd 1.7 has it as an experiment only)");
    }
    Ok(())
}

/// Puts the end-to-end tests, and what they need, into the root.
fn copy_tests(built: &Built, root: &Path) -> Result<()> {
    let folder = root.join(TEST_FOLDER);
    std::fs::create_dir_all(&folder).context("the tests' folder")?;
    let names: Vec<&str> = TESTS.iter().flat_map(|name| ["--test", name]).collect();
    let mut build =
        command("cargo", &["test", "--locked", "--no-run", "--message-format", "json", "-p", "coracle-e2e"]);
    build.args(names);
    let messages = output(build)?;
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    for message in messages {
        let name = message["target"]["name"].as_str().unwrap_or_default();
        // A program has the same name as its tests.
        let is_test = TESTS.contains(&name) && message["target"]["kind"][0] == "test";
        if let (true, Some(path)) = (is_test, message["executable"].as_str()) {
            std::fs::copy(path, folder.join(name)).with_context(|| format!("copy {path}"))?;
        }
    }
    std::fs::copy(built.coracle(), folder.join("coracle")).context("copy coracle")?;
    let image = folder.join("image");
    if image.exists() {
        std::fs::remove_dir_all(&image).context("the old image")?;
    }
    image::make(&image, &[("guest-probe", built.guest_probe())])
}

fn run_tests(root: &Path, sandboxer: Option<&str>) -> Result<()> {
    let sandboxer = sandboxer.map(|name| format!("CORACLE_TEST_SANDBOXER={name} ")).unwrap_or_default();
    for name in TESTS {
        // What an earlier run that failed has left: in a pid namespace of its own each has the same names.
        steps::run(inside(root, "sh -c 'rm -rf /tmp/ce-*'"))?;
        let line = format!(
            "CORACLE_TEST_GUEST=/var/lib/coracle-guest CORACLE_TEST_SHIM=/usr/local/bin/containerd-shim-coracle-v2 \
             CORACLE_TEST_BINARY=/{TEST_FOLDER}/coracle CORACLE_TEST_IMAGE=/{TEST_FOLDER}/image {sandboxer}\
             /{TEST_FOLDER}/{name} --test-threads=2"
        );
        steps::run(inside(root, &line))?;
    }
    Ok(())
}

/// A command in the root, in mount and pid namespaces of its own: whatever it starts and mounts ends with it. The root is
/// swapped and not only changed, for the shim makes mounts of "/" its own.
fn inside(root: &Path, line: &str) -> std::process::Command {
    let root = root.display();
    let script = format!(
        "mount --bind {root} {root} && cd {root} && mount -t proc proc proc && mount --rbind /sys sys && mount --rbind /dev dev \
         && mount -t tmpfs tmpfs run && pivot_root . mnt && cd / && umount -l mnt \
         && exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin {line}"
    );
    command(
        "unshare",
        &["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "bash", "-c", &script],
    )
}

fn make_root(root: &Path, suite: &str) -> Result<()> {
    let targets = output(command("apt-get", &["indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]))?;
    let mirror = targets.lines().find(|uri| uri.trim_end_matches('/').ends_with("/debian"));
    let mirror = mirror.context("apt is set to no Debian mirror")?.to_owned();
    setup::ensure_program("/usr/sbin/debootstrap", "debootstrap")?;
    let folder = root.display().to_string();
    if !root.join("usr/bin/apt-get").exists() {
        steps::run(command("debootstrap", &["--variant=minbase", suite, &folder, &mirror]))?;
    }
    let install = format!(
        "sh -c 'apt-get -o Acquire::Check-Valid-Until=false update -q && DEBIAN_FRONTEND=noninteractive \
         apt-get install -q -y --no-install-recommends {PACKAGES}'"
    );
    steps::run(inside(root, &install))
}
