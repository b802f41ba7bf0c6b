//! What librdkafka calls back with about the group: assignments, revocations, statistics.
//!
//! All of it runs on the polling thread, inside `poll`. A revocation is only noted here and answered by that thread
//! later: librdkafka waits for the answer, and until then the member goes on polling, so that draining a partition costs
//! the membership nothing.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rdkafka::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerContext, RebalanceProtocol};
use rdkafka::error::KafkaError;
use rdkafka::statistics::Statistics;
use rdkafka::topic_partition_list::TopicPartitionList;
use rdkafka::types::RDKafkaRespErr;

use crate::client;
use crate::state::{End, Shared};

/// A partition by the number of its topic.
pub(crate) type Spot = (usize, i32);

/// The context of a member of the group.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) shared: Arc<Shared>,
    /// What is to be given back, for the thread to answer.
    revoked: Mutex<VecDeque<TopicPartitionList>>,
    /// Nobody answers any more: the client is going, and takes nothing that is assigned.
    leaving: AtomicBool,
}

impl Member {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, revoked: Mutex::default(), leaving: AtomicBool::new(false) }
    }

    /// From now on what is revoked is let go at once. librdkafka waits for that answer, and dropping a client waits for
    /// librdkafka.
    pub(crate) fn leave(&self) {
        self.leaving.store(true, Ordering::Release);
    }

    fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Acquire)
    }

    pub(crate) fn revoked(&self) -> Option<TopicPartitionList> {
        self.revoked.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    pub(crate) fn spots(&self, list: &TopicPartitionList) -> Vec<Spot> {
        let places = &self.shared.places;
        let found = |element: &rdkafka::topic_partition_list::TopicPartitionListElem<'_>| {
            places.find(element.topic()).map(|place| (place, element.partition()))
        };
        list.elements().iter().filter_map(found).collect()
    }
}

/// Lets the partitions of `list` go, as the group's protocol wants it said.
pub(crate) fn unassign(consumer: &BaseConsumer<Member>, list: &TopicPartitionList) {
    let answered = match consumer.rebalance_protocol() {
        RebalanceProtocol::Cooperative => consumer.incremental_unassign(list),
        RebalanceProtocol::None | RebalanceProtocol::Eager => consumer.unassign(),
    };
    if let Err(error) = answered {
        tracing::warn!(%error, "partitions could not be given back to the group");
    }
}

impl ConsumerContext for Member {
    fn rebalance(&self, consumer: &BaseConsumer<Self>, event: RDKafkaRespErr, list: &mut TopicPartitionList) {
        if event != RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS {
            if self.is_leaving() || self.shared.is_closing() {
                unassign(consumer, list);
            } else {
                self.revoked.lock().unwrap_or_else(PoisonError::into_inner).push_back(list.clone());
            }
            return;
        }
        // What another member has by now is not this one's.
        if !self.is_leaving() {
            // Before the client is told, so that no record comes before its assignment.
            for (place, partition) in self.spots(list) {
                self.shared.assign(place, partition);
            }
            self.shared.lock().joined = true;
        }
        tracing::debug!(partitions = list.count(), "assigned");
        let answered = match consumer.rebalance_protocol() {
            RebalanceProtocol::Cooperative => consumer.incremental_assign(list),
            RebalanceProtocol::None | RebalanceProtocol::Eager => consumer.assign(list),
        };
        if let Err(error) = answered {
            tracing::warn!(%error, "an assignment could not be taken");
        }
        self.shared.arrivals.notify_waiters();
    }
}

impl ClientContext for Member {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        client::log(level, facility, text);
    }

    fn stats(&self, statistics: Statistics) {
        if self.is_leaving() {
            return;
        }
        let mut state = self.shared.lock();
        for (name, topic) in &statistics.topics {
            let Some(place) = self.shared.places.find(name) else { continue };
            for partition in topic.partitions.values() {
                let end = if partition.ls_offset >= 0 { partition.ls_offset } else { partition.hi_offset };
                let stood = partition.committed_offset.max(partition.lo_offset);
                if end >= 0 && stood >= 0 && state.at(place, partition.partition).is_some() {
                    // Where it is not being fetched yet, these are from a former time. Its end was met since it is.
                    let is_fetched = partition.fetch_state == "active" && partition.eof_offset >= end;
                    let known = End { end, stood, is_reached: is_fetched && partition.next_offset >= end };
                    state.ends.insert((place, partition.partition), known);
                }
            }
        }
    }

    fn error(&self, error: KafkaError, reason: &str) {
        // What matters of it comes out of `poll` too.
        tracing::debug!(%error, reason = %hapax::redact(reason), "librdkafka");
    }
}
