//! The settings.
//!
//! Each is declared once, in the table in `declare.rs`, with its type, default and text. The file's parser, the commented
//! default file and the checks come from that table.

mod declare;
mod load;

pub use declare::{
    Accelerator, EmptyDir, Layers, Limit, MachineType, Monitor, NetworkModel, Numbers, Queues, Rootfs, Settings,
    SharedFs, reference,
};
pub use load::{DEFAULTS, ENVIRONMENT, Error, FILE, OVERRIDES};

impl Settings {
    /// The bounded time that a guest has to come up.
    #[must_use]
    pub fn boot_timeout(&self) -> std::time::Duration {
        std::time::Duration::from_secs(self.guest_boot_timeout_seconds)
    }
}
