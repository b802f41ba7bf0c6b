//! What scripts are told and what they answer, in bytes. The records' own layout is in `common.lua`.

use std::num::NonZeroU64;
use std::time::Duration;

use hapax::{
    Claim, ClaimRequest, Error, ErrorKind, EventKey, History, Lease, Outcome, Reason, RecordView, Recorded, Renewal,
    Result, Status, Trouble,
};
use redis::Value;

/// Longest time that is told to a script, 71 years: added to the clock it stays below 2^53.
const TIME_MAX: u64 = 1 << 51;

/// The first number that a script cannot tell from its neighbour.
const NUMBER_END: u64 = 1 << 53;

/// Longest text of a trouble, in bytes: the runtime cuts sooner, this keeps a record readable in any case.
const TEXT_BYTES_MAX: usize = 8 * 1024;

pub(super) fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(TIME_MAX).min(TIME_MAX)
}

/// Seven bytes, as all times and fences are written.
fn seven(number: u64) -> [u8; 7] {
    let [_, bytes @ ..] = number.to_be_bytes();
    bytes
}

/// Most bytes of what the claim script is told of one item.
pub(super) const CLAIM_BYTES: usize = 39;

/// What the claim script is told of one item, instead of what stands in `item`.
pub(super) fn put_claim(item: &mut Vec<u8>, request: &ClaimRequest) {
    item.clear();
    item.extend_from_slice(&request.fingerprint.0);
    item.extend_from_slice(&request.token.to_be_bytes());
    // A token beyond 2^53 is none of ours: as good as no token.
    if let Some(token) = request.reopen.filter(|token| token.get() < NUMBER_END) {
        item.extend_from_slice(&seven(token.get()));
    }
}

/// A lease's fence for a script.
pub(super) fn fence(lease: &Lease, operation: &'static str) -> Result<[u8; 7]> {
    if lease.fence.get() < NUMBER_END {
        return Ok(seven(lease.fence.get()));
    }
    Err(Error::new(ErrorKind::Rejected, operation).because("the lease's fence is not below 2^53: no store granted it"))
}

/// What the record script is told: once where it is the same for items that follow each other, as it is for most, and how
/// many they are before it.
#[derive(Default)]
pub(super) struct Runs {
    bytes: Vec<u8>,
    /// Where each ends.
    ends: Vec<usize>,
    count: u16,
}

impl Runs {
    /// One more item.
    pub(super) fn add(&mut self, lease: &Lease, outcome: &Outcome) -> Result<()> {
        let (last, end) = (self.ends.len().checked_sub(2).map_or(0, |at| self.ends[at]), self.bytes.len());
        self.bytes.extend_from_slice(&1_u16.to_be_bytes());
        put_outcome(&mut self.bytes, lease, outcome)?;
        let is_same = !self.ends.is_empty() && self.bytes[last + 2..end] == self.bytes[end + 2..];
        if is_same && self.count < u16::MAX {
            self.bytes.truncate(end);
            self.count += 1;
            self.bytes[last..last + 2].copy_from_slice(&self.count.to_be_bytes());
        } else {
            self.ends.push(self.bytes.len());
            self.count = 1;
        }
        Ok(())
    }

    /// What the script is told.
    pub(super) fn iter(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        self.ends.iter().enumerate().map(|(at, end)| &self.bytes[at.checked_sub(1).map_or(0, |at| self.ends[at])..*end])
    }

    /// Bytes of all.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }
}

fn put_outcome(item: &mut Vec<u8>, lease: &Lease, outcome: &Outcome) -> Result<()> {
    item.push(match outcome {
        Outcome::Processed => b'P',
        Outcome::Failed { .. } => b'F',
        Outcome::Doomed { .. } => b'D',
        Outcome::DeadLettered => b'L',
    });
    item.extend_from_slice(&fence(lease, "record")?);
    item.extend_from_slice(&lease.attempt.to_be_bytes());
    match outcome {
        Outcome::Processed | Outcome::DeadLettered => {}
        Outcome::Failed { after, counted, trouble } => {
            item.push(u8::from(*counted));
            item.extend_from_slice(&seven(microseconds(*after)));
            put_trouble(item, trouble);
        }
        Outcome::Doomed { reason, trouble } => {
            let word = reason.as_str();
            item.push(u8::try_from(word.len()).unwrap_or(u8::MAX));
            item.extend_from_slice(word.as_bytes());
            put_trouble(item, trouble);
        }
    }
    Ok(())
}

fn put_trouble(item: &mut Vec<u8>, trouble: &Trouble) {
    for text in [&trouble.id, &trouble.error] {
        let text = &text[..text.floor_char_boundary(TEXT_BYTES_MAX)];
        let length = u16::try_from(text.len()).unwrap_or(u16::MAX);
        item.extend_from_slice(&length.to_be_bytes());
        item.extend_from_slice(text.as_bytes());
    }
}

/// An answer that no script of ours gives.
pub(super) fn strange(operation: &'static str) -> Error {
    let why = "the server answered a script in a way that hapax does not know: is it Redis 6.2 or newer?";
    Error::new(ErrorKind::Incompatible, operation).because(why)
}

/// The answers of the claim script, and whether all were new.
pub(super) fn claims<'a>(
    answer: &Value,
    requests: impl ExactSizeIterator<Item = &'a ClaimRequest>,
) -> Result<(Vec<Claim>, bool)> {
    claims_of(answer, requests).ok_or_else(|| strange("claim"))
}

fn claims_of<'a>(
    answer: &Value,
    requests: impl ExactSizeIterator<Item = &'a ClaimRequest>,
) -> Option<(Vec<Claim>, bool)> {
    let Value::BulkString(bytes) = answer else { return None };
    let rest = &mut bytes.as_slice();
    let fresh = number(rest)?;
    let (mut claims, mut all_new) = (Vec::with_capacity(requests.len()), true);
    for request in requests {
        let [letter] = take(rest)?;
        all_new &= letter == NEW;
        claims.push(claim(letter, rest, fresh, request)?);
    }
    rest.is_empty().then_some((claims, all_new))
}

/// The letter of an event of which there was no record.
const NEW: u8 = b'N';

fn claim(letter: u8, rest: &mut &[u8], fresh: u64, request: &ClaimRequest) -> Option<Claim> {
    let lease = |fence: u64, attempt| {
        let fence = NonZeroU64::new(fence)?;
        Some(Lease { consumer: request.consumer, key: request.key, fence, attempt })
    };
    Some(match letter {
        NEW => Claim::Granted(lease(fresh, 1)?, None),
        b'F' => Claim::Granted(lease(number(rest)?, 1)?, None),
        b'P' => Claim::Processed { ago: time(rest)? },
        b'D' => Claim::DeadLettered { ago: time(rest)? },
        b'H' => Claim::Held { wait: time(rest)? },
        b'W' => Claim::NotYet { wait: time(rest)? },
        b'C' => Claim::Conflict,
        b'G' => {
            let length = usize::try_from(count(rest)?).ok()?;
            let (mut history, behind) = rest.split_at_checked(length)?;
            *rest = behind;
            let rest = &mut history;
            let (fence, attempt, crashes, first) = (number(rest)?, count(rest)?, count(rest)?, time(rest)?);
            let doomed = if take::<1>(rest)? == [DOOMED] { Some((number(rest)?, reason(rest)?).1) } else { None };
            let trouble = trouble(rest)?.unwrap_or_default();
            Claim::Granted(lease(fence, attempt)?, Some(Box::new(History { crashes, first, trouble, doomed })))
        }
        _ => return None,
    })
}

/// The answers of the renew script.
pub(super) fn renewals(answer: &Value, count: usize) -> Result<Vec<Renewal>> {
    letters("renew", answer, count, |letter| match letter {
        b'R' => Some(Renewal::Renewed),
        b'L' => Some(Renewal::Lost),
        _ => None,
    })
}

/// The answers of the record script.
pub(super) fn recordeds(answer: &Value, count: usize) -> Result<Vec<Recorded>> {
    letters("record", answer, count, |letter| match letter {
        b'D' => Some(Recorded::Done),
        b'A' => Some(Recorded::AlreadyDone),
        b'V' => Some(Recorded::Vanished),
        b'F' => Some(Recorded::Fenced),
        _ => None,
    })
}

fn letters<T>(
    operation: &'static str,
    answer: &Value,
    count: usize,
    meaning: impl Fn(u8) -> Option<T>,
) -> Result<Vec<T>> {
    match answer {
        Value::BulkString(bytes) if bytes.len() == count => bytes.iter().map(|letter| meaning(*letter)).collect(),
        _ => None,
    }
    .ok_or_else(|| strange(operation))
}

const CLAIMED: u8 = 0x20;
const WAITING: u8 = 0x21;
const DOOMED: u8 = 0x22;
const PROCESSED: u8 = 0x23;
const DEAD_LETTERED: u8 = 0x24;

/// The first byte of records in this status.
pub(super) fn state(status: Status) -> u8 {
    match status {
        Status::Claimed => CLAIMED,
        Status::Waiting => WAITING,
        Status::Doomed => DOOMED,
        Status::Processed => PROCESSED,
        Status::DeadLettered => DEAD_LETTERED,
    }
}

/// A time that stands alone.
pub(super) fn moment(mut bytes: &[u8]) -> Option<u64> {
    number(&mut bytes)
}

/// A record as an operator sees it, and when it entered its status, or until when it is held or waits.
pub(super) fn view(key: EventKey, record: &[u8], now: u64, operation: &'static str) -> Result<(u64, RecordView)> {
    view_of(key, record, now).ok_or_else(|| {
        let why = format!("the record of {key:?} is damaged or was written by another version of hapax");
        Error::new(ErrorKind::Incompatible, operation).because(why)
    })
}

fn view_of(key: EventKey, mut record: &[u8], now: u64) -> Option<(u64, RecordView)> {
    let rest = &mut record;
    let [state] = take(rest)?;
    let status = match state {
        CLAIMED => Status::Claimed,
        WAITING => Status::Waiting,
        DOOMED => Status::Doomed,
        PROCESSED => Status::Processed,
        DEAD_LETTERED => Status::DeadLettered,
        _ => return None,
    };
    let fence = number(rest)?;
    let (attempt, crashes, at);
    if state == PROCESSED {
        at = fence + u64::from(count(rest)?) * 1_000;
        take::<16>(rest)?;
        (attempt, crashes) = if rest.is_empty() { (1, 0) } else { (count(rest)?, count(rest)?) };
    } else {
        (attempt, crashes) = (count(rest)?, count(rest)?);
        at = number(rest)?;
        // First claim, or doomed since, and fingerprint.
        take::<23>(rest)?;
    }
    let has_ended = matches!(state, PROCESSED | DEAD_LETTERED);
    let apart = if has_ended { now.saturating_sub(at) } else { at.saturating_sub(now) };
    let mut view = RecordView::new(key, status, fence, attempt, crashes, Duration::from_micros(apart));
    if !has_ended {
        // Token.
        take::<16>(rest)?;
    }
    if state == DOOMED {
        // Doomed since.
        number(rest)?;
    }
    if matches!(state, DOOMED | DEAD_LETTERED) {
        view.reason = Some(reason(rest)?);
    }
    view.trouble = trouble(rest)?;
    Some((at, view))
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, behind) = rest.split_first_chunk::<N>()?;
    *rest = behind;
    Some(*taken)
}

fn number(rest: &mut &[u8]) -> Option<u64> {
    let bytes = take::<7>(rest)?;
    Some(bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

fn time(rest: &mut &[u8]) -> Option<Duration> {
    number(rest).map(Duration::from_micros)
}

fn count(rest: &mut &[u8]) -> Option<u32> {
    take(rest).map(u32::from_be_bytes)
}

fn text(rest: &mut &[u8], length: usize) -> Option<Box<str>> {
    let (taken, behind) = rest.split_at_checked(length)?;
    *rest = behind;
    Some(String::from_utf8_lossy(taken).into())
}

fn reason(rest: &mut &[u8]) -> Option<Reason> {
    let [length] = take(rest)?;
    text(rest, usize::from(length)).map(|word| Reason::from_word(&word))
}

/// None where there is none; the outer one where it is damaged.
fn trouble(rest: &mut &[u8]) -> Option<Option<Trouble>> {
    if rest.is_empty() {
        return Some(None);
    }
    let mut next = || {
        let length = take(rest).map(u16::from_be_bytes)?;
        text(rest, usize::from(length))
    };
    Some(Some(Trouble { id: next()?, error: next()? }))
}
