//! What a run showed, as a table for people or as JSON.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde_json::json;

use crate::timing::Times;

/// The result of one run.
#[derive(Clone, Debug, Default)]
pub(crate) struct Report {
    pub(crate) broker: &'static str,
    pub(crate) store: &'static str,
    pub(crate) effects_are: &'static str,
    pub(crate) order: &'static str,
    pub(crate) seed: u64,
    pub(crate) minutes: f64,
    pub(crate) lease: Duration,
    pub(crate) events: u64,
    pub(crate) messages: u64,
    pub(crate) sent_again: u64,
    pub(crate) effects: u64,
    pub(crate) conflicts: usize,
    pub(crate) letters: usize,
    /// Starts that failed while a server was away.
    pub(crate) refused_starts: u32,
    pub(crate) faults: BTreeMap<&'static str, u32>,
    pub(crate) explained: BTreeMap<&'static str, usize>,
    pub(crate) unexplained: usize,
    pub(crate) lost: usize,
    /// None when it did not.
    pub(crate) quiesced: Option<Duration>,
    pub(crate) takeover: (Times, Times),
    pub(crate) takeover_max: Duration,
    pub(crate) broker_resume: (Times, Times),
    pub(crate) store_resume: (Times, Times),
    pub(crate) resume_max: Duration,
    /// Whatever else does not hold.
    pub(crate) violations: Vec<String>,
    pub(crate) folder: String,
}

impl Report {
    /// Whether the promise was kept.
    pub(crate) fn holds(&self) -> bool {
        self.unexplained == 0 && self.lost == 0 && self.violations.is_empty() && self.quiesced.is_some()
    }

    /// Times beyond what was promised are violations, too.
    pub(crate) fn judge_times(&mut self) {
        if self.takeover.0.longest > self.takeover_max {
            let Times { longest, .. } = self.takeover.0;
            self.violations.push(format!("takeover took {longest:?}, promised are {:?}", self.takeover_max));
        }
        for (side, (first, _)) in [("broker", self.broker_resume), ("store", self.store_resume)] {
            if first.longest > self.resume_max {
                let longest = first.longest;
                self.violations.push(format!("{side} was back {longest:?} before work went on; {:?}", self.resume_max));
            }
        }
    }

    fn fault_count(&self, prefix: &str) -> u32 {
        self.faults.iter().filter(|(name, _)| name.starts_with(prefix)).map(|(_, count)| count).sum()
    }

    pub(crate) fn to_json(&self) -> String {
        let times = |times: Times| json!({ "measured": times.measured, "disturbed": times.disturbed, "longest_ms": times.longest.as_millis() as u64 });
        json!({
            "broker": self.broker,
            "store": self.store,
            "effects_are": self.effects_are,
            "order": self.order,
            "seed": self.seed,
            "minutes": self.minutes,
            "lease_ms": self.lease.as_millis() as u64,
            "events": self.events,
            "messages": self.messages,
            "batches_sent_again": self.sent_again,
            "effects": self.effects,
            "conflicts": self.conflicts,
            "dead_letters": self.letters,
            "starts_refused": self.refused_starts,
            "faults": self.faults,
            "duplicates_explained": self.explained,
            "duplicates_unexplained": self.unexplained,
            "lost": self.lost,
            "quiesced_ms": self.quiesced.map(|time| time.as_millis() as u64),
            "takeover_first": times(self.takeover.0),
            "takeover_last": times(self.takeover.1),
            "broker_resume_first": times(self.broker_resume.0),
            "broker_resume_last": times(self.broker_resume.1),
            "store_resume_first": times(self.store_resume.0),
            "store_resume_last": times(self.store_resume.1),
            "violations": self.violations,
            "holds": self.holds(),
        })
        .to_string()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { broker, store, effects_are, order, seed, minutes, lease, .. } = self;
        writeln!(
            f,
            "{broker} + {store}, effects {effects_are}, order {order}, {minutes} min, seed {seed}, lease {lease:?}"
        )?;
        row(f, "events accepted", format!("{} ({} messages)", self.events, self.messages))?;
        row(f, "effects", self.effects)?;
        row(f, "conflicting bodies", format!("{} ({} dead letters in all)", self.conflicts, self.letters))?;
        row(f, "kills, pauses", format!("{}, {}", self.fault_count("kill"), self.fault_count("pause")))?;
        let restarts =
            |side: &str| self.fault_count(&format!("{side} restart")) + self.fault_count(&format!("{side} down"));
        row(f, "broker, store restarts", format!("{}, {}", restarts("broker"), restarts("store")))?;
        row(f, "connection cuts", self.fault_count("cut "))?;
        for (name, count) in &self.faults {
            row(f, &format!("  {name}"), count)?;
        }
        row(f, "starts refused in an outage", self.refused_starts)?;
        row(f, "duplicates explained", self.explained.values().sum::<usize>())?;
        for (name, count) in &self.explained {
            row(f, &format!("  {name}"), count)?;
        }
        row(f, "duplicates unexplained", self.unexplained)?;
        row(f, "lost", self.lost)?;
        row(f, "quiet after", self.quiesced.map_or_else(|| "never".to_owned(), |time| format!("{time:.1?}")))?;
        row(f, "takeover: first, last", format!("{}; {}", Shown(self.takeover.0), Shown(self.takeover.1)))?;
        row(
            f,
            "broker back: first, last",
            format!("{}; {}", Shown(self.broker_resume.0), Shown(self.broker_resume.1)),
        )?;
        row(f, "store back: first, last", format!("{}; {}", Shown(self.store_resume.0), Shown(self.store_resume.1)))?;
        for violation in &self.violations {
            writeln!(f, "  broken: {violation}")?;
        }
        row(f, "history", &self.folder)?;
        write!(f, "{}", if self.holds() { "holds" } else { "DOES NOT HOLD" })
    }
}

fn row(f: &mut fmt::Formatter<'_>, name: &str, value: impl fmt::Display) -> fmt::Result {
    writeln!(f, "  {name:<34} {value}")
}

struct Shown(Times);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Times { measured, disturbed, longest } = self.0;
        write!(f, "longest {longest:.1?} of {measured}")?;
        if disturbed > 0 { write!(f, " ({disturbed} disturbed)") } else { Ok(()) }
    }
}
