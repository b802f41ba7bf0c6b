//! The limit: the client's loop, no deduplication. What was received is acknowledged while more is received.

use compare_kit::{Arguments, Meter};

use crate::source::{self, Error};

/// Most messages that are acknowledged together.
const BATCH_MAX: usize = 256;

pub async fn run(arguments: &Arguments, meter: &Meter) -> Result<(), Error> {
    let Arguments { broker, url, topic, group, .. } = arguments;
    let (mut reader, mut acker) = source::open(broker, url, topic, group).await?;
    let mut batch = reader.receive(BATCH_MAX).await?;
    loop {
        let mut is_over = false;
        for received in &batch {
            is_over |= meter.handled(&received.payload);
        }
        if is_over {
            acker.acknowledge(&batch).await?;
            break;
        }
        let (next, acknowledged) = tokio::join!(reader.receive(BATCH_MAX), acker.acknowledge(&batch));
        acknowledged?;
        batch = next?;
    }
    meter.report();
    acker.close().await
}
