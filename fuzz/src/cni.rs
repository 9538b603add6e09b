//! What a network plugin answers.

use coracle_cni::{hosts, outcome, resolv_conf};

/// Runs one input: the plugin's text.
///
/// # Panics
/// Where what becomes of it has more lines than it says addresses or name servers.
pub fn one(data: &[u8]) {
    let Ok(value) = serde_json::from_slice(data) else { return };
    let found = outcome(&value);
    for text in [hosts("name", &found), resolv_conf("nameserver 192.0.2.1\n", &found)] {
        assert!(text.lines().count() <= data.len() + 8, "{text}");
    }
}
