//! Landlock, where the kernel has it: no file may be opened, made or run, wherever it is. The jail's root has only sockets;
//! this is for what somebody may find a way to.

use landlock::{ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, Scope};

use crate::Error;

/// The newest version whose rights are asked for; an older kernel takes those that it knows.
const NEWEST: ABI = ABI::V6;

pub(super) fn forbid() -> Result<(), Error> {
    let failed = |error: landlock::RulesetError| Error::Invalid(format!("landlock refuses the jail's rules: {error}"));
    let rules = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))
        .and_then(|rules| rules.handle_access(AccessNet::from_all(NEWEST)))
        .and_then(|rules| rules.scope(Scope::from_all(NEWEST)))
        .map_err(failed)?;
    // A kernel without landlock is no error: it is the last of several walls.
    let status = rules.create().and_then(landlock::RulesetCreated::restrict_self).map_err(failed)?;
    log::debug!("landlock: {:?}", status.ruleset);
    Ok(())
}
