//! What tells the guest of devices and processors that come and go while it runs: registers that ACPI's methods read and write (ACPI 6.5,
//! section 5.6.9, generic event device), and an interrupt that stays on until they were read.
//!
//! | port | read | written |
//! |---|---|---|
//! | +0 | devices that have come, a bit each; bit 0: the machine goes on where another was saved; reading clears it | |
//! | +4 | devices that are to go, a bit each; reading clears it | |
//! | +8 | | devices that the guest has let go of, a bit each |
//! | +12 | | the processor that is meant by the next register |
//! | +16 | whether that processor is there: 1 or 0 | |
//! | +20 | what is new of a processor: its number, and what as ACPI's `Notify` has it, from bit 16 on; 0 is nothing; reading clears it | |
//! | +24 | | a processor that the guest has let go of |

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::Error;
use crate::arch::layout::{PLUG, PLUG_IRQ, PLUG_PORTS};
use crate::irq::Wires;

/// Registers, by their offset.
pub(crate) const COME: u16 = 0;
pub(crate) const GO: u16 = 4;
pub(crate) const GONE: u16 = 8;
pub(crate) const PROCESSOR: u16 = 12;
pub(crate) const PRESENT: u16 = 16;
pub(crate) const NEWS: u16 = 20;
pub(crate) const PROCESSOR_GONE: u16 = 24;

/// Of [`COME`]: the machine goes on where another was saved. No device is in slot 0.
pub(crate) const RESTORED: u32 = 1;

/// Values of ACPI's `Notify` (ACPI 6.5, table 5.187): look whether it is there; let go of it.
pub(crate) const DEVICE_CHECK: u8 = 1;
pub(crate) const EJECT_REQUEST: u8 = 3;

/// Of a machine that is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Saved(State);

/// See the module.
pub(crate) struct Plug {
    vm: Arc<dyn Wires>,
    /// The host tells, processors read.
    state: Mutex<State>,
}

/// What a machine that is saved knows of its comings and goings.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    /// What the guest was not told yet.
    come: u32,
    go: u32,
    /// What it was asked to let go of, and has not.
    asked: u32,
    processors: Vec<Processor>,
    selected: u32,
}

/// A processor that can come and go, or is there from the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Processor {
    is_there: bool,
    /// What the guest was not told yet.
    news: Option<u8>,
    /// Whether it was asked to let go of it.
    is_asked: bool,
}

/// What the guest has let go of, by its number.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Gone {
    Device(u8),
    Processor(u8),
}

impl State {
    fn has_news(&self) -> bool {
        self.come | self.go != 0 || self.processors.iter().any(|processor| processor.news.is_some())
    }

    fn processor(&mut self, number: u32) -> Option<&mut Processor> {
        self.processors.get_mut(usize::try_from(number).ok()?)
    }

    /// The next news of a processor, as the register has it.
    fn take_news(&mut self) -> u32 {
        let mut all = self.processors.iter_mut().zip(0_u32..);
        all.find_map(|(processor, number)| Some(u32::from(processor.news.take()?) << 16 | number)).unwrap_or(0)
    }
}

impl Plug {
    /// Of a machine whose interrupts are these, with so many processors from its start and at most.
    pub(crate) fn new(vm: Arc<dyn Wires>, processors: u32, processors_max: u32) -> Self {
        let processor = |number| Processor { is_there: number < processors, ..Processor::default() };
        let processors = (0..processors_max).map(processor).collect();
        Self { vm, state: Mutex::new(State { processors, ..State::default() }) }
    }

    /// Whether a port is one of these registers.
    pub(crate) fn has(port: u16) -> bool {
        (PLUG..PLUG + PLUG_PORTS).contains(&port)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The interrupt is on while there is something to read: a guest that is not ready yet finds it when it is.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state();
        let was = state.has_news();
        let result = change(&mut state);
        let is = state.has_news();
        if was != is
            && let Err(error) = self.vm.level(PLUG_IRQ, is)
        {
            log::warn!("the guest can't be told what comes and goes: {error}");
        }
        result
    }

    /// The guest is to look at the device of this number, which has come.
    pub(crate) fn come(&self, number: u8) {
        self.change(|state| {
            state.come |= bit(number);
            // What was asked of the one before does not hold for it.
            state.go &= !bit(number);
            state.asked &= !bit(number);
        });
    }

    /// The guest is to let go of the device of this number.
    pub(crate) fn go(&self, number: u8) {
        self.change(|state| {
            state.go |= bit(number);
            state.asked |= bit(number);
        });
    }

    /// What was asked of the device of this number is of no more interest: it is gone.
    pub(crate) fn forget(&self, number: u8) {
        self.change(|state| {
            for mask in [&mut state.come, &mut state.go, &mut state.asked] {
                *mask &= !bit(number);
            }
        });
    }

    pub(crate) fn save(&self) -> Saved {
        Saved(self.state().clone())
    }

    /// Takes the place of a saved one, and tells the guest that it goes on in another machine.
    ///
    /// # Errors
    /// Where that had another number of processors.
    pub(crate) fn restore(&self, saved: Saved) -> Result<(), Error> {
        let (most, had) = (self.state().processors.len(), saved.0.processors.len());
        if most != had {
            return Err(Error::Invalid(format!(
                "the machine has {most} processors at most; that which was saved, {had}"
            )));
        }
        self.change(|state| {
            *state = saved.0;
            state.come |= RESTORED;
        });
        Ok(())
    }

    /// How many processors there are.
    pub(crate) fn processors(&self) -> u32 {
        let count = self.state().processors.iter().filter(|processor| processor.is_there).count();
        u32::try_from(count).unwrap_or(0)
    }

    /// The number of the next processor that can come.
    pub(crate) fn next_processor(&self) -> Option<u8> {
        let first = self.state().processors.iter().position(|processor| !processor.is_there)?;
        u8::try_from(first).ok()
    }

    /// The guest is to look at the processor of this number, which has come.
    pub(crate) fn processor_comes(&self, number: u8) {
        self.change(|state| {
            if let Some(processor) = state.processor(number.into()) {
                *processor = Processor { is_there: true, news: Some(DEVICE_CHECK), is_asked: false };
            }
        });
    }

    /// Whether there is a processor of this number.
    pub(crate) fn has_processor(&self, number: u8) -> bool {
        self.state().processor(number.into()).is_some_and(|processor| processor.is_there)
    }

    /// The guest need not let go of a processor any more.
    pub(crate) fn keep_processors(&self) {
        self.change(|state| {
            for processor in state.processors.iter_mut().filter(|processor| processor.is_asked) {
                (processor.is_asked, processor.news) = (false, None);
            }
        });
    }

    /// The guest is to let go of its last processor, where that is not the first.
    pub(crate) fn last_processor_goes(&self) {
        self.change(|state| {
            let last = state.processors.iter_mut().skip(1).rfind(|processor| processor.is_there);
            if let Some(last) = last {
                (last.news, last.is_asked) = (Some(EJECT_REQUEST), true);
            }
        });
    }

    /// A processor reads.
    pub(crate) fn read(&self, port: u16, data: &mut [u8]) {
        let value = match (port.wrapping_sub(PLUG), data.len()) {
            (COME, 4) => self.change(|state| std::mem::take(&mut state.come)),
            (GO, 4) => self.change(|state| std::mem::take(&mut state.go)),
            (NEWS, 4) => self.change(State::take_news),
            (PRESENT, 4) => {
                let mut state = self.state();
                let selected = state.selected;
                state.processor(selected).map_or(0, |processor| u32::from(processor.is_there))
            }
            _ => 0,
        };
        data.fill(0);
        for (place, byte) in data.iter_mut().zip(value.to_le_bytes()) {
            *place = byte;
        }
    }

    /// A processor writes. What the guest has let go of, of that only that it was asked for.
    pub(crate) fn write(&self, port: u16, data: &[u8]) -> impl Iterator<Item = Gone> + use<> {
        let (mut devices, mut processor) = (0, None);
        if let (register, &[a, b, c, d]) = (port.wrapping_sub(PLUG), data) {
            let value = u32::from_le_bytes([a, b, c, d]);
            match register {
                GONE => devices = self.change(|state| state.let_go(value)),
                PROCESSOR => self.state().selected = value,
                PROCESSOR_GONE => processor = self.change(|state| state.processor_goes(value)),
                _ => {}
            }
        }
        (0..32).filter(move |number| devices & bit(*number) != 0).map(Gone::Device).chain(processor)
    }
}

impl State {
    fn let_go(&mut self, devices: u32) -> u32 {
        let gone = devices & self.asked;
        self.asked &= !gone;
        // What it has let go of before it was told it needs not be told.
        self.go &= !gone;
        gone
    }

    fn processor_goes(&mut self, number: u32) -> Option<Gone> {
        let processor = self.processor(number)?;
        if !processor.is_asked {
            // It was to keep it, and may not have known: it is to look for it again.
            processor.news = processor.is_there.then_some(DEVICE_CHECK);
            return None;
        }
        *processor = Processor::default();
        u8::try_from(number).ok().map(Gone::Processor)
    }
}

fn bit(number: u8) -> u32 {
    1_u32.checked_shl(number.into()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::atomic::{AtomicBool, Ordering};

    use kvm_bindings::kvm_irq_routing_entry;
    use vmm_sys_util::eventfd::EventFd;

    use super::*;

    #[derive(Default)]
    struct Line(AtomicBool);

    impl Wires for Line {
        fn route(&self, _: &[kvm_irq_routing_entry]) -> io::Result<()> {
            unreachable!()
        }
        fn watch(&self, _: &EventFd, _: u32) -> io::Result<()> {
            unreachable!()
        }
        fn forget(&self, _: &EventFd, _: u32) -> io::Result<()> {
            unreachable!()
        }
        fn level(&self, pin: u32, high: bool) -> io::Result<()> {
            assert_eq!(pin, PLUG_IRQ);
            assert_ne!(self.0.swap(high, Ordering::Relaxed), high, "told twice");
            Ok(())
        }
        fn map(&self, _: u32, _: u64, _: u64, _: u64) -> io::Result<()> {
            unreachable!()
        }
        fn ring(&self, _: &EventFd, _: u64) -> io::Result<()> {
            unreachable!()
        }
        fn unring(&self, _: &EventFd, _: u64) -> io::Result<()> {
            unreachable!()
        }
    }

    fn read(plug: &Plug, register: u16) -> u32 {
        let mut data = [0; 4];
        plug.read(PLUG + register, &mut data);
        u32::from_le_bytes(data)
    }

    fn gone(plug: &Plug, mask: u32) -> Vec<u8> {
        let number = |gone| match gone {
            Gone::Device(number) => number,
            Gone::Processor(_) => unreachable!(),
        };
        plug.write(PLUG + GONE, &mask.to_le_bytes()).map(number).collect()
    }

    #[test]
    fn the_interrupt_is_on_until_all_was_read() {
        let line = Arc::new(Line::default());
        let plug = Plug::new(Arc::clone(&line) as _, 1, 1);
        let is_on = || line.0.load(Ordering::Relaxed);
        plug.come(3);
        plug.come(5);
        plug.go(3);
        assert!(is_on());
        assert_eq!(read(&plug, COME), 1 << 3 | 1 << 5);
        assert!(is_on(), "one is still to go");
        assert_eq!((read(&plug, GO), is_on()), (1 << 3, false));
        assert_eq!((read(&plug, COME), read(&plug, GO)), (0, 0));
        assert_eq!(gone(&plug, u32::MAX), [3]);
        assert_eq!(gone(&plug, u32::MAX), [0; 0], "once");
        plug.go(5);
        assert_eq!((gone(&plug, 1 << 5), is_on()), (vec![5], false), "before it was asked");
        plug.go(6);
        plug.come(6);
        assert_eq!((read(&plug, GO), gone(&plug, 1 << 6)), (0, vec![]), "it was asked of another");
        plug.go(6);
        plug.forget(6);
        assert_eq!((read(&plug, COME), read(&plug, GO), gone(&plug, 1 << 6), is_on()), (0, 0, vec![], false));
    }

    #[test]
    fn only_what_was_asked_for_goes_and_rubbish_does_nothing() {
        let plug = Plug::new(Arc::new(Line::default()), 1, 1);
        plug.go(31);
        assert_eq!(gone(&plug, 1 << 4), [0; 0]);
        for (port, bytes) in [(GONE, 1), (GONE, 8), (COME, 4), (GO, 4), (GONE + 1, 4), (PLUG_PORTS - 1, 4)] {
            assert_eq!(plug.write(PLUG + port, &vec![0xff; bytes]).count(), 0, "{bytes} bytes at {port}");
        }
        let mut data = [7; 8];
        plug.read(PLUG + GO, &mut data);
        assert_eq!(data, [0; 8]);
        assert_eq!(gone(&plug, u32::MAX), [31]);
    }

    #[test]
    fn processors_come_one_by_one_and_the_last_goes_first() {
        let line = Arc::new(Line::default());
        let plug = Plug::new(Arc::clone(&line) as _, 2, 4);
        let is_on = || line.0.load(Ordering::Relaxed);
        let write = |register, value: u32| plug.write(PLUG + register, &value.to_le_bytes()).collect::<Vec<_>>();
        let is_there = |number| {
            assert_eq!(write(PROCESSOR, number), []);
            read(&plug, PRESENT)
        };
        assert_eq!([0, 1, 2, 3, 4, u32::MAX].map(is_there), [1, 1, 0, 0, 0, 0]);
        for number in [2, 3] {
            assert_eq!(plug.next_processor(), Some(number));
            plug.processor_comes(number);
        }
        assert_eq!((plug.next_processor(), plug.processors(), is_on()), (None, 4, true));
        assert_eq!([read(&plug, NEWS), read(&plug, NEWS), read(&plug, NEWS)], [1 << 16 | 2, 1 << 16 | 3, 0]);
        assert!(!is_on());
        assert_eq!(write(PROCESSOR_GONE, 3), [], "it was not asked for");
        assert_eq!([read(&plug, NEWS), read(&plug, NEWS)], [1 << 16 | 3, 0], "and is there still");
        plug.last_processor_goes();
        plug.keep_processors();
        assert_eq!((read(&plug, NEWS), write(PROCESSOR_GONE, 3), plug.has_processor(3)), (0, vec![], true));
        assert_eq!(read(&plug, NEWS), 1 << 16 | 3);
        plug.last_processor_goes();
        plug.last_processor_goes();
        assert_eq!([read(&plug, NEWS), read(&plug, NEWS)], [3 << 16 | 3, 0]);
        assert_eq!((write(PROCESSOR_GONE, 2), write(PROCESSOR_GONE, 99)), (vec![], vec![]));
        assert_eq!((write(PROCESSOR_GONE, 3), write(PROCESSOR_GONE, 3)), (vec![Gone::Processor(3)], vec![]));
        assert_eq!((plug.processors(), plug.next_processor()), (3, Some(3)));
        // The first one never goes.
        let plug = Plug::new(Arc::new(Line::default()), 1, 2);
        plug.last_processor_goes();
        assert_eq!(read(&plug, NEWS), 0);
    }
}
