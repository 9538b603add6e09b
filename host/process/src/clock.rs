//! The host's clock, watched.

use std::io::{Error, Result};
use std::os::fd::OwnedFd;
use std::time::{Duration, SystemTime};

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::child::watched;

/// Tells when the host's clock was set, or has gone on after a suspend: a timer of the kernel's that such a step cancels
/// (timerfd_create(2), `TFD_TIMER_CANCEL_ON_SET`).
#[derive(Debug)]
pub struct ClockWatch {
    timer: AsyncFd<OwnedFd>,
    period: Duration,
}

impl ClockWatch {
    /// A watch that also tells after each `period`.
    ///
    /// # Errors
    /// Where the kernel has no timer to give.
    pub fn new(period: Duration) -> Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Realtime, flags)?;
        let watch = Self { timer: watched(timer, Interest::READABLE)?, period };
        watch.arm()?;
        Ok(watch)
    }

    /// Waits for the next time. What happens between two calls is told by the second one.
    ///
    /// # Errors
    /// Where the timer can't be set.
    pub async fn changed(&self) -> Result<()> {
        let read = self
            .timer
            .async_io(Interest::READABLE, |timer| rustix::io::read(timer, &mut [0; 8]).map_err(Error::from))
            .await;
        match read {
            // The clock was set.
            Err(error) if error.raw_os_error() == Some(libc::ECANCELED) => {}
            other => drop(other?),
        }
        self.arm()
    }

    fn arm(&self) -> Result<()> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_err(Error::other)?;
        let at = now + self.period;
        let value = Timespec {
            tv_sec: i64::try_from(at.as_secs()).map_err(Error::other)?,
            tv_nsec: i64::from(at.subsec_nanos()),
        };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
        match rustix::time::timerfd_settime(&self.timer, flags, &once) {
            // It is set; the kernel tells of a step of the clock that has come in between, which is about to be told anyway.
            Err(rustix::io::Errno::CANCELED) => Ok(()),
            other => Ok(other.map(drop)?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_tells_after_each_period() {
        let watch = ClockWatch::new(Duration::from_millis(20)).unwrap();
        for _ in 0..3 {
            let told = tokio::time::timeout(Duration::from_secs(20), watch.changed()).await;
            told.unwrap().unwrap();
        }
    }
}
