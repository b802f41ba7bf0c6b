//! The model of a group's offsets (`hapax_testkit::servers::log`) against the server: generated commands, the same answers.
//! What the adapter takes for granted is what the server does: commits may go backwards, and an old generation is refused.
//!
//! All members have one `group.instance.id`, so that the next that joins fences the one before, as a session that ended
//! does, and at once.

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use hapax_kafka::rdkafka::ClientConfig;
use hapax_kafka::rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use hapax_kafka::rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use hapax_testkit::servers::Server;
use hapax_testkit::servers::log::{Answer, Command, Offsets};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use support::Topic;
use tokio::time::Instant;

fn command() -> impl Strategy<Value = Command> {
    let (member, offset) = (1u8..4, 0i64..20);
    prop_oneof![
        1 => member.clone().prop_map(|member| Command::TakeOver { member }),
        4 => (member, offset).prop_map(|(member, offset)| Command::Commit { member, offset }),
        2 => Just(Command::Committed),
    ]
}

/// The server's side: a group of its own on a topic of its own.
struct Real {
    address: String,
    topic: String,
    group: String,
    members: BTreeMap<u8, BaseConsumer>,
}

impl Real {
    fn member(&self, joins: bool) -> BaseConsumer {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &self.address).set("group.id", &self.group).set("enable.auto.commit", "false");
        if joins {
            config.set("group.instance.id", "one").set("session.timeout.ms", "6000");
        }
        config.create().expect("a consumer")
    }

    fn at(&self, offset: i64) -> TopicPartitionList {
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(&self.topic, 0, Offset::Offset(offset)).expect("an offset");
        list
    }

    fn apply(&mut self, command: &Command) -> Answer {
        match *command {
            Command::TakeOver { member } => {
                // The one before goes without a word: it would leave the group otherwise, and could not be refused.
                let joined = self.member(true);
                joined.subscribe(&[&self.topic]).expect("subscribed");
                let begun = Instant::now();
                while joined.assignment().expect("an assignment").count() == 0 {
                    assert!(begun.elapsed() < Duration::from_secs(30), "the group assigns nothing");
                    if let Some(Err(error)) = joined.poll(Duration::from_millis(50)) {
                        eprintln!("joining: {error}");
                    }
                }
                self.members.insert(member, joined);
                Answer::Done
            }
            Command::Commit { member, offset } => match self.members.get(&member) {
                None => Answer::Refused,
                Some(consumer) => match consumer.commit(&self.at(offset), CommitMode::Sync) {
                    Ok(()) => Answer::Done,
                    Err(_) => Answer::Refused,
                },
            },
            Command::Committed => {
                let looks = self.member(false);
                let committed = looks.committed_offsets(self.at(0), Duration::from_secs(10)).expect("told");
                Answer::At(match committed.elements()[0].offset() {
                    Offset::Offset(offset) => Some(offset),
                    _ => None,
                })
            }
        }
    }
}

#[test]
fn the_server_does_what_the_model_says() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let address = Server::Kafka.url().trim_start_matches("kafka://").to_owned();
    let topic = runtime.block_on(Topic::new(1).created()).topic.clone();
    let config = Config { cases: 8, failure_persistence: None, max_shrink_iters: 10, ..Config::default() };
    let ran = TestRunner::new(config).run(&prop::collection::vec(command(), 1..16), |commands| {
        let group = support::unique("model");
        let mut real = Real { address: address.clone(), topic: topic.clone(), group, members: BTreeMap::new() };
        let mut model = Offsets::default();
        for (step, command) in commands.iter().enumerate() {
            prop_assert_eq!(real.apply(command), model.apply(command), "step {}: {:?}", step, command);
        }
        Ok(())
    });
    if let Err(error) = ran {
        panic!("{error}");
    }
}

/// The two that the design rests on, by themselves.
#[test]
fn a_commit_goes_backwards_and_an_old_member_is_refused() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let (topic, group) = (runtime.block_on(Topic::new(1).created()).topic.clone(), support::unique("model"));
    let address = Server::Kafka.url().trim_start_matches("kafka://").to_owned();
    let mut real = Real { address, topic, group, members: BTreeMap::new() };
    let commands = [
        Command::TakeOver { member: 1 },
        Command::Commit { member: 1, offset: 50 },
        Command::Commit { member: 1, offset: 10 },
        Command::Committed,
        Command::TakeOver { member: 2 },
        Command::Commit { member: 1, offset: 60 },
        Command::Committed,
    ];
    let answers: Vec<_> = commands.iter().map(|command| real.apply(command)).collect();
    assert_eq!(answers[3], Answer::At(Some(10)), "backwards, and nothing told");
    assert_eq!((answers[5].clone(), answers[6].clone()), (Answer::Refused, Answer::At(Some(10))), "fenced");
}
