//! The checkers are checked: each finds the histories that break its invariant, and none finds anything in lives in which
//! much goes wrong and every invariant is kept.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use hapax::{EventKey, Fingerprint, Receipt};
use hapax_testkit::checkers::{CHECKERS, Terms, check_all};
use hapax_testkit::ledger::{Answer, Ending, Entry, Recording, Renewing, Settling, What};

const LEASE: Duration = Duration::from_secs(30);

fn key(id: &str) -> EventKey {
    EventKey::of("billing", "s", id)
}

fn receipt(position: u64) -> Receipt {
    Receipt { session: 1, partition: 0, position }
}

fn data(text: &str) -> Fingerprint {
    Fingerprint::of(None, text.as_bytes())
}

/// A history under way: lines follow each other by a millisecond, unless told otherwise.
#[derive(Clone, Default)]
struct Story {
    lines: Vec<Entry>,
    now: Duration,
    worker: u32,
    tokens: u128,
}

impl Story {
    fn new() -> Self {
        Self::default().line(What::Produced { scope: "billing".into(), event: "1".into(), key: key("1") })
    }

    fn line(mut self, what: What) -> Self {
        self.now += Duration::from_millis(1);
        self.lines.push(Entry::new(self.now, self.worker, what));
        self
    }

    fn later(mut self, by: Duration) -> Self {
        self.now += by;
        self
    }

    fn by(mut self, worker: u32) -> Self {
        self.worker = worker;
        self
    }

    fn delivered(self, id: &str, position: u64) -> Self {
        self.delivered_with(id, position, "data")
    }

    fn delivered_with(self, id: &str, position: u64, text: &str) -> Self {
        let lane = Some("lane".into());
        self.line(What::Delivered { key: key(id), receipt: receipt(position), fingerprint: data(text), lane })
    }

    fn claimed(self, id: &str, answer: Answer) -> Self {
        self.claim(id, answer, data("data"), false)
    }

    fn claim(mut self, id: &str, answer: Answer, fingerprint: Fingerprint, reopen: bool) -> Self {
        self.tokens += 1;
        let token = self.tokens;
        let story = self.line(What::ClaimAsked { key: key(id), token, reopen });
        let asked = story.now;
        story.line(What::Claimed { key: key(id), asked, token, fingerprint, reopen, lease: LEASE, answer })
    }

    fn granted(self, id: &str, fence: u64, attempt: u32) -> Self {
        self.claimed(id, granted(fence, attempt))
    }

    fn started(self, id: &str, fence: u64, attempt: u32) -> Self {
        let idempotency_key = key(id).to_hex().into();
        self.line(What::Started { key: key(id), attempt, fence, idempotency_key })
    }

    fn effect(self, id: &str, fence: u64) -> Self {
        self.line(What::Effect { key: key(id), attempt: 1, fence })
    }

    fn returned(self, id: &str, fence: u64, ok: bool) -> Self {
        self.line(What::Returned { key: key(id), fence, ok })
    }

    fn recorded(self, id: &str, fence: u64, outcome: Ending, answer: Recording) -> Self {
        let story = self.line(What::RecordAsked { key: key(id), fence, outcome: outcome.clone() });
        let asked = story.now;
        story.line(What::Recorded { key: key(id), asked, fence, outcome, answer })
    }

    fn done(self, id: &str, fence: u64, outcome: Ending) -> Self {
        self.recorded(id, fence, outcome, Recording::Done)
    }

    fn renewed(self, id: &str, fence: u64, answer: Renewing) -> Self {
        let asked = self.now;
        self.line(What::Renewed { key: key(id), asked, fence, lease: LEASE, answer })
    }

    fn settled(self, id: &str, position: u64, settlement: Settling) -> Self {
        let (key, receipt) = (Some(key(id)), receipt(position));
        self.line(What::SettleAsked { key, receipt, settlement: settlement.clone() }).line(What::Settled {
            key,
            receipt,
            settlement,
            ok: true,
        })
    }

    fn placed(self, id: &str, intact: bool) -> Self {
        self.line(What::DeadLetterPlaced { key: key(id), reason: "permanent".into(), attempts: 1, intact })
    }

    fn healed(self) -> Self {
        self.line(What::Healed)
    }

    /// Delivered, claimed under this fence, and run with success; not recorded.
    fn run(self, id: &str, position: u64, fence: u64) -> Self {
        self.delivered(id, position)
            .granted(id, fence, 1)
            .started(id, fence, 1)
            .effect(id, fence)
            .returned(id, fence, true)
    }

    /// A whole life.
    fn life(self, id: &str, position: u64, fence: u64) -> Self {
        self.run(id, position, fence).done(id, fence, Ending::Processed).settled(id, position, Settling::Ack)
    }

    fn doomed(self, id: &str, position: u64, fence: u64) -> Self {
        let failed =
            self.delivered(id, position).granted(id, fence, 1).started(id, fence, 1).returned(id, fence, false);
        failed.done(id, fence, Ending::Doomed).settled(id, position, Settling::DeadLetter { reason: "permanent" }).done(
            id,
            fence,
            Ending::DeadLettered,
        )
    }
}

fn granted(fence: u64, attempt: u32) -> Answer {
    Answer::Granted { fence, attempt, crashes: attempt - 1, doomed: false }
}

fn failed(after_s: u64, counted: bool) -> Ending {
    Ending::Failed { after: Duration::from_secs(after_s), counted }
}

fn terms() -> Terms {
    Terms { attempts_max: 2, crashes_max: 1, in_flight_max: 3, ..Terms::default() }
}

/// For each checker a name of what is wrong, and the history that shows it.
fn bad() -> Vec<(&'static str, Story, Terms)> {
    let new = Story::new;
    let ack = Settling::Ack;
    let ordered = || Terms { order_per_key: true, ..terms() };
    let transactional = || Terms { transactional: true, ..terms() };
    let over = LEASE + Duration::from_secs(1);
    let other = |scope: &str| What::Produced { scope: scope.into(), event: "1".into(), key: key("1") };
    vec![
        ("no_loss", new().run("1", 1, 5).healed(), terms()),
        ("terminal_exclusive", new().life("1", 1, 5).done("1", 5, Ending::DeadLettered).placed("1", true), terms()),
        ("terminal_exclusive", new().life("1", 1, 5).placed("1", true), terms()),
        ("no_start_after_terminal", new().life("1", 1, 5).granted("1", 6, 2).started("1", 6, 2), terms()),
        ("one_live_lease", new().granted("1", 5, 1).by(2).granted("1", 6, 2), terms()),
        (
            "one_live_lease",
            new()
                .granted("1", 5, 1)
                .later(LEASE / 2)
                .renewed("1", 5, Renewing::Renewed)
                .later(LEASE * 3 / 4)
                .granted("1", 6, 2),
            terms(),
        ),
        ("fence_monotonic", new().granted("1", 5, 1).later(over).granted("1", 4, 2), terms()),
        ("fence_monotonic", new().granted("1", 5, 1).later(over).granted("1", 5, 2), terms()),
        (
            "fenced_write_rejected",
            new().by(1).granted("1", 5, 1).later(over).by(2).granted("1", 6, 2).by(1).done("1", 5, Ending::Processed),
            terms(),
        ),
        (
            "fenced_write_rejected",
            new().granted("1", 5, 1).later(over).granted("1", 6, 2).later(LEASE / 9).renewed("1", 5, Renewing::Renewed),
            terms(),
        ),
        ("settle_only_terminal", new().run("1", 1, 5).settled("1", 1, ack.clone()), terms()),
        (
            "settle_only_terminal",
            new().delivered("1", 1).granted("1", 5, 1).settled("1", 1, Settling::DeadLetter { reason: "permanent" }),
            terms(),
        ),
        (
            "no_settle_when_fenced",
            new().run("1", 1, 5).recorded("1", 5, Ending::Processed, Recording::Fenced).settled("1", 1, ack.clone()),
            terms(),
        ),
        (
            "no_settle_when_fenced",
            new().run("1", 1, 5).renewed("1", 5, Renewing::Lost).settled("1", 1, ack.clone()),
            terms(),
        ),
        ("settle_once", new().life("1", 1, 5).settled("1", 1, Settling::Release), terms()),
        ("settle_on_own_session", new().by(1).run("1", 1, 5).by(2).settled("1", 1, ack.clone()), terms()),
        ("explained_duplicate", new().life("1", 1, 5).granted("1", 6, 2).started("1", 6, 2).effect("1", 6), terms()),
        ("explained_duplicate", new().run("1", 1, 5).effect("1", 5), terms()),
        // One start that failed excuses one effect under its fence, not two.
        (
            "explained_duplicate",
            new()
                .granted("1", 5, 1)
                .started("1", 5, 1)
                .effect("1", 5)
                .effect("1", 5)
                .returned("1", 5, false)
                .life("1", 1, 6),
            terms(),
        ),
        ("attempts_bounded", new().run("1", 1, 5).started("1", 5, 1), terms()),
        (
            "effect_once_tx",
            new().run("1", 1, 5).line(What::Crashed).later(over).granted("1", 6, 2).effect("1", 6),
            transactional(),
        ),
        (
            "stable_key",
            new().started("1", 5, 1).line(What::Started {
                key: key("1"),
                attempt: 2,
                fence: 6,
                idempotency_key: "another".into(),
            }),
            terms(),
        ),
        (
            "stable_key",
            new().started("1", 5, 1).line(What::Started {
                key: key("2"),
                attempt: 1,
                fence: 6,
                idempotency_key: key("1").to_hex().into(),
            }),
            terms(),
        ),
        (
            "attempts_bounded",
            (1..=4).fold(new(), |story, n| {
                story.granted("1", n, u32::try_from(n).expect("small")).started("1", n, 1).done("1", n, failed(0, true))
            }),
            terms(),
        ),
        ("attempts_bounded", new().doomed("1", 1, 5).later(over).granted("1", 6, 2).started("1", 6, 2), terms()),
        ("attempts_survive", new().granted("1", 5, 2).later(over).granted("1", 6, 1), terms()),
        (
            "conflict_never_runs",
            new().run("1", 1, 5).later(over).delivered_with("1", 2, "other").claim(
                "1",
                granted(6, 2),
                data("other"),
                false,
            ),
            terms(),
        ),
        (
            "conflict_never_runs",
            new().life("1", 1, 5).delivered_with("1", 2, "other").settled("1", 2, ack.clone()),
            terms(),
        ),
        ("scope_isolation", new().line(other("shipping")), terms()),
        (
            "scope_isolation",
            new()
                .line(What::Produced {
                    scope: "shipping".into(),
                    event: "1".into(),
                    key: EventKey::of("shipping", "s", "1"),
                })
                .life("1", 1, 5)
                .healed(),
            terms(),
        ),
        ("key_order", new().delivered("1", 1).delivered("2", 2).granted("2", 5, 1).started("2", 5, 1), ordered()),
        (
            "retry_not_early",
            new().granted("1", 5, 1).done("1", 5, failed(60, true)).later(over).granted("1", 6, 2).started("1", 6, 2),
            terms(),
        ),
        ("retry_not_lost", new().granted("1", 5, 1).started("1", 5, 1).done("1", 5, failed(1, true)).healed(), terms()),
        ("retry_not_lost", new().delivered("1", 1).settled("1", 1, Settling::Release).healed(), terms()),
        ("dead_letter_complete", new().doomed("1", 1, 5).healed(), terms()),
        ("dead_letter_complete", new().doomed("1", 1, 5).placed("1", false), terms()),
        (
            "unknown_is_unknown",
            new().run("1", 1, 5).recorded("1", 5, Ending::Processed, Recording::Unknown).settled("1", 1, ack),
            terms(),
        ),
        ("bounded_in_flight", (1..=4).fold(new(), |story, n| story.delivered(&n.to_string(), n)), terms()),
        ("quiesce", new().run("1", 1, 5).healed().later(over * 100).done("1", 5, Ending::Processed), terms()),
    ]
}

/// Lives in which much goes wrong and every invariant is kept.
fn good() -> Vec<(&'static str, Story, Terms)> {
    let new = Story::new;
    let over = LEASE + Duration::from_secs(1);
    let terms = || Terms { order_per_key: true, ..terms() };
    let ack = Settling::Ack;
    vec![
        ("a plain life", new().life("1", 1, 5).healed(), terms()),
        (
            "a batch that came to nothing, and the event alone behind it",
            new()
                .delivered("1", 1)
                .granted("1", 5, 1)
                .started("1", 5, 1)
                .effect("1", 5)
                .returned("1", 5, false)
                .started("1", 5, 1)
                .effect("1", 5)
                .returned("1", 5, true)
                .done("1", 5, Ending::Processed)
                .settled("1", 1, ack.clone())
                .healed(),
            Terms { starts_per_claim: 3, ..terms() },
        ),
        ("two in order", new().delivered("2", 2).life("2", 2, 4).life("1", 1, 5).healed(), terms()),
        (
            "a crash between effect and record",
            new()
                .by(1)
                .run("1", 1, 5)
                .line(What::Crashed)
                .later(over)
                .by(2)
                .delivered("1", 9)
                .granted("1", 6, 2)
                .started("1", 6, 2)
                .effect("1", 6)
                .done("1", 6, Ending::Processed)
                .settled("1", 9, ack.clone())
                .healed(),
            terms(),
        ),
        (
            "a zombie that is fenced, gives way and acks what another did",
            new()
                .by(1)
                .run("1", 1, 5)
                .line(What::Paused)
                .later(over)
                .by(2)
                .life_of_copy()
                .by(1)
                .line(What::Resumed)
                .recorded("1", 5, Ending::Processed, Recording::Fenced)
                .claimed("1", Answer::Processed)
                .settled("1", 1, ack.clone())
                .healed(),
            terms(),
        ),
        (
            "a lost answer, asked again",
            new()
                .run("1", 1, 5)
                .recorded("1", 5, Ending::Processed, Recording::Unknown)
                .recorded("1", 5, Ending::Processed, Recording::AlreadyDone)
                .settled("1", 1, ack.clone())
                .healed(),
            terms(),
        ),
        (
            "a failure, a wait, a success",
            new()
                .delivered("1", 1)
                .granted("1", 5, 1)
                .started("1", 5, 1)
                .returned("1", 5, false)
                .done("1", 5, failed(10, true))
                .settled("1", 1, Settling::Retry { after: Duration::from_secs(10) })
                .later(over)
                .delivered("1", 2)
                .granted("1", 6, 2)
                .started("1", 6, 2)
                .effect("1", 6)
                .done("1", 6, Ending::Processed)
                .settled("1", 2, ack.clone())
                .healed(),
            terms(),
        ),
        (
            "a dead letter, sent back with other data",
            new()
                .doomed("1", 1, 5)
                .placed("1", true)
                .delivered_with("1", 2, "repaired")
                .claim("1", granted(6, 1), data("repaired"), true)
                .started("1", 6, 1)
                .effect("1", 6)
                .done("1", 6, Ending::Processed)
                .settled("1", 2, ack.clone())
                .healed(),
            terms(),
        ),
        (
            "a conflict that is set aside",
            new()
                .life("1", 1, 5)
                .delivered_with("1", 2, "other")
                .claim("1", Answer::Conflict, data("other"), false)
                .settled("1", 2, Settling::DeadLetter { reason: "conflict" })
                .healed(),
            terms(),
        ),
        (
            "ignored by rule",
            new().delivered("1", 1).settled("1", 1, ack).healed(),
            Terms { ignored: [key("1")].into(), ..terms() },
        ),
    ]
}

impl Story {
    /// Another worker's copy of event 1, under fence 6.
    fn life_of_copy(self) -> Self {
        self.delivered("1", 9)
            .granted("1", 6, 2)
            .started("1", 6, 2)
            .effect("1", 6)
            .done("1", 6, Ending::Processed)
            .settled("1", 9, Settling::Ack)
    }
}

#[test]
fn every_checker_finds_its_bad_history() {
    let mut proved = BTreeSet::new();
    for (name, story, terms) in bad() {
        let (_, check) = CHECKERS.iter().find(|(checker, _)| *checker == name).expect("there is such a checker");
        let found = check(&story.lines, &terms);
        assert!(!found.is_empty(), "{name} finds nothing in {:#?}", story.lines);
        assert!(found.iter().all(|violation| violation.invariant == name), "{found:?}");
        proved.insert(name);
    }
    let all: BTreeSet<_> = CHECKERS.iter().map(|(name, _)| *name).collect();
    assert_eq!(proved, all, "each checker has its bad history");
}

#[test]
fn no_checker_finds_anything_in_a_good_history() {
    for (what, story, terms) in good() {
        let found = check_all(&story.lines, &terms);
        assert!(found.is_empty(), "{what}: {}", found.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"));
    }
}

#[tokio::test(start_paused = true)]
async fn witnesses_write_what_was_asked_and_answered() {
    use hapax::{Broker, ClaimRequest, Limits, Message, MessageLimits, Outcome, ProcessedStore, Settlement, Want};
    use hapax_memory::{MemoryBroker, MemoryStore};
    use hapax_testkit::faulty::{Faults, FaultyStore};
    use hapax_testkit::ledger::{Ledger, WitnessedBroker, WitnessedStore};

    let ledger = Ledger::new();
    let topic = MemoryBroker::new("orders");
    topic.publisher().send(Message::event("s", "1", "t")).await;
    ledger.produced("billing", "1", key("1"));
    let broker = WitnessedBroker::new(Arc::new(topic), "billing", ledger.of(1, 0));
    let switch = Faults { lose_reply: 1.0, ..Faults::none(1) }.switch();
    let store = FaultyStore::new(Arc::new(MemoryStore::new()), switch.clone());
    let store = WitnessedStore::new(Arc::new(store), ledger.of(1, 0));

    let hour = Duration::from_secs(3600);
    let limits = Limits { events: 9, bytes: 1 << 20, held_max: hour, drain: hour, message: MessageLimits::DEFAULT };
    broker.open(limits).await.unwrap();
    let delivery = broker.receive(Want { events: 1, bytes: 1 }).await.unwrap().remove(0);
    let consumer = store.open("billing", hour).await.unwrap();
    let fingerprint = Fingerprint::of(None, b"");
    let request = ClaimRequest { consumer, key: key("1"), fingerprint, token: 1, reopen: None };
    assert_eq!(store.claim(&[request], LEASE).await.unwrap_err().kind(), hapax::ErrorKind::Unknown);
    switch.heal();
    let hapax::Claim::Granted(lease, _) = store.claim(&[request], LEASE).await.unwrap().remove(0) else {
        panic!("the repeated claim is granted")
    };
    store.record(&[(lease, Outcome::Processed)]).await.unwrap();
    broker.settle(&[(delivery.receipt, Settlement::Ack)]).await.remove(0).unwrap();
    ledger.write(What::Healed);

    let jsonl = ledger.to_jsonl();
    let kinds: Vec<String> = jsonl
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["kind"].as_str().unwrap().to_owned())
        .collect();
    let expected =
        "produced delivered claim_asked claimed claim_asked claimed record_asked recorded settle_asked settled healed";
    assert_eq!(kinds.join(" "), expected);
    assert_eq!(check_all(&ledger.history(), &Terms::default()), []);
    assert_eq!(switch.injected().get("lose-reply"), Some(&1));
    assert!(ledger.story(key("1")).to_string().contains("Processed"));
    let hash = ledger.trace_hash();
    assert_eq!(hash, ledger.trace_hash());
    ledger.write(What::Crashed);
    assert_ne!(hash, ledger.trace_hash());
}
