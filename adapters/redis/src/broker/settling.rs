//! Settling: one script for each stream of a batch, which checks on the pending list that an entry is still ours before it
//! does anything. `XACK` alone would take an entry away from whoever has it now.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use hapax::cloudevents::{Convention, encode};
use hapax::{Error, ErrorKind, Message, Receipt, Result, Settlement};
use redis::Value;

use super::consuming::{Consuming, PARKING, is_no_group, text};
use super::entry::{DATA, EntryId, bytes, items};
use super::table::{Found, Standing};

/// The longest a retry may stay away.
pub(super) const RETRY_MAX: Duration = Duration::from_secs(365 * 24 * 3600);

/// Most items of one call: Lua hands at most 8000 values to a command.
const ITEMS_MAX: usize = 1000;

/// One item of a call.
struct Item<'a> {
    /// Where its answer goes.
    at: usize,
    receipt: u64,
    id: EntryId,
    found: Found,
    settlement: &'a Settlement,
}

enum Answer {
    Done,
    NotOurs,
    Trimmed,
    Failed(String),
}

pub(super) async fn settle(c: &Consuming, batch: &[(Receipt, Settlement)]) -> Vec<Result<()>> {
    let mut answers: Vec<Result<()>> = Vec::with_capacity(batch.len());
    let mut items: Vec<Vec<Item<'_>>> = c.sources.iter().map(|_| Vec::new()).collect();
    {
        let mut table = c.table();
        for (at, (receipt, settlement)) in batch.iter().enumerate() {
            let found = table.find(*receipt).filter(|_| receipt.session == table.session());
            let answer = match (found, settlement) {
                (None, _) => Err(stale("the receipt was settled before, or its session has ended")),
                (Some(found), _) if found.standing == Standing::Lost => {
                    table.forget(receipt.position);
                    Err(stale("not kept ours, or held for longer than held_max: the delivery is another's"))
                }
                (Some(_), Settlement::Retry { after }) if *after > RETRY_MAX => {
                    Err(Error::new(ErrorKind::Rejected, "settle").because("longer than retry_max (365 days)"))
                }
                (Some(found), settlement) => {
                    let (source, id) = found.key;
                    items[source].push(Item { at, receipt: receipt.position, id, found, settlement });
                    Ok(())
                }
            };
            answers.push(answer);
        }
    }
    let calls = items.iter_mut().enumerate().flat_map(|(source, items)| {
        items.sort_by_key(|item| (!matches!(item.settlement, Settlement::Ack), item.id));
        items.chunks(ITEMS_MAX).map(move |some| settle_some(c, source, some))
    });
    for (at, answer) in join_all(calls).await.into_iter().flatten() {
        answers[at] = answer;
    }
    // Room, and perhaps somebody waits for it.
    c.wanted.notify_one();
    c.arrivals.notify_waiters();
    answers
}

/// Settles what was never handed out. What fails is kept by nobody and comes again.
pub(super) async fn settle_own(c: &Arc<Consuming>, own: Vec<(u64, Settlement)>) {
    let session = c.table().session();
    let receipt = |position| Receipt { session, partition: 0, position };
    let batch: Vec<_> = own.into_iter().map(|(position, settlement)| (receipt(position), settlement)).collect();
    settle(c, &batch).await;
}

fn stale(why: &'static str) -> Error {
    Error::new(ErrorKind::Stale, "settle").because(why)
}

async fn settle_some(c: &Consuming, source: usize, some: &[Item<'_>]) -> Vec<(usize, Result<()>)> {
    let mut answers = match call(c, source, &some.iter().collect::<Vec<_>>(), false).await {
        Ok(answers) => answers,
        Err(error) => return failed(c, some, &error),
    };
    // What was trimmed away is there in our hands only: once more, with a copy.
    let trimmed: Vec<_> = (0..some.len())
        .filter(|at| matches!(answers[*at], Answer::Trimmed) && !matches!(some[*at].settlement, Settlement::Ack))
        .collect();
    if !trimmed.is_empty() {
        // Known before the call, since its answer may be lost: asked again without a copy, it would seem another's.
        {
            let mut table = c.table();
            trimmed.iter().for_each(|at| table.trimmed(some[*at].receipt));
        }
        let again: Vec<_> = trimmed.iter().map(|at| &some[*at]).collect();
        match call(c, source, &again, true).await {
            Ok(second) => trimmed.iter().zip(second).for_each(|(at, answer)| answers[*at] = answer),
            Err(error) => return failed(c, some, &error),
        }
    }
    let mut table = c.table();
    let close = |(item, answer): (&Item<'_>, Answer)| {
        let answer = match answer {
            Answer::Done | Answer::Trimmed => Ok(()),
            // Its only copy was ours, and it is done.
            Answer::NotOurs if item.found.standing == Standing::Trimmed => Ok(()),
            Answer::NotOurs => Err(stale("the delivery is another's, or was settled before")),
            Answer::Failed(why) => return (item.at, Err(refused(&why))),
        };
        table.forget(item.receipt);
        (item.at, answer)
    };
    some.iter().zip(answers).map(close).collect()
}

/// No answer, or none that helps: every item stays in hand, to be settled again.
fn failed(c: &Consuming, some: &[Item<'_>], error: &Error) -> Vec<(usize, Result<()>)> {
    let gone = is_no_group(error);
    let mut table = c.table();
    let each = |item: &Item<'_>| {
        if gone {
            return (item.at, Err(stale("the group vanished, and with it what was pending")));
        }
        table.doubt(item.receipt);
        (item.at, Err(Error::new(error.kind(), "settle").because(text(error))))
    };
    some.iter().map(each).collect()
}

/// What a write inside the script was refused with.
fn refused(why: &str) -> Error {
    let kind = match why.split_whitespace().next().unwrap_or_default().trim_start_matches('-') {
        "OOM" => ErrorKind::Full,
        "WRONGTYPE" | "NOPERM" => ErrorKind::Configuration,
        _ => ErrorKind::Unavailable,
    };
    Error::new(kind, "settle").because(hapax::redact(why).into_owned())
}

async fn call(c: &Consuming, source: usize, some: &[&Item<'_>], copies: bool) -> Result<Vec<Answer>> {
    let of = &c.sources[source];
    let place = &c.settings.places[of.place];
    let word = |text: &str| Bytes::copy_from_slice(text.as_bytes());
    let delete = if of.again || c.settings.delete_done { "delete" } else { "keep" };
    let again = if of.again { "again" } else { "first" };
    let acks = some.iter().take_while(|item| matches!(item.settlement, Settlement::Ack)).count();
    let mut arguments = vec![word(&c.settings.group), word(&c.member), word(PARKING), word(delete), word(again)];
    arguments.push(word(&acks.to_string()));
    arguments.extend(some[..acks].iter().map(|item| Bytes::from(item.id.to_string())));
    for item in &some[acks..] {
        let copied = copies || item.found.standing == Standing::Trimmed;
        let copy = if copied { copy(&item.found.message, of.again, item.id) } else { Vec::new() };
        push_item(&mut arguments, item, copy, copied);
    }
    let keys = [&*of.key, &*place.due, &*place.dead];
    let reply = c.link.run("settle", &c.scripts.settle, &keys, &arguments).await?;
    let answers: Vec<_> = items(reply).into_iter().map(answer).collect();
    if answers.len() == some.len() {
        return Ok(answers);
    }
    Err(Error::new(ErrorKind::Internal, "settle")
        .because("the script gave another number of answers than it was asked for"))
}

fn push_item(arguments: &mut Vec<Bytes>, item: &Item<'_>, copy: Vec<Bytes>, copied: bool) {
    let word = |text: &str| Bytes::copy_from_slice(text.as_bytes());
    let id = Bytes::from(item.id.to_string());
    let list = |arguments: &mut Vec<Bytes>, strings: Vec<Bytes>| {
        arguments.push(Bytes::from(strings.len().to_string()));
        arguments.extend(strings);
    };
    match item.settlement {
        // What nobody else has cannot be given back in its place: it goes the way of a retry that is due.
        Settlement::Release { .. } if copied => {
            arguments.extend([word("retry"), id, word("0")]);
            list(arguments, copy);
        }
        Settlement::Release { counted } => {
            arguments.extend([word("release"), id, word(if *counted { "1" } else { "0" })]);
        }
        Settlement::Retry { after } => {
            let ms = after.as_nanos().div_ceil(1_000_000);
            arguments.extend([word("retry"), id, Bytes::from(ms.to_string())]);
            list(arguments, copy);
        }
        Settlement::DeadLetter(letter) => {
            arguments.extend([word("dead"), id]);
            let marks = letter.headers();
            let marks = marks.iter().flat_map(|(name, value)| [word(name), value.clone()]).collect();
            list(arguments, marks);
            list(arguments, copy);
        }
        Settlement::Ack => unreachable!("acks stand before everything else"),
    }
}

/// The entry as far as it can be told from the message: in binary mode, whatever mode it came in.
fn copy(message: &Message, again: bool, id: EntryId) -> Vec<Bytes> {
    let (headers, body) = encode(message, &Convention::REDIS);
    let mut fields = Vec::with_capacity(headers.len() * 2 + 6);
    if again {
        fields.extend(["hapax-from".into(), Bytes::from(id.to_string()), "hapax-count".into(), "0".into()]);
    }
    for (name, value) in headers.iter() {
        fields.extend([Bytes::copy_from_slice(name.as_bytes()), value.clone()]);
    }
    fields.extend([Bytes::from_static(DATA.as_bytes()), body]);
    fields
}

fn answer(value: Value) -> Answer {
    match value {
        Value::Int(1) => Answer::Done,
        Value::Int(-1) => Answer::Trimmed,
        Value::Int(_) => Answer::NotOurs,
        other => Answer::Failed(
            bytes(other).map_or_else(|| "no answer".to_owned(), |text| String::from_utf8_lossy(&text).into_owned()),
        ),
    }
}
