//! Which devices a container's processes may use: a program at the cgroup's device hook (kernel:
//! Documentation/admin-guide/cgroup-v2.rst, "Device controller"), made from the rules of the specification (runtime-spec,
//! config-linux.md, "Allowed Device list").
//!
//! Rules count in their order: for each kind of access the last one that matches decides, and nothing is allowed that no rule
//! allows. After them stand those for the devices that every container has.

use std::io::Error as IoError;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::error::Step;
use crate::{Error, Result};

/// Kinds of access, as the kernel has them (`BPF_DEVCG_ACC_*`).
const MAKE: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const ALL: i32 = MAKE | READ | WRITE;

/// Types of devices (`BPF_DEVCG_DEV_*`).
const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;

/// The most rules: far more than any container has, and few enough for the kernel's verifier.
const RULES_MAX: usize = 500;

/// One rule; what is absent matches everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

impl Rule {
    const fn character(major: i32, minor: Option<i32>) -> Self {
        Self { allow: true, kind: Some(CHARACTER), major: Some(major), minor, access: ALL }
    }

    const fn make(kind: i32) -> Self {
        Self { allow: true, kind: Some(kind), major: None, minor: None, access: MAKE }
    }
}

/// What every container may use: null, zero, full, random, urandom, tty, ptmx and terminals; and it may make nodes, which is no
/// access to what they stand for. The console is the guest's: a container's is one of the terminals.
const ALWAYS: [Rule; 10] = [
    Rule::make(CHARACTER),
    Rule::make(BLOCK),
    Rule::character(1, Some(3)),
    Rule::character(1, Some(5)),
    Rule::character(1, Some(7)),
    Rule::character(1, Some(8)),
    Rule::character(1, Some(9)),
    Rule::character(5, Some(0)),
    Rule::character(5, Some(2)),
    Rule::character(136, None),
];

/// Restricts the processes of the cgroup whose folder is `cgroup`, and of those below it, for as long as it is there.
pub(crate) fn restrict(cgroup: &Path, rules: &[LinuxDeviceCgroup]) -> Result<()> {
    let rules = rules.iter().map(rule).chain(ALWAYS.into_iter().map(Ok)).collect::<Result<Vec<_>>>()?;
    if rules.len() > RULES_MAX {
        return Err(Error::Invalid(format!("{} device rules, and {RULES_MAX} are the most", rules.len())));
    }
    let step = || format!("restrict the devices of {}", cgroup.display());
    let program = load(&program(&rules)).step(step)?;
    let cgroup = std::fs::File::open(cgroup).step(step)?;
    attach(&program, &cgroup).step(step)
}

fn rule(wanted: &LinuxDeviceCgroup) -> Result<Rule> {
    let kind = match wanted.typ() {
        None | Some(LinuxDeviceType::A) => None,
        Some(LinuxDeviceType::B) => Some(BLOCK),
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHARACTER),
        Some(other) => return Err(Error::Invalid(format!("no device rule is about type {}", other.as_str()))),
    };
    let mut access = 0;
    for letter in wanted.access().as_deref().unwrap_or("rwm").chars() {
        access |= match letter {
            'r' => READ,
            'w' => WRITE,
            'm' => MAKE,
            other => return Err(Error::Invalid(format!("{other:?} is no access to a device"))),
        };
    }
    // Negative numbers stand for any, too.
    let number = |value: Option<i64>| match value.filter(|value| *value >= 0) {
        None => Ok(None),
        Some(value) => {
            i32::try_from(value).map(Some).map_err(|_| Error::Invalid(format!("{value} is no device number")))
        }
    };
    Ok(Rule {
        allow: wanted.allow(),
        kind,
        major: number(wanted.major())?,
        minor: number(wanted.minor())?,
        access: if access == 0 { ALL } else { access },
    })
}

/// One instruction: operation, registers, offset, number (Linux: Documentation/bpf/standardization/instruction-set.rst).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    code: u8,
    to: u8,
    from: u8,
    offset: i16,
    number: i32,
}

const LOAD: u8 = 0x61;
const COPY: u8 = 0xbf;
const SET: u8 = 0xb7;
const AND: u8 = 0x57;
const SHIFT_RIGHT: u8 = 0x77;
const JUMP_IF: u8 = 0x15;
const JUMP_UNLESS: u8 = 0x55;
const EXIT: u8 = 0x95;

/// Registers: the kernel's structure, then what was loaded from it. `WANTED` loses each kind of access that is allowed.
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const WANTED: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const RESULT: u8 = 0;

const fn op(code: u8, to: u8, number: i32) -> Instruction {
    Instruction { code, to, from: 0, offset: 0, number }
}

const fn load_from(to: u8, offset: i16) -> Instruction {
    Instruction { code: LOAD, to, from: CONTEXT, offset, number: 0 }
}

/// The program: from the last rule to the first, an allowing one takes its kinds of access off what is still wanted, and nothing
/// left is "yes"; a denying one that meets something still wanted is "no", and so is the end.
fn program(rules: &[Rule]) -> Vec<Instruction> {
    let answer = |yes: i32| [op(SET, RESULT, yes), op(EXIT, 0, 0)];
    // struct bpf_cgroup_dev_ctx: access in the upper half of the first number and type in the lower, major, minor.
    let mut code = vec![
        load_from(KIND, 0),
        op(AND, KIND, 0xffff),
        load_from(WANTED, 0),
        op(SHIFT_RIGHT, WANTED, 16),
        load_from(MAJOR, 4),
        load_from(MINOR, 8),
    ];
    for rule in rules.iter().rev() {
        let mut decision = Vec::new();
        if rule.allow {
            decision.push(op(AND, WANTED, !rule.access));
            decision.push(Instruction { offset: 2, ..op(JUMP_UNLESS, WANTED, 0) });
            decision.extend(answer(1));
        } else {
            decision.push(Instruction { from: WANTED, ..op(COPY, RESULT, 0) });
            decision.push(op(AND, RESULT, rule.access));
            decision.push(Instruction { offset: 2, ..op(JUMP_IF, RESULT, 0) });
            decision.extend(answer(0));
        }
        let conditions = [(KIND, rule.kind), (MAJOR, rule.major), (MINOR, rule.minor)];
        let conditions: Vec<(u8, i32)> =
            conditions.into_iter().filter_map(|(register, value)| Some((register, value?))).collect();
        for (at, (register, value)) in conditions.iter().enumerate() {
            // Over the other conditions and the decision. Both are a handful.
            let over = i16::try_from(conditions.len() - at - 1 + decision.len()).unwrap_or(i16::MAX);
            code.push(Instruction { offset: over, ..op(JUMP_UNLESS, *register, *value) });
        }
        code.extend(decision);
    }
    code.extend(answer(0));
    code
}

/// Commands of bpf(2), the kind of program, where it is attached, and that others may be attached beside it (linux/bpf.h).
const PROGRAM_LOAD: libc::c_int = 5;
const PROGRAM_ATTACH: libc::c_int = 8;
const CGROUP_DEVICE_PROGRAM: u32 = 15;
const AT_CGROUP_DEVICE: u32 = 6;
const ALLOW_MULTI: u32 = 2;

fn load(program: &[Instruction]) -> std::io::Result<OwnedFd> {
    let mut code = Vec::with_capacity(program.len() * 8);
    for instruction in program {
        code.extend([instruction.code, instruction.to | instruction.from << 4]);
        code.extend(instruction.offset.to_ne_bytes());
        code.extend(instruction.number.to_ne_bytes());
    }
    let licence = c"Apache-2.0";
    let count = u32::try_from(program.len()).map_err(IoError::other)?;
    let mut attributes = numbers(&[CGROUP_DEVICE_PROGRAM, count]);
    attributes.extend((code.as_ptr() as u64).to_ne_bytes());
    attributes.extend((licence.as_ptr() as u64).to_ne_bytes());
    // No log; any kernel's version; no flags.
    attributes.extend([0; 4 + 4 + 8 + 4 + 4]);
    let fd = i32::try_from(bpf(PROGRAM_LOAD, &attributes)?).map_err(IoError::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    #[expect(unsafe_code, reason = "a received descriptor has no safe constructor")]
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    Ok(fd)
}

fn attach(program: &OwnedFd, cgroup: &std::fs::File) -> std::io::Result<()> {
    let of = |fd: i32| u32::try_from(fd).map_err(IoError::other);
    let (cgroup, program) = (of(cgroup.as_raw_fd())?, of(program.as_raw_fd())?);
    bpf(PROGRAM_ATTACH, &numbers(&[cgroup, program, AT_CGROUP_DEVICE, ALLOW_MULTI])).map(drop)
}

fn numbers(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_ne_bytes()).collect()
}

fn bpf(command: libc::c_int, attributes: &[u8]) -> std::io::Result<libc::c_long> {
    // SAFETY: the attributes are live for the call and have the length that is given; addresses in them are of values that
    // the callers keep alive through it. The kernel copies what it keeps.
    #[expect(unsafe_code, reason = "no safe wrapper is at hand")]
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), attributes.len()) };
    if result < 0 { Err(IoError::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel would.
    fn run(code: &[Instruction], kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let mut registers = [0_i64; 6];
        let mut at = 0;
        loop {
            let Instruction { code: what, to, from, offset, number } = code[at];
            let (to, number) = (usize::from(to), i64::from(number));
            at += 1;
            match what {
                LOAD => {
                    registers[to] = i64::from([access << 16 | kind, major, minor][usize::try_from(offset / 4).unwrap()])
                }
                COPY => registers[to] = registers[usize::from(from)],
                SET => registers[to] = number,
                AND => registers[to] &= number,
                SHIFT_RIGHT => registers[to] >>= number,
                JUMP_IF if registers[to] == number => at += usize::try_from(offset).unwrap(),
                JUMP_UNLESS if registers[to] != number => at += usize::try_from(offset).unwrap(),
                JUMP_IF | JUMP_UNLESS => {}
                EXIT => return registers[0] == 1,
                other => panic!("operation {other}"),
            }
        }
    }

    fn rules(json: &str) -> Vec<Rule> {
        let rules: Vec<LinuxDeviceCgroup> = serde_json::from_str(json).unwrap();
        rules.iter().map(|wanted| rule(wanted).unwrap()).collect()
    }

    #[test]
    fn the_last_rule_decides_for_each_access() {
        let code = program(&rules(
            r#"[{"allow":true,"access":"rwm"},{"allow":false,"type":"c","major":10,"access":"w"},
                {"allow":true,"type":"c","major":10,"minor":200,"access":"w"}]"#,
        ));
        assert!(run(&code, BLOCK, ALL, 8, 0));
        assert!(run(&code, CHARACTER, READ, 10, 1));
        assert!(!run(&code, CHARACTER, READ | WRITE, 10, 1), "one of two is not enough");
        assert!(run(&code, CHARACTER, READ | WRITE, 10, 200), "allowed by two rules together");
    }

    #[test]
    fn nothing_is_allowed_that_no_rule_allows() {
        let code = program(&rules(r#"[{"allow":false,"access":"rwm"}]"#));
        assert!(!run(&code, CHARACTER, READ, 1, 3));
        let mut all = rules(r#"[{"allow":false,"access":"rwm"}]"#);
        all.extend(ALWAYS);
        let code = program(&all);
        assert!(run(&code, CHARACTER, READ | WRITE, 1, 3), "null");
        assert!(run(&code, CHARACTER, READ | WRITE, 136, 77), "a terminal");
        assert!(!run(&code, CHARACTER, READ, 1, 1), "mem");
        assert!(!run(&code, BLOCK, READ, 254, 0));
        assert!(run(&code, BLOCK, MAKE, 254, 0), "a node alone does no harm");
    }

    #[test]
    fn numbers_that_are_not_given_match_all() {
        for json in [r#"[{"allow":true}]"#, r#"[{"allow":true,"major":-1,"minor":-1}]"#] {
            let expected = Rule { allow: true, kind: None, major: None, minor: None, access: ALL };
            assert_eq!(rules(json), [expected], "{json}");
        }
        assert_eq!(rules(r#"[{"allow":true,"type":"c","major":5,"minor":0,"access":"r"}]"#)[0].minor, Some(0));
        let bad: LinuxDeviceCgroup = serde_json::from_str(r#"{"allow":true,"access":"rx"}"#).unwrap();
        assert!(rule(&bad).is_err());
    }
}
