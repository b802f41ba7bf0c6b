//! The one place where offsets are committed: a thread that does one commit after the other.
//!
//! A commit that waits for its answer blocks, in an outage for a minute, and polling must not. One that does not wait
//! has no answer at all through rdkafka 0.39 (librdkafka sends none where events are used instead of a callback), and two
//! of them may overtake each other. So commits wait, here.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread::JoinHandle;

use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use crate::member::{Member, Spot};

/// Offsets by partition.
pub(crate) type Offsets = Vec<(Spot, i64)>;

/// Commits for one member, one at a time.
pub(crate) struct Committer {
    jobs: Option<SyncSender<(TopicPartitionList, Offsets)>>,
    answers: Receiver<(Offsets, KafkaResult<()>)>,
    thread: Option<JoinHandle<()>>,
    under_way: bool,
}

impl Committer {
    pub(crate) fn start(consumer: Arc<BaseConsumer<Member>>) -> std::io::Result<Self> {
        let (jobs, waiting) = sync_channel::<(TopicPartitionList, Offsets)>(1);
        let (done, answers) = sync_channel(1);
        let thread = std::thread::Builder::new().name("hapax-kafka-commit".to_owned()).spawn(move || {
            for (list, offsets) in waiting {
                let answer = consumer.commit(&list, CommitMode::Sync);
                if done.send((offsets, answer)).is_err() {
                    break;
                }
            }
        })?;
        Ok(Self { jobs: Some(jobs), answers, thread: Some(thread), under_way: false })
    }

    pub(crate) fn is_under_way(&self) -> bool {
        self.under_way
    }

    /// Begins a commit; there is none under way.
    pub(crate) fn begin(&mut self, list: TopicPartitionList, offsets: Offsets) {
        self.under_way = self.jobs.as_ref().is_some_and(|jobs| jobs.try_send((list, offsets)).is_ok());
    }

    /// The answer to the commit under way, when it is there.
    pub(crate) fn answer(&mut self) -> Option<(Offsets, KafkaResult<()>)> {
        match self.answers.try_recv() {
            Ok(answer) => {
                self.under_way = false;
                Some(answer)
            }
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => {
                let gone = KafkaError::ConsumerCommit(RDKafkaErrorCode::Fail);
                std::mem::take(&mut self.under_way).then_some((Vec::new(), Err(gone)))
            }
        }
    }
}

impl Drop for Committer {
    /// Waits for the thread unless a commit hangs: then the thread is the last to let the member go.
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take().filter(|_| !self.under_way) {
            // It panics only where librdkafka's wrapper does, and then nothing more is committed.
            let _ = thread.join();
        }
    }
}

/// The offsets as the client wants them.
pub(crate) fn list<'a>(offsets: &Offsets, name: impl Fn(usize) -> &'a str) -> KafkaResult<TopicPartitionList> {
    let mut list = TopicPartitionList::with_capacity(offsets.len());
    for ((place, partition), offset) in offsets {
        list.add_partition_offset(name(*place), *partition, Offset::Offset(*offset))?;
    }
    Ok(list)
}
