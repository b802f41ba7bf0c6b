//! Cases of `settle`: what comes back, what stays away, and what a receipt is good for.

use hapax::{ErrorKind, Receipt, Settlement};
use tokio::time::Instant;

use super::{
    BrokerFixture, ack_all, assert_ended, dead_letter, event, id, ids, limits, names, opened, publish, receive_all,
    settle, settle_again, silence,
};

/// An acked delivery never comes back.
pub async fn an_acked_delivery_stays_away<F: BrokerFixture>(fixture: &F) {
    let first = opened(fixture).await;
    publish(fixture, (0..10).map(event)).await;
    let deliveries = receive_all(&first, 10).await;
    // As one batch and out of order.
    let batch: Vec<_> = deliveries.iter().rev().map(|delivery| (delivery.receipt, Settlement::Ack)).collect();
    let answers = first.settle(&batch).await;
    assert!(answers.len() == 10 && answers.iter().all(Result::is_ok), "{answers:?}");
    silence(&first, F::UNIT * 3).await;
    first.close().await.expect("the broker closes");
    let second = opened(fixture).await;
    silence(&second, F::UNIT * 3).await;
}

/// A released delivery comes back, counted or not.
pub async fn a_released_delivery_comes_back<F: BrokerFixture>(fixture: &F) {
    let broker = opened(fixture).await;
    publish(fixture, [event(1)]).await;
    let first = receive_all(&broker, 1).await;
    settle(&broker, first[0].receipt, Settlement::Release { counted: true }).await;
    let second = receive_all(&broker, 1).await;
    assert_eq!(second[0].message, first[0].message);
    settle(&broker, second[0].receipt, Settlement::Release { counted: false }).await;
    let third = receive_all(&broker, 1).await;
    assert_eq!(third[0].message, first[0].message);
    assert_ne!(third[0].receipt, second[0].receipt, "another delivery has another receipt");
    ack_all(&broker, &third).await;
    silence(&broker, F::UNIT * 3).await;
}

/// An uncounted release leaves the broker's count as it is, where the broker counts and can.
pub async fn an_uncounted_release_does_not_count<F: BrokerFixture>(fixture: &F) {
    let broker = opened(fixture).await;
    publish(fixture, [event(1)]).await;
    let mut counts = Vec::new();
    for counted in [false, false, true] {
        let delivery = receive_all(&broker, 1).await.remove(0);
        counts.push(delivery.count);
        settle(&broker, delivery.receipt, Settlement::Release { counted }).await;
    }
    let last = receive_all(&broker, 1).await;
    counts.push(last[0].count);
    ack_all(&broker, &last).await;
    if counts.iter().any(Option::is_some) && !fixture.quirks().counts_every_release {
        assert_eq!(counts, [Some(1), Some(1), Some(1), Some(2)], "deliveries: first, uncounted, uncounted, counted");
    }
}

/// A retried delivery comes back not before its time, and survives the consumer.
pub async fn a_retried_delivery_comes_back_later<F: BrokerFixture>(fixture: &F) {
    let first = opened(fixture).await;
    publish(fixture, [event(1)]).await;
    let delivery = receive_all(&first, 1).await.remove(0);
    let after = F::UNIT * 6;
    let settled = Instant::now();
    settle(&first, delivery.receipt, Settlement::Retry { after }).await;
    silence(&first, F::UNIT * 3).await;
    first.stop().await.expect("the broker stops");
    first.close().await.expect("the broker closes");
    let second = opened(fixture).await;
    let again = receive_all(&second, 1).await;
    assert!(settled.elapsed() >= after, "it came back after {:?} instead of {after:?}", settled.elapsed());
    assert_eq!(again[0].message, delivery.message);
    ack_all(&second, &again).await;
    silence(&second, F::UNIT * 3).await;
}

/// Repeating a settled receipt, also with another settlement, has no second effect.
pub async fn settling_twice_has_one_effect<F: BrokerFixture>(fixture: &F) {
    let broker = opened(fixture).await;
    publish(fixture, (0..3).map(event)).await;
    for delivery in receive_all(&broker, 3).await {
        let (receipt, dead) = (delivery.receipt, dead_letter(&delivery));
        let settlement = match id(&delivery) {
            "0" => Settlement::Ack,
            "1" => dead.clone(),
            _ => Settlement::Release { counted: false },
        };
        settle(&broker, receipt, settlement.clone()).await;
        settle_again(&broker, receipt, settlement).await;
        settle_again(&broker, receipt, dead).await;
        settle_again(&broker, receipt, Settlement::Retry { after: F::UNIT }).await;
        settle_again(&broker, receipt, Settlement::Release { counted: true }).await;
    }
    let back = receive_all(&broker, 1).await;
    assert_eq!(ids(&back), names([2]), "the released one comes back");
    silence(&broker, F::UNIT * 4).await;
    ack_all(&broker, &back).await;
    let dead = fixture.dead_letters().await;
    assert_eq!(dead.len(), 1, "one was dead-lettered, once: {dead:?}");
}

/// A receipt of an ended session is stale and has no effect, also where the same consumer opened again.
pub async fn a_receipt_of_an_ended_session_is_stale<F: BrokerFixture>(fixture: &F) {
    let broker = opened(fixture).await;
    publish(fixture, [event(1)]).await;
    let old = receive_all(&broker, 1).await.remove(0);
    broker.close().await.expect("the broker closes");
    assert_ended(&old.session);
    for reopened in [false, true] {
        if reopened {
            broker.open(limits::<F>(1024)).await.expect("the broker opens again");
        }
        for settlement in [Settlement::Ack, dead_letter(&old)] {
            let answer = broker.settle(&[(old.receipt, settlement)]).await.remove(0);
            let kind = answer.map_err(|error| error.kind());
            assert_eq!(kind, Err(ErrorKind::Stale), "opened again: {reopened}");
        }
    }
    let again = receive_all(&broker, 1).await;
    assert_eq!(ids(&again), names([1]), "the stale ack had no effect");
    assert_ne!(again[0].receipt.session, old.receipt.session, "an ended session's number is not given again");
    ack_all(&broker, &again).await;
    assert_eq!(fixture.dead_letters().await.len(), 0, "the stale dead letter was not placed");
}

/// One item that is refused does not refuse the others.
pub async fn one_bad_receipt_spares_its_neighbours<F: BrokerFixture>(fixture: &F) {
    let broker = opened(fixture).await;
    publish(fixture, [event(1), event(2)]).await;
    let good = receive_all(&broker, 2).await;
    let never_minted = Receipt { position: u64::MAX - 1, ..good[0].receipt };
    let of_no_session = Receipt { session: u32::MAX, ..good[0].receipt };
    let batch = [good[0].receipt, never_minted, of_no_session, good[1].receipt].map(|one| (one, Settlement::Ack));
    let answers = broker.settle(&batch).await;
    assert_eq!(answers.len(), 4, "one answer for each item");
    assert!(answers[0].is_ok() && answers[3].is_ok(), "the good ones are settled: {answers:?}");
    broker.close().await.expect("the broker closes");
    silence(&opened(fixture).await, F::UNIT * 3).await;
}

/// After `stop`, settling goes on working.
pub async fn settle_works_after_stop<F: BrokerFixture>(fixture: &F) {
    let first = opened(fixture).await;
    publish(fixture, (0..3).map(event)).await;
    let deliveries = receive_all(&first, 3).await;
    first.stop().await.expect("the broker stops");
    for delivery in &deliveries {
        let settlement = match id(delivery) {
            "0" => Settlement::Ack,
            "1" => dead_letter(delivery),
            _ => Settlement::Release { counted: false },
        };
        settle(&first, delivery.receipt, settlement).await;
    }
    first.close().await.expect("the broker closes");
    let second = opened(fixture).await;
    let again = receive_all(&second, 1).await;
    assert_eq!(ids(&again), names([2]));
    ack_all(&second, &again).await;
    silence(&second, F::UNIT * 3).await;
    assert_eq!(fixture.dead_letters().await.len(), 1);
}
