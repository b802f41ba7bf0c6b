//! What nearly all transactions are, without reading a record: claims of events that nobody knows, and records of events
//! that were processed.
//!
//! The statements know two rules and no more: no record, so it is claimed, with what core's function makes of no record;
//! claimed under this fence, so it is processed. How many rows they wrote tells whether that was all. Where it was not,
//! the state machine goes on (`batch.rs`): claims that were written it answers as one whose answer was lost, with the
//! same grant; records are rolled back before.

use std::time::Duration;

use hapax::record::{self, Moment, Record};
use hapax::{ClaimRequest, Lease, Outcome, Recorded};

use crate::rows::{Id, Statement, bind_keys, integer, statement};
use crate::statements::{Crossing, KEYS_MAX, OnKeys};
use crate::writer::{Applied, Call};
use crate::writes;

/// The claims of a group of calls, as if nobody knew their events.
pub(crate) struct Claims<'c> {
    /// By key; at least one.
    requests: Vec<&'c ClaimRequest>,
    lease: Duration,
}

impl<'c> Claims<'c> {
    /// None where there are none, or where one statement does not do for all.
    pub(crate) fn of(calls: &'c [Call]) -> Option<Self> {
        let claims = || calls.iter().filter_map(Call::claims);
        let (_, lease) = claims().next()?;
        let mut requests: Vec<_> = claims().flat_map(|(requests, _)| requests).collect();
        requests.sort_unstable_by_key(|request| (request.consumer, request.key));
        let is_one_lease = claims().all(|(_, other)| other == lease);
        (is_one_lease && is_one_statement(&requests, |it| (it.consumer, it.key))).then_some(Self { requests, lease })
    }

    pub(crate) fn len(&self) -> usize {
        self.requests.len()
    }

    pub(crate) fn statement(&self, crossing: Crossing, now: Moment) -> Statement {
        let record = |request: &&ClaimRequest| {
            let mut slot = None;
            record::claim(&mut slot, request, self.lease, now);
            slot.map(|record| ((request.consumer, request.key), record))
        };
        let records: Vec<(Id, Record)> = self.requests.iter().filter_map(record).collect();
        let entries: Vec<_> = records.iter().map(|(id, record)| (*id, record)).collect();
        writes::bind_open_alike(statement(OnKeys::for_keys(self.len()).claim.sql(crossing)), &entries)
    }

    /// Whether all were written, by the rows that each statement changed.
    pub(crate) fn are_written(&self, changed: &[u64]) -> bool {
        changed.last() == Some(&(self.len() as u64))
    }

    /// The answers once all were written.
    pub(crate) fn answer(&self, calls: &[Call], applied: &mut [Option<Applied>], now: Moment) {
        for (applied, call) in applied.iter_mut().zip(calls) {
            if let Some((requests, lease)) = call.claims() {
                let grants = requests.iter().map(|request| record::claim(&mut None, request, lease, now));
                *applied = Some(Applied::Claim(Ok(grants.collect())));
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
    /// None where there are none, where an event ended otherwise, or where one statement does not do for all.
    pub(crate) fn of(calls: &[Call]) -> Option<Self> {
        let outcomes = || calls.iter().flat_map(Call::outcomes);
        let mut leases: Vec<Lease> = outcomes().map(|(lease, _)| *lease).collect();
        leases.sort_unstable_by_key(id);
        let are_processed = outcomes().all(|(_, outcome)| matches!(outcome, Outcome::Processed));
        (are_processed && is_one_statement(&leases, id)).then_some(Self { leases })
    }

    pub(crate) fn len(&self) -> usize {
        self.leases.len()
    }

    pub(crate) fn statement(&self, crossing: Crossing, now: Moment) -> Statement {
        let ids: Vec<Id> = self.leases.iter().map(id).collect();
        let fences: String = self.leases.iter().map(|lease| format!("{:020}", lease.fence)).collect();
        bind_keys(statement(OnKeys::for_keys(self.len()).done.sql(crossing)), &ids)
            // As bytes: SQLite finds a place in a text by counting its characters.
            .bind(fences.into_bytes())
            .bind(integer(now.0))
            .bind(integer(self.len() as u64))
    }

    /// Whether all were written, by the rows that each statement changed: behind BEGIN those that were claimed, and those
    /// that are not under way any more; behind them COMMIT must have answered.
    pub(crate) fn are_written(&self, crossing: Crossing, changed: &[u64]) -> bool {
        let all = self.len() as u64;
        match (crossing, changed) {
            (Crossing::Alone, [_, ended, closed, _]) | (Crossing::First, [_, ended, closed]) => {
                (*ended, *closed) == (all, all)
            }
            _ => false,
        }
    }

    /// The answers once all were written.
    pub(crate) fn answer(calls: &[Call], applied: &mut [Option<Applied>]) {
        for (applied, call) in applied.iter_mut().zip(calls) {
            if !call.outcomes().is_empty() {
                *applied = Some(Applied::Record(Ok(vec![Recorded::Done; call.outcomes().len()])));
            }
        }
    }
}

fn id(lease: &Lease) -> Id {
    (lease.consumer, lease.key)
}

/// Whether one statement does for all: at least one, of one consumer, each event once, not too many. By key.
fn is_one_statement<T>(items: &[T], id: impl Fn(&T) -> Id) -> bool {
    let is_of_one = items.first().map(|first| id(first).0) == items.last().map(|last| id(last).0);
    let is_twice = items.windows(2).any(|two| id(&two[0]) == id(&two[1]));
    (1..=KEYS_MAX).contains(&items.len()) && is_of_one && !is_twice
}
