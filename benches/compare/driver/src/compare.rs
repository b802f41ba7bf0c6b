//! The comparison: every contender in turn, round by round, over the same messages.

use compare_kit::Outcome;

use crate::contender::{self, Contender, Place, Run, Task};
use crate::feed::{Content, Error, Feed};
use crate::figures::Row;

/// A round that would take longer has fewer events.
const ROUND_S_MAX: f64 = 30.0;
/// What such a round takes, and how many events it has at least.
const SHORT_ROUND_S: f64 = 4.0;
const SHORT_ROUND_MIN: u64 = 200;
/// Events of the run before the rounds, which tells how fast a contender is about.
const TRIAL: u64 = 1_000;
/// The offered rate of the latency columns, and for how long. A contender that hardly manages it is offered half of what it
/// manages: waiting in a queue tells nothing about it.
pub const PACE_PER_S: u64 = 1_000;
const PACE_S: u64 = 3;

/// What the command line asks for.
pub struct Wish {
    pub brokers: Vec<String>,
    pub stores: Vec<String>,
    pub contenders: Vec<String>,
    pub events: Option<u64>,
    pub size: usize,
    pub rounds: usize,
}

impl Wish {
    /// Events a round. Long enough that what a client fetched ahead counts for little; a queue is filled for each run.
    fn events(&self, broker: &str) -> u64 {
        self.events.unwrap_or(if broker == "rabbitmq" { 120_000 } else { 400_000 })
    }

    fn wants(&self, contender: &Contender) -> bool {
        let any = |names: &[String], name: &str| names.is_empty() || names.iter().any(|wanted| wanted == name);
        let with_level = contender.level.map(|level| format!("{}-{level}", contender.name)).unwrap_or_default();
        let store = contender.store == "none" || any(&self.stores, contender.store);
        store && (any(&self.contenders, contender.name) || any(&self.contenders, &with_level))
    }
}

/// One contender while it is measured.
struct Lane {
    contender: Contender,
    events: u64,
    outcomes: Vec<Outcome>,
}

pub async fn run(wish: &Wish, place: &Place) -> Result<Vec<Row>, Error> {
    let mut rows = Vec::new();
    for broker in &wish.brokers {
        let contenders: Vec<_> = contender::all(broker).into_iter().filter(|contender| wish.wants(contender)).collect();
        rows.extend(Bench::of_broker(broker, wish, place).await?.run(contenders).await?);
    }
    Ok(rows)
}

/// One broker.
pub struct Bench<'a> {
    pub broker: &'a str,
    pub feed: Feed,
    pub place: &'a Place,
    wish: &'a Wish,
    topic: String,
    runs: u32,
}

impl<'a> Bench<'a> {
    async fn of_broker(broker: &'a str, wish: &'a Wish, place: &'a Place) -> Result<Self, Error> {
        let mut feed = Feed::open(broker, &place.url(broker)?, false).await?;
        let topic = unique("topic");
        if broker != "rabbitmq" {
            eprintln!("{broker}: {} messages of {} bytes", wish.events(broker), wish.size);
            feed.create(&topic).await?;
            feed.fill(&topic, &Content::of(wish.size), 0..wish.events(broker)).await?;
        }
        Ok(Self { broker, feed, place, wish, topic, runs: 0 })
    }

    async fn run(mut self, contenders: Vec<Contender>) -> Result<Vec<Row>, Error> {
        let mut lanes = Vec::new();
        for contender in contenders {
            if !contender.is_built() {
                eprintln!("  {} is left out: it is not built", contender.title());
                continue;
            }
            let trial = match self.once(&contender, TRIAL.min(self.wish.events(self.broker))).await {
                Ok(trial) => trial,
                Err(error) => {
                    eprintln!("  {} is left out: {error}", contender.title());
                    continue;
                }
            };
            let per_second = trial.events as f64 / trial.seconds;
            let mut events = self.wish.events(self.broker);
            if events as f64 / per_second > ROUND_S_MAX {
                events = ((per_second * SHORT_ROUND_S) as u64).max(SHORT_ROUND_MIN).min(events);
                eprintln!("  {}: {events} events a round, more would take over {ROUND_S_MAX} s", contender.title());
            }
            lanes.push(Lane { contender, events, outcomes: Vec::new() });
        }
        for round in 1..=self.wish.rounds {
            for lane in &mut lanes {
                let title = lane.contender.title();
                match self.once(&lane.contender, lane.events).await {
                    Ok(outcome) => {
                        let rate = outcome.events as f64 / outcome.seconds;
                        let cpu = outcome.cpu_us_per_event;
                        eprintln!("  round {round}: {title:<34} {rate:>9.0}/s {cpu:>7.1} us CPU");
                        lane.outcomes.push(outcome);
                    }
                    Err(error) => eprintln!("  round {round}: {title:<34} counts for nothing: {error}"),
                }
            }
        }
        let mut rows = Vec::new();
        for lane in lanes.into_iter().filter(|lane| !lane.outcomes.is_empty()) {
            let mut row = Row::new(&lane.contender, self.wish.size, lane.events, &lane.outcomes);
            let offered_per_s = offered(row.events_per_s.median);
            match self.latency(&lane.contender, offered_per_s).await {
                Ok(found) => (row.p50_ms, row.p99_ms) = found.unzip(),
                Err(error) => eprintln!("  {error}"),
            }
            row.offered_per_s = (offered_per_s < PACE_PER_S).then_some(offered_per_s);
            rows.push(row);
        }
        self.feed.delete(&self.topic, "none").await;
        Ok(rows)
    }

    fn task(&mut self, events: u64) -> Task {
        self.runs += 1;
        Task { topic: self.topic.clone(), group: unique("group"), events, more: Vec::new() }
    }

    /// One run over the filled topic, or over a queue filled for it.
    async fn once(&mut self, contender: &Contender, events: u64) -> Result<Outcome, Error> {
        let mut task = self.task(events);
        if self.broker == "rabbitmq" {
            task.topic = unique("queue");
            self.feed.create(&task.topic).await?;
            self.feed.fill(&task.topic, &Content::of(self.wish.size), 0..events).await?;
        }
        let ended = contender::start(contender, self.place, &task)?.finish().await;
        if self.broker == "rabbitmq" {
            self.feed.delete(&task.topic, &task.group).await;
        } else {
            self.feed.delete_group(&task.topic, &task.group).await;
        }
        clean(contender, self.place, &task).await;
        Ok(ended?.0)
    }

    /// The time from sending to the handler at the pace of the latency columns.
    async fn latency(&mut self, contender: &Contender, per_second: u64) -> Result<Option<(f64, f64)>, Error> {
        let (outcome, _) = paced(contender, self.place, per_second, per_second * PACE_S, self.wish.size, &[]).await?;
        let found = outcome.p50_ms.zip(outcome.p99_ms);
        if let Some((p50, p99)) = found {
            eprintln!("  at {per_second}/s: {:<34} p50 {p50:.2} ms, p99 {p99:.2} ms", contender.title());
        }
        Ok(found)
    }
}

/// The rate of the latency columns for a contender that manages so many events a second.
fn offered(manages_per_s: f64) -> u64 {
    if manages_per_s >= 1.5 * PACE_PER_S as f64 { PACE_PER_S } else { (manages_per_s / 20.0).ceil() as u64 * 10 }
}

/// A contender, and messages that come at a pace while it runs.
pub async fn paced(
    contender: &Contender,
    place: &Place,
    per_second: u64,
    events: u64,
    size: usize,
    more: &[&str],
) -> Result<(Outcome, Option<compare_kit::Stages>), Error> {
    let broker = contender.broker.as_str();
    let mut feed = Feed::open(broker, &place.url(broker)?, true).await?;
    let more = ["--latency"].iter().chain(more).map(|&option| option.to_owned()).collect();
    let task = Task { topic: unique("paced"), group: unique("group"), events, more };
    feed.create(&task.topic).await?;
    let run: Run = contender::start(contender, place, &task)?;
    let paced = feed.pace(&task.topic, &Content::of(size), per_second, events, || run.is_ready()).await;
    let ended = match paced {
        Ok(()) => run.finish().await,
        Err(error) => Err(format!("{}: {error}", contender.title()).into()),
    };
    feed.delete(&task.topic, &task.group).await;
    clean(contender, place, &task).await;
    ended
}

/// What a contender leaves in a store: ids that would take room for days.
pub async fn clean(contender: &Contender, place: &Place, task: &Task) {
    if contender.store == "redis"
        && let Ok(url) = place.url("redis")
        && let Err(error) = forget(&url, &task.group).await
    {
        eprintln!("  ids of {} stay in Redis: {error}", task.group);
    }
}

async fn forget(url: &str, group: &str) -> Result<(), Error> {
    // Ten millions of ids keep the server busy for longer than a command may usually take.
    let unhurried = redis::AsyncConnectionConfig::new().set_response_timeout(None);
    let client = redis::Client::open(url)?;
    let mut connection = client.get_multiplexed_async_connection_with_config(&unhurried).await?;
    let pattern = format!("*{}*", group.replace('-', "?"));
    let mut cursor = 0_u64;
    loop {
        let mut scan = redis::cmd("SCAN");
        scan.arg(cursor).arg("MATCH").arg(&pattern).arg("COUNT").arg(5_000);
        let (next, keys): (u64, Vec<Vec<u8>>) = scan.query_async(&mut connection).await?;
        if !keys.is_empty() {
            redis::cmd("UNLINK").arg(keys).query_async::<()>(&mut connection).await?;
        }
        cursor = next;
        if cursor == 0 {
            return Ok(());
        }
    }
}

/// A name that nobody has.
pub fn unique(what: &str) -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let (process, number) = (std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
    let started = std::time::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs());
    format!("hapax-compare-{what}-{process}-{started}-{number}")
}
