//! A line of the log in its forms.

use std::time::Duration;

use serde_json::{Map, Value};

/// What a line says.
#[derive(Debug)]
pub(super) struct Line<'a> {
    /// Since 1970.
    pub(super) at: Duration,
    pub(super) level: tracing::Level,
    pub(super) component: &'static str,
    pub(super) namespace: &'a str,
    pub(super) pod: &'a str,
    /// Of the spans that it is in.
    pub(super) fields: Vec<(&'static str, String)>,
    pub(super) text: String,
}

impl Line<'_> {
    fn level(&self) -> String {
        self.level.as_str().to_ascii_lowercase()
    }

    /// What is beside time, level and text.
    fn about(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let own = [("component", self.component), ("namespace", self.namespace), ("pod", self.pod)];
        own.into_iter().chain(self.fields.iter().map(|(name, value)| (*name, value.as_str())))
    }

    /// `key=value` by spaces, as containerd's own lines are.
    pub(super) fn text(&self) -> String {
        let (seconds, milliseconds) = (self.at.as_secs(), self.at.subsec_millis());
        let mut line = format!("time={seconds}.{milliseconds:03} level={} msg={:?}", self.level(), self.text);
        for (name, value) in self.about() {
            let is_plain = !value.is_empty() && value.chars().all(|c| c.is_ascii_graphic() && c != '"' && c != '=');
            line.push_str(&if is_plain { format!(" {name}={value}") } else { format!(" {name}={value:?}") });
        }
        line.push('\n');
        line
    }

    /// An object of JSON.
    pub(super) fn json(&self) -> String {
        let mut object = Map::new();
        object.insert("time".into(), rfc3339(self.at).into());
        object.insert("level".into(), self.level().into());
        object.insert("msg".into(), self.text.as_str().into());
        object.extend(self.about().map(|(name, value)| (name.to_owned(), value.into())));
        format!("{}\n", Value::Object(object))
    }

    /// The fields of systemd's journal (systemd: "Native Journal Protocol").
    pub(super) fn journal(&self) -> Vec<u8> {
        let priority = match self.level {
            tracing::Level::ERROR => "3",
            tracing::Level::WARN => "4",
            tracing::Level::INFO => "6",
            _ => "7",
        };
        let mut message = Vec::new();
        let mut add = |name: &str, value: &str| {
            message.extend_from_slice(name.as_bytes());
            // A value with line feeds has its length before it.
            message.push(b'\n');
            message.extend_from_slice(&(value.len() as u64).to_le_bytes());
            message.extend_from_slice(value.as_bytes());
            message.push(b'\n');
        };
        add("MESSAGE", &self.text);
        add("PRIORITY", priority);
        add("SYSLOG_IDENTIFIER", "coracle");
        for (name, value) in self.about() {
            add(&format!("CORACLE_{}", name.to_ascii_uppercase()), value);
        }
        message
    }
}

/// A time of the kind `2026-11-27T04:05:06.789Z` (RFC 3339), from what has passed since 1970.
fn rfc3339(at: Duration) -> String {
    let (days, second) = (at.as_secs() / 86_400, at.as_secs() % 86_400);
    // The days of 400 years, from 1 March of the year 0 on (Richards, "Calendars", 15.11.3).
    let shifted = days + 719_468;
    let (era, day) = (shifted / 146_097, shifted % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let of_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let (day, month_number) = (of_year - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    let year = year + era * 400 + u64::from(month_number <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month_number:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", at.subsec_millis())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (951_868_800, "2000-03-01T00:00:00.000Z"),
            (1_795_752_306, "2026-11-27T04:05:06.000Z"),
            (4_107_542_399, "2100-02-28T23:59:59.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(rfc3339(Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn the_journal_gets_lengths() {
        let line = Line {
            at: Duration::from_millis(1500),
            level: tracing::Level::WARN,
            component: "shim",
            namespace: "n",
            pod: "a b",
            fields: vec![("container", "c".into())],
            text: "one\ntwo".into(),
        };
        let journal = line.journal();
        assert!(journal.starts_with(b"MESSAGE\n\x07\0\0\0\0\0\0\0one\ntwo\nPRIORITY\n\x01\0\0\0\0\0\0\x004\n"));
        assert!(journal.ends_with(b"CORACLE_CONTAINER\n\x01\0\0\0\0\0\0\0c\n"));
        assert_eq!(
            line.text(),
            "time=1.500 level=warn msg=\"one\\ntwo\" component=shim namespace=n pod=\"a b\" container=c\n"
        );
    }
}
