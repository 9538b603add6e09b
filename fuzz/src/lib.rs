//! Drivers that mean harm, made of bytes; and files, answers and requests that do.
//!
//! A target turns bytes into what a guest does to a device, or into what a parser reads, and panics where something is done that must not be. The same
//! functions run under a fuzzer that is guided by coverage and under one that needs nothing special: docs/fuzzing.md.

pub mod balloon;
pub mod block;
pub mod bundle;
pub mod chain;
pub mod cni;
pub mod console;
pub mod figures;
pub mod guest;
pub mod held;
pub mod imports;
pub mod input;
pub mod kernel;
pub mod layer;
pub mod mem;
pub mod net;
pub mod packet;
pub mod pci;
pub mod pmem;
pub mod registers;
pub mod replies;
pub mod requests;
pub mod rig;
pub mod rng;
pub mod settings;
pub mod snapshot;
pub mod spans;
pub mod vhost;
pub mod vsock;

/// What runs one input.
pub type Target = fn(&[u8]);

/// All targets by their names.
pub const TARGETS: [(&str, Target); 24] = [
    ("balloon", balloon::one),
    ("block", block::one),
    ("bundle", bundle::one),
    ("chain", chain::one),
    ("cni", cni::one),
    ("console", console::one),
    ("figures", figures::one),
    ("imports", imports::one),
    ("kernel", kernel::one),
    ("layer", layer::one),
    ("mem", mem::one),
    ("net", net::one),
    ("packet", packet::one),
    ("pci", pci::one),
    ("pmem", pmem::one),
    ("registers", registers::one),
    ("replies", replies::one),
    ("requests", requests::one),
    ("rng", rng::one),
    ("settings", settings::one),
    ("snapshot", snapshot::one),
    ("spans", spans::one),
    ("vhost", vhost::one),
    ("vsock", vsock::one),
];

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_corpus_finds_nothing() {
        for (name, target) in TARGETS {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
            let files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
            assert!(!files.is_empty(), "{name} has no corpus");
            for file in files {
                println!("{}", file.display());
                target(&std::fs::read(&file).unwrap());
            }
        }
    }
}
