//! The stores to choose from, and the consumer over each: what differs is where its effects take place.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hapax::{Consumer, ConsumerBuilder, IdFrom, Level, Order, ProcessedStore, SecretUrl, Settings, Window};
use hapax_memory::MemoryStore;
use hapax_postgres::PostgresStore;
use hapax_redis::RedisStore;
use hapax_sqlite::SqliteStore;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use crate::brokers::Queue;
use crate::effects::{self, App};
use crate::options::{Effects, Options, OrderKind, StoreKind};
use crate::told;

/// Begins the names of the environment's settings.
const PREFIX: &str = "WEBHOOK_WORKER";
/// Where this service differs from hapax' defaults: people are invited to kill it, pause it and let it fail, which
/// counts against the events that are hit; and nobody wants to wait five minutes for a retry.
const DEFAULTS: [(&str, &str); 2] = [("WEBHOOK_WORKER_ATTEMPTS_MAX", "100"), ("WEBHOOK_WORKER_CRASHES_MAX", "1000")];
/// Of one worker to PostgreSQL: two for claims and records, the others for as many handlers at once.
const CONNECTIONS_MAX: u32 = 10;
/// The longest delay where nothing has to wait for a retry.
const DELAY_MAX: Duration = Duration::from_secs(10);

/// The store that was chosen.
#[derive(Clone, Debug)]
pub(crate) enum Store {
    /// In this process.
    Memory(MemoryStore),
    /// In a file.
    Sqlite(SqliteStore),
    /// On a server.
    Redis(RedisStore),
    /// In a database.
    Postgres(PostgresStore),
}

impl Store {
    /// Opens it, brings its tables up to date, and creates the table `effects` where effects are rows.
    pub(crate) async fn open(options: &Options) -> Result<Self, String> {
        let url = options.store_url.as_deref().unwrap_or_default();
        let table = options.effects() == Some(Effects::Table);
        let untold = |error: sqlx::Error| format!("the table effects cannot be used: {error}");
        match options.store.ok_or("--store is missing")? {
            StoreKind::Memory => Ok(Self::Memory(MemoryStore::new())),
            StoreKind::Sqlite => {
                let file = url.strip_prefix("sqlite://").or(url.strip_prefix("sqlite:")).unwrap_or(url);
                let store = SqliteStore::open(Path::new(file)).await.map_err(|error| told(&error))?;
                if table {
                    effects::create_in_sqlite(store.pool()).await.map_err(untold)?;
                }
                Ok(Self::Sqlite(store))
            }
            StoreKind::Redis => {
                let url = SecretUrl::parse(url).map_err(|error| format!("--store-url: {error}"))?;
                RedisStore::open(url).await.map(Self::Redis).map_err(|error| told(&error))
            }
            StoreKind::Postgres => {
                // What the client says of a URL that it cannot read may quote it.
                let connect: PgConnectOptions =
                    url.parse().map_err(|_| "--store-url: PostgreSQL's client cannot read it".to_owned())?;
                let pool = PgPoolOptions::new().max_connections(CONNECTIONS_MAX).connect_lazy_with(connect);
                let store = PostgresStore::builder(pool).migrate(true).connect().await.map_err(|error| told(&error))?;
                if table {
                    effects::create_in_postgres(store.pool()).await.map_err(untold)?;
                }
                Ok(Self::Postgres(store))
            }
        }
    }

    /// The consumer: the group by name, events of any type, an effect for each.
    pub(crate) async fn consumer(&self, options: &Options, queue: &Queue) -> Result<Consumer, String> {
        let built = match (self, options.effects()) {
            (Self::Sqlite(store), Some(Effects::Table)) => {
                builder(options, queue, store.clone(), None)?.on_any_tx(effects::sqlite_row).build().await
            }
            (Self::Postgres(store), Some(Effects::Table)) => {
                builder(options, queue, store.clone(), None)?.on_any_tx(effects::postgres_row).build().await
            }
            (store, Some(Effects::File(path))) => {
                let lines = effects::open(&path)?;
                builder(options, queue, store.processed(), Some(lines))?.on_any(effects::line).build().await
            }
            (_, None | Some(Effects::Table)) => return Err("--effects: give a FILE".to_owned()),
        };
        built.map_err(|error| error.to_string())
    }

    /// Lets go.
    pub(crate) async fn close(&self) {
        match self {
            Self::Memory(_) | Self::Redis(_) => {}
            Self::Sqlite(store) => store.close().await,
            Self::Postgres(store) => store.pool().close().await,
        }
    }

    fn processed(&self) -> Arc<dyn ProcessedStore> {
        match self {
            Self::Memory(store) => Arc::new(store.clone()),
            Self::Sqlite(store) => Arc::new(store.clone()),
            Self::Redis(store) => Arc::new(store.clone()),
            Self::Postgres(store) => Arc::new(store.clone()),
        }
    }
}

/// What all consumers have in common.
fn builder<T: ProcessedStore>(
    options: &Options,
    queue: &Queue,
    store: T,
    lines: Option<Arc<std::fs::File>>,
) -> Result<ConsumerBuilder<App, T>, String> {
    let app = App { pause: Duration::from_millis(options.handler_ms), fail_rate: options.fail_rate, lines };
    let mut builder = Consumer::builder(&*options.group, queue.broker(), store)
        .settings(settings(options)?)
        .state(app)
        // CloudEvents bear their id; other JSON has it where the extractor looks.
        .id_from(IdFrom::CloudEvents)
        .id_from(IdFrom::json_pointer(effects::ID_POINTER));
    if options.order == Some(OrderKind::Key) {
        // Whoever asks for it gets what the broker can give: where it hands one key to several workers, the order of each
        // worker alone. The open window is told at start.
        builder = builder.allow(Window::Overtaken);
    }
    if options.store == Some(StoreKind::Memory) {
        // Chosen by name: under a durable broker it forgets what was processed when the process ends.
        builder = builder.require(Level::AtLeastOnce);
    }
    Ok(builder)
}

fn settings(options: &Options) -> Result<Settings, String> {
    let defaults = DEFAULTS.map(|(name, value)| (name.to_owned(), value.to_owned()));
    // What is not Unicode is no setting of ours.
    let given = std::env::vars_os().filter_map(|(name, value)| name.into_string().ok().zip(value.into_string().ok()));
    let mut settings =
        Settings::from_vars(PREFIX, defaults.into_iter().chain(given)).map_err(|error| error.to_string())?;
    settings.concurrency = options.concurrency.into();
    settings.in_flight_max = settings.in_flight_max.max(settings.concurrency);
    settings.lease = Duration::from_millis(options.lease_ms);
    settings.order = options.order.map(|order| match order {
        OrderKind::None => Order::Unordered,
        OrderKind::Key => Order::PerKey,
    });
    settings.timeout = settings.timeout.or(options.timeout());
    if !options.is_ordered() {
        settings.delay_max.get_or_insert(DELAY_MAX);
    }
    if options.fail_rate > 0.0 {
        // Failures that were asked for are no outage.
        settings.switch_events_min = u32::MAX;
    }
    Ok(settings)
}
