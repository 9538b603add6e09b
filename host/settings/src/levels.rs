//! How much is logged, by component.

use serde_json::{Value as Json, json};

use crate::kinds::{Given, Kind};

/// What a line of the log is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Component {
    /// The shim itself.
    Shim,
    /// The pod.
    Sandbox,
    /// Storage and network.
    Plan,
    /// The driver of the machine, and processes.
    Driver,
    /// What the monitor and the servers of its devices say.
    Monitor,
    /// What the guest prints on its console: its kernel, its init, its agent.
    Console,
}

/// Their names.
const COMPONENTS: [(&str, Component); 6] = [
    ("shim", Component::Shim),
    ("sandbox", Component::Sandbox),
    ("plan", Component::Plan),
    ("driver", Component::Driver),
    ("monitor", Component::Monitor),
    ("console", Component::Console),
];

impl Component {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Shim, Self::Sandbox, Self::Plan, Self::Driver, Self::Monitor, Self::Console];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        COMPONENTS.iter().find(|(_, component)| *component == self).map_or("", |(name, _)| name)
    }
}

/// The least that a line must weigh to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Nothing.
    Off,
    /// What has failed.
    Error,
    /// And what may.
    Warn,
    /// And what happens.
    Info,
    /// And how.
    Debug,
}

const LEVELS: [(&str, Level); 5] = [
    ("off", Level::Off),
    ("error", Level::Error),
    ("warn", Level::Warn),
    ("info", Level::Info),
    ("debug", Level::Debug),
];

/// A level for all, and others for some.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Levels {
    all: Level,
    some: Vec<(Component, Level)>,
}

impl Levels {
    /// The same level for all.
    #[must_use]
    pub const fn new(all: Level) -> Self {
        Self { all, some: Vec::new() }
    }

    /// The level of a component.
    #[must_use]
    pub fn of(&self, component: Component) -> Level {
        self.some.iter().rev().find(|(named, _)| *named == component).map_or(self.all, |(_, level)| *level)
    }

    /// The same, with the level of each component by its name.
    #[must_use]
    pub fn each(&self) -> Self {
        Self { all: self.all, some: Component::ALL.map(|component| (component, self.of(component))).into() }
    }

    /// Reads `LEVEL`, or `LEVEL,COMPONENT=LEVEL,…`, or only the latter, where those not named stay at "info".
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let level = |name: &str| LEVELS.iter().find(|(known, _)| *known == name).map(|(_, level)| *level);
        let mut levels = Self::new(Level::Info);
        for (number, part) in text.split(',').map(str::trim).enumerate() {
            match part.split_once('=') {
                Some((name, text)) => {
                    let component = COMPONENTS.iter().find(|(known, _)| *known == name.trim())?.1;
                    levels.some.push((component, level(text.trim())?));
                }
                None if number == 0 => levels.all = level(part)?,
                None => return None,
            }
        }
        Some(levels)
    }
}

impl std::fmt::Display for Levels {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = |level: Level| LEVELS.iter().find(|(_, known)| *known == level).map_or("", |(name, _)| name);
        formatter.write_str(name(self.all))?;
        self.some.iter().try_for_each(|(component, level)| write!(formatter, ",{}={}", component.name(), name(*level)))
    }
}

impl Kind for Levels {
    const EXPECTED: &'static str = "one of \"off\", \"error\", \"warn\", \"info\", \"debug\", and behind it COMPONENT=LEVEL by commas; components are \
                                    shim, sandbox, plan, driver, monitor, console";
    fn read(value: &Given) -> Option<Self> {
        Self::parse(value.text()?)
    }
    fn show(&self) -> String {
        format!("{:?}", self.to_string())
    }
    fn schema() -> Json {
        let level = "(off|error|warn|info|debug)";
        let named = format!("(shim|sandbox|plan|driver|monitor|console)={level}");
        json!({ "type": "string", "pattern": format!("^({level}|{named})(,{named})*$") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_read_by_component() {
        let levels = Levels::parse("warn, console=debug,driver=off").unwrap();
        assert_eq!((levels.of(Component::Shim), levels.of(Component::Console)), (Level::Warn, Level::Debug));
        assert_eq!(levels.of(Component::Driver), Level::Off);
        assert_eq!(levels.to_string(), "warn,console=debug,driver=off");
        assert_eq!(Levels::parse("console=debug").unwrap().of(Component::Shim), Level::Info);
        for wrong in ["", "loud", "info,debug", "info,nobody=debug", "info,shim=", "info,"] {
            assert_eq!(Levels::parse(wrong), None, "{wrong}");
        }
        assert_eq!(Component::ALL.map(Component::name).join(","), COMPONENTS.map(|(name, _)| name).join(","));
    }
}
