//! The rate of the processor's time-stamp counter.
//!
//! An emulated guest counts time by the host's counter, and measures its rate at boot against another clock. QEMU's
//! `microvm` has none but the interval timer, against which the measurement fails on a busy host; the kernel then waits for
//! that timer's interrupt, which `microvm` wires to another pin than its ACPI tables say, and so for ever. So the guest is
//! told the rate (`tsc_early_khz`, Linux Documentation/admin-guide/kernel-parameters.txt).

/// The rate in MHz, rounded so that every machine on a host is told the same. None where there is no such counter.
#[cfg(target_arch = "x86_64")]
pub(crate) fn tsc_mhz() -> Option<u32> {
    use std::time::Duration;

    /// How long is measured: two readings, each within some 100 ns, give 1 part in 10 000.
    const SPAN: Duration = Duration::from_millis(2);
    let before = reading()?;
    let mut after = reading()?;
    while after.0.duration_since(before.0) < SPAN {
        after = reading()?;
    }
    rate(after.1.checked_sub(before.1)?, after.0.duration_since(before.0))
}

/// As above.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn tsc_mhz() -> Option<u32> {
    None
}

/// The system's clock and the counter at the same moment: of several readings, the one that was disturbed least.
#[cfg(target_arch = "x86_64")]
fn reading() -> Option<(std::time::Instant, u64)> {
    // SAFETY: RDTSC reads a counter and nothing else; user programs may (CR4.TSD is clear on Linux).
    #[expect(unsafe_code, reason = "an intrinsic")]
    let counter = || unsafe { core::arch::x86_64::_rdtsc() };
    let once = || {
        let from = counter();
        let now = std::time::Instant::now();
        let width = counter().wrapping_sub(from);
        (width, now, from.wrapping_add(width / 2))
    };
    (0..8).map(|_| once()).min_by_key(|(width, _, _)| *width).map(|(_, now, counter)| (now, counter))
}

fn rate(ticks: u64, span: std::time::Duration) -> Option<u32> {
    let nanoseconds = u64::try_from(span.as_nanos()).ok()?;
    let thousandths = ticks.checked_mul(1_000_000)?.checked_div(nanoseconds)?;
    u32::try_from(thousandths.checked_add(500)? / 1000).ok().filter(|mhz| *mhz > 0)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_rate_is_ticks_by_time() {
        assert_eq!(rate(5_199_988, Duration::from_millis(2)), Some(2600));
        assert_eq!(rate(4_989_000, Duration::from_millis(2)), Some(2495));
        assert_eq!(rate(1, Duration::ZERO), None);
        assert_eq!(rate(0, Duration::from_millis(2)), None);
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn measured_again_it_is_the_same() {
        let (one, two) = (tsc_mhz().unwrap(), tsc_mhz().unwrap());
        // Two neighbours where the rate lies between two numbers.
        assert!(one.abs_diff(two) <= 1, "{one} and {two}");
    }
}
