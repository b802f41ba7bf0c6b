//! What `open` checks, creates and promises, and what it says when it cannot.

mod support;

use std::time::Duration;

use hapax::{Broker, BrokerOrder, Durability, ErrorKind, Outgoing, Publisher};
use hapax_kafka::rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use hapax_kafka::rdkafka::client::DefaultClientContext;
use hapax_kafka::rdkafka::consumer::{BaseConsumer, Consumer};
use hapax_kafka::{Declare, KafkaBroker};
use support::{SOON, Topic, ack, limits, receive, unique, until};

fn partitions(topic: &Topic, name: &str) -> usize {
    let consumer: BaseConsumer = topic.config().create().expect("a consumer");
    let metadata = consumer.fetch_metadata(Some(name), SOON).expect("metadata");
    metadata.topics()[0].partitions().len()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_topic_is_told_with_the_command_and_not_created() {
    let topic = Topic::new(1).created().await;
    let broker = KafkaBroker::builder(topic.url.clone(), topic.group.as_str(), [topic.topic.as_str()])
        .retry_steps([topic.step])
        .build()
        .expect("good settings");
    for _ in 0..2 {
        let refused = broker.open(limits()).await.expect_err("two topics are missing");
        assert_eq!(refused.kind(), ErrorKind::Configuration);
        let text = refused.to_string();
        for part in [topic.dead(), topic.retry(), "kafka-topics.sh".to_owned(), ".declare(".to_owned()] {
            assert!(text.contains(&part), "{part} in {text}");
        }
        assert!(!text.contains(&format!("`{}`", topic.topic)), "that one is there: {text}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn topics_are_declared_with_partitions_by_several_workers_at_once() {
    let topic = Topic::new(3);
    let workers = [topic.broker(), topic.broker(), topic.broker()];
    let opened = futures_util::future::join_all(workers.iter().map(|worker| worker.open(limits()))).await;
    assert!(opened.iter().all(Result::is_ok), "{opened:?}");
    for name in [topic.topic.clone(), topic.retry(), topic.dead()] {
        assert_eq!(partitions(&topic, &name), 3, "{name}");
    }
    topic.publish(0..30).await;
    let mut seen = 0;
    let all_seen = async {
        while seen < 30 {
            for worker in &workers {
                let more = tokio::time::timeout(Duration::from_millis(100), worker.receive(support::WANT)).await;
                let Ok(more) = more else { continue };
                let more = more.expect("the broker delivers");
                ack(worker, &more).await;
                seen += more.len();
            }
        }
    };
    let in_time = tokio::time::timeout(SOON, all_seen).await;
    assert!(in_time.is_ok() && seen == 30, "{seen} of 30");
    for worker in workers {
        worker.close().await.expect("it closes");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_many_replicas_are_refused_with_the_name() {
    let topic = Topic::new(1);
    let broker = topic.builder().declare(Declare::partitions(1).replication(99)).build().expect("good settings");
    let refused = broker.open(limits()).await.expect_err("there are not so many servers");
    assert!(refused.to_string().contains(&topic.topic), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn capabilities_say_what_the_topics_keep() {
    let topic = Topic::new(1);
    let broker = topic.opened().await;
    let told = broker.capabilities();
    assert_eq!((told.order, told.retry_keeps_order), (BrokerOrder::Partition, false));
    assert_eq!(told.durability, Durability::Lossy, "one server acknowledges before it flushes");
    assert_eq!(told.redelivery_horizon, Some(Duration::from_hours(7 * 24)), "Kafka's own retention");
    assert_eq!((told.retry_max, told.hold_max, told.deliveries_max), (topic.step, None, None));
    assert!(told.settle_fenced && told.position_is_stable && !told.dead_letter_in_one_step);
    broker.close().await.expect("it closes");

    let kept = Topic::new(1);
    let admin: AdminClient<DefaultClientContext> = kept.config().create().expect("an admin client");
    let flushed = NewTopic::new(&kept.topic, 1, TopicReplication::Fixed(1))
        .set("flush.messages", "1")
        .set("cleanup.policy", "compact");
    let other = kept.retry();
    let retry = NewTopic::new(&other, 1, TopicReplication::Fixed(1)).set("flush.messages", "1");
    admin.create_topics([&flushed, &retry], &AdminOptions::new()).await.expect("the server answers");
    let broker = kept.opened().await;
    let told = broker.capabilities();
    assert_eq!(told.durability, Durability::Durable, "every message is flushed");
    assert_eq!(told.redelivery_horizon, None, "a compacted topic keeps the last of each key for ever");
    broker.close().await.expect("it closes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lag_and_assignment_are_known_without_asking_the_server() {
    let topic = Topic::new(2);
    topic.broker().check().await.expect("the topics are created");
    topic.publish(0..12).await;
    let broker = topic.broker();
    assert_eq!((broker.lag(), broker.assigned(), broker.is_caught_up()), (None, None, false));
    broker.open(limits()).await.expect("the broker opens");
    until("it has its partitions", || broker.assigned() == Some(4)).await;
    until("it knows how far behind it is", || broker.lag() == Some(12)).await;
    let held = receive(&broker, 12).await;
    assert_eq!(broker.lag(), Some(12), "what runs is not done");
    ack(&broker, &held).await;
    assert_eq!(broker.lag(), Some(0));
    until("it knows that nothing more waits", || broker.is_caught_up()).await;
    topic.publish(20..25).await;
    until("more came", || broker.lag() == Some(5)).await;
    broker.close().await.expect("it closes");
    assert_eq!((broker.assigned(), broker.is_caught_up()), (None, false));
}

/// Several topics under one group, each with its own retries and dead letters.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_topics_are_one_consumer() {
    let (one, two) = (Topic::new(1), Topic::new(1));
    let broker = KafkaBroker::builder(one.url.clone(), one.group.as_str(), [one.topic.as_str(), two.topic.as_str()])
        .retry_steps([one.step])
        .declare(Declare::partitions(1))
        .build()
        .expect("good settings");
    broker.open(limits()).await.expect("the broker opens");
    one.publish(0..3).await;
    two.publish(3..6).await;
    let held = receive(&broker, 6).await;
    for delivery in &held {
        support::settle(&broker, delivery, hapax::Settlement::Retry { after: Duration::from_millis(100) }).await;
    }
    let back = receive(&broker, 6).await;
    ack(&broker, &back).await;
    let of = |topic: &Topic| format!("{}.{}.retry.5s", topic.topic, one.group);
    assert_eq!((one.records(&of(&one)).await.len(), two.records(&of(&two)).await.len()), (3, 3));
    broker.close().await.expect("it closes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_not_there_is_unavailable_says_why_and_no_text_holds_the_password() {
    let canary = "canary-hunter2";
    let url = format!("kafka://app:{canary}@127.0.0.1:1/?security.protocol=sasl_plaintext");
    let broker = KafkaBroker::builder(url.parse().expect("a url"), "billing", [unique("orders")]).build();
    let broker = broker.expect("good settings");
    // Before the runtime gives up waiting for `open`, which would be all that is told.
    let refused = tokio::time::timeout(Duration::from_secs(9), broker.open(limits())).await.expect("in time");
    let refused = refused.expect_err("nobody listens there");
    assert!(refused.is_retryable(), "{refused:?}");
    assert!(refused.to_string().contains("Connection refused"), "{refused}");
    assert!(!format!("{refused} {refused:?} {broker:?}").contains(canary));
}

/// A message that its dead-letter topic does not take would block its partition for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_a_topic_takes_fits_into_its_dead_letters() {
    let topic = Topic::new(1);
    let admin: AdminClient<DefaultClientContext> = topic.config().create().expect("an admin client");
    let large = NewTopic::new(&topic.topic, 1, TopicReplication::Fixed(1)).set("max.message.bytes", "6000000");
    admin.create_topics([&large], &AdminOptions::new()).await.expect("the server answers");
    let broker = topic.opened().await;
    topic.publish_all([support::event(0).with_data("text/plain", vec![b'x'; 5_900_000])]).await;
    let held = receive(&broker, 1).await;
    support::settle(&broker, &held[0], hapax::Settlement::Retry { after: Duration::from_millis(100) }).await;
    let back = receive(&broker, 1).await;
    assert_eq!(back[0].message.data, held[0].message.data);
    ack(&broker, &back).await;
    broker.close().await.expect("it closes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_letter_topic_that_takes_less_than_its_topic_is_refused() {
    let topic = Topic::new(1);
    let admin: AdminClient<DefaultClientContext> = topic.config().create().expect("an admin client");
    let dead = topic.dead();
    let small = NewTopic::new(&dead, 1, TopicReplication::Fixed(1)).set("max.message.bytes", "1000");
    admin.create_topics([&small], &AdminOptions::new()).await.expect("the server answers");
    let refused = topic.broker().open(limits()).await.expect_err("dead letters would not fit");
    assert_eq!(refused.kind(), ErrorKind::Configuration);
    assert!(refused.to_string().contains(&dead) && refused.to_string().contains("max.message.bytes"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn publishing_to_a_missing_topic_is_a_clear_fault_soon_and_heals() {
    let topic = Topic::new(1);
    let publisher = topic.publisher();
    let publish = || publisher.publish(vec![Outgoing::new(support::event(0))]);
    let told = tokio::time::timeout(Duration::from_secs(10), publish()).await.expect("soon").remove(0);
    let told = told.expect_err("there is no such topic");
    assert_eq!(told.kind(), ErrorKind::Configuration, "{told}");
    assert!(told.to_string().contains(&topic.topic), "{told}");
    topic.broker().check().await.expect("the topics are created");
    let healed = async { while publish().await.remove(0).is_err() {} };
    tokio::time::timeout(SOON, healed).await.expect("it is there now");
}
