//! What results of tests and series of measurements show, and how sure that is. Nothing here knows where they come from.
//!
//! - [`flakes`]: a test that fails and passes on the same commit.
//! - [`change_points`]: where a series begins to be another one.
//! - [`compare`]: whether one series is larger than another, in pairs or not.
//!
//! Each answer comes with a probability or an interval. Whatever is drawn at random is drawn by a seed, so that the same data give the same answer.

#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

mod change;
mod compare;
mod flake;
mod random;
mod share;

pub use change::{Change, change_points};
pub use compare::{Difference, compare, compare_pairs, median};
pub use flake::{Flakes, flakes};
pub use share::Share;
