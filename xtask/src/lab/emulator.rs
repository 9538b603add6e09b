//! The clone's emulator: this machine's QEMU, or a newer one where that is too old, unpacked into a folder of the cache.
//!
//! QEMU 7.2, which Debian 12 has, runs a nested guest wrongly now and then: an interrupt that is delivered to a guest whose memory is not
//! there yet comes to the clone's own kernel, which crashes. A guest that goes on where it was saved has that at once, others seldom.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::cache;
use crate::steps::{command, output, run, step};

/// The name of the program.
const PROGRAM: &str = "qemu-system-x86_64";
/// The oldest release that is known to run nested guests rightly.
const RELEASE: u32 = 10;
/// The packages that have a newer one, for those who have installed the older one with all that it needs.
const PACKAGES: [&str; 4] = ["qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios"];

/// The emulator.
#[derive(Debug)]
pub(crate) struct Emulator {
    program: PathBuf,
    /// Where its firmware is, where that is not where it looks by itself.
    firmware: Vec<PathBuf>,
}

impl Emulator {
    /// This machine's, or one from the backports of its distribution.
    pub(crate) fn find(cache: &Path) -> Result<Self> {
        let own = release(Path::new(PROGRAM))?;
        if own >= RELEASE {
            return Ok(Self { program: PROGRAM.into(), firmware: Vec::new() });
        }
        let fetched = cache::kept(cache, &format!("qemu-{RELEASE}"), |folder| {
            step("downloading a newer QEMU for the lab", || download(folder))?;
            for package in cache::packages(folder) {
                cache::unpack(&package, folder)?;
                std::fs::remove_file(&package).with_context(|| format!("remove {}", package.display()))?;
            }
            Ok(())
        });
        let folder = fetched.with_context(|| {
            format!("QEMU {own} runs no nested guests that can be relied on: install QEMU {RELEASE} or newer")
        })?;
        let program = folder.join("usr/bin").join(PROGRAM);
        let found = release(&program)?;
        if found < RELEASE {
            bail!("the backports have QEMU {found}: install QEMU {RELEASE} or newer");
        }
        let firmware = ["usr/share/qemu", "usr/share/seabios"].map(|name| folder.join(name)).into();
        Ok(Self { program, firmware })
    }

    /// A command that starts it.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        for folder in &self.firmware {
            command.arg("-L").arg(folder);
        }
        command
    }
}

/// A program's release: the first number of its version.
fn release(program: &Path) -> Result<u32> {
    let text = output(command(&program.display().to_string(), &["--version"]))?;
    let number = text.split_once("version ").and_then(|(_, rest)| rest.split('.').next()?.parse().ok());
    number.with_context(|| format!("{} says no version: {text}", program.display()))
}

/// Fetches the packages from the distribution's backports, without a change to what apt knows otherwise.
fn download(folder: &Path) -> Result<()> {
    let (mirror, codename) = mirror()?;
    let own = folder.join("apt");
    for part in ["lists/partial", "archives/partial"] {
        std::fs::create_dir_all(own.join(part)).with_context(|| format!("make {}", own.display()))?;
    }
    let source = own.join("sources.list");
    std::fs::write(&source, format!("deb {mirror} {codename}-backports main\n")).context("a list of sources")?;
    let apt = |words: &[&str]| {
        let mut apt = command("apt-get", &["-q"]);
        let own = own.display();
        for option in [
            format!("Dir::Etc::sourcelist={own}/sources.list"),
            "Dir::Etc::sourceparts=/dev/null".into(),
            format!("Dir::State::lists={own}/lists"),
            format!("Dir::Cache={own}"),
            // As root, apt would drop to a user who may not write here.
            "APT::Sandbox::User=root".into(),
        ] {
            apt.args(["-o", &option]);
        }
        apt.args(words).current_dir(folder).stdout(std::process::Stdio::null());
        run(apt)
    };
    apt(&["update"])?;
    apt(&[&["download"], &PACKAGES[..]].concat())?;
    std::fs::remove_dir_all(&own).with_context(|| format!("remove {}", own.display()))
}

/// Where apt has the distribution's own packages from, and the release's name.
fn mirror() -> Result<(String, String)> {
    let words = ["indextargets", "--format", "$(ORIGIN) $(REPO_URI) $(CODENAME) $(COMPONENT)", "Created-By: Packages"];
    let text = output(command("apt-get", &words)).context("this system has no apt-get")?;
    let lines = text.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let release = std::fs::read_to_string("/etc/os-release").context("read /etc/os-release")?;
    let codename = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME=")).unwrap_or_default();
    let found = lines.into_iter().find_map(|line| match line[..] {
        ["Debian", mirror, name, "main"] if name == codename => Some((mirror.to_owned(), name.to_owned())),
        _ => None,
    });
    found.context("there are backports for Debian only")
}
