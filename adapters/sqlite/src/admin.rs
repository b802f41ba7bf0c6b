//! `StoreAdmin`: reads through the pool, which block nobody; removals through the writer, in bounded steps.

use async_trait::async_trait;
use hapax::record::{Moment, Record, State};
use hapax::{ConsumerId, ErrorKind, EventKey, RecordView, Result, Status, StoreAdmin, Swept};

use crate::error::{Fault, error};
use crate::rows::{self, decode};
use crate::statements::{LIST_ENDED, LIST_OPEN};
use crate::store::SqliteStore;
use crate::sweep::{Place, STEP_MAX, Table, nth_expired};
use crate::writer::Call;

impl SqliteStore {
    async fn number(&self, operation: &'static str, consumer: &str) -> Result<Option<ConsumerId>> {
        let find = sqlx::query_scalar("SELECT id FROM hapax_consumer WHERE name = ?").bind(consumer);
        let id: Option<i64> = find.fetch_optional(self.pool()).await.map_err(|found| error(operation, found))?;
        Ok(id.and_then(|id| u32::try_from(id).ok()).map(ConsumerId))
    }

    /// Looks for what is expired with a reader, which blocks nobody, and removes it step by step with the writer.
    async fn sweep_table(&self, table: Table, limit: usize, now: Moment) -> Result<(u64, bool)> {
        let (mut removed, mut left, mut after) = (0, limit, Place::start());
        loop {
            let step = left.clamp(1, STEP_MAX);
            let found = nth_expired(self.pool(), table, &after, step, now).await;
            let last = found.map_err(|found| error("sweep", found))?;
            if left == 0 {
                return Ok((removed, last.is_some()));
            }
            let to = last.clone().unwrap_or_else(Place::end);
            removed += self.call("sweep", |reply| Call::Sweep(table, after, to.clone(), now, reply)).await?;
            if last.is_none() {
                return Ok((removed, false));
            }
            (left, after) = (left - step, to);
        }
    }
}

#[async_trait]
impl StoreAdmin for SqliteStore {
    async fn look_up(&self, consumer: &str, key: EventKey) -> Result<Option<RecordView>> {
        let Some(id) = self.number("look_up", consumer).await? else { return Ok(None) };
        let row = rows::find(self.pool(), (id, key)).await.map_err(|found| error("look_up", found))?;
        row.map(|row| view(&row, self.now(), "look_up")).transpose()
    }

    async fn list(&self, consumer: &str, status: Status, limit: usize) -> Result<Vec<RecordView>> {
        let Some(id) = self.number("list", consumer).await? else { return Ok(Vec::new()) };
        let list = match status {
            Status::Processed | Status::DeadLettered => LIST_ENDED,
            Status::Claimed | Status::Waiting | Status::Doomed => LIST_OPEN,
        };
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let query = sqlx::query(list).bind(i64::from(id.0)).bind(rows::state_number(status)).bind(limit);
        let rows = query.fetch_all(self.pool()).await.map_err(|found| error("list", found))?;
        let now = self.now();
        rows.iter().map(|row| view(row, now, "list")).collect()
    }

    async fn sweep(&self, limit: usize) -> Result<Swept> {
        let now = self.now();
        let mut swept = Swept::default();
        for table in Table::ALL {
            let left = limit.saturating_sub(usize::try_from(swept.removed).unwrap_or(usize::MAX));
            let (removed, more) = self.sweep_table(table, left, now).await?;
            swept.removed += removed;
            swept.more |= more;
        }
        Ok(swept)
    }

    async fn forget(&self, consumer: &str, key: EventKey) -> Result<bool> {
        let Some(id) = self.number("forget", consumer).await? else { return Ok(false) };
        self.call("forget", |reply| Call::Forget((id, key), reply)).await
    }
}

fn view(row: &sqlx::sqlite::SqliteRow, now: Moment, operation: &'static str) -> Result<RecordView> {
    let ((_, key), record) = decode(row).map_err(|found| error(operation, found))?;
    let damaged = |why| Fault::new(ErrorKind::Incompatible, format!("the record of {key:?} cannot be read: {why}"));
    let record: Record = record.map_err(|why| damaged(why).during(operation))?;
    let (since, reason) = match record.state {
        State::Claimed { until } | State::Waiting { until } => (until.since(now), None),
        State::Doomed { until, reason, .. } => (until.since(now), Some(reason)),
        State::Processed { at } => (now.since(at), None),
        State::DeadLettered { at, reason, .. } => (now.since(at), Some(reason)),
    };
    let mut view = RecordView::new(key, record.status(), record.fence.get(), record.attempt, record.crashes, since);
    view.trouble = record.trouble.map(|trouble| *trouble);
    view.reason = reason;
    Ok(view)
}
