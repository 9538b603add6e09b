//! Whether one series is larger than another: by permutations, which ask nothing of how the figures are spread.

use crate::random::Random;

/// The most pairs of which all signs are tried; of more, so many are drawn.
const EXACT_PAIRS: u32 = 16;
const DRAWN: u32 = 9_999;

/// How the second series stands to the first.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Difference {
    /// By which factor the second is larger, in the middle: the median of all quotients of one of the second by one of the first (of pairs: of the
    /// means of two pairs' quotients; Hodges and Lehmann, 1963).
    pub factor: f64,
    /// How probable so large a difference, or a larger one in this direction, is where there is none.
    pub probability: f64,
}

/// Whether `second` is larger than `first`: two series of their own. All figures must be above 0.
///
/// The statistic is the difference of the means of logarithms. None where a series has fewer than two figures, or one that is no size.
#[must_use]
pub fn compare(first: &[f64], second: &[f64], seed: u64) -> Option<Difference> {
    let (first, second) = (logarithms(first)?, logarithms(second)?);
    if first.len() < 2 || second.len() < 2 {
        return None;
    }
    let found = mean(&second) - mean(&first);
    let mut all = [first.as_slice(), second.as_slice()].concat();
    let mut random = Random::new(seed);
    let mut as_large = 0;
    for _ in 0..DRAWN {
        random.shuffle(&mut all);
        let (one, two) = all.split_at(first.len());
        as_large += u32::from(mean(two) - mean(one) >= found - NOTHING);
    }
    let mut quotients: Vec<f64> = second.iter().flat_map(|two| first.iter().map(move |one| two - one)).collect();
    Some(Difference { factor: median(&mut quotients)?.exp(), probability: drawn(as_large) })
}

/// The same of figures that were measured in pairs, each pair under the same conditions: the signs of the differences are what is permuted, all of
/// them where there are sixteen pairs or fewer.
#[must_use]
pub fn compare_pairs(pairs: &[(f64, f64)], seed: u64) -> Option<Difference> {
    let (first, second): (Vec<f64>, Vec<f64>) = pairs.iter().copied().unzip();
    let (first, second) = (logarithms(&first)?, logarithms(&second)?);
    let differences: Vec<f64> = second.iter().zip(&first).map(|(two, one)| two - one).collect();
    if differences.len() < 2 {
        return None;
    }
    let found: f64 = differences.iter().sum();
    let with = |signs: &mut dyn FnMut() -> bool| -> f64 {
        differences.iter().map(|difference| if signs() { *difference } else { -difference }).sum()
    };
    let count = u32::try_from(differences.len()).ok()?;
    let probability = if count <= EXACT_PAIRS {
        let as_large = (0..1_u32 << count).filter(|signs| {
            let mut rest = *signs;
            with(&mut || {
                let is_as_it_is = rest & 1 == 1;
                rest >>= 1;
                is_as_it_is
            }) >= found - NOTHING
        });
        f64::from(u32::try_from(as_large.count()).ok()?) / f64::from(1_u32 << count)
    } else {
        let mut random = Random::new(seed);
        let drawn_as_large = (0..DRAWN).filter(|_| with(&mut || random.next() & 1 == 1) >= found - NOTHING);
        drawn(u32::try_from(drawn_as_large.count()).ok()?)
    };
    let own = differences.iter().enumerate();
    let mut walsh: Vec<f64> =
        own.flat_map(|(at, one)| differences.iter().skip(at).map(move |two| (one + two) / 2.0)).collect();
    Some(Difference { factor: median(&mut walsh)?.exp(), probability })
}

/// Sums in another order differ by this much and are the same.
const NOTHING: f64 = 1e-12;

/// The order that was found is one of those that could have been drawn.
fn drawn(as_large: u32) -> f64 {
    f64::from(as_large + 1) / f64::from(DRAWN + 1)
}

fn logarithms(figures: &[f64]) -> Option<Vec<f64>> {
    figures.iter().map(|figure| (figure.is_finite() && *figure > 0.0).then(|| figure.ln())).collect()
}

fn mean(figures: &[f64]) -> f64 {
    figures.iter().sum::<f64>() / figures.len() as f64
}

/// The middle of figures, which are put into their order; of an even number the mean of the two. None of nothing.
pub fn median(figures: &mut [f64]) -> Option<f64> {
    figures.sort_by(f64::total_cmp);
    let upper = figures.get(figures.len() / 2)?;
    let lower = figures.get(figures.len().checked_sub(1)? / 2)?;
    Some((upper + lower) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Times with a long tail, `factor` times as long.
    fn times(random: &mut Random, count: usize, factor: f64) -> Vec<f64> {
        (0..count)
            .map(|_| factor * (0.3 * random.normal()).exp() * if random.below(20) == 0 { 3.0 } else { 1.0 })
            .collect()
    }

    #[test]
    fn known_probabilities_come_out() {
        // All of three pairs are larger: one of eight signs does that.
        let found = compare_pairs(&[(1.0, 2.0), (1.0, 2.0), (1.0, 2.0)], 1).unwrap();
        assert!((found.probability - 0.125).abs() < 1e-9 && (found.factor - 2.0).abs() < 1e-9, "{found:?}");
        let smaller = compare_pairs(&[(2.0, 1.0), (2.0, 1.0), (2.0, 1.0)], 1).unwrap();
        assert!((smaller.probability - 1.0).abs() < 1e-9 && (smaller.factor - 0.5).abs() < 1e-9, "{smaller:?}");
        // The three largest of six: one of twenty choices.
        let found = compare(&[1.0, 2.0, 3.0], &[4.0, 5.0, 6.0], 1).unwrap();
        assert!((found.probability - 0.05).abs() < 0.01 && (found.factor - 2.5).abs() < 1e-9, "{found:?}");
    }

    #[test]
    fn what_is_no_size_is_not_compared() {
        for wrong in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert_eq!(compare(&[1.0, wrong], &[1.0, 2.0], 1), None);
            assert_eq!(compare_pairs(&[(1.0, 2.0), (wrong, 1.0)], 1), None);
        }
        assert_eq!(compare(&[1.0], &[1.0, 2.0], 1), None);
        assert_eq!(compare_pairs(&[(1.0, 2.0)], 1), None);
    }

    #[test]
    fn noise_alone_is_no_difference_more_often_than_is_said() {
        let mut alarms = (0, 0);
        for seed in 0..1000 {
            let mut random = Random::new(seed);
            let (one, two) = (times(&mut random, 10, 1.0), times(&mut random, 10, 1.0));
            let pairs: Vec<(f64, f64)> = one.iter().copied().zip(two.iter().copied()).collect();
            alarms.0 += u32::from(compare_pairs(&pairs, seed).unwrap().probability <= 0.05);
            if seed % 10 == 0 {
                alarms.1 += u32::from(compare(&one, &two, seed).unwrap().probability <= 0.05);
            }
        }
        // 5 % of a thousand, and of a hundred, with three deviations.
        assert!(alarms.0 <= 71 && alarms.1 <= 12, "{alarms:?}");
    }

    #[test]
    fn a_planted_slowdown_is_found() {
        let mut found = 0;
        for seed in 0..100 {
            let mut random = Random::new(seed);
            let pairs: Vec<(f64, f64)> =
                times(&mut random, 16, 1.0).into_iter().zip(times(&mut random, 16, 1.8)).collect();
            let difference = compare_pairs(&pairs, seed).unwrap();
            found += u32::from(difference.probability <= 0.05 && (1.2..2.7).contains(&difference.factor));
        }
        assert!(found >= 90, "{found} of 100");
    }
}
