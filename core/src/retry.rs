//! When to try again: pure arithmetic over attempt, elapsed time and a random number. No clock, no sleep.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};

/// How long to wait between attempts.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Backoff {
    /// `first`, then times `factor` each time, up to `max`.
    Exponential {
        /// The delay after the first attempt.
        first: Duration,
        /// By how much each delay grows; at least 1.
        factor: f32,
        /// The longest delay.
        max: Duration,
    },
    /// Always the same.
    Fixed(Duration),
    /// No delay.
    None,
}

impl Backoff {
    /// The delay after `attempt` (from 1), without jitter.
    pub fn delay(&self, attempt: u32) -> Duration {
        match *self {
            Self::Exponential { first, factor, max } => {
                // Beyond this many steps every sensible policy has reached its maximum.
                let step = attempt.saturating_sub(1).min(64) as usize;
                let delays = ExponentialBuilder::new().with_min_delay(first).with_factor(factor).with_max_delay(max);
                delays.without_max_times().build().nth(step).unwrap_or(max).min(max)
            }
            Self::Fixed(delay) => delay,
            Self::None => Duration::ZERO,
        }
    }
}

/// How often, how long and with which delays an event is tried.
///
/// ```
/// use std::time::Duration;
/// use hapax::{Backoff, RetryPolicy};
///
/// let policy = RetryPolicy::default()
///     .attempts_max(5)
///     .total_max(Duration::from_secs(3600))
///     .for_reason("rate limited", Backoff::Fixed(Duration::from_secs(60)));
/// assert_eq!(policy.delay(2, "", 0.0).as_millis(), 800);
/// assert_eq!(policy.delay(2, "rate limited", 0.0), Duration::from_secs(60));
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct RetryPolicy {
    backoff: Backoff,
    jitter: f32,
    attempts_max: u32,
    total_max: Option<Duration>,
    by_reason: Vec<(&'static str, Backoff)>,
}

impl RetryPolicy {
    /// The first delay: 200 ms.
    pub const DELAY: Duration = Duration::from_millis(200);
    /// The delay grows by this factor: 4.
    pub const FACTOR: f32 = 4.0;
    /// The longest delay: 5 min.
    pub const DELAY_MAX: Duration = Duration::from_secs(300);
    /// Up to this share is added to a delay: 25 %.
    pub const JITTER: f32 = 0.25;
    /// No delay is longer: 30 days.
    const BOUND: Duration = Duration::from_hours(30 * 24);
    /// Most attempts: 10.
    pub const ATTEMPTS_MAX: u32 = 10;

    /// Exponential delays from `first` up to [`DELAY_MAX`](Self::DELAY_MAX).
    #[must_use]
    pub fn exponential(first: Duration) -> Self {
        Self::with(Backoff::Exponential { first, factor: Self::FACTOR, max: Self::DELAY_MAX })
    }

    /// Always the same delay.
    #[must_use]
    pub fn fixed(delay: Duration) -> Self {
        Self::with(Backoff::Fixed(delay))
    }

    /// One attempt and no other.
    #[must_use]
    pub fn none() -> Self {
        Self::with(Backoff::None).attempts_max(1)
    }

    /// Delays as given.
    #[must_use]
    pub fn with(backoff: Backoff) -> Self {
        Self { backoff, jitter: Self::JITTER, attempts_max: Self::ATTEMPTS_MAX, total_max: None, by_reason: Vec::new() }
    }

    /// Most attempts, at least 1.
    #[must_use]
    pub fn attempts_max(self, attempts_max: u32) -> Self {
        Self { attempts_max, ..self }
    }

    /// Longest time from the first claim to the start of the last attempt.
    #[must_use]
    pub fn total_max(self, total_max: Duration) -> Self {
        Self { total_max: Some(total_max), ..self }
    }

    /// Longest delay of exponential backoff.
    #[must_use]
    pub fn delay_max(mut self, delay_max: Duration) -> Self {
        if let Backoff::Exponential { max, .. } = &mut self.backoff {
            *max = delay_max;
        }
        self
    }

    /// The share that chance adds to a delay, from 0 to 1; it never shortens one.
    #[must_use]
    pub fn jitter(self, jitter: f32) -> Self {
        Self { jitter, ..self }
    }

    /// Other delays for failures with this reason.
    #[must_use]
    pub fn for_reason(mut self, reason: &'static str, backoff: Backoff) -> Self {
        self.by_reason.push((reason, backoff));
        self
    }

    /// The delay after `attempt` (from 1) failed for `reason`; `chance` is from 0 to 1 and adds jitter.
    pub fn delay(&self, attempt: u32, reason: &str, chance: f32) -> Duration {
        let backoff = self.by_reason.iter().find(|(r, _)| *r == reason).map_or(&self.backoff, |(_, backoff)| backoff);
        let delay = backoff.delay(attempt);
        delay.saturating_add(share(delay, self.jitter * chance.clamp(0.0, 1.0)))
    }

    /// Whether `attempt` was the last, with `elapsed` since the first claim and `delay` before the next.
    pub fn is_over(&self, attempt: u32, elapsed: Duration, delay: Duration) -> Over {
        if attempt >= self.attempts_max {
            Over::Attempts
        } else if self.total_max.is_some_and(|max| elapsed.saturating_add(delay) > max) {
            Over::Time
        } else {
            Over::No
        }
    }

    /// Most attempts.
    pub fn attempts(&self) -> u32 {
        self.attempts_max
    }

    /// The longest delay that this policy can ask for, jitter included.
    pub fn longest_delay(&self) -> Duration {
        if self.attempts_max <= 1 {
            return Duration::ZERO;
        }
        let last = self.attempts_max - 1;
        let all = std::iter::once(&self.backoff).chain(self.by_reason.iter().map(|(_, backoff)| backoff));
        let longest = all.map(|backoff| backoff.delay(last)).max().unwrap_or_default();
        longest.saturating_add(share(longest, self.jitter))
    }

    /// The longest time that all delays together can take, jitter included.
    pub fn longest_total(&self) -> Duration {
        let delays = (1..self.attempts_max.min(1_000)).map(|attempt| self.backoff.delay(attempt));
        let sum = delays.fold(Duration::ZERO, Duration::saturating_add);
        let sum = sum.saturating_add(share(sum, self.jitter));
        self.total_max.map_or(sum, |max| sum.min(max))
    }

    /// What is wrong with these settings, with the remedy.
    pub(crate) fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.attempts_max == 0 {
            faults.push("attempts_max is 0: set at least 1 (RetryPolicy::none() tries once)".to_owned());
        }
        if !(0.0..=1.0).contains(&self.jitter) {
            faults.push(format!("jitter is {}: set a share from 0.0 to 1.0", self.jitter));
        }
        for backoff in std::iter::once(&self.backoff).chain(self.by_reason.iter().map(|(_, backoff)| backoff)) {
            if matches!(backoff, Backoff::Fixed(delay) | Backoff::Exponential { max: delay, .. } if *delay > Self::BOUND)
            {
                faults
                    .push(format!("a delay is longer than {} days: set a shorter one", Self::BOUND.as_secs() / 86_400));
            }
            if let Backoff::Exponential { first, factor, max } = backoff {
                if !(1.0..=1_000.0).contains(factor) {
                    faults.push(format!("the factor of exponential backoff is {factor}: set 1.0 to 1000.0"));
                }
                if first > max {
                    faults.push(format!("the first delay ({first:?}) is longer than the longest ({max:?})"));
                }
            }
        }
        faults
    }
}

/// A share of a duration, however long it is.
fn share(of: Duration, share: f32) -> Duration {
    Duration::try_from_secs_f32(of.as_secs_f32() * share).unwrap_or(Duration::MAX)
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self::exponential(Self::DELAY)
    }
}

/// Whether an event gets another attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// It does.
    No,
    /// That was the last attempt.
    Attempts,
    /// The time for all attempts is over.
    Time,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_by_four_up_to_five_minutes() {
        let policy = RetryPolicy::default();
        let delays: Vec<_> = (1..=8).map(|attempt| policy.delay(attempt, "", 0.0).as_millis()).collect();
        assert_eq!(delays, [200, 800, 3_200, 12_800, 51_200, 204_800, 300_000, 300_000]);
    }

    #[test]
    fn jitter_adds_at_most_its_share_and_never_shortens() {
        let policy = RetryPolicy::fixed(Duration::from_secs(4));
        assert_eq!(policy.delay(1, "", 0.0), Duration::from_secs(4));
        assert_eq!(policy.delay(1, "", 1.0), Duration::from_secs(5));
        assert_eq!(policy.delay(1, "", 7.0), Duration::from_secs(5));
    }

    #[test]
    fn attempts_and_total_time_both_end_it() {
        let policy = RetryPolicy::fixed(Duration::from_secs(10)).attempts_max(3).total_max(Duration::from_secs(15));
        assert_eq!(policy.is_over(1, Duration::ZERO, Duration::from_secs(10)), Over::No);
        assert_eq!(policy.is_over(2, Duration::from_secs(10), Duration::from_secs(10)), Over::Time);
        assert_eq!(policy.is_over(3, Duration::ZERO, Duration::ZERO), Over::Attempts);
    }

    #[test]
    fn the_longest_delay_covers_every_delay() {
        let policy = RetryPolicy::default().for_reason("slow", Backoff::Fixed(Duration::from_secs(900)));
        for attempt in 1..policy.attempts() {
            assert!(policy.delay(attempt, "", 1.0) <= policy.longest_delay());
            assert!(policy.delay(attempt, "slow", 1.0) <= policy.longest_delay());
        }
    }

    #[test]
    fn absurd_settings_are_told() {
        assert_eq!(RetryPolicy::default().attempts_max(0).jitter(2.0).faults().len(), 2);
        assert!(RetryPolicy::default().faults().is_empty());
    }
}
