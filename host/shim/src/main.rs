//! `containerd-shim-coracle-v2`: containerd's runtime `io.containerd.coracle.v2`.
//!
//! `start` makes a daemon that serves one pod ([`daemon`]) and prints its address; `delete` cleans up after a daemon that
//! has died. Three more words: `vsock` (the server of the guest's sockets) and `vmm` (the built-in machine monitor) are parts
//! of a pod; `probe` tells what this host offers, for the command line.

mod args;
mod bundle;
mod counts;
mod daemon;
mod delete;
mod error;
mod events;
mod exposition;
mod folder;
mod latency;
mod log;
mod machine;
mod management;
mod metrics;
mod pod_config;
mod pod_service;
mod pod_settings;
mod probe;
mod requests;
mod shim;
mod start;
mod stdio;
mod task;
mod trace;
mod vmm;
mod volumes;
mod vsock;

use std::process::ExitCode;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match words.first().map(String::as_str) {
        Some("vsock") => vsock::run(&words[1..]),
        Some("vmm") => vmm::run(&words[1..]),
        Some("probe") => probe::run(),
        _ => args::Args::parse(&words).and_then(|args| match args.action {
            args::Action::Start => start::run(&args),
            args::Action::Delete => delete::run(&args),
            args::Action::Serve => daemon::run(&args),
            args::Action::Version => {
                println!("containerd-shim-coracle-v2 {}", coracle_protocol::VERSION);
                Ok(())
            }
        }),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("containerd-shim-coracle-v2: {error:#}");
            ExitCode::FAILURE
        }
    }
}
