//! From rules to instructions of classic BPF (Linux: Documentation/networking/filter.rst).
//!
//! A call's number is found by halving the sorted list, so that a long profile costs few instructions a call. Blocks are
//! made from their ends: a block is complete, and returns; a jump's distance is the length of what it passes over.

use oci_spec::runtime::LinuxSeccompOperator;

use super::{Condition, KILL_PROCESS, Rule, Rules, Table, X32};

/// One instruction; `taken` and `not_taken` count the instructions that a jump passes over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Instruction {
    pub(super) code: u16,
    pub(super) taken: u8,
    pub(super) not_taken: u8,
    pub(super) value: u32,
}

impl From<Instruction> for libc::sock_filter {
    fn from(from: Instruction) -> Self {
        Self { code: from.code, jt: from.taken, jf: from.not_taken, k: from.value }
    }
}

/// Load a word of the call's data; and, jump, return (linux/bpf_common.h).
pub(super) const LOAD: u16 = 0x20;
pub(super) const AND: u16 = 0x54;
pub(super) const JUMP: u16 = 0x05;
pub(super) const JUMP_EQUAL: u16 = 0x15;
pub(super) const JUMP_GREATER: u16 = 0x25;
pub(super) const JUMP_GREATER_OR_EQUAL: u16 = 0x35;
pub(super) const RETURN: u16 = 0x06;

/// Where the data has the call's number, its architecture and its first argument (`struct seccomp_data`).
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

type Block = Vec<Instruction>;

fn plain(code: u16, value: u32) -> Instruction {
    Instruction { code, taken: 0, not_taken: 0, value }
}

fn jump(code: u16, value: u32, taken: u8, not_taken: u8) -> Instruction {
    Instruction { code, taken, not_taken, value }
}

/// Runs `other` where the comparison holds, else `first`. Both return.
fn branch(code: u16, value: u32, first: Block, other: Block) -> Block {
    let mut block = match u8::try_from(first.len()) {
        Ok(length) => vec![jump(code, value, length, 0)],
        // Further than a condition can jump.
        Err(_) => {
            let length = u32::try_from(first.len()).unwrap_or(u32::MAX);
            vec![jump(code, value, 0, 1), plain(JUMP, length)]
        }
    };
    block.extend(first);
    block.extend(other);
    block
}

/// The whole filter. A call of an architecture that is not among the tables ends the process.
pub(super) fn filter(tables: &[Table], default: u32, newer: Option<u32>) -> Block {
    let mut block = vec![plain(RETURN, KILL_PROCESS)];
    for table in tables.iter().rev() {
        block = branch(JUMP_EQUAL, table.audit, block, calls(table, default, newer));
    }
    block.insert(0, plain(LOAD, ARCHITECTURE));
    block
}

/// The calls of one architecture.
fn calls(table: &Table, default: u32, newer: Option<u32>) -> Block {
    let last = table.calls.keys().next_back().copied().unwrap_or(0);
    // Ranges of numbers, each from its first to the next one's, with one block each.
    let mut ranges: Vec<(u32, Block)> = Vec::new();
    let mut push = |first: u32, block: Block| {
        if ranges.last().is_none_or(|(_, before)| *before != block) {
            ranges.push((first, block));
        }
    };
    let mut next = 0;
    for (number, rules) in &table.calls {
        if *number > next {
            push(next, vec![plain(RETURN, default)]);
        }
        push(*number, call(rules, default));
        next = number + 1;
    }
    push(next, vec![plain(RETURN, newer.filter(|_| last > 0).unwrap_or(default))]);
    // x32 calls have numbers of their own above this; they do not exist.
    push(X32, vec![plain(RETURN, super::ERRNO | libc::ENOSYS.unsigned_abs())]);
    let mut block = vec![plain(LOAD, NUMBER)];
    block.extend(search(&ranges));
    block
}

/// Finds the range of the number that is loaded, by halves.
fn search(ranges: &[(u32, Block)]) -> Block {
    match ranges {
        [] => Vec::new(),
        [(_, block)] => block.clone(),
        more => {
            let (left, right) = more.split_at(more.len() / 2);
            let first = right.first().map_or(0, |(first, _)| *first);
            branch(JUMP_GREATER_OR_EQUAL, first, search(left), search(right))
        }
    }
}

/// One call: the first rule whose conditions hold.
fn call(rules: &Rules, default: u32) -> Block {
    let mut block = vec![plain(RETURN, default)];
    for Rule { conditions, verdict } in rules.iter().rev() {
        let mut rule = vec![plain(RETURN, *verdict)];
        for condition in conditions.iter().rev() {
            rule = check(condition, rule);
        }
        if conditions.is_empty() {
            block = rule;
        } else {
            rule.extend(block);
            block = rule;
        }
    }
    block
}

/// Goes on to `then` where the condition holds, else passes over it.
fn check(condition: &Condition, then: Block) -> Block {
    // A rule has six conditions of eight instructions at most, so every distance fits.
    let over = |more: usize| u8::try_from(then.len() + more).unwrap_or(u8::MAX);
    let (high, low) = halves(condition.value);
    // Little-endian: the low half comes first.
    let at = ARGUMENTS + 8 * condition.argument;
    let (load_high, load_low) = (plain(LOAD, at + 4), plain(LOAD, at));
    let equal = |value, taken, not_taken| jump(JUMP_EQUAL, value, taken, not_taken);
    let greater = |value, taken, not_taken| jump(JUMP_GREATER, value, taken, not_taken);
    let at_least = |value, taken, not_taken| jump(JUMP_GREATER_OR_EQUAL, value, taken, not_taken);
    let mut block = match condition.operator {
        LinuxSeccompOperator::ScmpCmpEq => {
            vec![load_high, equal(high, 0, over(2)), load_low, equal(low, 0, over(0))]
        }
        LinuxSeccompOperator::ScmpCmpNe => {
            vec![load_high, equal(high, 0, 2), load_low, equal(low, over(0), 0)]
        }
        LinuxSeccompOperator::ScmpCmpGt => {
            vec![load_high, greater(high, 3, 0), equal(high, 0, over(2)), load_low, greater(low, 0, over(0))]
        }
        LinuxSeccompOperator::ScmpCmpGe => {
            vec![load_high, greater(high, 3, 0), equal(high, 0, over(2)), load_low, at_least(low, 0, over(0))]
        }
        LinuxSeccompOperator::ScmpCmpLt => {
            vec![load_high, greater(high, over(3), 0), equal(high, 0, 2), load_low, at_least(low, over(0), 0)]
        }
        LinuxSeccompOperator::ScmpCmpLe => {
            vec![load_high, greater(high, over(3), 0), equal(high, 0, 2), load_low, greater(low, over(0), 0)]
        }
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            // The value is the mask.
            let (datum_high, datum_low) = halves(condition.datum & condition.value);
            vec![
                load_high,
                plain(AND, high),
                equal(datum_high, 0, over(3)),
                load_low,
                plain(AND, low),
                equal(datum_low, 0, over(0)),
            ]
        }
    };
    block.extend(then);
    block
}

/// The high and the low half of a number.
fn halves(value: u64) -> (u32, u32) {
    #[expect(clippy::cast_possible_truncation, reason = "the low half is what is wanted")]
    let low = value as u32;
    ((value >> 32) as u32, low)
}
