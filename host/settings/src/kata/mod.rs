//! Moving over from Kata: what its configuration and its annotations become here. Nothing that asks for protection is dropped: it is named, and
//! whoever moves over is told.

mod table;

use std::collections::BTreeMap;
use std::path::Path;

use toml::de::{DeTable, DeValue};

use crate::declare::reference;
use crate::error::{Error, Position};
use crate::kinds::Given;
use crate::load::{Loaded, read};

/// What a key becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Becomes {
    /// These settings.
    Setting(&'static [&'static str], Unit),
    /// It is so always, whatever it says.
    Always(&'static str),
    /// Nothing: why.
    Nothing(&'static str),
    /// Where it asks for this, that is not there, and a pod would be another one without it.
    Refused(&'static str),
    /// The same where it holds one of these words; else nothing stands for it.
    RefusedWith(&'static str, &'static [&'static str]),
    /// Where it asks for this protection, that is not there, and a pod would be less safe without it.
    Protects(&'static str),
    /// The same where it holds one of these words; else nothing stands for it.
    ProtectsWith(&'static str, &'static [&'static str]),
}

/// How a value changes on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Not at all.
    Same,
    /// A number, of which 0 is as many as the host has: this many then, which the host bounds.
    NumberOrHost(i64),
    /// Bits in bytes.
    Bits,
    /// Bits a second in megabits a second, rounded up.
    BitsPerSecond,
    /// The other way around.
    Inverse,
    /// One of these words becomes one of those.
    Words(&'static [(&'static str, &'static str)]),
    /// One becomes a list of one.
    List,
    /// The value of an option of QEMU's.
    QemuOption(&'static str),
    /// Names of annotations become the settings that they mean.
    NamesOfAnnotations,
}

/// What has become of one key of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moved {
    /// Where it stands.
    pub position: Position,
    /// Its section and name.
    pub key: String,
    /// In a word: "kept", "renamed", "unit changed", "always so", "dropped", "refused".
    pub fate: &'static str,
    /// What it became, or why it did not.
    pub text: String,
}

/// Kata's configuration, moved over.
#[derive(Debug, Clone, Default)]
pub struct Migration {
    /// Each key.
    pub moved: Vec<Moved>,
    /// The settings, as TOML, by their keys.
    values: BTreeMap<String, String>,
    /// The monitor whose section counts, where the files name one.
    monitor: Option<String>,
}

/// The word for what asks for what is not there: the settings alone would be something else.
const REFUSED: &str = "refused";

/// What the annotations of Kata's begin with that change its configuration.
const ANNOTATIONS: &str = "io.katacontainers.config.";
/// The one that chooses another file.
const CONFIG_PATH: &str = "io.katacontainers.config_path";

/// Kata's names for monitors, and ours.
const MONITORS: [(&str, &str); 2] = [("qemu", "qemu"), ("dragonball", "builtin")];

/// Moves files over: each changes what the one before has said, as Kata's drop-ins do.
///
/// # Errors
/// [`Error`] for a file that can't be read, or is no TOML.
pub fn migrate(files: &[&Path]) -> Result<Migration, Error> {
    let mut texts = Vec::new();
    for path in files {
        texts.push((read(path)?, *path));
    }
    let mut migration = Migration::default();
    for (text, path) in &texts {
        migration.find_monitor(text, path)?;
    }
    for (text, path) in &texts {
        migration.read_text(text, path)?;
    }
    Ok(migration)
}

fn parse<'t>(text: &'t str, path: &Path) -> Result<toml::Spanned<DeTable<'t>>, Error> {
    DeTable::parse(text).map_err(|error| Error::Syntax {
        position: Position::of(path, text, error.span().map_or(0, |span| span.start)),
        text: error.message().trim().replace('\n', ", "),
    })
}

/// A value that stands for "nothing is asked".
fn is_nothing(given: &Given) -> bool {
    match given {
        Given::Text(text) | Given::Bare(text) => text.is_empty(),
        Given::Number(number) => *number == 0,
        Given::Flag(flag) => !flag,
        Given::Texts(texts) => texts.is_empty(),
        Given::Other => false,
    }
}

/// Whether a value holds one of these words.
fn holds(given: &Given, words: &[&str]) -> bool {
    let has = |text: &String| words.iter().any(|word| text == word || word.len() > 4 && text.contains(word));
    match given {
        Given::Text(text) => has(text),
        Given::Texts(texts) => texts.iter().any(has),
        _ => false,
    }
}

/// The kind of a section, by its name's parts; none where Kata has none such.
fn kind(parts: &[&str]) -> Option<&'static str> {
    match parts {
        ["hypervisor", _] => Some(table::HYPERVISOR),
        ["hypervisor", _, "factory"] | ["factory"] => Some(table::FACTORY),
        ["hypervisor", _, "guest_extension_images"] => Some(table::EXTENSION),
        ["agent", _] => Some(table::AGENT),
        ["agent", _, "mem_agent"] => Some(table::MEM_AGENT),
        ["runtime"] => Some(table::RUNTIME),
        _ => None,
    }
}

fn row(kind: &str, key: &str) -> Option<Becomes> {
    table::ROWS.iter().find(|(section, name, _)| *section == kind && *name == key).map(|(_, _, becomes)| *becomes)
}

impl Migration {
    /// The first key that asks for what is not there.
    #[must_use]
    pub fn refused(&self) -> Option<&Moved> {
        self.moved.iter().find(|moved| moved.fate == REFUSED)
    }

    /// The settings as a file of ours.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::from("# Made from Kata's configuration by `coracle migrate kata`.\n");
        let mut table = "";
        for (key, value) in &self.values {
            let (own, name) = key.split_once('.').unwrap_or(("", key));
            if own != table {
                text.push_str(&format!("\n[{own}]\n"));
                table = own;
            }
            text.push_str(&format!("{name} = {value}\n"));
        }
        text
    }

    /// Whether the settings are such as Coracle takes.
    ///
    /// # Errors
    /// [`Error`], of the file that [`Self::text`] would make.
    pub fn check(&self) -> Result<(), Error> {
        Loaded::from_text(&self.text(), Path::new("the settings made of it")).map(drop)
    }

    /// Looks which monitor a file names; a later one counts.
    fn find_monitor(&mut self, text: &str, path: &Path) -> Result<(), Error> {
        let parsed = parse(text, path)?;
        let runtime = parsed.get_ref().get("runtime").and_then(|runtime| runtime.get_ref().as_table());
        let name = runtime.and_then(|runtime| runtime.get("hypervisor_name")?.get_ref().as_str());
        self.monitor = name.filter(|name| !name.is_empty()).map(str::to_owned).or(self.monitor.take());
        Ok(())
    }

    fn read_text(&mut self, text: &str, path: &Path) -> Result<(), Error> {
        let parsed = parse(text, path)?;
        let before = self.moved.len();
        self.read_table(parsed.get_ref(), &mut Vec::new(), &|byte| Position::of(path, text, byte));
        // A table has no order of its own; a file has.
        if let Some(own) = self.moved.get_mut(before..) {
            own.sort_by_key(|moved| moved.position.line);
        }
        Ok(())
    }

    fn read_table(&mut self, table: &DeTable<'_>, parts: &mut Vec<String>, at: &dyn Fn(usize) -> Position) {
        if let [hypervisor, name] = &parts[..]
            && hypervisor == "hypervisor"
        {
            let position = table.iter().next().map_or_else(|| at(0), |(key, _)| at(key.span().start));
            if self.monitor.as_ref().is_some_and(|monitor| monitor != name) {
                let text = "runtime.hypervisor_name names another one".to_owned();
                self.moved.push(Moved { position, key: format!("hypervisor.{name}"), fate: "dropped", text });
                return;
            }
            self.monitor(name, position);
        }
        for (name, value) in table {
            parts.push(name.get_ref().to_string());
            match value.get_ref() {
                DeValue::Table(inner) => self.read_table(inner, parts, at),
                DeValue::Array(items) if items.iter().any(|item| item.get_ref().is_table()) => {
                    for item in items.iter().filter_map(|item| item.get_ref().as_table()) {
                        self.read_table(item, parts, at);
                    }
                }
                value => self.key(parts, &Given::of(value), at(name.span().start)),
            }
            parts.pop();
        }
    }

    /// The monitor that a section is of.
    fn monitor(&mut self, name: &str, position: Position) {
        let key = format!("hypervisor.{name}");
        let ours = MONITORS.iter().find(|(theirs, _)| *theirs == name);
        let (fate, text) = match ours {
            Some((_, ours)) => {
                self.values.insert("machine.monitor".into(), format!("{ours:?}"));
                ("renamed", format!("machine.monitor = {ours:?}"))
            }
            None if name == "remote" => (REFUSED, "machines that another service makes are not supported".to_owned()),
            None => {
                self.values.insert("machine.monitor".into(), "\"auto\"".into());
                (
                    "dropped",
                    "there is no such monitor; machine.monitor = \"auto\": the built-in one where KVM works".to_owned(),
                )
            }
        };
        self.moved.push(Moved { position, key, fate, text });
    }

    fn key(&mut self, parts: &[String], given: &Given, position: Position) {
        let name = parts.join(".");
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        let becomes = parts.split_last().and_then(|(key, section)| row(kind(section)?, key));
        self.forget(&name, becomes, &position.path);
        let (fate, text) = match becomes {
            None if is_nothing(given) => ("dropped", "Kata 4.1 has no such key, and it asks for nothing".to_owned()),
            None => (REFUSED, "Kata 4.1 has no such key, and nobody knows what it asks for".to_owned()),
            Some(becomes) => self.take(becomes, given, parts.last().copied().unwrap_or_default(), &parts),
        };
        self.moved.push(Moved { position, key: name, fate, text });
    }

    /// The file `later` says otherwise than those before it. A section that a file has several times has a key of its own in each.
    fn forget(&mut self, name: &str, becomes: Option<Becomes>, later: &Path) {
        for before in self.moved.iter_mut().filter(|moved| moved.key == name && moved.position.path != later) {
            (before.fate, before.text) = ("overridden", "a later file says otherwise".into());
        }
        if let Some(Becomes::Setting(keys, _)) = becomes {
            self.values.retain(|key, _| !keys.contains(&key.as_str()));
        }
    }

    fn take(&mut self, becomes: Becomes, given: &Given, key: &str, parts: &[&str]) -> (&'static str, String) {
        match becomes {
            Becomes::Always(text) => ("always so", text.to_owned()),
            Becomes::Nothing(text) => ("dropped", text.to_owned()),
            Becomes::Refused(_) | Becomes::Protects(_) if is_nothing(given) => {
                ("dropped", "it asks for nothing".to_owned())
            }
            Becomes::RefusedWith(_, words) | Becomes::ProtectsWith(_, words) if !holds(given, words) => {
                ("dropped", "nothing stands for it".to_owned())
            }
            Becomes::Refused(what)
            | Becomes::Protects(what)
            | Becomes::RefusedWith(what, _)
            | Becomes::ProtectsWith(what, _) => (REFUSED, format!("{what} is not supported")),
            // A program's path is that of the monitor in whose section it stands.
            Becomes::Setting(["qemu.path"], _) if parts.get(1) != Some(&"qemu") => {
                ("dropped", "it is another monitor's program".to_owned())
            }
            Becomes::Setting(keys, unit) => match convert(unit, given) {
                Ok(None) => ("dropped", "it asks for nothing".to_owned()),
                Ok(Some(value)) => {
                    for key in keys {
                        self.values.insert((*key).to_owned(), value.clone());
                    }
                    let is_kept = keys.iter().any(|own| own.split('.').next_back() == Some(key));
                    let fate = match unit {
                        Unit::Bits | Unit::BitsPerSecond | Unit::Inverse => "unit changed",
                        _ if is_kept => "kept",
                        _ => "renamed",
                    };
                    let lines: Vec<_> = keys.iter().map(|key| format!("{key} = {value}")).collect();
                    (fate, lines.join(", "))
                }
                Err(problem) => (REFUSED, problem),
            },
        }
    }
}

/// A value of Kata's as one of ours in TOML; none where it asks for nothing.
fn convert(unit: Unit, given: &Given) -> Result<Option<String>, String> {
    let wrong = || format!("its value is none that Kata knows: {given:?}");
    Ok(match (unit, given) {
        (Unit::QemuOption(_) | Unit::List, Given::Text(text)) if text.is_empty() => None,
        (Unit::QemuOption(option), Given::Text(text)) => Some(format!("{:?}", [option, text])),
        (Unit::List, Given::Text(text)) => Some(format!("{:?}", [text])),
        (Unit::Words(_), Given::Text(text)) if text.is_empty() => None,
        (Unit::Words(words), Given::Text(text)) => {
            let ours = words.iter().find(|(theirs, _)| theirs == text).map(|(_, ours)| ours);
            Some(format!("{:?}", ours.ok_or_else(|| format!("{text:?} is not supported"))?))
        }
        (Unit::Inverse, Given::Flag(flag)) => Some((!flag).to_string()),
        (Unit::NumberOrHost(most), Given::Number(number)) if *number >= 0 => {
            Some(if *number == 0 { most } else { *number }.to_string())
        }
        (Unit::Bits, Given::Number(bits)) => Some(u64::try_from(*bits).map_err(|_| wrong())?.div_ceil(8).to_string()),
        (Unit::BitsPerSecond, Given::Number(bits)) => {
            Some(u64::try_from(*bits).map_err(|_| wrong())?.div_ceil(1_000_000).to_string())
        }
        (Unit::NamesOfAnnotations, Given::Texts(names)) => Some(format!("{:?}", allowed(names))),
        // As many as the host has can't be said of what a machine starts with.
        (Unit::Same, Given::Number(number)) if *number < 1 => None,
        (Unit::Same, Given::Text(text)) if text.is_empty() => None,
        (Unit::Same, Given::Number(number)) => Some(number.to_string()),
        (Unit::Same, Given::Flag(flag)) => Some(flag.to_string()),
        (Unit::Same, Given::Text(text)) => Some(format!("{text:?}")),
        _ => return Err(wrong()),
    })
}

/// The settings that these names of annotations mean; Kata takes regular expressions, of which the one for all is known.
fn allowed(names: &[String]) -> Vec<&'static str> {
    let can_be: Vec<_> = reference().into_iter().filter(|entry| entry.by_annotation).map(|entry| entry.key).collect();
    let mut allowed = Vec::new();
    for name in names {
        let keys: &[&'static str] = match row(table::HYPERVISOR, name) {
            _ if name == ".*" => &can_be,
            Some(Becomes::Setting(keys, _)) => keys,
            _ => &[],
        };
        for key in keys.iter().filter(|key| can_be.contains(key)) {
            if !allowed.contains(key) {
                allowed.push(*key);
            }
        }
    }
    allowed
}

/// What each of Kata's keys becomes, as a page of Markdown.
#[must_use]
pub fn page() -> String {
    let mut text = String::from(
        "# Kata's settings, and what they become\n\nMade by `cargo xtask docs` from the table in host/settings; not written by hand. Both dialects of \
         Kata 4.1's configuration. \"Refused\" means where it is asked for: nothing that asks for protection is dropped. Annotations \
         `io.katacontainers.config.SECTION.KEY` mean the same where a pod may set the setting (`annotations.allow`).\n\n| section | key | becomes |\n|---|---|---|\n",
    );
    for (section, key, becomes) in table::ROWS {
        let becomes = match becomes {
            Becomes::Setting(keys, unit) => {
                let names: Vec<_> = keys.iter().map(|key| format!("`{key}`")).collect();
                names.join(", ") + unit.note()
            }
            Becomes::Always(text) => format!("always so: {text}"),
            Becomes::Nothing(text) => format!("dropped: {text}"),
            Becomes::Refused(what) | Becomes::Protects(what) => format!("**refused**: {what}"),
            Becomes::RefusedWith(what, words) | Becomes::ProtectsWith(what, words) => {
                let words: Vec<_> = words.iter().map(|word| format!("`{word}`")).collect();
                format!("dropped; **refused** with {}: {what}", words.join(", "))
            }
        };
        text.push_str(&format!("| {section} | `{key}` | {becomes} |\n"));
    }
    text
}

impl Unit {
    /// What is said of the change.
    fn note(self) -> &'static str {
        match self {
            Self::Same | Self::List => "",
            Self::NumberOrHost(_) => ", 0 as what the host has",
            Self::Bits => ", bits as bytes",
            Self::BitsPerSecond => ", bits as megabits",
            Self::Inverse => ", the other way around",
            Self::Words(_) => ", in Coracle's words; other words are refused",
            Self::QemuOption(_) => ", as an option of QEMU's",
            Self::NamesOfAnnotations => ", by the settings' names",
        }
    }
}

/// What an annotation of Kata's means: settings, each with its value as a text. None where it is no annotation of Kata's configuration, or asks
/// for nothing.
///
/// # Errors
/// [`Error::Unprotected`], [`Error::Annotation`].
pub(crate) fn annotation(name: &str, text: &str) -> Result<Vec<(&'static str, String)>, Error> {
    let unprotected = |what| Error::Unprotected { name: name.to_owned(), what };
    if name == CONFIG_PATH {
        return Err(unprotected("another configuration of Kata's"));
    }
    let Some(rest) = name.strip_prefix(ANNOTATIONS) else { return Ok(Vec::new()) };
    let problem = |problem: String| Error::Annotation { name: name.to_owned(), problem };
    let becomes = rest.split_once('.').and_then(|(section, key)| row(section, key));
    let given = match (text.parse(), text.parse()) {
        (Ok(number), _) => Given::Number(number),
        (_, Ok(flag)) => Given::Flag(flag),
        _ => Given::Text(text.to_owned()),
    };
    match becomes {
        None => Err(problem("there is no such annotation".into())),
        Some(Becomes::Always(_)) => Ok(Vec::new()),
        Some(Becomes::Protects(_) | Becomes::Refused(_)) if is_nothing(&given) => Ok(Vec::new()),
        Some(Becomes::Protects(what) | Becomes::ProtectsWith(what, _)) => Err(unprotected(what)),
        Some(Becomes::Refused(what) | Becomes::RefusedWith(what, _)) => {
            Err(problem(format!("{what} is not supported")))
        }
        Some(Becomes::Nothing(why)) => Err(problem(format!("there is no such setting: {why}"))),
        Some(Becomes::Setting(keys, unit)) => {
            let Some(value) = convert(unit, &given).map_err(problem)? else { return Ok(Vec::new()) };
            // A text in TOML has quotes around it; that of an annotation has none.
            let value = match DeValue::parse(&value).map(|value| Given::of(value.get_ref())) {
                Ok(Given::Text(text)) => text,
                _ => value,
            };
            Ok(keys.iter().map(|key| (*key, value.clone())).collect())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Migration {
        let mut migration = Migration::default();
        migration.read_text(text, Path::new("k.toml")).unwrap();
        migration
    }

    fn fate<'a>(migration: &'a Migration, key: &str) -> (&'static str, &'a str) {
        let found = migration.moved.iter().find(|moved| moved.key == key).unwrap();
        (found.fate, found.text.as_str())
    }

    #[test]
    fn keys_are_kept_renamed_changed_or_dropped_each_with_a_reason() {
        let migration =
            of("[hypervisor.qemu]\npath = \"/usr/bin/qemu-kvm\"\ndefault_memory = 2048\ndefault_maxvcpus = 0\n\
            rx_rate_limiter_max_rate = 1500000\nguest_hook_path = \"\"\nkernel_params = \"quiet\"\n\
            enable_annotations = [\"default_memory\", \"kernel_params\"]\nseccompsandbox = \"on,obsolete=deny\"\n\
            reclaim_guest_freed_memory = true\n[agent.kata]\ncreate_container_timeout = 60\n[runtime]\n\
            internetworking_model = \"macvtap\"\nnew_thing = false\n");
        assert!(migration.refused().is_none(), "{:#?}", migration.moved);
        assert_eq!(fate(&migration, "hypervisor.qemu.path"), ("kept", "qemu.path = \"/usr/bin/qemu-kvm\""));
        assert_eq!(fate(&migration, "hypervisor.qemu.default_memory"), ("renamed", "machine.memory_mib = 2048"));
        assert_eq!(fate(&migration, "hypervisor.qemu.default_maxvcpus"), ("renamed", "machine.max_vcpus = 254"));
        let rate = fate(&migration, "hypervisor.qemu.rx_rate_limiter_max_rate");
        assert_eq!(rate, ("unit changed", "network.limit_to_guest_mbit = 2"));
        assert_eq!(fate(&migration, "hypervisor.qemu.kernel_params").0, "dropped");
        assert_eq!(fate(&migration, "hypervisor.qemu.reclaim_guest_freed_memory").0, "always so");
        assert_eq!(fate(&migration, "runtime.new_thing").0, "dropped");
        migration.check().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f.toml");
        std::fs::write(&path, migration.text()).unwrap();
        let settings = crate::Loaded::from_file(&path).unwrap().settings;
        assert_eq!((settings.machine_memory_mib, settings.agent_timeout_seconds), (2048, 60));
        assert_eq!(settings.qemu_arguments, ["-sandbox", "on,obsolete=deny"]);
        assert_eq!(settings.annotations_allow, ["machine.memory_mib"]);
    }

    #[test]
    fn nothing_that_asks_for_protection_is_dropped() {
        for asks in [
            "[hypervisor.qemu]\nconfidential_guest = true",
            "[hypervisor.qemu]\nkernel_verity_params = \"root_hash=ab\"",
            "[hypervisor.qemu]\nrootless = true",
            "[hypervisor.qemu]\ndisable_vhost_net = true",
            "[hypervisor.qemu]\ncpu_features = \"pmu=off,vmx=off\"",
            "[hypervisor.qemu]\nkernel_params = \"quiet lockdown=integrity\"",
            "[hypervisor.qemu]\nvirtio_fs_extra_args = [\"--readonly\"]",
            "[hypervisor.qemu]\na_newer_protection = true",
            "[image]\npolicy = \"strict\"",
            "[runtime]\nvfio_mode = \"vfio\"",
            "[agent.kata]\npolicy = \"x\"",
            "[runtime]\nexperimental_force_guest_pull = true",
            "[runtime]\nemptydir_mode = \"block-encrypted\"",
            "[hypervisor.remote]\ndefault_vcpus = 1",
            "[[hypervisor.qemu.guest_extension_images]]\nname = \"coco\"\nverity_params = \"root_hash=ab\"",
            "[[hypervisor.qemu.guest_extension_images]]\nverity_params = \"root_hash=ab\"\n\
             [[hypervisor.qemu.guest_extension_images]]\nverity_params = \"\"",
        ] {
            let migration = of(asks);
            assert!(migration.refused().is_some(), "{asks}: {:#?}", migration.moved);
            assert!(migration.moved.iter().any(|moved| moved.fate == "refused"), "{asks}");
        }
        let nothing = "[hypervisor.qemu]\nconfidential_guest = false\nkernel_verity_params = \"\"\nrootless = false";
        assert!(of(nothing).refused().is_none());
    }

    #[test]
    fn a_later_file_changes_what_an_earlier_has_said() {
        let mut migration = of("[hypervisor.dragonball]\ndefault_memory = 2048\ndefault_vcpus = 2");
        migration.read_text("[hypervisor.dragonball]\ndefault_memory = 512", Path::new("d.toml")).unwrap();
        let text = migration.text();
        assert!(
            text.contains("memory_mib = 512") && text.contains("vcpus = 2") && text.contains("\"builtin\""),
            "{text}"
        );
        let fates = migration.moved.iter().filter(|moved| moved.key.ends_with("default_memory"));
        assert_eq!(fates.map(|moved| moved.fate).collect::<Vec<_>>(), ["overridden", "renamed"]);
        let mut migration = of("[hypervisor.qemu]\nrootless = true\ndisk_rate_limiter_ops_max_rate = 5");
        let later = "[hypervisor.qemu]\nrootless = false\ndisk_rate_limiter_ops_max_rate = 0";
        migration.read_text(later, Path::new("d.toml")).unwrap();
        assert!(migration.refused().is_none() && !migration.text().contains("disk_operations"), "{}", migration.text());
    }

    #[test]
    fn the_section_of_the_monitor_that_is_named_counts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("k.toml");
        let text = "[hypervisor.dragonball]\ndefault_memory = 512\n[hypervisor.qemu]\ndefault_memory = 1024\nrootless = true\n\
            [runtime]\nhypervisor_name = \"dragonball\"\n";
        std::fs::write(&path, text).unwrap();
        let migration = migrate(&[&path]).unwrap();
        assert!(migration.refused().is_none(), "{:?}", migration.refused());
        assert!(migration.text().contains("memory_mib = 512") && migration.text().contains("\"builtin\""));
    }

    #[test]
    fn rows_name_settings_that_there_are_and_each_key_once() {
        let keys: Vec<_> = reference().into_iter().map(|entry| entry.key).collect();
        for (index, (section, name, becomes)) in table::ROWS.iter().enumerate() {
            let twice = table::ROWS.iter().skip(index + 1).any(|(other, again, _)| other == section && again == name);
            assert!(!twice, "{section}.{name} is there twice");
            if let Becomes::Setting(ours, _) = becomes {
                assert!(ours.iter().all(|key| keys.contains(key)), "{section}.{name}: {ours:?}");
            }
        }
    }

    #[test]
    fn annotations_mean_settings_or_say_why_not() {
        let of = |name: &str, text: &str| annotation(&format!("{ANNOTATIONS}{name}"), text);
        assert_eq!(of("hypervisor.default_memory", "512").unwrap(), [("machine.memory_mib", "512".into())]);
        assert_eq!(of("hypervisor.default_max_vcpus", "3").unwrap(), [("machine.max_vcpus", "3".into())]);
        let both = of("hypervisor.net_rate_limiter_bw_max_rate", "8000000").unwrap();
        assert_eq!(both.iter().map(|(_, value)| value.as_str()).collect::<Vec<_>>(), ["8", "8"]);
        let word = of("hypervisor.shared_fs", "none").unwrap();
        assert_eq!(word, [("storage.shared_fs", "none".into())]);
        assert_eq!(of("hypervisor.enable_virtio_mem", "true").unwrap(), []);
        assert_eq!(annotation("io.katacontainers.container.resource.swappiness", "1").unwrap(), []);
        assert!(matches!(annotation(CONFIG_PATH, "/snp.toml"), Err(Error::Unprotected { .. })));
        assert!(matches!(of("hypervisor.cc_init_data", "H4s"), Err(Error::Unprotected { .. })));
        assert!(matches!(of("agent.policy", "cGFja2FnZQ=="), Err(Error::Unprotected { .. })));
        assert!(matches!(of("hypervisor.kernel", "/k"), Err(Error::Annotation { .. })));
        assert!(matches!(of("hypervisor.no_such", "1"), Err(Error::Annotation { .. })));
        // What it must be the setting says.
        assert_eq!(of("hypervisor.default_memory", "much").unwrap(), [("machine.memory_mib", "much".into())]);
    }
}
