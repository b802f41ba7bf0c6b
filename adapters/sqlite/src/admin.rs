//! `StoreAdmin`: reads through the pool, which block nobody; removals through the writer, in bounded steps.

use async_trait::async_trait;
use hapax::record::{Moment, Record, State};
use hapax::{ConsumerId, ErrorKind, EventKey, RecordView, Result, Status, StoreAdmin, Swept};

use crate::error::{Fault, error};
use crate::rows::decode;
use crate::store::SqliteStore;
use crate::sweep::{Place, STEP_MAX, nth_expired};
use crate::writer::Call;

const LOOK_UP: &str = "SELECT consumer, key, state, time, fence, attempt, crashes, fingerprint, token, first, reason, \
    trouble_id, trouble_error FROM hapax_record WHERE consumer = ? AND key = ?";

const LIST: &str = "SELECT consumer, key, state, time, fence, attempt, crashes, fingerprint, token, first, reason, \
    trouble_id, trouble_error FROM hapax_record WHERE consumer = ? AND state = ? AND length(key) = 16 \
    ORDER BY time, key LIMIT ?";

impl SqliteStore {
    async fn number(&self, operation: &'static str, consumer: &str) -> Result<Option<ConsumerId>> {
        let find = sqlx::query_scalar("SELECT id FROM hapax_consumer WHERE name = ?").bind(consumer);
        let id: Option<i64> = find.fetch_optional(self.pool()).await.map_err(|found| error(operation, found))?;
        Ok(id.and_then(|id| u32::try_from(id).ok()).map(ConsumerId))
    }
}

#[async_trait]
impl StoreAdmin for SqliteStore {
    async fn look_up(&self, consumer: &str, key: EventKey) -> Result<Option<RecordView>> {
        let Some(id) = self.number("look_up", consumer).await? else { return Ok(None) };
        let query = sqlx::query(LOOK_UP).bind(i64::from(id.0)).bind(key.0.to_vec());
        let row = query.fetch_optional(self.pool()).await.map_err(|found| error("look_up", found))?;
        row.map(|row| view(&row, self.now(), "look_up")).transpose()
    }

    async fn list(&self, consumer: &str, status: Status, limit: usize) -> Result<Vec<RecordView>> {
        let Some(id) = self.number("list", consumer).await? else { return Ok(Vec::new()) };
        let state = match status {
            Status::Claimed => 0,
            Status::Waiting => 1,
            Status::Doomed => 2,
            Status::Processed => 3,
            Status::DeadLettered => 4,
        };
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let query = sqlx::query(LIST).bind(i64::from(id.0)).bind(state).bind(limit);
        let rows = query.fetch_all(self.pool()).await.map_err(|found| error("list", found))?;
        let now = self.now();
        rows.iter().map(|row| view(row, now, "list")).collect()
    }

    async fn sweep(&self, limit: usize) -> Result<Swept> {
        let now = self.now();
        let mut swept = Swept::default();
        let mut after = Place::start();
        loop {
            let left = limit.saturating_sub(usize::try_from(swept.removed).unwrap_or(usize::MAX));
            let found = |nth| nth_expired(self.pool(), &after, nth, now);
            if left == 0 {
                swept.more = found(1).await.map_err(|found| error("sweep", found))?.is_some();
                return Ok(swept);
            }
            let step = left.min(STEP_MAX);
            let last = found(step).await.map_err(|found| error("sweep", found))?;
            let to = last.clone().unwrap_or_else(Place::end);
            swept.removed += self.call("sweep", |reply| Call::Sweep(after, to.clone(), now, reply)).await?;
            if last.is_none() {
                return Ok(swept);
            }
            after = to;
        }
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
        State::Doomed { until, reason } => (until.since(now), Some(reason)),
        State::Processed { at } => (now.since(at), None),
        State::DeadLettered { at, reason } => (now.since(at), Some(reason)),
    };
    let mut view =
        RecordView::new(key, record.status(), record.fence.get(), record.attempt, record.crashes, since);
    view.trouble = record.trouble.map(|trouble| *trouble);
    view.reason = reason;
    Ok(view)
}
