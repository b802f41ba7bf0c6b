//! Records as they travel: how one becomes a message, what is kept to send it on byte for byte, and the headers of a
//! retry.
//!
//! A retry topic is written by hapax, but whoever may write there can forge its headers: they are believed only as far
//! as the topic itself says the same (`clamped`).

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use hapax::cloudevents::{self, Convention};
use hapax::{DeadLetter, Defect, Headers, Message, MessageLimits, RESERVED_PREFIX};
use rdkafka::message::{Header, Headers as _, Message as _, OwnedHeaders};

const RETRY_TOPIC: &str = "hapax-retry-topic";
const RETRY_PARTITION: &str = "hapax-retry-partition";
const RETRY_OFFSET: &str = "hapax-retry-offset";
const RETRY_DUE: &str = "hapax-retry-due-unix-ms";
const RETRY_HOPS: &str = "hapax-retry-hops";
const REOPEN: &str = "hapax-reopen";

/// Where in the block a part is.
type Part = (usize, usize);

/// A record as it was fetched: one block of bytes, and where what is in it.
#[derive(Clone, Debug)]
pub(crate) struct Raw {
    block: Bytes,
    key: Option<Part>,
    value: Option<Part>,
    headers: Box<[(Box<str>, Option<Part>)]>,
    /// A header's name was not UTF-8, which the client cannot hand over.
    unreadable_header: bool,
}

impl Raw {
    /// Copies a record out of the client.
    pub(crate) fn copied(record: &rdkafka::message::BorrowedMessage<'_>) -> Self {
        let key = record.key();
        let value = record.payload();
        let mut block = BytesMut::with_capacity(key.map_or(0, <[u8]>::len) + value.map_or(0, <[u8]>::len) + 256);
        let mut put = |part: &[u8]| {
            let from = block.len();
            block.extend_from_slice(part);
            (from, block.len())
        };
        let (key, value) = (key.map(&mut put), value.map(&mut put));
        let mut headers = Vec::new();
        let mut unreadable_header = false;
        if let Some(found) = record.headers() {
            headers.reserve_exact(found.count());
            for at in 0..found.count() {
                // rdkafka 0.39 panics on a name that is not UTF-8, and anybody may send one.
                match catch_unwind(AssertUnwindSafe(|| found.try_get(at))) {
                    Ok(Some(header)) => headers.push((header.key.into(), header.value.map(&mut put))),
                    Ok(None) => {}
                    Err(_) => unreadable_header = true,
                }
            }
        }
        Self { block: block.freeze(), key, value, headers: headers.into_boxed_slice(), unreadable_header }
    }

    fn slice(&self, (from, to): Part) -> Bytes {
        self.block.slice(from..to)
    }

    pub(crate) fn key(&self) -> Option<Bytes> {
        self.key.map(|at| self.slice(at))
    }

    /// `None` for a tombstone.
    pub(crate) fn value(&self) -> Option<Bytes> {
        self.value.map(|at| self.slice(at))
    }

    /// What it takes in memory.
    pub(crate) fn bytes(&self) -> usize {
        self.block.len()
    }

    fn header(&self, name: &str) -> Option<&str> {
        let (_, at) = self.headers.iter().find(|(found, _)| &**found == name)?;
        let (from, to) = (*at)?;
        std::str::from_utf8(&self.block[from..to]).ok()
    }

    fn headers(&self) -> Headers {
        let mut headers = Headers::with_capacity(self.headers.len());
        for (name, at) in &self.headers {
            headers.push(name.clone(), at.map_or_else(Bytes::new, |at| self.slice(at)));
        }
        headers
    }

    /// Reads it as a message. A tombstone has empty data; a record key that is text is the partition key of a message
    /// that names none.
    pub(crate) fn message(&self, limits: &MessageLimits) -> Message {
        let body = self.value().unwrap_or_default();
        if self.unreadable_header {
            let mut headers = self.headers();
            headers.retain(|name| !is_reserved(name));
            return Message::defective(headers, body, Defect::undecodable("the name of a header is not UTF-8"));
        }
        let mut message = cloudevents::decode(self.headers(), body, &Convention::KAFKA, limits);
        if message.attributes.partition_key.is_none()
            && message.defect().is_none()
            && let Some(key) = self.key().filter(|key| !key.is_empty())
            && let Ok(key) = std::str::from_utf8(&key)
        {
            message.attributes.partition_key = Some(key.into());
        }
        message
    }

    /// The headers that go on with it: its own, without those of hapax but for the token.
    fn carried(&self, token: bool) -> OwnedHeaders {
        let mut headers = OwnedHeaders::new_with_capacity(self.headers.len() + 9);
        for (name, at) in &self.headers {
            if !is_reserved(name) || (token && &**name == REOPEN) {
                headers = add(headers, name, at.map(|(from, to)| &self.block[from..to]));
            }
        }
        headers
    }

    /// Its headers in a retry topic.
    pub(crate) fn retried(&self, home: &Home, due: SystemTime) -> OwnedHeaders {
        let mut headers = self.carried(true);
        for (name, value) in [
            (RETRY_TOPIC, home.topic.to_string()),
            (RETRY_PARTITION, home.partition.to_string()),
            (RETRY_OFFSET, home.offset.to_string()),
            (RETRY_DUE, unix_ms(due).to_string()),
            (RETRY_HOPS, home.hops.saturating_add(1).to_string()),
        ] {
            headers = add(headers, name, Some(value.as_bytes()));
        }
        headers
    }

    /// Its headers among the dead letters.
    pub(crate) fn dead(&self, letter: &DeadLetter) -> OwnedHeaders {
        let mut headers = self.carried(false);
        for (name, value) in letter.headers().iter() {
            headers = add(headers, name, Some(value));
        }
        headers
    }

    /// Where it stood before it was retried, as its headers say, if they say what can be: a main topic of this consumer.
    pub(crate) fn home(&self, is_main: impl Fn(&str) -> bool) -> Option<Home> {
        let topic = self.header(RETRY_TOPIC).filter(|topic| is_main(topic))?;
        let partition = self.header(RETRY_PARTITION)?.parse().ok().filter(|partition| *partition >= 0)?;
        let offset = self.header(RETRY_OFFSET)?.parse().ok().filter(|offset| *offset >= 0)?;
        let hops = self.header(RETRY_HOPS).and_then(|hops| hops.parse().ok()).unwrap_or(0);
        Some(Home { topic: topic.into(), partition, offset, hops })
    }

    /// How long it waits from `now`: until the time it names, at most `step`. Without a time that reads, `step` from
    /// when it was written.
    pub(crate) fn wait(&self, written_ms: Option<i64>, now: SystemTime, step: Duration) -> Duration {
        let named = self.header(RETRY_DUE).and_then(|due| due.parse::<u64>().ok());
        let written = written_ms.and_then(|ms| u64::try_from(ms).ok());
        let step_ms = u64::try_from(step.as_millis()).unwrap_or(u64::MAX);
        let due = named.or(written.map(|written| written.saturating_add(step_ms)));
        let now_ms = unix_ms(now);
        due.map_or(step, |due| Duration::from_millis(due.saturating_sub(now_ms))).min(step)
    }
}

/// Where a record stands that was not retried, or stood before it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Home {
    pub(crate) topic: std::sync::Arc<str>,
    pub(crate) partition: i32,
    pub(crate) offset: i64,
    /// How often it was retried.
    pub(crate) hops: u32,
}

/// A message as a record: its key and value, and its headers.
pub(crate) fn record(message: &Message, structured: bool) -> hapax::Result<(Option<Bytes>, Bytes, OwnedHeaders)> {
    let (headers, body) = if structured {
        cloudevents::encode_structured(message, &Convention::KAFKA)?
    } else {
        cloudevents::encode(message, &Convention::KAFKA)
    };
    let mut owned = OwnedHeaders::new_with_capacity(headers.len());
    for (name, value) in headers.iter() {
        owned = add(owned, name, Some(value));
    }
    let key = message.attributes.partition_key.as_deref().filter(|key| !key.is_empty());
    Ok((key.map(|key| Bytes::copy_from_slice(key.as_bytes())), body, owned))
}

fn add(headers: OwnedHeaders, name: &str, value: Option<&[u8]>) -> OwnedHeaders {
    headers.insert(Header { key: name, value })
}

fn is_reserved(name: &str) -> bool {
    name.get(..RESERVED_PREFIX.len()).is_some_and(|prefix| prefix.eq_ignore_ascii_case(RESERVED_PREFIX))
}

/// Rounded up, so that nothing comes back too early.
fn unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}

#[cfg(test)]
impl Raw {
    /// A record with these headers, for tests.
    pub(crate) fn of(key: Option<&[u8]>, value: Option<&[u8]>, given: &[(&str, &str)]) -> Self {
        let mut block = BytesMut::new();
        let mut put = |part: &[u8]| {
            let from = block.len();
            block.extend_from_slice(part);
            (from, block.len())
        };
        let (key, value) = (key.map(&mut put), value.map(&mut put));
        let headers = given.iter().map(|(name, value)| ((*name).into(), Some(put(value.as_bytes())))).collect();
        Self { block: block.freeze(), key, value, headers, unreadable_header: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: SystemTime = SystemTime::UNIX_EPOCH;
    const STEP: Duration = Duration::from_secs(15);

    fn pairs(headers: &OwnedHeaders) -> Vec<(String, String)> {
        let text = |value: Option<&[u8]>| String::from_utf8_lossy(value.unwrap_or_default()).into_owned();
        headers.iter().map(|header| (header.key.to_owned(), text(header.value))).collect()
    }

    /// Bug 75 of semantics.md section 4 (spring-projects/spring-kafka#4493): retry headers were trusted, and a time far
    /// away paused a listener for as long.
    #[test]
    fn forged_retry_headers_are_clamped() {
        let now = NOW + Duration::from_secs(1_000_000);
        for due in ["18446744073709551615", "18446744073709551616", "-1", "99999999999999", "", "soon", "0"] {
            let raw = Raw::of(None, None, &[(RETRY_DUE, due)]);
            for written in [None, Some(-5), Some(i64::MAX), Some(0)] {
                assert!(raw.wait(written, now, STEP) <= STEP, "{due:?} {written:?}");
            }
        }
        let is_main = |topic: &str| topic == "orders";
        for (topic, partition, offset) in [
            ("payments", "0", "1"),
            ("orders", "-1", "1"),
            ("orders", "0", "-9223372036854775808"),
            ("orders", "x", "1"),
        ] {
            let raw =
                Raw::of(None, None, &[(RETRY_TOPIC, topic), (RETRY_PARTITION, partition), (RETRY_OFFSET, offset)]);
            assert_eq!(raw.home(is_main), None, "{topic} {partition} {offset}");
        }
        let raw = Raw::of(
            None,
            None,
            &[(RETRY_TOPIC, "orders"), (RETRY_PARTITION, "3"), (RETRY_OFFSET, "17"), (RETRY_HOPS, "-4")],
        );
        let home = raw.home(is_main).expect("it reads");
        assert_eq!((home.partition, home.offset, home.hops), (3, 17, 0));
    }

    #[test]
    fn a_retry_waits_until_the_time_that_it_names() {
        let now = NOW + Duration::from_secs(100);
        let named = |due: &str| Raw::of(None, None, &[(RETRY_DUE, due)]).wait(Some(0), now, STEP);
        assert_eq!(named("103500"), Duration::from_millis(3_500));
        assert_eq!(named("99000"), Duration::ZERO);
        let unnamed = Raw::of(None, None, &[]);
        assert_eq!(unnamed.wait(Some(95_000), now, STEP), Duration::from_secs(10));
        assert_eq!(unnamed.wait(None, now, STEP), STEP);
    }

    #[test]
    fn a_retry_of_a_retry_bears_one_set_of_headers() {
        let raw = Raw::of(
            Some(b"k"),
            Some(b"{}"),
            &[("ce_id", "1"), (REOPEN, "7"), (RETRY_HOPS, "1"), (RETRY_TOPIC, "orders"), ("hapax-forged", "x")],
        );
        let home = Home { topic: "orders".into(), partition: 3, offset: 17, hops: 1 };
        let headers = pairs(&raw.retried(&home, NOW + Duration::from_micros(1)));
        let expected = [
            ("ce_id", "1"),
            (REOPEN, "7"),
            (RETRY_TOPIC, "orders"),
            (RETRY_PARTITION, "3"),
            (RETRY_OFFSET, "17"),
            (RETRY_DUE, "1"),
            (RETRY_HOPS, "2"),
        ];
        assert_eq!(headers, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }

    #[test]
    fn a_tombstone_is_a_message_with_empty_data() {
        let raw = Raw::of(Some(b"order 7"), None, &[]);
        let message = raw.message(&MessageLimits::DEFAULT);
        assert!(message.data.is_empty() && message.defect().is_none());
        assert_eq!(message.attributes.partition_key.as_deref(), Some("order 7"));
        assert_eq!(raw.value(), None, "and goes on as a tombstone");
    }

    #[test]
    fn a_record_key_is_the_partition_key_unless_the_event_names_one() {
        let key = |raw: &Raw| raw.message(&MessageLimits::DEFAULT).attributes.partition_key;
        assert_eq!(key(&Raw::of(Some(b""), Some(b"x"), &[])), None);
        assert_eq!(key(&Raw::of(None, Some(b"x"), &[])), None);
        assert_eq!(key(&Raw::of(Some(&[255]), Some(b"x"), &[])), None);
        let own =
            [("ce_specversion", "1.0"), ("ce_id", "1"), ("ce_source", "s"), ("ce_type", "t"), ("ce_partitionkey", "p")];
        assert_eq!(key(&Raw::of(Some(b"k"), Some(b"x"), &own)).as_deref(), Some("p"));
    }
}
