//! The names of everything in Redis. Each begins with a hash tag, `{prefix:partition}`, so that a cluster keeps all keys
//! of a partition in one slot and a script may work with them.

use hapax::{ConsumerId, Error, ErrorKind, EventKey, Result};

/// Longest prefix.
const PREFIX_BYTES_MAX: usize = 64;

/// Most partitions: a batch is sent in as many scripts as it has partitions.
pub(super) const PARTITIONS_MAX: u16 = 1024;

/// A store's names.
#[derive(Clone, Debug)]
pub(super) struct Keys {
    prefix: Box<str>,
}

impl Keys {
    pub(super) fn new(prefix: &str) -> Result<Self> {
        let is_word = |c: char| c.is_ascii_alphanumeric() || "_.:-".contains(c);
        if prefix.is_empty() || prefix.len() > PREFIX_BYTES_MAX || !prefix.chars().all(is_word) {
            let why = format!(
                "prefix {prefix:?}: take 1 to {PREFIX_BYTES_MAX} of the characters A-Z, a-z, 0-9, '_', '.', ':' and '-'"
            );
            return Err(Error::new(ErrorKind::Configuration, "connect").because(why));
        }
        Ok(Self { prefix: prefix.into() })
    }

    fn tagged(&self, partition: u16, rest: &[u8]) -> Vec<u8> {
        let mut key = Vec::with_capacity(self.prefix.len() + 8 + rest.len());
        key.extend_from_slice(b"{");
        key.extend_from_slice(self.prefix.as_bytes());
        key.extend_from_slice(format!(":{partition}}}").as_bytes());
        key.extend_from_slice(rest);
        key
    }

    /// What is known of the store: version and partitions.
    pub(super) fn store(&self) -> Vec<u8> {
        self.tagged(0, b"store")
    }

    /// Consumers' numbers by their names.
    pub(super) fn numbers(&self) -> Vec<u8> {
        self.tagged(0, b"consumers")
    }

    /// Retentions by consumers' numbers, in milliseconds.
    pub(super) fn retentions(&self) -> Vec<u8> {
        self.tagged(0, b"retentions")
    }

    /// A key that is there for a moment only.
    pub(super) fn trial(&self) -> Vec<u8> {
        self.tagged(0, b"trial")
    }

    /// The highest fence that was granted in a partition.
    pub(super) fn fence(&self, partition: u16) -> Vec<u8> {
        self.tagged(partition, b"fence")
    }

    /// What the records of one consumer in one partition begin with: four bytes of its number stand behind the tag.
    pub(super) fn records(&self, partition: u16, consumer: ConsumerId) -> Vec<u8> {
        self.tagged(partition, &consumer.0.to_be_bytes())
    }

    /// Matches the records of [`records`](Self::records) and nothing else of ours: those bytes and sixteen more.
    pub(super) fn pattern(&self, partition: u16, consumer: ConsumerId) -> Vec<u8> {
        let mut pattern = Vec::new();
        for byte in self.records(partition, consumer) {
            if matches!(byte, b'*' | b'?' | b'[' | b']' | b'\\' | b'^') {
                pattern.push(b'\\');
            }
            pattern.push(byte);
        }
        pattern.extend_from_slice(&[b'?'; 16]);
        pattern
    }
}

/// Where an event's record is, of so many partitions.
pub(super) fn partition(key: EventKey, partitions: u16) -> u16 {
    u16::from_be_bytes([key.0[14], key.0[15]]) % partitions.max(1)
}

/// The event whose record has this key.
pub(super) fn event(record_key: &[u8]) -> Option<EventKey> {
    record_key.last_chunk::<16>().map(|bytes| EventKey(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_keys_of_a_partition_bear_one_tag() {
        let keys = Keys::new("shop").expect("a prefix");
        let record = keys.records(3, ConsumerId(0x4142_4344));
        assert_eq!(record, b"{shop:3}ABCD");
        assert_eq!(keys.fence(3), b"{shop:3}fence");
        assert_eq!(keys.store(), b"{shop:0}store");
    }

    #[test]
    fn a_consumers_number_that_looks_like_a_pattern_is_taken_as_it_is() {
        let keys = Keys::new("h").expect("a prefix");
        let number = ConsumerId(u32::from_be_bytes(*b"*?[\\"));
        assert_eq!(keys.pattern(0, number), [b"{h:0}\\*\\?\\[\\\\".as_slice(), &[b'?'; 16]].concat());
    }

    #[test]
    fn a_prefix_that_could_leave_its_tag_is_refused_by_name() {
        for prefix in ["", "a{b", "a}b", "a b", "ä", &"x".repeat(65)] {
            let error = Keys::new(prefix).expect_err(prefix);
            assert!(error.to_string().contains("prefix"), "{error}");
            assert_eq!(error.kind(), ErrorKind::Configuration);
        }
    }

    #[test]
    fn partitions_share_the_events() {
        let mut counts = [0; 16];
        for n in 0..4096 {
            counts[usize::from(partition(EventKey::of("c", "s", &n.to_string()), 16))] += 1;
        }
        assert!(counts.iter().all(|count| (150..400).contains(count)), "{counts:?}");
        assert_eq!(partition(EventKey([255; 16]), 1), 0);
    }
}
