//! CI results and performance series of any project on GitHub Actions: collected, stored, shown, told.
//!
//! ```text
//! GitHub's API ─┐                                                ┌─ serve: pages, JSON, badges
//!               ├─ collect ─▶ store (SQLite) ─▶ evidence ─▶ views┼─ export: the same pages as files
//! files (DIR) ──┘                (derived once a collection)     └─ alert: webhook, file
//! ```
//!
//! What is collected comes from outside and is taken as hostile: sizes are bounded before a thing is read, names go to pages as text only, a time
//! that cannot be is unknown. What was stored once is not lost by a source that fails later.

#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

pub mod alert;
pub mod collect;
pub mod error;
pub mod evidence;
pub mod export;
pub mod github;
pub mod outcome;
pub mod pages;
pub mod results;
pub mod serve;
pub mod settings;
pub mod store;
pub mod times;
pub mod views;
