//! `cargo xtask suite`: another release's containerd, in a root of its own. Run by name, for it downloads that release.

use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::build;
use crate::image;
use crate::setup;
use crate::steps::{self, command, output, step};

/// Try the shim on another Debian release's containerd.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// trixie (containerd 1.7) or sid (containerd 2.x).
    suite: String,
}

const PACKAGES: &str = "containerd runc qemu-system-x86 virtiofsd procps";

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
    let guest = built.guest("linux-image-cloud-amd64")?;
    let root = built.work().join(format!("root-{}", args.suite));
    if !root.join("usr/bin/containerd").exists() {
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
    outcome
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
    steps::run(command("debootstrap", &["--variant=minbase", suite, &folder, &mirror]))?;
    let install = format!(
        "sh -c 'apt-get -o Acquire::Check-Valid-Until=false update -q && DEBIAN_FRONTEND=noninteractive \
         apt-get install -q -y --no-install-recommends {PACKAGES}'"
    );
    steps::run(inside(root, &install))
}
