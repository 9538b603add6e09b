//! A machine of the clone's KVM that is held while the command runs, and does nothing.
//!
//! Linux rewrites its own code when the first machine is made and when the last is gone: the scheduler's, for the preemption
//! notifiers of `KVM_CREATE_VM`, and KVM's own, for a local APIC that is switched off. QEMU 7.2 may go on with a
//! translation of what was there before, where one processor translates what another writes: then the clone takes the breakpoint
//! of the rewriting for ever, on each processor. Seen once in 5 to 60 machines (docs/reliability.md).

use std::convert::Infallible;
use std::io::Write;

use anyhow::{Context, Result};
use kvm_ioctls::Kvm;

/// Makes the machine, says so by a line on standard output, and stays.
pub(crate) fn hold() -> Result<Infallible> {
    let machine = Kvm::new().and_then(|kvm| kvm.create_vm()).context("make a machine")?;
    machine.create_irq_chip().context("make its interrupt controllers")?;
    // Its local APIC is off, as after a reset.
    let _processor = machine.create_vcpu(0).context("make its processor")?;
    let mut output = std::io::stdout();
    output.write_all(b"held\n").and_then(|()| output.flush()).context("say that it is held")?;
    loop {
        std::thread::park();
    }
}
