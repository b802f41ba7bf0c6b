//! What is told while it runs (on standard error) and at the end (on standard output).

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt::{Arguments, Write as _};
use std::io::{self, IsTerminal, Write as _};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use hapax::{ConsumerHandle, HandlerEnd, Observed, Observer, Reason, Side};
use hapax_memory::MemoryBroker;
use tokio::sync::Notify;
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::feed::LINE;

/// How often the progress is shown.
const TICK: Duration = Duration::from_millis(100);
/// Without progress for this long, a lease that is waited for is worth telling.
const QUIET: Duration = Duration::from_secs(1);

/// Is told what happens in both workers.
#[derive(Default)]
pub(crate) struct Report {
    published: AtomicU64,
    set_aside: Notify,
    reasons: Mutex<BTreeMap<Reason, u64>>,
    /// Until when the lease lasts that a delivery waits for.
    lease_until: Mutex<Option<Instant>>,
}

impl Observer for Report {
    fn observe(&self, what: &Observed<'_>) {
        match what {
            Observed::DeadLettered { .. } => self.set_aside.notify_one(),
            Observed::Waiting { wait } => *lock(&self.lease_until) = Some(Instant::now() + *wait),
            Observed::Handled { end: HandlerEnd::Ok, .. } => *lock(&self.lease_until) = None,
            Observed::Reach { side: Side::Store, up: false, error } => {
                tell(format_args!("the database does not answer, waiting for it: {error}"));
            }
            _ => {}
        }
    }
}

/// What both workers have done.
#[derive(Clone, Copy, Default, PartialEq)]
struct Counts {
    processed: u64,
    duplicates: u64,
    dead_lettered: u64,
}

impl Counts {
    fn of(workers: &[ConsumerHandle]) -> Self {
        let mut counts = Self::default();
        for done in workers.iter().map(ConsumerHandle::statistics) {
            counts.processed += done.processed;
            counts.duplicates += done.duplicates;
            counts.dead_lettered += done.dead_lettered;
        }
        counts
    }

    fn deliveries(self) -> u64 {
        self.processed + self.duplicates + self.dead_lettered
    }
}

impl Report {
    /// A line became a delivery.
    pub(crate) fn published(&self) {
        self.published.fetch_add(1, Ordering::Relaxed);
    }

    /// Tells dead letters as they come and, on a terminal, how far it is. Never ends.
    pub(crate) async fn show(&self, broker: &MemoryBroker, workers: &[ConsumerHandle]) -> Infallible {
        let terminal = io::stderr().is_terminal();
        let (mut counts, mut progress) = (Counts::default(), Instant::now());
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            tokio::select! {
                () = self.set_aside.notified() => self.tell_dead_letters(broker),
                _ = ticks.tick() => {}
            }
            let now = Counts::of(workers);
            if now != counts {
                (counts, progress) = (now, Instant::now());
            }
            if terminal {
                let _ = write!(io::stderr(), "\r\x1b[2K{}", self.progress(counts, progress.elapsed()));
            }
        }
    }

    fn progress(&self, counts: Counts, quiet: Duration) -> String {
        let Counts { processed, duplicates, dead_lettered } = counts;
        let published = self.published.load(Ordering::Relaxed);
        let mut text =
            format!("{published} lines: {processed} processed, {duplicates} duplicates, {dead_lettered} dead-lettered");
        let left = lock(&self.lease_until).map_or(Duration::ZERO, |until| until.duration_since(Instant::now()));
        if quiet > QUIET && !left.is_zero() {
            let _ = write!(text, "; waiting for a lease of a process that died, {} s", left.as_secs() + 1);
        }
        text
    }

    /// Takes the dead letters out, so that there is always room for more.
    fn tell_dead_letters(&self, broker: &MemoryBroker) {
        for (message, letter) in broker.take_dead_letters() {
            let line = message.headers.get_str(LINE).unwrap_or("?");
            tell(format_args!("line {line}: {}: {}", letter.reason, letter.error));
            *lock(&self.reasons).entry(letter.reason).or_default() += 1;
        }
    }

    /// The summary, and the counts as JSON where they are asked for.
    pub(crate) fn sum_up(
        &self,
        broker: &MemoryBroker,
        workers: &[ConsumerHandle],
        table: Option<(i64, i64)>,
        json: bool,
    ) {
        self.tell_dead_letters(broker);
        let counts @ Counts { processed, duplicates, dead_lettered } = Counts::of(workers);
        let deliveries = counts.deliveries();
        let mut text = format!(
            "{deliveries} deliveries: {processed} processed (an effect each), {duplicates} duplicates (no effect), \
             {dead_lettered} dead-lettered\n"
        );
        for (reason, count) in &*lock(&self.reasons) {
            let _ = writeln!(text, "  dead-lettered as {reason}: {count}");
        }
        if let Some((rows, events)) = table {
            let _ = writeln!(text, "the table effects holds {rows} rows, of {events} events");
        }
        if json {
            let _ = writeln!(
                text,
                r#"{{"deliveries":{deliveries},"processed":{processed},"duplicates":{duplicates},"dead_lettered":{dead_lettered}}}"#
            );
        }
        clear_progress();
        // Whoever closed the pipe does not want to know.
        let _ = io::stdout().write_all(text.as_bytes());
    }
}

/// A line on standard error, above the progress.
pub(crate) fn tell(what: Arguments<'_>) {
    clear_progress();
    let _ = writeln!(io::stderr(), "{what}");
}

fn clear_progress() {
    if io::stderr().is_terminal() {
        let _ = write!(io::stderr(), "\r\x1b[2K");
    }
}

fn lock<T>(cell: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    cell.lock().unwrap_or_else(PoisonError::into_inner)
}
