//! `RedisPublisher`: the way into streams, pipelined.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use hapax::cloudevents::{Convention, encode, encode_structured};
use hapax::{Error, ErrorKind, Headers, Message, Outgoing, Publisher, Result};
use redis::{Cmd, Pipeline, Value};

use crate::broker::entry::DATA;
use crate::broker::places::{check_name, slot};
use crate::connect::{Link, RedisServer};

/// Most messages sent in one go.
const BATCH_MAX: usize = 256;
/// Most bytes sent in one go, unless one message alone is larger.
const BATCH_BYTES_MAX: usize = 4 << 20;

/// Publishes to Redis streams with `XADD`. Cheap to clone; connects when it is first used.
///
/// An answer of `Ok` means that the server has it as durably as it is configured (`appendonly`, `appendfsync`). A stream that
/// does not exist is created by its first message.
///
/// ```no_run
/// use hapax::{Message, Outgoing, Publisher};
/// use hapax_redis::{RedisPublisher, RedisServer};
///
/// # async fn publish() -> hapax::Result<()> {
/// let server = RedisServer::at("redis://127.0.0.1:6379".parse()?)?;
/// let publisher = RedisPublisher::new(server, "orders")?.keep_about(1_000_000);
/// let placed = Message::event("https://shop.example", "42", "com.shop.order.placed");
/// for answer in publisher.publish(vec![Outgoing::new(placed)]).await {
///     answer?;
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct RedisPublisher {
    server: RedisServer,
    link: Link,
    stream: Arc<str>,
    keep_about: Option<u64>,
    structured: bool,
}

impl RedisPublisher {
    /// Sends to `stream` what names no other.
    ///
    /// # Errors
    /// [`Configuration`](ErrorKind::Configuration) for a name that is none.
    pub fn new(server: RedisServer, stream: impl Into<Box<str>>) -> Result<Self> {
        let stream = stream.into();
        check_name("stream", &stream)?;
        let link = server.link();
        Ok(Self { server, link, stream: stream.into(), keep_about: None, structured: false })
    }

    /// Trims a stream to about so many entries with each message (`MAXLEN ~`). The server does not look whether an entry was
    /// processed: what is trimmed away before is lost, and told by the consumer only where it was pending. Without it nothing
    /// is trimmed.
    #[must_use]
    pub fn keep_about(mut self, entries: u64) -> Self {
        self.keep_about = Some(entries);
        self
    }

    /// Sends events in structured mode, as one JSON document each, instead of binary mode.
    #[must_use]
    pub fn structured(mut self) -> Self {
        self.structured = true;
        self
    }

    /// The command for one message, with the stream it goes to and its size.
    fn command(&self, outgoing: &Outgoing) -> Result<(Cmd, u16, usize)> {
        let stream = outgoing.to.as_deref().unwrap_or(&self.stream);
        check_name("to", stream).map_err(|error| rejected(error.to_string()))?;
        let (headers, body) = self.encode(&outgoing.message)?;
        if headers.get(DATA).is_some() {
            return Err(rejected(format!("a header cannot be called `{DATA}` on Redis: that field is the body")));
        }
        let bytes = body.len() + headers.bytes();
        let mut command = Cmd::with_capacity(8 + headers.len() * 2, bytes + 64);
        command.arg("XADD").arg(stream);
        if let Some(entries) = self.keep_about {
            command.arg("MAXLEN").arg("~").arg(entries);
        }
        command.arg("*");
        for (name, value) in headers.iter() {
            command.arg(name).arg(&value[..]);
        }
        command.arg(DATA).arg(&body[..]);
        Ok((command, if self.server.is_cluster() { slot(stream) } else { 0 }, bytes))
    }

    fn encode(&self, message: &Message) -> Result<(Headers, bytes::Bytes)> {
        if self.structured && message.defect().is_none() {
            return encode_structured(message, &Convention::REDIS);
        }
        Ok(encode(message, &Convention::REDIS))
    }

    /// Sends what has been gathered: one answer for each command.
    async fn send(&self, batch: &mut Batch, answers: &mut [Result<()>]) {
        if batch.places.is_empty() {
            return;
        }
        let pipeline = std::mem::take(&mut batch.pipeline);
        let places = std::mem::take(&mut batch.places);
        batch.bytes = 0;
        match self.link.pipeline("publish", &pipeline).await {
            Ok(replies) => {
                let mut replies = replies.into_iter();
                for at in places {
                    answers[at] = replies.next().map_or_else(|| Err(unanswered()), answer);
                }
            }
            Err(error) => {
                let text = crate::broker::text(&error);
                for at in places {
                    answers[at] = Err(Error::new(error.kind(), "publish").because(text.clone()));
                }
            }
        }
    }
}

/// What is gathered for one go: commands of one slot, and where their answers go.
#[derive(Default)]
struct Batch {
    pipeline: Pipeline,
    places: Vec<usize>,
    slot: u16,
    bytes: usize,
}

fn rejected(why: String) -> Error {
    Error::new(ErrorKind::Rejected, "publish").because(why)
}

fn unanswered() -> Error {
    Error::new(ErrorKind::Unknown, "publish").because("the server gave fewer answers than it was sent commands")
}

fn answer(reply: Value) -> Result<()> {
    reply.extract_error().map(drop).map_err(|failed| crate::error::error("publish", &failed))
}

#[async_trait]
impl Publisher for RedisPublisher {
    /// Dropping the future may have sent any part of the batch.
    async fn publish(&self, batch: Vec<Outgoing>) -> Vec<Result<()>> {
        let mut answers: Vec<Result<()>> = batch.iter().map(|_| Ok(())).collect();
        let mut gathered = Batch::default();
        for (at, outgoing) in batch.iter().enumerate() {
            let (command, slot, bytes) = match self.command(outgoing) {
                Ok(command) => command,
                Err(error) => {
                    answers[at] = Err(error);
                    continue;
                }
            };
            let full = gathered.places.len() >= BATCH_MAX || gathered.bytes + bytes > BATCH_BYTES_MAX;
            if full || gathered.slot != slot {
                self.send(&mut gathered, &mut answers).await;
            }
            gathered.slot = slot;
            gathered.bytes += bytes;
            gathered.pipeline.add_command(command);
            gathered.places.push(at);
        }
        self.send(&mut gathered, &mut answers).await;
        answers
    }
}

impl fmt::Debug for RedisPublisher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisPublisher")
            .field("server", &self.server)
            .field("stream", &self.stream)
            .field("keep_about", &self.keep_about)
            .field("structured", &self.structured)
            .finish_non_exhaustive()
    }
}
