//! Removing what is expired: step by step through the table, by one replica at a time.
//!
//! There is no index by time: it would make every record pay for itself twice, as the update that records an outcome
//! would have to write into every index. The table is walked in the order of its blocks instead, which is sequential
//! reading, at a pace that sees each block several times within the retention. The place is kept in the database, so that
//! replicas go on where another stopped.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sqlx::Row;

use crate::error::Fault;
use crate::line::Lines;
use crate::statements::Statements;
use crate::template::Schema;

/// How often a step is tried.
pub const SWEEP_EVERY: Duration = Duration::from_secs(10);

/// Blocks of 8 KiB in one step at most, and at least.
pub(crate) const PAGES_A_STEP: u64 = 2_048;
const PAGES_A_STEP_MIN: u64 = 128;
/// Records removed in one step.
pub(crate) const REMOVED_A_STEP: usize = 10_000;
/// Steps of one turn at most, where there is much to remove or to look at.
const STEPS_MAX: usize = 64;
/// The share of the shortest retention in which the table is walked once.
const WALKS_A_RETENTION: u32 = 8;

/// What one step did; `None` where another replica is at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) first_page: u64,
    pub(crate) next_page: u64,
    pub(crate) pages: u64,
    pub(crate) removed: u64,
}

impl Step {
    /// Whether the end of the table was reached.
    fn is_last(&self) -> bool {
        self.next_page >= self.pages
    }

    /// How many blocks that are there were looked at.
    pub(crate) fn walked(&self) -> u64 {
        self.next_page.min(self.pages).saturating_sub(self.first_page)
    }
}

/// Looks at the next `pages` blocks and removes at most `limit` records.
pub(crate) async fn step(
    lines: &Lines,
    statements: &Statements,
    pages: u64,
    limit: usize,
) -> Result<Option<Step>, Fault> {
    let replies = lines.ask(statements.sweep(pages, limit)).await?;
    let Some(row) = replies.last().and_then(|rows| rows.first()) else { return Ok(None) };
    let number = |column| Ok::<_, Fault>(u64::try_from(row.try_get::<i64, _>(column)?).unwrap_or_default());
    Ok(Some(Step { first_page: number(0)?, next_page: number(1)?, pages: number(2)?, removed: number(3)? }))
}

/// The task that sweeps.
#[derive(Debug)]
pub(crate) struct Sweeper {
    lines: Arc<Lines>,
    statements: Arc<Statements>,
    shortest_retention: String,
    /// Why the last step failed: told by the store's probe.
    fault: Arc<Mutex<Option<Fault>>>,
}

impl Sweeper {
    pub(crate) fn new(
        lines: Arc<Lines>,
        statements: Arc<Statements>,
        schema: &Schema,
        fault: Arc<Mutex<Option<Fault>>>,
    ) -> Self {
        let shortest_retention = format!("SELECT min(retention) FROM {}.hapax_consumer", schema.quoted());
        Self { lines, statements, shortest_retention, fault }
    }

    pub(crate) async fn run(self, every: Duration) {
        loop {
            // Replicas that start together do not come together.
            tokio::time::sleep(every.mul_f32(0.75 + 0.5 * fastrand::f32())).await;
            let swept = self.sweep(every).await;
            let fault = swept.err();
            if let Some(fault) = &fault {
                tracing::warn!(error = %fault.clone().during("sweep"), "records outlive their retention: the sweep failed");
            }
            *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = fault;
        }
    }

    /// As many steps as are due now.
    async fn sweep(&self, every: Duration) -> Result<(), Fault> {
        let replies = self.lines.ask(self.shortest_retention.clone()).await?;
        let retention: Option<i64> =
            replies.first().and_then(|rows| rows.first()).map(|row| row.try_get(0)).transpose()?.flatten();
        let Some(retention) = retention.and_then(|micros| u64::try_from(micros).ok()) else { return Ok(()) };
        let turns = (Duration::from_micros(retention) / WALKS_A_RETENTION).div_duration_f64(every).max(1.0);
        let (mut walked, mut due) = (0, PAGES_A_STEP_MIN);
        for _ in 0..STEPS_MAX {
            let pages = due.saturating_sub(walked).clamp(PAGES_A_STEP_MIN, PAGES_A_STEP);
            let Some(step) = step(&self.lines, &self.statements, pages, REMOVED_A_STEP).await? else { return Ok(()) };
            walked += step.walked();
            due = (step.pages as f64 / turns).ceil() as u64;
            // At the end of the table, or far enough for this turn and nothing much to remove.
            if step.is_last() || (walked >= due && step.removed < REMOVED_A_STEP as u64) {
                return Ok(());
            }
        }
        Ok(())
    }
}
