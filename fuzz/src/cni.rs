//! What a network plugin answers.

use std::net::IpAddr;

use coracle_cni::{hosts, outcome, resolv_conf};

/// Runs one input: the plugin's text.
///
/// # Panics
/// Where what becomes of it is not of the files' form: an address and a name, or a name server's address, or names to search in.
pub fn one(data: &[u8]) {
    let Ok(value) = serde_json::from_slice(data) else { return };
    let found = outcome(&value);
    for line in hosts("name", &found).lines() {
        let (address, name) = line.split_once('\t').expect("two parts");
        assert!(address.parse::<IpAddr>().is_ok() && !name.is_empty(), "{line:?}");
    }
    for line in resolv_conf("nameserver 192.0.2.1\n", &found).lines() {
        let (word, rest) = line.split_once(' ').expect("a word and more");
        let is_address = || rest.split('%').next().is_some_and(|address| address.parse::<IpAddr>().is_ok());
        assert!(word == "search" || word == "nameserver" && is_address(), "{line:?}");
    }
}
