//! What a guest's console tells of its end.

/// The reason that the last lines of a console give: a panic of the kernel, or the words of our own init. `None` where
/// they say nothing of an end.
#[must_use]
pub fn reason(lines: &[String]) -> Option<String> {
    let found = |text: &str| lines.iter().rev().find_map(|line| line.find(text).and_then(|at| line.get(at..)));
    if let Some(line) = found("Kernel panic") {
        return Some(format!("the guest's kernel panicked: {line}"));
    }
    found("coracle-init: ").map(|line| line.replacen("coracle-init: ", "the guest has ended: ", 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_comes_before_what_init_has_said() {
        let lines = |text: &[&str]| text.iter().map(|line| (*line).to_owned()).collect::<Vec<_>>();
        assert_eq!(
            reason(&lines(&["boots", "[    1.0] coracle-init: no agent", "more"])).unwrap(),
            "the guest has ended: no agent"
        );
        let panicked = reason(&lines(&["[1] Kernel panic - not syncing: x", "coracle-init: y"])).unwrap();
        assert_eq!(panicked, "the guest's kernel panicked: Kernel panic - not syncing: x");
        assert_eq!(reason(&lines(&["quiet"])), None);
    }
}
