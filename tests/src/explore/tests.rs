//! The explorer itself: it finds each window where it is, and finds none where there is none.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use hapax::{
    Broker, Claim, ClaimRequest, Consumer, ConsumerBuilder, ConsumerId, Context, Event, Failure, Item, Lease, Message,
    Otherwise, Outcome, Outcomes, ProcessedStore, Recorded, Renewal, RetryPolicy, StoreHealth,
};
use hapax_memory::MemoryStore;
use serde::{Deserialize, Serialize};

use super::{Explore, PointKind, Report, explore};
use crate::stage::{NoPublisher, crash_point, message_of};

#[derive(Serialize, Deserialize)]
struct OrderPlaced {
    cents: i64,
}

impl Event for OrderPlaced {
    const TYPE: &'static str = "com.shop.order.placed";
}

#[derive(Serialize, Deserialize)]
struct Charged {
    attempt: u32,
}

impl Event for Charged {
    const TYPE: &'static str = "com.shop.charged";
}

const ORDER: OrderPlaced = OrderPlaced { cents: 5 };

/// A double of what handlers call.
#[derive(Default)]
struct World {
    charges: Mutex<Vec<i64>>,
    keyed: Mutex<BTreeMap<String, i64>>,
    fence: Mutex<u64>,
}

impl World {
    async fn charge(&self, cents: i64) {
        crash_point("request").await;
        self.charges.lock().unwrap().push(cents);
        crash_point("response").await;
    }

    async fn charge_keyed(&self, key: String, cents: i64) {
        crash_point("request").await;
        self.keyed.lock().unwrap().insert(key, cents);
        crash_point("response").await;
    }

    fn charges(&self) -> Vec<i64> {
        let mut all = self.charges.lock().unwrap().clone();
        all.extend(self.keyed.lock().unwrap().values());
        all
    }
}

async fn careless(event: OrderPlaced, cx: Context<World>) -> Result<(), Failure> {
    cx.state().charge(event.cents).await;
    Ok(())
}

async fn careful(event: OrderPlaced, cx: Context<World>) -> Result<(), Failure> {
    cx.state().charge_keyed(cx.key("charge"), event.cents).await;
    Ok(())
}

fn points_of(report: &Report) -> Vec<PointKind> {
    report.points().iter().map(super::Point::kind).collect()
}

fn caught(report: &Report) -> Vec<PointKind> {
    report.differences().iter().map(|difference| difference.point.kind()).collect()
}

#[tokio::test(start_paused = true)]
async fn a_handler_that_charges_twice_is_caught_at_the_points_behind_its_effect() {
    let report = explore(careless, &ORDER).state(World::default).read(World::charges).await;
    use PointKind::{Await, BeforeAck, BeforeRecord, Copies, Returned};
    assert_eq!(points_of(&report), [Copies, Await(1), Await(2), Returned, BeforeRecord, BeforeAck]);
    assert_eq!(caught(&report), [Await(2), Returned, BeforeRecord], "{report}");
    assert_eq!(report.differences()[0].point.name(), Some("response"));
    let told = report.to_string();
    for part in ["6 points explored, 3 make a difference", "await point 2 (response): another state", "    +     5,\n"]
    {
        assert!(told.contains(part), "{part:?} is missing in {told}");
    }
    assert!(!told.contains("    -"), "{told}");
    let panic = std::panic::catch_unwind(|| report.assert_effects_once()).expect_err("it is caught");
    assert!(panic.downcast_ref::<String>().unwrap().contains("make a difference"));
}

/// A batch handler is caught and mended as a single one is, with company and alone.
#[tokio::test(start_paused = true)]
async fn a_batch_that_charges_twice_is_caught_and_the_mended_one_passes() {
    async fn careless(batch: Vec<Item<OrderPlaced, Arc<World>>>) -> Result<Outcomes, Failure> {
        for item in &batch {
            item.cx.state().charge(item.event.cents).await;
        }
        Ok(Outcomes::all_done())
    }
    async fn careful(batch: Vec<Item<OrderPlaced, Arc<World>>>) -> Result<Outcomes, Failure> {
        for item in &batch {
            item.cx.state().charge_keyed(item.cx.key("charge"), item.event.cents).await;
        }
        Ok(Outcomes::all_done())
    }
    fn charges(world: &Arc<World>) -> Vec<i64> {
        let mut all = world.charges();
        all.sort_unstable();
        all
    }
    let company = || [message_of("second", &OrderPlaced { cents: 6 })];
    let wired = |world: &Arc<World>, broker, store| {
        Consumer::builder("billing", broker, store).otherwise(Otherwise::Ignore).state(Arc::clone(world))
    };
    let wiring = move |world: &Arc<World>, broker, store| wired(world, broker, store).on_batch(careless);
    let report = Explore::wiring(Arc::<World>::default, wiring, &ORDER).beside(company()).read(charges).await;
    let caught: Vec<_> = report.differences().iter().map(|difference| difference.point.name()).collect();
    assert!(caught.contains(&Some("response")), "{report}");
    let wiring = move |world: &Arc<World>, broker, store| wired(world, broker, store).on_batch(careful);
    let explore = Explore::wiring(Arc::<World>::default, wiring, &ORDER).beside(company());
    let report = explore.overlapping().read(charges).await;
    report.assert_effects_once_though_paused();
    assert_eq!(report.single(), "[\n    5,\n    6,\n]");
}

#[tokio::test(start_paused = true)]
async fn the_mended_handler_passes_even_when_it_is_paused() {
    let report = explore(careful, &ORDER).state(World::default).overlapping().read(World::charges).await;
    report.assert_effects_once_though_paused();
    assert_eq!(report.single(), "[\n    5,\n]");
}

#[tokio::test(start_paused = true)]
async fn an_effect_that_is_lost_is_caught_too() {
    // Marks before it acts: the classic hand-written deduplication.
    async fn marks_first(event: OrderPlaced, cx: Context<World>) -> Result<(), Failure> {
        if cx.state().keyed.lock().unwrap().insert(cx.idempotency_key(), 0).is_none() {
            cx.state().charge(event.cents).await;
        }
        Ok(())
    }
    let report = explore(marks_first, &ORDER).state(World::default).read(World::charges).await;
    assert_eq!(caught(&report), [PointKind::Await(1)], "{report}");
    assert_eq!(report.differences()[0].actual, "[\n    0,\n]");
}

#[tokio::test(start_paused = true)]
async fn a_pause_beyond_the_lease_is_told_apart_from_a_crash() {
    // Looks before it acts: safe after a crash, but not beside a holder that stands still.
    async fn looks_first(event: OrderPlaced, cx: Context<World>) -> Result<(), Failure> {
        if cx.state().charges.lock().unwrap().is_empty() {
            cx.state().charge(event.cents).await;
        }
        Ok(())
    }
    let report = explore(looks_first, &ORDER).state(World::default).overlapping().read(World::charges).await;
    report.assert_effects_once();
    let overlapping: Vec<_> = report.overlapping().iter().map(|difference| difference.point.name()).collect();
    assert_eq!(overlapping, [Some("request")], "{report}");
    assert!(std::panic::catch_unwind(|| report.assert_effects_once_though_paused()).is_err());

    // Mended with the fence: the callee refuses an older holder.
    async fn fenced(event: OrderPlaced, cx: Context<World>) -> Result<(), Failure> {
        let world = cx.state();
        if world.charges.lock().unwrap().is_empty() {
            crash_point("request").await;
            let mut newest = world.fence.lock().unwrap();
            if *newest > cx.fence() {
                return Err(Failure::retryable("fenced"));
            }
            *newest = cx.fence();
            world.charges.lock().unwrap().push(event.cents);
        }
        Ok(())
    }
    let report = explore(fenced, &ORDER).state(World::default).overlapping().read(World::charges).await;
    report.assert_effects_once_though_paused();
}

#[tokio::test(start_paused = true)]
async fn what_is_published_once_under_a_stable_id_is_no_difference_and_what_changes_is() {
    async fn stable(_: OrderPlaced, cx: Context<World>) -> Result<(), Failure> {
        crash_point("before").await;
        cx.publish(&Charged { attempt: 0 }).send()?;
        crash_point("after").await;
        Ok(())
    }
    let report = explore(stable, &ORDER).state(World::default).read(World::charges).await;
    report.assert_effects_once();

    async fn differs(_: OrderPlaced, cx: Context<World>) -> Result<(), Failure> {
        cx.publish(&Charged { attempt: cx.attempt() }).send()?;
        Ok(())
    }
    let report = explore(differs, &ORDER).state(World::default).read(World::charges).await;
    let what: BTreeSet<_> = report.differences().iter().map(|d| (d.point.to_string(), d.what)).collect();
    let before = "before the record reached the store".to_owned();
    assert!(what.contains(&(before, "published")), "{report}");
}

#[tokio::test(start_paused = true)]
async fn attempts_that_fail_by_themselves_are_explored_as_well() {
    async fn second_time_lucky(event: OrderPlaced, cx: Context<World>) -> Result<(), Failure> {
        cx.state().charge_keyed(cx.key("charge"), event.cents).await;
        if cx.attempt() == 1 { Err(Failure::retryable("busy")) } else { Ok(()) }
    }
    let report = explore(second_time_lucky, &ORDER).state(World::default).read(World::charges).await;
    report.assert_effects_once();
    assert!(points_of(&report).contains(&PointKind::Await(4)), "two attempts with two points each: {report}");
}

#[tokio::test(start_paused = true)]
async fn a_crash_that_uses_up_the_last_attempt_is_another_end() {
    fn impatient<T: ProcessedStore>(
        world: &Arc<World>,
        broker: Arc<dyn Broker>,
        store: T,
    ) -> ConsumerBuilder<World, T> {
        Consumer::builder("billing", broker, store)
            .shared_state(Arc::clone(world))
            .retry(RetryPolicy::none())
            .on(careful)
            .otherwise(Otherwise::Ignore)
    }
    let report = Explore::wiring(Arc::<World>::default, impatient, &ORDER).read(|world| world.charges()).await;
    let ends: Vec<_> = report.differences().iter().filter(|d| d.what == "end").collect();
    assert!(!ends.is_empty(), "{report}");
    assert_eq!(ends[0].actual, "dead-lettered as attempts-exhausted");
}

#[tokio::test(start_paused = true)]
async fn production_wiring_is_explored_with_any_message_of_its_own() {
    let wiring = |world: &Arc<World>, broker, store| {
        Consumer::builder("billing", broker, store)
            .shared_state(Arc::clone(world))
            .publisher(NoPublisher)
            .lease(Duration::from_secs(5))
            .on(careless)
            .otherwise(Otherwise::Ignore)
    };
    let message = Message::event("/elsewhere", "7", OrderPlaced::TYPE).with_json(&OrderPlaced { cents: 9 }).unwrap();
    let report = Explore::wiring(Arc::<World>::default, wiring, &ORDER).message(message).read(|w| w.charges()).await;
    assert_eq!(report.single(), "[\n    9,\n]");
    assert_eq!(report.differences().len(), 3, "{report}");
}

/// A store that remembers nothing: every claim is the first.
#[derive(Clone, Default)]
struct Forgetful(MemoryStore);

#[async_trait]
impl ProcessedStore for Forgetful {
    async fn open(&self, consumer: &str, retention: Duration) -> hapax::Result<ConsumerId> {
        self.0.open(consumer, retention).await
    }

    async fn claim(&self, batch: &[ClaimRequest], lease: Duration) -> hapax::Result<Vec<Claim>> {
        let fresh = MemoryStore::new();
        fresh.open("billing", Duration::from_secs(60)).await?;
        fresh.claim(batch, lease).await
    }

    async fn renew(&self, leases: &[Lease], _: Duration) -> hapax::Result<Vec<Renewal>> {
        Ok(leases.iter().map(|_| Renewal::Renewed).collect())
    }

    async fn record(&self, batch: &[(Lease, Outcome)]) -> hapax::Result<Vec<Recorded>> {
        Ok(batch.iter().map(|_| Recorded::Done).collect())
    }

    async fn probe(&self) -> hapax::Result<StoreHealth> {
        self.0.probe().await
    }
}

#[tokio::test(start_paused = true)]
async fn copies_come_before_and_after_and_are_told_where_nothing_keeps_them_out() {
    let wiring = |world: &Arc<World>, broker, store| {
        let builder = Consumer::builder("billing", broker, store).shared_state(Arc::clone(world));
        builder.on(careless).otherwise(Otherwise::Ignore)
    };
    let world = async || (Arc::<World>::default(), Forgetful::default());
    let report = Explore::with_store(world, wiring, &ORDER).read(|world| world.charges()).await;
    let copies = &report.differences()[0];
    assert_eq!(copies.point.kind(), PointKind::Copies);
    assert_eq!(copies.actual, "[\n    5,\n    5,\n    5,\n]", "two at once, and another behind them");
}

#[tokio::test(start_paused = true)]
#[should_panic(expected = "no handler ran")]
async fn exploring_nothing_is_a_failure() {
    let wiring = |_: &(), broker, store| {
        Consumer::builder("billing", broker, store).state(World::default()).on(careless).otherwise(Otherwise::Ignore)
    };
    let message = Message::event("/shop", "1", "com.shop.other");
    Explore::wiring(|| (), wiring, &ORDER).message(message).read(|()| ()).await;
}

#[tokio::test(start_paused = true)]
async fn the_same_exploration_tells_the_same() {
    let run =
        async || explore(careless, &ORDER).state(World::default).overlapping().read(World::charges).await.to_string();
    assert_eq!(run().await, run().await);
}

/// The transactional variant, against real files and with the clock running.
mod in_transactions {
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::SystemTime;

    use hapax::record::Moment;
    use hapax_sqlite::{SqliteStore, SqliteTx, Synchronous, sqlx};

    use super::*;

    static FILES: AtomicU64 = AtomicU64::new(0);

    struct Shop {
        store: SqliteStore,
        path: PathBuf,
        passed_s: Arc<AtomicU64>,
    }

    impl Drop for Shop {
        fn drop(&mut self) {
            for ending in ["", "-wal", "-shm"] {
                let mut file = self.path.clone().into_os_string();
                file.push(ending);
                // Not there, or still open: the directory is the system's to tidy.
                let _ = std::fs::remove_file(file);
            }
        }
    }

    /// A handler of many in one transaction, with company that fails the first time: it rolls back what it wrote.
    #[tokio::test]
    async fn a_batch_in_the_stores_transaction_passes_at_every_await_point() {
        async fn invoices_of(batch: Vec<Item<OrderPlaced, ()>>, mut tx: SqliteTx) -> Result<Outcomes, Failure> {
            let mut outcomes = Vec::new();
            for item in &batch {
                write(&mut tx, item.event.cents).await?;
                crash_point("written").await;
                let fails = item.event.cents == 7 && item.cx.attempt() == 1;
                outcomes.push(if fails { Err(Failure::retryable("the first time")) } else { Ok(()) });
            }
            Ok(outcomes.into_iter().collect())
        }
        let wiring = |_: &Shop, broker, store| {
            wired((), broker, store).on_batch_tx(invoices_of).delay(Duration::from_millis(10))
        };
        let report = Explore::with_store(shop, wiring, &ORDER)
            .beside([message_of("second", &OrderPlaced { cents: 6 }), message_of("third", &OrderPlaced { cents: 7 })])
            .on_crash(expire)
            .deadline(Duration::from_secs(20))
            .query(async |shop| {
                let mut all = invoices(shop).await;
                all.sort_unstable();
                all
            })
            .await;
        report.assert_effects_once();
        assert_eq!(report.single(), "[\n    5,\n    6,\n    7,\n]");
        let written = report.points().iter().filter(|point| point.name() == Some("written")).count();
        assert!(written >= 3, "each of the batch: {:#?}", report.points());
    }

    async fn shop() -> (Shop, SqliteStore) {
        let number = FILES.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("hapax-explore-{}-{number}.db", std::process::id()));
        let passed_s = Arc::new(AtomicU64::new(0));
        let passed = Arc::clone(&passed_s);
        let clock = move || {
            let machine = SystemTime::UNIX_EPOCH.elapsed().unwrap();
            Moment(0).after(machine).after(Duration::from_secs(passed.load(Ordering::SeqCst)))
        };
        let builder = SqliteStore::builder(&path).synchronous(Synchronous::Normal).clock(clock);
        let store = builder.connect().await.unwrap();
        sqlx::query("CREATE TABLE invoices (cents INTEGER NOT NULL)").execute(store.pool()).await.unwrap();
        (Shop { store: store.clone(), path, passed_s }, store)
    }

    async fn invoices(shop: &Shop) -> Vec<i64> {
        sqlx::query_scalar("SELECT cents FROM invoices").fetch_all(shop.store.pool()).await.unwrap()
    }

    async fn write(connection: &mut sqlx::SqliteConnection, cents: i64) -> Result<(), sqlx::Error> {
        sqlx::query("INSERT INTO invoices (cents) VALUES (?)").bind(cents).execute(connection).await.map(drop)
    }

    fn wired<S: Send + Sync + 'static, T: ProcessedStore>(
        state: S,
        broker: Arc<dyn Broker>,
        store: T,
    ) -> ConsumerBuilder<S, T> {
        Consumer::builder("billing", broker, store).otherwise(Otherwise::Ignore).state(state)
    }

    fn expire(shop: &Shop) {
        shop.passed_s.fetch_add(60, Ordering::SeqCst);
    }

    #[tokio::test]
    async fn a_handler_in_the_stores_transaction_passes_at_every_await_point() {
        async fn invoice(event: OrderPlaced, mut tx: SqliteTx, _: Context<()>) -> Result<(), Failure> {
            write(&mut tx, event.cents).await?;
            crash_point("written").await;
            Ok(())
        }
        let wiring = |_: &Shop, broker, store| wired((), broker, store).on_tx(invoice);
        let report = Explore::with_store(shop, wiring, &ORDER)
            .on_crash(expire)
            .deadline(Duration::from_secs(20))
            .query(invoices)
            .await;
        report.assert_effects_once();
        assert_eq!(report.single(), "[\n    5,\n]");
        assert!(report.points().iter().any(|point| point.name() == Some("written")), "{:#?}", report.points());
        assert!(report.points().iter().any(|point| point.kind() == PointKind::BeforeRecord), "{report}");
    }

    #[tokio::test]
    async fn the_same_rows_written_beside_the_transaction_are_caught() {
        async fn beside(event: OrderPlaced, cx: Context<sqlx::SqlitePool>) -> Result<(), Failure> {
            write(&mut *cx.state().acquire().await?, event.cents).await?;
            crash_point("written").await;
            Ok(())
        }
        let wiring = |shop: &Shop, broker, store| wired(shop.store.pool().clone(), broker, store).on(beside);
        let report = Explore::with_store(shop, wiring, &ORDER)
            .on_crash(expire)
            .deadline(Duration::from_secs(20))
            .query(invoices)
            .await;
        let names: Vec<_> = report.differences().iter().map(|difference| difference.point.name()).collect();
        assert!(names.contains(&Some("written")), "{report}");
    }
}
