//! How many messages of a group wait for a retry: for people, for scaling, and for workers that end when nothing is left.
//!
//! Asked of the servers, by a client that is no member of the group, so that it can be asked of any group at any time.

use std::sync::Arc;
use std::time::Duration;

use hapax::{Error, ErrorKind, Result};
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::KafkaError;
use rdkafka::{Offset, TopicPartitionList};

use crate::client::Logging;
use crate::error::error;
use crate::places::{Kind, Places};
use crate::properties::Properties;

/// How long one request may take.
const REQUEST: Duration = Duration::from_secs(10);

impl ConsumerContext for Logging {}

/// Messages in the retry topics that the group has not committed.
pub(crate) async fn count(properties: &Properties, group: &str, places: &Arc<Places>) -> Result<u64> {
    let config = properties.member(group, None);
    let places = Arc::clone(places);
    // Asks, and joins threads when it is dropped.
    let counted = tokio::task::spawn_blocking(move || {
        let client: BaseConsumer<Logging> = config.create_with_context(Logging)?;
        let retries = places.subscribed.iter().filter(|place| place.kind != Kind::Main);
        retries.map(|place| uncommitted(&client, &place.name)).sum::<Result<u64, KafkaError>>()
    });
    let internal = |_| Error::new(ErrorKind::Internal, "count").because("counting retries panicked");
    counted.await.map_err(internal)?.map_err(|refused| error("count", refused))
}

fn uncommitted(client: &BaseConsumer<Logging>, topic: &str) -> Result<u64, KafkaError> {
    let metadata = client.fetch_metadata(Some(topic), REQUEST)?;
    let mut asked = TopicPartitionList::new();
    for partition in metadata.topics().iter().flat_map(|topic| topic.partitions()) {
        asked.add_partition(topic, partition.id());
    }
    if asked.count() == 0 {
        return Ok(0);
    }
    let mut waiting = 0;
    for committed in client.committed_offsets(asked, REQUEST)?.elements() {
        let (low, high) = client.fetch_watermarks(topic, committed.partition(), REQUEST)?;
        let next = match committed.offset() {
            Offset::Offset(next) => next.max(low),
            _ => low,
        };
        waiting += u64::try_from(high - next).unwrap_or(0);
    }
    Ok(waiting)
}
