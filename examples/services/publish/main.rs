//! Publishes CloudEvents, one JSON document a line, to a topic, stream or queue of any broker.
//!
//! `--duplicates 0.2` sends every fifth event twice, as producers do that heard no answer. A line that is no event is told
//! with its number and not sent.
//!
//! Exit codes: 0 when every line was sent, 1 when some were not, 2 when it cannot go on.

mod lines;
mod target;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use bytes::Bytes;
use clap::{Parser, ValueEnum};
use hapax::{Message, MessageLimits, Outgoing, Publisher, SecretUrl};
use lines::Line;
use target::BrokerKind;
use tokio::time::Instant;

/// Most lines that are sent together.
const BATCH_MAX: usize = 256;
/// How long a broker that does not answer is tried again.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between two tries.
const PAUSE: Duration = Duration::from_millis(500);

/// Publishes CloudEvents, one JSON document a line.
#[derive(Debug, Parser)]
struct Options {
    /// Where they go
    #[arg(long)]
    broker: BrokerKind,
    /// The broker's address: redis://host:6379, amqp://user:password@host:5672/vhost, kafka://host:9092
    #[arg(long, value_name = "URL")]
    url: Option<SecretUrl>,
    /// The topic (Kafka), the stream (Redis) or the queue (RabbitMQ); it must be there
    #[arg(long, value_name = "NAME")]
    topic: String,
    /// CloudEvents, one JSON document a line; `-` reads standard input
    #[arg(long, value_name = "FILE|-")]
    events: PathBuf,
    /// The share of events that are sent twice, from 0 to 1
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = share)]
    duplicates: f64,
    /// How an event travels: its attributes as headers, or all of it as one document
    #[arg(long, value_enum, default_value_t = Mode::Binary)]
    mode: Mode,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    Binary,
    Structured,
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().map_err(|_| "a number from 0 to 1, such as 0.2".to_owned())?;
    if (0.0..=1.0).contains(&share) { Ok(share) } else { Err("a share goes from 0 to 1".to_owned()) }
}

/// What became of the events.
#[derive(Debug, Default)]
struct Counts {
    sent: u64,
    twice: u64,
    failed: u64,
    /// How much of a duplicate is due.
    due: f64,
}

/// An event on its way.
#[derive(Clone, Debug)]
struct Event {
    /// Of its line, from 1.
    number: u64,
    is_duplicate: bool,
    outgoing: Outgoing,
}

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    let mut counts = Counts::default();
    let ended = publish(&options, &mut counts).await;
    let Counts { sent, twice, failed, .. } = counts;
    println!("sent {} messages: {sent} events, {twice} of them twice; {failed} not sent", sent + twice);
    match ended {
        Ok(()) if failed == 0 => ExitCode::SUCCESS,
        Ok(()) => ExitCode::FAILURE,
        Err(why) => {
            eprintln!("publish: {why}");
            ExitCode::from(2)
        }
    }
}

async fn publish(options: &Options, counts: &mut Counts) -> Result<(), String> {
    let publisher = target::publisher(options.broker, options.url.as_ref(), &options.topic)?;
    let mut lines = lines::read(&options.events, MessageLimits::DEFAULT.body_max)?;
    let mut batch = Vec::new();
    while lines.recv_many(&mut batch, BATCH_MAX).await > 0 {
        let mut events = Vec::new();
        for line in batch.drain(..) {
            let Line { number, bytes } = line.map_err(|error| format!("the events cannot be read further: {error}"))?;
            match message(bytes.into(), options.mode) {
                Ok(message) => {
                    let outgoing = Outgoing::new(message).to(&*options.topic);
                    events.push(Event { number, is_duplicate: false, outgoing });
                }
                Err(why) => {
                    eprintln!("line {number}: {why}");
                    counts.failed += 1;
                }
            }
        }
        counts.repeat(&mut events, options.duplicates);
        counts.deliver(&*publisher, events).await?;
    }
    Ok(())
}

impl Counts {
    /// Adds the duplicates that are due, behind the events they repeat.
    fn repeat(&mut self, events: &mut Vec<Event>, share: f64) {
        for index in 0..events.len() {
            self.due += share;
            // Sums of shares fall short of whole numbers by a hair.
            if self.due > 1.0 - 1e-9 {
                self.due -= 1.0;
                events.push(Event { is_duplicate: true, ..events[index].clone() });
            }
        }
    }

    /// Sends all, again where the broker does not answer: consumers know a repeated message as a duplicate. Gives up when
    /// nothing at all was taken for so long.
    async fn deliver(&mut self, publisher: &dyn Publisher, mut events: Vec<Event>) -> Result<(), String> {
        let mut trouble = None;
        while !events.is_empty() {
            let answers = publisher.publish(events.iter().map(|event| event.outgoing.clone()).collect()).await;
            let (mut again, mut why, taken) = (Vec::new(), None, self.sent + self.twice);
            for (event, answer) in events.into_iter().zip(answers) {
                match answer {
                    Ok(()) if event.is_duplicate => self.twice += 1,
                    Ok(()) => self.sent += 1,
                    Err(error) if error.is_retryable() => {
                        why = Some(error.to_string());
                        again.push(event);
                    }
                    Err(error) => {
                        eprintln!("line {}: {error}", event.number);
                        self.failed += 1;
                    }
                }
            }
            events = again;
            let Some(why) = why else { continue };
            if taken < self.sent + self.twice {
                trouble = None;
            }
            let since = *trouble.get_or_insert_with(|| {
                eprintln!("trying again for {PATIENCE:?}: {why}");
                Instant::now()
            });
            if since.elapsed() >= PATIENCE {
                self.failed += events.len() as u64;
                return Err(format!("from line {} on nothing is taken: {why}", events[0].number));
            }
            tokio::time::sleep(PAUSE).await;
        }
        Ok(())
    }
}

/// What travels. In structured mode the line itself, byte for byte: a document whose content type says what it is.
fn message(line: Bytes, mode: Mode) -> Result<Message, String> {
    let event = Message::from_structured_json(line.clone(), &MessageLimits::DEFAULT);
    if let Some(defect) = event.defect() {
        return Err(defect.to_string());
    }
    if mode == Mode::Binary {
        return Ok(event);
    }
    let mut document = Message::default().with_data("application/cloudevents+json", line);
    document.attributes.partition_key = event.attributes.partition_key;
    Ok(document)
}
