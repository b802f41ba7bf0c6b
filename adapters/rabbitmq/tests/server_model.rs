//! The model of a queue and its channels (`hapax_testkit::servers::queue`) against the server: generated commands, the same
//! answers. What the adapter takes for granted is what the server does.

use std::collections::BTreeMap;
use std::time::Duration;

use hapax_testkit::servers::Server;
use hapax_testkit::servers::queue::{Answer, Command, Queue};
use lapin::options::{
    BasicAckOptions, BasicGetOptions, BasicNackOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions,
    QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

#[derive(Clone, Debug)]
enum Step {
    Get(u8),
    Ask(Command),
}

fn step() -> impl Strategy<Value = Step> {
    let (channel, tag) = (1u8..4, 1u64..6);
    prop_oneof![
        4 => Just(Step::Ask(Command::Publish)),
        5 => channel.clone().prop_map(Step::Get),
        3 => (channel.clone(), tag.clone(), any::<bool>())
            .prop_map(|(channel, tag, multiple)| Step::Ask(Command::Ack { channel, tag, multiple })),
        2 => (channel.clone(), tag).prop_map(|(channel, tag)| Step::Ask(Command::GiveBack { channel, tag })),
        1 => channel.prop_map(|channel| Step::Ask(Command::Reopen { channel })),
    ]
}

/// The server's side: a queue of its own, and its channels by number.
struct Real {
    connection: Connection,
    publishing: Channel,
    channels: BTreeMap<u8, Channel>,
    queue: String,
    published: u64,
}

impl Real {
    async fn new(queue: String) -> Self {
        let connection = Connection::connect(&Server::RabbitMq.url(), ConnectionProperties::default())
            .await
            .expect("RabbitMQ answers");
        let publishing = connection.create_channel().await.expect("a channel");
        publishing.confirm_select(ConfirmSelectOptions::default()).await.expect("confirms");
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        let durable = QueueDeclareOptions { durable: true, ..Default::default() };
        publishing.queue_declare(queue.as_str().into(), durable, arguments).await.expect("a queue");
        Self { connection, publishing, channels: BTreeMap::new(), queue, published: 0 }
    }

    async fn channel(&mut self, number: u8) -> Channel {
        if let Some(channel) = self.channels.get(&number) {
            return channel.clone();
        }
        let channel = self.connection.create_channel().await.expect("a channel");
        self.channels.insert(number, channel.clone());
        channel
    }

    /// Whether the channel lives behind a command that closes it where the tag is not known: the server answers nothing to
    /// those that it takes, so it is asked something else.
    async fn settled(&mut self, number: u8) -> Answer {
        let channel = self.channel(number).await;
        let passive = QueueDeclareOptions { passive: true, ..Default::default() };
        match channel.queue_declare(self.queue.as_str().into(), passive, FieldTable::default()).await {
            Ok(_) => Answer::Done,
            Err(_) => {
                self.channels.remove(&number);
                Answer::Closed
            }
        }
    }

    /// Message, tag, and whether it was delivered before.
    async fn get(&mut self, channel: u8) -> Option<(u64, u64, bool)> {
        let channel = self.channel(channel).await;
        let got = channel.basic_get(self.queue.as_str().into(), BasicGetOptions::default()).await.expect("got");
        got.map(|message| {
            let body = std::str::from_utf8(&message.delivery.data).expect("a text");
            (body.parse().expect("a number"), message.delivery.delivery_tag, message.delivery.redelivered)
        })
    }

    async fn apply(&mut self, command: &Command) -> Answer {
        match *command {
            Command::Publish => {
                self.published += 1;
                let body = self.published.to_string();
                let confirm = self.publishing.basic_publish(
                    "".into(),
                    self.queue.as_str().into(),
                    BasicPublishOptions::default(),
                    body.as_bytes(),
                    BasicProperties::default(),
                );
                confirm.await.expect("published").await.expect("confirmed");
                Answer::Done
            }
            Command::Ack { channel: number, tag, multiple } => {
                let channel = self.channel(number).await;
                // Answered by nothing, or by the end of the channel.
                let _ = channel.basic_ack(tag, BasicAckOptions { multiple }).await;
                self.settled(number).await
            }
            Command::GiveBack { channel: number, tag } => {
                let channel = self.channel(number).await;
                let _ = channel.basic_nack(tag, BasicNackOptions { multiple: false, requeue: true }).await;
                self.settled(number).await
            }
            Command::Reopen { channel } => {
                if let Some(channel) = self.channels.remove(&channel) {
                    channel.close(200, "reopened".into()).await.expect("closed");
                }
                Answer::Done
            }
        }
    }

    async fn end(self) {
        let _ = self.publishing.queue_delete(self.queue.as_str().into(), QueueDeleteOptions::default()).await;
        let _ = self.connection.close(200, "done".into()).await;
    }
}

async fn agree(real: &mut Real, model: &mut Queue, step: &Step) -> Result<(), String> {
    let Step::Get(channel) = *step else {
        let Step::Ask(command) = step else { unreachable!("there are two") };
        let (answer, wanted) = (real.apply(command).await, model.apply(command));
        return if answer == wanted { Ok(()) } else { Err(format!("{command:?}: {answer:?}, not {wanted:?}")) };
    };
    // What goes back takes its way through the replicas: asked again, for a little.
    let begun = tokio::time::Instant::now();
    let mut got = real.get(channel).await;
    while got.is_none() && !model.is_empty() && begun.elapsed() < Duration::from_secs(5) {
        tokio::time::sleep(Duration::from_millis(20)).await;
        got = real.get(channel).await;
    }
    match got {
        None if model.is_empty() => Ok(()),
        None => Err("nothing, although something waits".to_owned()),
        Some((message, tag, redelivered)) => match model.hand_out(channel, message) {
            Some(told) if told == (tag, redelivered) => Ok(()),
            told => Err(format!("{message} under {tag}, redelivered: {redelivered}; the model says {told:?}")),
        },
    }
}

#[test]
fn the_server_does_what_the_model_says() {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let config = Config { cases: 24, failure_persistence: None, max_shrink_iters: 40, ..Config::default() };
    let mut number = 0;
    let mut runner = TestRunner::new(config);
    let number = std::cell::RefCell::new(&mut number);
    let ran = runner.run(&prop::collection::vec(step(), 1..40), |steps| {
        **number.borrow_mut() += 1;
        let queue = format!("hapax-model-{}-{}", std::process::id(), number.borrow());
        runtime.block_on(async {
            let (mut model, mut real) = (Queue::default(), Real::new(queue).await);
            let mut agreed = Ok(());
            for step in &steps {
                agreed = agree(&mut real, &mut model, step).await;
                if agreed.is_err() {
                    break;
                }
            }
            real.end().await;
            agreed.map_err(TestCaseError::fail)
        })
    });
    if let Err(error) = ran {
        panic!("{error}");
    }
}
