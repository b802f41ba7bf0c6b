//! What a transaction does with the records it has read: core's state machine, item by item.
//!
//! Every answer comes from `hapax::record`, so that the rules stand in one place. A call that cannot be answered is
//! found before any of its items is applied: it changes nothing, and the calls that share its transaction go on.

use std::collections::BTreeMap;
use std::time::Duration;

use hapax::record::{self, Moment, Record};
use hapax::{Claim, ClaimRequest, ErrorKind, Lease, Outcome, Recorded, Renewal};
use sqlx::SqliteConnection;

use crate::error::Fault;
use crate::rows::{self, Frame, Id, Slot, Within};
use crate::writes;

/// The records that one transaction works on.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    slots: BTreeMap<Id, Slot>,
}

impl Batch {
    /// Wants one more record; before [`load`](Self::load).
    pub(crate) fn want(&mut self, id: Id) {
        self.slots.entry(id).or_insert_with(Slot::empty);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    pub(crate) async fn load(&mut self, connection: &mut SqliteConnection, within: Within) -> Result<Frame, Fault> {
        rows::load(connection, &mut self.slots, within).await
    }

    pub(crate) async fn save(&self, connection: &mut SqliteConnection, commit: bool) -> Result<(), Fault> {
        writes::save(connection, &self.slots, commit).await
    }

    pub(crate) fn claim(
        &mut self,
        requests: &[ClaimRequest],
        lease: Duration,
        now: Moment,
        frame: Frame,
    ) -> Result<Vec<Claim>, Fault> {
        self.check(requests.iter().map(|request| (request.consumer, request.key)), frame)?;
        let answers = requests
            .iter()
            .map(|request| self.apply((request.consumer, request.key), |slot| claim(slot, request, lease, now, frame)));
        answers.collect()
    }

    pub(crate) fn renew(
        &mut self,
        leases: &[Lease],
        lease: Duration,
        now: Moment,
        frame: Frame,
    ) -> Result<Vec<Renewal>, Fault> {
        self.check(leases.iter().map(|held| (held.consumer, held.key)), frame)?;
        let answers = leases
            .iter()
            .map(|held| self.apply((held.consumer, held.key), |slot| record::renew(slot, held, lease, now)));
        answers.collect()
    }

    pub(crate) fn record(
        &mut self,
        outcomes: &[(Lease, Outcome)],
        now: Moment,
        frame: Frame,
    ) -> Result<Vec<Recorded>, Fault> {
        self.check(outcomes.iter().map(|(held, _)| (held.consumer, held.key)), frame)?;
        let answers = outcomes.iter().map(|(held, outcome)| {
            self.apply((held.consumer, held.key), |slot| record::record(slot, held, outcome, now))
        });
        answers.collect()
    }

    fn check(&self, ids: impl Iterator<Item = Id>, frame: Frame) -> Result<(), Fault> {
        for id in ids {
            if id.0.0 == 0 || id.0.0 > frame.consumers {
                let text =
                    format!("consumer number {} is not of this database: was the file replaced? restart", id.0.0);
                return Err(Fault::incompatible(text));
            }
            if let Some(Slot { record: Err(why), .. }) = self.slots.get(&id) {
                return Err(Fault::incompatible(format!("the record of event {:?} cannot be read: {why}", id.1)));
            }
        }
        Ok(())
    }

    fn apply<T>(&mut self, id: Id, step: impl FnOnce(&mut Option<Record>) -> T) -> Result<T, Fault> {
        let Some(Slot { record: Ok(record), changed, .. }) = self.slots.get_mut(&id) else {
            return Err(Fault::new(ErrorKind::Internal, "a record was not loaded"));
        };
        let before = record.clone();
        let answer = step(record);
        *changed |= *record != before;
        Ok(answer)
    }
}

/// A claim of an event that is not known here: its fence must grow over records that were removed before the clock was
/// set back.
fn claim(slot: &mut Option<Record>, request: &ClaimRequest, lease: Duration, now: Moment, frame: Frame) -> Claim {
    let unknown = slot.is_none();
    let mut answer = record::claim(slot, request, lease, now);
    if let (true, Claim::Granted(granted, _), Some(record)) = (unknown, &mut answer, slot.as_mut())
        && granted.fence.get() <= frame.fence_floor
    {
        record.fence = granted.fence.saturating_add(frame.fence_floor + 1 - granted.fence.get());
        granted.fence = record.fence;
    }
    answer
}
