//! One session's unsettled deliveries: a table with stable places, so that a receipt finds its delivery in one step.
//!
//! Apart from the group because it answers a single question: is this receipt's delivery still its holder's?

use std::sync::Arc;

use bytes::Bytes;
use hapax::{Headers, Message, Origin, Receipt, Session, SessionState};
use tokio::sync::watch;
use tokio::time::Instant;

/// A message of a group that is not done.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) message: Arc<Message>,
    pub(super) origin: Arc<Origin>,
    /// Its number in the topic, from 1.
    pub(super) position: u64,
    pub(super) size: Size,
    /// Headers and body as they travelled, where they are another form of the message: in structured mode.
    pub(super) wire: Option<Arc<(Headers, Bytes)>>,
    /// Deliveries that count so far.
    pub(super) count: u32,
}

/// What a message measures as it would travel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    pub(super) body_bytes: usize,
    pub(super) header_bytes: usize,
    pub(super) headers: usize,
    /// The longer of id and source.
    pub(super) id_bytes: usize,
    /// What it takes in flight.
    pub(super) bytes: usize,
}

/// How a receipt stands.
#[derive(Debug)]
pub(super) enum Found {
    /// Its delivery was taken out.
    Taken(Entry),
    /// Settled before.
    Settled,
    /// It became another's, or was never handed out here.
    Lost,
}

/// A receipt's position is the number of the delivery within the session, and in its low bits the place in the table.
const PLACE_BITS: u32 = 20;
const PLACE_MASK: u64 = (1 << PLACE_BITS) - 1;
/// Most unsettled deliveries of one session, whatever its limits say.
pub(super) const UNSETTLED_MAX: usize = 1 << PLACE_BITS;

#[derive(Debug)]
enum Place {
    Free,
    Held {
        receipt: u64,
        until: Option<Instant>,
        entry: Entry,
    },
    /// Held too long and given to another, while its holder goes on holding it: keeps counting against its limits.
    Lost {
        receipt: u64,
        bytes: usize,
    },
}

#[derive(Debug)]
pub(super) struct Table {
    pub(super) session: Session,
    state: watch::Sender<SessionState>,
    places: Vec<Place>,
    free: Vec<u32>,
    handed_out: u64,
    /// Deliveries and bytes that the session's holder has in hand.
    pub(super) in_hand: usize,
    pub(super) bytes: usize,
    /// No delivery is overdue before this.
    pub(super) check_at: Option<Instant>,
    /// Set while it drains; it ends then at the latest.
    pub(super) drain_until: Option<Instant>,
}

impl Table {
    pub(super) fn new(id: u32) -> Self {
        let (state, seen) = watch::channel(SessionState::Live);
        Self {
            session: Session::new(id, seen),
            state,
            places: Vec::new(),
            free: Vec::new(),
            handed_out: 0,
            in_hand: 0,
            bytes: 0,
            check_at: None,
            drain_until: None,
        }
    }

    pub(super) fn id(&self) -> u32 {
        self.session.id()
    }

    /// Notes a delivery as handed out and mints its receipt.
    pub(super) fn hold(&mut self, entry: Entry, until: Option<Instant>) -> Receipt {
        self.handed_out += 1;
        self.in_hand += 1;
        self.bytes += entry.size.bytes;
        if self.check_at.is_none() {
            self.check_at = until;
        }
        let place = self.free.pop().map_or(self.places.len(), |place| place as usize);
        let receipt = (self.handed_out << PLACE_BITS) | place as u64;
        let held = Place::Held { receipt, until, entry };
        match self.places.get_mut(place) {
            Some(free) => *free = held,
            None => self.places.push(held),
        }
        Receipt { session: self.id(), partition: 0, position: receipt }
    }

    /// The delivery of a receipt while it is its holder's, without settling it.
    pub(super) fn get(&self, receipt: Receipt) -> Option<&Entry> {
        match self.places.get((receipt.position & PLACE_MASK) as usize) {
            Some(Place::Held { receipt: held, entry, .. }) if *held == receipt.position => Some(entry),
            _ => None,
        }
    }

    /// Takes the delivery of a receipt out.
    pub(super) fn take(&mut self, receipt: Receipt) -> Found {
        let number = receipt.position >> PLACE_BITS;
        let index = receipt.position & PLACE_MASK;
        let Some(place) = self.places.get_mut(index as usize).filter(|_| (1..=self.handed_out).contains(&number))
        else {
            return Found::Lost;
        };
        let (found, bytes) = match std::mem::replace(place, Place::Free) {
            Place::Held { receipt: held, entry, .. } if held == receipt.position => {
                let bytes = entry.size.bytes;
                (Found::Taken(entry), bytes)
            }
            Place::Lost { receipt: lost, bytes } if lost == receipt.position => (Found::Lost, bytes),
            other => {
                *place = other;
                return Found::Settled;
            }
        };
        self.free.push(index as u32);
        self.in_hand -= 1;
        self.bytes -= bytes;
        if self.in_hand == 0 {
            self.check_at = None;
        }
        found
    }

    /// Takes away what has been held for too long; its holder goes on counting it.
    pub(super) fn overdue(&mut self, now: Instant) -> Vec<Entry> {
        let mut overdue = Vec::new();
        if self.check_at.is_none_or(|at| at > now) {
            return overdue;
        }
        self.check_at = None;
        for place in &mut self.places {
            let Place::Held { receipt, until: Some(until), entry } = place else { continue };
            if *until <= now {
                let lost = Place::Lost { receipt: *receipt, bytes: entry.size.bytes };
                if let Place::Held { entry, .. } = std::mem::replace(place, lost) {
                    overdue.push(entry);
                }
            } else {
                self.check_at = Some(self.check_at.map_or(*until, |at| at.min(*until)));
            }
        }
        overdue
    }

    /// What is held, in the order of the table.
    pub(super) fn held(&self) -> impl Iterator<Item = &Entry> {
        self.places.iter().filter_map(|place| match place {
            Place::Held { entry, .. } => Some(entry),
            Place::Free | Place::Lost { .. } => None,
        })
    }

    pub(super) fn drain(&mut self, until: Instant) {
        self.drain_until.get_or_insert(until);
        self.state.send_replace(SessionState::Draining);
    }

    /// Says that the session has ended and hands over what was held.
    pub(super) fn end(self) -> impl Iterator<Item = Entry> {
        self.state.send_replace(SessionState::Ended);
        self.places.into_iter().filter_map(|place| match place {
            Place::Held { entry, .. } => Some(entry),
            Place::Free | Place::Lost { .. } => None,
        })
    }
}
