//! Rows as they come back: ids, records, and what core's state machine says of those that were not changed.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::time::Duration;

use hapax::record::{self, Moment, Record, State};
use hapax::{
    Claim, ClaimRequest, ConsumerId, EventKey, Fingerprint, History, Lease, Outcome, Reason, Recorded, Status, Trouble,
};
use sqlx::Row;
use sqlx::postgres::PgRow;

use crate::error::Fault;
use crate::line::Replies;
use crate::statements::{FORGOTTEN, Id, state_number, target};

/// What to wait for where a record was free a moment ago or is locked: another claim is under way.
pub(crate) const SOON: Duration = Duration::from_millis(50);

/// The id in the first two columns.
pub(crate) fn id(row: &PgRow) -> Result<Id, Fault> {
    let consumer: i32 = row.try_get(1)?;
    Ok((EventKey(uuid(row, 0)?), ConsumerId(u32::try_from(consumer).unwrap_or_default())))
}

/// The id in the first two columns; none in a row that only tells what all rows do.
pub(crate) fn id_if_any(row: &PgRow) -> Result<Option<Id>, Fault> {
    match row.try_get::<Option<i32>, _>(1)? {
        Some(_) => id(row).map(Some),
        None => Ok(None),
    }
}

/// How many outcomes of a batch were written, as each row of its answer says.
pub(crate) fn written(replies: &Replies) -> Result<usize, Fault> {
    let row = replies.first().and_then(|rows| rows.first());
    let written = row.map(|row| row.try_get::<i64, _>("written")).transpose()?;
    Ok(written.and_then(|written| usize::try_from(written).ok()).unwrap_or_default())
}

/// A `uuid` as the server writes it.
fn uuid(row: &PgRow, column: usize) -> Result<[u8; 16], Fault> {
    let text: &str = row.try_get_unchecked(column)?;
    let mut digits = text.bytes().filter_map(|byte| char::from(byte).to_digit(16));
    let mut bytes = [0; 16];
    for byte in &mut bytes {
        let (high, low) = (digits.next(), digits.next());
        let (Some(high), Some(low)) = (high, low) else {
            return Err(Fault::incompatible(format!("column {column} is not a uuid")));
        };
        *byte = (high * 16 + low) as u8;
    }
    Ok(bytes)
}

fn count(row: &PgRow, column: usize) -> Result<u32, Fault> {
    let count: i32 = row.try_get(column)?;
    u32::try_from(count).map_err(|_| Fault::incompatible(format!("column {column} holds {count}, which is no count")))
}

fn fence(row: &PgRow, column: usize) -> Result<NonZeroU64, Fault> {
    let fence: i64 = row.try_get(column)?;
    let fence = u64::try_from(fence).ok().and_then(NonZeroU64::new);
    fence.ok_or_else(|| Fault::incompatible(format!("column {column} holds no fence")))
}

fn trouble(row: &PgRow, id: usize, error: usize) -> Result<Option<Trouble>, Fault> {
    let (id, error): (Option<&str>, Option<&str>) = (row.try_get(id)?, row.try_get(error)?);
    if id.is_none() && error.is_none() {
        return Ok(None);
    }
    Ok(Some(Trouble { id: id.unwrap_or_default().into(), error: error.unwrap_or_default().into() }))
}

/// A row of `claim.sql`: the grant.
pub(crate) fn granted(row: &PgRow) -> Result<Claim, Fault> {
    let (key, consumer) = id(row)?;
    let lease = Lease { consumer, key, fence: fence(row, 2)?, attempt: count(row, 3)? };
    let crashes = count(row, 4)?;
    let trouble = trouble(row, 7, 8)?;
    // What every claim but the first leaves behind.
    if lease.attempt <= 1 && crashes == 0 && trouble.is_none() {
        return Ok(Claim::Granted(lease, None));
    }
    let first: Option<i64> = row.try_get(5)?;
    let doomed: Option<&str> = row.try_get(6)?;
    let history = History {
        crashes,
        first: Duration::from_micros(first.and_then(|first| u64::try_from(first).ok()).unwrap_or_default()),
        trouble: trouble.unwrap_or_default(),
        doomed: doomed.map(Reason::from_word),
    };
    Ok(Claim::Granted(lease, Some(Box::new(history))))
}

/// A row of `read.sql`: a record and the clock; `None` for one that an operator forgot.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) now: Moment,
    pub(crate) record: Option<Record>,
}

impl Seen {
    /// Reads them all by their ids; rows without one are passed over.
    pub(crate) fn read_all(rows: &[PgRow]) -> Result<BTreeMap<Id, Self>, Fault> {
        let mut all = BTreeMap::new();
        for row in rows {
            if let Some(id) = id_if_any(row)? {
                all.insert(id, Self::read(row)?);
            }
        }
        Ok(all)
    }

    pub(crate) fn read(row: &PgRow) -> Result<Self, Fault> {
        let moment = |column| Ok::<_, Fault>(Moment(u64::try_from(row.try_get::<i64, _>(column)?).unwrap_or_default()));
        let (time, last) = (moment(4)?, fence(row, 5)?);
        let reason: Option<&str> = row.try_get(9)?;
        let doomed: Option<i64> = row.try_get(12)?;
        let since = doomed.and_then(|fence| u64::try_from(fence).ok()).and_then(NonZeroU64::new).unwrap_or(last);
        let reason = reason.map_or(Reason::Permanent, Reason::from_word);
        let state = match row.try_get::<i16, _>(3)? {
            0 => Some(State::Claimed { until: time }),
            1 => Some(State::Waiting { until: time }),
            2 => Some(State::Doomed { until: time, reason, since }),
            3 => Some(State::Processed { at: time }),
            4 => Some(State::DeadLettered { at: time, reason, since }),
            FORGOTTEN => None,
            other => return Err(Fault::incompatible(format!("a record is in state {other}, which is unknown"))),
        };
        let fingerprint = Fingerprint(uuid(row, 8)?);
        let token: Option<&str> = row.try_get_unchecked(13)?;
        let token = token.map(|_| uuid(row, 13)).transpose()?.map_or(0, u128::from_be_bytes);
        let trouble = trouble(row, 10, 11)?.map(Box::new);
        let (attempt, crashes) = (count(row, 6)?, count(row, 7)?);
        let record = state.map(|state| Record {
            state,
            fingerprint,
            fence: last,
            attempt,
            crashes,
            token,
            // Not asked of a record that is only looked at.
            first: time,
            trouble,
        });
        Ok(Self { now: moment(2)?, record })
    }
}

/// The answer to `claim.sql`: what was new, and the records of the rest.
#[derive(Debug)]
pub(crate) struct First {
    seen: BTreeMap<Id, Seen>,
    /// Those of which no record was seen were claimed with this fence, each of them; otherwise nobody knows.
    fence: Option<NonZeroU64>,
}

impl First {
    /// Reads the answer to a batch of so many.
    pub(crate) fn read(rows: &[PgRow], batch: usize) -> Result<Self, Fault> {
        let mut seen = Seen::read_all(rows)?;
        let Some(row) = rows.first() else { return Ok(Self { seen, fence: None }) };
        let granted: i64 = row.try_get("granted")?;
        let fence: Option<i64> = row.try_get("granted_fence")?;
        let fence = fence.and_then(|fence| u64::try_from(fence).ok()).and_then(NonZeroU64::new);
        // A record that was removed after it was read is a new one, and ours.
        for row in rows {
            if row.try_get::<Option<bool>, _>("is_granted")? == Some(true) {
                seen.remove(&id(row)?);
            }
        }
        // Another claim's record that was not there yet is neither seen nor ours.
        let is_exact = usize::try_from(granted) == Ok(batch.saturating_sub(seen.len()));
        Ok(Self { seen, fence: fence.filter(|_| is_exact) })
    }

    /// `None` where the event may be free: it is claimed with the same token, as one that is known.
    pub(crate) fn answer(&self, request: &ClaimRequest) -> Option<Claim> {
        let (key, consumer) = (request.key, request.consumer);
        let Some(seen) = self.seen.get(&(key, consumer)) else {
            return self.fence.map(|fence| Claim::Granted(Lease { consumer, key, fence, attempt: 1 }, None));
        };
        let told = record::claim(&mut Some(seen.record.clone()?), request, SOON, seen.now);
        (!matches!(told, Claim::Granted(..))).then_some(told)
    }
}

/// What a claim that was not granted finds. The record may have changed since: the answer is what a claim at the moment
/// of reading would have been told, and where that would be a grant, to ask again.
pub(crate) fn not_granted(request: &ClaimRequest, seen: Option<&Seen>) -> Claim {
    let Some((now, found)) = seen.and_then(|seen| seen.record.as_ref().map(|record| (seen.now, record))) else {
        // It was there, and is gone.
        return Claim::Held { wait: SOON };
    };
    match record::claim(&mut Some(found.clone()), request, SOON, now) {
        Claim::Granted(..) if matches!(found.state, State::Waiting { .. }) => Claim::NotYet { wait: SOON },
        Claim::Granted(..) => Claim::Held { wait: SOON },
        told => told,
    }
}

/// What an outcome that was not written finds; `None` where it should have been written: something changed meanwhile.
pub(crate) fn not_recorded(held: &Lease, outcome: &Outcome, seen: Option<&Seen>) -> Option<Recorded> {
    let Some(record) = seen.and_then(|seen| seen.record.as_ref()) else {
        // There is nothing to write of what failed; the rest would have been written anew.
        return matches!(outcome, Outcome::Failed { .. }).then_some(Recorded::Vanished);
    };
    if record.fence != held.fence {
        return Some(Recorded::Fenced);
    }
    let (is, wanted) = (record.status(), target(outcome));
    match is {
        Status::Claimed if !matches!(outcome, Outcome::DeadLettered) => None,
        Status::Doomed if matches!(outcome, Outcome::DeadLettered) => None,
        Status::DeadLettered if matches!(outcome, Outcome::Doomed { .. }) => Some(Recorded::AlreadyDone),
        _ if state_number(is) == wanted => Some(Recorded::AlreadyDone),
        _ => Some(Recorded::Fenced),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fence(number: u64) -> NonZeroU64 {
        NonZeroU64::new(number).expect("not zero")
    }

    fn told(state: State, data: &[u8], reopen: Option<u64>) -> Claim {
        let (key, consumer) = (EventKey::of("billing", "shop", "1"), ConsumerId(1));
        let fingerprint = Fingerprint::of(None, data);
        let request = ClaimRequest { consumer, key, fingerprint, token: 9, reopen: reopen.map(fence) };
        let (fingerprint, first) = (Fingerprint::of(None, b"data"), Moment(1));
        let record =
            Record { state, fingerprint, fence: fence(7), attempt: 1, crashes: 0, token: 0, first, trouble: None };
        not_granted(&request, Some(&Seen { now: Moment(1_000), record: Some(record) }))
    }

    #[test]
    fn what_is_told_of_a_record_that_changed_is_true_at_the_moment_of_reading() {
        let ended = State::DeadLettered { at: Moment(900), reason: Reason::Permanent, since: fence(5) };
        for token in 5..=7 {
            assert_eq!(told(ended, b"data", Some(token)), Claim::Held { wait: SOON }, "{token} reopens it");
            assert_eq!(told(ended, b"other", Some(token)), Claim::Held { wait: SOON }, "{token} with other data");
        }
        for stale in [None, Some(4), Some(8)] {
            assert!(matches!(told(ended, b"data", stale), Claim::DeadLettered { .. }), "{stale:?}");
        }
        let abandoned = |until| State::Doomed { until: Moment(until), reason: Reason::Permanent, since: fence(5) };
        assert_eq!(told(abandoned(900), b"other", Some(6)), Claim::Held { wait: SOON }, "its letter reopens it");
        assert!(matches!(told(abandoned(5_000), b"data", Some(6)), Claim::Held { wait } if wait < SOON));
        assert_eq!(told(State::Claimed { until: Moment(900) }, b"data", None), Claim::Held { wait: SOON });
        assert_eq!(told(State::Waiting { until: Moment(900) }, b"data", None), Claim::NotYet { wait: SOON });
        assert_eq!(told(State::Processed { at: Moment(900) }, b"other", None), Claim::Conflict);
    }
}
