//! Measures hapax beside what a user would pick instead. Started by `scripts/bench`, which builds the contenders and starts
//! the servers.

#![allow(clippy::disallowed_methods, reason = "benchmarks measure the real clock")]

mod compare;
mod contender;
mod feed;
mod figures;
mod growth;
mod latency;
mod page;
mod svg;

use std::collections::HashSet;
use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::{Args, Parser, Subcommand};
use contender::Place;
use feed::Error;
use page::{Docs, Kept};

/// Runs each contender in turn over the same messages, several rounds interleaved.
#[derive(Debug, Parser)]
#[command(name = "scripts/bench", args_conflicts_with_subcommands = true)]
struct Options {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    compare: Compare,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Events/s and memory against what grows
    Growth(Growth),
    /// Latency at offered rates
    Latency(Latency),
    /// Writes docs/performance.md from the figures that are kept
    Docs,
}

#[derive(Debug, Args)]
struct Compare {
    /// kafka, rabbitmq, redis; all three if none is named
    #[arg(long, num_args = 1.., value_delimiter = ',')]
    broker: Vec<String>,
    /// memory, redis, postgres, sqlite; all if none is named. Contenders without a store run in any case
    #[arg(long, num_args = 1.., value_delimiter = ',')]
    store: Vec<String>,
    /// raw, batched, by-hand, by-hand-tx, mq-bridge, ruststream, watermill, hapax, or hapax at one level: hapax-L2
    #[arg(long, num_args = 1.., value_delimiter = ',')]
    contender: Vec<String>,
    /// Events a round [default: 400000, on RabbitMQ 120000]
    #[arg(long)]
    events: Option<u64>,
    /// Bytes of a message, at least 37
    #[arg(long, default_value_t = 256)]
    size: usize,
    /// Rounds; medians are printed, with the smallest and the largest
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Writes the figures here, as a JSON array, and as tables beside it with the ending .md
    #[arg(long)]
    json: Option<PathBuf>,
    /// Keeps the figures in docs/performance, those of other brokers too, and writes docs/performance.md
    #[arg(long)]
    docs: bool,
}

#[derive(Debug, Args)]
struct Growth {
    /// All if none is named
    #[arg(value_parser = PossibleValuesParser::new(growth::NAMES))]
    names: Vec<String>,
    #[arg(long, default_value = "kafka")]
    broker: String,
    /// All if none is named
    #[arg(long, value_delimiter = ',', value_parser = PossibleValuesParser::new(growth::STORES))]
    store: Vec<String>,
    /// Events a round
    #[arg(long, default_value_t = 50_000)]
    events: u64,
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// The most ids in a store
    #[arg(long, default_value_t = 10_000_000)]
    remembered_max: u64,
    /// Keeps the figures in docs/performance, those of other names and stores too, and writes docs/performance.md
    #[arg(long)]
    docs: bool,
}

#[derive(Debug, Args)]
struct Latency {
    /// kafka, rabbitmq, redis; all three if none is named
    #[arg(long, num_args = 1.., value_delimiter = ',')]
    broker: Vec<String>,
    /// Bytes of a message
    #[arg(long, default_value_t = 256)]
    size: usize,
    /// Keeps the figures in docs/performance, those of other brokers too, and writes docs/performance.md
    #[arg(long)]
    docs: bool,
}

#[tokio::main(worker_threads = 2)]
async fn main() -> Result<(), Error> {
    let options = Options::parse();
    let folder = std::env::temp_dir().join(compare::unique("sqlite"));
    std::fs::create_dir_all(&folder)?;
    let place = Place { folder };
    let ended = match options.command {
        None => of_all(options.compare, &place).await,
        Some(Command::Growth(options)) => of_growth(options, &place).await,
        Some(Command::Latency(options)) => of_latency(options, &place).await,
        Some(Command::Docs) => Docs::here().and_then(|docs| docs.write()),
    };
    std::fs::remove_dir_all(&place.folder)?;
    ended
}

fn brokers(named: Vec<String>) -> Vec<String> {
    if named.is_empty() { ["kafka", "rabbitmq", "redis"].map(String::from).into() } else { named }
}

async fn of_all(options: Compare, place: &Place) -> Result<(), Error> {
    let load_before = page::load();
    let Compare { broker, store, contender, events, size, rounds, json, docs } = options;
    let wish = compare::Wish { brokers: brokers(broker), stores: store, contenders: contender, events, size, rounds };
    let rows = compare::run(&wish, place).await?;
    let text = figures::markdown(&rows);
    println!("{text}");
    if let Some(file) = json {
        std::fs::write(&file, serde_json::to_string_pretty(&rows)? + "\n")?;
        std::fs::write(file.with_extension("md"), text)?;
    }
    if docs {
        let docs = Docs::here()?;
        let before = docs.kept::<figures::Row>("compare").map(|kept| kept.figures).unwrap_or_default();
        let mut all: Vec<_> =
            before.into_iter().filter(|row| !wish.brokers.contains(&row.broker)).chain(rows).collect();
        all.sort_by(|a, b| a.broker.cmp(&b.broker));
        docs.keep("compare", &kept(load_before, None, rounds, all))?;
        docs.write()?;
    }
    Ok(())
}

async fn of_growth(options: Growth, place: &Place) -> Result<(), Error> {
    let load_before = page::load();
    let Growth { names, broker, store: stores, events, rounds, remembered_max, docs } = options;
    let is_part = !names.is_empty() || !stores.is_empty();
    let wish = growth::Wish { names, broker, stores, events, rounds, remembered_max };
    let mut points = growth::run(&wish, place).await?;
    if docs {
        let docs = Docs::here()?;
        let before = docs.kept::<growth::Point>("growth").map(|kept| kept.figures).unwrap_or_default();
        let lines: HashSet<_> = points.iter().map(growth::Point::line).collect();
        points.extend(before.into_iter().filter(|point| is_part && !lines.contains(&point.line())));
        docs.keep("growth", &kept(load_before, Some(events), rounds, points))?;
        docs.write()?;
    }
    Ok(())
}

async fn of_latency(options: Latency, place: &Place) -> Result<(), Error> {
    let load_before = page::load();
    let named = brokers(options.broker);
    let found = latency::run(&named, options.size, place).await?;
    if options.docs {
        let docs = Docs::here()?;
        let before = docs.kept::<latency::Latency>("latency").map(|kept| kept.figures).unwrap_or_default();
        let mut all: Vec<_> = before.into_iter().filter(|row| !named.contains(&row.broker)).chain(found).collect();
        all.sort_by(|a, b| a.broker.cmp(&b.broker));
        docs.keep("latency", &kept(load_before, Some(latency::SECONDS * 1_000), 1, all))?;
        docs.write()?;
    }
    Ok(())
}

fn kept<T>(load_before: String, events: Option<u64>, rounds: usize, figures: Vec<T>) -> Kept<T> {
    Kept { machine: page::machine(), load_before, load_after: page::load(), events, rounds, figures }
}
