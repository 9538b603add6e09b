//! The guest's one program: pid 1, the agent, and the first steps of every container process.

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        coracle_init::run(&["serve"]);
    }
    let code = match std::env::args().nth(1).as_deref() {
        Some("serve") => coracle_agent::guest::run(),
        Some("init") => coracle_container::run_init(),
        Some("pause") => coracle_container::pause::run(),
        Some("--version") => {
            println!("coracle-agent {}", coracle_protocol::VERSION);
            0
        }
        _ => {
            eprintln!("coracle-agent is the program inside Coracle's guests. It is started by the guest's kernel.");
            2
        }
    };
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}
