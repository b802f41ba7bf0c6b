//! Recording outcomes: the same in a message of its own and inside a handler's transaction.

use std::time::Duration;

use hapax::{ErrorKind, Lease, Outcome, Recorded};
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use tokio::time::timeout;

use crate::error::{Fault, code};
use crate::line::{Lines, Replies, ask_on};
use crate::rows::{self, Seen, not_recorded};
use crate::statements::{Id, Statements, Within, distinct};
use crate::store::check_prelude;

/// Where messages of a batch go.
#[derive(Debug)]
pub(crate) enum Desk<'a> {
    /// To any connection.
    Lines(&'a Lines),
    /// Into a handler's transaction, which bears this mark.
    Transaction { connection: &'a mut PgConnection, mark: u64, deadline: Duration },
}

impl Desk<'_> {
    fn within(&self) -> Within {
        match self {
            Self::Lines(_) => Within::Message,
            Self::Transaction { mark, .. } => Within::Transaction(*mark),
        }
    }

    /// Answers the replies from the prelude on.
    async fn ask(&mut self, message: String, ids: &[Id]) -> Result<Replies, Fault> {
        let replies = match self {
            Self::Lines(lines) => {
                let mut replies = lines.ask(message).await?;
                // The isolation level has no answer.
                if !replies.is_empty() {
                    replies.remove(0);
                }
                replies
            }
            Self::Transaction { connection, mark, deadline } => {
                let asked = timeout(*deadline, ask_on(connection, message)).await;
                let late = || Fault::unavailable(format!("no answer within {deadline:?}"));
                let replies = asked.map_err(|_| late())?.map_err(Fault::in_transaction)?;
                check_mark(&replies, *mark)?;
                replies
            }
        };
        check_prelude(&replies, 0, Some(distinct(ids).len()))?;
        Ok(replies)
    }
}

fn check_mark(replies: &Replies, mark: u64) -> Result<(), Fault> {
    let row = replies.first().and_then(|rows| rows.first());
    let found = row.and_then(|row| row.try_get::<Option<String>, _>("mark").ok()).flatten();
    if found.and_then(|found| found.parse().ok()) == Some(mark) {
        return Ok(());
    }
    Err(Fault::rejected(
        "the handler ended hapax' transaction with a COMMIT or ROLLBACK of its own: what it wrote is not bound to the \
         record; leave it out, or take a savepoint",
    ))
}

/// Records a batch. What was not written is looked at in a second message, which also writes anew what has vanished.
pub(crate) async fn record(
    statements: &Statements,
    batch: &[(Lease, Outcome)],
    desk: &mut Desk<'_>,
) -> Result<Vec<Recorded>, Fault> {
    if batch.is_empty() {
        return Ok(Vec::new());
    }
    let mut order: Vec<usize> = (0..batch.len()).collect();
    order.sort_unstable_by_key(|&n| id(&batch[n]));
    let sorted: Vec<_> = order.iter().map(|&n| &batch[n]).collect();
    let ids: Vec<Id> = sorted.iter().map(|item| id(item)).collect();
    let asked = desk.ask(statements.record(&sorted, desk.within()), &ids).await;
    let replies = asked.map_err(|fault| locked(fault, batch.len(), desk))?;
    let written = sorted_ids(replies.get(1))?;
    let mut answers = vec![Recorded::Done; batch.len()];
    order.retain(|&n| written.binary_search(&id(&batch[n])).is_err());
    if order.is_empty() {
        return Ok(answers);
    }
    let sorted: Vec<_> = order.iter().map(|&n| &batch[n]).collect();
    let ids: Vec<Id> = sorted.iter().map(|item| id(item)).collect();
    let asked = desk.ask(statements.record_anew(&sorted, desk.within()), &ids).await;
    let replies = asked.map_err(|fault| locked(fault, batch.len(), desk))?;
    let anew = sorted_ids(replies.get(1))?;
    let seen = replies.get(2).map(Vec::as_slice).unwrap_or_default().iter().map(Seen::read);
    let seen = seen.collect::<Result<Vec<_>, Fault>>()?;
    for n in order {
        let (held, outcome) = &batch[n];
        let id = id(&batch[n]);
        answers[n] = match anew.binary_search(&id) {
            Ok(_) => Recorded::Vanished,
            Err(_) => not_recorded(held, outcome, seen.iter().find(|seen| seen.id == id)).ok_or_else(|| {
                Fault::new(ErrorKind::Unavailable, "a record changed while it was written: ask again")
            })?,
        };
    }
    Ok(answers)
}

/// One record that another transaction locks must not hold up the rest: the batch is halved until it stands alone. There
/// it is asked again until it is recorded. (A handler's transaction is broken by it as a whole.)
fn locked(fault: Fault, batch: usize, desk: &Desk<'_>) -> Fault {
    let is_apart = matches!(desk, Desk::Lines(_)) && batch > 1 && fault.has_code(code::LOCK_NOT_AVAILABLE);
    if is_apart { fault.of_an_item() } else { fault }
}

fn id((held, _): &(Lease, Outcome)) -> Id {
    (held.key, held.consumer)
}

fn sorted_ids(rows: Option<&Vec<PgRow>>) -> Result<Vec<Id>, Fault> {
    let rows = rows.map(Vec::as_slice).unwrap_or_default();
    let mut ids = rows.iter().map(rows::id).collect::<Result<Vec<Id>, Fault>>()?;
    ids.sort_unstable();
    Ok(ids)
}
