//! What depends on the processor's architecture: where things are in the guest's address space, how its kernel is started,
//! how its processors are set up. One folder an architecture; the rest of the monitor names none.

#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "x86_64")]
pub(crate) use x86_64::*;
