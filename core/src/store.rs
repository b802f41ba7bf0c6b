//! The store's contract: claim an event, renew the lease, record the outcome.
//!
//! [`record`](crate::record) is the same contract as a pure function: the specification that every store is checked
//! against. Time is the store's own clock; durations leave it, instants never do.

use std::fmt;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::broker::Durability;
use crate::dead_letter::Reason;
use crate::error::{Error, ErrorKind, Result};

/// Remembers what was done. Every method can be called from several tasks and processes at once and can be repeated:
/// a call whose answer was lost is sent again as it was.
///
/// Batches are answered one by one and in order; a batch never holds one key twice. An error refuses the batch as a
/// whole and has changed nothing, unless it is [`ErrorKind::Unknown`](crate::ErrorKind::Unknown) or
/// [`ErrorKind::Unavailable`](crate::ErrorKind::Unavailable), where it may have taken place;
/// [`ErrorKind::Rejected`](crate::ErrorKind::Rejected) says that some item's own data is bad, and the caller halves the
/// batch until it stands alone, to be dead-lettered; what is wrong with the store itself (a consumer number it does not
/// know) is [`ErrorKind::Incompatible`](crate::ErrorKind::Incompatible) and stops the consumer.
#[async_trait]
pub trait ProcessedStore: Send + Sync + 'static {
    /// Registers a consumer and how long its terminal records are kept.
    ///
    /// # Contract
    /// - The same name has the same number, for ever and in every process (`a_consumer_keeps_its_number`); other names
    ///   have others (`consumers_do_not_hide_events_from_each_other`).
    async fn open(&self, consumer: &str, retention: Duration) -> Result<ConsumerId>;

    /// Asks for events. `lease` is how long a grant lasts unless it is renewed.
    ///
    /// # Contract
    /// - Atomic for each key: of any number of claims at once one is granted (`one_of_many_claims_is_granted`).
    /// - A granted event is held until its lease ends (`a_claimed_event_is_held`), then granted with a higher fence, the
    ///   next attempt and one crash more (`an_expired_lease_is_taken_over`).
    /// - Fences of a key only grow, even over a record that was forgotten (`fences_grow_over_forgotten_records`).
    /// - A repeated token is granted the same fence (`a_repeated_claim_is_granted_again`).
    /// - Processed and dead-lettered events are not granted (`a_processed_event_is_not_granted`,
    ///   `a_dead_lettered_event_is_not_granted`); what failed is not granted before its time
    ///   (`a_failed_event_waits_its_time`).
    /// - Other data under a known key is a conflict and changes nothing (`other_data_is_a_conflict`).
    /// - A dead letter's own token reopens it once, with the same or other data (`a_reopen_token_works_once`,
    ///   `a_reopen_takes_other_data`, `a_wrong_reopen_token_changes_nothing`). Where holders of a doomed event died and were
    ///   followed, each may have placed a dead letter: any of their tokens reopens it, once in all
    ///   (`any_letter_of_a_doomed_event_reopens_it`).
    /// - A doomed event is held while its lease lives and then granted as doomed (`a_doomed_event_is_granted_as_doomed`).
    /// - The answer to a batch is that of its items one by one (`a_batch_equals_its_items`).
    async fn claim(&self, batch: &[ClaimRequest], lease: Duration) -> Result<Vec<Claim>>;

    /// Extends leases to `lease` from now.
    ///
    /// # Contract
    /// - Only for the fence that holds the event (`a_lost_lease_is_not_renewed`), never shortens
    ///   (`renewing_never_shortens`), keeps others out (`a_renewed_lease_holds`).
    async fn renew(&self, leases: &[Lease], lease: Duration) -> Result<Vec<Renewal>>;

    /// Ends leases with their outcomes, durably before it returns.
    ///
    /// # Contract
    /// - Compare-and-set on the fence: a holder that was overtaken changes nothing (`zombie_complete_is_fenced`,
    ///   `zombie_release_is_fenced`).
    /// - Repeating answers [`Recorded::AlreadyDone`] (`recording_twice_is_already_done`).
    /// - An uncounted failure gives its attempt back (`an_uncounted_failure_gives_the_attempt_back`).
    /// - [`Outcome::DeadLettered`] follows [`Outcome::Doomed`] only (`a_dead_letter_is_doomed_first`).
    /// - A record that has vanished is said to have (`a_vanished_record_is_reported`), and what was processed is
    ///   remembered all the same (`a_vanished_record_is_written_anew`).
    async fn record(&self, batch: &[(Lease, Outcome)]) -> Result<Vec<Recorded>>;

    /// What this store, as configured, can promise, and that it answers.
    async fn probe(&self) -> Result<StoreHealth>;
}

#[async_trait]
impl<T: ProcessedStore + ?Sized> ProcessedStore for Arc<T> {
    async fn open(&self, consumer: &str, retention: Duration) -> Result<ConsumerId> {
        (**self).open(consumer, retention).await
    }
    async fn claim(&self, batch: &[ClaimRequest], lease: Duration) -> Result<Vec<Claim>> {
        (**self).claim(batch, lease).await
    }
    async fn renew(&self, leases: &[Lease], lease: Duration) -> Result<Vec<Renewal>> {
        (**self).renew(leases, lease).await
    }
    async fn record(&self, batch: &[(Lease, Outcome)]) -> Result<Vec<Recorded>> {
        (**self).record(batch).await
    }
    async fn probe(&self) -> Result<StoreHealth> {
        (**self).probe().await
    }
}

/// A store whose database the handler writes to as well: effects and the processed mark commit together.
#[async_trait]
pub trait TransactionalStore: ProcessedStore + Clone {
    /// What the handler gets: derefs to the client's connection, goes back on drop.
    type Tx: Send + 'static;
    /// Where the transaction comes back when the handler drops it.
    type Lent: Send + 'static;

    /// Begins a transaction. Answers in bounded time, though it may wait for another to end.
    async fn begin(&self) -> Result<(Self::Tx, Self::Lent)>;

    /// Waits until the handler gave the transaction back, and records in it. Dropping `lent` instead rolls back.
    /// [`ErrorKind::Rejected`](crate::ErrorKind::Rejected) where the handler ended, broke or kept it: the handler's failure.
    /// [`Recorded::AlreadyDone`] is no success here: another transaction of this lease committed, and this one must not.
    ///
    /// # Contract
    /// - Nothing is visible before [`commit`](Self::commit) (`effects_and_mark_commit_together`,
    ///   `a_rolled_back_transaction_leaves_nothing`).
    /// - Answers as [`ProcessedStore::record`]; a fenced holder's effects are rolled back by the caller
    ///   (`a_fenced_transaction_leaves_nothing`).
    /// - Takes the marks of a whole batch, and answers for each (`many_marks_commit_together`).
    async fn record_in(&self, lent: &mut Self::Lent, batch: &[(Lease, Outcome)]) -> Result<Vec<Recorded>>;

    /// Commits. [`ErrorKind::Unknown`](crate::ErrorKind::Unknown) where the answer was lost.
    async fn commit(&self, lent: Self::Lent) -> Result<()>;

    /// [`record_in`](Self::record_in) and [`commit`](Self::commit) of a transaction in which nothing was recorded yet, at
    /// once: for stores that can save a round trip. Commits only where each item is answered with [`Recorded::Done`] or
    /// [`Recorded::Vanished`]; otherwise everything is rolled back.
    ///
    /// # Contract
    /// - After [`ErrorKind::Unknown`](crate::ErrorKind::Unknown) it may have been committed; after any other error it was not.
    /// - The same answers and effects as the two calls, one for each item before anything is committed
    ///   (`recording_and_committing_at_once_is_both`).
    async fn record_and_commit(&self, mut lent: Self::Lent, batch: &[(Lease, Outcome)]) -> Result<Vec<Recorded>> {
        let answers = self.record_in(&mut lent, batch).await?;
        if answers.len() != batch.len() {
            return Err(Error::new(ErrorKind::Internal, "record").because("the store did not answer for each"));
        }
        if answers.iter().all(|answer| matches!(answer, Recorded::Done | Recorded::Vanished)) {
            self.commit(lent).await.map_err(|error| match error.kind() {
                ErrorKind::Rejected | ErrorKind::Unknown => error,
                _ => Error::new(ErrorKind::Unknown, "commit").because(error.to_string()).with_source(error),
            })?;
        }
        Ok(answers)
    }

    /// [`record_and_commit`](Self::record_and_commit), and with it the claim of the event that runs next: for stores that can
    /// write both in one transaction, and say so by [`StoreHealth::claims_at_commit`]. Without a lease in the answer it was
    /// not claimed, for whatever reason, and is asked for by [`claim`](ProcessedStore::claim).
    ///
    /// # Contract
    /// - Grants only an event without a record, and only where it commits, as [`claim`](ProcessedStore::claim) would
    ///   (`a_commit_claims_the_next_event`).
    /// - What has a record stays as it is, and the commit takes place (`a_commit_claims_nothing_that_has_a_record`).
    /// - After any error, or where this is dropped, the claim may have been made: it is asked for again with its token.
    async fn commit_and_claim(
        &self,
        lent: Self::Lent,
        batch: &[(Lease, Outcome)],
        _next: &ClaimRequest,
        _lease: Duration,
    ) -> Result<(Vec<Recorded>, Option<Lease>)> {
        Ok((self.record_and_commit(lent, batch).await?, None))
    }
}

/// Looking into a store and tidying it: for operators, not for the runtime.
#[async_trait]
pub trait StoreAdmin: Send + Sync + 'static {
    /// The record of one event, if there is one.
    async fn look_up(&self, consumer: &str, key: EventKey) -> Result<Option<RecordView>>;

    /// Records in `status`, oldest first, at most `limit`.
    async fn list(&self, consumer: &str, status: Status, limit: usize) -> Result<Vec<RecordView>>;

    /// Removes at most `limit` terminal records that are older than their consumer's retention.
    async fn sweep(&self, limit: usize) -> Result<Swept>;

    /// Forgets one event, so that it can run again; the fence goes on growing. Answers whether there was a record.
    async fn forget(&self, consumer: &str, key: EventKey) -> Result<bool>;
}

/// A consumer's number in one store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConsumerId(pub u32);

/// 128 bits that identify an event for one consumer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EventKey(pub [u8; 16]);

impl EventKey {
    /// BLAKE3 over consumer, source and id, each with its length before it. `source` is empty for extracted ids.
    ///
    /// ```
    /// use hapax::EventKey;
    /// assert_ne!(EventKey::of("billing", "ab", "c"), EventKey::of("billing", "a", "bc"));
    /// ```
    pub fn of(consumer: &str, source: &str, id: &str) -> Self {
        Self(digest(b"hapax event key 1", &[consumer.as_bytes(), source.as_bytes(), id.as_bytes()]))
    }

    /// 32 hexadecimal characters, the same on every attempt and after a redrive.
    pub fn to_hex(self) -> String {
        hex(self.0)
    }

    /// The key for one step of a handler: stable like the key, different for each step.
    pub(crate) fn step(self, step: &str) -> String {
        hex(digest(b"hapax step key 1", &[&self.0, step.as_bytes()]))
    }
}

impl fmt::Debug for EventKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_hex())
    }
}

/// 128 bits of data and content type: tells a duplicate from another message under the same id.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub [u8; 16]);

impl Fingerprint {
    /// Matches every fingerprint: of a record that was written anew after it had vanished.
    pub const ANY: Self = Self([0; 16]);

    /// BLAKE3 over content type and data, each with its length before it. Raw bytes, never re-encoded.
    pub fn of(content_type: Option<&str>, data: &[u8]) -> Self {
        Self(digest(b"hapax fingerprint 1", &[content_type.unwrap_or_default().as_bytes(), data]))
    }

    /// Whether both may belong to one event.
    pub fn agrees(self, other: Self) -> bool {
        self == other || self == Self::ANY || other == Self::ANY
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(self.0))
    }
}

/// The first 128 bits of BLAKE3 over a domain and length-prefixed parts.
pub(crate) fn digest(domain: &[u8], parts: &[&[u8]]) -> [u8; 16] {
    let lengths = parts.iter().map(|part| 8 + part.len());
    let hash = if domain.len() + lengths.sum::<usize>() <= DIGESTED_AT_ONCE {
        // Most events are small, and one call is cheaper than one for each part.
        let (mut bytes, mut end) = ([0; DIGESTED_AT_ONCE], 0);
        let mut add = |part: &[u8]| {
            bytes[end..end + part.len()].copy_from_slice(part);
            end += part.len();
        };
        add(domain);
        for part in parts {
            add(&(part.len() as u64).to_le_bytes());
            add(part);
        }
        blake3::hash(&bytes[..end])
    } else {
        let mut hasher = blake3::Hasher::new();
        hasher.update(domain);
        for part in parts {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        hasher.finalize()
    };
    let mut first = [0; 16];
    first.copy_from_slice(&hash.as_bytes()[..16]);
    first
}

/// Up to so many bytes are put together before they are digested.
const DIGESTED_AT_ONCE: usize = 512;

pub(crate) fn hex(bytes: [u8; 16]) -> String {
    format!("{:032x}", u128::from_be_bytes(bytes))
}

/// Asks for one event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClaimRequest {
    /// Whose records.
    pub consumer: ConsumerId,
    /// Which event.
    pub key: EventKey,
    /// Its data.
    pub fingerprint: Fingerprint,
    /// Minted for each delivery and try; a repeat bears the same.
    pub token: u128,
    /// The token of a dead letter that was sent back.
    pub reopen: Option<NonZeroU64>,
}

/// A granted claim. Every write of its holder bears the fence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Lease {
    /// Whose record.
    pub consumer: ConsumerId,
    /// Which event.
    pub key: EventKey,
    /// Grows with every grant of this key; below 2^53.
    pub fence: NonZeroU64,
    /// Which attempt it is, from 1.
    pub attempt: u32,
}

/// The answer to a claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Claim {
    /// Yours until the lease ends. The history is there from the second claim on.
    Granted(Lease, Option<Box<History>>),
    /// Was processed: a duplicate.
    Processed {
        /// How long ago.
        ago: Duration,
    },
    /// Was dead-lettered: a duplicate of a dead letter.
    DeadLettered {
        /// How long ago.
        ago: Duration,
    },
    /// Another holds it.
    Held {
        /// At most so long, unless the lease is renewed.
        wait: Duration,
    },
    /// It failed, and its next attempt is not due.
    NotYet {
        /// So long.
        wait: Duration,
    },
    /// The id is known with other data.
    Conflict,
}

/// What happened to an event before this claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct History {
    /// Claims that ended without an outcome.
    pub crashes: u32,
    /// How long ago its first claim was.
    pub first: Duration,
    /// The last trouble.
    pub trouble: Trouble,
    /// The reason for which it is to be dead-lettered, if that is decided already.
    pub doomed: Option<Reason>,
}

/// What went wrong, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trouble {
    /// The event's id as text.
    pub id: Box<str>,
    /// The error, cut and redacted.
    pub error: Box<str>,
}

/// How a lease ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The effect took place.
    Processed,
    /// It did not; try again.
    Failed {
        /// Not before this long from now.
        after: Duration,
        /// Whether it uses up an attempt.
        counted: bool,
        /// Why.
        trouble: Trouble,
    },
    /// It never will: a dead letter is about to be placed. Keeps the lease.
    Doomed {
        /// Why it is set aside.
        reason: Reason,
        /// The last error.
        trouble: Trouble,
    },
    /// The dead letter is placed. Follows `Doomed`.
    DeadLettered,
}

/// The answer to a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Recorded {
    /// Written now.
    Done,
    /// This holder had written it before.
    AlreadyDone,
    /// There was no record any more; a terminal outcome was written anew.
    Vanished,
    /// Another holds the event, or held it since: nothing was written.
    Fenced,
}

/// The answer to a renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Renewal {
    /// The lease lasts from now.
    Renewed,
    /// It is another's, or ended.
    Lost,
}

/// What a store, as configured, can promise.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct StoreHealth {
    /// Its name, for people: `memory`, `sqlite`.
    pub name: &'static str,
    /// The server's or library's version.
    pub version: Box<str>,
    /// How safely it keeps what it acknowledged.
    pub durability: Durability,
    /// Whether it may drop records to make room (an eviction policy).
    pub evicts: bool,
    /// Whether it may lose acknowledged records when a replica takes over.
    pub loses_on_failover: bool,
    /// How many transactions can be open at once; `Some(1)` where a transaction blocks every other write.
    pub transactions_max: Option<usize>,
    /// Whether an open transaction blocks claims, renewals and records of others.
    pub transactions_block_writes: bool,
    /// Whether the commit of a transaction can claim the event that runs next, by [`TransactionalStore::commit_and_claim`].
    pub claims_at_commit: bool,
    /// Records kept now, where that is cheap to know.
    pub records: Option<u64>,
    /// Most records it will keep; it refuses more.
    pub records_max: Option<u64>,
    /// What is wrong although it answers, for people: a sweep that fails, so that records outlive their retention.
    pub trouble: Option<Box<str>>,
}

impl StoreHealth {
    /// A store of which nothing is known but how safe it is: set what holds.
    pub fn new(name: &'static str, version: impl Into<Box<str>>, durability: Durability) -> Self {
        Self {
            name,
            version: version.into(),
            durability,
            evicts: false,
            loses_on_failover: false,
            transactions_max: None,
            transactions_block_writes: false,
            claims_at_commit: false,
            records: None,
            records_max: None,
            trouble: None,
        }
    }
}

/// Where a record stands, for [`StoreAdmin`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// Held by a lease, which may have ended.
    Claimed,
    /// Failed, waiting for its next attempt.
    Waiting,
    /// To be dead-lettered.
    Doomed,
    /// Done.
    Processed,
    /// Set aside.
    DeadLettered,
}

/// One record as an operator sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RecordView {
    /// Which event.
    pub key: EventKey,
    /// Where it stands.
    pub status: Status,
    /// The last fence.
    pub fence: u64,
    /// Attempts so far.
    pub attempt: u32,
    /// Claims that ended without an outcome.
    pub crashes: u32,
    /// How long ago it entered this status, or until when it waits or is held (0 if over).
    pub since: Duration,
    /// The last trouble, if there was one.
    pub trouble: Option<Trouble>,
    /// Why it is doomed or was set aside.
    pub reason: Option<Reason>,
}

impl RecordView {
    /// A view without trouble or reason: set what is known.
    pub fn new(key: EventKey, status: Status, fence: u64, attempt: u32, crashes: u32, since: Duration) -> Self {
        Self { key, status, fence, attempt, crashes, since, trouble: None, reason: None }
    }
}

/// What a sweep did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Records removed.
    pub removed: u64,
    /// Whether more are due.
    pub more: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Computed with another implementation of BLAKE3: records and callees keep them, so they never change.
    #[test]
    fn keys_and_fingerprints_are_what_stores_and_callees_have_kept() {
        let key = EventKey::of("billing", "/shop", "1");
        assert_eq!(key.to_hex(), "ade411263761033a1cf179541d522f5c");
        assert_eq!(key.step("charge"), "e11eb773b409fe0643fc7543fd42f9fa");
        let small = Fingerprint::of(Some("application/json"), br#"{"cents":5}"#);
        assert_eq!(hex(small.0), "ffbf2a59593af6eaad88ecb1fffc4c86");
        let large = Fingerprint::of(Some("application/json"), &[b'x'; 5_000]);
        assert_eq!(hex(large.0), "7097745ad69b4b48ee6fb67ac1ed1ab9");
        let derived = digest(b"hapax derived id 1", &[&key.0, b"com.shop.charged", b"first"]);
        assert_eq!(hex(derived), "92304b0f9e1a160bdd1618c35d888fff");
    }

    #[test]
    fn what_is_put_together_is_digested_as_part_for_part() {
        let parts = |length| [vec![b'a'; 7], vec![b'b'; length]];
        let at_once = |parts: &[Vec<u8>; 2]| digest(b"d", &[&parts[0], &parts[1]]);
        for length in [0, 1, 488, 489, 490, 600] {
            let parts = parts(length);
            let mut hasher = blake3::Hasher::new();
            hasher.update(b"d");
            for part in &parts {
                hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
            }
            assert_eq!(at_once(&parts), hasher.finalize().as_bytes()[..16], "{length}");
        }
    }

    /// Answers for no item, and counts commits.
    #[derive(Clone, Default)]
    struct Silent(Arc<std::sync::atomic::AtomicUsize>);

    #[async_trait]
    impl ProcessedStore for Silent {
        async fn open(&self, _: &str, _: Duration) -> Result<ConsumerId> {
            Ok(ConsumerId(1))
        }
        async fn claim(&self, _: &[ClaimRequest], _: Duration) -> Result<Vec<Claim>> {
            Ok(Vec::new())
        }
        async fn renew(&self, _: &[Lease], _: Duration) -> Result<Vec<Renewal>> {
            Ok(Vec::new())
        }
        async fn record(&self, _: &[(Lease, Outcome)]) -> Result<Vec<Recorded>> {
            Ok(Vec::new())
        }
        async fn probe(&self) -> Result<StoreHealth> {
            Ok(StoreHealth::new("silent", "1", Durability::Durable))
        }
    }

    #[async_trait]
    impl TransactionalStore for Silent {
        type Tx = ();
        type Lent = ();
        async fn begin(&self) -> Result<((), ())> {
            Ok(((), ()))
        }
        async fn record_in(&self, (): &mut (), batch: &[(Lease, Outcome)]) -> Result<Vec<Recorded>> {
            self.record(batch).await
        }
        async fn commit(&self, (): ()) -> Result<()> {
            self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            Ok(())
        }
    }

    /// An effect without a mark would take place again.
    #[tokio::test]
    async fn nothing_is_committed_that_the_store_did_not_answer_for() {
        let store = Silent::default();
        let key = EventKey::of("billing", "shop", "1");
        let lease = Lease { consumer: ConsumerId(1), key, fence: NonZeroU64::MIN, attempt: 1 };
        let refused = store.record_and_commit((), &[(lease, Outcome::Processed)]).await.expect_err("it did not answer");
        assert_eq!(refused.kind(), ErrorKind::Internal);
        assert_eq!(store.0.load(std::sync::atomic::Ordering::Relaxed), 0, "commits");
    }
}
