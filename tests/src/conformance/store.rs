//! The store suite: one case for each clause on `hapax::ProcessedStore`.
//!
//! Adding a case: one function here, one line in [`store_cases!`](crate::store_cases), its name in the clause.

mod claiming;
mod recording;
mod reopening;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use hapax::{
    Claim, ClaimRequest, ConsumerId, EventKey, Fingerprint, History, Lease, Outcome, ProcessedStore, Reason, Recorded,
    Renewal, StoreAdmin, Trouble,
};

use super::Clock;
pub use super::history::a_batch_equals_its_items;
pub use claiming::*;
pub use recording::*;
pub use reopening::*;

/// One set of records that nobody else uses.
#[async_trait]
pub trait StoreFixture: Send + Sync + 'static {
    /// The clock it lives by.
    const CLOCK: Clock;

    /// A time that is long against one call: leases and delays are a few of it. A paused clock takes any; a real one
    /// wants it as short as the back end's steadiness allows.
    const UNIT: Duration;

    /// The store.
    async fn store(&self) -> Arc<dyn ProcessedStore>;

    /// A second handle on the same records, as another process would have it; where there can be none, the first.
    async fn again(&self) -> Arc<dyn ProcessedStore>;

    /// The operator's view of the same records.
    async fn admin(&self) -> Arc<dyn StoreAdmin>;

    /// Lets the store's clock pass.
    async fn pass(&self, how_long: Duration) {
        tokio::time::sleep(how_long).await;
    }
}

/// The list of cases, in the order of the contract; hands it to another macro.
#[doc(hidden)]
#[macro_export]
macro_rules! store_cases {
    ($then:ident $($with:tt)*) => {
        $crate::$then! { $($with)*
            a_consumer_keeps_its_number
            consumers_do_not_hide_events_from_each_other
            one_of_many_claims_is_granted
            a_claimed_event_is_held
            an_expired_lease_is_taken_over
            fences_grow_over_forgotten_records
            a_repeated_claim_is_granted_again
            a_processed_event_is_not_granted
            a_dead_lettered_event_is_not_granted
            a_failed_event_waits_its_time
            other_data_is_a_conflict
            a_reopen_token_works_once
            a_reopen_takes_other_data
            a_wrong_reopen_token_changes_nothing
            any_letter_of_a_doomed_event_reopens_it
            a_doomed_event_is_granted_as_doomed
            a_batch_equals_its_items
            a_lost_lease_is_not_renewed
            renewing_never_shortens
            a_renewed_lease_holds
            zombie_complete_is_fenced
            zombie_release_is_fenced
            recording_twice_is_already_done
            an_uncounted_failure_gives_the_attempt_back
            a_dead_letter_is_doomed_first
            a_vanished_record_is_reported
            a_vanished_record_is_written_anew
        }
    };
}

crate::store_cases! { conformance_list [StoreFixture] }

pub(super) const CONSUMER: &str = "conformance";
pub(super) const RETENTION: Duration = Duration::from_secs(24 * 3600);

/// Tokens already given: each request has its own, over all desks of the process.
static TOKENS: AtomicU64 = AtomicU64::new(1);

/// One consumer's view of a store: requests with tokens of their own, answers one by one.
pub(super) struct Desk {
    pub(super) store: Arc<dyn ProcessedStore>,
    pub(super) consumer: ConsumerId,
    lease: Duration,
}

impl Desk {
    pub(super) async fn at<F: StoreFixture>(fixture: &F) -> Self {
        Self::over::<F>(fixture.store().await).await
    }

    pub(super) async fn over<F: StoreFixture>(store: Arc<dyn ProcessedStore>) -> Self {
        let consumer = store.open(CONSUMER, RETENTION).await.expect("the store opens");
        Self { store, consumer, lease: F::UNIT * 10 }
    }

    /// A claim with a token of its own.
    pub(super) fn request(&self, id: &str) -> ClaimRequest {
        ClaimRequest {
            consumer: self.consumer,
            key: key(id),
            fingerprint: Fingerprint::of(Some("text/plain"), b"data"),
            token: u128::from(TOKENS.fetch_add(1, Ordering::Relaxed)),
            reopen: None,
        }
    }

    pub(super) async fn ask(&self, request: ClaimRequest) -> Claim {
        let mut answers = self.store.claim(&[request], self.lease).await.expect("the store answers a claim");
        assert_eq!(answers.len(), 1, "one answer for each item");
        answers.remove(0)
    }

    pub(super) async fn claim(&self, id: &str) -> Claim {
        self.ask(self.request(id)).await
    }

    pub(super) async fn granted(&self, id: &str) -> Lease {
        granted(self.claim(id).await).0
    }

    pub(super) async fn record(&self, lease: Lease, outcome: Outcome) -> Recorded {
        let answers = self.store.record(&[(lease, outcome)]).await.expect("the store answers a record");
        assert_eq!(answers.len(), 1, "one answer for each item");
        answers[0]
    }

    async fn renew(&self, lease: Lease, how_long: Duration) -> Renewal {
        let answers = self.store.renew(&[lease], how_long).await.expect("the store answers a renewal");
        assert_eq!(answers.len(), 1, "one answer for each item");
        answers[0]
    }

    async fn done(&self, lease: Lease, outcome: Outcome) {
        assert_eq!(self.record(lease, outcome.clone()).await, Recorded::Done, "{outcome:?}");
    }

    /// Claims and dead-letters an event; answers with the lease whose fence reopens it.
    async fn dead_lettered(&self, id: &str) -> Lease {
        let lease = self.granted(id).await;
        self.done(lease, doomed()).await;
        self.done(lease, Outcome::DeadLettered).await;
        lease
    }

    /// Lets a lease end and claims the event anew: the first holder is a zombie now.
    async fn taken_over<F: StoreFixture>(&self, fixture: &F, id: &str) -> (Lease, Lease) {
        let zombie = self.granted(id).await;
        fixture.pass(self.lease + F::UNIT).await;
        (zombie, self.granted(id).await)
    }
}

pub(super) fn key(id: &str) -> EventKey {
    EventKey::of(CONSUMER, "https://conformance.example", id)
}

fn granted(claim: Claim) -> (Lease, Option<Box<History>>) {
    match claim {
        Claim::Granted(lease, history) => (lease, history),
        other => panic!("the claim should be granted, but is {other:?}"),
    }
}

/// Asserts that another holds the event for some time, at most `lease`.
fn assert_held(claim: &Claim, lease: Duration) {
    assert!(matches!(claim, Claim::Held { wait } if *wait > Duration::ZERO && *wait <= lease), "{claim:?}, {lease:?}");
}

fn assert_processed(claim: &Claim) {
    assert!(matches!(claim, Claim::Processed { .. }), "the claim should find it processed, but is {claim:?}");
}

fn assert_dead_lettered(claim: &Claim) {
    assert!(matches!(claim, Claim::DeadLettered { .. }), "the claim should find it dead-lettered, but is {claim:?}");
}

fn trouble() -> Trouble {
    Trouble { id: "order 42".into(), error: "no such customer".into() }
}

pub(super) fn failed(after: Duration, counted: bool) -> Outcome {
    Outcome::Failed { after, counted, trouble: trouble() }
}

pub(super) fn doomed() -> Outcome {
    Outcome::Doomed { reason: Reason::AttemptsExhausted, trouble: trouble() }
}
