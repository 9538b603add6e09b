//! `fuzz-run TARGET EXECUTIONS SEED`: inputs that look random and are the same at each run, made anew or out of the corpus. In the place of
//! executions there may be seconds: `5s`.
//! TARGET may be `all`. `fuzz-run TARGET FILE...` runs files, and what it finds is thrown out as it comes.

use std::cell::Cell;
use std::ops::ControlFlow;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use coracle_fuzz::{TARGETS, Target};

/// The longest input that is made.
const BYTES_MAX: usize = 192;

/// Numbers that look random and are the same at each run (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ value >> 31
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    fn byte(&mut self) -> u8 {
        self.next() as u8
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let Some((name, rest)) = words.split_first() else { return usage() };
    let chosen: Vec<_> = TARGETS.iter().filter(|(target, _)| target == name || *name == "all").collect();
    if chosen.is_empty() {
        return usage();
    }
    let limit = |word: &str| match word.strip_suffix('s') {
        Some(seconds) => seconds.parse().ok().map(|seconds| Limit::Time(Duration::from_secs(seconds))),
        None => word.parse().ok().map(Limit::Executions),
    };
    match (rest.first().and_then(|word| limit(word)), rest.get(1).and_then(|word| word.parse().ok()), rest) {
        (Some(limit), Some(seed), [_, _]) => {
            let sound = chosen.iter().all(|(name, target)| run(name, *target, limit, seed));
            if sound { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        (_, _, [_, ..]) => {
            for file in rest {
                let bytes = std::fs::read(file).unwrap_or_else(|error| panic!("{file}: {error}"));
                chosen.iter().for_each(|(_, target)| target(&bytes));
            }
            ExitCode::SUCCESS
        }
        _ => usage(),
    }
}

fn usage() -> ExitCode {
    eprintln!(
        "fuzz-run TARGET EXECUTIONS|SECONDSs SEED | TARGET FILE...\ntargets: all {}",
        TARGETS.map(|(name, _)| name).join(" ")
    );
    ExitCode::FAILURE
}

/// How long a target is run.
#[derive(Debug, Clone, Copy)]
enum Limit {
    Executions(u64),
    Time(Duration),
}

/// True where nothing was found.
fn run(name: &str, target: Target, limit: Limit, seed: u64) -> bool {
    let start = Instant::now();
    let corpus = corpus(name);
    let mut random = Random(seed);
    let count = Cell::new(0_u64);
    let attempt = |bytes: &[u8]| {
        count.set(count.get() + 1);
        if catch_unwind(|| target(bytes)).is_ok() {
            return ControlFlow::Continue(());
        }
        let file = format!("found-{name}");
        println!("{name}: found something at execution {}; its input is in {file}", count.get());
        std::fs::write(&file, bytes).unwrap_or_else(|error| println!("{file}: {error}"));
        ControlFlow::Break(())
    };
    let mut result = corpus.iter().try_for_each(|bytes| attempt(bytes));
    let goes_on = || match limit {
        Limit::Executions(executions) => count.get() < executions,
        Limit::Time(time) => start.elapsed() < time,
    };
    while result.is_continue() && goes_on() {
        result = attempt(&input(&mut random, &corpus));
    }
    if result.is_continue() {
        println!("{name}: {} executions, {} of the corpus, {:.1?}", count.get(), corpus.len(), start.elapsed());
    }
    result.is_continue()
}

/// The corpus, in the order of its files' names.
fn corpus(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let mut files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.sort();
    files.iter().filter_map(|file| std::fs::read(file).ok()).collect()
}

fn input(random: &mut Random, corpus: &[Vec<u8>]) -> Vec<u8> {
    if corpus.is_empty() || random.below(4) == 0 {
        let length = random.below(BYTES_MAX);
        // Harmless decisions, too, or nothing goes well for long.
        let zeroes = random.below(4);
        return (0..length).map(|_| if random.below(4) < zeroes { 0 } else { random.byte() }).collect();
    }
    let mut bytes = corpus[random.below(corpus.len())].clone();
    for _ in 0..1 << random.below(5) {
        change(&mut bytes, random, corpus);
    }
    bytes.truncate(2 * BYTES_MAX);
    bytes
}

/// Changes an input a little.
fn change(bytes: &mut Vec<u8>, random: &mut Random, corpus: &[Vec<u8>]) {
    let at = random.below(bytes.len() + 1);
    let end = at + random.below((bytes.len() - at + 1).min(32));
    match random.below(8) {
        0 => bytes.insert(at, random.byte()),
        1 => drop(bytes.drain(at..end)),
        2 => {
            let copy = bytes[at..end].to_vec();
            let to = random.below(bytes.len() + 1);
            bytes.splice(to..to, copy);
        }
        3 => {
            let other = &corpus[random.below(corpus.len())];
            let from = random.below(other.len() + 1);
            bytes.truncate(at);
            bytes.extend(&other[from..]);
        }
        4 => bytes[at..end].fill(0),
        5 => bytes.extend((0..random.below(32)).map(|_| random.byte())),
        kind => {
            if let Some(place) = bytes.get_mut(at) {
                *place = if kind == 6 { random.byte() } else { *place ^ 1 << random.below(8) };
            }
        }
    }
}
