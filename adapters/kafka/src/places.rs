//! The topics of a consumer: those it was told, a retry topic for each of them and each delay step, a dead-letter topic
//! for each of them. Names are public API.

use std::sync::Arc;
use std::time::Duration;

use hapax::{Error, ErrorKind, Result};

/// Kafka's own limit.
const NAME_BYTES_MAX: usize = 249;

/// A topic that is subscribed to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) name: Arc<str>,
    pub(crate) kind: Kind,
}

/// What a subscribed topic is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It was named by the user.
    Main,
    /// What failed in `places[main]` waits here for at most `step`.
    Retry { main: usize, step: Duration },
}

/// All topics of a consumer.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    /// The main ones first, in the order in which they were named.
    pub(crate) subscribed: Vec<Place>,
    /// By the number of the main topic.
    pub(crate) dead: Vec<Arc<str>>,
    steps: Vec<Duration>,
}

impl Places {
    /// Names every topic. `steps` are sorted.
    pub(crate) fn new(topics: &[Box<str>], group: &str, steps: &[Duration]) -> Result<Self> {
        for topic in topics {
            check_topic("topic", topic)?;
        }
        let mut subscribed: Vec<Place> =
            topics.iter().map(|topic| Place { name: (**topic).into(), kind: Kind::Main }).collect();
        for (main, topic) in topics.iter().enumerate() {
            for step in steps {
                let kind = Kind::Retry { main, step: *step };
                subscribed.push(Place { name: retry_topic(topic, group, *step).into(), kind });
            }
        }
        let dead: Vec<Arc<str>> = topics.iter().map(|topic| dead_topic(topic, group).into()).collect();
        for name in subscribed.iter().map(|place| &place.name).chain(&dead) {
            check_topic("group", name).map_err(|_| group_does_not_name(name))?;
        }
        if let Some(topic) = topics.iter().find(|topic| dead.iter().any(|dead| **dead == ***topic)) {
            let why = format!("topic `{topic}` is where this group puts its own dead letters: they would never end");
            return Err(Error::new(ErrorKind::Configuration, "open").because(why));
        }
        Ok(Self { subscribed, dead, steps: steps.to_vec() })
    }

    /// The number of the main topic behind this one.
    pub(crate) fn main(&self, place: usize) -> usize {
        match self.subscribed[place].kind {
            Kind::Main => place,
            Kind::Retry { main, .. } => main,
        }
    }

    /// Whether the user named it.
    pub(crate) fn is_main(&self, place: usize) -> bool {
        place < self.mains()
    }

    /// How many topics the user named.
    pub(crate) fn mains(&self) -> usize {
        self.dead.len()
    }

    /// Where a retry of `main` waits: the first step that is long enough, or else the longest.
    pub(crate) fn retry(&self, main: usize, after: Duration) -> Option<(&Place, Duration)> {
        let last = self.steps.len().checked_sub(1)?;
        let step = self.steps.iter().position(|step| *step >= after).unwrap_or(last);
        Some((&self.subscribed[self.mains() + main * self.steps.len() + step], self.steps[step]))
    }

    /// The longest delay.
    pub(crate) fn longest(&self) -> Duration {
        self.steps.last().copied().unwrap_or(Duration::ZERO)
    }

    /// The number of a subscribed topic.
    pub(crate) fn find(&self, topic: &str) -> Option<usize> {
        self.subscribed.iter().position(|place| &*place.name == topic)
    }

    /// The retry and dead-letter topics.
    pub(crate) fn own(&self) -> impl Iterator<Item = &Arc<str>> {
        self.subscribed[self.mains()..].iter().map(|place| &place.name).chain(&self.dead)
    }
}

/// `{topic}.{group}.dead`.
pub(crate) fn dead_topic(topic: &str, group: &str) -> String {
    format!("{topic}.{group}.dead")
}

/// `{topic}.{group}.retry.{step}`.
pub(crate) fn retry_topic(topic: &str, group: &str, step: Duration) -> String {
    format!("{topic}.{group}.retry.{}", step_name(step))
}

/// The largest unit that divides the step: `500ms`, `90s`, `5m`, `1h`.
fn step_name(step: Duration) -> String {
    let ms = step.as_millis();
    for (unit, name) in [(3_600_000, "h"), (60_000, "m"), (1_000, "s")] {
        if ms >= unit && ms.is_multiple_of(unit) {
            return format!("{}{name}", ms / unit);
        }
    }
    format!("{ms}ms")
}

pub(crate) fn check_topic(field: &'static str, name: &str) -> Result<()> {
    let shaped = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    if shaped && !name.is_empty() && name.len() <= NAME_BYTES_MAX && name != "." && name != ".." {
        return Ok(());
    }
    let shown: String = name.chars().take(64).map(|c| if c.is_control() { ' ' } else { c }).collect();
    let why = format!(
        "{field} `{shown}` is no name of a Kafka topic: use 1 to {NAME_BYTES_MAX} of the characters a-z A-Z 0-9 . _ -"
    );
    Err(Error::new(ErrorKind::Configuration, "open").because(why))
}

fn group_does_not_name(topic: &str) -> Error {
    let shown: String = topic.chars().take(64).map(|c| if c.is_control() { ' ' } else { c }).collect();
    Error::new(ErrorKind::Configuration, "open").because(format!(
        "group does not give names for its topics (`{shown}` ..): use the characters a-z A-Z 0-9 . _ - in group, and keep \
         topic and group together below {} bytes",
        NAME_BYTES_MAX - 16
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEPS: [Duration; 3] = [Duration::from_millis(500), Duration::from_secs(15), Duration::from_secs(300)];

    fn places() -> Places {
        Places::new(&["orders".into(), "refunds".into()], "billing", &STEPS).expect("good names")
    }

    #[test]
    fn topics_are_named_by_topic_group_and_step() {
        let places = places();
        let names: Vec<&str> = places.subscribed.iter().map(|place| &*place.name).collect();
        assert_eq!(
            names,
            [
                "orders",
                "refunds",
                "orders.billing.retry.500ms",
                "orders.billing.retry.15s",
                "orders.billing.retry.5m",
                "refunds.billing.retry.500ms",
                "refunds.billing.retry.15s",
                "refunds.billing.retry.5m"
            ]
        );
        assert_eq!(&*places.dead[1], "refunds.billing.dead");
        assert_eq!(places.main(6), 1);
        assert_eq!(places.main(0), 0);
        assert_eq!(step_name(Duration::from_secs(7200)), "2h");
        assert_eq!(step_name(Duration::from_secs(90)), "90s");
    }

    #[test]
    fn a_retry_waits_in_the_first_step_that_is_long_enough() {
        let places = places();
        let name = |after| &*places.retry(1, Duration::from_millis(after)).expect("there are steps").0.name;
        assert_eq!(name(0), "refunds.billing.retry.500ms");
        assert_eq!(name(500), "refunds.billing.retry.500ms");
        assert_eq!(name(501), "refunds.billing.retry.15s");
        assert_eq!(name(10_000_000), "refunds.billing.retry.5m");
        assert_eq!(places.longest(), Duration::from_secs(300));
    }

    #[test]
    fn a_bad_name_is_refused_with_its_field() {
        for (topic, group, field) in [
            ("", "g", "topic"),
            ("a b", "g", "topic"),
            ("..", "g", "topic"),
            ("orders", "my group", "group"),
            ("orders", &"g".repeat(240), "group"),
        ] {
            let error = Places::new(&[topic.into()], group, &STEPS).expect_err("a bad name");
            assert_eq!(error.kind(), ErrorKind::Configuration);
            assert!(error.to_string().starts_with(&format!("open: {field} ")), "{error}");
        }
    }

    /// Bug 54 of semantics.md section 4, first half: a dead letter must not be set aside into the topic it is read from.
    #[test]
    fn a_dead_letter_topic_is_not_consumed_by_its_own_group() {
        let error = Places::new(&["orders".into(), "orders.billing.dead".into()], "billing", &STEPS);
        assert!(error.expect_err("a loop").to_string().contains("dead letters"));
        Places::new(&["orders.billing.dead".into()], "audit", &STEPS).expect("another group may");
    }
}
