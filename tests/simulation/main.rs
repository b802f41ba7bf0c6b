//! The simulation as a suite: thousands of seeds without a violation, every seed that ever failed, the same trace for the
//! same seed, and wrong back ends that some seed finds.
//!
//! More of them: `cargo run --release -p hapax-testkit --bin simulate -- --seeds 100000`.

mod wrong;

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use hapax_testkit::simulation::{Report, simulate};

/// Seeds that failed once, each with what it found.
const SEEDS: &str = include_str!("seeds.txt");

/// In CI. Other seeds than these are for whoever has the time.
const SEEDS_PER_RUN: u64 = 2_000;

/// Runs seeds on every core; answers those that failed.
fn failures(seeds: &[u64]) -> Vec<Report> {
    let (next, failed) = (AtomicU64::new(0), Mutex::new(Vec::new()));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
                    let report = simulate(*seed);
                    if !report.is_clean() {
                        failed.lock().expect("nobody panics while holding the reports").push(report);
                    }
                }
            });
        }
    });
    failed.into_inner().expect("nobody panics while holding the reports")
}

fn assert_clean(seeds: &[u64]) {
    let failed = failures(seeds);
    let texts: Vec<_> = failed.iter().take(3).map(Report::to_string).collect();
    assert!(failed.is_empty(), "{} of {} seeds failed\n{}", failed.len(), seeds.len(), texts.join("\n"));
}

fn kept() -> Vec<u64> {
    let lines = SEEDS.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
    let seeds = lines.filter(|line| !line.is_empty());
    seeds.map(|seed| seed.parse().unwrap_or_else(|_| panic!("seeds.txt: {seed:?} is no seed"))).collect()
}

#[test]
fn two_thousand_seeds_break_no_invariant() {
    let seeds: Vec<_> = (0..SEEDS_PER_RUN).collect();
    assert_clean(&seeds);
}

#[test]
fn every_seed_that_ever_failed_breaks_no_invariant() {
    let kept = kept();
    assert!(!kept.is_empty());
    assert_clean(&kept);
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    let mut traces = std::collections::BTreeSet::new();
    for seed in (0..12).chain([1_000_000_007]) {
        let (once, again) = (simulate(seed), simulate(seed));
        assert_eq!(once.trace_hash(), again.trace_hash(), "seed {seed}");
        traces.insert(once.trace_hash());
    }
    assert_eq!(traces.len(), 13, "another seed gives another trace");
}
