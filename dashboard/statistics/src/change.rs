//! Where a series begins to be another one.

use crate::random::Random;

/// A change.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Change {
    /// The first figure that is of the new kind, by its place in the series.
    pub at: usize,
    /// The medians of what lies between this change and the ones beside it.
    pub before: f64,
    /// See [`Self::before`].
    pub after: f64,
    /// How probable so sharp a change is where there is none.
    pub probability: f64,
}

/// The fewest figures on each side of a change.
const LEAST: usize = 3;
/// How many orders are drawn for each look.
const DRAWN: u32 = 199;

/// Finds changes of a series, in its order: the sharpest first, then those on each side of it, as long as one is as improbable as `alarm`, which is
/// at least 0.005. A series without a change has one found with that probability, whatever its length.
///
/// What is looked at is ranks and their sums (as Pettitt, 1979), so that single figures far off do no harm; how sharp one is is known by the same look
/// at the series in other orders. Figures that are no numbers make it none: then nothing is found.
#[must_use]
pub fn change_points(series: &[f64], alarm: f64, seed: u64) -> Vec<Change> {
    if series.iter().any(|figure| figure.is_nan()) {
        return Vec::new();
    }
    let mut random = Random::new(seed);
    let mut found = Vec::new();
    look(series, 0, alarm, &mut random, &mut found);
    found.sort_by_key(|(at, _)| *at);
    settle(series, &mut found);
    let ends: Vec<usize> = found.iter().map(|(at, _)| *at).chain([series.len()]).collect();
    let mut begin = 0;
    let mut changes = Vec::new();
    for ((at, probability), end) in found.into_iter().zip(ends.into_iter().skip(1)) {
        let part = |from: usize, to: usize| median(series.get(from..to).unwrap_or_default());
        changes.push(Change { at, before: part(begin, at), after: part(at, end), probability });
        begin = at;
    }
    changes
}

/// Places each change anew between the ones beside it: where it was found first, others were in sight, too.
fn settle(series: &[f64], found: &mut [(usize, f64)]) {
    for index in 0..found.len() {
        let place = |index: Option<usize>| index.and_then(|index| found.get(index)).map(|(at, _)| *at);
        let (begin, end) = (place(index.checked_sub(1)).unwrap_or(0), place(Some(index + 1)).unwrap_or(series.len()));
        let anew = series.get(begin..end).and_then(|part| sharpest(&ranks(part)));
        if let (Some((at, _)), Some((own, _))) = (anew, found.get_mut(index)) {
            *own = begin + at;
        }
    }
}

fn look(part: &[f64], offset: usize, alarm: f64, random: &mut Random, found: &mut Vec<(usize, f64)>) {
    if part.len() < 2 * LEAST {
        return;
    }
    let mut ranks = ranks(part);
    let Some((at, sharpness)) = sharpest(&ranks) else { return };
    let mut as_sharp = 0;
    for _ in 0..DRAWN {
        random.shuffle(&mut ranks);
        as_sharp += u32::from(sharpest(&ranks).is_some_and(|(_, other)| other >= sharpness));
    }
    let probability = f64::from(as_sharp + 1) / f64::from(DRAWN + 1);
    if probability > alarm {
        return;
    }
    found.push((offset + at, probability));
    let (left, right) = part.split_at(at);
    look(left, offset, alarm, random, found);
    look(right, offset + at, alarm, random, found);
}

/// The ranks of figures, their mean taken away; equal ones share theirs.
fn ranks(part: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..part.len()).collect();
    let figure = |at: &usize| part.get(*at).copied().unwrap_or_default();
    order.sort_by(|one, two| figure(one).total_cmp(&figure(two)));
    let middle = (part.len() as f64 - 1.0) / 2.0;
    let mut ranks = vec![0.0; part.len()];
    let mut rest = order.as_slice();
    let mut taken = 0;
    while let Some(first) = rest.first().map(figure) {
        let (same, others) = rest.split_at(rest.iter().take_while(|at| figure(at) == first).count().max(1));
        let own = taken as f64 + (same.len() as f64 - 1.0) / 2.0 - middle;
        for at in same {
            if let Some(rank) = ranks.get_mut(*at) {
                *rank = own;
            }
        }
        taken += same.len();
        rest = others;
    }
    ranks
}

/// Where the ranks before and behind differ most, by the sum before in units of its deviation; none where all are equal.
fn sharpest(ranks: &[f64]) -> Option<(usize, f64)> {
    let count = ranks.len();
    let mut sum = 0.0;
    let mut best: Option<(usize, f64)> = None;
    for (at, rank) in ranks.iter().enumerate() {
        if at >= LEAST && at + LEAST <= count {
            let (left, right) = (at as f64, (count - at) as f64);
            let sharpness = f64::abs(sum) / (left * right).sqrt();
            if sharpness > 0.0 && best.is_none_or(|(_, other)| sharpness > other) {
                best = Some((at, sharpness));
            }
        }
        sum += rank;
    }
    best
}

fn median(part: &[f64]) -> f64 {
    let mut sorted = part.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Noise with a figure far off now and then.
    fn noise(random: &mut Random, count: usize, middle: f64) -> Vec<f64> {
        (0..count).map(|_| middle + random.normal() + if random.below(20) == 0 { 15.0 } else { 0.0 }).collect()
    }

    #[test]
    fn noise_alone_has_changes_no_more_often_than_is_said() {
        let alarms = (0..1000).filter(|seed| {
            let mut random = Random::new(*seed);
            let series = noise(&mut random, 40, 100.0);
            !change_points(&series, 0.02, *seed).is_empty()
        });
        let alarms = alarms.count();
        // 2 % of a thousand, with three deviations.
        assert!(alarms <= 34, "{alarms} of 1000");
    }

    #[test]
    fn planted_changes_are_found_where_they_are() {
        let mut found = 0;
        for seed in 0..1000 {
            let mut random = Random::new(seed);
            let series = [noise(&mut random, 30, 100.0), noise(&mut random, 30, 103.0)].concat();
            let changes = change_points(&series, 0.02, seed);
            found += usize::from(changes.iter().any(|change| {
                change.at.abs_diff(30) <= 2 && change.after > change.before && change.probability <= 0.02
            }));
        }
        assert!(found >= 900, "{found} of 1000");
    }

    #[test]
    fn two_changes_and_a_return_are_both_seen() {
        let mut found = 0;
        for seed in 0..100 {
            let mut random = Random::new(seed);
            let parts = [(30, 100.0), (30, 106.0), (30, 100.0)];
            let series: Vec<f64> =
                parts.iter().flat_map(|(count, middle)| noise(&mut random, *count, *middle)).collect();
            let places: Vec<usize> = change_points(&series, 0.02, seed).iter().map(|change| change.at).collect();
            // One figure far off beside a change moves it by some places.
            let is_near = |place: usize| places.iter().any(|found| found.abs_diff(place) <= 4);
            found += usize::from(is_near(30) && is_near(60));
        }
        assert!(found >= 90, "{found} of 100");
    }

    #[test]
    fn what_has_no_change_or_is_too_short_has_none() {
        assert!(change_points(&[5.0; 50], 0.05, 1).is_empty());
        assert!(change_points(&[1.0, 1.0, 9.0, 9.0, 9.0], 0.05, 1).is_empty());
        assert!(change_points(&[1.0, f64::NAN, 1.0, 9.0, 9.0, 9.0, 9.0], 0.05, 1).is_empty());
        assert!(change_points(&[], 0.05, 1).is_empty());
        let step: Vec<f64> = [vec![1.0; 10], vec![2.0; 10]].concat();
        let changes = change_points(&step, 0.05, 1);
        assert_eq!(changes.len(), 1);
        assert_eq!((changes[0].at, changes[0].before, changes[0].after), (10, 1.0, 2.0));
    }
}
