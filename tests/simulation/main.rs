//! The simulation as a suite: thousands of seeds without a violation, every seed that ever failed, the same trace for the
//! same seed, and wrong back ends that some seed finds.
//!
//! More of them: `cargo run --release -p hapax-testkit --bin simulate -- --seeds 100000`.

mod wrong;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex};

use hapax_testkit::ledger::{Answer, Ending, Recording, Renewing, Settling, What};
use hapax_testkit::simulation::{Report, simulate};

/// Seeds that failed once, each with what it found.
const SEEDS: &str = include_str!("seeds.txt");

/// In CI. Other seeds than these are for whoever has the time.
const SEEDS_PER_RUN: u64 = 2_000;

/// What many seeds came to: those that failed, and the corners of a life that any of them reached.
#[derive(Default)]
struct Swept {
    seeds: usize,
    failed: Vec<Report>,
    corners: BTreeSet<String>,
}

impl Swept {
    fn assert_clean(&self) {
        let texts: Vec<_> = self.failed.iter().take(3).map(Report::to_string).collect();
        assert!(self.failed.is_empty(), "{} of {} seeds failed\n{}", self.failed.len(), self.seeds, texts.join("\n"));
    }
}

/// Runs seeds on every core.
fn sweep(seeds: &[u64]) -> Swept {
    let (next, swept) = (AtomicU64::new(0), Mutex::new(Swept { seeds: seeds.len(), ..Swept::default() }));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
                    let report = simulate(*seed);
                    let corners: Vec<_> = report.ledger.history().iter().filter_map(|it| corner(&it.what)).collect();
                    let mut swept = swept.lock().expect("nobody panics while holding it");
                    swept.corners.extend(corners);
                    swept.failed.extend(Some(report).filter(|report| !report.is_clean()));
                }
            });
        }
    });
    swept.into_inner().expect("nobody panics while holding it")
}

/// The seeds of every run, swept once for all tests.
static SWEPT: LazyLock<Swept> = LazyLock::new(|| sweep(&(0..SEEDS_PER_RUN).collect::<Vec<_>>()));

fn kept() -> Vec<u64> {
    let lines = SEEDS.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
    let seeds = lines.filter(|line| !line.is_empty());
    seeds.map(|seed| seed.parse().unwrap_or_else(|_| panic!("seeds.txt: {seed:?} is no seed"))).collect()
}

#[test]
fn two_thousand_seeds_break_no_invariant() {
    SWEPT.assert_clean();
}

#[test]
fn every_seed_that_ever_failed_breaks_no_invariant() {
    let kept = kept();
    assert!(!kept.is_empty());
    sweep(&kept).assert_clean();
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    let mut traces = BTreeSet::new();
    for seed in (0..12).chain([1_000_000_007]) {
        let (once, again) = (simulate(seed), simulate(seed));
        assert_eq!(once.trace_hash(), again.trace_hash(), "seed {seed}");
        traces.insert(once.trace_hash());
    }
    assert_eq!(traces.len(), 13, "another seed gives another trace");
}

/// What a line is an instance of, as far as the life of an event has corners.
fn corner(what: &What) -> Option<String> {
    Some(match what {
        What::Claimed { reopen: true, answer: Answer::Granted { attempt: 1, .. }, .. } => "reopened".into(),
        What::Claimed { answer: Answer::Granted { doomed: true, .. }, .. } => "granted as doomed".into(),
        What::Claimed { answer: Answer::Granted { crashes: 1.., .. }, .. } => "taken over".into(),
        What::Claimed { answer: Answer::Granted { attempt: 2.., .. }, .. } => "granted again".into(),
        What::Claimed { answer, .. } if !matches!(answer, Answer::Granted { .. }) => format!("claimed: {answer:?}"),
        What::Recorded { outcome, answer, .. } => {
            let outcome = match outcome {
                Ending::Processed => "processed",
                Ending::Failed { counted: true, .. } => "failed",
                Ending::Failed { counted: false, .. } => "failed, uncounted",
                Ending::Doomed => "doomed",
                Ending::DeadLettered => "dead-lettered",
            };
            format!("{outcome}: {answer:?}")
        }
        What::Renewed { answer, .. } => format!("renewed: {answer:?}"),
        What::Settled { settlement, ok, .. } => {
            let how = match settlement {
                Settling::Ack => "ack",
                Settling::Release => "release",
                Settling::Retry { .. } => "retry",
                Settling::DeadLetter { reason } => reason,
            };
            format!("{how}: {ok}")
        }
        What::Crashed => "crashed".into(),
        What::Resumed => "resumed".into(),
        What::ClockStepped => "clock stepped".into(),
        What::Fault { name } => (*name).into(),
        _ => return None,
    })
}

/// A simulation that does not get there proves nothing about it.
#[test]
fn the_seeds_reach_every_corner_of_a_life() {
    let mut corners: Vec<String> = [
        "reopened",
        "granted as doomed",
        "taken over",
        "granted again",
        "crashed",
        "resumed",
        "clock stepped",
        "store outage",
        "store outage for one",
        "broker outage",
        "session ends",
        "session drains",
    ]
    .map(String::from)
    .to_vec();
    let claims =
        [Answer::Processed, Answer::DeadLettered, Answer::Held, Answer::NotYet, Answer::Conflict, Answer::Unknown];
    corners.extend(claims.map(|answer| format!("claimed: {answer:?}")));
    for outcome in ["processed", "failed", "failed, uncounted", "doomed", "dead-lettered"] {
        let answers = [Recording::Done, Recording::AlreadyDone, Recording::Fenced, Recording::Unknown];
        corners.extend(answers.map(|answer| format!("{outcome}: {answer:?}")));
    }
    corners.extend([Renewing::Renewed, Renewing::Lost, Renewing::Unknown].map(|answer| format!("renewed: {answer:?}")));
    for how in ["ack", "release", "retry", "permanent", "attempts-exhausted", "crashes-exhausted", "conflict"] {
        corners.extend([true, false].map(|ok| format!("{how}: {ok}")));
    }
    corners.extend(["never-ready", "missing-id", "undecodable", "unknown-version"].map(|how| format!("{how}: true")));
    let missed: Vec<_> = corners.iter().filter(|corner| !SWEPT.corners.contains(*corner)).collect();
    assert!(missed.is_empty(), "never seen: {missed:?}");
}
