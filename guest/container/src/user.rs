//! Who the process is: numbers from the specification, or names from the container's own files.
//!
//! The files are parsed here. glibc's look-ups would load a library from the container's root into this process.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

use oci_spec::runtime::Process;

use crate::{Error, Result};

/// The most that is read of `/etc/passwd` or `/etc/group`, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// A process's identity.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    pub(crate) home: String,
}

/// The identity that `process` asks for, looked up in the root that this process is in.
///
/// `user.username`, where there is one, is `USER[:GROUP]`, each a name or a number, as with `docker run --user`.
pub(crate) fn resolve(process: &Process) -> Result<Identity> {
    let passwd = read("/etc/passwd");
    let group = read("/etc/group");
    let user = process.user();
    let named = user.username().as_deref().unwrap_or_default();
    let mut identity = if named.is_empty() {
        let mut identity = by_numbers(user.uid(), user.gid(), &passwd);
        identity.groups = user.additional_gids().clone().unwrap_or_default();
        identity
    } else {
        by_name(named, &passwd, &group)?
    };
    if identity.home.is_empty() {
        identity.home = "/".into();
    }
    Ok(identity)
}

fn read(path: &str) -> String {
    let mut text = Vec::new();
    // A container without these files has no names: that is no error until one is asked for.
    // Nor is something else in a file's place, which could keep a reader waiting.
    let opened = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
    if let Ok(file) = opened
        && file.metadata().is_ok_and(|metadata| metadata.is_file())
    {
        let _ = file.take(FILE_BYTES_MAX).read_to_end(&mut text);
    }
    String::from_utf8_lossy(&text).into_owned()
}

struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn accounts(passwd: &str) -> impl Iterator<Item = Account<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        Some(Account { name, uid, gid, home: fields.nth(1).unwrap_or_default() })
    })
}

fn groups(group: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some((name, gid, fields.next().unwrap_or_default()))
    })
}

fn by_numbers(uid: u32, gid: u32, passwd: &str) -> Identity {
    let home = accounts(passwd).find(|account| account.uid == uid).map_or("", |account| account.home);
    Identity { uid, gid, groups: Vec::new(), home: home.to_owned() }
}

fn by_name(named: &str, passwd: &str, group: &str) -> Result<Identity> {
    let (user, wanted_group) = named.split_once(':').map_or((named, None), |(user, group)| (user, Some(group)));
    let account = accounts(passwd)
        .find(|account| account.name == user)
        .or_else(|| user.parse().ok().and_then(|uid: u32| accounts(passwd).find(|account| account.uid == uid)));
    let (uid, own_gid, home) = match (&account, user.parse::<u32>()) {
        (Some(account), _) => (account.uid, account.gid, account.home),
        (None, Ok(uid)) => (uid, 0, ""),
        (None, Err(_)) => {
            return Err(Error::Invalid(format!("unable to find user {user}: no matching entries in passwd file")));
        }
    };
    let gid = match wanted_group {
        None | Some("") => own_gid,
        Some(wanted) => groups(group)
            .find(|(name, _, _)| *name == wanted)
            .map(|(_, gid, _)| gid)
            .or_else(|| wanted.parse().ok())
            .ok_or_else(|| {
                Error::Invalid(format!("unable to find group {wanted}: no matching entries in group file"))
            })?,
    };
    let name = account.map_or(user, |account| account.name);
    let supplementary = if wanted_group.is_none_or(str::is_empty) {
        groups(group)
            .filter(|(_, _, members)| members.split(',').any(|member| member == name))
            .map(|(_, gid, _)| gid)
            .collect()
    } else {
        Vec::new()
    };
    Ok(Identity { uid, gid, groups: supplementary, home: home.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken\napp:x:1000:1001::/home/app:/bin/sh\n";
    const GROUP: &str = "root:x:0:\nstaff:x:50:app,other\naudio:x:29:other,app\nbad:x:y:app\n";

    #[test]
    fn a_name_brings_its_groups_and_home() {
        let identity = by_name("app", PASSWD, GROUP).unwrap();
        assert_eq!(identity, Identity { uid: 1000, gid: 1001, groups: vec![50, 29], home: "/home/app".into() });
    }

    #[test]
    fn a_group_that_is_named_replaces_the_others() {
        let identity = by_name("app:staff", PASSWD, GROUP).unwrap();
        assert_eq!((identity.gid, identity.groups.len()), (50, 0));
        assert_eq!(by_name("1000:7", PASSWD, GROUP).unwrap().gid, 7);
    }

    #[test]
    fn numbers_need_no_entry_but_names_do() {
        assert_eq!(by_name("4242", PASSWD, GROUP).unwrap().uid, 4242);
        assert!(by_name("ghost", PASSWD, GROUP).is_err());
        assert!(by_name("app:ghost", PASSWD, GROUP).is_err());
        assert_eq!(by_numbers(1000, 5, PASSWD).home, "/home/app");
    }
}
