//! Points at which tests let a step fail.
//!
//! A step of a request passes a point by its name, `host.create.mounts` or `guest.StartContainer`: [`at`] where it may fail, [`reached`] where it can't. Built without the feature
//! `inject` a point is nothing: no name and no branch of it is in the program. With it, a test arms one fault for one passing of one point
//! on its own thread (`inject::arm`), and learns afterwards which points were passed, so that no point can be forgotten.

#[cfg(feature = "inject")]
pub mod inject;

/// The error of a step that a test let fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Injected(&'static str);

/// What stands in its text, by which a program that could be made to fail is known.
#[cfg(feature = "inject")]
const TEXT: &str = "a fault was injected at";

impl std::fmt::Display for Injected {
    #[cfg(feature = "inject")]
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{TEXT} {}", self.0)
    }

    #[cfg(not(feature = "inject"))]
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.0)
    }
}

impl std::error::Error for Injected {}

/// A point in front of what may fail.
///
/// # Errors
/// [`Injected`] where a test has armed that; never without the feature `inject`.
#[cfg(feature = "inject")]
pub async fn at(point: &'static str) -> Result<(), Injected> {
    inject::pass(point, true).await
}

/// A point where nothing fails: time passes there, and other things happen meanwhile.
#[cfg(feature = "inject")]
pub async fn reached(point: &'static str) {
    // It is told that it may not fail.
    let _ = inject::pass(point, false).await;
}

/// A point in front of what may fail; here it is nothing.
///
/// # Errors
/// None.
#[cfg(not(feature = "inject"))]
#[inline(always)]
pub fn at(_: &'static str) -> std::future::Ready<Result<(), Injected>> {
    std::future::ready(Ok(()))
}

/// A point where nothing fails; here it is nothing.
#[cfg(not(feature = "inject"))]
#[inline(always)]
pub fn reached(_: &'static str) -> std::future::Ready<()> {
    std::future::ready(())
}
