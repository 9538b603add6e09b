//! Figures of networks and volumes, beside runc's on the same wire and file system in the same run; `cargo xtask bench` runs it.
//!
//! `figures networks ROUNDS`, `figures volumes ROUNDS`: JSON on the last line.

mod networks;
mod taken;
mod volumes;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let rounds = words.get(1).and_then(|word| word.parse::<usize>().ok()).filter(|rounds| *rounds > 0);
    let report = match (words.first().map(String::as_str), rounds, words.len()) {
        (Some("networks"), Some(rounds), 2) => networks::measure(rounds),
        (Some("volumes"), Some(rounds), 2) => volumes::measure(rounds),
        _ => {
            eprintln!("usage: figures networks ROUNDS | figures volumes ROUNDS");
            std::process::exit(2);
        }
    };
    println!("{report}");
}
