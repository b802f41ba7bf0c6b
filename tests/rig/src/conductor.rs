//! One run from beginning to end: servers and workers up, faults by plan, healing, rest, judgement.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::process::Command;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use crate::crew::{Orders, Supervised, Worker};
use crate::faults::Field;
use crate::judge::{self, Terms, Verdict};
use crate::letters::{self, Letter};
use crate::links::Link;
use crate::options::{BrokerKind, Options, OrderKind, StoreKind};
use crate::plan::{self, Fault, Side};
use crate::producer::{self, Accepted, Producer};
use crate::report::Report;
use crate::scribe::Scribe;
use crate::servers::Servers;
use crate::timing;
use crate::witness::{TICK, Table, Witness};

/// Longest time to come to rest after all faults.
const QUIESCE_MAX: Duration = Duration::from_secs(240);
/// Longer than any run.
const A_DAY: Duration = Duration::from_secs(86_400);
/// Until a fault is no longer felt.
const ROOM: Duration = Duration::from_secs(3);
/// How often workers are looked after.
const SUPERVISE_EVERY: Duration = Duration::from_millis(500);
/// Orders that wait for the producer.
const ORDERS_MAX: usize = 64;
/// A takeover on Kafka waits for its session, and for the rebalance behind it.
const KAFKA_SESSION: Duration = Duration::from_secs(6);
const KAFKA_REBALANCE: Duration = Duration::from_secs(4);

/// Runs it, and leaves history and logs in a folder.
pub(crate) async fn run(options: &Options) -> Result<Report, String> {
    let stage = Stage::set(options).await?;
    let begun = Instant::now();
    let (stop_producer, stopped) = watch::channel(false);
    let (orders, ordered) = mpsc::channel(ORDERS_MAX);
    let field = stage.field(options, orders).await?;
    let producer = Producer::new(options, &stage.url, &stage.topic, Arc::clone(&stage.scribe));
    let mut producing = tokio::spawn(producer.run(ordered, stopped));
    let watching = tokio::spawn(watch_files(Arc::clone(&stage.witness)));
    for worker in &field.workers[..field.workers.len() - 1] {
        worker.start(&mut *worker.hold().await).await?;
    }
    let supervising = tokio::spawn(supervise(Arc::clone(&field)));
    tokio::select! {
        broken = break_things(options, &field, begun) => broken?,
        ended = &mut producing => return Err(format!("the producer ended before its time: {ended:?}")),
    }
    stop_producer.send_replace(true);
    let accepted = producing.await.map_err(|error| error.to_string())??;
    stage.scribe.healed();
    let quiesced = stage.quiesce(options, &accepted).await?;
    // A late duplicate would come within a lease.
    sleep(options.lease() + Duration::from_secs(1)).await;
    supervising.abort();
    stage.end(options, &field).await?;
    watching.abort();
    let letters = stage.letters(options).await?;
    for letter in &letters {
        stage.scribe.letter(&letter.id, &letter.reason, letter.attempts, letter.intact);
    }
    let report = stage.report(options, &field, &accepted, &letters, quiesced)?;
    Ok(report)
}

/// Executes the plan; at its end all victims are whole again.
async fn break_things(options: &Options, field: &Arc<Field>, begun: Instant) -> Result<(), String> {
    let mut under_way = JoinSet::new();
    for planned in plan::draw(options) {
        sleep_until(begun + planned.at).await;
        let field = Arc::clone(field);
        under_way.spawn(async move { field.inject(planned).await });
        while let Some(done) = under_way.try_join_next() {
            done.map_err(|error| error.to_string())??;
        }
        sleep(Duration::ZERO).await;
    }
    sleep_until(begun + options.faulty()).await;
    while let Some(done) = under_way.join_next().await {
        done.map_err(|error| error.to_string())??;
    }
    for worker in &field.workers[..field.workers.len() - 1] {
        worker.start(&mut *worker.hold().await).await?;
    }
    one_by_one(options, field).await
}

/// Single faults with room around them: only then can be measured how long recovery takes.
async fn one_by_one(options: &Options, field: &Field) -> Result<(), String> {
    sleep(ROOM).await;
    for planned in plan::singles(options) {
        field.inject(planned).await?;
        let room = if planned.fault == Fault::Kill { takeover_max(options) } else { resume_max(options) };
        sleep(room + ROOM).await;
    }
    Ok(())
}

/// From a kill until the events run elsewhere.
fn takeover_max(options: &Options) -> Duration {
    match options.broker {
        BrokerKind::Kafka => options.lease().max(KAFKA_SESSION) + KAFKA_REBALANCE,
        BrokerKind::Redis | BrokerKind::Rabbitmq => options.lease() + Duration::from_secs(1),
    }
}

/// From the return of a server until work goes on.
fn resume_max(options: &Options) -> Duration {
    Duration::from_secs(if options.broker == BrokerKind::Redis { 5 } else { 10 })
}

/// Starts workers again that could not start, as whoever runs services does.
async fn supervise(field: Arc<Field>) {
    loop {
        sleep(SUPERVISE_EVERY).await;
        for worker in &field.workers {
            let Some(mut state) = worker.try_hold() else { continue };
            match worker.supervise(&mut state).await {
                Ok(Supervised::Well) => {}
                Ok(Supervised::StartedAgain) => field.started_again(),
                Err(trouble) => field.trouble(trouble),
            }
        }
    }
}

async fn watch_files(witness: Arc<Witness>) {
    loop {
        sleep(TICK).await;
        witness.drain();
    }
}

/// What a run has from its beginning to its end.
struct Stage {
    servers: Mutex<Option<Servers>>,
    url: String,
    store_url: String,
    topic: String,
    out: PathBuf,
    scribe: Arc<Scribe>,
    witness: Arc<Witness>,
}

impl Stage {
    async fn set(options: &Options) -> Result<Self, String> {
        let servers = Servers::up(options).await?;
        let url = servers.url(Side::Broker)?.to_owned();
        // Names of its own for every run: what is left of another one does not disturb.
        let unix_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let (broker, store) = (options.broker.name(), options.store.name());
        let name = format!("{broker}-{store}-{}-{unix_s}", options.seed);
        let out = options.out.join(&name);
        let in_out = |error: std::io::Error| format!("{}: {error}", out.display());
        std::fs::create_dir_all(&out).map_err(in_out)?;
        let out = out.canonicalize().map_err(in_out)?;
        let store_url = match options.store {
            StoreKind::Sqlite => out.join("store.db").display().to_string(),
            _ => servers.url(Side::Store)?.to_owned(),
        };
        let (topic, group) = (format!("rig.{name}"), format!("rig-{}-{unix_s}", options.seed));
        let scribe = Arc::new(Scribe::new(&group));
        let witness = Arc::new(Witness::new(Arc::clone(&scribe)));
        let stage = Self { servers: Mutex::new(Some(servers)), url, store_url, topic, out, scribe, witness };
        stage.declare(options).await?;
        Ok(stage)
    }

    /// Topic, group and places of the run.
    async fn declare(&self, options: &Options) -> Result<(), String> {
        let orders = Orders::new(options, &self.topic, &self.scribe.group, self.out.clone());
        let mut command = Command::new(&orders.program);
        command.args(&orders.arguments).args(["--url", &self.url, "--store-url", &self.store_url, "--declare-only"]);
        if orders.lines {
            command.arg("--effects").arg(self.out.join("effects-none.jsonl"));
        }
        let output = command.output().await.map_err(|error| format!("{}: {error}", orders.program.display()))?;
        if output.status.success() {
            return Ok(());
        }
        Err(format!("webhook_worker --declare-only failed:\n{}", String::from_utf8_lossy(&output.stderr)))
    }

    async fn field(&self, options: &Options, orders: mpsc::Sender<producer::Order>) -> Result<Arc<Field>, String> {
        let servers = self.servers.lock().expect("nobody panics while holding it").take().ok_or("one field a stage")?;
        let common = Arc::new(Orders::new(options, &self.topic, &self.scribe.group, self.out.clone()));
        let shared = match options.broker {
            BrokerKind::Kafka => Some(Link::to_kafka(&servers.environment).await?),
            _ => None,
        };
        let mut workers = Vec::new();
        for number in 0..=options.workers.max(1) {
            let broker = match &shared {
                Some(shared) => Arc::clone(shared),
                None => Link::to(&self.url, number).await?,
            };
            let store = if options.store.is_server() { Some(Link::to(&self.store_url, number).await?) } else { None };
            let store_url = store.as_ref().map_or_else(|| self.store_url.clone(), |link| link.url.clone());
            let (scribe, witness) = (Arc::clone(&self.scribe), Arc::clone(&self.witness));
            let ways = (broker, store, store_url);
            workers.push(Arc::new(Worker::new(number, ways, Arc::clone(&common), scribe, witness)));
        }
        Ok(Arc::new(Field {
            servers,
            one_server: options.one_server(),
            workers,
            scribe: Arc::clone(&self.scribe),
            lease: options.lease(),
            orders,
            counts: Mutex::default(),
            troubles: Mutex::default(),
            started_again: AtomicU32::new(0),
            away: AtomicU32::new(0),
            back: Mutex::default(),
            server: tokio::sync::Mutex::default(),
        }))
    }

    /// Waits until every event has its effect and every conflict its letter. Answers when the last effect was there, or
    /// nothing when something is still missing at the end of the time.
    async fn quiesce(&self, options: &Options, accepted: &Accepted) -> Result<Option<Duration>, String> {
        let healed = Instant::now();
        let events = usize::try_from(accepted.events).unwrap_or(usize::MAX);
        let table = match options.transactional() {
            true => Some(Table::connect(options.store, &self.store_url).await?),
            false => None,
        };
        let mut quiet = None;
        while healed.elapsed() < QUIESCE_MAX {
            if quiet.is_none() {
                let done = match &table {
                    None => self.scribe.events_with_effect(),
                    Some(table) => table.events(&self.scribe.group).await?,
                };
                quiet = (done >= events).then(|| healed.elapsed());
            }
            if quiet.is_some() {
                let letters = self.letters(options).await?;
                let set_aside = |number: &u64| letters.iter().any(|letter| letter.id == producer::id(*number));
                if accepted.conflicts.iter().all(set_aside) {
                    return Ok(quiet);
                }
            }
            sleep(Duration::from_millis(200)).await;
        }
        Ok(None)
    }

    /// All workers end as they should, and what they left is read.
    async fn end(&self, options: &Options, field: &Field) -> Result<(), String> {
        for worker in &field.workers {
            let mut state = worker.hold().await;
            if let Err(trouble) = worker.terminate(&mut state, || field.is_away()).await {
                field.trouble(trouble);
            }
        }
        self.witness.drain();
        if options.transactional() {
            Table::connect(options.store, &self.store_url).await?.read(&self.scribe).await?;
        }
        Ok(())
    }

    async fn letters(&self, options: &Options) -> Result<Vec<Letter>, String> {
        letters::read(options.broker, &self.url, &self.topic, &self.scribe.group).await
    }

    fn report(
        &self,
        options: &Options,
        field: &Field,
        accepted: &Accepted,
        letters: &[Letter],
        quiesced: Option<Duration>,
    ) -> Result<Report, String> {
        let history = self.scribe.history();
        let ordered =
            options.order == OrderKind::Key && options.broker == BrokerKind::Kafka && !options.transactional();
        let lanes =
            (0..accepted.events).filter(|_| ordered).map(|n| (self.scribe.key(&producer::id(n)), n % producer::LANES));
        let terms = Terms {
            lease: options.lease(),
            transactional: options.transactional(),
            forgetful: options.store == StoreKind::Redis,
            one_server: options.one_server(),
            lanes: lanes.collect(),
            conflicts: accepted.conflicts.iter().map(|number| self.scribe.key(&producer::id(*number))).collect(),
            // Rows are read when all is over; that they were there in time was seen by who waited for them.
            quiesce_within: if options.transactional() { A_DAY } else { QUIESCE_MAX },
        };
        let verdict = judge::judge(&history, &terms);
        let lease = options.lease();
        let mut report = Report {
            broker: options.broker.name(),
            store: options.store.name(),
            effects_are: if options.transactional() { "rows" } else { "lines" },
            order: options.order.name(),
            seed: options.seed,
            minutes: options.minutes,
            lease,
            events: accepted.events,
            messages: accepted.messages,
            sent_again: accepted.sent_again,
            effects: self.scribe.effects(),
            conflicts: accepted.conflicts.len(),
            letters: letters.len(),
            refused_starts: field.started_again.load(Ordering::Relaxed),
            faults: field.counts.lock().expect("nobody panics while holding it").clone(),
            quiesced,
            takeover: timing::takeover(&history),
            takeover_max: takeover_max(options),
            broker_resume: timing::resume(&history, Side::Broker),
            store_resume: timing::resume(&history, Side::Store),
            resume_max: resume_max(options),
            folder: self.out.display().to_string(),
            ..Report::default()
        };
        self.tell_violations(field, &verdict, &mut report);
        report.explained = verdict.explained;
        report.unexplained = verdict.unexplained;
        report.lost = verdict.lost.len();
        report.judge_times();
        self.save(&report)?;
        Ok(report)
    }

    fn tell_violations(&self, field: &Field, verdict: &Verdict, report: &mut Report) {
        const TOLD_MAX: usize = 20;
        let violations = &mut report.violations;
        violations.extend(field.troubles.lock().expect("nobody panics while holding it").iter().cloned());
        violations.extend(self.scribe.ran_with_two_bodies().iter().map(|id| format!("{id} ran with both its bodies")));
        violations.extend(self.scribe.strange_keys().iter().map(|id| format!("{id} had a key that is not its own")));
        violations.extend(verdict.violations.iter().take(TOLD_MAX).map(ToString::to_string));
        if let Some(more) = verdict.violations.len().checked_sub(TOLD_MAX + 1) {
            violations.push(format!("and {} more", more + 1));
        }
        let keys = verdict.violations.iter().filter_map(|violation| violation.key).chain(verdict.lost.iter().copied());
        let stories: String = keys.take(TOLD_MAX).map(|key| self.scribe.story(key)).collect();
        if !stories.is_empty() {
            // People look there first; that it is missing is told by the folder itself.
            let _ = std::fs::write(self.out.join("stories.txt"), stories);
        }
    }

    fn save(&self, report: &Report) -> Result<(), String> {
        let write = |path: &Path, text: String| {
            std::fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
        };
        write(&self.out.join("history.jsonl"), self.scribe.to_jsonl())?;
        write(&self.out.join("report.json"), report.to_json())?;
        write(&self.out.join("report.txt"), report.to_string())
    }
}
