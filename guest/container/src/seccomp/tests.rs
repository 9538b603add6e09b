//! The filter against libseccomp's: both are run, by a small interpreter, over many calls.

use std::ffi::CString;
use std::os::fd::AsRawFd;

use oci_spec::runtime::LinuxSeccomp;
use serde_json::{Value, json};

use super::assemble::{AND, Instruction, JUMP, JUMP_EQUAL, JUMP_GREATER, JUMP_GREATER_OR_EQUAL, LOAD, RETURN};
use super::numbers::{Numbers, x86, x86_64};
use super::{ALLOW, AUDIT_X86, AUDIT_X86_64, ERRNO, KILL_PROCESS, X32, filter};
use crate::Error;

/// A call as the kernel shows it to a filter.
#[derive(Debug, Clone, Copy)]
struct Call {
    architecture: u32,
    number: u32,
    arguments: [u64; 6],
}

impl Call {
    fn word(&self, offset: u32) -> u32 {
        match offset {
            0 => self.number,
            4 => self.architecture,
            8 | 12 => 0,
            at => {
                let argument = self.arguments[(at as usize - 16) / 8];
                u32::try_from(argument >> (at % 8 * 8) & 0xffff_ffff).unwrap()
            }
        }
    }
}

fn run(filter: &[Instruction], call: &Call) -> u32 {
    let (mut at, mut accumulator) = (0_usize, 0_u32);
    loop {
        let Instruction { code, taken, not_taken, value } = filter[at];
        at += 1;
        let holds = match code {
            LOAD => {
                accumulator = call.word(value);
                continue;
            }
            AND => {
                accumulator &= value;
                continue;
            }
            JUMP => {
                at += value as usize;
                continue;
            }
            RETURN => return value,
            JUMP_EQUAL => accumulator == value,
            JUMP_GREATER => accumulator > value,
            JUMP_GREATER_OR_EQUAL => accumulator >= value,
            other => panic!("instruction {other:#x}"),
        };
        at += usize::from(if holds { taken } else { not_taken });
    }
}

/// libseccomp's own, loaded where it is there: the C interface (seccomp.h).
struct Library(*mut libc::c_void);

#[repr(C)]
#[derive(Clone, Copy)]
struct Compare {
    argument: libc::c_uint,
    operator: libc::c_int,
    a: u64,
    b: u64,
}

type Init = unsafe extern "C" fn(u32) -> *mut libc::c_void;
type Release = unsafe extern "C" fn(*mut libc::c_void);
type Resolve = unsafe extern "C" fn(*const libc::c_char) -> libc::c_int;
type AddRule = unsafe extern "C" fn(*mut libc::c_void, u32, libc::c_int, libc::c_uint, *const Compare) -> libc::c_int;
type Export = unsafe extern "C" fn(*const libc::c_void, libc::c_int) -> libc::c_int;

impl Library {
    #[expect(unsafe_code, reason = "a library that is loaded by hand, in a test")]
    fn load() -> Option<Self> {
        // SAFETY: the name is NUL-terminated; the library's initialiser is its own.
        let handle = unsafe { libc::dlopen(c"libseccomp.so.2".as_ptr(), libc::RTLD_NOW) };
        (!handle.is_null()).then_some(Self(handle))
    }

    #[expect(unsafe_code, reason = "as above")]
    fn symbol<T: Copy>(&self, name: &std::ffi::CStr) -> T {
        // SAFETY: the handle is open; each caller names the type that seccomp.h declares for the symbol.
        let address = unsafe { libc::dlsym(self.0, name.as_ptr()) };
        assert!(!address.is_null() && size_of::<T>() == size_of::<*mut libc::c_void>());
        // SAFETY: a function's pointer has the size of a data pointer here, which was checked.
        unsafe { std::mem::transmute_copy(&address) }
    }

    /// libseccomp's filter of a profile whose entries have conditions on different arguments only.
    #[expect(unsafe_code, reason = "as above")]
    fn filter(&self, profile: &Value) -> Vec<Instruction> {
        let action = |text: &Value, number: &Value| -> u32 {
            let number = u32::try_from(number.as_u64().unwrap_or(1)).unwrap();
            match text.as_str().unwrap() {
                "SCMP_ACT_ALLOW" => ALLOW,
                "SCMP_ACT_ERRNO" => ERRNO | number,
                "SCMP_ACT_KILL_PROCESS" => KILL_PROCESS,
                "SCMP_ACT_LOG" => super::LOG,
                other => panic!("{other}"),
            }
        };
        let init: Init = self.symbol(c"seccomp_init");
        let release: Release = self.symbol(c"seccomp_release");
        let resolve: Resolve = self.symbol(c"seccomp_syscall_resolve_name");
        let add: AddRule = self.symbol(c"seccomp_rule_add_array");
        let export: Export = self.symbol(c"seccomp_export_bpf");
        let default = action(&profile["defaultAction"], &Value::Null);
        let file = tempfile::tempfile().unwrap();
        // SAFETY: the context is used between its making and its release; names are NUL-terminated; the array has the
        // length that is given.
        unsafe {
            let context = init(default);
            assert!(!context.is_null());
            for entry in profile["syscalls"].as_array().unwrap() {
                let verdict = action(&entry["action"], &entry["errnoRet"]);
                if verdict == default {
                    continue;
                }
                let compares: Vec<Compare> = entry["args"].as_array().into_iter().flatten().map(compare).collect();
                for name in entry["names"].as_array().unwrap() {
                    let name = CString::new(name.as_str().unwrap()).unwrap();
                    let number = resolve(name.as_ptr());
                    if number >= 0 {
                        let count = libc::c_uint::try_from(compares.len()).unwrap();
                        // A rule that says what an earlier one does is refused, and changes nothing.
                        add(context, verdict, number, count, compares.as_ptr());
                    }
                }
            }
            assert_eq!(export(context, file.as_raw_fd()), 0);
            release(context);
        }
        let mut bytes = Vec::new();
        let mut file = file;
        std::io::Seek::rewind(&mut file).unwrap();
        std::io::Read::read_to_end(&mut file, &mut bytes).unwrap();
        bytes
            .chunks_exact(8)
            .map(|raw| Instruction {
                code: u16::from_ne_bytes([raw[0], raw[1]]),
                taken: raw[2],
                not_taken: raw[3],
                value: u32::from_ne_bytes([raw[4], raw[5], raw[6], raw[7]]),
            })
            .collect()
    }
}

fn compare(argument: &Value) -> Compare {
    let operators = [
        "SCMP_CMP_NE",
        "SCMP_CMP_LT",
        "SCMP_CMP_LE",
        "SCMP_CMP_EQ",
        "SCMP_CMP_GE",
        "SCMP_CMP_GT",
        "SCMP_CMP_MASKED_EQ",
    ];
    let at = operators.iter().position(|name| *name == argument["op"]).unwrap();
    Compare {
        argument: libc::c_uint::try_from(argument["index"].as_u64().unwrap()).unwrap(),
        operator: libc::c_int::try_from(at + 1).unwrap(),
        a: argument["value"].as_u64().unwrap(),
        b: argument["valueTwo"].as_u64().unwrap_or(0),
    }
}

fn ours(profile: &Value) -> Vec<Instruction> {
    let profile: LinuxSeccomp = serde_json::from_value(profile.clone()).unwrap();
    filter(&profile).unwrap()
}

/// A generator of numbers that are the same in every run (xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).unwrap()
    }

    /// Values that meet one another: few bits, in either half.
    fn value(&mut self) -> u64 {
        let small = [0, 1, 2, 40, 0xff, 0x7e02_0000, u64::from(u32::MAX), 1 << 32, (1 << 32) + 1, u64::MAX];
        small[self.below(small.len())]
    }
}

/// A profile with conditions and without, on a few calls, each in up to `entries` entries.
fn generated(random: &mut Random, entries: usize) -> Value {
    let names = ["read", "write", "openat", "socket", "clone", "personality", "ioctl", "mmap", "statx", "futex"];
    let verdicts = [json!("SCMP_ACT_ALLOW"), json!("SCMP_ACT_ERRNO"), json!("SCMP_ACT_LOG")];
    let default = if random.below(4) == 0 { "SCMP_ACT_ALLOW" } else { "SCMP_ACT_ERRNO" };
    let mut syscalls = Vec::new();
    // Each call has one kind of entries: with one action, for where two of them hold the library chooses by its own order.
    for name in names {
        if random.below(3) == 0 {
            continue;
        }
        let action = verdicts[random.below(verdicts.len())].clone();
        for _ in 0..=random.below(entries) {
            let mut args = Vec::new();
            for index in 0..6 {
                if random.below(4) != 0 {
                    continue;
                }
                let op = ["NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"][random.below(7)];
                args.push(json!({ "index": index, "value": random.value(), "valueTwo": random.value(),
                    "op": format!("SCMP_CMP_{op}") }));
            }
            syscalls.push(json!({ "names": [name], "action": action, "errnoRet": 38, "args": args }));
        }
    }
    json!({ "defaultAction": default, "architectures": ["SCMP_ARCH_X86_64"], "syscalls": syscalls })
}

/// Calls that a profile names, with arguments from its conditions and beside them, and others.
fn calls(random: &mut Random, count: usize) -> Vec<Call> {
    let all = x86_64();
    let named =
        ["read", "write", "openat", "socket", "clone", "personality", "ioctl", "mmap", "statx", "futex", "close"];
    (0..count)
        .map(|_| {
            let number = all[named[random.below(named.len())]];
            let arguments = std::array::from_fn(|_| random.value().wrapping_add(random.next() % 3).wrapping_sub(1));
            Call { architecture: AUDIT_X86_64, number, arguments }
        })
        .collect()
}

#[test]
fn a_thousand_profiles_say_what_libseccomp_says() {
    let Some(library) = Library::load() else {
        println!("left out: libseccomp.so.2 is not there to compare with");
        return;
    };
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for round in 0..1000 {
        // One entry a call: where two of them compare one argument by size, libseccomp 2.5 mixes them up.
        let profile = generated(&mut random, 1);
        let (mine, theirs) = (ours(&profile), library.filter(&profile));
        // Above all that the profile names this one says ENOSYS, on purpose.
        let names: Vec<&str> =
            profile["syscalls"].as_array().unwrap().iter().map(|entry| entry["names"][0].as_str().unwrap()).collect();
        let last = x86_64().into_iter().filter(|(name, _)| names.contains(name)).map(|(_, number)| number).max();
        for call in calls(&mut random, 200) {
            if last.is_some_and(|last| call.number > last) {
                continue;
            }
            assert_eq!(run(&mine, &call), run(&theirs, &call), "round {round}: {call:x?}\n{profile:#}");
        }
    }
}

/// What the specification says of a call, word by word: a rule holds where all its conditions do.
fn by_the_words(profile: &Value, name: &str, call: &Call) -> u32 {
    let verdict = |action: &Value, number: &Value| match action.as_str().unwrap() {
        "SCMP_ACT_ALLOW" => ALLOW,
        "SCMP_ACT_LOG" => super::LOG,
        _ => ERRNO | u32::try_from(number.as_u64().unwrap_or(1)).unwrap(),
    };
    let holds = |argument: &Value| {
        let number = |key: &str| argument[key].as_u64().unwrap();
        let (found, value) = (call.arguments[usize::try_from(number("index")).unwrap()], number("value"));
        match argument["op"].as_str().unwrap() {
            "SCMP_CMP_NE" => found != value,
            "SCMP_CMP_LT" => found < value,
            "SCMP_CMP_LE" => found <= value,
            "SCMP_CMP_EQ" => found == value,
            "SCMP_CMP_GE" => found >= value,
            "SCMP_CMP_GT" => found > value,
            _ => found & value == number("valueTwo") & value,
        }
    };
    let entries = profile["syscalls"].as_array().unwrap();
    let entry =
        entries.iter().find(|entry| entry["names"][0] == name && entry["args"].as_array().unwrap().iter().all(holds));
    entry.map_or_else(
        || verdict(&profile["defaultAction"], &Value::Null),
        |entry| verdict(&entry["action"], &entry["errnoRet"]),
    )
}

#[test]
fn a_thousand_profiles_of_many_entries_say_what_their_words_say() {
    let (mut random, all): (_, Numbers) = (Random(7), x86_64());
    for round in 0..1000 {
        let profile = generated(&mut random, 4);
        let filter = ours(&profile);
        for call in calls(&mut random, 200) {
            let name = all.iter().find(|(_, number)| **number == call.number).unwrap().0;
            let (found, expected) = (run(&filter, &call), by_the_words(&profile, name, &call));
            let newer = found == ERRNO | 38 && expected == ERRNO | 1;
            assert!(found == expected || newer, "round {round}: {found:x} for {name} {call:x?}\n{profile:#}");
        }
    }
}

#[test]
fn containerds_default_profile_says_what_libseccomp_says() {
    let Some(library) = Library::load() else {
        println!("left out: libseccomp.so.2 is not there to compare with");
        return;
    };
    // Its shape: a long list that is allowed, and a few calls by their arguments.
    let refused = ["acct", "bpf", "kexec_load", "mount", "ptrace", "reboot", "setns", "swapon", "unshare", "clone"];
    let by_argument = ["personality", "socket", "clone"];
    let allowed: Vec<&str> =
        x86_64().into_keys().filter(|name| !refused.contains(name) && !by_argument.contains(name)).collect();
    let one = |value: u64| json!([{ "index": 0, "value": value, "op": "SCMP_CMP_EQ" }]);
    let profile = json!({ "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            { "names": allowed, "action": "SCMP_ACT_ALLOW" },
            { "names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [{ "index": 0, "value": 40, "op": "SCMP_CMP_NE" }] },
            { "names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": one(0) },
            { "names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": one(8) },
            { "names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": one(0xffff_ffff) },
            { "names": ["clone"], "action": "SCMP_ACT_ALLOW",
              "args": [{ "index": 0, "value": 0x7e02_0000, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ" }] },
            { "names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38 }
        ] });
    let (mine, theirs) = (ours(&profile), library.filter(&profile));
    let mut random = Random(1);
    for (name, number) in &x86_64() {
        for _ in 0..50 {
            let arguments = std::array::from_fn(|_| random.value());
            let call = Call { architecture: AUDIT_X86_64, number: *number, arguments };
            // A library that is older than a call does not know its name.
            let (mine, theirs) = (run(&mine, &call), run(&theirs, &call));
            let unknown = *name == "uretprobe" || *number > 449;
            assert!(mine == theirs || unknown, "{name}: {mine:x} and {theirs:x} for {call:x?}");
        }
    }
    assert!(mine.len() < theirs.len() * 2, "{} and {} instructions", mine.len(), theirs.len());
}

#[test]
fn other_conventions_and_newer_calls_are_closed() {
    let profile = json!({ "defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X32"],
        "syscalls": [{ "names": ["read", "close", "not_a_call"], "action": "SCMP_ACT_ALLOW" }] });
    let filter = ours(&profile);
    let verdict = |architecture, number| run(&filter, &Call { architecture, number, arguments: [0; 6] });
    assert_eq!(verdict(AUDIT_X86_64, 0), ALLOW);
    assert_eq!(verdict(AUDIT_X86_64, 1), ERRNO | 1, "write is older than close and not named");
    assert_eq!(verdict(AUDIT_X86_64, 4), ERRNO | 38, "newer than all that is named");
    assert_eq!(verdict(AUDIT_X86_64, X32), ERRNO | 38);
    assert_eq!(verdict(AUDIT_X86, 3), KILL_PROCESS);
    let both = json!({ "defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86"],
        "syscalls": [{ "names": ["read", "close"], "action": "SCMP_ACT_ALLOW" }] });
    let filter = ours(&both);
    let verdict = |architecture, number| run(&filter, &Call { architecture, number, arguments: [0; 6] });
    assert_eq!((verdict(AUDIT_X86, 3), verdict(AUDIT_X86_64, 0)), (ALLOW, ALLOW));
    assert_eq!(verdict(AUDIT_X86, 5), ERRNO | 1);
}

#[test]
fn what_a_filter_can_not_do_is_refused() {
    let refused = |profile: Value| {
        let profile: LinuxSeccomp = serde_json::from_value(profile).unwrap();
        assert!(matches!(filter(&profile), Err(Error::Invalid(_))), "{profile:?}");
    };
    refused(json!({ "defaultAction": "SCMP_ACT_NOTIFY" }));
    refused(json!({ "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_S390X"] }));
    let argument = json!([{ "index": 6, "value": 0, "op": "SCMP_CMP_EQ" }]);
    let entry = json!([{ "names": ["read"], "action": "SCMP_ACT_ERRNO", "args": argument }]);
    refused(json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": entry }));
    let entry = json!([{ "names": ["read"], "action": "SCMP_ACT_ERRNO", "errnoRet": 70_000 }]);
    refused(json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": entry }));
}

#[test]
fn the_tables_are_whole() {
    assert_eq!((x86_64()["read"], x86()["read"], x86_64()["seccomp"], x86()["seccomp"]), (0, 3, 317, 354));
    assert!(x86_64().len() > 370 && x86().len() > 450);
}
