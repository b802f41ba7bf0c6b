//! A small store over `hapax::record`, right by itself, with one fault built in at a time; with and without transactions.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use hapax::record::{self, Moment, Record, State};
use hapax::{
    Claim, ClaimRequest, ConsumerId, Durability, EventKey, Lease, Outcome, ProcessedStore, RecordView, Recorded,
    Renewal, Result, Status, StoreAdmin, StoreHealth, Swept, TransactionalStore,
};
use hapax_testkit::conformance::{Clock, StoreFixture, TransactionalFixture, store, transactions};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::Table;

/// The fault that is built in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wrong {
    Nothing,
    /// `open` always gives a new number.
    NumbersAnew,
    /// `open` always gives the same number.
    OneNumberForAll,
    /// Reads the record, lets others run, writes it.
    ClaimsInTwoSteps,
    /// Takes every lease for ended.
    GrantsHeld,
    /// The attempt is counted when a failure is recorded: who dies does not count.
    CountsAtFailure,
    /// A takeover is no crash.
    ForgetsCrashes,
    /// A forgotten event starts at fence 1 again.
    FencesStartAgain,
    /// Does not know its own tokens.
    RepeatIsHeld,
    /// Drops the record of what is processed.
    ForgetsOnAck,
    /// Drops the record of what is dead-lettered.
    ForgetsDeadLetters,
    /// A delay is over at once.
    IgnoresDelay,
    /// Compares no data.
    IgnoresConflict,
    /// A used token reopens what it led to.
    ReopensProcessed,
    /// Any token reopens any dead letter.
    ReopensAnything,
    /// Knows the token of the last letter only.
    OneLetterReopens,
    /// Compares the data before the token.
    ReopenChecksData,
    /// Grants a doomed event like any other.
    HidesDoom,
    /// Commits the first marks of a transaction, and says that it did all.
    MarksSome,
    /// Leaves out the last item of a batch.
    DropsLastOfBatch,
    /// Renews whoever asks.
    RenewsAnyFence,
    /// Renews to an earlier end.
    ShortensLease,
    /// Says that it renewed.
    RenewsNothing,
    /// Records whoever asks.
    UnfencedRecord,
    /// Does not know what it has written.
    RepeatIsFenced,
    /// Every failure counts.
    CountsUncounted,
    /// Dead-letters what is not doomed.
    DeadLettersAtOnce,
    /// Says that it wrote what had vanished.
    VanishedIsDone,
    /// Does not write what had vanished.
    VanishedIsDropped,
    /// Rows are visible before the commit.
    WritesThrough,
    /// Outcomes are visible before the commit.
    MarksThrough,
    /// A dropped transaction commits.
    CommitsOnDrop,
    /// Commits at once, whatever the marks were answered.
    CommitsWhatIsFenced,
    /// Claims the next event although nothing was committed.
    ClaimsWithoutCommit,
    /// Claims at a commit what has a record.
    ClaimsWhatIsKnown,
    /// Says that it claims at a commit, and does not.
    ClaimsNothing,
}

const STORE: Table<Wrong, WrongRecords> = Table {
    right: Wrong::Nothing,
    wrong: &[
        (Wrong::NumbersAnew, &["a_consumer_keeps_its_number"]),
        (Wrong::OneNumberForAll, &["consumers_do_not_hide_events_from_each_other", "a_consumer_keeps_its_number"]),
        (Wrong::ClaimsInTwoSteps, &["one_of_many_claims_is_granted"]),
        (Wrong::GrantsHeld, &["a_claimed_event_is_held", "one_of_many_claims_is_granted", "a_batch_equals_its_items"]),
        (Wrong::CountsAtFailure, &["an_expired_lease_is_taken_over", "a_batch_equals_its_items"]),
        (Wrong::ForgetsCrashes, &["an_expired_lease_is_taken_over", "a_batch_equals_its_items"]),
        (Wrong::FencesStartAgain, &["fences_grow_over_forgotten_records", "a_batch_equals_its_items"]),
        (Wrong::RepeatIsHeld, &["a_repeated_claim_is_granted_again"]),
        (Wrong::ForgetsOnAck, &["a_processed_event_is_not_granted"]),
        (Wrong::ForgetsDeadLetters, &["a_dead_lettered_event_is_not_granted"]),
        (Wrong::IgnoresDelay, &["a_failed_event_waits_its_time"]),
        (Wrong::IgnoresConflict, &["other_data_is_a_conflict", "a_batch_equals_its_items"]),
        (Wrong::ReopensProcessed, &["a_reopen_token_works_once", "a_wrong_reopen_token_changes_nothing"]),
        (Wrong::ReopensAnything, &["a_wrong_reopen_token_changes_nothing"]),
        (Wrong::OneLetterReopens, &["any_letter_of_a_doomed_event_reopens_it", "a_batch_equals_its_items"]),
        (Wrong::ReopenChecksData, &["a_reopen_takes_other_data"]),
        (Wrong::HidesDoom, &["a_doomed_event_is_granted_as_doomed", "a_batch_equals_its_items"]),
        (Wrong::DropsLastOfBatch, &["a_batch_equals_its_items"]),
        (Wrong::RenewsAnyFence, &["a_lost_lease_is_not_renewed"]),
        (Wrong::ShortensLease, &["renewing_never_shortens"]),
        (Wrong::RenewsNothing, &["a_renewed_lease_holds", "a_batch_equals_its_items"]),
        (Wrong::UnfencedRecord, &["zombie_complete_is_fenced", "zombie_release_is_fenced"]),
        (Wrong::RepeatIsFenced, &["recording_twice_is_already_done"]),
        (Wrong::CountsUncounted, &["an_uncounted_failure_gives_the_attempt_back"]),
        (Wrong::DeadLettersAtOnce, &["a_dead_letter_is_doomed_first"]),
        (Wrong::VanishedIsDone, &["a_vanished_record_is_reported"]),
        (Wrong::VanishedIsDropped, &["a_vanished_record_is_written_anew"]),
    ],
    cases: store::cases,
    fixture: |wrong| WrongRecords(WrongStore::with(wrong)),
};

const TRANSACTIONS: Table<Wrong, WrongTransactions> = Table {
    right: Wrong::Nothing,
    wrong: &[
        (Wrong::WritesThrough, &["effects_and_mark_commit_together", "a_fenced_transaction_leaves_nothing"]),
        (Wrong::MarksThrough, &["effects_and_mark_commit_together", "a_rolled_back_transaction_leaves_nothing"]),
        (Wrong::CommitsOnDrop, &["a_rolled_back_transaction_leaves_nothing", "a_fenced_transaction_leaves_nothing"]),
        (Wrong::UnfencedRecord, &["a_fenced_transaction_leaves_nothing", "many_marks_commit_together"]),
        (Wrong::MarksSome, &["many_marks_commit_together"]),
        (Wrong::CommitsWhatIsFenced, &["recording_and_committing_at_once_is_both", "a_commit_claims_the_next_event"]),
        (Wrong::ClaimsWithoutCommit, &["a_commit_claims_the_next_event"]),
        (Wrong::ClaimsWhatIsKnown, &["a_commit_claims_nothing_that_has_a_record"]),
        (Wrong::ClaimsNothing, &["a_commit_claims_the_next_event"]),
    ],
    cases: transactions::cases,
    fixture: |wrong| WrongTransactions(WrongRecords(WrongStore::with(wrong))),
};

#[test]
fn every_store_case_passes_on_the_right_back_end() {
    STORE.every_case_passes_on_the_right_back_end();
    TRANSACTIONS.every_case_passes_on_the_right_back_end();
}

#[test]
fn every_store_case_fails_on_its_wrong_back_end() {
    STORE.every_case_fails_on_its_wrong_back_end();
}

#[test]
fn every_transactional_case_fails_on_its_wrong_back_end() {
    TRANSACTIONS.every_case_fails_on_its_wrong_back_end();
}

#[derive(Clone)]
pub(crate) struct WrongStore {
    wrong: Wrong,
    start: Instant,
    table: Arc<Mutex<Kept>>,
}

#[derive(Default)]
struct Kept {
    ticks: u64,
    consumers: BTreeMap<String, u32>,
    slots: BTreeMap<EventKey, Option<Record>>,
    rows: Vec<String>,
}

impl WrongStore {
    fn with(wrong: Wrong) -> Self {
        Self { wrong, start: Instant::now(), table: Arc::default() }
    }

    fn table(&self) -> MutexGuard<'_, Kept> {
        self.table.lock().expect("nobody panics while holding the table")
    }

    /// Never the same instant twice, so that fences grow although the clock is paused.
    fn now(&self, table: &mut Kept) -> Moment {
        table.ticks += 1;
        Moment(1 << 40).after(self.start.elapsed()).after(Duration::from_micros(table.ticks))
    }

    fn claim_one(&self, slot: &mut Option<Record>, request: &ClaimRequest, lease: Duration, now: Moment) -> Claim {
        let mut request = *request;
        if self.wrong == Wrong::FencesStartAgain && slot.is_none() {
            let claim = record::claim(slot, &request, lease, now);
            let Claim::Granted(lease, history) = claim else { return claim };
            if let Some(record) = slot {
                record.fence = NonZeroU64::MIN;
            }
            return Claim::Granted(Lease { fence: NonZeroU64::MIN, ..lease }, history);
        }
        if let Some(record) = slot {
            let dead = matches!(record.state, State::DeadLettered { .. });
            match self.wrong {
                Wrong::GrantsHeld => {
                    if let State::Claimed { until } = &mut record.state {
                        *until = now;
                    }
                }
                Wrong::RepeatIsHeld => request.token = !request.token,
                Wrong::IgnoresConflict => request.fingerprint = record.fingerprint,
                Wrong::ReopensProcessed if request.reopen.is_some() => {
                    if let State::Processed { at } = record.state {
                        record.state =
                            State::DeadLettered { at, reason: hapax::Reason::Permanent, since: record.fence };
                        request.reopen = Some(record.fence);
                    }
                }
                Wrong::ReopensAnything if request.reopen.is_some() && dead => request.reopen = Some(record.fence),
                Wrong::OneLetterReopens => {
                    if let State::Doomed { since, .. } | State::DeadLettered { since, .. } = &mut record.state {
                        *since = record.fence;
                    }
                }
                Wrong::ReopenChecksData if !record.fingerprint.agrees(request.fingerprint) => return Claim::Conflict,
                _ => {}
            }
        }
        let before = slot.as_ref().map(|record| (record.attempt, record.crashes));
        let mut claim = record::claim(slot, &request, lease, now);
        if let (Claim::Granted(lease, Some(history)), Some(record), Some(before)) = (&mut claim, slot, before) {
            match self.wrong {
                Wrong::CountsAtFailure if record.crashes > before.1 => {
                    (record.attempt, lease.attempt) = (before.0, before.0);
                }
                Wrong::ForgetsCrashes => (record.crashes, history.crashes) = (0, 0),
                Wrong::HidesDoom => history.doomed = None,
                _ => {}
            }
        }
        claim
    }

    fn record_one(&self, slot: &mut Option<Record>, lease: &Lease, outcome: &Outcome, now: Moment) -> Recorded {
        let (mut lease, mut outcome) = (*lease, outcome.clone());
        if let Some(record) = slot {
            if self.wrong == Wrong::UnfencedRecord {
                lease.fence = record.fence;
            }
            if let (Wrong::DeadLettersAtOnce, Outcome::DeadLettered, State::Claimed { until }) =
                (self.wrong, &outcome, record.state)
            {
                record.state = State::Doomed { until, reason: hapax::Reason::Permanent, since: record.fence };
            }
        }
        match (&mut outcome, self.wrong) {
            (Outcome::Failed { after, .. }, Wrong::IgnoresDelay) => *after = Duration::ZERO,
            (Outcome::Failed { counted, .. }, Wrong::CountsUncounted) => *counted = true,
            _ => {}
        }
        let vanished = slot.is_none();
        let answer = record::record(slot, &lease, &outcome, now);
        match self.wrong {
            Wrong::ForgetsOnAck if matches!(slot, Some(Record { state: State::Processed { .. }, .. })) => *slot = None,
            Wrong::ForgetsDeadLetters if matches!(slot, Some(Record { state: State::DeadLettered { .. }, .. })) => {
                *slot = None;
            }
            Wrong::RepeatIsFenced if answer == Recorded::AlreadyDone => return Recorded::Fenced,
            Wrong::VanishedIsDone if vanished => return Recorded::Done,
            Wrong::VanishedIsDropped if vanished => *slot = None,
            _ => {}
        }
        answer
    }

    fn record_all(&self, table: &mut Kept, batch: &[(Lease, Outcome)]) -> Vec<Recorded> {
        let now = self.now(table);
        let record = |(n, (lease, outcome)): (usize, &(Lease, Outcome))| {
            let mut slot = table.slots.get(&lease.key).cloned().flatten();
            let answer = self.record_one(&mut slot, lease, outcome, now);
            if self.wrong != Wrong::DropsLastOfBatch || n + 1 < batch.len() || n == 0 {
                table.slots.insert(lease.key, slot);
            }
            answer
        };
        batch.iter().enumerate().map(record).collect()
    }
}

#[async_trait]
impl ProcessedStore for WrongStore {
    async fn open(&self, consumer: &str, _: Duration) -> Result<ConsumerId> {
        let mut table = self.table();
        let name = match self.wrong {
            Wrong::NumbersAnew => format!("{consumer} {}", table.consumers.len()),
            Wrong::OneNumberForAll => String::new(),
            _ => consumer.to_owned(),
        };
        let next = u32::try_from(table.consumers.len()).expect("few consumers");
        Ok(ConsumerId(*table.consumers.entry(name).or_insert(next)))
    }

    async fn claim(&self, batch: &[ClaimRequest], lease: Duration) -> Result<Vec<Claim>> {
        let mut answers = Vec::new();
        for request in batch {
            let mut slot = self.table().slots.get(&request.key).cloned().flatten();
            if self.wrong == Wrong::ClaimsInTwoSteps {
                tokio::task::yield_now().await;
            }
            let mut table = self.table();
            let now = self.now(&mut table);
            answers.push(self.claim_one(&mut slot, request, lease, now));
            table.slots.insert(request.key, slot);
        }
        Ok(answers)
    }

    async fn renew(&self, leases: &[Lease], lease: Duration) -> Result<Vec<Renewal>> {
        let mut table = self.table();
        let now = self.now(&mut table);
        let renew = |held: &Lease| {
            let slot = table.slots.entry(held.key).or_default();
            let mut held = *held;
            match (self.wrong, &mut *slot) {
                (Wrong::RenewsNothing, _) => {
                    return record::renew(&mut slot.clone(), &held, lease, now);
                }
                (Wrong::RenewsAnyFence, Some(record)) => held.fence = record.fence,
                (Wrong::ShortensLease, Some(record)) if record.fence == held.fence => {
                    if let State::Claimed { until } = &mut record.state {
                        *until = now;
                    }
                }
                _ => {}
            }
            record::renew(slot, &held, lease, now)
        };
        Ok(leases.iter().map(renew).collect())
    }

    async fn record(&self, batch: &[(Lease, Outcome)]) -> Result<Vec<Recorded>> {
        let mut table = self.table();
        Ok(self.record_all(&mut table, batch))
    }

    async fn probe(&self) -> Result<StoreHealth> {
        let mut health = StoreHealth::new("wrong", "0", Durability::Process);
        health.claims_at_commit = true;
        Ok(health)
    }
}

#[async_trait]
impl StoreAdmin for WrongStore {
    async fn look_up(&self, _: &str, key: EventKey) -> Result<Option<RecordView>> {
        let table = self.table();
        let view = |record: &Record| {
            let Record { fence, attempt, crashes, .. } = *record;
            RecordView::new(key, record.status(), fence.get(), attempt, crashes, Duration::ZERO)
        };
        Ok(table.slots.get(&key).and_then(Option::as_ref).map(view))
    }

    async fn list(&self, _: &str, _: Status, _: usize) -> Result<Vec<RecordView>> {
        Ok(Vec::new())
    }

    async fn sweep(&self, _: usize) -> Result<Swept> {
        Ok(Swept::default())
    }

    async fn forget(&self, _: &str, key: EventKey) -> Result<bool> {
        Ok(self.table().slots.insert(key, None).flatten().is_some())
    }
}

/// Rows on their way to a commit.
pub(crate) struct Tx {
    through: Option<WrongStore>,
    rows: Vec<String>,
    back: Option<oneshot::Sender<Vec<String>>>,
}

impl Drop for Tx {
    fn drop(&mut self) {
        if let Some(back) = self.back.take() {
            // Nobody waits for it any more: rolled back.
            let _ = back.send(std::mem::take(&mut self.rows));
        }
    }
}

pub(crate) struct Lent {
    store: WrongStore,
    back: oneshot::Receiver<Vec<String>>,
    rows: Vec<String>,
    marks: Vec<(Lease, Outcome)>,
}

impl Lent {
    fn take_rows(&mut self) {
        if let Ok(rows) = self.back.try_recv() {
            self.rows.extend(rows);
        }
    }

    fn apply(&mut self) {
        let store = self.store.clone();
        let mut table = store.table();
        table.rows.append(&mut self.rows);
        store.record_all(&mut table, &std::mem::take(&mut self.marks));
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.take_rows();
        if self.store.wrong == Wrong::CommitsOnDrop {
            self.apply();
        }
    }
}

#[async_trait]
impl TransactionalStore for WrongStore {
    type Tx = Tx;
    type Lent = Lent;

    async fn begin(&self) -> Result<(Tx, Lent)> {
        let (send, back) = oneshot::channel();
        let through = (self.wrong == Wrong::WritesThrough).then(|| self.clone());
        let tx = Tx { through, rows: Vec::new(), back: Some(send) };
        Ok((tx, Lent { store: self.clone(), back, rows: Vec::new(), marks: Vec::new() }))
    }

    async fn record_in(&self, lent: &mut Lent, batch: &[(Lease, Outcome)]) -> Result<Vec<Recorded>> {
        if let Ok(rows) = (&mut lent.back).await {
            lent.rows.extend(rows);
        }
        let mut table = self.table();
        if self.wrong == Wrong::MarksThrough {
            return Ok(self.record_all(&mut table, batch));
        }
        let before = table.slots.clone();
        let answers = self.record_all(&mut table, batch);
        table.slots = before;
        let kept = if self.wrong == Wrong::MarksSome { batch.len().min(64) } else { batch.len() };
        lent.marks.extend_from_slice(&batch[..kept]);
        Ok(answers)
    }

    async fn commit(&self, mut lent: Lent) -> Result<()> {
        lent.take_rows();
        lent.apply();
        Ok(())
    }

    async fn record_and_commit(&self, mut lent: Lent, batch: &[(Lease, Outcome)]) -> Result<Vec<Recorded>> {
        let answers = self.record_in(&mut lent, batch).await?;
        let may_commit = |answer: &Recorded| matches!(answer, Recorded::Done | Recorded::Vanished);
        let is_whole = answers.len() == batch.len() && answers.iter().all(may_commit);
        if self.wrong == Wrong::CommitsWhatIsFenced || is_whole {
            self.commit(lent).await?;
        }
        Ok(answers)
    }

    async fn commit_and_claim(
        &self,
        lent: Lent,
        batch: &[(Lease, Outcome)],
        next: &ClaimRequest,
        lease: Duration,
    ) -> Result<(Vec<Recorded>, Option<Lease>)> {
        let answers = self.record_and_commit(lent, batch).await?;
        let is_committed = answers.iter().all(|answer| matches!(answer, Recorded::Done | Recorded::Vanished));
        let is_known = self.table().slots.get(&next.key).is_some_and(Option::is_some);
        let claims = match self.wrong {
            Wrong::ClaimsWithoutCommit => !is_known,
            Wrong::ClaimsWhatIsKnown => is_committed,
            Wrong::ClaimsNothing => false,
            _ => is_committed && !is_known,
        };
        let claim = if claims { self.claim(&[*next], lease).await?.pop() } else { None };
        Ok((answers, claim.and_then(|claim| if let Claim::Granted(lease, _) = claim { Some(lease) } else { None })))
    }
}

pub(crate) struct WrongRecords(WrongStore);

#[async_trait]
impl StoreFixture for WrongRecords {
    const CLOCK: Clock = super::CLOCK;
    const UNIT: Duration = super::UNIT;

    async fn store(&self) -> Arc<dyn ProcessedStore> {
        Arc::new(self.0.clone())
    }

    async fn again(&self) -> Arc<dyn ProcessedStore> {
        Arc::new(self.0.clone())
    }

    async fn admin(&self) -> Arc<dyn StoreAdmin> {
        Arc::new(self.0.clone())
    }
}

pub(crate) struct WrongTransactions(WrongRecords);

#[async_trait]
impl StoreFixture for WrongTransactions {
    const CLOCK: Clock = super::CLOCK;
    const UNIT: Duration = super::UNIT;

    async fn store(&self) -> Arc<dyn ProcessedStore> {
        self.0.store().await
    }

    async fn again(&self) -> Arc<dyn ProcessedStore> {
        self.0.again().await
    }

    async fn admin(&self) -> Arc<dyn StoreAdmin> {
        self.0.admin().await
    }
}

#[async_trait]
impl TransactionalFixture for WrongTransactions {
    type Store = WrongStore;

    async fn transactional(&self) -> WrongStore {
        self.0.0.clone()
    }

    async fn write(&self, tx: &mut Tx, row: &str) {
        match &tx.through {
            Some(store) => store.table().rows.push(row.to_owned()),
            None => tx.rows.push(row.to_owned()),
        }
    }

    async fn rows(&self) -> Vec<String> {
        let mut rows = self.0.0.table().rows.clone();
        rows.sort();
        rows
    }
}
