//! How events/s and memory grow: with ids that are remembered, handlers at once, the size of a message, the share of
//! duplicates, keys in order, worker processes; and what a stopped handler lets a process hold.

use std::time::Instant;

use compare_kit::Outcome;
use serde::{Deserialize, Serialize};

use crate::compare::{clean, unique};
use crate::contender::{self, Contender, Place, Task};
use crate::feed::{Content, Error, Feed};
use crate::figures::Spread;

pub const NAMES: [&str; 7] = ["remembered", "concurrency", "payload", "duplicates", "keys", "workers", "stopped"];

pub const STORES: [&str; 4] = ["memory", "redis", "postgres", "sqlite"];

/// Bytes of a filled topic, at most.
const TOPIC_BYTES_MAX: u64 = 200 << 20;

/// One point of a curve.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Point {
    /// Which curve: one of [`NAMES`].
    pub growth: String,
    /// Which line of it: the store.
    pub series: String,
    /// Over what.
    pub x: f64,
    pub events_per_s: Spread,
    pub cpu_us_per_event: f64,
    /// The most memory of one process.
    pub peak_mib: f64,
    /// What the store holds on disk, where that can be asked for.
    pub store_mib: Option<f64>,
}

impl Point {
    /// The curve and the line of it on which it lies.
    pub fn line(&self) -> (String, String) {
        (self.growth.clone(), self.series.clone())
    }
}

pub struct Wish {
    pub names: Vec<String>,
    pub broker: String,
    pub stores: Vec<String>,
    pub events: u64,
    pub rounds: usize,
    pub remembered_max: u64,
}

pub struct Growth<'a> {
    wish: &'a Wish,
    place: &'a Place,
    feed: Feed,
    points: Vec<Point>,
}

pub async fn run(wish: &Wish, place: &Place) -> Result<Vec<Point>, Error> {
    let feed = Feed::open(&wish.broker, &place.url(&wish.broker)?, false).await?;
    let mut growth = Growth { wish, place, feed, points: Vec::new() };
    for name in NAMES.into_iter().filter(|name| wish.names.is_empty() || wish.names.iter().any(|wanted| wanted == name))
    {
        eprintln!("growth of {name}");
        let ended = match name {
            "remembered" => growth.remembered().await,
            "concurrency" => growth.concurrency().await,
            "payload" => growth.payload().await,
            "duplicates" => growth.duplicates().await,
            "keys" => growth.keys().await,
            "workers" => growth.workers().await,
            _ => growth.stopped().await,
        };
        // What was measured so far is kept, and the other curves are drawn.
        if let Err(error) = ended {
            eprintln!("  growth of {name} ends here: {error}");
        }
    }
    Ok(growth.points)
}

/// What a server of Redis holds in all.
async fn used_mib(url: &str) -> Result<f64, Error> {
    let mut connection = redis::Client::open(url)?.get_multiplexed_async_connection().await?;
    let told: String = redis::cmd("INFO").arg("memory").query_async(&mut connection).await?;
    let used = told.lines().find_map(|line| line.strip_prefix("used_memory:")?.trim().parse::<f64>().ok());
    Ok(used.ok_or("Redis does not tell used_memory")? / 1_048_576.0)
}

fn option(name: &str, value: u64) -> [String; 2] {
    [name.to_owned(), value.to_string()]
}

impl Growth<'_> {
    /// Those of them that are wanted.
    fn stores<const N: usize>(&self, of: [&'static str; N]) -> Vec<&'static str> {
        let wanted = &self.wish.stores;
        of.into_iter().filter(|store| wanted.is_empty() || wanted.iter().any(|wanted| wanted == store)).collect()
    }

    fn hapax(&self, store: &'static str) -> Contender {
        Contender::hapax(&self.wish.broker, store, if store == "memory" { "L1" } else { "L2" })
    }

    fn note(&mut self, growth: &str, contender: &Contender, x: f64, outcomes: &[Outcome]) {
        let middle = |of: fn(&Outcome) -> f64| Spread::of(outcomes.iter().map(of)).median;
        let point = Point {
            growth: growth.to_owned(),
            series: contender.store.to_owned(),
            x,
            events_per_s: Spread::of(outcomes.iter().map(|outcome| outcome.events as f64 / outcome.seconds)),
            cpu_us_per_event: middle(|outcome| outcome.cpu_us_per_event),
            peak_mib: middle(|outcome| outcome.peak_mib),
            store_mib: outcomes.iter().rev().find_map(|outcome| outcome.store_mib),
        };
        eprintln!(
            "  {:<10} {x:>9}: {:>8.0}/s, {:.1} us CPU, {:.0} MiB",
            point.series, point.events_per_s.median, point.cpu_us_per_event, point.peak_mib
        );
        self.points.push(point);
    }

    /// Fills a topic with these numbers and lets one consumer take them.
    async fn once(
        &mut self,
        contender: &Contender,
        content: &Content,
        numbers: std::ops::Range<u64>,
        group: &str,
        more: Vec<String>,
    ) -> Result<Outcome, Error> {
        let topic = unique("growth");
        self.feed.create(&topic).await?;
        let messages = numbers.end - numbers.start;
        self.feed.fill(&topic, content, numbers).await?;
        let events = if content.duplicates > 0.0 { content.distinct(messages) } else { messages };
        let task = Task { topic, group: group.to_owned(), events, more };
        let ended = contender::start(contender, self.place, &task)?.finish().await;
        self.feed.delete(&task.topic, group).await;
        Ok(ended?.0)
    }

    async fn rounds(&mut self, growth: &str, contender: &Contender, content: &Content, x: f64) -> Result<(), Error> {
        let messages = self.wish.events.min(TOPIC_BYTES_MAX / content.size as u64);
        let mut outcomes = Vec::new();
        for _ in 0..self.wish.rounds {
            let group = unique("group");
            let more = option("--messages", messages).into();
            outcomes.push(self.once(contender, content, 0..messages, &group, more).await?);
            clean(contender, self.place, &Task { group, ..Task::default() }).await;
        }
        self.note(growth, contender, x, &outcomes);
        Ok(())
    }

    async fn remembered(&mut self) -> Result<(), Error> {
        for store in self.stores(STORES) {
            if let Err(error) = self.remembered_in(store).await {
                eprintln!("  {store}: {error}");
            }
        }
        Ok(())
    }

    async fn remembered_in(&mut self, store: &'static str) -> Result<(), Error> {
        let contender = self.hapax(store);
        let group = unique("group");
        let (mut filled, mut seen, mut wanted) = (0, 0, 10_000);
        while wanted <= self.wish.remembered_max {
            let began = Instant::now();
            let more: Vec<_> = if store == "memory" {
                // Empty in every process.
                option("--remember", wanted).into()
            } else {
                let fill = [option("--remember", wanted - filled), option("--remember-from", filled)].concat();
                let more = [fill, vec!["--keep".to_owned()]].concat();
                // Handled by the process that fills the store, after that: so many that what a database does once after a
                // checkpoint, the first write to each page of an index, is not taken for the cost of an event.
                let numbers = seen..seen + (wanted / 50).max(1_000);
                self.once(&contender, &Content::of(256), numbers.clone(), &group, more).await?;
                (filled, seen) = (wanted, numbers.end);
                eprintln!("  {store:<10} {wanted:>9}: filled in {:.0} s", began.elapsed().as_secs_f64());
                vec!["--keep".to_owned()]
            };
            let mut outcomes = Vec::new();
            for _ in 0..self.wish.rounds {
                let numbers = seen..seen + self.wish.events;
                seen = numbers.end;
                let mut outcome = self.once(&contender, &Content::of(256), numbers, &group, more.clone()).await?;
                if store == "redis" {
                    outcome.store_mib = Some(used_mib(&self.place.url("redis")?).await?);
                }
                outcomes.push(outcome);
            }
            self.note("remembered", &contender, wanted as f64, &outcomes);
            wanted *= 10;
        }
        // Without --keep the last run drops what the store holds.
        if store != "redis" && store != "memory" {
            self.once(&contender, &Content::of(256), seen..seen + 100, &group, Vec::new()).await?;
        }
        clean(&contender, self.place, &Task { group, ..Task::default() }).await;
        Ok(())
    }

    async fn concurrency(&mut self) -> Result<(), Error> {
        for store in self.stores(STORES) {
            for concurrency in [1, 4, 16, 64, 256, 1_024] {
                let contender = Contender { concurrency, ..self.hapax(store) };
                // One at a time is thousands of round trips.
                let share = match concurrency {
                    1 => 50,
                    4 => 20,
                    16 => 10,
                    _ => 1,
                };
                let wish = Wish { events: (self.wish.events / share).max(100), ..self.wish.copy() };
                let mut part = Growth { wish: &wish, place: self.place, feed: self.again().await?, points: Vec::new() };
                part.rounds("concurrency", &contender, &Content::of(256), concurrency as f64).await?;
                self.points.append(&mut part.points);
            }
        }
        Ok(())
    }

    async fn again(&self) -> Result<Feed, Error> {
        Feed::open(&self.wish.broker, &self.place.url(&self.wish.broker)?, false).await
    }

    async fn payload(&mut self) -> Result<(), Error> {
        for store in self.stores(["memory", "redis", "postgres"]) {
            for size in [64, 256, 1_024, 4_096, 16_384, 65_536] {
                let contender = self.hapax(store);
                self.rounds("payload", &contender, &Content::of(size), size as f64).await?;
            }
        }
        Ok(())
    }

    async fn duplicates(&mut self) -> Result<(), Error> {
        for store in self.stores(STORES) {
            for duplicates in [0.0, 0.1, 0.9] {
                let contender = self.hapax(store);
                let content = Content { duplicates, ..Content::of(256) };
                self.rounds("duplicates", &contender, &content, duplicates * 100.0).await?;
            }
        }
        Ok(())
    }

    async fn keys(&mut self) -> Result<(), Error> {
        for store in self.stores(["memory", "redis", "postgres"]) {
            for keys in [1, 16, 256, 4_096, 65_536] {
                let contender = Contender { by_key: true, ..self.hapax(store) };
                // So many lanes are as many at once.
                let share = match keys {
                    1 => 50,
                    16 => 10,
                    _ => 1,
                };
                let wish = Wish { events: (self.wish.events / share).max(100), ..self.wish.copy() };
                let mut part = Growth { wish: &wish, place: self.place, feed: self.again().await?, points: Vec::new() };
                part.rounds("keys", &contender, &Content { keys, ..Content::of(256) }, keys as f64).await?;
                self.points.append(&mut part.points);
            }
        }
        Ok(())
    }

    /// So many processes of one group: they are there before the first message is.
    async fn workers(&mut self) -> Result<(), Error> {
        for store in self.stores(["redis", "postgres"]) {
            for workers in [1_usize, 2, 4] {
                let contender = self.hapax(store);
                let mut outcomes = Vec::new();
                for _ in 0..self.wish.rounds {
                    outcomes.push(self.together(&contender, workers).await?);
                }
                self.note("workers", &contender, workers as f64, &outcomes);
            }
        }
        Ok(())
    }

    async fn together(&mut self, contender: &Contender, workers: usize) -> Result<Outcome, Error> {
        const JOIN_S: u64 = 6;
        let task = Task {
            topic: unique("growth"),
            group: unique("group"),
            events: self.wish.events,
            more: vec!["--until-idle".into(), "--keep".into()],
        };
        self.feed.create(&task.topic).await?;
        let mut runs = Vec::new();
        for _ in 0..workers {
            runs.push(contender::start(contender, self.place, &task)?);
            // One after the other creates what the store needs.
            tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        }
        tokio::time::sleep(std::time::Duration::from_secs(JOIN_S)).await;
        self.feed.fill(&task.topic, &Content::of(256), 0..task.events).await?;
        let (mut first, mut last, mut events, mut cpu_us, mut peak_mib) = (u64::MAX, 0, 0, 0.0, 0.0_f64);
        for run in runs {
            let (outcome, _) = run.finish().await?;
            if outcome.events > 0 {
                first = first.min(outcome.first_us);
                last = last.max(outcome.last_us);
            }
            events += outcome.events;
            cpu_us += outcome.cpu_us_per_event * outcome.events as f64;
            peak_mib = peak_mib.max(outcome.peak_mib);
        }
        self.feed.delete(&task.topic, &task.group).await;
        clean(contender, self.place, &task).await;
        if contender.store != "redis" {
            // A run without --keep drops what the store holds.
            let group = task.group.clone();
            self.once(contender, &Content::of(256), task.events..task.events + 100, &group, Vec::new()).await?;
        }
        Ok(Outcome {
            events,
            seconds: last.saturating_sub(first) as f64 / 1e6,
            cpu_us_per_event: cpu_us / events.max(1) as f64,
            peak_mib,
            ..Outcome::default()
        })
    }

    /// Handlers that never return: what a process holds then, by how much may be in flight. The topic has far more.
    async fn stopped(&mut self) -> Result<(), Error> {
        const SIZE: usize = 4_096;
        for store in self.stores(["memory"]) {
            for in_flight in [256, 1_024, 4_096, 16_384] {
                let contender = Contender { in_flight, concurrency: 64, ..self.hapax(store) };
                let messages = TOPIC_BYTES_MAX / SIZE as u64;
                let more = vec!["--stopped".to_owned()];
                let group = unique("group");
                let outcome = self.once(&contender, &Content::of(SIZE), 0..messages, &group, more).await?;
                self.note("stopped", &contender, in_flight as f64, &[outcome]);
            }
        }
        Ok(())
    }
}

impl Wish {
    fn copy(&self) -> Self {
        Self { names: Vec::new(), broker: self.broker.clone(), stores: self.stores.clone(), ..*self }
    }
}
