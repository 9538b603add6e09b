//! `cargo xtask deb`: a Debian package of what `coracle install` installs.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::build;
use crate::steps::{self, command, output, step, top};

/// What else of the package there is: its description, and what it needs.
const CONTROL: &str = "Package: coracle
Version: VERSION
Architecture: amd64
Maintainer: The Coracle developers <coracle@localhost>
Installed-Size: SIZE
Section: admin
Priority: optional
Depends: libc6 (>= 2.34)
Recommends: qemu-system-x86, e2fsprogs, iptables, containernetworking-plugins
Suggests: containerd, virtiofsd, passt
Description: containers, each in a small virtual machine of its own
 Coracle is a container runtime: a shim for containerd, and one command that
 needs no daemon. Every pod has a kernel of its own.
 .
 The guest's kernel is the distribution's: `coracle image build` fetches and
 prepares it once.
";

/// After the installation: the one step that takes the network, which a package's installation should not.
const POSTINST: &str = "#!/bin/sh
set -e
if [ \"$1\" = configure ] && ! grep -qs '\"version\": \"VERSION\"' /var/lib/coracle/guest/manifest.json; then
    echo 'coracle: run `coracle image build`, for the guest of this version, and `coracle check`'
fi
";

const POSTRM: &str = "#!/bin/sh
set -e
if [ \"$1\" = purge ]; then rm -rf /var/lib/coracle /etc/coracle; fi
";

/// Builds it; its file.
pub(crate) fn run() -> Result<PathBuf> {
    let built = build::all()?;
    let version = output(command("cargo", &["pkgid", "-p", "coracle-cli"]))?;
    let version = version.trim().rsplit(['#', '@']).next().unwrap_or_default().to_owned();
    let folder = built.work().join("deb");
    let file = built.work().join(format!("coracle_{version}_amd64.deb"));
    step("making the package", || {
        let _ = std::fs::remove_dir_all(&folder);
        let mut install =
            command(&built.coracle().display().to_string(), &["install", "--no-guest", "--prefix", "/usr"]);
        install.arg("--destdir").arg(&folder).stdout(std::process::Stdio::null());
        steps::run(install)?;
        // dpkg has a list of its own.
        std::fs::remove_dir_all(folder.join("var")).context("remove the list of files")?;
        for page in std::fs::read_dir(folder.join("usr/share/man/man1")).context("the man pages")?.flatten() {
            let mut gzip = command("gzip", &["-9n"]);
            gzip.arg(page.path());
            steps::run(gzip)?;
        }
        let documents = folder.join("usr/share/doc/coracle");
        std::fs::create_dir_all(&documents).with_context(|| format!("make {}", documents.display()))?;
        for (from, to) in [("LICENSE", "copyright"), ("CHANGELOG.md", "NEWS.md"), ("README.md", "README.md")] {
            std::fs::copy(top().join(from), documents.join(to)).with_context(|| format!("copy {from}"))?;
        }
        control(&folder, &version)?;
        let mut build = command("dpkg-deb", &["--root-owner-group", "-Zxz", "--build"]);
        build.arg(&folder).arg(&file);
        steps::run(build)
    })?;
    println!("{}", file.display());
    Ok(file)
}

fn control(folder: &Path, version: &str) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let mut size = command("du", &["-sk", "--apparent-size"]);
    size.arg(folder);
    let size = output(size)?;
    let kibibytes = size.split_whitespace().next().unwrap_or("0");
    let own = folder.join("DEBIAN");
    std::fs::create_dir_all(&own).with_context(|| format!("make {}", own.display()))?;
    let text = CONTROL.replace("VERSION", version).replace("SIZE", kibibytes);
    let postinst = POSTINST.replace("VERSION", version);
    for (name, text, mode) in [
        ("control", text.as_str(), 0o644),
        ("conffiles", "/etc/coracle/config.toml\n", 0o644),
        ("postinst", postinst.as_str(), 0o755),
        ("postrm", POSTRM, 0o755),
    ] {
        let file = own.join(name);
        std::fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).context("a mode")?;
    }
    Ok(())
}
