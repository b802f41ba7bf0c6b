//! What happened on a stage, by event: the ground of every assertion, and the text of those that fail.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hapax::{Claim, Delivery, EventKey, Lease, Message, Outcome, Receipt, Recorded, Settlement};
use tokio::time::Instant;

/// How an event ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    Processed,
    DeadLettered,
}

/// Everything seen so far.
#[derive(Debug)]
pub(crate) struct Chronicle {
    begun: Instant,
    state: Mutex<State>,
}

impl Default for Chronicle {
    fn default() -> Self {
        Self { begun: Instant::now(), state: Mutex::default() }
    }
}

#[derive(Debug, Default)]
struct State {
    consumer: Box<str>,
    unwatched: bool,
    /// Source and id of what was sent, in order.
    sent: Vec<Name>,
    in_hand: BTreeMap<Receipt, Name>,
    fates: BTreeMap<EventKey, Fate>,
    /// Handlers that run, by event and fence.
    running: BTreeMap<(EventKey, u64), Running>,
    lines: Vec<Line>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Name {
    source: Box<str>,
    id: Box<str>,
}

impl Name {
    fn of(message: &Message) -> Self {
        let text = |value: &Option<Box<str>>| value.clone().unwrap_or_default();
        Self { source: text(&message.attributes.source), id: text(&message.attributes.id) }
    }

    fn is_called(&self, id: &str) -> bool {
        *self.id == *id || id.split_once(' ') == Some((&*self.source, &*self.id))
    }
}

/// What became of one event.
#[derive(Debug, Default)]
struct Fate {
    runs: u32,
    duplicates: u32,
    ended: Option<Ended>,
    /// The fence of a lease that is held.
    held: Option<u64>,
}

#[derive(Debug)]
struct Running {
    worker: u64,
    frozen: bool,
}

#[derive(Debug)]
struct Line {
    at: Duration,
    about: About,
    text: String,
}

#[derive(Debug, PartialEq, Eq)]
enum About {
    Event(EventKey),
    Message(Name),
    All,
}

/// What is known of the event that an assertion asks for.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) runs: u32,
    pub(crate) duplicates: u32,
    pub(crate) ended: Option<Ended>,
    /// What happened to it, one line each.
    pub(crate) story: String,
}

impl Chronicle {
    pub(super) fn consumer_is(&self, name: &str) {
        self.state().consumer = name.into();
    }

    pub(super) fn is_unwatched(&self) {
        self.state().unwatched = true;
    }

    /// Whether the wiring took the store from under the stage.
    pub(crate) fn sees_the_store(&self) -> bool {
        !self.state().unwatched
    }

    pub(super) fn sent(&self, message: &Message) {
        let name = Name::of(message);
        self.state().sent.push(name);
    }

    pub(super) fn delivered(&self, worker: u64, delivery: &Delivery) {
        let name = Name::of(&delivery.message);
        {
            let mut state = self.state();
            state.in_hand.insert(delivery.receipt, name.clone());
            if !state.sent.contains(&name) {
                state.sent.push(name.clone());
            }
        }
        let again = delivery.count.filter(|count| *count > 1);
        let again = again.map(|count| format!(", for the {count}. time")).unwrap_or_default();
        self.line(About::Message(name), format!("delivered to worker {worker}{again}"));
    }

    pub(super) fn settled(&self, receipt: Receipt, settlement: &Settlement, ok: bool) {
        let mut state = self.state();
        let Some(name) = state.in_hand.get(&receipt).cloned() else { return };
        if ok && matches!(settlement, Settlement::Ack | Settlement::DeadLetter(_)) {
            state.in_hand.remove(&receipt);
            state.ended(&name, settlement);
        }
        drop(state);
        let what = match settlement {
            Settlement::Ack => "acked".to_owned(),
            Settlement::Release { .. } => "given back to the broker".to_owned(),
            Settlement::Retry { after } => format!("back to the broker, to come again after {after:?}"),
            Settlement::DeadLetter(letter) => format!("dead-lettered as {}: {}", letter.reason, letter.error),
        };
        let stale = if ok { "" } else { ", which the broker refused" };
        self.line(About::Message(name), what + stale);
    }

    pub(super) fn claimed(&self, worker: u64, key: EventKey, claim: &Claim) {
        let mut state = self.state();
        let fate = state.fates.entry(key).or_default();
        let text = match claim {
            Claim::Granted(lease, history) => {
                fate.held = Some(lease.fence.get());
                fate.ended = None;
                let crashes = history.as_ref().map_or(0, |history| history.crashes);
                let crashes = if crashes > 0 { format!(", {crashes} crashed before") } else { String::new() };
                format!("claimed by worker {worker}: attempt {}{crashes}", lease.attempt)
            }
            Claim::Processed { .. } => {
                fate.duplicates += 1;
                fate.ended = Some(Ended::Processed);
                "claimed: a duplicate, processed before".to_owned()
            }
            Claim::DeadLettered { .. } => {
                fate.duplicates += 1;
                fate.ended = Some(Ended::DeadLettered);
                "claimed: a duplicate, dead-lettered before".to_owned()
            }
            // Asked again and again while a lease runs: one line is enough.
            Claim::Held { .. } => "claimed: another holds it".to_owned(),
            Claim::NotYet { wait } => format!("claimed: not due for {wait:?}"),
            Claim::Conflict => "claimed: a conflict, known with other data".to_owned(),
        };
        let last = state.lines.iter().rev().find(|line| line.about == About::Event(key));
        let repeats = matches!(claim, Claim::Held { .. }) && last.is_some_and(|line| line.text == text);
        drop(state);
        if !repeats {
            self.line(About::Event(key), text);
        }
    }

    pub(super) fn recorded(&self, lease: &Lease, outcome: &Outcome, answer: Recorded) {
        let mut state = self.state();
        let fate = state.fates.entry(lease.key).or_default();
        let ended = match outcome {
            Outcome::Processed => Some(Ended::Processed),
            Outcome::DeadLettered => Some(Ended::DeadLettered),
            Outcome::Failed { .. } | Outcome::Doomed { .. } => None,
        };
        if answer != Recorded::Fenced {
            fate.ended = ended.or(fate.ended);
        }
        if fate.held == Some(lease.fence.get()) && !matches!(outcome, Outcome::Doomed { .. }) {
            fate.held = None;
        }
        state.running.remove(&(lease.key, lease.fence.get()));
        drop(state);
        let what = match outcome {
            Outcome::Processed => "processed".to_owned(),
            Outcome::Failed { after, counted, trouble } => {
                let uncounted = if *counted { "" } else { ", not counted" };
                format!("failed, to be tried again after {after:?}{uncounted}: {}", trouble.error)
            }
            Outcome::Doomed { reason, trouble } => format!("to be dead-lettered as {reason}: {}", trouble.error),
            Outcome::DeadLettered => "dead-lettered".to_owned(),
        };
        let refused = if answer == Recorded::Fenced { ", refused: another holds it" } else { "" };
        self.line(About::Event(lease.key), format!("recorded: {what}{refused}"));
    }

    pub(super) fn store_failed(&self, operation: &str) {
        self.line(About::All, format!("the store fails on purpose: {operation}"));
    }

    /// A handler is polled; the first time it is started.
    pub(super) fn started(&self, worker: u64, lease: &Lease) {
        let (key, fence) = (lease.key, lease.fence.get());
        let mut state = self.state();
        if state.running.contains_key(&(key, fence)) {
            return;
        }
        // A handler that was stopped for good never returns; the next one tells.
        state.running.retain(|(other, _), running| *other != key || running.frozen);
        state.running.insert((key, fence), Running { worker, frozen: false });
        state.fates.entry(key).or_default().runs += 1;
        drop(state);
        self.line(About::Event(key), format!("handler started by worker {worker}, attempt {}", lease.attempt));
    }

    pub(super) fn returned(&self, lease: &Lease) {
        self.state().running.remove(&(lease.key, lease.fence.get()));
        self.line(About::Event(lease.key), "handler returned".to_owned());
    }

    pub(super) fn struck(&self, worker: u64, frozen: bool) {
        let mut state = self.state();
        let mine: BTreeSet<_> =
            state.running.iter().filter(|(_, running)| running.worker == worker).map(|(key, _)| *key).collect();
        for (key, fence) in mine {
            match state.running.get_mut(&(key, fence)) {
                Some(running) if frozen => running.frozen = true,
                _ => drop(state.running.remove(&(key, fence))),
            }
        }
        // Its leases are nobody's now: they are waited for, not worked on.
        state.fates.values_mut().for_each(|fate| fate.held = None);
        drop(state);
        let what = if frozen { "stands still" } else { "dies" };
        self.line(About::All, format!("worker {worker} {what}"));
    }

    /// Handlers that run and leases that are worked on, without frozen workers.
    pub(super) fn running(&self) -> usize {
        let state = self.state();
        let held = state.fates.values().filter(|fate| fate.held.is_some()).count();
        held + state.running.values().filter(|running| !running.frozen).count()
    }

    pub(super) fn running_in(&self, workers: &[u64]) -> bool {
        self.state().running.values().any(|running| workers.contains(&running.worker))
    }

    /// How much was written down.
    pub(super) fn lines(&self) -> usize {
        self.state().lines.len()
    }

    /// The event called `id`: by its id, by source and id with a space between, or by the id that was taken from
    /// elsewhere. The error says why there is none, or not one.
    pub(crate) fn find(&self, id: &str) -> Result<Seen, String> {
        let state = self.state();
        let names: BTreeSet<_> = state.sent.iter().filter(|name| name.is_called(id)).cloned().collect();
        if names.len() > 1 {
            let all: Vec<_> = names.iter().map(|name| format!("\"{} {}\"", name.source, name.id)).collect();
            return Err(format!("several events are called {id}: ask for one of {}", all.join(", ")));
        }
        let taken = EventKey::of(&state.consumer, "", id);
        let name = names.into_iter().next();
        let key = name.as_ref().map(|name| EventKey::of(&state.consumer, &name.source, &name.id));
        let key = key.filter(|key| state.fates.contains_key(key)).unwrap_or(taken);
        if name.is_none() && !state.fates.contains_key(&key) {
            let sent: BTreeSet<_> = state.sent.iter().map(|name| &*name.id).collect();
            return Err(format!("nothing called {id} was delivered, only {sent:?}"));
        }
        let mut story = String::new();
        for line in &state.lines {
            let is_ours = match &line.about {
                About::Event(of) => *of == key,
                About::Message(of) => Some(of) == name.as_ref(),
                About::All => true,
            };
            if is_ours {
                let _ = writeln!(story, "{:>10.3} s  {}", line.at.as_secs_f64(), line.text);
            }
        }
        let fate = state.fates.get(&key);
        Ok(Seen {
            runs: fate.map_or(0, |fate| fate.runs),
            duplicates: fate.map_or(0, |fate| fate.duplicates),
            ended: fate.and_then(|fate| fate.ended),
            story,
        })
    }

    /// What has not ended, with what happened to it.
    pub(super) fn unfinished(&self) -> String {
        let names: BTreeSet<_> = self.state().in_hand.values().map(|name| name.id.clone()).collect();
        let mut text = String::new();
        for id in names.iter().take(5) {
            let _ = match self.find(id) {
                Ok(seen) => write!(text, "event {id}:\n{}", seen.story),
                Err(why) => writeln!(text, "event {id}: {why}"),
            };
        }
        if names.len() > 5 {
            let _ = writeln!(text, "and {} more events", names.len() - 5);
        }
        text
    }

    fn line(&self, about: About, text: String) {
        let at = self.begun.elapsed();
        self.state().lines.push(Line { at, about, text });
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// A delivery ended for good.
    fn ended(&mut self, name: &Name, settlement: &Settlement) {
        let key = EventKey::of(&self.consumer, &name.source, &name.id);
        self.running.retain(|(other, _), running| *other != key || running.frozen);
        let unwatched = self.unwatched;
        let Some(fate) = self.fates.get_mut(&key).filter(|_| unwatched) else { return };
        // Without a view of the store, what the broker is told has to do.
        match (settlement, fate.ended) {
            (Settlement::DeadLetter(_), _) => fate.ended = Some(Ended::DeadLettered),
            (_, Some(_)) => fate.duplicates += 1,
            (_, None) => fate.ended = Some(Ended::Processed),
        }
    }
}
