//! What Redis does with a stream and its group, as a model: no time, no network, one command after the other.
//!
//! The adapter is built on what is written here, and `adapters/redis` checks it against a real server with generated
//! commands. What surprises: an acknowledgement is nobody's in particular, and reading what is
//! pending counts as another delivery, and who deletes a consumer deletes what it had pending.

use std::collections::BTreeMap;

/// A stream with one group, which began at the first entry.
#[derive(Clone, Debug, Default)]
pub struct Stream {
    /// By number of the entry: whether it is still in the stream.
    entries: BTreeMap<u64, bool>,
    delivered: u64,
    pending: BTreeMap<u64, Pending>,
}

/// Whose an entry is that was delivered and not acknowledged, and how often it was delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pending {
    /// The consumer's number.
    pub consumer: u8,
    /// Deliveries so far.
    pub count: u64,
}

/// A command of one consumer. Entries are numbered from 1 in the order of their `XADD`.
#[derive(Clone, Debug)]
pub enum Command {
    /// `XADD`.
    Add,
    /// `XREADGROUP .. COUNT n STREAMS s >`.
    Read {
        /// Whose.
        consumer: u8,
        /// Most entries.
        count: usize,
    },
    /// `XREADGROUP .. STREAMS s 0`: what this consumer has pending.
    ReadOwn {
        /// Whose.
        consumer: u8,
    },
    /// `XACK`, by anybody.
    Ack {
        /// Which.
        entry: u64,
    },
    /// `XCLAIM .. 0 id`, with or without `JUSTID`.
    Claim {
        /// Whose.
        consumer: u8,
        /// Which.
        entry: u64,
        /// Without content, and without counting.
        just_id: bool,
    },
    /// `XAUTOCLAIM .. 0 0-0`.
    ClaimAll {
        /// Whose.
        consumer: u8,
    },
    /// `XDEL`.
    Delete {
        /// Which.
        entry: u64,
    },
    /// `XGROUP DELCONSUMER`.
    Forget {
        /// Whose.
        consumer: u8,
    },
}

/// What it is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Entries that were handed out, and whether each has its content still.
    Entries(Vec<(u64, bool)>),
    /// A number.
    Number(u64),
    /// `XAUTOCLAIM`: what was taken over, and what was gone.
    Taken {
        /// What was taken over.
        entries: Vec<u64>,
        /// What is not in the stream any more.
        gone: Vec<u64>,
    },
}

impl Stream {
    /// Does one command.
    pub fn apply(&mut self, command: &Command) -> Answer {
        match *command {
            Command::Add => {
                let entry = self.entries.last_key_value().map_or(0, |(last, _)| *last) + 1;
                self.entries.insert(entry, true);
                Answer::Number(entry)
            }
            Command::Read { consumer, count } => {
                let fresh: Vec<_> =
                    self.entries.range(self.delivered + 1..).filter(|(_, there)| **there).take(count).collect();
                let fresh: Vec<_> = fresh.into_iter().map(|(entry, _)| *entry).collect();
                for entry in &fresh {
                    self.delivered = *entry;
                    self.pending.insert(*entry, Pending { consumer, count: 1 });
                }
                Answer::Entries(fresh.into_iter().map(|entry| (entry, true)).collect())
            }
            Command::ReadOwn { consumer } => {
                let mut own = Vec::new();
                for (entry, pending) in self.pending.iter_mut().filter(|(_, pending)| pending.consumer == consumer) {
                    let there = self.entries.get(entry).copied().unwrap_or(false);
                    // Reading again counts as a delivery.
                    pending.count += u64::from(there);
                    own.push((*entry, there));
                }
                Answer::Entries(own)
            }
            // Whoever asks: the server does not look whose it is.
            Command::Ack { entry } => Answer::Number(u64::from(self.pending.remove(&entry).is_some())),
            Command::Claim { consumer, entry, just_id } => Answer::Entries(
                self.claim(consumer, entry, just_id)
                    .map(|there| (entry, there))
                    .filter(|(_, there)| *there)
                    .into_iter()
                    .collect(),
            ),
            Command::ClaimAll { consumer } => {
                let all: Vec<_> = self.pending.keys().copied().collect();
                let (mut entries, mut gone) = (Vec::new(), Vec::new());
                for entry in all {
                    match self.claim(consumer, entry, false) {
                        Some(true) => entries.push(entry),
                        _ => gone.push(entry),
                    }
                }
                Answer::Taken { entries, gone }
            }
            Command::Delete { entry } => {
                let there = self.is_there(entry);
                if there {
                    self.entries.insert(entry, false);
                }
                Answer::Number(u64::from(there))
            }
            Command::Forget { consumer } => {
                let before = self.pending.len();
                self.pending.retain(|_, pending| pending.consumer != consumer);
                Answer::Number((before - self.pending.len()) as u64)
            }
        }
    }

    /// Everything pending, by entry.
    pub fn pending(&self) -> &BTreeMap<u64, Pending> {
        &self.pending
    }

    fn is_there(&self, entry: u64) -> bool {
        self.entries.get(&entry).copied().unwrap_or(false)
    }

    /// Whether there was something to claim: `Some(false)` where its content is gone, and it is pending no more.
    fn claim(&mut self, consumer: u8, entry: u64, just_id: bool) -> Option<bool> {
        let there = self.is_there(entry);
        if !there {
            return self.pending.remove(&entry).map(|_| false);
        }
        let pending = self.pending.get_mut(&entry)?;
        pending.consumer = consumer;
        pending.count += u64::from(!just_id);
        Some(true)
    }
}
