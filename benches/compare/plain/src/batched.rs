//! The limit with a store: claims and records in batches of 256, without leases, lanes or failures. One batch is read
//! while another is claimed, handled, recorded and acknowledged.

use compare_kit::{Arguments, Meter};

use crate::source::{self, Acker, Error, Received};
use crate::store::Store;

const BATCH_MAX: usize = 256;

pub async fn run(arguments: &Arguments, meter: &Meter) -> Result<(), Error> {
    let Arguments { broker, url, topic, group, .. } = arguments;
    let mut store = Store::open(arguments).await?;
    let (mut reader, mut acker) = source::open(broker, url, topic, group).await?;
    let mut batch = reader.receive(BATCH_MAX).await?;
    loop {
        let (next, done) = tokio::join!(
            reader_or_end(&mut reader, meter, arguments, batch.len()),
            take(&mut store, &mut acker, meter, &batch)
        );
        if done? {
            break;
        }
        batch = next?;
    }
    meter.report();
    acker.close().await
}

/// Receives, unless the batch in hand is the last: then nothing more may come.
async fn reader_or_end(
    reader: &mut source::Reader,
    meter: &Meter,
    arguments: &Arguments,
    in_hand: usize,
) -> Result<Vec<Received>, Error> {
    if meter.count() + in_hand as u64 >= arguments.events {
        return Ok(Vec::new());
    }
    reader.receive(BATCH_MAX).await
}

/// Answers whether that was the last.
async fn take(store: &mut Store, acker: &mut Acker, meter: &Meter, batch: &[Received]) -> Result<bool, Error> {
    if batch.is_empty() {
        return Ok(false);
    }
    let ids: Vec<_> = batch.iter().map(|received| received.id.as_slice()).collect();
    let mut is_over = false;
    let claimed = store.claim(&ids).await?;
    for (received, claimed) in batch.iter().zip(&claimed) {
        is_over |= *claimed && meter.handled(&received.payload);
    }
    let claimed: Vec<_> = ids.iter().zip(claimed).filter_map(|(id, claimed)| claimed.then_some(*id)).collect();
    store.record(&claimed).await?;
    acker.acknowledge(batch).await?;
    Ok(is_over)
}
