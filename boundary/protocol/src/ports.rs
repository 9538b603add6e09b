//! Vsock ports. Those below 1029 are Kata's.

/// The agent's ttrpc server, in the guest.
pub const AGENT: u32 = 1024;

/// The streams of processes, in the guest: the host connects once a stream, and names the connection in CreateContainer or
/// ExecProcess by the port that it came from. What flows there needs no calls.
pub const STREAMS: u32 = 1027;

/// A shell in the guest, where its kernel's command line has [`DEBUG_CONSOLE`] and its image a shell: a terminal, bytes both ways.
pub const DEBUG: u32 = 1026;

/// The word of the kernel's command line by which the agent serves [`DEBUG`].
pub const DEBUG_CONSOLE: &str = "agent.debug_console";

/// Connections to the guest's loopback (see [`crate::forward`]), in the guest. Ours, beside Kata's.
pub const FORWARD: u32 = 1040;

/// The context identifier that a guest has where the backend is a process of our own and no kernel hands them out.
pub const HYBRID_GUEST_CID: u32 = 3;

/// The port *on the host* that the guest dials to say that it serves (see [`crate::hello`]).
///
/// It is the guest's own context identifier. So kernel, initrd and command line are the same for every pod, and yet two
/// pods under the host kernel's vhost-vsock, which share one set of ports, never meet.
#[must_use]
pub fn hello(guest_cid: u32) -> u32 {
    guest_cid
}
