//! Tests that fail and pass on the same commit.

use std::collections::BTreeMap;

use crate::Share;

/// What is known of a test's flakes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flakes {
    /// Commits on which it has failed and passed, of those on which it has ended more than once. On others nothing can be seen: a test that fails
    /// once on a commit may be right.
    pub commits: Share,
    /// Runs that failed, of all runs on the commits that are flaky.
    pub failures: Share,
    /// The commits on which both was seen, in the order of their names.
    pub evidence: Vec<String>,
}

/// Looks at a test's ends: the commit, and whether it has passed. Their order does not matter; what failed to set up is no end of a test and must
/// not be among them.
pub fn flakes<'a>(ends: impl IntoIterator<Item = (&'a str, bool)>) -> Flakes {
    let mut by_commit: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    for (commit, passed) in ends {
        let (failures, passes) = by_commit.entry(commit).or_default();
        *if passed { passes } else { failures } += 1;
    }
    let compared = by_commit.values().filter(|(failures, passes)| failures + passes > 1).count() as u64;
    let flaky: Vec<_> = by_commit.iter().filter(|(_, (failures, passes))| *failures > 0 && *passes > 0).collect();
    Flakes {
        commits: Share { count: flaky.len() as u64, of: compared },
        failures: Share {
            count: flaky.iter().map(|(_, (failures, _))| failures).sum(),
            of: flaky.iter().map(|(_, (failures, passes))| failures + passes).sum(),
        },
        evidence: flaky.into_iter().map(|(commit, _)| (*commit).to_owned()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    #[test]
    fn only_the_same_commit_is_evidence() {
        // Broken by b, mended by c: no flake, however often it is seen.
        let broken = [("a", true), ("a", true), ("b", false), ("b", false), ("c", true)];
        assert_eq!(flakes(broken).commits, Share { count: 0, of: 2 });
        let found = flakes([("a", true), ("b", false), ("b", true), ("b", true), ("c", false)]);
        assert_eq!((found.commits, found.evidence.as_slice()), (Share { count: 1, of: 1 }, &["b".to_owned()][..]));
        assert_eq!(found.failures, Share { count: 1, of: 3 });
        assert_eq!(flakes([]).commits, Share { count: 0, of: 0 });
    }

    #[test]
    fn planted_flakes_are_found_and_failures_that_are_right_are_none() {
        for seed in 0..1000 {
            let mut random = Random::new(seed);
            let names: Vec<String> = (0..50).map(|number| format!("{number:02}")).collect();
            // Each commit three times; some are broken for good, and every twentieth run of the others fails for nothing.
            let (mut ends, mut planted) = (Vec::new(), Vec::new());
            for name in &names {
                let is_broken = random.below(10) == 0;
                let runs: Vec<bool> = (0..3).map(|_| !is_broken && random.below(20) != 0).collect();
                if runs.contains(&true) && runs.contains(&false) {
                    planted.push(name.clone());
                }
                ends.extend(runs.into_iter().map(|passed| (name.as_str(), passed)));
            }
            random.shuffle(&mut ends);
            let found = flakes(ends);
            assert_eq!(found.evidence, planted, "seed {seed}");
            assert_eq!(found.commits.of, 50);
        }
    }
}
