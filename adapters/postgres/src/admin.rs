//! `StoreAdmin`: reads that block nobody, and removals in bounded steps.

use std::time::Duration;

use async_trait::async_trait;
use hapax::{EventKey, Reason, RecordView, Result, Status, StoreAdmin, Swept, Trouble};
use sqlx::Row;
use sqlx::postgres::PgRow;
use tokio::time::Instant;

use crate::error::Fault;
use crate::line::Replies;
use crate::rows;
use crate::statements::{FORGOTTEN, state_number};
use crate::store::PostgresStore;
use crate::sweep::{self, PAGES_A_STEP, REMOVED_A_STEP};
use crate::template::{number, text, uuid};

/// How long another's step is waited for.
const TURN_MAX: Duration = Duration::from_secs(30);

const COLUMNS: &str = "r.key, r.consumer, r.state, r.fence, r.attempt, r.crashes, \
    abs(r.time - (extract(epoch FROM clock_timestamp()) * 1000000)::bigint) \
        * (r.state > 2 OR r.time > (extract(epoch FROM clock_timestamp()) * 1000000)::bigint)::integer, \
    r.trouble_id, r.trouble_error, r.reason";

impl PostgresStore {
    async fn admin(&self, sql: impl FnOnce(&str, &mut String)) -> std::result::Result<Replies, Fault> {
        let mut message = self.statements().limits();
        sql(&self.schema().quoted(), &mut message);
        self.lines().ask(message).await
    }
}

/// The consumer's number, as a part of a statement.
fn number_of(place: &str, consumer: &str, out: &mut String) {
    if consumer.is_empty() {
        return out.push_str("NULL");
    }
    out.push_str(&format!("(SELECT id FROM {place}.hapax_consumer WHERE name = convert_from(decode('"));
    text(out, consumer);
    out.push_str("', 'hex'), 'UTF8'))");
}

fn key_of(key: EventKey, out: &mut String) {
    out.push('\'');
    uuid(out, key.0);
    out.push('\'');
}

#[async_trait]
impl StoreAdmin for PostgresStore {
    async fn look_up(&self, consumer: &str, key: EventKey) -> Result<Option<RecordView>> {
        let looked = self.admin(|place, out| {
            out.push_str(&format!(
                "SELECT {COLUMNS} FROM {place}.hapax_record AS r WHERE r.state < {FORGOTTEN} AND r.key = "
            ));
            key_of(key, out);
            out.push_str(" AND r.consumer = ");
            number_of(place, consumer, out);
        });
        let views = looked.await.and_then(|replies| views(&replies)).map_err(|fault| fault.during("look_up"))?;
        Ok(views.into_iter().next())
    }

    async fn list(&self, consumer: &str, status: Status, limit: usize) -> Result<Vec<RecordView>> {
        let listed = self.admin(|place, out| {
            out.push_str(&format!(
                "SELECT {COLUMNS} FROM {place}.hapax_record AS r WHERE r.state = {} AND r.consumer = ",
                state_number(status)
            ));
            number_of(place, consumer, out);
            out.push_str(" ORDER BY r.time, r.key LIMIT ");
            number(out, i64::try_from(limit).unwrap_or(i64::MAX));
        });
        listed.await.and_then(|replies| views(&replies)).map_err(|fault| fault.during("list"))
    }

    async fn sweep(&self, limit: usize) -> Result<Swept> {
        self.swept(limit).await.map_err(|fault| fault.during("sweep"))
    }

    async fn forget(&self, consumer: &str, key: EventKey) -> Result<bool> {
        // Not removed: its fence must be remembered, as it was granted a moment ago.
        let forgotten = self.admin(|place, out| {
            out.push_str(&format!(
                "UPDATE {place}.hapax_record AS r SET state = {FORGOTTEN}, \
                 time = (extract(epoch FROM clock_timestamp()) * 1000000)::bigint, token = NULL, first = NULL, \
                 doomed = NULL, reason = NULL, trouble_id = NULL, trouble_error = NULL \
                 WHERE r.state < {FORGOTTEN} AND r.key = "
            ));
            key_of(key, out);
            out.push_str(" AND r.consumer = ");
            number_of(place, consumer, out);
            out.push_str(" RETURNING true");
        });
        let replies = forgotten.await.map_err(|fault| fault.during("forget"))?;
        Ok(replies.last().is_some_and(|rows| !rows.is_empty()))
    }
}

impl PostgresStore {
    /// Walks the whole table once, from where the last sweep stopped. Waits its turn while another sweeps.
    async fn swept(&self, limit: usize) -> std::result::Result<Swept, Fault> {
        let mut swept = Swept::default();
        let (mut walked, mut begun) = (0, Instant::now());
        loop {
            let left = limit.saturating_sub(usize::try_from(swept.removed).unwrap_or(usize::MAX));
            if left == 0 {
                // More may be due: only a walk to the end would tell.
                return Ok(Swept { more: true, ..swept });
            }
            let step = sweep::step(self.lines(), self.statements(), PAGES_A_STEP, left.min(REMOVED_A_STEP)).await?;
            let Some(step) = step else {
                if begun.elapsed() > TURN_MAX {
                    return Err(Fault::unavailable(format!("another replica has been sweeping for {TURN_MAX:?}")));
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            begun = Instant::now();
            swept.removed += step.removed;
            walked += step.walked();
            if walked >= step.pages {
                return Ok(swept);
            }
        }
    }
}

fn views(replies: &Replies) -> std::result::Result<Vec<RecordView>, Fault> {
    replies.last().map(Vec::as_slice).unwrap_or_default().iter().map(view).collect()
}

fn view(row: &PgRow) -> std::result::Result<RecordView, Fault> {
    let (key, _) = rows::id(row)?;
    let status = match row.try_get::<i16, _>(2)? {
        0 => Status::Claimed,
        1 => Status::Waiting,
        2 => Status::Doomed,
        3 => Status::Processed,
        4 => Status::DeadLettered,
        other => return Err(Fault::incompatible(format!("a record is in state {other}, which is unknown"))),
    };
    let fence = u64::try_from(row.try_get::<i64, _>(3)?).unwrap_or_default();
    let count = |column| Ok::<_, Fault>(u32::try_from(row.try_get::<i32, _>(column)?).unwrap_or_default());
    let since = Duration::from_micros(u64::try_from(row.try_get::<i64, _>(6)?).unwrap_or_default());
    let mut view = RecordView::new(key, status, fence, count(4)?, count(5)?, since);
    let (id, error): (Option<&str>, Option<&str>) = (row.try_get(7)?, row.try_get(8)?);
    if id.is_some() || error.is_some() {
        view.trouble = Some(Trouble { id: id.unwrap_or_default().into(), error: error.unwrap_or_default().into() });
    }
    let reason: Option<&str> = row.try_get(9)?;
    view.reason = matches!(status, Status::Doomed | Status::DeadLettered)
        .then(|| reason.map_or(Reason::Permanent, Reason::from_word));
    Ok(view)
}
