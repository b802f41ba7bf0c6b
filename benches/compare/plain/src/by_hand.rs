//! The consumers that people write: one message after the other, or a transaction for each message.

use std::collections::VecDeque;
use std::sync::Arc;

use compare_kit::{Arguments, Meter};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::source::{self, Error, Received};
use crate::store::{Store, in_transaction};

/// Messages read ahead.
const AHEAD_MAX: usize = 256;

/// Id, handler, acknowledgement; then the next.
pub async fn one_by_one(arguments: &Arguments, meter: &Meter) -> Result<(), Error> {
    let Arguments { broker, url, topic, group, .. } = arguments;
    let mut store = Store::open(arguments).await?;
    let (mut reader, mut acker) = source::open(broker, url, topic, group).await?;
    'all: loop {
        for received in reader.receive(AHEAD_MAX).await? {
            let is_last = store.is_new(&received.id).await? && meter.handled(&received.payload);
            acker.acknowledge(&[received]).await?;
            if is_last {
                break 'all;
            }
        }
    }
    meter.report();
    acker.close().await
}

/// A transaction each, so many at once as asked; acknowledged in the order of arrival.
pub async fn in_transactions(arguments: &Arguments, meter: Meter) -> Result<(), Error> {
    let Arguments { broker, url, topic, group, concurrency, .. } = arguments;
    let Store::Postgres { pool, table } = Store::open(arguments).await? else {
        return Err("a transaction needs PostgreSQL".into());
    };
    let (mut reader, mut acker) = source::open(broker, url, topic, group).await?;
    let (ahead, mut arrived) = mpsc::channel(AHEAD_MAX);
    let reading = tokio::spawn(async move {
        loop {
            for received in reader.receive(AHEAD_MAX).await? {
                if ahead.send(received).await.is_err() {
                    return Ok::<_, Error>(());
                }
            }
        }
    });
    let (meter, table) = (Arc::new(meter), Arc::<str>::from(table));
    let mut under_way: VecDeque<JoinHandle<Result<(Received, bool), Error>>> = VecDeque::new();
    loop {
        let done = tokio::select! {
            received = arrived.recv(), if under_way.len() < *concurrency => {
                let received = received.ok_or("the broker delivers nothing more")?;
                let (pool, table, meter) = (pool.clone(), Arc::clone(&table), Arc::clone(&meter));
                under_way.push_back(tokio::spawn(async move {
                    let is_new = in_transaction(&pool, &table, &received.id).await?;
                    let is_last = is_new && meter.handled(&received.payload);
                    Ok((received, is_last))
                }));
                continue;
            }
            Some(done) = front(&mut under_way) => done,
        };
        under_way.pop_front();
        let (received, is_last) = done??;
        acker.acknowledge(&[received]).await?;
        // Those behind it came earlier and are acknowledged already, but for duplicates.
        if is_last {
            break;
        }
        if meter.count() >= arguments.events && under_way.is_empty() {
            break;
        }
    }
    meter.report();
    reading.abort();
    acker.close().await
}

type Done = Result<Result<(Received, bool), Error>, tokio::task::JoinError>;

async fn front(under_way: &mut VecDeque<JoinHandle<Result<(Received, bool), Error>>>) -> Option<Done> {
    match under_way.front_mut() {
        Some(first) => Some(first.await),
        None => None,
    }
}
