//! How many of so many.

/// So many of so many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// How many.
    pub count: u64,
    /// Of how many.
    pub of: u64,
}

impl Share {
    /// The share itself, from 0 to 1; none of nothing.
    #[must_use]
    pub fn rate(self) -> Option<f64> {
        (self.of > 0).then(|| self.count as f64 / self.of as f64)
    }

    /// Between which two rates the true one lies with 95 % (E. B. Wilson, "Probable inference", 1927, with z = 1.96); all rates where there is
    /// nothing to go by.
    #[must_use]
    pub fn bounds(self) -> (f64, f64) {
        const Z: f64 = 1.959_963_984_540_054;
        let Some(rate) = self.rate() else { return (0.0, 1.0) };
        let of = self.of as f64;
        let scale = 1.0 + Z * Z / of;
        let middle = rate + Z * Z / (2.0 * of);
        let half = Z * (rate * (1.0 - rate) / of + Z * Z / (4.0 * of * of)).sqrt();
        (((middle - half) / scale).max(0.0), ((middle + half) / scale).min(1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    #[test]
    fn known_intervals_come_out() {
        // R's prop.test(81, 263, correct = FALSE), and what is known of the ends.
        let (low, high) = Share { count: 81, of: 263 }.bounds();
        assert!((low - 0.2553).abs() < 5e-4 && (high - 0.3662).abs() < 5e-4, "{low} {high}");
        let (low, high) = Share { count: 0, of: 10 }.bounds();
        assert!(low == 0.0 && (high - 0.2775).abs() < 5e-4, "{high}");
        assert_eq!(Share { count: 0, of: 0 }.bounds(), (0.0, 1.0));
        assert_eq!(Share { count: 0, of: 0 }.rate(), None);
    }

    #[test]
    fn the_true_rate_is_in_the_interval_as_often_as_is_said() {
        let mut random = Random::new(7);
        for (rate, of) in [(0.5, 40), (0.05, 200), (0.2, 25)] {
            let held = (0..1000).filter(|_| {
                let count = (0..of).filter(|_| random.unit() < rate).count() as u64;
                let (low, high) = Share { count, of }.bounds();
                (low..=high).contains(&rate)
            });
            let held = held.count();
            // Wilson's is not exact: it is 95 % in the mean over all rates.
            assert!((920..=990).contains(&held), "{rate} of {of}: {held}");
        }
    }
}
