//! Serving what a queue holds, a bounded piece at a time.

use std::time::{Duration, Instant};

use crate::device::{Broken, Turn};
use crate::ring::{Chain, Ring};

/// How long the guest waits at most to hear of a chain that is served, while the device serves more.
const LATE: Duration = Duration::from_micros(100);

/// The most that one turn does. A chain that is begun is served, so a turn may pass `bytes` by one chain's.
#[derive(Debug, Clone, Copy)]
pub struct Budget {
    /// Chains.
    pub chains: usize,
    /// Bytes that pass through the device.
    pub bytes: usize,
}

/// What one chain came to.
#[derive(Debug, Clone, Copy, Default)]
pub struct Served {
    /// Bytes that were written into it.
    pub written: u32,
    /// Bytes that passed through the device, against the [`Budget`].
    pub moved: usize,
}

/// Serves chains until there are none or the budget is spent, and gives them back. The doorbell is left alone meanwhile, and
/// asked for again once there are no more.
///
/// # Errors
/// [`Broken`] where the ring is nonsense, or `serve` says so.
pub fn drain(
    ring: &mut Ring,
    budget: Budget,
    mut serve: impl FnMut(&Chain) -> Result<Served, Broken>,
) -> Result<Turn, Broken> {
    ring.hush()?;
    let mut moved = 0;
    let mut since: Option<Instant> = None;
    let mut turn = Turn::More;
    for _ in 0..budget.chains {
        if moved >= budget.bytes {
            break;
        }
        let Some(chain) = ring.pop()? else {
            // For what the guest has added before it sees this it does not ring.
            if ring.listen()? {
                continue;
            }
            turn = Turn::Done;
            break;
        };
        let served = serve(&chain)?;
        ring.push(chain.head_index(), served.written)?;
        moved = moved.saturating_add(served.moved);
        let waiting = since.get_or_insert_with(Instant::now);
        if waiting.elapsed() > LATE {
            ring.signal()?;
            since = None;
        }
    }
    if since.is_some() {
        ring.signal()?;
    }
    Ok(turn)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::{Driver, memory};

    const FREE: Budget = Budget { chains: 100, bytes: usize::MAX };

    #[test]
    fn a_turn_ends_with_its_budget() {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0, 16);
        let mut ring = driver.ring(false);
        for _ in 0..5 {
            driver.chain(&[(0x8000, 10, true)]);
        }
        let mut served = 0;
        let mut run = |budget| {
            drain(&mut ring, budget, |_| {
                served += 1;
                Ok(Served { written: served, moved: 10 })
            })
        };
        assert_eq!(run(Budget { chains: 2, bytes: 100 }).unwrap(), Turn::More);
        assert_eq!(driver.used(), [(0, 1), (1, 2)]);
        assert!(driver.interrupted());
        assert_eq!(run(Budget { chains: 9, bytes: 11 }).unwrap(), Turn::More);
        assert_eq!(driver.used(), [(2, 3), (3, 4)]);
        assert_eq!(run(FREE).unwrap(), Turn::Done);
        assert_eq!(driver.used(), [(4, 5)]);
        assert!(driver.interrupted());
        assert_eq!(run(FREE).unwrap(), Turn::Done);
        assert!(!driver.interrupted(), "there was nothing to tell");
    }

    #[test]
    fn the_doorbell_is_asked_for_behind_the_last_chain() {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0, 16);
        let mut ring = driver.ring(true);
        for _ in 0..3 {
            driver.chain(&[(0x8000, 10, true)]);
        }
        driver.want_interrupt_after(2);
        let serve = |_: &Chain| Ok(Served::default());
        assert_eq!(drain(&mut ring, Budget { chains: 2, bytes: 1 }, serve).unwrap(), Turn::More);
        assert_eq!(driver.wants_doorbell_after(), 0, "not yet");
        assert!(!driver.interrupted(), "the guest asked for the third");
        assert_eq!(drain(&mut ring, FREE, serve).unwrap(), Turn::Done);
        assert_eq!(driver.wants_doorbell_after(), 3);
        assert!(driver.interrupted());
    }

    #[test]
    fn a_guest_that_waits_hears_while_more_is_served() {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0, 16);
        let mut ring = driver.ring(false);
        driver.chain(&[(0x8000, 10, true)]);
        driver.chain(&[(0x8000, 10, true)]);
        driver.chain(&[(0x8000, 10, true)]);
        let mut heard = Vec::new();
        let turn = drain(&mut ring, FREE, |_| {
            heard.push(driver.interrupted());
            // The work that takes its time.
            std::thread::sleep(LATE * 3);
            Ok(Served::default())
        });
        assert_eq!(turn.unwrap(), Turn::Done);
        assert_eq!(heard, [false, false, true], "after the second, whose serving made the first late");
    }

    #[test]
    fn an_index_that_jumps_or_a_head_that_is_none_breaks() {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0, 16);
        let mut ring = driver.ring(false);
        driver.offer(16);
        assert!(drain(&mut ring, FREE, |_| Ok(Served::default())).is_err());
        let mut driver = Driver::new(&memory, 0, 16);
        let mut ring = driver.ring(false);
        driver.jump(17);
        assert!(drain(&mut ring, FREE, |_| Ok(Served::default())).is_err());
        let mut driver = Driver::new(&memory, 0, 16);
        let mut ring = driver.ring(false);
        driver.chain(&[(0x8000, 10, true)]);
        assert!(drain(&mut ring, FREE, |_| Err(Broken::new("the device's own"))).is_err());
        assert_eq!(driver.used(), []);
    }
}
