//! Figures as text: the Prometheus exposition format, version 0.0.4, in which the guest answers `GetMetrics`, and a pod whoever asks for its.
//!
//! One structure is written and read: [`Families`]. What is read may be hostile: it is held to [`Bounds`], and whatever is not
//! exactly of the format is left out and counted.

mod guest;
mod process;
mod read;

use std::collections::BTreeMap;
use std::fmt::Write;

pub use guest::GUEST;
pub use process::{Process, number, process};
pub use read::{Bounds, Read, read};

/// To what a shim's text is held: its own families and its guest's, which whoever collects them tells apart by the pod.
pub const SHIM: Bounds<'_> = Bounds {
    prefixes: &["kata_", "coracle_"],
    families: &[],
    labels: &[],
    reserved: &["sandbox_id"],
    bytes: 2 << 20,
    samples: 20_000,
};

/// What kind of figures a family has (exposition format, `TYPE`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Goes up and down.
    Gauge,
    /// Only goes up.
    Counter,
    /// Counts of what was at most so much.
    Histogram,
}

impl Kind {
    /// Its word.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gauge => "gauge",
            Self::Counter => "counter",
            Self::Histogram => "histogram",
        }
    }

    fn of(name: &str) -> Option<Self> {
        [Self::Gauge, Self::Counter, Self::Histogram].into_iter().find(|kind| kind.name() == name)
    }

    /// What a sample's name may have behind the family's.
    const fn suffixes(self) -> &'static [&'static str] {
        match self {
            Self::Gauge | Self::Counter => &[""],
            Self::Histogram => &["_bucket", "_sum", "_count"],
        }
    }
}

/// Figures of one name.
#[derive(Debug, Clone, PartialEq)]
pub struct Family {
    kind: Kind,
    help: String,
    samples: Vec<Sample>,
}

#[derive(Debug, Clone, PartialEq)]
struct Sample {
    suffix: &'static str,
    /// As they are written, without braces: `item="utime",cpu="0"`; empty for none.
    labels: String,
    value: f64,
}

impl Family {
    /// Adds a figure with these labels, which are names and values.
    pub fn sample(&mut self, labels: &[(&str, &str)], value: f64) -> &mut Self {
        self.samples.push(Sample { suffix: "", labels: rendered(labels), value });
        self
    }

    /// Adds the figures of a histogram: counts of what was at most each of `bounds`, one more for all, and the sum. Of figures that are not
    /// one more than the bounds, nothing is added.
    pub fn histogram(&mut self, labels: &[(&str, &str)], bounds: &[f64], counts: &[u64], sum: f64) -> &mut Self {
        if counts.len() != bounds.len() + 1 {
            return self;
        }
        let mut total = 0;
        let names = bounds.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
        for (bound, count) in names.zip(counts) {
            total += count;
            let mut with = labels.to_vec();
            with.push(("le", &bound));
            self.samples.push(Sample { suffix: "_bucket", labels: rendered(&with), value: count_of(total) });
        }
        self.samples.push(Sample { suffix: "_sum", labels: rendered(labels), value: sum });
        self.samples.push(Sample { suffix: "_count", labels: rendered(labels), value: count_of(total) });
        self
    }
}

/// A count as the format has it.
#[must_use]
pub fn count_of(count: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "the format's figures are floating-point numbers")]
    let value = count as f64;
    value
}

/// The whole number that it is, where it is one and no other number of its size is written so.
fn whole(value: f64) -> Option<i64> {
    const EXACT: f64 = 9_007_199_254_740_992.0; // 2^53
    #[expect(clippy::cast_possible_truncation, reason = "it is whole, and less than 2^53")]
    (value.fract() == 0.0 && value.abs() < EXACT).then_some(value as i64)
}

fn rendered(labels: &[(&str, &str)]) -> String {
    let mut text = String::new();
    for (name, value) in labels {
        let comma = if text.is_empty() { "" } else { "," };
        let _ = write!(text, "{comma}{name}=\"");
        for c in value.chars() {
            match c {
                '\\' => text.push_str("\\\\"),
                '"' => text.push_str("\\\""),
                '\n' => text.push_str("\\n"),
                other => text.push(other),
            }
        }
        text.push('"');
    }
    text
}

/// Figures by their names.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Families(BTreeMap<String, Family>);

impl Families {
    /// The family of a name; where it is new, of this kind, and explained so.
    pub fn family(&mut self, name: &str, kind: Kind, help: &str) -> &mut Family {
        let new = || Family { kind, help: help.to_owned(), samples: Vec::new() };
        self.0.entry(name.to_owned()).or_insert_with(new)
    }

    /// Adds a figure without labels.
    pub fn figure(&mut self, name: &str, kind: Kind, help: &str, value: f64) {
        self.family(name, kind, help).sample(&[], value);
    }

    /// Puts these labels in front of those of each figure.
    pub fn label(&mut self, labels: &[(&str, &str)]) {
        let front = rendered(labels);
        for sample in self.0.values_mut().flat_map(|family| &mut family.samples) {
            sample.labels = if sample.labels.is_empty() { front.clone() } else { format!("{front},{}", sample.labels) };
        }
    }

    /// Takes others in. What has a name of ours and is of another kind is left out.
    pub fn merge(&mut self, others: Self) {
        for (name, mut other) in others.0 {
            match self.0.get_mut(&name) {
                Some(own) if own.kind == other.kind => own.samples.append(&mut other.samples),
                Some(_) => {}
                None => {
                    self.0.insert(name, other);
                }
            }
        }
    }

    /// Leaves out figures that are not among those `known`, which takes up to `max` of them; how many were left out. So there are never more series than
    /// that, however often somebody asks.
    pub fn keep_known(&mut self, known: &mut std::collections::HashSet<u64>, max: usize) -> usize {
        use std::hash::{DefaultHasher, Hash, Hasher};
        let mut left_out = 0;
        for (name, family) in &mut self.0 {
            family.samples.retain(|sample| {
                let mut hasher = DefaultHasher::new();
                (name, sample.suffix, &sample.labels).hash(&mut hasher);
                let is_known = known.contains(&hasher.finish()) || known.len() < max && known.insert(hasher.finish());
                left_out += usize::from(!is_known);
                is_known
            });
        }
        left_out
    }

    /// Keeps families whose names are so.
    pub fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        self.0.retain(|name, _| keep(name));
    }

    /// The value of a figure by its name and its labels as they are written; for people and tests.
    #[must_use]
    pub fn value(&self, name: &str, labels: &str) -> Option<f64> {
        let samples = &self.0.get(name)?.samples;
        samples.iter().find(|sample| sample.labels == labels).map(|sample| sample.value)
    }
}

impl std::fmt::Display for Families {
    /// The text.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (name, Family { kind, help, samples }) in self.0.iter().filter(|(_, family)| !family.samples.is_empty()) {
            let help = help.replace('\\', "\\\\").replace('\n', "\\n");
            write!(formatter, "# HELP {name} {help}\n# TYPE {name} {}\n", kind.name())?;
            for Sample { suffix, labels, value } in samples {
                let (open, close) = if labels.is_empty() { ("", "") } else { ("{", "}") };
                write!(formatter, "{name}{suffix}{open}{labels}{close} ")?;
                // Whole numbers as they are, which most are; what would take hundreds of digits shorter.
                match whole(*value) {
                    Some(whole) => writeln!(formatter, "{whole}")?,
                    None if (1e-6..1e18).contains(&value.abs()) => writeln!(formatter, "{value}")?,
                    None => writeln!(formatter, "{value:e}")?,
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two() -> Families {
        let mut families = Families::default();
        families.family("b", Kind::Gauge, "Two\nlines.").sample(&[("item", "a\"\\\nb")], 1.5).sample(&[], 2.0);
        families.family("a", Kind::Histogram, "Times.").histogram(&[("x", "y")], &[0.5, 1.0], &[1, 0, 2], 7.25);
        families.family("none", Kind::Gauge, "Nothing.");
        families
    }

    #[test]
    fn the_text_is_of_the_format() {
        let text = "# HELP a Times.\n# TYPE a histogram\na_bucket{x=\"y\",le=\"0.5\"} 1\na_bucket{x=\"y\",le=\"1\"} 1\n\
                    a_bucket{x=\"y\",le=\"+Inf\"} 3\na_sum{x=\"y\"} 7.25\na_count{x=\"y\"} 3\n\
                    # HELP b Two\\nlines.\n# TYPE b gauge\nb{item=\"a\\\"\\\\\\nb\"} 1.5\nb 2\n";
        assert_eq!(two().to_string(), text);
    }

    #[test]
    fn there_are_never_more_series_than_that() {
        let mut known = std::collections::HashSet::new();
        let mut of = |label: &str| {
            let mut families = Families::default();
            families.family("a", Kind::Gauge, "").sample(&[("x", label)], 1e300);
            (families.keep_known(&mut known, 2), families.to_string())
        };
        assert_eq!(of("1").0, 0);
        assert_eq!(of("2").0, 0);
        assert_eq!(of("3"), (1, String::new()));
        assert_eq!(of("1"), (0, "# HELP a \n# TYPE a gauge\na{x=\"1\"} 1e300\n".to_owned()));
    }

    #[test]
    fn pods_are_told_apart_and_stand_together() {
        let (mut one, mut other) = (two(), two());
        one.label(&[("sandbox_id", "1")]);
        other.label(&[("sandbox_id", "2")]);
        one.merge(other);
        let text = one.to_string();
        assert_eq!(text.matches("# TYPE b gauge").count(), 1, "{text}");
        assert!(text.contains("b{sandbox_id=\"1\"} 2\n") && text.contains("b{sandbox_id=\"2\"} 2\n"), "{text}");
        assert_eq!(one.value("b", "sandbox_id=\"2\""), Some(2.0));
        let mut kind = Families::default();
        kind.figure("b", Kind::Counter, "", 9.0);
        one.merge(kind);
        assert!(!one.to_string().contains(" 9\n"));
    }
}
