//! Recording outcomes: the same in a message of its own and inside a handler's transaction.

use std::time::Duration;

use hapax::{ErrorKind, Lease, Outcome, Recorded};
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use tokio::time::timeout;

use crate::error::{Fault, code};
use crate::hot::Form;
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

    /// Answers the last `count` replies, of which the first tells what the prelude does.
    async fn ask(
        &mut self,
        statements: &Statements,
        message: impl Fn(Form) -> String,
        count: usize,
        ids: &[Id],
    ) -> Result<Replies, Fault> {
        let mut replies = match self {
            Self::Lines(lines) => lines.ask_hot(statements, message).await?,
            Self::Transaction { connection, deadline, .. } => {
                let asked = timeout(*deadline, ask_on(connection, message(Form::Text))).await;
                let late = || Fault::unavailable(format!("no answer within {deadline:?}"));
                asked.map_err(|_| late())?.map_err(Fault::in_transaction)?
            }
        };
        replies.drain(..replies.len().saturating_sub(count));
        if let Self::Transaction { mark, .. } = self {
            check_mark(&replies, *mark)?;
        }
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
    Err(ended_by_handler())
}

pub(crate) fn ended_by_handler() -> Fault {
    Fault::rejected(
        "the handler ended hapax' transaction with a COMMIT or ROLLBACK of its own: what it wrote is not bound to the \
         record; leave it out, or take a savepoint",
    )
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
    let within = desk.within();
    let asked = desk.ask(statements, |form| statements.record(&sorted, within, form), 1, &ids).await;
    let replies = asked.map_err(|fault| locked(fault, batch.len(), desk))?;
    let mut answers = vec![Recorded::Done; batch.len()];
    if rows::written(&replies)? == batch.len() {
        return Ok(answers);
    }
    let written = sorted_ids(replies.first())?;
    order.retain(|&n| written.binary_search(&id(&batch[n])).is_err());
    let sorted: Vec<_> = order.iter().map(|&n| &batch[n]).collect();
    let ids: Vec<Id> = sorted.iter().map(|item| id(item)).collect();
    let asked = desk.ask(statements, |_| statements.record_anew(&sorted, within), 3, &ids).await;
    let replies = asked.map_err(|fault| locked(fault, batch.len(), desk))?;
    let anew = sorted_ids(replies.get(1))?;
    let seen = Seen::read_all(replies.get(2).map(Vec::as_slice).unwrap_or_default())?;
    for n in order {
        let (held, outcome) = &batch[n];
        let id = id(&batch[n]);
        answers[n] = match anew.binary_search(&id) {
            Ok(_) => Recorded::Vanished,
            Err(_) => not_recorded(held, outcome, seen.get(&id)).ok_or_else(|| {
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
    let mut ids = rows.iter().filter_map(|row| rows::id_if_any(row).transpose()).collect::<Result<Vec<Id>, Fault>>()?;
    ids.sort_unstable();
    Ok(ids)
}
