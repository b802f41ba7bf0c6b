//! Records as they travel: how one becomes a message, what is kept to send it on byte for byte, and the headers of a
//! retry.
//!
//! A retry topic is written by hapax, but whoever may write there can forge its headers: they are believed only as far
//! as the topic itself says the same (`clamped`).

use std::ops::Range;
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

/// Most bytes of a record that shares its block with others.
const SHARED_MAX: usize = 2 << 10;
/// The size of a block that records share.
const BLOCK: usize = 16 << 10;
/// What is expected of the headers of a record.
const HEADERS_EXPECTED: usize = 512;
/// In place of a length: there is no value.
const NULL: u32 = u32::MAX;

/// Where records are copied to. Small ones share a block: what one thread allocates and another frees is dear, and the
/// thread that polls would allocate for every record.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    shared: BytesMut,
    /// Of one large record.
    own: BytesMut,
}

/// A record as it was fetched, as one run of bytes: key, value, and the headers, each as the lengths of its name and its
/// value, and both.
#[derive(Clone, Debug)]
pub(crate) struct Raw {
    run: Bytes,
    /// Whether its block holds others too.
    is_shared: bool,
    key: Option<u32>,
    value: Option<u32>,
    headers: usize,
    /// A header's name was not UTF-8, which the client cannot hand over.
    unreadable_header: bool,
}

impl Blocks {
    /// Copies a record out of the client.
    pub(crate) fn copy(&mut self, record: &rdkafka::message::BorrowedMessage<'_>) -> Raw {
        let (key, value) = (record.key(), record.payload());
        let mut raw = self.begin(key, value);
        let Some(found) = record.headers() else { return self.end(raw) };
        for at in 0..found.count() {
            // rdkafka 0.39 panics on a name that is not UTF-8, and anybody may send one.
            match catch_unwind(AssertUnwindSafe(|| found.try_get(at))) {
                Ok(Some(header)) => self.header(&mut raw, header.key, header.value),
                Ok(None) => {}
                Err(_) => raw.unreadable_header = true,
            }
        }
        self.end(raw)
    }

    fn begin(&mut self, key: Option<&[u8]>, value: Option<&[u8]>) -> Raw {
        let known = key.map_or(0, <[u8]>::len) + value.map_or(0, <[u8]>::len);
        let is_shared = known <= SHARED_MAX;
        if !is_shared {
            self.own = BytesMut::with_capacity(known + HEADERS_EXPECTED);
        } else if self.shared.capacity() < known + HEADERS_EXPECTED {
            self.shared = BytesMut::with_capacity(BLOCK);
        }
        let (key_length, value_length) = (key.map(length), value.map(length));
        let raw = Raw {
            run: Bytes::new(),
            is_shared,
            key: key_length,
            value: value_length,
            headers: 0,
            unreadable_header: false,
        };
        let block = self.of(&raw);
        for part in [key, value].into_iter().flatten() {
            block.extend_from_slice(part);
        }
        raw
    }

    fn of(&mut self, raw: &Raw) -> &mut BytesMut {
        if raw.is_shared { &mut self.shared } else { &mut self.own }
    }

    fn header(&mut self, raw: &mut Raw, name: &str, value: Option<&[u8]>) {
        let block = self.of(raw);
        block.extend_from_slice(&length(name.as_bytes()).to_le_bytes());
        block.extend_from_slice(&value.map_or(NULL, length).to_le_bytes());
        block.extend_from_slice(name.as_bytes());
        block.extend_from_slice(value.unwrap_or_default());
        raw.headers += 1;
    }

    fn end(&mut self, mut raw: Raw) -> Raw {
        raw.run = self.of(&raw).split().freeze();
        if raw.run.len() > SHARED_MAX + HEADERS_EXPECTED {
            // It may have outgrown its block: what is left of that would keep it for as long as small ones are there.
            *self.of(&raw) = BytesMut::new();
        }
        raw
    }
}

/// No part of a record is longer: its own length is an `i32`.
fn length(part: &[u8]) -> u32 {
    u32::try_from(part.len()).unwrap_or(NULL - 1)
}

/// The headers of a record: names, and where their values are in the run.
struct RawHeaders<'a> {
    run: &'a [u8],
    at: usize,
}

impl<'a> RawHeaders<'a> {
    fn length(&mut self) -> Option<u32> {
        let read = self.run.get(self.at..self.at + 4)?.try_into().ok()?;
        self.at += 4;
        Some(u32::from_le_bytes(read))
    }

    fn part(&mut self, length: u32) -> Range<usize> {
        let from = self.at;
        self.at += length as usize;
        from..self.at
    }
}

impl<'a> Iterator for RawHeaders<'a> {
    type Item = (&'a str, Option<Range<usize>>);

    fn next(&mut self) -> Option<Self::Item> {
        let (name, value) = (self.length()?, self.length()?);
        let name = std::str::from_utf8(self.run.get(self.part(name))?).ok()?;
        Some((name, (value != NULL).then(|| self.part(value))))
    }
}

impl Raw {
    pub(crate) fn key(&self) -> Option<Bytes> {
        self.key.map(|key| self.run.slice(..key as usize))
    }

    /// `None` for a tombstone.
    pub(crate) fn value(&self) -> Option<Bytes> {
        let from = self.value_at();
        self.value.map(|value| self.run.slice(from..from + value as usize))
    }

    fn value_at(&self) -> usize {
        self.key.unwrap_or(0) as usize
    }

    /// What it takes in memory: at least what its message takes, as the runtime counts.
    pub(crate) fn bytes(&self) -> usize {
        self.run.len()
    }

    fn each_header(&self) -> RawHeaders<'_> {
        RawHeaders { run: &self.run, at: self.value_at() + self.value.unwrap_or(0) as usize }
    }

    fn header(&self, name: &str) -> Option<&str> {
        let (_, at) = self.each_header().find(|(found, _)| *found == name)?;
        std::str::from_utf8(&self.run[at?]).ok()
    }

    fn headers(&self) -> Headers {
        let mut headers = Headers::with_capacity(self.headers);
        for (name, at) in self.each_header() {
            headers.push(name, at.map_or_else(Bytes::new, |at| self.run.slice(at)));
        }
        headers
    }

    /// Its message, with bytes of its own where it shares a block: whoever keeps one message keeps no others with it.
    pub(crate) fn message(&self, limits: &MessageLimits) -> Message {
        let own = |part: Bytes| if self.is_shared { Bytes::copy_from_slice(&part) } else { part };
        let mut message = self.decoded(own(self.value().unwrap_or_default()), limits);
        let headers = std::mem::take(&mut message.headers);
        if !headers.is_empty() {
            message.headers = headers.iter().map(|(name, value)| (name, own(value.clone()))).collect();
        }
        message
    }

    /// Reads it as a message. A tombstone has empty data; a record key that is text is the partition key of a message
    /// that names none.
    fn decoded(&self, body: Bytes, limits: &MessageLimits) -> Message {
        if self.unreadable_header {
            let mut headers = self.headers();
            headers.retain(|name| !is_reserved(name));
            return Message::defective(headers, body, Defect::undecodable("the name of a header is not UTF-8"));
        }
        let mut message = cloudevents::decode(self.headers(), body, &Convention::KAFKA, limits);
        if message.attributes.partition_key.is_none()
            && message.defect().is_none()
            && let Some(key) = self.key.filter(|key| *key > 0)
            && let Ok(key) = std::str::from_utf8(&self.run[..key as usize])
        {
            message.attributes.partition_key = Some(key.into());
        }
        message
    }

    /// The headers that go on with it: its own, without those of hapax but for the token.
    fn carried(&self, token: bool) -> OwnedHeaders {
        let mut headers = OwnedHeaders::new_with_capacity(self.headers + 9);
        for (name, at) in self.each_header() {
            if !is_reserved(name) || (token && name == REOPEN) {
                headers = add(headers, name, at.map(|at| &self.run[at]));
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
        let mut blocks = Blocks::default();
        let mut raw = blocks.begin(key, value);
        for (name, value) in given {
            blocks.header(&mut raw, name, Some(value.as_bytes()));
        }
        blocks.end(raw)
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
    fn records_that_share_a_block_stay_as_they_were() {
        let mut blocks = Blocks::default();
        let records: Vec<(Vec<u8>, Vec<u8>, Vec<u8>)> = (0..200_usize)
            .map(|number| {
                let sizes = [0, 1, 300, SHARED_MAX, SHARED_MAX + 1, BLOCK * 2];
                let bytes = |size: usize, add: usize| (0..size).map(|at| (at + number + add) as u8).collect();
                (bytes(number % 9, 1), bytes(sizes[number % sizes.len()], 2), bytes(sizes[number / 3 % sizes.len()], 3))
            })
            .collect();
        let copy = |(key, value, header): &(Vec<u8>, Vec<u8>, Vec<u8>)| {
            let mut raw = blocks.begin(Some(key), Some(value));
            for (name, value) in [("one", Some(&**header)), ("", None), ("three", Some(&[][..]))] {
                blocks.header(&mut raw, name, value);
            }
            blocks.end(raw)
        };
        let raws: Vec<Raw> = records.iter().map(copy).collect();
        for (raw, (key, value, header)) in raws.iter().zip(&records) {
            assert_eq!((raw.key().as_deref(), raw.value().as_deref()), (Some(&**key), Some(&**value)));
            let headers: Vec<_> = raw.each_header().map(|(name, at)| (name, at.map(|at| &raw.run[at]))).collect();
            assert_eq!(headers, [("one", Some(&**header)), ("", None), ("three", Some(&[][..]))]);
            let message = raw.message(&MessageLimits { header_bytes_max: usize::MAX, ..MessageLimits::DEFAULT });
            assert_eq!((&*message.data, message.headers.get("one").map(|value| &**value)), (&**value, Some(&**header)));
            assert!(message.bytes() <= raw.bytes());
        }
    }

    #[test]
    fn whoever_keeps_a_small_message_keeps_no_others_with_it() {
        let long = "7".repeat(SHARED_MAX);
        for (size, header, shares) in [
            (100, "7", false),
            (SHARED_MAX, &*long, false),
            (100, &*long.repeat(9), false),
            (SHARED_MAX * 4, "7", true),
        ] {
            let raw = Raw::of(None, Some(&vec![b'x'; size]), &[("x-tenant", header)]);
            let message = raw.message(&MessageLimits { header_bytes_max: usize::MAX, ..MessageLimits::DEFAULT });
            let within = |part: &Bytes| raw.run.as_ptr_range().contains(&part.as_ptr());
            assert_eq!(within(&message.data), shares);
            assert_eq!(message.headers.get("x-tenant").map(within), Some(shares));
        }
    }

    #[test]
    fn a_large_record_neither_ends_a_shared_block_nor_keeps_what_is_left_of_one() {
        let mut blocks = Blocks::default();
        let mut copied = |value: &[u8], header: &str| {
            let mut raw = blocks.begin(None, Some(value));
            blocks.header(&mut raw, "h", Some(header.as_bytes()));
            (blocks.end(raw), blocks.shared.capacity())
        };
        let (_, left) = copied(b"small", "");
        assert!(left > BLOCK / 2);
        assert_eq!(copied(&[0; SHARED_MAX * 4], "").1, left, "it has a block of its own");
        assert!(copied(b"small", "").1 < left, "the shared one goes on");
        assert_eq!(copied(b"small", &"7".repeat(BLOCK * 9)).1, 0, "what grew for one is not kept for the next");
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
