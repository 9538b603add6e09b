//! `coracle kill`.

use anyhow::{Result, bail};

use crate::container::Root;
use crate::task::Task;

/// Send a signal to a container.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The containers: names or ids.
    #[arg(required = true)]
    containers: Vec<String>,
    /// The signal: a name or number.
    #[arg(short, long, default_value = "KILL")]
    signal: String,
}

/// Names and numbers of signals on x86-64 and aarch64 (signal(7)).
const SIGNALS: [(&str, u32); 31] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("PWR", 30),
    ("SYS", 31),
];

/// The number of a signal that is given by name, with or without `SIG`, or by number.
pub(crate) fn signal_number(text: &str) -> Result<u32> {
    if let Ok(number) = text.parse::<u32>() {
        if (1..=64).contains(&number) {
            return Ok(number);
        }
        bail!("{number} is no signal");
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    match SIGNALS.iter().find(|(known, _)| *known == name) {
        Some((_, number)) => Ok(*number),
        None => bail!("{text} is no signal"),
    }
}

pub(crate) async fn run(root: &Root, args: Args) -> Result<()> {
    let signal = signal_number(&args.signal)?;
    for name in &args.containers {
        let (_, record) = root.find(name)?;
        Task::connect(&record).await?.kill("", signal).await?;
        println!("{name}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_by_name_and_number() {
        for text in ["9", "KILL", "SIGKILL", "sigkill"] {
            assert_eq!(signal_number(text).unwrap(), 9);
        }
        for text in ["0", "65", "NOPE", ""] {
            assert!(signal_number(text).is_err(), "{text}");
        }
    }
}
