//! What a guest says of what it did for the host, and its greeting.

use coracle_protocol::hello;
use coracle_protocol::spans::Spans;

/// Runs one input.
///
/// # Panics
/// Where a span is taken that no trace of the host's has, or a greeting that is not the version's.
pub fn one(data: &[u8]) {
    for (context, span) in Spans::read(data, |trace| trace % 2 == 1) {
        assert_eq!(context.trace % 2, 1);
        assert!(span.begun <= span.ended && span.parent != 0, "{span:?}");
        assert!(!(span.name + &span.error).chars().any(char::is_control));
    }
    match hello::check(data, "1.0") {
        Ok(()) => assert!(String::from_utf8_lossy(data).contains("1.0")),
        Err(error) => assert!(error.to_string().len() < 512, "{error}"),
    }
}
