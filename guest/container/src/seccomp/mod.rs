//! Seccomp: a profile of the OCI specification (runtime-spec, config-linux.md, "Seccomp") becomes a filter of the kernel's
//! (Linux: Documentation/userspace-api/seccomp_filter.rst), and is applied or fails the start. It is never left out.
//!
//! ```text
//! profile ─▶ per architecture: number ─▶ rules (this file) ─▶ instructions (assemble.rs) ─▶ kernel
//! ```
//!
//! What a profile can't mean: calls of the x32 convention are refused whatever it says, and calls that are newer than any
//! that it names do not exist (ENOSYS), so that programs fall back to older ones.

mod assemble;
mod numbers;

use std::collections::BTreeMap;

use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator,
};

use crate::error::Step;
use crate::{Error, Result};

use assemble::Instruction;
use numbers::Numbers;

/// `AUDIT_ARCH_X86_64` and `AUDIT_ARCH_I386` (linux/audit.h).
const AUDIT_X86_64: u32 = 0xc000_003e;
const AUDIT_X86: u32 = 0x4000_0003;

/// The bit that marks calls of the x32 convention (`__X32_SYSCALL_BIT`).
const X32: u32 = 0x4000_0000;

/// The kernel's return values (linux/seccomp.h), to which an error or trace number is added.
const KILL_PROCESS: u32 = 0x8000_0000;
const KILL_THREAD: u32 = 0x0000_0000;
const TRAP: u32 = 0x0003_0000;
const ERRNO: u32 = 0x0005_0000;
const TRACE: u32 = 0x7ff0_0000;
const LOG: u32 = 0x7ffc_0000;
const ALLOW: u32 = 0x7fff_0000;

/// The kernel's longest filter, in instructions (`BPF_MAXINSNS`).
const INSTRUCTIONS_MAX: usize = 4096;

/// A condition on one argument of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Condition {
    argument: u32,
    operator: LinuxSeccompOperator,
    value: u64,
    /// Of a masked comparison: what the masked argument must be.
    datum: u64,
}

/// What becomes of a call where all conditions hold.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    conditions: Vec<Condition>,
    verdict: u32,
}

/// The rules of one call, in order; the last one may have no condition.
type Rules = Vec<Rule>;

/// The rules for one architecture.
struct Table {
    audit: u32,
    calls: BTreeMap<u32, Rules>,
}

/// A profile that was made into what the kernel takes.
#[derive(Debug)]
pub(crate) struct Filter {
    instructions: Vec<libc::sock_filter>,
    flags: libc::c_ulong,
}

impl Filter {
    /// Makes the filter of a profile.
    ///
    /// # Errors
    /// [`Error::Invalid`] for what a filter can't do.
    pub(crate) fn new(profile: &LinuxSeccomp) -> Result<Self> {
        let instructions = filter(profile)?.into_iter().map(Into::into).collect();
        Ok(Self { instructions, flags: flags(profile)? })
    }

    /// Applies it to this process, for good. Without no_new_privs that takes CAP_SYS_ADMIN.
    ///
    /// # Errors
    /// [`Error::System`] where the kernel refuses.
    pub(crate) fn apply(&self) -> Result<()> {
        let program = libc::sock_fprog {
            // The length was bounded when it was made.
            len: u16::try_from(self.instructions.len()).unwrap_or(u16::MAX),
            filter: self.instructions.as_ptr().cast_mut(),
        };
        // SAFETY: the program points to a live array of the length that it gives; the kernel copies it and writes nothing.
        #[expect(unsafe_code, reason = "no safe wrapper is at hand")]
        let result =
            unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, self.flags, &raw const program) };
        if result == 0 {
            return Ok(());
        }
        Err(std::io::Error::last_os_error()).step(|| "apply the seccomp profile".into())
    }
}

fn flags(profile: &LinuxSeccomp) -> Result<libc::c_ulong> {
    let mut flags = 0;
    for flag in profile.flags().iter().flatten() {
        flags |= match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => libc::SECCOMP_FILTER_FLAG_TSYNC,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
            // It is about notifications, which are refused.
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {
                return Err(Error::Invalid("seccomp: SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV is not supported".into()));
            }
        };
    }
    Ok(flags)
}

/// The instructions of a profile.
fn filter(profile: &LinuxSeccomp) -> Result<Vec<Instruction>> {
    let default = verdict(profile.default_action(), profile.default_errno_ret())?;
    let mut tables = Vec::new();
    for (audit, names) in architectures(profile)? {
        tables.push(Table { audit, calls: calls(profile, &names, default)? });
    }
    let filter = assemble::filter(&tables, default, newer(profile));
    if filter.len() > INSTRUCTIONS_MAX {
        let length = filter.len();
        return Err(Error::Invalid(format!(
            "the seccomp profile takes {length} instructions, more than the kernel's {INSTRUCTIONS_MAX}"
        )));
    }
    Ok(filter)
}

/// The architectures of a profile: their numbers and calls. The processor's own is always among them.
fn architectures(profile: &LinuxSeccomp) -> Result<Vec<(u32, Numbers)>> {
    let mut found = vec![(AUDIT_X86_64, numbers::x86_64())];
    for architecture in profile.architectures().iter().flatten() {
        match architecture {
            // x32 is refused; see the module.
            Arch::ScmpArchNative | Arch::ScmpArchX86_64 | Arch::ScmpArchX32 => {}
            Arch::ScmpArchX86 if found.len() == 1 => found.push((AUDIT_X86, numbers::x86())),
            Arch::ScmpArchX86 => {}
            other => return Err(Error::Invalid(format!("seccomp for {other:?} on this processor"))),
        }
    }
    Ok(found)
}

/// The rules of each call that a profile names and `names` has.
fn calls(profile: &LinuxSeccomp, names: &Numbers, default: u32) -> Result<BTreeMap<u32, Rules>> {
    let mut calls: BTreeMap<u32, Rules> = BTreeMap::new();
    for entry in profile.syscalls().iter().flatten() {
        let verdict = verdict(entry.action(), entry.errno_ret())?;
        let arguments = entry.args().as_deref().unwrap_or_default();
        let rules = rules(arguments, verdict)?;
        for name in entry.names() {
            // A name of another architecture, or of a newer kernel, is no call here.
            let Some(number) = names.get(name.as_str()) else { continue };
            let known = calls.entry(*number).or_default();
            for rule in &rules {
                // What the default does already needs no rule, unless it is the exception to an earlier one.
                if rule.verdict != default || !known.is_empty() {
                    add(known, rule.clone());
                }
            }
        }
    }
    Ok(calls)
}

/// Adds a rule before the one without conditions, of which the first stays.
fn add(known: &mut Rules, rule: Rule) {
    let last = known.last().is_some_and(|rule| rule.conditions.is_empty());
    match (last, rule.conditions.is_empty()) {
        (true, true) => {}
        (true, false) => known.insert(known.len() - 1, rule),
        (false, _) => known.push(rule),
    }
}

/// The conditions of an entry are one rule; where two of them look at one argument, each is a rule of its own, as container
/// runtimes read them.
fn rules(arguments: &[LinuxSeccompArg], verdict: u32) -> Result<Rules> {
    let mut conditions = Vec::new();
    for argument in arguments {
        let index = u32::try_from(argument.index()).ok().filter(|index| *index < 6);
        let index =
            index.ok_or_else(|| Error::Invalid(format!("seccomp: no call has an argument {}", argument.index())))?;
        conditions.push(Condition {
            argument: index,
            operator: argument.op(),
            value: argument.value(),
            datum: argument.value_two().unwrap_or(0),
        });
    }
    let twice = |at: usize, condition: &Condition| {
        conditions.iter().take(at).any(|earlier: &Condition| earlier.argument == condition.argument)
    };
    if conditions.iter().enumerate().any(|(at, condition)| twice(at, condition)) {
        return Ok(conditions.into_iter().map(|condition| Rule { conditions: vec![condition], verdict }).collect());
    }
    Ok(vec![Rule { conditions, verdict }])
}

/// The kernel's value for an action.
fn verdict(action: LinuxSeccompAction, number: Option<u32>) -> Result<u32> {
    let number = number.unwrap_or(libc::EPERM.unsigned_abs());
    if number > 0xffff {
        return Err(Error::Invalid(format!("seccomp: {number} is no error number")));
    }
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => KILL_THREAD,
        LinuxSeccompAction::ScmpActKillProcess => KILL_PROCESS,
        LinuxSeccompAction::ScmpActTrap => TRAP,
        LinuxSeccompAction::ScmpActErrno => ERRNO | number,
        LinuxSeccompAction::ScmpActTrace => TRACE | number,
        LinuxSeccompAction::ScmpActLog => LOG,
        LinuxSeccompAction::ScmpActAllow => ALLOW,
        LinuxSeccompAction::ScmpActNotify => {
            return Err(Error::Invalid("seccomp: the action SCMP_ACT_NOTIFY is not supported".into()));
        }
    })
}

/// What becomes of calls that are newer than all that the profile names; nothing special where it lets unknown calls pass.
fn newer(profile: &LinuxSeccomp) -> Option<u32> {
    let passes = matches!(profile.default_action(), LinuxSeccompAction::ScmpActAllow | LinuxSeccompAction::ScmpActLog);
    (!passes).then_some(ERRNO | libc::ENOSYS.unsigned_abs())
}

#[cfg(test)]
mod tests;
