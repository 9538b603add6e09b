//! `coracle install` and `coracle uninstall`: the programs, the settings, completions and man pages, the guest image, and containerd's drop-in;
//! and away again. What was installed is noted in a list, and nothing else is taken away.

use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{image, pages, place, pods, shim};

/// Install what this program was built with.
///
/// It copies the programs beside this one, writes a settings file where there is none, completions and man pages, and makes the guest image.
#[derive(Debug, clap::Args)]
pub(crate) struct InstallArgs {
    /// Where programs go: DIR/bin and DIR/lib/coracle.
    #[arg(long, default_value = "/usr/local", value_name = "DIR")]
    prefix: PathBuf,
    /// Put everything below this folder, as if that were the host's root: for packages. No guest image is made there.
    #[arg(long, value_name = "DIR")]
    destdir: Option<PathBuf>,
    /// Name the runtime in containerd's configuration, too.
    #[arg(long)]
    containerd: bool,
    /// Make no guest image.
    #[arg(long)]
    no_guest: bool,
}

/// Take away what `coracle install` has installed.
#[derive(Debug, clap::Args)]
pub(crate) struct UninstallArgs {
    /// Below which it was put.
    #[arg(long, value_name = "DIR")]
    destdir: Option<PathBuf>,
    /// Take away containers, images and changed settings, too.
    #[arg(long)]
    purge: bool,
}

/// A file that was installed, and its digest as it was then.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Installed {
    path: PathBuf,
    sha256: String,
}

/// The list, and the folder of images and containers that it is in.
const STATE: &str = "/var/lib/coracle";
const LIST: &str = "/var/lib/coracle/installed.json";

const SETTINGS: &str = "/etc/coracle/config.toml";
const DROP_IN: &str = "/etc/containerd/conf.d/coracle.toml";
const CONTAINERD: &str = "/etc/containerd/config.toml";

/// The runtime in containerd's configuration.
const RUNTIME: &str = "version = 2\n\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.coracle]\n  \
                       runtime_type = \"io.containerd.coracle.v2\"\n  pod_annotations = [\"io.coracle.*\", \"io.katacontainers.*\"]\n";

/// Where things go, and what was put there.
struct Place {
    destdir: PathBuf,
    done: Vec<Installed>,
}

impl Place {
    fn of(destdir: Option<PathBuf>) -> Self {
        Self { destdir: destdir.unwrap_or_else(|| "/".into()), done: Vec::new() }
    }

    /// A path of the host, below the folder.
    fn at(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.destdir.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Writes a file beside its place and moves it there: a program that runs keeps its own.
    fn put(&mut self, path: impl AsRef<Path>, bytes: &[u8], mode: u32) -> Result<()> {
        let file = self.at(&path);
        let folder = file.parent().context("a path without a folder")?;
        std::fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
        let mut name = file.file_name().context("a path without a name")?.to_owned();
        name.push(".new");
        let beside = folder.join(name);
        let write = || {
            std::fs::write(&beside, bytes)?;
            std::fs::set_permissions(&beside, std::fs::Permissions::from_mode(mode))?;
            std::fs::rename(&beside, &file)
        };
        write().with_context(|| format!("write {}", file.display()))?;
        println!("{}", file.display());
        self.done.push(Installed { path: path.as_ref().to_owned(), sha256: digest(bytes) });
        Ok(())
    }

    /// Writes a file that an administrator may change: not over one that is another's, or was changed since it was installed.
    fn put_unless_changed(&mut self, before: &[Installed], path: &str, bytes: &[u8]) -> Result<()> {
        let own = before.iter().find(|installed| installed.path == Path::new(path));
        let found = std::fs::read(self.at(path)).ok().map(|found| digest(&found));
        if found.is_none() || own.is_some_and(|own| found.as_deref() == Some(&own.sha256)) {
            return self.put(path, bytes, 0o644);
        }
        println!("{}: left as it is", self.at(path).display());
        // Changed since: it is still known as what was installed.
        self.done.extend(own.cloned());
        Ok(())
    }
}

fn digest(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

pub(crate) fn install(args: &InstallArgs, command: &clap::Command) -> Result<()> {
    if args.destdir.is_none() && !place::is_root() {
        bail!("only root can install: use sudo, or run the programs from where they are");
    }
    let mut place = Place::of(args.destdir.clone());
    // A list of before stays until the new one is there: what only that one has goes at the end.
    let before = listed(&place)?;
    programs(&mut place, &args.prefix)?;
    texts(&mut place, &args.prefix, command)?;
    place.put_unless_changed(&before, SETTINGS, coracle_settings::default_file().as_bytes())?;
    if args.containerd {
        containerd(&mut place, &before)?;
    } else if let Some(own) = before.iter().find(|installed| installed.path == Path::new(DROP_IN)) {
        // Who installs again, without asking for it again, has not asked to lose it.
        place.done.push(own.clone());
    }
    let text = serde_json::to_vec_pretty(&place.done)?;
    let (list, gone) = (place.at(LIST), |old: &&Installed| place.done.iter().all(|new| new.path != old.path));
    for old in before.iter().filter(gone) {
        remove(&place.at(&old.path))?;
    }
    std::fs::create_dir_all(place.at(STATE)).with_context(|| format!("make {}", place.at(STATE).display()))?;
    std::fs::write(&list, text).with_context(|| format!("write {}", list.display()))?;
    if !args.no_guest && args.destdir.is_none() {
        image::build(image::Build::of_agent(args.prefix.join("lib/coracle/coracle-agent")))?;
    }
    Ok(())
}

/// The programs beside this one.
fn programs(place: &mut Place, prefix: &Path) -> Result<()> {
    let own = std::env::current_exe().and_then(|own| own.canonicalize()).context("find this program")?;
    for (name, to) in [("coracle", "bin"), (shim::PROGRAM, "bin"), ("coracle-agent", "lib/coracle")] {
        let from = if name == "coracle-agent" { image::agent(None)? } else { own.with_file_name(name) };
        let bytes = std::fs::read(&from)
            .with_context(|| format!("read {}: all programs are built together", from.display()))?;
        place.put(prefix.join(to).join(name), &bytes, 0o755)?;
    }
    Ok(())
}

/// Completions and man pages.
fn texts(place: &mut Place, prefix: &Path, command: &clap::Command) -> Result<()> {
    use clap_complete::Shell;
    for (shell, path) in [
        (Shell::Bash, "share/bash-completion/completions/coracle"),
        (Shell::Zsh, "share/zsh/site-functions/_coracle"),
        (Shell::Fish, "share/fish/vendor_completions.d/coracle.fish"),
    ] {
        place.put(prefix.join(path), &pages::completed(shell, command.clone()), 0o644)?;
    }
    for (name, page) in pages::rendered(command.clone())? {
        place.put(prefix.join("share/man/man1").join(name), &page, 0o644)?;
    }
    Ok(())
}

/// containerd's drop-in; or what to write where that would take other settings away.
fn containerd(place: &mut Place, before: &[Installed]) -> Result<()> {
    let main = std::fs::read_to_string(place.at(CONTAINERD)).unwrap_or_default();
    let is_imported = main.lines().any(|line| line.trim_start().starts_with("imports") && line.contains("conf.d"));
    // containerd 1.6 and 1.7 take a plugin's settings from one file alone: a second one would take the first's away.
    let has_cri = main.contains("io.containerd.grpc.v1.cri") || main.contains("io.containerd.cri.v1.runtime");
    if has_cri {
        // One that is there from before goes on as it is: whoever has put settings into both knows why.
        place.done.extend(before.iter().find(|installed| installed.path == Path::new(DROP_IN)).cloned());
        println!(
            "{CONTAINERD} has settings of CRI, which a drop-in would replace: add this to it by hand, and restart containerd:\n\n{RUNTIME}"
        );
        return Ok(());
    }
    place.put_unless_changed(before, DROP_IN, RUNTIME.as_bytes())?;
    if is_imported {
        println!("containerd reads it when it is started again: systemctl restart containerd");
    } else {
        println!(
            "{CONTAINERD} does not read it: put `imports = [\"/etc/containerd/conf.d/*.toml\"]` at its top, and restart containerd"
        );
    }
    Ok(())
}

fn listed(place: &Place) -> Result<Vec<Installed>> {
    let list = place.at(LIST);
    match std::fs::read(&list) {
        Ok(text) => {
            serde_json::from_slice(&text).with_context(|| format!("{} is no list of installed files", list.display()))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| format!("read {}", list.display())),
    }
}

/// Removes a file, and the folders of ours that are empty without it.
fn remove(file: &Path) -> Result<()> {
    match std::fs::remove_file(file) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("remove {}", file.display()));
        }
        _ => println!("removed {}", file.display()),
    }
    let ours = file.parent().filter(|folder| folder.ends_with("coracle") || folder.ends_with("containerd/conf.d"));
    if let Some(folder) = ours {
        // One that is not empty has something of another's.
        let _ = std::fs::remove_dir(folder);
    }
    Ok(())
}

pub(crate) async fn uninstall(args: &UninstallArgs) -> Result<()> {
    let place = Place::of(args.destdir.clone());
    if args.destdir.is_none() {
        if !place::is_root() {
            bail!("only root can uninstall: use sudo");
        }
        // Whatever answers there, one of another version too, runs.
        let running =
            pods::all()?.iter().filter(|pod| std::os::unix::net::UnixStream::connect(pod.socket()).is_ok()).count();
        if running > 0 {
            bail!("{running} pods run: stop them first (`coracle pods`)");
        }
    }
    let files = listed(&place)?;
    if files.is_empty() {
        bail!("{} names no file: `coracle install` has installed nothing here", place.at(LIST).display());
    }
    let mut kept = Vec::new();
    for Installed { path, sha256 } in &files {
        let file = place.at(path);
        let is_changed = std::fs::read(&file).is_ok_and(|bytes| digest(&bytes) != *sha256);
        if path.starts_with("/etc") && is_changed && !args.purge {
            kept.push(file);
        } else {
            remove(&file)?;
        }
    }
    let state = place.at(STATE);
    let folder = |name: &str| state.join(name);
    for folder in [folder("guest"), folder("containers"), folder("images")] {
        let is_guest = folder.ends_with("guest");
        let is_empty = std::fs::read_dir(&folder).is_ok_and(|mut entries| entries.next().is_none());
        if !folder.exists() {
            continue;
        }
        if is_guest || is_empty || args.purge {
            std::fs::remove_dir_all(&folder).with_context(|| format!("remove {}", folder.display()))?;
            println!("removed {}", folder.display());
        } else {
            kept.push(folder);
        }
    }
    remove(&place.at(LIST))?;
    if args.purge && state.exists() {
        std::fs::remove_dir_all(&state).with_context(|| format!("remove {}", state.display()))?;
    }
    for path in kept {
        println!("kept {}: `coracle uninstall --purge` takes it away, too", path.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_is_taken_away_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let mut place = Place::of(Some(root.path().to_owned()));
        std::fs::create_dir_all(root.path().join("usr/local/bin")).unwrap();
        std::fs::write(root.path().join("usr/local/bin/other"), "other").unwrap();
        place.put("/usr/local/bin/coracle", b"x", 0o755).unwrap();
        place.put("/usr/local/lib/coracle/coracle-agent", b"y", 0o755).unwrap();
        let mode = std::fs::metadata(root.path().join("usr/local/bin/coracle")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o755);
        for installed in &place.done {
            remove(&place.at(&installed.path)).unwrap();
        }
        assert!(root.path().join("usr/local/bin/other").exists());
        assert!(!root.path().join("usr/local/lib/coracle").exists());
        assert!(root.path().join("usr/local/lib").exists());
    }

    #[test]
    fn a_drop_in_takes_no_settings_of_others_away() {
        let root = tempfile::tempdir().unwrap();
        let mut place = Place::of(Some(root.path().to_owned()));
        std::fs::create_dir_all(root.path().join("etc/containerd")).unwrap();
        let config = root.path().join("etc/containerd/config.toml");
        std::fs::write(&config, "[plugins.\"io.containerd.grpc.v1.cri\"]\n").unwrap();
        containerd(&mut place, &[]).unwrap();
        assert!(place.done.is_empty());
        std::fs::write(&config, "imports = [\"/etc/containerd/conf.d/*.toml\"]\n").unwrap();
        containerd(&mut place, &[]).unwrap();
        assert_eq!(place.done[0].path, Path::new(DROP_IN));
    }
}
