//! How fast a device may be: a bucket of bytes and one of operations each way, which fill as time passes, and a timer for who has to wait.
//!
//! What is begun is done, whatever it takes: a bucket may be left with less than nothing, and is waited for until it has something again. So a request that is
//! larger than a bucket passes, and the rate is right all the same.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use crate::device::{Broken, Counters};
use crate::drain::Budget;

/// How much a bucket holds, in time: what a device may do at once after it has done nothing.
const BURST: Duration = Duration::from_millis(100);

/// The most that may pass one way; 0 is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rate {
    /// Bytes in a second.
    pub bytes_per_second: u64,
    /// Requests or packets in a second.
    pub operations_per_second: u64,
}

/// The most that a device may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// What the guest reads or receives.
    pub to_guest: Rate,
    /// What it writes or sends.
    pub from_guest: Rate,
}

/// Which way a turn's work goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// To the guest.
    ToGuest,
    /// From it.
    FromGuest,
    /// Either: what comes next is not known before it is begun, and waits for both.
    Either,
}

/// One bucket. What is in it is counted in billionths, so that no rate and no moment is too small.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    rate: u64,
    level: i128,
}

/// Billionths of one.
const ONE: i128 = 1_000_000_000;

impl Bucket {
    fn new(rate: u64) -> Self {
        let mut bucket = Self { rate, level: 0 };
        bucket.level = bucket.size();
        bucket
    }

    /// A moment's worth, and one at least.
    fn size(&self) -> i128 {
        (i128::from(self.rate) * i128::try_from(BURST.as_nanos()).unwrap_or(0)).max(ONE)
    }

    fn fill(&mut self, passed: Duration) {
        let gained = i128::from(self.rate) * i128::try_from(passed.as_nanos()).unwrap_or(i128::MAX >> 64);
        self.level = self.level.saturating_add(gained).min(self.size());
    }

    /// What may be begun now, of `most`; none while there is less than one in it.
    fn may(&self, most: usize) -> Option<usize> {
        if self.rate == 0 {
            return Some(most);
        }
        usize::try_from(self.level / ONE).ok().filter(|whole| *whole > 0).map(|whole| whole.min(most))
    }

    fn take(&mut self, count: u64) {
        if self.rate > 0 {
            self.level = self.level.saturating_sub(i128::from(count) * ONE);
        }
    }

    /// How long it is until there is one in it again.
    fn wait(&self) -> Duration {
        let missing = (ONE - self.level).max(0);
        let nanoseconds = missing.checked_div(i128::from(self.rate)).map_or(0, |whole| whole + 1);
        Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
    }
}

/// What may pass one way.
#[derive(Debug, Clone, Copy)]
struct Pass {
    bytes: Bucket,
    operations: Bucket,
}

impl Pass {
    fn new(rate: Rate) -> Self {
        Self { bytes: Bucket::new(rate.bytes_per_second), operations: Bucket::new(rate.operations_per_second) }
    }

    fn is_limited(&self) -> bool {
        self.bytes.rate > 0 || self.operations.rate > 0
    }

    fn fill(&mut self, passed: Duration) {
        self.bytes.fill(passed);
        self.operations.fill(passed);
    }

    fn may(&self, budget: Budget) -> Option<Budget> {
        Some(Budget { chains: self.operations.may(budget.chains)?, bytes: self.bytes.may(budget.bytes)? })
    }

    fn wait(&self) -> Duration {
        self.bytes.wait().max(self.operations.wait())
    }
}

/// See the module.
#[derive(Debug)]
pub struct Limiter {
    to_guest: Pass,
    from_guest: Pass,
    /// When they were filled last.
    filled: Instant,
    timer: OwnedFd,
    /// When it rings; none where nobody waits for that.
    rings: Option<Instant>,
    /// Queues that wait for it: who has waited longest is first.
    waiting: VecDeque<u16>,
}

impl Limiter {
    /// Without limits.
    ///
    /// # Errors
    /// Where the kernel has no timer.
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        let none = Pass::new(Rate::default());
        Ok(Self {
            to_guest: none,
            from_guest: none,
            filled: Instant::now(),
            timer,
            rings: None,
            waiting: VecDeque::new(),
        })
    }

    /// Sets other limits. Whoever waits is woken, and finds out how long by these.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set(&mut self, limits: Limits, now: Instant) -> io::Result<()> {
        (self.to_guest, self.from_guest) = (Pass::new(limits.to_guest), Pass::new(limits.from_guest));
        self.filled = now;
        self.rings = None;
        self.ring_at(now, now)
    }

    fn is_limited(&self) -> bool {
        self.to_guest.is_limited() || self.from_guest.is_limited()
    }

    /// What a turn of a queue may do now, of `budget`; `None` where it has to wait: the timer tells when, and [`Self::heard`] who.
    ///
    /// # Errors
    /// [`Broken`] where the timer can't be set.
    pub fn turn(&mut self, queue: u16, budget: Budget, way: Way) -> Result<Option<Budget>, Broken> {
        if !self.is_limited() {
            return Ok(Some(budget));
        }
        let allowed = self.budget(budget, way, Instant::now());
        let allowed = allowed.map_err(|error| Broken(format!("its limit can't be kept: {error}")))?;
        if allowed.is_none() && !self.waiting.contains(&queue) {
            self.waiting.push_back(queue);
        }
        Ok(allowed)
    }

    fn budget(&mut self, budget: Budget, way: Way, now: Instant) -> io::Result<Option<Budget>> {
        let passed = now.saturating_duration_since(self.filled);
        self.to_guest.fill(passed);
        self.from_guest.fill(passed);
        self.filled = now;
        let passes = match way {
            Way::ToGuest => &[self.to_guest][..],
            Way::FromGuest => &[self.from_guest],
            Way::Either => &[self.to_guest, self.from_guest],
        };
        let allowed = passes.iter().try_fold(budget, |budget, pass| pass.may(budget));
        if allowed.is_none() {
            let wait = passes.iter().map(Pass::wait).max().unwrap_or_default();
            // Later than any that matters.
            self.ring_at(now.checked_add(wait).unwrap_or_else(|| now + Duration::from_secs(1 << 30)), now)?;
        }
        Ok(allowed)
    }

    /// What a turn has done, by the device's counts before it and after. What was refused cost as much as what passed `refused` way.
    pub fn took(&mut self, refused: Way, before: &Counters, after: &Counters) {
        let errors = after.errors.wrapping_sub(before.errors);
        if refused == Way::ToGuest {
            self.to_guest.operations.take(errors);
        } else {
            self.from_guest.operations.take(errors);
        }
        self.to_guest.bytes.take(after.bytes_in.wrapping_sub(before.bytes_in));
        self.to_guest.operations.take(after.operations_in.wrapping_sub(before.operations_in));
        self.from_guest.bytes.take(after.bytes_out.wrapping_sub(before.bytes_out));
        self.from_guest.operations.take(after.operations_out.wrapping_sub(before.operations_out));
    }

    /// Readable when somebody may go on who had to wait.
    #[must_use]
    pub fn timer(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    /// The timer was heard. Those who had to wait, and are to look again: who has waited longest is first.
    pub fn heard(&mut self) -> VecDeque<u16> {
        self.rings = None;
        let mut count = [0; 8];
        // It may have been heard already.
        let _ = rustix::io::read(&self.timer, &mut count);
        std::mem::take(&mut self.waiting)
    }

    /// Nobody waits any more.
    pub fn reset(&mut self) {
        self.waiting.clear();
    }

    /// Has the timer ring at `moment`, or before: somebody else may have less to wait.
    fn ring_at(&mut self, moment: Instant, now: Instant) -> io::Result<()> {
        if self.rings.is_some_and(|rings| rings <= moment) {
            return Ok(());
        }
        // One that is over at once never was set.
        let time = moment.saturating_duration_since(now).max(Duration::from_nanos(1));
        let it_value = Timespec::try_from(time).unwrap_or(Timespec { tv_sec: i64::from(u32::MAX), tv_nsec: 0 });
        let once = Itimerspec { it_interval: Timespec::default(), it_value };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)?;
        self.rings = Some(moment);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Budget = Budget { chains: 32, bytes: 16 << 20 };

    fn limits(bytes_per_second: u64, operations_per_second: u64) -> Limits {
        let rate = Rate { bytes_per_second, operations_per_second };
        Limits { to_guest: rate, ..Limits::default() }
    }

    fn limiter(bytes_per_second: u64, operations_per_second: u64, now: Instant) -> Limiter {
        let mut limiter = Limiter::new().unwrap();
        limiter.set(limits(bytes_per_second, operations_per_second), now).unwrap();
        limiter
    }

    fn done(operations: u64, bytes: u64) -> Counters {
        Counters { operations_in: operations, bytes_in: bytes, ..Counters::default() }
    }

    fn may(limiter: &mut Limiter, way: Way, now: Instant) -> Option<Budget> {
        limiter.budget(ALL, way, now).unwrap()
    }

    /// Does all that it may, in requests of `bytes`, for `seconds` of a clock that counts milliseconds; how many.
    fn run(limiter: &mut Limiter, start: Instant, seconds: u64, bytes: u64) -> u64 {
        let mut requests = 0;
        for millisecond in 0..seconds * 1000 {
            let now = start + Duration::from_millis(millisecond);
            while let Some(budget) = may(limiter, Way::Either, now) {
                assert!((1..=ALL.chains).contains(&budget.chains) && (1..=ALL.bytes).contains(&budget.bytes));
                limiter.took(Way::FromGuest, &done(0, 0), &done(1, bytes));
                requests += 1;
            }
        }
        requests
    }

    #[test]
    fn rates_are_kept_whatever_the_size_of_requests() {
        let now = Instant::now();
        for bytes in [512, 4096, 1 << 20, 16 << 20] {
            let passed = run(&mut limiter(4 << 20, 0, now), now, 20, bytes) * bytes;
            // A bucket's worth at first, and one request beyond.
            let most = (4 << 20) * 20 + (4 << 20) / 10 + bytes;
            assert!(passed <= most && passed + bytes + (1 << 19) >= (4 << 20) * 20, "{passed} bytes in {bytes}s");
        }
        let operations = run(&mut limiter(0, 50, now), now, 20, 1 << 20);
        assert!((1000..=1006).contains(&operations), "{operations}");
        let both = run(&mut limiter(1 << 30, 7, now), now, 10, 512);
        assert!((70..=71).contains(&both), "{both}");
    }

    #[test]
    fn each_way_has_its_own() {
        let now = Instant::now();
        let mut limiter = limiter(1000, 0, now);
        assert!(limiter.is_limited());
        limiter.took(Way::FromGuest, &done(0, 0), &done(1, 5000));
        assert!(may(&mut limiter, Way::ToGuest, now).is_none() && may(&mut limiter, Way::Either, now).is_none());
        assert!(may(&mut limiter, Way::FromGuest, now).is_some());
        let rate = Rate { bytes_per_second: 0, operations_per_second: 10 };
        limiter.set(Limits { from_guest: rate, ..Limits::default() }, now).unwrap();
        let written = Counters { operations_out: 1, errors: 1, ..Counters::default() };
        limiter.took(Way::FromGuest, &Counters::default(), &written);
        assert!(may(&mut limiter, Way::FromGuest, now).is_none() && may(&mut limiter, Way::ToGuest, now).is_some());
        // Who has less to wait is not held up by who has more.
        let rate = |bytes_per_second| Rate { bytes_per_second, operations_per_second: 0 };
        limiter.set(Limits { to_guest: rate(1000), from_guest: rate(1) }, now).unwrap();
        limiter.heard();
        limiter.took(Way::ToGuest, &Counters::default(), &Counters { bytes_in: 101, bytes_out: 1000, ..written });
        assert!(may(&mut limiter, Way::ToGuest, now).is_none());
        let early = limiter.rings.unwrap();
        assert!(may(&mut limiter, Way::FromGuest, now).is_none() && limiter.rings == Some(early));
        assert!(early < now + Duration::from_secs(1));
    }

    #[test]
    fn who_waits_is_told_when_and_without_limits_nobody_waits() {
        let now = Instant::now();
        let mut limiter = Limiter::new().unwrap();
        assert!(!limiter.is_limited());
        let budget = may(&mut limiter, Way::Either, now).unwrap();
        assert_eq!((budget.chains, budget.bytes), (ALL.chains, ALL.bytes));
        limiter.took(Way::FromGuest, &done(0, 0), &done(1 << 40, 1 << 60));
        assert!(may(&mut limiter, Way::Either, now).is_some());
        let mut limiter = self::limiter(1000, 0, now);
        // That it has a limit.
        limiter.heard();
        limiter.took(Way::FromGuest, &done(0, 0), &done(1, 1100));
        assert!(may(&mut limiter, Way::Either, now).is_none());
        assert_eq!(limiter.to_guest.wait(), Duration::from_nanos(1_001_000_001), "1000 bytes too many, and one");
        assert!(may(&mut limiter, Way::Either, now + Duration::from_millis(1000)).is_none());
        assert!(may(&mut limiter, Way::Either, now + Duration::from_millis(1002)).is_some());
        // The timer was set to a second; another limit wakes at once.
        let ready = |limiter: &Limiter, patience: i64| {
            let patience = Timespec { tv_sec: patience, tv_nsec: 0 };
            let timer = rustix::event::PollFd::new(&limiter.timer, rustix::event::PollFlags::IN);
            rustix::event::poll(&mut [timer], Some(&patience)).unwrap() == 1
        };
        limiter.took(Way::FromGuest, &done(0, 0), &done(1, 1 << 40));
        assert!(may(&mut limiter, Way::Either, now).is_none() && !ready(&limiter, 0));
        limiter.set(Limits::default(), now).unwrap();
        assert!(ready(&limiter, 60));
        limiter.heard();
        assert!(!ready(&limiter, 0) && may(&mut limiter, Way::Either, now).is_some());
    }

    #[test]
    fn rates_without_end_and_clocks_that_go_back_break_nothing() {
        let now = Instant::now();
        let mut limiter = limiter(u64::MAX, 1, now);
        for step in [0, 1 << 30, 5, 1 << 31] {
            let _ = may(&mut limiter, Way::Either, now + Duration::from_secs(step));
            limiter.took(Way::FromGuest, &done(0, u64::MAX), &done(u64::MAX, 0));
        }
        assert!(may(&mut limiter, Way::Either, now).is_none());
    }
}
