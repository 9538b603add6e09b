//! The switches of a network namespace that are changed while its links are taken over (Linux: Documentation/networking/ip-sysctl.rst).

use crate::Switches;

/// Their files, for the link `name`, each with its word for on: in the order of [`Switches`].
fn files(name: &str) -> [(String, &'static str); 4] {
    [
        ("/proc/sys/net/ipv4/ip_forward".into(), "1"),
        ("/proc/sys/net/ipv6/conf/all/forwarding".into(), "1"),
        (format!("/proc/sys/net/ipv6/conf/{name}/proxy_ndp"), "1"),
        // "do not reply for all local addresses"
        (format!("/proc/sys/net/ipv4/conf/{name}/arp_ignore"), "8"),
    ]
}

/// How they are in the calling thread's network namespace.
pub(crate) fn read(name: &str) -> Switches {
    let [forwards_v4, forwards_v6, answers_v6, is_silent_v4] =
        files(name).map(|(path, on)| std::fs::read_to_string(path).is_ok_and(|text| text.trim() == on));
    Switches { forwards_v4, forwards_v6, answers_v6, is_silent_v4 }
}

/// Makes them so, where they are not.
pub(crate) fn write(name: &str, wanted: Switches) -> std::io::Result<()> {
    let Switches { forwards_v4, forwards_v6, answers_v6, is_silent_v4 } = wanted;
    for ((path, on), wanted) in files(name).iter().zip([forwards_v4, forwards_v6, answers_v6, is_silent_v4]) {
        let is_on = std::fs::read_to_string(path).is_ok_and(|text| text.trim() == *on);
        if is_on != wanted {
            set(path, if wanted { on } else { "0" })?;
        }
    }
    Ok(())
}

/// A kernel without IPv6 has nothing to say there, nor has a link that is gone.
pub(crate) fn set(path: &str, word: &str) -> std::io::Result<()> {
    match std::fs::write(path, word) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
