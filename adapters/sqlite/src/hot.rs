//! What nearly all transactions are, without reading a record: claims of events that nobody knows, and records of events
//! that were processed.
//!
//! The statements know two rules and no more: no record, so it is claimed, with what core's function makes of no record;
//! claimed under this fence, so it is processed. How many rows they wrote tells whether that was all. Where it was not,
//! the state machine goes on (`batch.rs`): claims that were written it answers as one whose answer was lost, with the
//! same grant; records are rolled back before.

use hapax::record::{self, Moment, Record};
use hapax::{Claim, ConsumerId, EventKey, Lease, Outcome, Recorded};

use crate::rows::{Id, Statement, bind_keys, integer, statement};
use crate::statements::{KEYS_MAX, OnKeys, Place};
use crate::writer::{Applied, Call};
use crate::writes;

/// The claims of a group of calls, as if nobody knew their events.
pub(crate) struct Claims {
    /// By key; at least one.
    records: Vec<(Id, Record)>,
    /// For each call, if it is one of claims.
    answers: Vec<Option<Vec<Claim>>>,
}

impl Claims {
    /// None where there are none, or where they are not of one consumer and each of another event.
    pub(crate) fn of(calls: &[Call], now: Moment) -> Option<Self> {
        let mut records = Vec::new();
        let mut answer = |call: &Call| {
            let Call::Claim(requests, lease, _) = call else { return None };
            let claims = requests.iter().map(|request| {
                let mut slot = None;
                let claim = record::claim(&mut slot, request, *lease, now);
                records.extend(slot.map(|record| ((request.consumer, request.key), record)));
                claim
            });
            Some(claims.collect())
        };
        let answers = calls.iter().map(&mut answer).collect();
        // Of calls that ask for leases of different lengths, what they write is not alike.
        let until = |(_, record): &(Id, Record)| record.state;
        sort(&mut records, |(id, _)| *id)?;
        let is_alike = records.iter().all(|entry| until(entry) == until(&records[0]));
        is_alike.then_some(Self { records, answers })
    }

    pub(crate) fn len(&self) -> usize {
        self.records.len()
    }

    pub(crate) fn statement(&self, place: Place) -> Statement {
        let entries: Vec<_> = self.records.iter().map(|(id, record)| (*id, record)).collect();
        writes::bind_open_alike(statement(OnKeys::for_keys(self.len()).claim.sql(place)), &entries)
    }

    /// Once all were written.
    pub(crate) fn answer(self, applied: &mut [Option<Applied>]) {
        for (applied, answer) in applied.iter_mut().zip(self.answers) {
            if let Some(answer) = answer {
                *applied = Some(Applied::Claim(Ok(answer)));
            }
        }
    }
}

/// The records of a group of calls, of events that were processed.
pub(crate) struct Done {
    /// By key; at least one.
    leases: Vec<Lease>,
}

impl Done {
    /// None where there are none, where an event ended otherwise, or where they are not of one consumer and each of
    /// another event.
    pub(crate) fn of(calls: &[Call]) -> Option<Self> {
        let mut leases = Vec::new();
        for call in calls {
            let Call::Record(outcomes, _) = call else { continue };
            for (lease, outcome) in outcomes {
                if !matches!(outcome, Outcome::Processed) {
                    return None;
                }
                leases.push(*lease);
            }
        }
        sort(&mut leases, id)?;
        Some(Self { leases })
    }

    pub(crate) fn len(&self) -> usize {
        self.leases.len()
    }

    pub(crate) fn statement(&self, now: Moment, place: Place) -> Statement {
        let ids: Vec<Id> = self.leases.iter().map(id).collect();
        let fences: String = self.leases.iter().map(|lease| format!("{:020}", lease.fence)).collect();
        bind_keys(statement(OnKeys::for_keys(self.len()).done.sql(place)), &ids)
            // As bytes: SQLite finds a place in a text by counting its characters.
            .bind(fences.into_bytes())
            .bind(integer(now.0))
            .bind(integer(self.len() as u64))
    }

    /// Once all were written.
    pub(crate) fn answer(calls: &[Call], applied: &mut [Option<Applied>]) {
        for (applied, call) in applied.iter_mut().zip(calls) {
            if let Call::Record(outcomes, _) = call {
                *applied = Some(Applied::Record(Ok(vec![Recorded::Done; outcomes.len()])));
            }
        }
    }
}

fn id(lease: &Lease) -> Id {
    (lease.consumer, lease.key)
}

/// Sorts by key; none where there is nothing, too much for a statement, an event twice, or more than one consumer.
fn sort<T>(items: &mut [T], id: impl Fn(&T) -> (ConsumerId, EventKey)) -> Option<()> {
    items.sort_unstable_by_key(&id);
    let (first, last) = (items.first()?, items.last()?);
    let is_twice = items.windows(2).any(|two| id(&two[0]) == id(&two[1]));
    (items.len() <= KEYS_MAX && id(first).0 == id(last).0 && !is_twice).then_some(())
}
