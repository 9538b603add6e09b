//! One listener for every TCP port of a namespace's loopback, by a program at the kernel's socket lookup (Linux:
//! Documentation/bpf/prog_sk_lookup.rst).
//!
//! containerd's port-forward dials the loopback of the pod's namespace, on a port that nobody knows before. What listens
//! there listens in the guest.

use std::io::{Error, Result};
use std::net::TcpListener;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Commands of bpf(2), kinds of maps and programs, and where a program is attached (linux/bpf.h).
const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE: libc::c_int = 2;
const PROGRAM_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;
const SOCKET_MAP: u32 = 15;
const SOCKET_LOOKUP: u32 = 30;
const AT_SOCKET_LOOKUP: u32 = 36;

/// Functions that a program may call.
const MAP_LOOKUP: i32 = 1;
const SOCKET_RELEASE: i32 = 86;
const SOCKET_ASSIGN: i32 = 124;

/// Where the lookup's context has the protocol and the link on which the packet has come (`struct bpf_sk_lookup`).
const PROTOCOL: i16 = 12;
const LINK: i16 = 64;
/// Loopback is the first link of every namespace.
const LOOPBACK: i32 = 1;

/// The listener, and what steers to it for as long as it lives.
#[derive(Debug)]
pub struct Steered {
    /// It takes connections to every port of loopback, by both versions of IP: the lookup comes before other listeners. A
    /// connection's own address says which port.
    pub listener: TcpListener,
    _link: OwnedFd,
}

/// Makes a listener in the calling thread's network namespace, which is `namespace`, and steers to it.
pub(crate) fn all_ports(namespace: &impl AsRawFd) -> Result<Steered> {
    // Version 6 takes both.
    let listener = TcpListener::bind("[::]:0").or_else(|_| TcpListener::bind("0.0.0.0:0"))?;
    let map = bpf(MAP_CREATE, &numbers(&[SOCKET_MAP, 4, 8, 1]))?;
    let (key, value) = (0_u32, u64::try_from(listener.as_raw_fd()).map_err(Error::other)?);
    let entry = [
        u64::from(u32::try_from(map.as_raw_fd()).map_err(Error::other)?),
        (&raw const key) as u64,
        (&raw const value) as u64,
        0,
    ];
    bpf_status(MAP_UPDATE, &entry.map(u64::to_ne_bytes).concat())?;
    let program = load(&program(map.as_raw_fd()))?;
    let of = |fd: &dyn AsRawFd| u32::try_from(fd.as_raw_fd()).map_err(Error::other);
    let link = bpf(LINK_CREATE, &numbers(&[of(&program)?, of(namespace)?, AT_SOCKET_LOOKUP, 0, 0, 0, 0, 0]))?;
    Ok(Steered { listener, _link: link })
}

fn numbers(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_ne_bytes()).collect()
}

/// One instruction: operation, registers, offset, number (Linux: Documentation/bpf/standardization/instruction-set.rst).
fn instruction(code: u8, to: u8, from: u8, offset: i16, number: i32) -> [u8; 8] {
    let mut bytes = [code, to | from << 4, 0, 0, 0, 0, 0, 0];
    bytes[2..4].copy_from_slice(&offset.to_ne_bytes());
    bytes[4..8].copy_from_slice(&number.to_ne_bytes());
    bytes
}

/// For a TCP packet on loopback: the map's socket, where there is one. Every packet passes.
fn program(map: i32) -> Vec<[u8; 8]> {
    const LOAD: u8 = 0x61;
    const STORE: u8 = 0x62;
    const MOVE: u8 = 0xbf;
    const SET: u8 = 0xb7;
    const ADD: u8 = 0x07;
    const CALL: u8 = 0x85;
    const JUMP_UNLESS: u8 = 0x55;
    const JUMP_IF: u8 = 0x15;
    const LOAD_MAP: u8 = 0x18;
    const EXIT: u8 = 0x95;
    const PASS: i32 = 1;
    vec![
        instruction(MOVE, 6, 1, 0, 0),
        instruction(LOAD, 2, 6, PROTOCOL, 0),
        instruction(JUMP_UNLESS, 2, 0, 16, libc::IPPROTO_TCP),
        instruction(LOAD, 2, 6, LINK, 0),
        instruction(JUMP_UNLESS, 2, 0, 14, LOOPBACK),
        // The key 0 on the stack.
        instruction(STORE, 10, 0, -4, 0),
        instruction(LOAD_MAP, 1, 1, 0, map),
        instruction(0, 0, 0, 0, 0),
        instruction(MOVE, 2, 10, 0, 0),
        instruction(ADD, 2, 0, 0, -4),
        instruction(CALL, 0, 0, 0, MAP_LOOKUP),
        instruction(JUMP_IF, 0, 0, 7, 0),
        instruction(MOVE, 7, 0, 0, 0),
        instruction(MOVE, 1, 6, 0, 0),
        instruction(MOVE, 2, 7, 0, 0),
        instruction(SET, 3, 0, 0, 0),
        instruction(CALL, 0, 0, 0, SOCKET_ASSIGN),
        instruction(MOVE, 1, 7, 0, 0),
        instruction(CALL, 0, 0, 0, SOCKET_RELEASE),
        instruction(SET, 0, 0, 0, PASS),
        instruction(EXIT, 0, 0, 0, 0),
    ]
}

fn load(program: &[[u8; 8]]) -> Result<OwnedFd> {
    let code = program.concat();
    let licence = c"Apache-2.0";
    let count = u32::try_from(program.len()).map_err(Error::other)?;
    let mut attributes = numbers(&[SOCKET_LOOKUP, count]);
    attributes.extend((code.as_ptr() as u64).to_ne_bytes());
    attributes.extend((licence.as_ptr() as u64).to_ne_bytes());
    // No log; any kernel's version; no flags; no name; no device.
    attributes.extend([0; 4 + 4 + 8 + 4 + 4 + 16 + 4]);
    attributes.extend(AT_SOCKET_LOOKUP.to_ne_bytes());
    bpf(PROGRAM_LOAD, &attributes)
}

/// bpf(2) that answers with a descriptor.
fn bpf(command: libc::c_int, attributes: &[u8]) -> Result<OwnedFd> {
    let fd = bpf_status(command, attributes)?;
    let fd = i32::try_from(fd).map_err(Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    #[expect(unsafe_code, reason = "a received descriptor has no safe constructor")]
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    Ok(fd)
}

fn bpf_status(command: libc::c_int, attributes: &[u8]) -> Result<libc::c_long> {
    // SAFETY: the attributes are live for the call and have the length that is given; addresses in them are of values that
    // the callers keep alive through it. The kernel copies what it keeps.
    #[expect(unsafe_code, reason = "no safe wrapper is at hand")]
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), attributes.len()) };
    if result < 0 { Err(Error::last_os_error()) } else { Ok(result) }
}
