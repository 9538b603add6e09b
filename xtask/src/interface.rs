//! docs/reference/boundary.txt: what crosses from one wing to the other, item by item. It is text, so that a change of it is seen as one.

use std::collections::BTreeMap;

use anyhow::Result;

use crate::steps::{files, top};

/// Each file's public items, by their first lines, and the wire's messages with their numbers.
fn find() -> Result<BTreeMap<String, Vec<String>>> {
    let mut found = BTreeMap::new();
    for path in files(&["boundary/*.rs", "boundary/*.proto"])? {
        if path.contains("/tests/") || path.ends_with("build.rs") {
            continue;
        }
        let text = std::fs::read_to_string(top().join(&path)).unwrap_or_default();
        let items = if path.ends_with(".proto") { messages(&text) } else { items(&text) };
        if !items.is_empty() {
            found.insert(path, items);
        }
    }
    Ok(found)
}

/// Public items of Rust source: each up to its body, on one line, and what is in the bodies of enums and traits.
fn items(text: &str) -> Vec<String> {
    let mut items = Vec::new();
    let mut open: Option<String> = None;
    // Whose body the lines are in, where all of it is public.
    let mut body: Option<String> = None;
    for line in text.lines().take_while(|line| *line != "#[cfg(test)]") {
        let indent = line.len() - line.trim_start().len();
        let line = line.trim();
        if body.is_some() && indent == 0 && line == "}" {
            body = None;
        }
        let begins =
            line.starts_with("pub ") || body.is_some() && indent == 4 && !line.starts_with(['/', '#', '}', ')']);
        match &mut open {
            Some(item) => {
                item.push(' ');
                item.push_str(line);
            }
            None if begins => open = Some(body.as_ref().map_or_else(|| line.to_owned(), |of| format!("{of}: {line}"))),
            None => {}
        }
        let is_whole = |item: &mut String| {
            item.ends_with(['{', ';', ',', '}']) && item.matches('(').count() == item.matches(')').count()
        };
        if let Some(item) = open.take_if(is_whole) {
            let is_body = item.ends_with('{') && indent == 0;
            let item = item.trim_end_matches(['{', ';', ',']).trim().to_owned();
            let name = ["pub enum ", "pub trait "].iter().find_map(|word| item.strip_prefix(word));
            if let Some(name) = name.filter(|_| is_body) {
                body = Some(name.split([':', '<', ' ']).next().unwrap_or_default().to_owned());
            }
            items.push(item);
        }
    }
    items
}

/// Messages, their fields and numbers, and the services' methods.
fn messages(text: &str) -> Vec<String> {
    let is_wanted = |line: &&str| {
        let is_field = line.contains(" = ") && line.ends_with(';');
        let is_said = line.starts_with("option ") || line.starts_with("syntax");
        (is_field && !is_said)
            || ["message ", "enum ", "service ", "rpc ", "package "].iter().any(|word| line.starts_with(word))
    };
    let lines = text.lines().map(|line| line.split("//").next().unwrap_or_default().trim());
    lines.filter(is_wanted).map(|line| line.trim_end_matches(" {").to_owned()).collect()
}

#[test]
fn what_crosses_is_what_the_reference_says() {
    let found = find().unwrap();
    assert!(found.keys().any(|path| path.ends_with(".proto")) && found.len() > 3, "{:?}", found.keys());
    let mut page =
        "What crosses from one wing to the other. Made by `cargo xtask docs` from the source; not written by hand.\n"
            .to_owned();
    for (path, items) in &found {
        page.push_str(&format!("\n{path}\n"));
        items.iter().for_each(|item| page.push_str(&format!("  {item}\n")));
    }
    let file = top().join("docs/reference/boundary.txt");
    if std::env::var_os("CORACLE_DOCS").is_some_and(|wish| wish == "write") {
        std::fs::write(&file, &page).unwrap();
    }
    let known = std::fs::read_to_string(&file).unwrap_or_default();
    let differs = page.lines().zip(known.lines()).find(|(now, then)| now != then);
    assert!(
        page == known,
        "docs/reference/boundary.txt is out of date ({differs:?}): look at what changed for the other wing, then `cargo xtask docs`"
    );
}

#[test]
fn items_are_read_up_to_their_bodies() {
    let text = "pub fn a(\n    b: u8,\n    c: u8,\n) -> u8 {\n}\npub struct B {\n    pub d: u8,\n    e: u8,\n}\nfn hidden() {}\n#[cfg(test)]\npub fn test() {}\n";
    let found = items(text);
    assert_eq!(found, ["pub fn a( b: u8, c: u8, ) -> u8", "pub struct B", "pub d: u8"]);
    let whole = "pub enum A {\n    /// b\n    B,\n    C {\n        d: u8,\n    },\n    E(u8),\n}\npub trait F {\n    fn g(&self) -> u8;\n}\n";
    assert_eq!(items(whole), ["pub enum A", "A: B", "A: C", "A: E(u8)", "pub trait F", "F: fn g(&self) -> u8"]);
    let proto = "syntax = \"proto3\";\nmessage A {\n  string b = 1; // c\n  optional uint32 e = 2;\n}\nservice S {\n  rpc D(A) returns (A);\n}\n";
    assert_eq!(
        messages(proto),
        ["message A", "string b = 1;", "optional uint32 e = 2;", "service S", "rpc D(A) returns (A);"]
    );
}
