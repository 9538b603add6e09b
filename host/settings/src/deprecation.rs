//! What is deprecated: since when, until when, what stands for it, and why. One register for settings, annotations, commands, methods of the
//! agent's API and drivers. Nothing goes that was not in it for two minor releases and six months, whichever is longer.

use std::collections::BTreeSet;

/// What is deprecated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A setting, by its key.
    Setting,
    /// An annotation, by its whole name.
    Annotation,
    /// A command or an option of the command line: `coracle run --old`.
    Command,
    /// A method of the agent's API.
    Method,
    /// A driver, by its name.
    Driver,
}

impl Kind {
    /// What it is called, for people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Setting => "setting",
            Self::Annotation => "annotation",
            Self::Command => "command",
            Self::Method => "method",
            Self::Driver => "driver",
        }
    }
}

/// A day.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Day {
    /// The year.
    pub year: u16,
    /// 1 to 12.
    pub month: u8,
    /// 1 to 31.
    pub day: u8,
}

impl Day {
    fn months(self) -> u32 {
        u32::from(self.year) * 12 + u32::from(self.month)
    }
}

impl std::fmt::Display for Day {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}-{:02}-{:02}", self.year, self.month, self.day)
    }
}

/// A minor release: major and minor number.
pub type Release = (u32, u32);

/// An entry of the register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deprecation {
    /// What it is.
    pub kind: Kind,
    /// Its name.
    pub name: &'static str,
    /// The release that has said so first, and its day.
    pub since: (Release, Day),
    /// The release with which it goes, and the day before which it does not.
    pub remove_in: (Release, Day),
    /// What stands for it; empty for nothing.
    pub replacement: &'static str,
    /// Why.
    pub reason: &'static str,
}

/// All that is deprecated now.
pub const ALL: &[Deprecation] = &[];

/// What was deprecated and has gone: an entry comes here from [`ALL`] with the change that takes out what it names.
pub const GONE: &[Deprecation] = &[];

/// The months and minor releases for which something stays at least.
const MONTHS: u32 = 6;
const RELEASES: u32 = 2;

/// Something deprecated that is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Use {
    /// What.
    pub entry: &'static Deprecation,
    /// Where.
    pub place: String,
}

impl std::fmt::Display for Use {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}: {}", self.place, self.entry)
    }
}

impl std::fmt::Display for Deprecation {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (((major, minor), day), ((until_major, until_minor), until)) = (self.since, self.remove_in);
        write!(
            formatter,
            "the {} {} is deprecated since {major}.{minor} ({day}) and goes with {until_major}.{until_minor}, not before {until}: {}",
            self.kind.name(),
            self.name,
            self.reason
        )?;
        if self.replacement.is_empty() { Ok(()) } else { write!(formatter, "; use {}", self.replacement) }
    }
}

/// The entry of something; none where it is not deprecated.
#[must_use]
pub fn of(kind: Kind, name: &str) -> Option<&'static Deprecation> {
    ALL.iter().find(|entry| entry.kind == kind && entry.name == name)
}

/// What is wrong with a register in a release, on a day: an entry that does not stay for long enough, or is past its end and there still.
/// `is_there` says of a setting whether there is one; of what is no setting nobody can say.
#[must_use]
pub fn faults(all: &[Deprecation], release: Release, today: Day, is_there: impl Fn(&str) -> bool) -> Vec<String> {
    let mut faults = Vec::new();
    for entry in all {
        let ((since, day), (until, last)) = (entry.since, entry.remove_in);
        let releases = if until.0 == since.0 { until.1.saturating_sub(since.1) } else { RELEASES };
        let months = last.months().saturating_sub(day.months() + u32::from(last.day < day.day));
        if releases < RELEASES || months < MONTHS {
            faults.push(format!(
                "{} {}: {RELEASES} minor releases and {MONTHS} months are the least, and it has {releases} and {months}",
                entry.kind.name(),
                entry.name
            ));
        }
        if release >= until && today >= last {
            faults.push(format!("{entry}. That is past: take it out, and this entry with it"));
        }
        if entry.kind == Kind::Setting && !is_there(entry.name) {
            faults.push(format!("the setting {} is in the register, and not there", entry.name));
        }
    }
    faults
}

/// An inventory: the names of a kind that users rely on, one a line. It only grows; what is taken out of it by hand was in the register first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inventory {
    /// What it is with all names that there are now.
    pub text: String,
    /// Names in it that are there no more, and were never announced: nobody could prepare for it.
    pub unannounced: Vec<String>,
}

/// Compares an inventory's text with the names that are there, and with what has gone as it should ([`GONE`]).
#[must_use]
pub fn inventory(kind: Kind, text: &str, there: &[String], gone: &[Deprecation]) -> Inventory {
    let is_gone = |name: &str| gone.iter().any(|entry| entry.kind == kind && entry.name == name);
    let is_there = |name: &str| there.iter().any(|found| found == name);
    let unannounced = text.lines().filter(|name| !is_there(name) && !is_gone(name)).map(str::to_owned).collect();
    let all: BTreeSet<&str> = text.lines().chain(there.iter().map(String::as_str)).collect();
    Inventory { text: all.iter().map(|name| format!("{name}\n")).collect(), unannounced }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn day(year: u16, month: u8, day: u8) -> Day {
        Day { year, month, day }
    }

    /// The day by the host's clock (UTC).
    fn today() -> Day {
        let mut days = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs() / 86_400;
        let is_leap = |year: u16| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
        let mut year = 1970;
        while days >= 365 + u64::from(is_leap(year)) {
            days -= 365 + u64::from(is_leap(year));
            year += 1;
        }
        let february = 28 + u64::from(is_leap(year));
        let mut month = 1;
        for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
            if days < length {
                break;
            }
            days -= length;
            month += 1;
        }
        day(year, month, u8::try_from(days + 1).unwrap())
    }

    const ENTRY: Deprecation = Deprecation {
        kind: Kind::Setting,
        name: "machine.old",
        since: ((1, 2), day(2026, 11, 27)),
        remove_in: ((1, 4), day(2027, 5, 27)),
        replacement: "machine.new",
        reason: "its unit was wrong",
    };

    #[test]
    fn an_entry_says_all_that_somebody_needs_to_know() {
        static USED: Deprecation = ENTRY;
        let used = Use { entry: &USED, place: "/etc/f:3:1".into() };
        assert_eq!(
            used.to_string(),
            "/etc/f:3:1: the setting machine.old is deprecated since 1.2 (2026-11-27) and goes with 1.4, not before 2027-05-27: \
             its unit was wrong; use machine.new"
        );
    }

    #[test]
    fn what_is_past_its_end_or_goes_too_early_is_a_fault() {
        let of = |entry: Deprecation, release, today| faults(&[entry], release, today, |key| key == "machine.old");
        assert_eq!(of(ENTRY, (1, 3), day(2028, 1, 1)), [""; 0], "the release is not there yet");
        assert_eq!(of(ENTRY, (1, 9), day(2027, 5, 26)), [""; 0], "the day is not");
        assert!(of(ENTRY, (1, 4), day(2027, 5, 27))[0].contains("take it out"));
        assert!(of(ENTRY, (2, 0), day(2027, 5, 27))[0].contains("take it out"));
        for remove_in in [((1, 3), day(2028, 1, 1)), ((1, 5), day(2027, 5, 26)), ((1, 5), day(2026, 11, 28))] {
            let early = of(Deprecation { remove_in, ..ENTRY }, (1, 2), day(2026, 11, 27));
            assert!(early[0].contains("are the least"), "{remove_in:?}: {early:?}");
        }
        let gone = of(Deprecation { name: "machine.gone", ..ENTRY }, (1, 2), day(2026, 11, 27));
        assert!(gone[0].contains("not there"), "{gone:?}");
    }

    #[test]
    fn what_goes_was_announced() {
        let there = ["a".to_owned()];
        let found = inventory(Kind::Setting, "machine.old\nb\n", &there, &[ENTRY]);
        assert_eq!(found, Inventory { text: "a\nb\nmachine.old\n".into(), unannounced: vec!["b".into()] });
        assert_eq!(inventory(Kind::Command, "machine.old\n", &there, &[ENTRY]).unannounced, ["machine.old"]);
    }

    #[test]
    fn our_own_register_is_in_order() {
        let keys: Vec<_> = crate::reference().into_iter().map(|entry| entry.key).collect();
        let mut version = env!("CARGO_PKG_VERSION").split('.').map(|part| part.parse().unwrap());
        let release = (version.next().unwrap(), version.next().unwrap());
        // This one fails because time passes: that is what it is for.
        assert_eq!(faults(ALL, release, today(), |key| keys.contains(&key)), [""; 0]);
        assert!(today() > day(2026, 11, 1) && today() < day(2200, 1, 1), "{}", today());
    }
}
