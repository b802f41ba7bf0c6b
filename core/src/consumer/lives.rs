//! The set of lives that one driver polls: slots that are used again, so that a life costs no allocation of its own.
//!
//! Apart from the engine because it knows nothing of deliveries: it polls what was woken and says what ended.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Wake, Waker};

use futures_util::task::AtomicWaker;

use super::helm::wake;

/// Lives of type `F`, each with a tag that comes back when it ends.
pub(super) struct Lives<F, T> {
    slots: Vec<Slot<F, T>>,
    free: Vec<usize>,
    woken: Arc<Woken>,
    round: Vec<usize>,
    in_order: bool,
}

struct Slot<F, T> {
    life: Pin<Box<Option<F>>>,
    tag: Option<T>,
    wake: Arc<SlotWake>,
    waker: Waker,
}

/// Which slots were woken since the last round.
#[derive(Default)]
struct Woken {
    slots: Mutex<Vec<usize>>,
    driver: AtomicWaker,
}

struct SlotWake {
    index: usize,
    queued: AtomicBool,
    woken: Arc<Woken>,
}

impl Woken {
    fn lock(&self) -> MutexGuard<'_, Vec<usize>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wake for SlotWake {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.queued.swap(true, Ordering::AcqRel) {
            return;
        }
        let mut slots = self.woken.lock();
        slots.push(self.index);
        let first = slots.len() == 1;
        drop(slots);
        // The driver takes the whole list in one round, so only the first of a round has to wake it.
        if first {
            wake(&self.woken.driver);
        }
    }
}

impl<F: Future<Output = ()>, T> Lives<F, T> {
    pub(super) fn new() -> Self {
        Self { slots: Vec::new(), free: Vec::new(), woken: Arc::default(), round: Vec::new(), in_order: false }
    }

    /// Polls what was woken in the order of the slots, where a run must repeat exactly: tokio's `watch` wakes those who
    /// wait for a session's end in an order of chance.
    pub(super) fn in_order(self, in_order: bool) -> Self {
        Self { in_order, ..self }
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Puts a life into a free slot; it is polled in the next round.
    pub(super) fn start(&mut self, life: F, tag: T) {
        let index = self.free.pop().unwrap_or_else(|| self.add_slot());
        let slot = &mut self.slots[index];
        slot.life.set(Some(life));
        slot.tag = Some(tag);
        slot.wake.wake_by_ref();
    }

    fn add_slot(&mut self) -> usize {
        let index = self.slots.len();
        let wake = Arc::new(SlotWake { index, queued: AtomicBool::new(false), woken: Arc::clone(&self.woken) });
        let waker = Waker::from(Arc::clone(&wake));
        self.slots.push(Slot { life: Box::pin(None), tag: None, wake, waker });
        index
    }

    /// The tags of all lives.
    pub(super) fn tags(&self) -> impl Iterator<Item = &T> {
        self.slots.iter().filter_map(|slot| slot.tag.as_ref())
    }

    /// Polls every life that was woken, once, and hands over the tags of those that ended; once it `stops`, the others are
    /// left for the next time. Answers how many were polled. Nobody is woken when there is another: the driver asks again,
    /// or [`rest`](Self::rest)s.
    pub(super) fn poll_until(&mut self, stops: impl Fn() -> bool, mut ended: impl FnMut(T)) -> usize {
        self.expect_poll();
        std::mem::swap(&mut self.round, &mut *self.woken.lock());
        let mut polls = 0;
        if self.in_order {
            self.round.sort_unstable();
        }
        let mut round = self.round.drain(..);
        while !stops()
            && let Some(index) = round.next()
        {
            polls += 1;
            let slot = &mut self.slots[index];
            // Cleared before the poll: a wake during it queues the slot again.
            // A swap, not a store: what a wake that came before it wrote is to be seen by this poll.
            slot.wake.queued.swap(false, Ordering::AcqRel);
            let Some(life) = slot.life.as_mut().as_pin_mut() else { continue };
            if life.poll(&mut Context::from_waker(&slot.waker)).is_ready() {
                slot.life.set(None);
                self.free.push(index);
                slot.tag.take().into_iter().for_each(&mut ended);
            }
        }
        if round.len() > 0 {
            self.woken.lock().extend(round);
        }
        polls
    }

    /// The same to the end.
    pub(super) fn poll(&mut self, ended: impl FnMut(T)) -> usize {
        self.poll_until(|| false, ended)
    }

    /// Nobody is woken for what is woken from here on: a driver that is awake sees it in its next poll. To be woken would
    /// cost it another poll for nothing, and the runtime a thread that looks for work.
    pub(super) fn expect_poll(&self) {
        drop(self.woken.driver.take());
    }

    /// Whether the driver may wait: `cx` is woken with the next life. If not, one was woken since the last round.
    pub(super) fn rest(&self, cx: &Context<'_>) -> bool {
        // Registered before the list is looked at: a wake between the two is seen by one of them.
        self.woken.driver.register(cx.waker());
        self.woken.lock().is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    /// Counts how often it is woken.
    #[derive(Default)]
    struct Wakes(AtomicUsize);

    impl Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_driver_that_rests_is_woken_and_one_that_is_awake_is_not() {
        let wakes = Arc::<Wakes>::default();
        let waker = Waker::from(Arc::clone(&wakes));
        let cx = Context::from_waker(&waker);
        let wakes = || wakes.0.load(Ordering::Relaxed);
        let mut lives = Lives::new();
        let mut wakes_itself = true;
        let life = std::future::poll_fn(move |cx| {
            if std::mem::take(&mut wakes_itself) {
                cx.waker().wake_by_ref();
            }
            std::task::Poll::Pending
        });
        lives.start(life, ());
        assert!(!lives.rest(&cx), "there is one to be polled");
        assert_eq!((lives.poll(|()| ()), lives.poll(|()| ())), (1, 1));
        assert_eq!(wakes(), 0, "the driver was awake");
        assert!(lives.rest(&cx));
        lives.slots[0].wake.wake_by_ref();
        assert_eq!(wakes(), 1);
    }

    #[test]
    fn a_slot_is_used_again_and_a_late_wake_of_its_former_life_is_harmless() {
        let mut lives = Lives::new();
        let mut ended = Vec::new();
        lives.start(std::future::ready(()), 1);
        assert_eq!(lives.poll(|tag| ended.push(tag)), 1);
        lives.slots[0].wake.wake_by_ref();
        assert_eq!(lives.poll(|tag| ended.push(tag)), 1);
        lives.start(std::future::ready(()), 2);
        assert_eq!((lives.tags().count(), lives.slots.len()), (1, 1));
        lives.poll(|tag| ended.push(tag));
        assert_eq!(ended, [1, 2]);
        assert_eq!(lives.poll(|_| ()), 0);
    }

    #[test]
    fn a_life_that_wakes_itself_is_polled_again() {
        let mut lives = Lives::new();
        let mut polls = 0;
        let life = std::future::poll_fn(move |cx| {
            polls += 1;
            cx.waker().wake_by_ref();
            if polls == 3 { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
        });
        lives.start(life, ());
        let (mut rounds, mut over) = (0, false);
        while !over {
            assert_eq!(lives.poll(|()| over = true), 1, "it woke itself");
            rounds += 1;
        }
        assert_eq!(rounds, 3);
    }
}
