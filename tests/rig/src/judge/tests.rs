//! The judge is judged: histories with a known fault, each of which must be found, beside one like it that is clean.

use std::collections::BTreeSet;
use std::time::Duration;

use hapax::EventKey;
use hapax_testkit::ledger::{Entry, What};

use super::{Terms, Verdict, judge};
use crate::scribe::CONDUCTOR;

const LEASE_MS: u64 = 4000;

fn terms() -> Terms {
    Terms {
        lease: Duration::from_millis(LEASE_MS),
        transactional: false,
        forgetful: false,
        one_server: false,
        lanes: Vec::new(),
        conflicts: BTreeSet::new(),
        quiesce_within: Duration::from_secs(60),
    }
}

fn key(id: &str) -> EventKey {
    EventKey::of("g", "rig", id)
}

/// Writes histories by hand: times in milliseconds.
#[derive(Default)]
struct Pen(Vec<Entry>);

impl Pen {
    fn write(mut self, at: u64, worker: u32, what: What) -> Self {
        self.0.push(Entry::new(Duration::from_millis(at), worker, what));
        self
    }

    fn produced(self, at: u64, id: &str) -> Self {
        self.write(at, CONDUCTOR, What::Produced { scope: "g".into(), event: id.into(), key: key(id) })
    }

    fn started(self, at: u64, worker: u32, id: &str, run: u64) -> Self {
        let idempotency_key = key(id).to_hex().into();
        self.write(at, worker, What::Started { key: key(id), attempt: 1, fence: run, idempotency_key })
    }

    fn effect(self, at: u64, worker: u32, id: &str, run: u64) -> Self {
        self.write(at, worker, What::Effect { key: key(id), attempt: 1, fence: run })
    }

    /// A run as it should be.
    fn ran(self, at: u64, worker: u32, id: &str, run: u64) -> Self {
        self.started(at, worker, id, run).effect(at + 100, worker, id, run)
    }

    fn letter(self, at: u64, id: &str, reason: &str) -> Self {
        let reason = reason.into();
        self.write(at, CONDUCTOR, What::DeadLetterPlaced { key: key(id), reason, attempts: 1, intact: true })
    }

    fn fault(self, at: u64, worker: u32, name: &'static str) -> Self {
        self.write(at, worker, What::Fault { name })
    }

    fn healed(self, at: u64) -> Self {
        self.write(at, CONDUCTOR, What::Healed)
    }

    fn judged(self, terms: &Terms) -> Verdict {
        let mut history = self.0;
        history.sort_by_key(|entry| entry.at);
        judge(&history, terms)
    }
}

fn is_clean(verdict: &Verdict) -> bool {
    verdict.violations.is_empty() && verdict.unexplained == 0 && verdict.lost.is_empty()
}

fn broken(verdict: &Verdict) -> BTreeSet<&'static str> {
    verdict.violations.iter().map(|violation| violation.invariant).collect()
}

#[test]
fn a_quiet_history_is_clean() {
    let verdict = Pen::default().produced(0, "a").ran(10, 0, "a", 1).healed(500).judged(&terms());
    assert!(is_clean(&verdict), "{verdict:?}");
}

#[test]
fn an_event_without_an_effect_is_lost() {
    let verdict = Pen::default().produced(0, "a").produced(0, "b").ran(10, 0, "a", 1).healed(500).judged(&terms());
    assert_eq!(verdict.lost, [key("b")]);
    assert!(broken(&verdict).contains("no_loss"));
}

#[test]
fn an_event_that_was_only_started_is_lost() {
    let verdict = Pen::default().produced(0, "a").started(10, 0, "a", 1).healed(500).judged(&terms());
    assert_eq!(verdict.lost, [key("a")]);
}

#[test]
fn a_dead_letter_ends_an_event_unless_it_is_another_body() {
    let history = || Pen::default().produced(0, "a").healed(500);
    assert!(is_clean(&history().letter(600, "a", "permanent").judged(&terms())));
    let verdict = history().letter(600, "a", "conflict").judged(&Terms { conflicts: [key("a")].into(), ..terms() });
    assert_eq!(verdict.lost, [key("a")]);
}

#[test]
fn an_effect_of_a_dead_letter_is_found() {
    let verdict = Pen::default().produced(0, "a").ran(10, 0, "a", 1).healed(500).letter(600, "a", "permanent");
    assert!(broken(&verdict.judged(&terms())).contains("terminal_exclusive"));
}

#[test]
fn a_duplicate_without_any_fault_is_unexplained() {
    let verdict = Pen::default().produced(0, "a").ran(10, 0, "a", 1).ran(9000, 1, "a", 2).healed(9500).judged(&terms());
    assert_eq!(verdict.unexplained, 1);
    assert!(broken(&verdict).is_superset(&["explained_duplicate", "no_start_after_terminal"].into()), "{verdict:?}");
}

#[test]
fn a_death_between_effect_and_record_explains_one_duplicate_of_that_worker_alone() {
    let history = |died: u64, who: u32| {
        let pen = Pen::default().produced(0, "a").ran(10, 0, "a", 1).write(died, who, What::Crashed);
        pen.ran(9000, 1, "a", 2).healed(9500)
    };
    let verdict = history(115, 0).judged(&terms());
    assert!(is_clean(&verdict), "{verdict:?}");
    assert_eq!(verdict.explained.values().sum::<usize>(), 1);
    assert_eq!(history(115, 2).judged(&terms()).unexplained, 1, "another worker died");
    assert_eq!(history(5000, 0).judged(&terms()).unexplained, 1, "long after its record");
    assert_eq!(history(115, 0).ran(9800, 2, "a", 3).judged(&terms()).unexplained, 1, "and nothing excuses a third");
}

#[test]
fn a_death_does_not_excuse_a_second_run_inside_the_lease() {
    let pen = Pen::default().produced(0, "a").ran(10, 0, "a", 1).write(115, 0, What::Crashed);
    let verdict = pen.ran(2000, 1, "a", 2).healed(9500).judged(&terms());
    assert_eq!(verdict.unexplained, 1);
}

#[test]
fn a_pause_explains_a_duplicate_only_when_it_outlasts_the_lease() {
    let history = |resumed: u64, again: u64| {
        let pen = Pen::default().produced(0, "a").started(10, 0, "a", 1);
        let pen = pen.write(50, 0, What::Paused).write(resumed, 0, What::Resumed).effect(resumed + 60, 0, "a", 1);
        pen.ran(again, 1, "a", 2).healed(9500)
    };
    let verdict = history(6000, 4200).judged(&terms());
    assert!(is_clean(&verdict), "{verdict:?}");
    assert_eq!(history(1000, 4200).judged(&terms()).unexplained, 1);
    assert_eq!(history(6000, 2000).judged(&terms()).unexplained, 1, "inside the lease");
}

#[test]
fn a_handler_that_begins_after_its_worker_stood_still_had_claimed_before() {
    let pen = Pen::default().produced(0, "a").write(50, 0, What::Paused).ran(4300, 1, "a", 1);
    let verdict = pen.write(6000, 0, What::Resumed).ran(6010, 0, "a", 2).healed(9500).judged(&terms());
    assert_eq!(verdict.unexplained, 0, "{verdict:?}");
    assert!(is_clean(&verdict), "{verdict:?}");
}

#[test]
fn a_worker_that_stood_still_and_claims_anew_itself_is_no_exception() {
    let pen = Pen::default().produced(0, "a").started(10, 0, "a", 1).write(50, 0, What::Paused);
    let pen = pen.write(6000, 0, What::Resumed).effect(6010, 0, "a", 1).ran(6100, 0, "a", 2).healed(9500);
    let verdict = pen.judged(&terms());
    assert_eq!((verdict.unexplained, verdict.explained.values().sum::<usize>()), (0, 1), "{verdict:?}");
}

#[test]
fn an_outage_of_the_store_explains_a_duplicate_only_when_it_outlasts_the_lease_and_is_this_workers() {
    let history = |who: u32, from: u64, to: u64| {
        let pen = Pen::default().produced(0, "a").ran(10, 0, "a", 1);
        pen.fault(from, who, "store away").fault(to, who, "store back").ran(8000, 1, "a", 2).healed(9500)
    };
    assert!(is_clean(&history(CONDUCTOR, 50, 5000).judged(&terms())));
    assert!(is_clean(&history(0, 50, 5000).judged(&terms())));
    assert_eq!(history(1, 50, 5000).judged(&terms()).unexplained, 1, "another worker's link");
    assert_eq!(history(0, 50, 60).judged(&terms()).unexplained, 1, "a cut that heals at once");
}

#[test]
fn a_store_that_may_lose_its_tail_explains_a_duplicate_of_what_ended_just_before() {
    let history = |killed: u64| {
        let pen = Pen::default().produced(0, "a").ran(10, 0, "a", 1).fault(killed, CONDUCTOR, "store restart: kill -9");
        pen.ran(killed + 900, 1, "a", 2).healed(40_000)
    };
    let forgetful = Terms { forgetful: true, ..terms() };
    assert_eq!(history(300).judged(&forgetful).unexplained, 0);
    assert_eq!(history(300).judged(&terms()).unexplained, 1, "a store that syncs");
    assert_eq!(history(20_000).judged(&forgetful).unexplained, 1, "long after");
}

#[test]
fn faults_of_the_broker_excuse_nothing() {
    let pen = Pen::default().produced(0, "a").ran(10, 0, "a", 1).fault(50, CONDUCTOR, "broker away");
    let verdict = pen.fault(7000, CONDUCTOR, "broker back").ran(8000, 1, "a", 2).healed(9500).judged(&terms());
    assert_eq!(verdict.unexplained, 1);
}

#[test]
fn with_transactions_nothing_excuses_a_duplicate() {
    let pen = Pen::default().produced(0, "a").ran(10, 0, "a", 1).write(115, 0, What::Crashed);
    let pen = pen.ran(9000, 1, "a", 2).healed(9500);
    let verdict = pen.judged(&Terms { transactional: true, ..terms() });
    assert_eq!(verdict.unexplained, 1);
    assert!(broken(&verdict).contains("effect_once_tx"));
}

#[test]
fn an_effect_twice_in_one_run_is_unexplained_even_if_its_worker_died() {
    let pen = Pen::default().produced(0, "a").ran(10, 0, "a", 1).effect(112, 0, "a", 1).write(115, 0, What::Crashed);
    let verdict = pen.ran(9000, 1, "a", 2).healed(9500).judged(&terms());
    assert_eq!(verdict.unexplained, 1, "{verdict:?}");
}

#[test]
fn another_body_must_be_set_aside_and_nothing_else_as_one() {
    let history = || Pen::default().produced(0, "a").ran(10, 0, "a", 1).healed(500);
    let conflict = Terms { conflicts: [key("a")].into(), ..terms() };
    assert!(is_clean(&history().letter(600, "a", "conflict").judged(&conflict)));
    assert!(broken(&history().judged(&conflict)).contains("conflicts_are_set_aside"));
    assert!(broken(&history().letter(600, "a", "conflict").judged(&terms())).contains("conflicts_are_set_aside"));
}

#[test]
fn an_event_that_overtakes_its_predecessor_is_found_where_order_was_agreed() {
    let lanes = vec![(key("a"), 0), (key("b"), 0)];
    let history = |first: &str, second: &str| {
        Pen::default().produced(0, "a").produced(0, "b").ran(10, 0, first, 1).ran(300, 1, second, 1).healed(500)
    };
    assert!(is_clean(&history("a", "b").judged(&Terms { lanes: lanes.clone(), ..terms() })));
    assert!(broken(&history("b", "a").judged(&Terms { lanes, ..terms() })).contains("key_order"));
    assert!(is_clean(&history("b", "a").judged(&terms())));
}

#[test]
fn an_end_that_comes_late_is_found() {
    let verdict = Pen::default().produced(0, "a").healed(500).ran(90_000, 0, "a", 1).judged(&terms());
    assert!(broken(&verdict).contains("quiesce"));
}
