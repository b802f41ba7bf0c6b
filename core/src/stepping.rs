//! A window for test kits: whoever steps sees every poll of every handler, and may hold a handler where it stands.
//!
//! Outside of the stable API: it exists so that `hapax-testkit` can end and freeze production wiring at any await point.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use crate::store::Lease;

/// Sees the polls of handlers. For test kits; may change in any release.
pub trait Stepper: Send + Sync + 'static {
    /// Before the handler that runs under this lease is polled. `Pending` leaves it where it stands: whoever answers so
    /// wakes `cx` when it may go on.
    fn before(&self, lease: &Lease, cx: &mut Context<'_>) -> Poll<()>;

    /// After it was polled, and whether it ended.
    fn after(&self, lease: &Lease, ended: bool);
}

/// A handler's run whose polls a stepper sees.
pub(crate) struct Stepped<F> {
    running: F,
    stepper: Arc<dyn Stepper>,
    lease: Lease,
}

impl<F> Stepped<F> {
    pub(crate) fn new(running: F, stepper: Arc<dyn Stepper>, lease: Lease) -> Self {
        Self { running, stepper, lease }
    }
}

impl<F: Future + Unpin> Future for Stepped<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = &mut *self;
        ready!(this.stepper.before(&this.lease, cx));
        let polled = Pin::new(&mut this.running).poll(cx);
        this.stepper.after(&this.lease, polled.is_ready());
        polled
    }
}
