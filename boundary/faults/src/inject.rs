//! What tests arm.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::Injected;

/// What happens at a point.
#[derive(Clone)]
pub enum Fault {
    /// The step fails.
    Fail,
    /// It takes so long, and goes on.
    Delay(Duration),
    /// It never ends.
    Hang,
    /// Something happens elsewhere, and the step goes on.
    Act(Arc<dyn Fn() + Send + Sync>),
}

/// A passing of a point: which one, and the how manieth, from 1 on.
pub type Passing = (&'static str, usize);

/// How a point was passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Passed {
    /// How often.
    pub count: usize,
    /// Whether the step behind it may fail.
    pub may_fail: bool,
}

#[derive(Default)]
struct Plan {
    passed: BTreeMap<&'static str, Passed>,
    armed: Option<(Passing, Fault)>,
    fired: bool,
}

thread_local! {
    static PLAN: RefCell<Plan> = RefCell::default();
}

/// Begins anew on this thread: nothing was passed, and nothing is armed but `fault`.
pub fn arm(fault: Option<(Passing, Fault)>) {
    PLAN.set(Plan { armed: fault, ..Plan::default() });
}

/// The points that this thread's tasks have passed since.
#[must_use]
pub fn passed() -> BTreeMap<&'static str, Passed> {
    PLAN.with_borrow(|plan| plan.passed.clone())
}

/// Whether the fault has happened.
#[must_use]
pub fn has_fired() -> bool {
    PLAN.with_borrow(|plan| plan.fired)
}

pub(crate) async fn pass(point: &'static str, may_fail: bool) -> Result<(), Injected> {
    let fault = PLAN.with_borrow_mut(|plan| {
        let passed = plan.passed.entry(point).or_default();
        (passed.count, passed.may_fail) = (passed.count + 1, may_fail);
        let is_it = plan.armed.as_ref().is_some_and(|(passing, _)| *passing == (point, passed.count));
        plan.fired |= is_it;
        plan.armed.as_ref().filter(|_| is_it).map(|(_, fault)| fault.clone())
    });
    match fault {
        None => Ok(()),
        Some(Fault::Fail) => Err(Injected(point)),
        Some(Fault::Delay(time)) => {
            // The fault itself.
            tokio::time::sleep(time).await;
            Ok(())
        }
        Some(Fault::Hang) => std::future::pending().await,
        Some(Fault::Act(act)) => {
            act();
            Ok(())
        }
    }
}
