//! Queues: their names, their arguments, and how they come to be.
//!
//! A wait queue has one time to live for all its messages, so that none waits behind another, and gives them back to the work
//! queue through the default exchange. It is a quorum queue that dead-letters *at least once*: the message stays until the work
//! queue has it. RabbitMQ drops a message that went in a circle without a rejection, but only when it comes a second time to a
//! queue that dead-lettered it: the work queue never does, since hapax acks there.

use std::time::Duration;

use hapax::{Error, Result};
use lapin::options::{QueueBindOptions, QueueDeclareOptions};
use lapin::protocol::AMQPSoftError;
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection};

use crate::deadline::within;
use crate::settings::Topology;
use crate::{error, wire};

/// The queues of one group.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    pub(crate) work: String,
    pub(crate) group: String,
    pub(crate) dead: String,
    /// Sorted, without equal ones, at least one.
    pub(crate) steps: Vec<Duration>,
    pub(crate) bindings: Vec<(String, String)>,
    pub(crate) delivery_limit: u32,
}

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Place {
    /// Where messages are consumed.
    Work,
    /// Where dead letters are set aside.
    Dead,
    /// Where messages wait this long.
    Wait(Duration),
}

impl Places {
    /// The shortest step that is not shorter than `after`.
    pub(crate) fn step(&self, after: Duration) -> Option<Duration> {
        self.steps.get(self.steps.partition_point(|step| *step < after)).copied()
    }

    pub(crate) fn longest_step(&self) -> Duration {
        self.steps.last().copied().unwrap_or_default()
    }

    pub(crate) fn name(&self, place: Place) -> String {
        match place {
            Place::Work => self.work.clone(),
            Place::Dead => self.dead.clone(),
            Place::Wait(step) if step.subsec_nanos() == 0 => {
                format!("{}.{}.retry.{}s", self.work, self.group, step.as_secs())
            }
            Place::Wait(step) => format!("{}.{}.retry.{}ms", self.work, self.group, step.as_millis()),
        }
    }

    pub(crate) fn waits(&self) -> impl Iterator<Item = Place> {
        self.steps.iter().copied().map(Place::Wait)
    }

    fn arguments(&self, place: Place) -> FieldTable {
        let text = |text: &str| AMQPValue::LongString(text.to_owned().into());
        let mut table = FieldTable::default();
        table.insert("x-queue-type".into(), text("quorum"));
        match place {
            // Also on the dead letters: a tool that looks at one and puts it back has delivered it, and RabbitMQ 4 drops it
            // after the twentieth look unless told otherwise.
            Place::Work | Place::Dead => {
                table.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(self.delivery_limit.into()));
            }
            Place::Wait(step) => {
                let ms = i64::try_from(step.as_millis()).unwrap_or(i64::MAX);
                table.insert("x-message-ttl".into(), AMQPValue::LongLongInt(ms));
                table.insert("x-dead-letter-exchange".into(), text(""));
                table.insert("x-dead-letter-routing-key".into(), text(&self.work));
                table.insert("x-dead-letter-strategy".into(), text("at-least-once"));
                table.insert("x-overflow".into(), text("reject-publish"));
            }
        }
        table
    }

    /// Creates or checks these, in order; stops at the first that fails.
    pub(crate) async fn ensure(
        &self,
        connection: &Connection,
        which: impl IntoIterator<Item = Place>,
        topology: Topology,
        patience: Duration,
    ) -> Result<()> {
        let channel = within(patience, "open", "channel.open", connection.create_channel()).await?;
        for place in which {
            self.declare(&channel, place, topology, patience).await?;
            if place == Place::Work && topology == Topology::Create {
                self.bind(&channel, patience).await?;
            }
        }
        // Left open it would be closed with the connection; what it answers changes nothing.
        let _ = within(patience, "open", "channel.close", channel.close(200, "done".into())).await;
        Ok(())
    }

    async fn declare(&self, channel: &Channel, place: Place, topology: Topology, patience: Duration) -> Result<u32> {
        let name = self.name(place);
        let passive = topology == Topology::Check;
        let options = QueueDeclareOptions { passive, durable: true, ..QueueDeclareOptions::default() };
        let arguments = if passive { FieldTable::default() } else { self.arguments(place) };
        let declaring = channel.queue_declare(wire::short(&name)?, options, arguments);
        match tokio::time::timeout(patience, declaring).await {
            Ok(Ok(queue)) => Ok(queue.message_count()),
            Ok(Err(e)) => Err(refused(&e, &name, topology)),
            Err(_) => Err(error::no_answer("open", "queue.declare", patience)),
        }
    }

    async fn bind(&self, channel: &Channel, patience: Duration) -> Result<()> {
        for (exchange, key) in &self.bindings {
            let (work, from, key) = (wire::short(&self.work)?, wire::short(exchange)?, wire::short(key)?);
            let binding = channel.queue_bind(work, from, key, QueueBindOptions::default(), FieldTable::default());
            within(patience, "open", "queue.bind", binding).await.map_err(|e| {
                let why = format!("queue `{}` cannot be bound to exchange `{exchange}`: {e}", self.work);
                Error::new(e.kind(), "open").because(why)
            })?;
        }
        Ok(())
    }

    /// Messages that wait, in all wait queues together. Those that do not exist hold none.
    pub(crate) async fn waiting(&self, connection: &Connection, patience: Duration) -> Result<u64> {
        let mut count = 0;
        let mut channel = None;
        for place in self.waits() {
            let usable = match channel.take() {
                Some(channel) => channel,
                None => within(patience, "count", "channel.open", connection.create_channel()).await?,
            };
            let name = wire::short(&self.name(place))?;
            let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
            match tokio::time::timeout(patience, usable.queue_declare(name, options, FieldTable::default())).await {
                Ok(Ok(queue)) => {
                    count += u64::from(queue.message_count());
                    channel = Some(usable);
                }
                // The server has closed the channel.
                Ok(Err(e)) if error::soft(&e) == Some(AMQPSoftError::NOTFOUND) => {}
                Ok(Err(e)) => return Err(error::of(&e, "count")),
                Err(_) => return Err(error::no_answer("count", "queue.declare", patience)),
            }
        }
        Ok(count)
    }
}

/// Why a queue could not be declared, and the remedy.
fn refused(e: &lapin::Error, name: &str, topology: Topology) -> Error {
    let why = match (error::soft(e), topology) {
        (Some(AMQPSoftError::PRECONDITIONFAILED), _) => format!(
            "queue `{name}` exists with other arguments: {}. Take it as it is with .topology(Topology::Check), or delete \
             it so that it is created anew",
            error::text(e)
        ),
        (Some(AMQPSoftError::NOTFOUND), Topology::Check) => format!(
            "queue `{name}` does not exist. Create it (docs/rabbitmq.md lists the arguments), or let hapax do so with \
             .topology(Topology::Create) or RabbitBroker::declare"
        ),
        (Some(AMQPSoftError::ACCESSREFUSED), _) => format!(
            "the user may not declare queue `{name}`: {}. Grant the rights of docs/rabbitmq.md, or create the queues by \
             another user and take .topology(Topology::Check)",
            error::text(e)
        ),
        (Some(AMQPSoftError::RESOURCELOCKED), _) => {
            format!("queue `{name}` is exclusive to another connection; take another name")
        }
        _ => format!("queue `{name}`: {}", error::text(e)),
    };
    Error::new(error::of(e, "open").kind(), "open").because(why)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(steps: &[u64]) -> Places {
        Places {
            work: "orders".into(),
            group: "billing".into(),
            dead: "orders.billing.dead".into(),
            steps: steps.iter().copied().map(Duration::from_millis).collect(),
            bindings: Vec::new(),
            delivery_limit: 7,
        }
    }

    #[test]
    fn a_delay_is_rounded_up_to_a_step_and_never_down() {
        let places = places(&[1_000, 2_500]);
        let step = |ms| places.step(Duration::from_millis(ms)).map(|step| step.as_millis());
        assert_eq!(
            [step(0), step(1_000), step(1_001), step(2_500)],
            [Some(1_000), Some(1_000), Some(2_500), Some(2_500)]
        );
        assert_eq!(step(2_501), None);
    }

    #[test]
    fn names_say_whose_they_are() {
        let places = places(&[1_000, 2_500]);
        let names: Vec<_> =
            [Place::Work, Place::Dead].into_iter().chain(places.waits()).map(|p| places.name(p)).collect();
        assert_eq!(names, ["orders", "orders.billing.dead", "orders.billing.retry.1s", "orders.billing.retry.2500ms"]);
    }

    /// Per-message times to live would make short delays wait behind long ones.
    #[test]
    fn a_wait_queue_has_one_time_to_live_and_loses_nothing_on_the_way_back() {
        let table = places(&[1_000]).arguments(Place::Wait(Duration::from_secs(1)));
        let text = |name: &str| table.inner().get(name).and_then(AMQPValue::as_long_string).map(ToString::to_string);
        assert_eq!(table.inner().get("x-message-ttl"), Some(&AMQPValue::LongLongInt(1_000)));
        assert_eq!(text("x-dead-letter-strategy").as_deref(), Some("at-least-once"));
        assert_eq!(text("x-overflow").as_deref(), Some("reject-publish"));
        assert_eq!(text("x-dead-letter-exchange").as_deref(), Some(""));
        assert_eq!(text("x-dead-letter-routing-key").as_deref(), Some("orders"));
    }
}
