//! Completes a history that was seen from outside: for every effect either its record, or why there was none.
//!
//! A run of an event is excused only where another run of it followed, not before the first one's lease could have run
//! out, and a fault kept the first from recording or from renewing: its process died, stood still, or its store was away.
//! A shorter fault excuses nothing: the call is repeated, and the lease holds meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use hapax::EventKey;
use hapax_testkit::ledger::{Ending, Entry, Recording, Renewing, What};

use super::Terms;
use crate::plan::Side;
use crate::scribe::{CONDUCTOR, away, back};

/// Why an effect may be repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Excuse {
    Killed,
    Paused,
    StoreAway,
    StoreForgot,
}

impl Excuse {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Killed => "killed between effect and record",
            Self::Paused => "paused beyond the lease",
            Self::StoreAway => "store away beyond the lease",
            Self::StoreForgot => "store lost its tail",
        }
    }
}

/// From an effect to its record, where nothing is in the way.
const RECORD_MAX: Duration = Duration::from_millis(1500);
/// Until a worker talks to its store again that has restarted, and that was cut off from it.
const SERVER_RECOVERY: Duration = Duration::from_secs(5);
const LINK_RECOVERY: Duration = Duration::from_secs(2);
/// Between what happens and the line about it.
const LATE: Duration = Duration::from_millis(300);
/// Between a claim and the start of its handler.
const CLAIM_TO_START: Duration = Duration::from_millis(300);
/// What a store without a sync for each write may lose.
const TAIL: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, Debug)]
struct Span {
    from: Duration,
    to: Duration,
}

impl Span {
    fn within(self, other: Self) -> Duration {
        self.to.min(other.to).saturating_sub(self.from.max(other.from))
    }

    fn touches(self, other: Self) -> bool {
        self.from <= other.to && other.from <= self.to
    }
}

/// What happened to workers and stores.
#[derive(Debug, Default)]
struct Faults {
    deaths: BTreeMap<(u32, u32), Duration>,
    pauses: BTreeMap<u32, Vec<Span>>,
    /// Away from one worker, or under the conductor's number from all; recovery included.
    store_away: BTreeMap<u32, Vec<Span>>,
    store_kills: Vec<Duration>,
}

impl Faults {
    fn of(history: &[Entry], terms: &Terms) -> Self {
        let mut faults = Self::default();
        let end = history.last().map_or(Duration::ZERO, |entry| entry.at);
        let mut open: BTreeMap<(u32, bool), Duration> = BTreeMap::new();
        for entry in history {
            let (at, worker) = (entry.at, entry.worker);
            match &entry.what {
                What::Crashed => drop(faults.deaths.insert((worker, entry.incarnation), at)),
                What::Paused => drop(open.insert((worker, true), at)),
                What::Resumed => faults.resumed(worker, open.remove(&(worker, true)), at),
                What::Fault { name } if *name == away(Side::Store) => drop(open.insert((worker, false), at)),
                What::Fault { name } if *name == back(Side::Store) => {
                    faults.reached(worker, open.remove(&(worker, false)), at);
                }
                What::Fault { name: "store restart: kill -9" } => faults.store_kills.push(at),
                What::Fault { name: "broker restart: kill -9" } if terms.one_server => faults.store_kills.push(at),
                _ => {}
            }
        }
        for ((worker, paused), from) in open {
            if paused { faults.resumed(worker, Some(from), end) } else { faults.reached(worker, Some(from), end) }
        }
        faults
    }

    fn resumed(&mut self, worker: u32, from: Option<Duration>, to: Duration) {
        let from = from.unwrap_or(to);
        self.pauses.entry(worker).or_default().push(Span { from, to });
    }

    fn reached(&mut self, worker: u32, from: Option<Duration>, to: Duration) {
        let recovery = if worker == CONDUCTOR { SERVER_RECOVERY } else { LINK_RECOVERY };
        let spans = self.store_away.entry(worker).or_default();
        let span = Span { from: from.unwrap_or(to), to: to + recovery };
        // Outages that follow each other closely are one.
        match spans.last_mut() {
            Some(last) if last.to >= span.from => last.to = last.to.max(span.to),
            _ => spans.push(span),
        }
    }

    fn store_away_from(&self, worker: u32) -> impl Iterator<Item = Span> + '_ {
        [worker, CONDUCTOR].into_iter().filter_map(|who| self.store_away.get(&who)).flatten().copied()
    }
}

/// One run of an event's handler.
#[derive(Clone, Debug)]
struct Run {
    number: u64,
    worker: u32,
    incarnation: u32,
    /// When it was claimed, as far as can be told, and when its handler began.
    begin: Duration,
    started: Duration,
    effects: Vec<Duration>,
}

/// The history with what must have happened, and the excused runs by event and number.
pub(crate) fn explain(history: &[Entry], terms: &Terms) -> (Vec<Entry>, BTreeMap<(EventKey, u64), Excuse>) {
    let faults = Faults::of(history, terms);
    let mut excuses = BTreeMap::new();
    if !terms.transactional {
        for (key, runs) in runs(history, &faults) {
            for pair in runs.windows(2) {
                if let Some(excuse) = excuse(&pair[0], &pair[1], &faults, terms) {
                    excuses.insert((key, pair[0].number), excuse);
                }
            }
        }
    }
    let mut complete = Vec::with_capacity(history.len() * 2);
    for entry in history {
        complete.push(entry.clone());
        let What::Effect { key, fence, .. } = &entry.what else { continue };
        let (key, fence, asked) = (*key, *fence, entry.at);
        let what = if excuses.contains_key(&(key, fence)) {
            What::Renewed { key, asked, fence, lease: terms.lease, answer: Renewing::Lost }
        } else {
            What::Recorded { key, asked, fence, outcome: Ending::Processed, answer: Recording::Done }
        };
        complete.push(Entry { what, ..entry.clone() });
    }
    (complete, excuses)
}

/// The starts, by event and time, of what may have been claimed before its worker stood still: nothing but the resource
/// itself can tell such a handler that another has the event by now.
pub(crate) fn claimed_before_a_pause(history: &[Entry], terms: &Terms) -> BTreeSet<(EventKey, Duration)> {
    let faults = Faults::of(history, terms);
    let mut starts = BTreeSet::new();
    for entry in history {
        if let What::Started { key, .. } = &entry.what
            && claimed(entry.worker, entry.at, &faults) < entry.at
        {
            starts.insert((*key, entry.at));
        }
    }
    starts
}

/// The runs of every event, in the order in which they were claimed.
fn runs(history: &[Entry], faults: &Faults) -> BTreeMap<EventKey, Vec<Run>> {
    let mut runs: BTreeMap<EventKey, Vec<Run>> = BTreeMap::new();
    for entry in history {
        let (key, number) = match &entry.what {
            What::Started { key, fence, .. } | What::Effect { key, fence, .. } => (*key, *fence),
            _ => continue,
        };
        let of_key = runs.entry(key).or_default();
        let known = of_key.iter().position(|run| run.number == number);
        let index = known.unwrap_or_else(|| {
            let (worker, incarnation) = (entry.worker, entry.incarnation);
            let begin = claimed(worker, entry.at, faults);
            of_key.push(Run { number, worker, incarnation, begin, started: entry.at, effects: Vec::new() });
            of_key.len() - 1
        });
        if matches!(entry.what, What::Effect { .. }) {
            of_key[index].effects.push(entry.at);
        }
    }
    for of_key in runs.values_mut() {
        of_key.sort_by_key(|run| (run.begin, run.number));
    }
    runs
}

/// A worker that stood still shortly before a handler began had claimed before it stood still.
fn claimed(worker: u32, started: Duration, faults: &Faults) -> Duration {
    let pauses = faults.pauses.get(&worker).into_iter().flatten();
    let stood = pauses.filter(|pause| pause.to <= started && started <= pause.to + CLAIM_TO_START);
    stood.map(|pause| pause.from).min().unwrap_or(started)
}

/// What kept `run` from recording or renewing until `next` could begin.
fn excuse(run: &Run, next: &Run, faults: &Faults, terms: &Terms) -> Option<Excuse> {
    let last = run.effects.last().copied().unwrap_or(next.started);
    if !has_run_out(run, next, terms) {
        return forgot(last, next, faults, terms);
    }
    let open = Span { from: run.begin, to: next.started };
    let busy = Span { from: run.begin, to: last + RECORD_MAX };
    let is_away =
        |at: Duration| faults.store_away_from(run.worker).any(|span| span.from <= at && at <= span.to + RECORD_MAX);
    if let Some(died) = faults.deaths.get(&(run.worker, run.incarnation))
        && *died + LATE >= run.begin
        && *died <= next.started
        && (*died <= last + RECORD_MAX || is_away(last))
    {
        return Some(Excuse::Killed);
    }
    // Renewed at a third: at least two thirds of the lease are left when a fault begins.
    let short = terms.lease.mul_f64(2.0 / 3.0).saturating_sub(LATE);
    let mut pauses = faults.pauses.get(&run.worker).into_iter().flatten();
    if pauses.any(|pause| pause.touches(busy) && pause.within(Span { from: Duration::ZERO, to: next.started }) >= short)
    {
        return Some(Excuse::Paused);
    }
    let reaching = Span { from: open.from, to: open.to + LATE };
    if faults.store_away_from(run.worker).any(|span| span.within(reaching) >= short) {
        return Some(Excuse::StoreAway);
    }
    forgot(last, next, faults, terms)
}

/// Whether the lease of the first can have run out when the next one began.
fn has_run_out(run: &Run, next: &Run, terms: &Terms) -> bool {
    next.started + LATE >= run.begin + terms.lease
}

/// Whether the store may have lost the record of what took effect just before it was killed.
fn forgot(effect: Duration, next: &Run, faults: &Faults, terms: &Terms) -> Option<Excuse> {
    let lost =
        |killed: Duration| killed + LATE >= effect && killed <= effect + TAIL + RECORD_MAX && killed <= next.started;
    (terms.forgetful && faults.store_kills.iter().any(|killed| lost(*killed))).then_some(Excuse::StoreForgot)
}
