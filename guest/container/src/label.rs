//! Labels of mandatory access control (runtime-spec, config.md, "apparmorProfile" and "selinuxLabel"): the kernel gives them to
//! the process at its exec. A label that this guest can't apply fails the start.

use std::path::Path;

use oci_spec::runtime::Process;

use crate::error::Step;
use crate::init::write_existing;
use crate::{Error, Result};

/// Labels what this thread executes next, as `process` says.
pub(crate) fn set(process: &Process) -> Result<()> {
    if let Some(profile) = process.apparmor_profile().as_deref().filter(|profile| !profile.is_empty()) {
        apparmor(profile)?;
    }
    if let Some(label) = process.selinux_label().as_deref().filter(|label| !label.is_empty()) {
        if !Path::new("/sys/fs/selinux/enforce").exists() {
            return Err(Error::Invalid(format!("the SELinux label {label}: the guest's kernel has no SELinux")));
        }
        write_existing(Path::new("/proc/thread-self/attr/exec"), label).step(|| format!("set the label {label}"))?;
    }
    Ok(())
}

fn apparmor(profile: &str) -> Result<()> {
    if profile == "unconfined" {
        return Ok(());
    }
    let enabled = std::fs::read_to_string("/sys/module/apparmor/parameters/enabled");
    if !enabled.is_ok_and(|enabled| enabled.starts_with('Y')) {
        return Err(Error::Invalid(format!("the AppArmor profile {profile}: the guest's kernel has no AppArmor")));
    }
    let own = Path::new("/proc/thread-self/attr/apparmor/exec");
    let file = if own.exists() { own } else { Path::new("/proc/thread-self/attr/exec") };
    write_existing(file, &format!("exec {profile}")).map_err(|error| match error.raw_os_error() {
        Some(libc::ENOENT) => Error::Invalid(format!("the guest has no AppArmor profile {profile}")),
        _ => {
            Err::<(), _>(error).step(|| format!("set the AppArmor profile {profile}")).err().unwrap_or(Error::InitGone)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_that_can_not_be_applied_is_an_error() {
        let mut process = Process::default();
        set(&process).unwrap();
        process.set_apparmor_profile(Some("unconfined".into()));
        set(&process).unwrap();
        process.set_apparmor_profile(Some("no-such-profile-anywhere".into()));
        assert!(set(&process).unwrap_err().to_string().contains("no-such-profile-anywhere"));
        process.set_apparmor_profile(None).set_selinux_label(Some("a:b:c".into()));
        // Where the tests run on a kernel with SELinux it refuses the label itself.
        assert!(set(&process).unwrap_err().to_string().contains("a:b:c"));
    }
}
