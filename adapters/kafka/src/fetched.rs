//! A fetched record on its way through this process: what is kept of it until it is done, and the delivery that it becomes.
//!
//! The thread that polls only copies bytes. A record becomes a message when it is handed out, by whoever asked for it: what
//! is allocated there is freed by the same threads, which costs a fraction of what it does across threads.

use std::sync::Arc;

use hapax::{Delivery, MessageLimits, Origin, Receipt, Session};
use tokio::time::Instant;

use crate::places::Places;
use crate::wire::{Home, Raw};

/// A fetched record that is not done.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) raw: Raw,
    pub(crate) offset: i64,
    /// Of records in retry topics.
    pub(crate) retry: Option<Box<Retry>>,
}

/// What a record in a retry topic has beside.
#[derive(Clone, Debug)]
pub(crate) struct Retry {
    /// Where it stood first, if it says that.
    pub(crate) home: Option<Home>,
    /// Not before this.
    pub(crate) due: Instant,
}

impl Entry {
    pub(crate) fn due(&self) -> Option<Instant> {
        self.retry.as_ref().map(|retry| retry.due)
    }
}

/// A record, and the partition that it was fetched from.
#[derive(Debug)]
pub(crate) struct Fetched {
    pub(crate) place: usize,
    pub(crate) partition: i32,
    pub(crate) entry: Entry,
}

impl Fetched {
    /// Where it stood before it was retried, or stands.
    pub(crate) fn home(&self, places: &Places) -> Home {
        let first = self.entry.retry.as_ref().and_then(|retry| retry.home.clone());
        first.unwrap_or_else(|| Home {
            topic: Arc::clone(&places.subscribed[self.place].name),
            partition: self.partition,
            offset: self.entry.offset,
            hops: 0,
        })
    }
}

/// A record that is handed out.
#[derive(Debug)]
pub(crate) struct Given {
    pub(crate) receipt: Receipt,
    pub(crate) session: Session,
    pub(crate) fetched: Fetched,
}

/// The deliveries that these records are.
pub(crate) fn deliveries(given: Vec<Given>, places: &Places, limits: &MessageLimits) -> Vec<Delivery> {
    let mut run: Option<(Arc<str>, i32, Arc<str>)> = None;
    let delivery = |given: Given| {
        let home = given.fetched.home(places);
        // Records come in runs of one partition, so its text is made once for many.
        run.take_if(|run| run.0 != home.topic || run.1 != home.partition);
        let (_, _, place) = run.get_or_insert_with(|| {
            let place = format!("{}/{}", home.topic, home.partition).into();
            (Arc::clone(&home.topic), home.partition, place)
        });
        let origin = Origin { place: Arc::clone(place), position: home.offset.to_string().into() };
        Delivery {
            receipt: given.receipt,
            session: given.session,
            message: Arc::new(given.fetched.entry.raw.message(limits)),
            count: None,
            origin: Some(Arc::new(origin)),
        }
    };
    given.into_iter().map(delivery).collect()
}
