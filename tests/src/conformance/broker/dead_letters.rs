//! Cases of `settle` about dead letters: what they keep, and what comes back with them.

use super::{BrokerFixture, ack_all, dead_letter, event, headers, opened, publish, receive_all, settle, silence};

/// A dead letter is found with its bytes, its own headers and the reason.
pub async fn a_dead_letter_keeps_bytes_headers_and_reason<F: BrokerFixture>(fixture: &F) {
    let broker = opened(fixture).await;
    let sent = event(1).with_header("x-tenant", "7").with_header("x-binary", vec![0, 255]);
    publish(fixture, [sent.clone()]).await;
    let body = fixture.publish_undecodable().await;
    for delivery in receive_all(&broker, 2).await {
        settle(&broker, delivery.receipt, dead_letter(&delivery)).await;
    }
    let dead = fixture.dead_letters().await;
    assert_eq!(dead.len(), 2, "{dead:?}");
    let one = dead.iter().find(|one| one.attributes.id == sent.attributes.id).expect("the dead letter has its id");
    assert_eq!(one.data, sent.data);
    assert_eq!(one.attributes, sent.attributes);
    for (name, value) in sent.headers.iter() {
        assert_eq!(one.headers.get(name), Some(value), "header {name}");
    }
    for (name, value) in [
        ("hapax-reason", "attempts-exhausted"),
        ("hapax-error", "no such order"),
        ("hapax-consumer", "conformance"),
        ("hapax-attempts", "3"),
        ("hapax-first-unix-ms", "1000"),
        ("hapax-last-unix-ms", "2000"),
        ("hapax-reopen", "7001"),
    ] {
        assert_eq!(one.headers.get_str(name), Some(value), "header {name}");
    }
    assert!(dead.iter().any(|other| other.data == body), "what did not decode is kept as it travelled");
}

/// A dead-lettered delivery stays away.
pub async fn a_dead_lettered_delivery_stays_away<F: BrokerFixture>(fixture: &F) {
    let first = opened(fixture).await;
    publish(fixture, [event(1)]).await;
    let delivery = receive_all(&first, 1).await.remove(0);
    settle(&first, delivery.receipt, dead_letter(&delivery)).await;
    silence(&first, F::UNIT * 3).await;
    first.close().await.expect("the broker closes");
    let second = opened(fixture).await;
    silence(&second, F::UNIT * 3).await;
    assert_eq!(fixture.dead_letters().await.len(), 1);
}

/// A dead letter that is sent back as it is stored arrives with its token, and bears no other header of ours.
pub async fn a_redriven_dead_letter_bears_its_token<F: BrokerFixture>(fixture: &F) {
    let broker = opened(fixture).await;
    let sent = event(1).with_header("x-tenant", "7");
    publish(fixture, [sent.clone()]).await;
    let delivery = receive_all(&broker, 1).await.remove(0);
    assert_eq!(delivery.message.reopen(), None);
    settle(&broker, delivery.receipt, dead_letter(&delivery)).await;
    fixture.redrive().await;
    let back = receive_all(&broker, 1).await;
    let message = &back[0].message;
    assert_eq!(message.reopen().map(u64::from), Some(7_001));
    assert_eq!((&message.attributes, &message.data), (&sent.attributes, &sent.data));
    assert_eq!(headers(message), headers(&sent));
    ack_all(&broker, &back).await;
}
