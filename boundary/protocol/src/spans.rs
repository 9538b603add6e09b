//! Spans of a trace: how the host names the one on whose behalf it asks, and how the guest tells its own.
//!
//! The context goes with a request as the metadata `traceparent` (W3C Trace Context, level 1, 3.2). A guest that is asked with one records a span and
//! gives it to whoever asks [`SERVICE`] for it: `Spans {}` answers `{"spans": [Span]}` as soon as there are any. A peer without that service has none.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

/// Our own service beside Kata's.
pub const SERVICE: &str = "coracle.Guest";

/// Waits for spans.
pub const SPANS: &str = "Spans";

/// By which the context goes with a request.
pub const METADATA: &str = "traceparent";

/// The most spans of one answer.
pub const SPANS_MAX: usize = 256;

/// The largest answer that is read, in bytes: as many spans as there may be, with texts as long.
pub const ANSWER_BYTES: usize = 512 << 10;

/// The longest name and error, in bytes.
pub const TEXT_BYTES: usize = 256;

/// A span's place in a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Context {
    /// The trace.
    pub trace: u128,
    /// The span.
    pub span: u64,
}

impl Context {
    /// A span of a trace of its own.
    #[must_use]
    pub fn new() -> Self {
        let trace = u128::from(random()) << 64 | u128::from(random());
        Self { trace, span: random() }
    }

    /// A span below this one.
    #[must_use]
    pub fn below(self) -> Self {
        Self { span: random(), ..self }
    }

    /// Reads a `traceparent`; none where it is not one, or says that nobody records.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('-');
        let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let is_hex = |part: &str, length| {
            part.len() == length && part.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
        };
        if !is_hex(version, 2) || version == "ff" || version == "00" && parts.next().is_some() {
            return None;
        }
        if !is_hex(trace, 32) || !is_hex(span, 16) || !is_hex(flags, 2) || u8::from_str_radix(flags, 16).ok()? & 1 == 0
        {
            return None;
        }
        let context = Self { trace: u128::from_str_radix(trace, 16).ok()?, span: u64::from_str_radix(span, 16).ok()? };
        (context.trace != 0 && context.span != 0).then_some(context)
    }
}

impl Default for Context {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Display for Context {
    /// As a `traceparent` whose span is recorded.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "00-{:032x}-{:016x}-01", self.trace, self.span)
    }
}

/// A time as spans have it: nanoseconds since 1970.
#[must_use]
pub fn nanoseconds(at: SystemTime) -> u64 {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// A random number that is not 0.
fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // Its keys are random (std: `RandomState::new`), and no two are alike.
    std::collections::hash_map::RandomState::new().build_hasher().finish().max(1)
}

/// A span that has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// Its place, as a `traceparent`.
    pub context: String,
    /// The span that it is below, by its number.
    pub parent: u64,
    /// What was done.
    pub name: String,
    /// When, in nanoseconds since 1970, by the clock of whoever did it.
    pub begun: u64,
    /// Until when.
    pub ended: u64,
    /// Why it failed; empty where it did not.
    #[serde(default)]
    pub error: String,
}

/// What `Spans` answers.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Spans {
    /// The spans.
    pub spans: Vec<Span>,
}

impl Spans {
    /// Reads the guest's answer: only whole spans of the trace of `of`, with short and printable texts and an end behind their beginning.
    #[must_use]
    pub fn read(bytes: &[u8], of: impl Fn(u128) -> bool) -> Vec<(Context, Span)> {
        if bytes.len() > ANSWER_BYTES {
            return Vec::new();
        }
        let Ok(Self { spans }) = serde_json::from_slice(bytes) else { return Vec::new() };
        let is_text = |text: &str| text.len() <= TEXT_BYTES && !text.chars().any(char::is_control);
        let whole = spans.into_iter().take(SPANS_MAX).filter_map(|span| {
            let context = Context::parse(&span.context).filter(|context| of(context.trace))?;
            let is_sane = is_text(&span.name) && is_text(&span.error) && span.begun <= span.ended && span.parent != 0;
            is_sane.then_some((context, span))
        });
        whole.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_are_those_of_the_standard() {
        let text = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let context = Context::parse(text).unwrap();
        assert_eq!(context.to_string(), text);
        let below = context.below();
        assert!(below.trace == context.trace && below.span != context.span);
        assert_ne!(Context::new().trace, Context::new().trace);
        // A later version may have more behind.
        assert!(Context::parse(&format!("cc{}-more", &text[2..])).is_some());
        for wrong in [
            "",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01",
        ] {
            assert_eq!(Context::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn what_a_guest_says_is_looked_at() {
        let context = Context::new();
        let good = Span {
            context: context.below().to_string(),
            parent: context.span,
            name: "CreateContainer".into(),
            begun: 1,
            ended: 2,
            error: String::new(),
        };
        let mut spans = vec![good.clone(); 7];
        spans[1].context = Context::new().to_string();
        spans[2].ended = 0;
        spans[3].name = "x".repeat(TEXT_BYTES + 1);
        spans[4].error = "\u{1b}".into();
        spans[5].parent = 0;
        spans[6].context = "none".into();
        let bytes = serde_json::to_vec(&Spans { spans }).unwrap();
        let found = Spans::read(&bytes, |trace| trace == context.trace);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].1, good);
        let many = serde_json::to_vec(&Spans { spans: vec![good; SPANS_MAX + 1] }).unwrap();
        assert_eq!(Spans::read(&many, |_| true).len(), SPANS_MAX);
        assert!(Spans::read(b"[1]", |_| true).is_empty());
        assert!(Spans::read(&vec![b' '; ANSWER_BYTES + 1], |_| true).is_empty());
    }
}
