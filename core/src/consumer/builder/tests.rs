//! Every check of `build()`, against a broker and a store that only say what they can do.

use std::future::pending;
use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use super::*;
use crate::broker::{BrokerOrder, Delivery, Durability, Limits, Receipt, Settlement, Want};
use crate::context::Context;
use crate::event::Effects;
use crate::handler::Failure;
use crate::publisher::Outgoing;
use crate::retry::Backoff;
use crate::store::{Claim, ClaimRequest, Lease, Outcome, Recorded, Renewal};

const DAY: Duration = Duration::from_hours(24);

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// What was called, in order.
type Calls = Arc<Mutex<Vec<&'static str>>>;

struct StubBroker {
    capabilities: Capabilities,
    answers: Answers,
    calls: Calls,
}

#[derive(Clone, Copy, PartialEq)]
enum Answers {
    Well,
    Never,
    Refuses,
}

fn refusal(operation: &'static str) -> Error {
    Error::new(ErrorKind::Configuration, operation).because("not with these settings")
}

#[async_trait::async_trait]
impl Broker for StubBroker {
    async fn open(&self, _: Limits) -> Result<()> {
        self.calls.lock().unwrap().push("broker open");
        match self.answers {
            Answers::Well => Ok(()),
            Answers::Never => pending().await,
            Answers::Refuses => Err(refusal("open")),
        }
    }
    async fn receive(&self, _: Want) -> Result<Vec<Delivery>> {
        pending().await
    }
    async fn settle(&self, batch: &[(Receipt, Settlement)]) -> Vec<Result<()>> {
        batch.iter().map(|_| Ok(())).collect()
    }
    async fn stop(&self) -> Result<()> {
        Ok(())
    }
    async fn close(&self) -> Result<()> {
        self.calls.lock().unwrap().push("broker close");
        Ok(())
    }
    fn capabilities(&self) -> Capabilities {
        self.capabilities.clone()
    }
}

#[derive(Clone)]
struct StubStore {
    health: StoreHealth,
    answers: Answers,
    calls: Calls,
}

#[async_trait::async_trait]
impl ProcessedStore for StubStore {
    async fn open(&self, _: &str, _: Duration) -> Result<ConsumerId> {
        self.calls.lock().unwrap().push("store open");
        Ok(ConsumerId(1))
    }
    async fn claim(&self, _: &[ClaimRequest], _: Duration) -> Result<Vec<Claim>> {
        pending().await
    }
    async fn renew(&self, _: &[Lease], _: Duration) -> Result<Vec<Renewal>> {
        pending().await
    }
    async fn record(&self, _: &[(Lease, Outcome)]) -> Result<Vec<Recorded>> {
        pending().await
    }
    async fn probe(&self) -> Result<StoreHealth> {
        self.calls.lock().unwrap().push("store probe");
        match self.answers {
            Answers::Well => Ok(self.health.clone()),
            Answers::Never => pending().await,
            Answers::Refuses => Err(refusal("probe")),
        }
    }
}

struct StubTx;

#[async_trait::async_trait]
impl TransactionalStore for StubStore {
    type Tx = StubTx;
    type Lent = ();
    async fn begin(&self) -> Result<(StubTx, ())> {
        Ok((StubTx, ()))
    }
    async fn record_in(&self, (): &mut (), batch: &[(Lease, Outcome)]) -> Result<Vec<Recorded>> {
        Ok(batch.iter().map(|_| Recorded::Done).collect())
    }
    async fn commit(&self, (): ()) -> Result<()> {
        Ok(())
    }
}

struct StubPublisher;

#[async_trait::async_trait]
impl Publisher for StubPublisher {
    async fn publish(&self, batch: Vec<Outgoing>) -> Vec<Result<()>> {
        batch.iter().map(|_| Ok(())).collect()
    }
}

/// An event type for each of its version and type.
macro_rules! event {
    ($name:ident, $ty:literal, $version:literal $(, from $older:ident)?) => {
        #[derive(Serialize, Deserialize)]
        struct $name;
        impl Event for $name {
            const TYPE: &'static str = $ty;
            const VERSION: u32 = $version;
        }
        $(impl From<$older> for $name {
            fn from(_: $older) -> Self {
                Self
            }
        })?
    };
}

event!(Paid1, "paid", 1, from Paid2);
event!(Paid2, "paid", 2, from Paid1);
event!(Paid3, "paid", 3, from Paid2);
event!(Shipped, "shipped", 1, from Paid1);
event!(Suffixed, "order.v2", 1);
event!(Zeroth, "zeroth", 0);

async fn handle<E, S>(_: E, _: Context<S>) -> Result<(), Failure> {
    Ok(())
}

async fn handle_tx<E, S>(_: E, _: StubTx, _: Context<S>) -> Result<(), Failure> {
    Ok(())
}

/// A broker and a store about which nothing is to be said, until a test says otherwise.
struct World {
    capabilities: Capabilities,
    health: StoreHealth,
    broker: Answers,
    store: Answers,
    calls: Calls,
}

impl World {
    fn durable() -> Self {
        let mut capabilities = Capabilities::none("stub");
        capabilities.durability = Durability::Durable;
        capabilities.retry_max = DAY;
        capabilities.redelivery_horizon = Some(7 * DAY);
        capabilities.dead_letter_in_one_step = true;
        let health = StoreHealth::new("stub-store", "1", Durability::Durable);
        Self { capabilities, health, broker: Answers::Well, store: Answers::Well, calls: Calls::default() }
    }

    fn named(&self, name: &str) -> ConsumerBuilder<(), StubStore> {
        let calls = &self.calls;
        let broker =
            StubBroker { capabilities: self.capabilities.clone(), answers: self.broker, calls: Arc::clone(calls) };
        let store = StubStore { health: self.health.clone(), answers: self.store, calls: Arc::clone(calls) };
        Consumer::builder(name, broker, store)
    }

    /// A consumer that builds, as long as the world stays as it is.
    fn consumer(&self) -> ConsumerBuilder<(), StubStore> {
        self.named("billing").on(handle::<Paid1, ()>).otherwise(Otherwise::Ignore)
    }

    /// The same with a transactional handler.
    fn transactional(&self) -> ConsumerBuilder<(), StubStore> {
        self.named("billing").on_tx(handle_tx::<Paid1, ()>).otherwise(Otherwise::Ignore)
    }

    fn calls(&self) -> Vec<&'static str> {
        self.calls.lock().unwrap().clone()
    }
}

/// The codes of all faults, each once and sorted; none where it builds.
async fn faults<S: Send + Sync + 'static>(builder: ConsumerBuilder<S, StubStore>) -> Vec<&'static str> {
    let mut codes: Vec<_> = match builder.build().await {
        Ok(_) => Vec::new(),
        Err(error) => error.faults.iter().map(|fault| fault.code).collect(),
    };
    codes.sort_unstable();
    codes.dedup();
    codes
}

async fn guarantee(builder: ConsumerBuilder<(), StubStore>) -> Guarantee {
    builder.build().await.expect("it builds").guarantee().clone()
}

const NONE: [&str; 0] = [];

#[tokio::test(start_paused = true)]
async fn a_consumer_builds_with_name_broker_store_and_one_handler() {
    let world = World::durable();
    let consumer = world.consumer().build().await.expect("it builds");
    assert_eq!(consumer.guarantee().level(), Level::Deduplicated);
    assert_eq!(world.calls(), ["broker open", "store probe", "store open"]);
}

#[tokio::test(start_paused = true)]
async fn build_can_be_awaited_in_a_spawned_task_and_with_stores_chosen_at_run_time() {
    let world = World::durable();
    let broker: Arc<dyn Broker> = Arc::new(StubBroker {
        capabilities: world.capabilities.clone(),
        answers: Answers::Well,
        calls: Calls::default(),
    });
    let store: Arc<dyn ProcessedStore> =
        Arc::new(StubStore { health: world.health.clone(), answers: Answers::Well, calls: Calls::default() });
    let builder = Consumer::builder("billing", broker, store)
        .state(String::new())
        .on(handle::<Paid1, String>)
        .otherwise(Otherwise::Ignore);
    assert!(tokio::spawn(builder.build()).await.expect("no panic").is_ok());
}

#[tokio::test(start_paused = true)]
async fn every_fault_is_told_at_once_and_the_store_is_not_changed() {
    let mut world = World::durable();
    world.health.evicts = true;
    world.store = Answers::Well;
    let builder = world.named("").lease(Duration::ZERO).retention(seconds(60)).on_any(handle::<_, ()>);
    let codes = faults(builder.otherwise(Otherwise::Ignore)).await;
    let expected =
        ["name-invalid", "otherwise-and-any", "retention-lt-horizon", "setting-out-of-bounds", "store-evicts"];
    assert_eq!(codes, expected);
    assert_eq!(world.calls(), ["broker open", "store probe", "broker close"], "a refused retention is never told");
}

#[tokio::test(start_paused = true)]
async fn a_broker_or_a_store_that_does_not_answer_is_a_fault_that_may_pass() {
    let mut world = World::durable();
    (world.broker, world.store) = (Answers::Never, Answers::Never);
    let error = world.consumer().build().await.expect_err("nobody answers");
    assert!(error.has("broker-unreachable") && error.has("store-unreachable") && error.is_retryable(), "{error}");
    (world.broker, world.store) = (Answers::Refuses, Answers::Refuses);
    let error = world.consumer().build().await.expect_err("both refuse");
    assert!(error.has("broker-refused") && error.has("store-refused") && !error.is_retryable(), "{error}");
    assert!(error.to_string().contains("not with these settings"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_name_is_1_to_128_plain_characters() {
    let world = World::durable();
    let named = |name: &str| world.named(name).on(handle::<Paid1, ()>).otherwise(Otherwise::Ignore);
    let longest = "x".repeat(128);
    for good in ["a", "billing.invoices:v2_eu-1", &longest] {
        assert_eq!(faults(named(good)).await, NONE, "{good}");
    }
    let too_long = "x".repeat(129);
    for bad in ["", " ", "a b", "ä", "a/b", &too_long] {
        assert_eq!(faults(named(bad)).await, ["name-invalid"], "{bad}");
    }
}

#[tokio::test(start_paused = true)]
async fn there_is_a_handler_and_one_for_each_type() {
    let world = World::durable();
    assert_eq!(faults(world.named("a")).await, ["handler-missing"]);
    assert_eq!(faults(world.consumer().on(handle::<Paid2, ()>)).await, ["handler-twice"]);
    assert_eq!(faults(world.named("a").on_any(handle::<_, ()>).on_any_tx(handle_tx::<_, ()>)).await, ["handler-twice"]);
    assert_eq!(faults(world.consumer().on(handle::<Shipped, ()>)).await, NONE);
}

#[tokio::test(start_paused = true)]
async fn types_without_a_handler_have_exactly_one_rule() {
    let world = World::durable();
    assert_eq!(faults(world.named("a").on(handle::<Paid1, ()>)).await, ["otherwise-missing"]);
    assert_eq!(faults(world.named("a").on(handle::<Paid1, ()>).on_any(handle::<_, ()>)).await, NONE);
    assert_eq!(faults(world.consumer().on_any(handle::<_, ()>)).await, ["otherwise-and-any"]);
}

#[tokio::test(start_paused = true)]
async fn state_goes_before_the_handlers() {
    let world = World::durable();
    let late = world.consumer().state(7).on(handle::<Paid1, i32>);
    assert_eq!(faults(late).await, ["state-after-handler"]);
    let early = world.named("a").state(7).on(handle::<Paid1, i32>).otherwise(Otherwise::Ignore);
    assert_eq!(faults(early).await, NONE);
}

#[tokio::test(start_paused = true)]
async fn a_type_has_its_version_beside_it_and_not_in_it() {
    let world = World::durable();
    assert_eq!(faults(world.consumer().on(handle::<Suffixed, ()>)).await, ["event-type-invalid"]);
    assert_eq!(faults(world.consumer().on(handle::<Zeroth, ()>)).await, ["event-type-invalid"]);
}

#[tokio::test(start_paused = true)]
async fn upcasts_lead_forward_to_a_handler_of_the_same_type() {
    let world = World::durable();
    let newest = || world.named("a").on(handle::<Paid3, ()>).otherwise(Otherwise::Ignore);
    assert_eq!(faults(newest().upcast::<Paid1, Paid2>().upcast::<Paid2, Paid3>()).await, NONE);
    assert_eq!(faults(newest().upcast::<Paid1, Paid2>()).await, ["upcast-leads-nowhere"]);
    assert_eq!(faults(newest().upcast::<Paid2, Paid1>()).await, ["upcast-backwards"]);
    assert_eq!(faults(newest().upcast::<Paid1, Shipped>()).await, ["upcast-of-another-type"]);
    assert_eq!(faults(newest().upcast::<Paid2, Paid3>().upcast::<Paid2, Paid3>()).await, ["upcast-twice"]);
    let middle = world.named("a").on(handle::<Paid2, ()>).otherwise(Otherwise::Ignore);
    let beyond = middle.upcast::<Paid1, Paid2>().upcast::<Paid2, Paid3>();
    assert_eq!(faults(beyond).await, ["upcast-leads-nowhere"], "the step behind the handler's version");
    let shipped = world.named("a").on(handle::<Shipped, ()>).otherwise(Otherwise::Ignore);
    assert_eq!(faults(shipped.upcast::<Paid1, Paid2>()).await, ["upcast-leads-nowhere"]);
}

#[tokio::test(start_paused = true)]
async fn a_number_out_of_its_bounds_is_told_with_the_bounds() {
    let world = World::durable();
    let error = world.consumer().batch_max(0).jitter(2.0).build().await.expect_err("absurd numbers");
    let text = error.to_string();
    assert_eq!(error.faults.len(), 2, "{text}");
    assert!(text.contains("batch_max is 0: it must be from 1 to 10000"), "{text}");
    let own = Route::on(handle::<Shipped, ()>).timeout(Duration::ZERO);
    assert_eq!(faults(world.consumer().add(own)).await, ["setting-out-of-bounds"]);
}

#[tokio::test(start_paused = true)]
async fn a_call_ends_in_time_for_another_renewal() {
    let world = World::durable();
    assert_eq!(faults(world.consumer().call_timeout(seconds(11))).await, ["call-timeout-beyond-lease"]);
    assert_eq!(faults(world.consumer().call_timeout(seconds(11)).lease(seconds(33))).await, NONE);
    assert_eq!(faults(world.consumer().lease(seconds(3))).await, NONE, "the default gives way");
}

#[tokio::test(start_paused = true)]
async fn concurrency_fits_in_flight_and_what_the_broker_hands_out() {
    let mut world = World::durable();
    assert_eq!(faults(world.consumer().concurrency(65).in_flight_max(64)).await, ["concurrency-beyond-in-flight"]);
    assert_eq!(faults(world.consumer().in_flight_max(8)).await, NONE, "the default gives way");
    world.capabilities.unsettled_max = Some(10);
    assert_eq!(faults(world.consumer().concurrency(11)).await, ["concurrency-beyond-broker"]);
    let report = guarantee(world.consumer()).await;
    assert!(report.to_string().contains("in_flight_max is 10"), "{report}");
}

#[tokio::test(start_paused = true)]
async fn a_retry_policy_is_told_once_and_makes_sense() {
    let world = World::durable();
    let never = RetryPolicy::default().attempts_max(0);
    assert_eq!(faults(world.consumer().retry(never.clone())).await, ["retry-invalid"]);
    assert_eq!(faults(world.consumer().add(Route::on(handle::<Shipped, ()>).retry(never))).await, ["retry-invalid"]);
    assert_eq!(faults(world.consumer().retry(RetryPolicy::none()).attempts_max(3)).await, ["retry-twice"]);
    assert_eq!(faults(world.consumer().retry(RetryPolicy::none())).await, NONE);
}

#[tokio::test(start_paused = true)]
async fn per_key_order_refuses_delays_that_would_be_overtaken() {
    let mut world = World::durable();
    world.capabilities.order = BrokerOrder::Partition;
    assert_eq!(faults(world.consumer()).await, NONE, "the default fits within hold");
    assert_eq!(faults(world.consumer().delay_max(seconds(60))).await, ["retry-overtaken"]);
    assert_eq!(faults(world.consumer().retry(RetryPolicy::default())).await, ["retry-overtaken"]);
    assert_eq!(faults(world.consumer().delay_max(seconds(60)).order(Order::Unordered)).await, NONE);
    assert_eq!(faults(world.consumer().delay_max(seconds(60)).hold(seconds(75))).await, NONE, "jitter is 25 %");
    let own = Route::on(handle::<Shipped, ()>).retry(RetryPolicy::fixed(seconds(6)));
    assert_eq!(faults(world.consumer().add(own)).await, ["retry-overtaken"]);
    world.capabilities.retry_keeps_order = true;
    assert_eq!(faults(world.consumer().delay_max(seconds(60))).await, NONE);
}

#[tokio::test(start_paused = true)]
async fn per_key_order_over_competing_consumers_is_refused() {
    let world = World::durable();
    assert_eq!(faults(world.consumer().order(Order::PerKey)).await, ["order-not-kept"]);
    assert_eq!(faults(world.consumer().order(Order::PerKey).allow(Window::Overtaken)).await, NONE);
}

#[tokio::test(start_paused = true)]
async fn order_is_what_the_broker_keeps_unless_it_is_set() {
    let mut world = World::durable();
    let report = guarantee(world.consumer()).await;
    assert!(report.to_string().contains("order is unordered"), "{report}");
    world.capabilities.order = BrokerOrder::Key;
    let report = guarantee(world.consumer()).await;
    assert!(report.to_string().contains("order is per-key"), "{report}");
    assert!(report.is_open(Window::DeadLetterOvertaken));
}

#[tokio::test(start_paused = true)]
async fn a_delay_is_no_longer_than_the_broker_keeps_a_retry() {
    let mut world = World::durable();
    world.capabilities.retry_max = seconds(60);
    assert_eq!(faults(world.consumer()).await, NONE, "the default fits");
    assert_eq!(faults(world.consumer().delay_max(seconds(61))).await, ["retry-beyond-broker"]);
    assert_eq!(faults(world.consumer().delay_max(seconds(48))).await, NONE);
    world.capabilities.retry_max = Duration::ZERO;
    assert_eq!(faults(world.consumer()).await, NONE, "everything is waited for here");
    let by_reason = RetryPolicy::fixed(seconds(1)).for_reason("busy", Backoff::Fixed(seconds(9)));
    assert_eq!(faults(world.consumer().retry(by_reason)).await, ["retry-beyond-broker"]);
}

#[tokio::test(start_paused = true)]
async fn a_delivery_is_not_held_longer_than_the_broker_allows() {
    let mut world = World::durable();
    world.capabilities.hold_max = Some(seconds(240));
    // Three delays of 0.2, 0.8 and 3.2 s are waited for here: four timeouts of 60 s and 5.25 s with jitter.
    assert_eq!(faults(world.consumer()).await, ["held-beyond-broker"]);
    assert_eq!(faults(world.consumer().timeout(seconds(58))).await, NONE);
    world.capabilities.order = BrokerOrder::Key;
    assert_eq!(faults(world.consumer().timeout(seconds(58))).await, ["held-beyond-broker"], "all attempts in place");
}

#[tokio::test(start_paused = true)]
async fn a_broker_that_counts_leaves_room_for_attempts_and_crashes() {
    let mut world = World::durable();
    world.capabilities.deliveries_max = Some(5);
    assert_eq!(faults(world.consumer()).await, ["broker-deliveries-max"]);
    assert_eq!(faults(world.consumer().attempts_max(2)).await, NONE);
    assert_eq!(faults(world.consumer().allow(Window::BrokerLimit)).await, NONE);
}

#[tokio::test(start_paused = true)]
async fn retention_lt_horizon_refuses_start() {
    let world = World::durable();
    assert_eq!(faults(world.consumer().retention(7 * DAY - seconds(1))).await, ["retention-lt-horizon"]);
    assert_eq!(faults(world.consumer().retention(7 * DAY)).await, NONE);
    let report = guarantee(world.consumer().retention(DAY).allow(Window::Forgotten)).await;
    assert!(report.is_open(Window::Forgotten), "allowed is not closed");
}

#[tokio::test(start_paused = true)]
async fn keys_that_callees_forget_during_the_attempts_are_refused() {
    let world = World::durable();
    let keyed = |kept| world.consumer().add(Route::on(handle::<Shipped, ()>).effects(Effects::keyed(kept)));
    assert_eq!(faults(keyed(seconds(600))).await, ["key-forgotten"]);
    assert_eq!(faults(keyed(seconds(600)).allow(Window::KeyForgotten)).await, NONE);
    let report = guarantee(keyed(DAY)).await;
    assert_eq!(report.handler("shipped").map(|handler| handler.level), Some(Level::EffectivelyOnce));
    assert!(report.is_open(Window::KeyForgotten), "an outage of a day or more");
}

#[tokio::test(start_paused = true)]
async fn a_store_that_ends_before_the_broker_is_accepted_by_name_only() {
    let mut world = World::durable();
    world.health.durability = Durability::Process;
    assert_eq!(faults(world.consumer()).await, ["level-below-required"]);
    assert_eq!(faults(world.transactional()).await, ["level-below-required"]);
    let report = guarantee(world.consumer().require(Level::AtLeastOnce)).await;
    assert_eq!((report.level(), report.is_open(Window::StoreLoss)), (Level::AtLeastOnce, true));
    world.capabilities.durability = Durability::Process;
    assert_eq!(guarantee(world.consumer()).await.level(), Level::Deduplicated, "they end together");
}

#[tokio::test(start_paused = true)]
async fn a_level_can_be_required_of_every_handler() {
    let world = World::durable();
    let strict = || world.transactional().require(Level::ExactlyOnceEffect);
    assert_eq!(faults(strict()).await, NONE);
    let error = strict().on(handle::<Shipped, ()>).build().await.expect_err("one handler is lower");
    assert!(error.to_string().contains("shipped is Deduplicated (L2), required is ExactlyOnceEffect (L4)"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_store_that_drops_records_is_refused() {
    let mut world = World::durable();
    world.health.evicts = true;
    assert_eq!(faults(world.consumer()).await, ["store-evicts"]);
    assert_eq!(faults(world.consumer().allow(Window::StoreLoss)).await, NONE);
}

#[tokio::test(start_paused = true)]
async fn a_transaction_that_blocks_ends_before_the_lease() {
    let mut world = World::durable();
    assert_eq!(faults(world.transactional().timeout(seconds(300))).await, NONE, "only where it blocks");
    world.health.transactions_block_writes = true;
    assert_eq!(faults(world.transactional()).await, NONE, "the default is two thirds of the lease");
    assert_eq!(faults(world.transactional().timeout(seconds(21))).await, ["tx-timeout-beyond-lease"]);
    let own = |timeout| Route::on_tx(handle_tx::<Shipped, ()>).timeout(timeout);
    assert_eq!(faults(world.transactional().add(own(seconds(21)))).await, ["tx-timeout-beyond-lease"]);
    assert_eq!(faults(world.transactional().add(own(seconds(20)))).await, NONE);
    assert_eq!(faults(world.consumer().timeout(seconds(300))).await, NONE, "no transaction, nothing blocked");
    let report = guarantee(world.transactional()).await;
    assert!(report.to_string().contains("one at a time"), "{report}");
}

#[tokio::test(start_paused = true)]
async fn a_pool_leaves_two_connections_to_claims_and_records() {
    let mut world = World::durable();
    world.health.transactions_max = Some(1);
    assert_eq!(faults(world.transactional()).await, ["pool-too-small"]);
    assert_eq!(faults(world.consumer()).await, NONE);
    world.health.transactions_max = Some(10);
    let report = guarantee(world.transactional()).await;
    assert!(report.to_string().contains("at most 8 transactional handlers"), "{report}");
}

#[tokio::test(start_paused = true)]
async fn publishing_from_a_transaction_waits_for_an_outbox() {
    let world = World::durable();
    assert_eq!(faults(world.transactional().publisher(StubPublisher)).await, ["publish-in-transaction"]);
    assert_eq!(faults(world.consumer().publisher(StubPublisher)).await, NONE);
}

#[tokio::test(start_paused = true)]
async fn ids_are_taken_from_where_they_can_be_found() {
    let mut world = World::durable();
    assert_eq!(faults(world.consumer().id_from(IdFrom::Position)).await, ["position-not-stable"]);
    assert_eq!(faults(world.consumer().id_from(IdFrom::json_pointer("id"))).await, ["id-from-invalid"]);
    let after = world.consumer().id_from(IdFrom::BodyHash).id_from(IdFrom::CloudEvents);
    assert_eq!(faults(after).await, ["id-from-unreachable"]);
    world.capabilities.position_is_stable = true;
    let several =
        world.consumer().id_from(IdFrom::CloudEvents).id_from(IdFrom::header("x-id")).id_from(IdFrom::Position);
    assert_eq!(faults(several).await, NONE);
}

#[tokio::test(start_paused = true)]
async fn a_builder_never_prints_its_state() {
    let builder = World::durable().named("billing").state("s3cret".to_owned()).on(handle::<Paid1, String>);
    let text = format!("{builder:?}");
    assert!(text.contains("billing") && !text.contains("s3cret"), "{text}");
}

#[test]
fn what_is_left_open_is_decided_from_broker_store_and_handlers() {
    let mut world = World::durable();
    world.capabilities.order = BrokerOrder::Key;
    world.health.transactions_block_writes = true;
    let infos = vec![
        Route::<(), StubStore>::on(handle::<Paid1, ()>).info,
        Route::<(), StubStore>::on_tx(handle_tx::<Shipped, ()>).info,
    ];
    let settings = Settings { lease: seconds(15), in_flight_max: 8, ..Settings::default() };
    let plan = Plan::new(&settings, None, infos, world.capabilities, world.health, &[]);
    assert_eq!((plan.order, plan.in_place), (Order::PerKey, true));
    assert_eq!((plan.settings.call_timeout, plan.settings.concurrency), (seconds(10), 8));
    assert_eq!((plan.infos[0].timeout, plan.infos[1].timeout), (Some(seconds(60)), Some(seconds(10))));
    assert_eq!(plan.retry.delay(9, "", 1.0), Settings::HOLD, "the longest delay with jitter");
    assert_eq!(plan.transactions_max, 1);
}
