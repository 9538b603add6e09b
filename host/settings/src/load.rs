//! Reading the settings: layer upon layer, each of which changes what it names.
//!
//! ```text
//! built in ─▶ $CORACLE_DEFAULTS ─▶ /usr/share/coracle/config.toml ─▶ /etc/coracle/config.toml ─▶ /etc/coracle/config.d/*.toml, by name
//!          ─▶ the file that containerd names (ConfigPath) ─▶ $CORACLE_OVERRIDES ─▶ annotations of the pod, where they are allowed
//! ```
//!
//! `$CORACLE_CONFIG` names a file that stands for the three of the host.

use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

use crate::declare::{Set, reference};
use crate::deprecation::{self, Kind as What, Use};
use crate::error::{Error, Position};
use crate::kinds::Given;
use crate::{Settings, contradictions, kata};

/// The distribution's file, the administrator's, and the folder of the administrator's further ones.
pub const SHARED: &str = "/usr/share/coracle/config.toml";
/// See [`SHARED`].
pub const FILE: &str = "/etc/coracle/config.toml";
/// See [`SHARED`].
pub const DROP_INS: &str = "/etc/coracle/config.d";

/// The variable that names another file in the place of these.
pub const ENVIRONMENT: &str = "CORACLE_CONFIG";

/// Settings as TOML that count less than the files, and such that count more: how `coracle run` starts its shims. Whoever
/// can set a shim's environment can replace the shim.
pub const DEFAULTS: &str = "CORACLE_DEFAULTS";
/// See [`DEFAULTS`].
pub const OVERRIDES: &str = "CORACLE_OVERRIDES";

/// Where Kata's runtimes look for their configuration.
const KATA: [&str; 4] = [
    "/etc/kata-containers/runtime-rs/configuration.toml",
    "/etc/kata-containers/configuration.toml",
    "/usr/share/defaults/kata-containers/runtime-rs/configuration.toml",
    "/usr/share/defaults/kata-containers/configuration.toml",
];

/// The variable by which Kata's runtimes are told of another file.
const KATA_FILE: &str = "KATA_CONF_FILE";

/// The most bytes of a file.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Nobody has set it.
    BuiltIn,
    /// It stands there.
    At(Position),
}

impl std::fmt::Display for Origin {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::BuiltIn => formatter.write_str("built in"),
            Self::At(position) => position.fmt(formatter),
        }
    }
}

/// Settings, and where they come from.
#[derive(Debug, Clone, Default)]
pub struct Loaded {
    /// The values.
    pub settings: Settings,
    /// Where each that somebody has set was set last.
    origins: BTreeMap<&'static str, Position>,
    /// What was used that is deprecated.
    pub deprecated: Vec<Use>,
}

impl Settings {
    /// The settings of this host.
    ///
    /// # Errors
    /// [`Error`]; a file that `$CORACLE_CONFIG` names must be there.
    pub fn load() -> Result<Self, Error> {
        Loaded::of_host(None).map(|loaded| loaded.settings)
    }

    /// The settings of this host, changed by the file that containerd's configuration names.
    ///
    /// # Errors
    /// [`Error`]; the file must be there.
    pub fn load_with(path: &Path) -> Result<Self, Error> {
        Loaded::of_host(Some(path)).map(|loaded| loaded.settings)
    }
}

impl Loaded {
    /// The settings of this host, changed by a file that containerd's configuration names, where it does.
    ///
    /// # Errors
    /// [`Error`]; a file that is named must be there.
    pub fn of_host(named: Option<&Path>) -> Result<Self, Error> {
        let mut loaded = Self::default();
        loaded.read_variable(DEFAULTS)?;
        match std::env::var_os(ENVIRONMENT) {
            Some(path) => loaded.read_file(Path::new(&path))?,
            None => loaded.read_host(Path::new("/"))?,
        }
        if let Some(path) = named {
            loaded.read_file(path)?;
        }
        loaded.read_variable(OVERRIDES)?;
        loaded.check()
    }

    /// The settings of this host, changed by Kata's own configuration: the file that containerd's names, else the first that there is where Kata
    /// looks for it; each with the files `config.d/*.toml` beside it, by their names.
    ///
    /// # Errors
    /// [`Error`]; [`Error::Kata`] where it asks for what is not there.
    pub fn of_kata(named: Option<&Path>) -> Result<Self, Error> {
        let mut loaded = Self::of_host(None)?;
        let chosen = named.map(Path::to_owned).or_else(|| std::env::var_os(KATA_FILE).map(PathBuf::from));
        let file = match chosen {
            Some(file) => file,
            None => first_there(KATA.iter().map(PathBuf::from))?.unwrap_or_else(|| KATA[0].into()),
        };
        // Where a link leads, as Kata does it: what is beside the link is not what is meant.
        let file = file.canonicalize().map_err(|source| Error::File { path: file.clone(), source })?;
        let mut files = vec![file.clone()];
        files.extend(drop_ins(&file.with_file_name("config.d"), |path| path.is_file())?);
        let migration = kata::migrate(&files.iter().map(PathBuf::as_path).collect::<Vec<_>>())?;
        if let Some(refused) = migration.refused() {
            return Err(Error::Kata {
                position: refused.position.clone(),
                key: refused.key.clone(),
                text: refused.text.clone(),
            });
        }
        let mut name = file.into_os_string();
        name.push(", as moved over");
        loaded.read_text(&migration.text(), Path::new(&name))?;
        loaded.check()
    }

    /// What the files below `root` say.
    fn read_host(&mut self, root: &Path) -> Result<(), Error> {
        let below = |path: &str| root.join(path.trim_start_matches('/'));
        for file in [SHARED, FILE].map(below) {
            if is_there(&file)? {
                self.read_file(&file)?;
            }
        }
        let folder = below(DROP_INS);
        let files = drop_ins(&folder, |path| path.extension().is_some_and(|extension| extension == "toml"))?;
        if !files.is_empty() {
            // Who can put a file there need not be able to write one.
            check_owner(
                &folder,
                &std::fs::metadata(&folder).map_err(|source| Error::File { path: folder.clone(), source })?,
            )?;
        }
        for file in files {
            self.read_file(&file)?;
        }
        Ok(())
    }

    /// The defaults, changed by the file at `path`.
    ///
    /// # Errors
    /// [`Error`].
    pub fn from_file(path: &Path) -> Result<Self, Error> {
        let mut loaded = Self::default();
        loaded.read_file(path)?;
        loaded.check()
    }

    /// The defaults, changed by a text, which errors call `name`.
    pub(crate) fn from_text(text: &str, name: &Path) -> Result<Self, Error> {
        let mut loaded = Self::default();
        loaded.read_text(text, name)?;
        loaded.check()
    }

    /// Where the setting `key` was set.
    #[must_use]
    pub fn origin(&self, key: &str) -> Origin {
        self.origins.get(key).map_or(Origin::BuiltIn, |position| Origin::At(position.clone()))
    }

    fn check(mut self) -> Result<Self, Error> {
        // A default does not contradict what somebody has said.
        let is_default = |key: &str| !self.origins.contains_key(key);
        let settings = &mut self.settings;
        if is_default("machine.max_vcpus") {
            settings.machine_max_vcpus = settings.machine_max_vcpus.max(settings.machine_vcpus);
        }
        if is_default("machine.max_memory_mib") {
            settings.machine_max_memory_mib = settings.machine_max_memory_mib.max(settings.machine_memory_mib);
        }
        contradictions::check(&self.settings)?;
        Ok(self)
    }

    fn read_variable(&mut self, name: &str) -> Result<(), Error> {
        match std::env::var(name) {
            Ok(text) => self.read_text(&text, Path::new(&format!("${name}"))),
            Err(_) => Ok(()),
        }
    }

    fn read_file(&mut self, path: &Path) -> Result<(), Error> {
        let text = read(path)?;
        self.read_text(&text, path)
    }

    fn read_text(&mut self, text: &str, path: &Path) -> Result<(), Error> {
        let at = |byte: usize| Position::of(path, text, byte);
        let table = DeTable::parse(text).map_err(|error| Error::Syntax {
            position: at(error.span().map_or(0, |span| span.start)),
            text: error.message().trim().replace('\n', ", "),
        })?;
        for (name, value) in table.get_ref() {
            match value.get_ref() {
                DeValue::Table(inner) => {
                    for (key, value) in inner {
                        let position = at(key.span().start);
                        self.apply(&format!("{}.{}", name.get_ref(), key.get_ref()), value.get_ref(), position)?;
                    }
                }
                other => self.apply(name.get_ref(), other, at(name.span().start))?,
            }
        }
        Ok(())
    }

    fn apply(&mut self, key: &str, value: &DeValue<'_>, position: Position) -> Result<(), Error> {
        if let Some(entry) = deprecation::of(What::Setting, key) {
            self.deprecated.push(Use { entry, place: position.to_string() });
        }
        match self.settings.set(key, &Given::of(value)) {
            Set::Done(key) => {
                self.origins.insert(key, position);
                Ok(())
            }
            Set::Unknown => Err(Error::Unknown { position, key: key.to_owned(), nearest: nearest(key) }),
            Set::Expected(expected) => Err(Error::Value { position, key: key.to_owned(), expected }),
        }
    }
}

/// Whether there is something, if only a link that leads nowhere.
fn is_there(path: &Path) -> Result<bool, Error> {
    match path.symlink_metadata() {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(Error::File { path: path.to_owned(), source }),
    }
}

/// The first of them that is there.
fn first_there(paths: impl Iterator<Item = PathBuf>) -> Result<Option<PathBuf>, Error> {
    for path in paths {
        if is_there(&path)? {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// The files of a folder that count, by their names; none where it is not there.
fn drop_ins(folder: &Path, counts: impl Fn(&Path) -> bool) -> Result<Vec<PathBuf>, Error> {
    let failed = |source| Error::File { path: folder.to_owned(), source };
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let all: std::io::Result<Vec<_>> = entries.map(|entry| entry.map(|entry| entry.path())).collect();
    let mut files: Vec<_> = all.map_err(failed)?;
    files.retain(|path| counts(path));
    files.sort();
    Ok(files)
}

/// The text of a file that nobody but its owner could have written, and the owner is root or whoever runs this.
pub(crate) fn read(path: &Path) -> Result<String, Error> {
    let failed = |source| Error::File { path: path.to_owned(), source };
    let file = std::fs::File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    check_owner(path, &metadata)?;
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(Error::TooLarge { path: path.to_owned(), most: FILE_BYTES_MAX });
    }
    String::from_utf8(bytes)
        .map_err(|error| Error::NoText { path: path.to_owned(), byte: error.utf8_error().valid_up_to() })
}

/// Refuses what somebody else than root, or whoever runs this, could change.
fn check_owner(path: &Path, metadata: &std::fs::Metadata) -> Result<(), Error> {
    let own = rustix::process::geteuid().as_raw();
    let (owner, mode) = (metadata.uid(), metadata.mode());
    let problem = |problem: String| Error::Unsafe { path: path.to_owned(), problem };
    if owner != 0 && owner != own && !is_nobody_known_here(owner) {
        return Err(problem(format!("it belongs to the user {owner}, who could change it")));
    }
    // A user's own group is no more than the user; that of root's files may stand for others (acl(5), the mask).
    let by_group = mode & 0o020 != 0 && (owner == 0 || metadata.gid() != owner);
    if mode & 0o002 != 0 || by_group {
        return Err(problem(format!("others than its owner can write to it (mode {:o})", mode & 0o7777)));
    }
    Ok(())
}

/// Whether an owner is one that this process's user namespace has no name for, as it has none for root: a shim of an ordinary user's. Whoever has
/// started it has read the same file before, where owners have names.
fn is_nobody_known_here(owner: u32) -> bool {
    let overflow = std::fs::read_to_string("/proc/sys/fs/overflowuid").ok().and_then(|text| text.trim().parse().ok());
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    overflow == Some(owner) && !map.lines().any(|line| line.split_whitespace().nth(1) == Some("0"))
}

/// The declared key with the fewest edits to `key`.
pub(crate) fn nearest(key: &str) -> &'static str {
    reference().into_iter().map(|entry| entry.key).min_by_key(|known| distance(key, known)).unwrap_or_default()
}

/// Levenshtein's distance.
fn distance(left: &str, right: &str) -> usize {
    let mut row: Vec<usize> = (0..=right.chars().count()).collect();
    // Longer ones are as far as any.
    for (i, a) in left.chars().take(256).enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, b) in right.chars().enumerate() {
            let substituted = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::{Accelerator, MachineType};

    fn load(text: &str) -> Result<Loaded, Error> {
        let mut loaded = Loaded::default();
        loaded.read_text(text, Path::new("f.toml"))?;
        loaded.check()
    }

    fn parse(text: &str) -> Result<Settings, Error> {
        load(text).map(|loaded| loaded.settings)
    }

    #[test]
    fn what_gives_protection_away_is_off_unless_it_is_set() {
        let settings = parse("").unwrap();
        assert_eq!(settings.accelerator, Accelerator::Kvm, "emulation is no boundary");
        assert!(settings.qemu_jail && settings.builtin_jail, "the jails");
        assert!(!settings.qemu_kernel_vsock && !settings.debug_console, "ways into a guest");
        assert!(settings.annotations_allow.is_empty() && settings.qemu_arguments.is_empty(), "what pods may set");
    }

    #[test]
    fn a_file_changes_what_it_names() {
        let text =
            "[machine]\naccelerator = \"any\"\ntype = \"microvm\"\nmemory_mib = 0x80\n[qemu]\narguments = [\"-a\"]\n";
        let loaded = load(text).unwrap();
        assert_eq!(loaded.settings.accelerator, Accelerator::Any);
        assert_eq!(loaded.settings.machine_type, MachineType::Microvm);
        assert_eq!((loaded.settings.machine_memory_mib, loaded.settings.machine_vcpus), (128, 1));
        assert_eq!(loaded.settings.qemu_arguments, ["-a"]);
        assert_eq!(loaded.origin("machine.type").to_string(), "f.toml:3:1");
        assert_eq!(loaded.origin("machine.vcpus"), Origin::BuiltIn);
        assert_eq!(parse("").unwrap(), Settings::default());
    }

    #[test]
    fn errors_name_the_place_and_the_mend() {
        let error = |text: &str| parse(text).unwrap_err().to_string();
        assert_eq!(
            error("[machine]\n  memory_mb = 1\n"),
            "f.toml:2:3: there is no setting machine.memory_mb; did you mean machine.memory_mib?"
        );
        assert_eq!(
            error("[machine]\naccelerator = \"tcg\"\n"),
            "f.toml:2:1: machine.accelerator must be one of \"kvm\", \"any\", \"emulation\""
        );
        assert!(error("[machine]\nmemory_mib = -1\n").contains("above 0"));
        assert!(error("[machine]\nmemory_mib = 1.5\n").contains("above 0"));
        assert!(error("[qemu]\npath = \"qemu\"\n").contains("an absolute path"));
        assert!(error("[qemu]\npath = { a = 1 }\n").contains("an absolute path"));
        assert!(error("memory_mib = 1").starts_with("f.toml:1:1: there is no setting memory_mib"));
        assert!(error("[machine]\n= x").starts_with("f.toml:2:1: "), "{}", error("[machine]\n= x"));
        assert!(error("[machine]\nvcpus = 1\nvcpus = 2\n").starts_with("f.toml:3:1: "));
    }

    fn write(path: &Path, bytes: &[u8]) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644)).unwrap();
    }

    #[test]
    fn each_layer_changes_what_the_one_before_has_said() {
        let root = tempfile::tempdir().unwrap();
        let file = |path: &str, text: &str| write(&root.path().join(path.trim_start_matches('/')), text.as_bytes());
        let of_host = || {
            let mut loaded = Loaded::default();
            loaded.read_host(root.path()).map(|()| loaded)
        };
        assert_eq!(of_host().unwrap().settings, Settings::default());
        file(SHARED, "[machine]\nmemory_mib = 300\nvcpus = 3\ntype = \"microvm\"");
        file(FILE, "[machine]\nmemory_mib = 400\nvcpus = 4");
        file("/etc/coracle/config.d/20-b.toml", "[machine]\nmemory_mib = 620");
        file("/etc/coracle/config.d/10-a.toml", "[machine]\nmemory_mib = 610\n[guest]\nlabels = true");
        file("/etc/coracle/config.d/30-c.toml.bak", "rubbish");
        let loaded = of_host().unwrap();
        let settings = &loaded.settings;
        assert_eq!((settings.machine_memory_mib, settings.machine_vcpus, settings.guest_labels), (620, 4, true));
        assert_eq!(settings.machine_type, MachineType::Microvm);
        assert!(loaded.origin("machine.memory_mib").to_string().ends_with("config.d/20-b.toml:2:1"));
        assert!(loaded.origin("machine.vcpus").to_string().ends_with("etc/coracle/config.toml:3:1"));
        write(&root.path().join("etc/coracle/config.d/40.toml"), b"[machine]\n# \xff\n");
        let error = of_host().unwrap_err();
        assert!(matches!(&error, Error::NoText { byte: 12, .. }) && error.to_string().contains("40.toml"), "{error}");
    }

    #[test]
    fn a_file_that_others_could_have_written_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f.toml");
        write(&path, b"[machine]\nvcpus = 2\n");
        assert_eq!(Loaded::from_file(&path).unwrap().settings.machine_vcpus, 2);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o646)).unwrap();
        let error = Loaded::from_file(&path).unwrap_err().to_string();
        assert!(error.contains("chmod go-w") && error.contains("646"), "{error}");
        write(&path, &vec![b'#'; 10 << 20]);
        assert!(matches!(Loaded::from_file(&path), Err(Error::TooLarge { .. })));
        if std::os::unix::fs::chown(&path, Some(4242), None).is_ok() {
            let error = Loaded::from_file(&path).unwrap_err().to_string();
            assert!(error.contains("4242"), "{error}");
        } else {
            println!("left out: a file of another user's needs root");
        }
        let error = Loaded::from_file(Path::new("/nowhere.toml")).unwrap_err().to_string();
        assert!(error.contains("/nowhere.toml"), "{error}");
    }

    #[test]
    fn every_default_can_be_written_and_read_back() {
        for entry in reference() {
            let (table, key) = entry.key.split_once('.').unwrap();
            let text = format!("[{table}]\n{key} = {}\n", entry.default);
            assert_eq!(parse(&text).unwrap(), Settings::default(), "{}", entry.key);
        }
    }
}
