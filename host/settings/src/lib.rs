//! The settings.
//!
//! Each is declared once, in the table in `declare.rs`, with its type, default and text. The file's parser, the commented
//! default file, the reference, the schema and the checks come from that table.

mod annotations;
mod contradictions;
mod declare;
pub mod deprecation;
mod error;
mod kata;
mod kinds;
mod levels;
mod load;
mod reference;

pub use declare::{ANNOTATIONS, Entry, Settings, Support, reference};
pub use error::{Error, Position};
pub use kata::{Migration, Moved, migrate, page as kata_page};
pub use kinds::{
    Accelerator, Collector, EmptyDir, Layers, Limit, LogFormat, MachineType, Monitor, NetworkModel, Numbers, Queues,
    Rootfs, SharedFs,
};
pub use levels::{Component, Level, Levels};
pub use load::{DEFAULTS, DROP_INS, ENVIRONMENT, FILE, Loaded, OVERRIDES, Origin, SHARED};
pub use reference::{default_file, page, schema};

impl Settings {
    /// The bounded time that a guest has to come up.
    #[must_use]
    pub fn boot_timeout(&self) -> std::time::Duration {
        std::time::Duration::from_secs(self.guest_boot_timeout_seconds)
    }
}
