//! Reading the text, which may be hostile.

use std::collections::HashSet;

use super::{Families, Family, Kind, Sample};

/// To what a text is held.
#[derive(Debug, Clone, Copy)]
pub struct Bounds<'a> {
    /// The beginnings that families' names may have; empty for any.
    pub prefixes: &'a [&'a str],
    /// The families that there may be, each of its kind and with its explanation, whatever the text says; empty for any.
    pub families: &'a [(&'a str, Kind, &'a str)],
    /// The labels that figures may have; empty for any.
    pub labels: &'a [&'a str],
    /// Labels that whoever reads it adds, and that it therefore must not have.
    pub reserved: &'a [&'a str],
    /// The most bytes that are looked at.
    pub bytes: usize,
    /// The most figures.
    pub samples: usize,
}

/// What was read.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Read {
    /// The figures.
    pub families: Families,
    /// Lines that were left out.
    pub refused: usize,
}

/// The longest line, in bytes.
const LINE_BYTES: usize = 1024;

/// The longest explanation, in characters.
const HELP_LENGTH: usize = 200;

/// The most labels of a figure.
const MAX_LABELS: usize = 16;

/// Reads a text. A family begins with its `TYPE`, before which its `HELP` may be; a figure is of the family before it. Times behind figures
/// and comments of other kinds are refused, too: neither our agent nor Kata's sends them.
#[must_use]
pub fn read(text: &str, bounds: &Bounds<'_>) -> Read {
    let mut found = Read::default();
    let mut end = bounds.bytes.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let (text, rest) = text.split_at(end);
    found.refused += usize::from(!rest.is_empty());
    let (mut help, mut samples) = ("", 0);
    // The family whose figures come now.
    let mut current: Option<(&str, Family)> = None;
    // One figure said twice is refused by whoever collects them, and all others with it.
    let mut seen: HashSet<&str> = HashSet::new();
    for line in text.lines().filter(|line| !line.is_empty()) {
        let is_taken = line.len() <= LINE_BYTES
            && if let Some(comment) = line.strip_prefix("# HELP ") {
                help = comment;
                true
            } else if let Some(comment) = line.strip_prefix("# TYPE ") {
                found.families.0.extend(current.take().map(|(name, family)| (name.to_owned(), family)));
                current = begin(comment, help, bounds, &found.families);
                current.is_some()
            } else if let Some((name, family)) = &mut current {
                let sample = sample(line, name, family.kind, bounds);
                match sample {
                    Some(sample) if samples < bounds.samples && seen.insert(series(line)) => {
                        samples += 1;
                        family.samples.push(sample);
                        true
                    }
                    _ => false,
                }
            } else {
                false
            };
        found.refused += usize::from(!is_taken);
    }
    found.families.0.extend(current.map(|(name, family)| (name.to_owned(), family)));
    found
}

/// Begins the family of a `TYPE`, where there may be such a one, and there is none yet.
fn begin<'a>(comment: &'a str, help: &str, bounds: &Bounds<'_>, families: &Families) -> Option<(&'a str, Family)> {
    let (name, kind) = comment.split_once(' ')?;
    let kind = Kind::of(kind)?;
    let is_ours = bounds.prefixes.is_empty() || bounds.prefixes.iter().any(|prefix| name.starts_with(prefix));
    if !is_ours || !is_name(name) || families.0.contains_key(name) {
        return None;
    }
    let known = bounds.families.iter().find(|(known, of, _)| *known == name && *of == kind);
    if let Some((_, _, help)) = known {
        return Some((name, Family { kind, help: (*help).to_owned(), samples: Vec::new() }));
    }
    if !bounds.families.is_empty() {
        return None;
    }
    let help = help.strip_prefix(name).and_then(|help| help.strip_prefix(' ')).unwrap_or_default();
    let help = help.chars().filter(|c| !c.is_control() && *c != '\\').take(HELP_LENGTH).collect();
    Some((name, Family { kind, help, samples: Vec::new() }))
}

/// What of a figure's line names it: all but its value.
fn series(line: &str) -> &str {
    line.rsplit_once(' ').map_or(line, |(series, _)| series)
}

fn is_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    name.len() <= 200
        && bytes.next().is_some_and(|first| first.is_ascii_alphabetic() || first == b'_')
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

/// `NAME VALUE` or `NAME{LABELS} VALUE`, of a family of this name and kind.
fn sample(line: &str, name: &str, kind: Kind, bounds: &Bounds<'_>) -> Option<Sample> {
    let rest = line.strip_prefix(name)?;
    let end = rest.bytes().position(|byte| matches!(byte, b'{' | b' '))?;
    let (suffix, rest) = rest.split_at(end);
    let suffix = *kind.suffixes().iter().find(|known| **known == suffix)?;
    let (labels, value) = match rest.strip_prefix('{') {
        Some(rest) => labels(rest, bounds)?,
        None => ("", rest),
    };
    let value = value.strip_prefix(' ')?;
    let is_number = value.bytes().all(|byte| byte.is_ascii_digit() || matches!(byte, b'.' | b'-' | b'+' | b'e' | b'E'));
    let value: f64 = value.parse().ok().filter(|value: &f64| is_number && value.is_finite())?;
    Some(Sample { suffix, labels: labels.to_owned(), value })
}

/// Labels up to their brace, and what is behind it.
fn labels<'a>(text: &'a str, bounds: &Bounds<'_>) -> Option<(&'a str, &'a str)> {
    let (mut at, mut names, mut count) = (text, [""; MAX_LABELS], 0);
    loop {
        let (name, rest) = at.split_once("=\"")?;
        // Those that begin with two underscores are Prometheus' own.
        let may_be = bounds.labels.is_empty() || bounds.labels.contains(&name);
        if !is_name(name)
            || name.starts_with("__")
            || bounds.reserved.contains(&name)
            || !may_be
            || names.contains(&name)
        {
            return None;
        }
        *names.get_mut(count)? = name;
        count += 1;
        let (mut bytes, mut end) = (rest.bytes(), 0);
        loop {
            match bytes.next()? {
                b'"' => break,
                b'\\' if matches!(bytes.next()?, b'\\' | b'"' | b'n') => end += 2,
                b'\\' | 0..0x20 | 0x7f => return None,
                // The control characters of Unicode's first page: U+0080 to U+009F.
                0xc2 if bytes.next()? < 0xa0 => return None,
                0xc2 => end += 2,
                _ => end += 1,
            }
        }
        let rest = rest.get(end + 1..)?;
        if let Some(rest) = rest.strip_prefix('}') {
            return Some((text.get(..text.len() - rest.len() - 1)?, rest));
        }
        at = rest.strip_prefix(',')?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds<'_> = Bounds {
        prefixes: &["kata_guest_", "g_"],
        families: &[],
        labels: &[],
        reserved: &["sandbox_id"],
        bytes: 4096,
        samples: 3,
    };

    #[test]
    fn what_is_written_is_read() {
        let mut families = Families::default();
        families
            .family("g_a", Kind::Gauge, "One.")
            .sample(&[("item", "x\"y\\\n,}"), ("b", "")], -1.5)
            .sample(&[], 1e300);
        let found = read(&families.to_string(), &BOUNDS);
        assert_eq!(found, Read { families, refused: 0 });
        let mut families = Families::default();
        families.family("g_h", Kind::Histogram, "").histogram(&[], &[], &[4], 2.0);
        assert_eq!(read(&families.to_string(), &BOUNDS).families, families);
    }

    #[test]
    fn what_is_not_of_the_format_is_left_out() {
        let head = "# HELP g_a One.\n# TYPE g_a gauge\n";
        for line in [
            "g_a{sandbox_id=\"other\"} 1",
            "g_a{item=\"a\",sandbox_id=\"b\"} 1",
            "g_a{item=\"a} 1",
            "g_a{item=\"a\"} 1 1700000000",
            "g_a{item=\"a\\x\"} 1",
            "g_a{item=\"a\u{7}\"} 1",
            "g_a{} 1",
            "g_a{a=\"1\",a=\"2\"} 1",
            "g_a{__name__=\"kata_shim_threads\"} 1",
            "g_a{item=\"a\"b=\"c\"} 1",
            "g_a{9=\"a\"} 1",
            "g_a NaN",
            "g_a +Inf",
            "g_a infinity",
            "g_a 1e999",
            "g_a  1",
            "g_a_bucket{le=\"1\"} 1",
            "g_b 1",
            "kata_shim_threads 1",
            "# EOF",
            "garbage",
            "# TYPE kata_shim_threads gauge",
            "# TYPE g_a gauge",
            "# TYPE g_c summary",
        ] {
            let found = read(&format!("{head}{line}\n"), &BOUNDS);
            assert_eq!(found.refused, 1, "{line}");
            assert_eq!(found.families.to_string(), "", "{line}");
        }
    }

    #[test]
    fn only_known_families_and_labels_are_taken() {
        let bounds = Bounds { families: &[("g_a", Kind::Gauge, "Ours.")], labels: &["item"], ..BOUNDS };
        let found = read("# HELP g_a Theirs.\n# TYPE g_a gauge\ng_a{item=\"x\"} 1\ng_a{other=\"x\"} 1\n", &bounds);
        assert_eq!(
            (found.families.to_string().as_str(), found.refused),
            ("# HELP g_a Ours.\n# TYPE g_a gauge\ng_a{item=\"x\"} 1\n", 1)
        );
        for wrong in ["# TYPE g_a counter\ng_a 1\n", "# TYPE g_b gauge\ng_b 1\n"] {
            assert_eq!(read(wrong, &bounds), Read { families: Families::default(), refused: 2 }, "{wrong}");
        }
    }

    #[test]
    fn a_flood_is_cut() {
        let figures: String = (0..10).map(|number| format!("g_a{{n=\"{number}\"}} 1\n")).collect();
        let text = format!("# TYPE g_a gauge\n{figures}");
        let found = read(&text, &BOUNDS);
        assert_eq!((found.families.to_string().matches("g_a{").count(), found.refused), (3, 7));
        // The same one again is none.
        assert_eq!(read("# TYPE g_a gauge\ng_a 1\ng_a 2\n", &BOUNDS).refused, 1);
        let long = format!("# TYPE g_a gauge\ng_a{{x=\"{}\"}} 1\n", "é".repeat(600));
        assert_eq!(read(&long, &BOUNDS).refused, 1);
        let long = format!("# TYPE g_a gauge\n# HELP g_a {}", "é".repeat(5000));
        assert!(read(&long, &BOUNDS).refused >= 1);
    }
}
