//! The builder's methods that only keep a value.

use std::sync::Arc;
use std::time::Duration;

use super::{ConsumerBuilder, MissingId};
use crate::event::{Event, Otherwise, Upcast};
use crate::guarantee::{Level, Window};
use crate::identity::IdFrom;
use crate::observer::Observer;
use crate::publisher::Publisher;
use crate::retry::RetryPolicy;
use crate::settings::{Order, Settings};
use crate::stepping::Stepper;

/// One method a setting, named as its field.
macro_rules! settings {
    ($($name:ident: $type:ty $(=> $some:ident)?;)*) => {
        /// One method for each of the [`Settings`].
        impl<S, T> ConsumerBuilder<S, T> {
            $(
                #[doc = concat!("Sets [`Settings::", stringify!($name), "`].")]
                pub fn $name(mut self, $name: $type) -> Self {
                    self.choices.settings.$name = $($some)?($name);
                    self
                }
            )*
        }
    };
}

settings! {
    order: Order => Some;
    concurrency: usize;
    in_flight_max: usize;
    in_flight_bytes_max: usize;
    batch_max: usize;
    lease: Duration;
    timeout: Duration => Some;
    attempts_max: u32;
    delay: Duration;
    delay_factor: f32;
    delay_max: Duration => Some;
    jitter: f32;
    retry_total_max: Duration => Some;
    hold: Duration;
    crashes_max: u32;
    not_yet_max: Duration;
    retention: Duration;
    switch_share: f64;
    switch_events_min: u32;
    switch_window: Duration;
    switch_probe: Duration;
    drain: Duration;
    call_timeout: Duration;
    body_max: usize;
    headers_max: usize;
    header_bytes_max: usize;
    id_max: usize;
    json_depth_max: usize;
    error_text_max: usize;
}

impl<S, T> ConsumerBuilder<S, T> {
    /// All settings at once, replacing those set so far.
    pub fn settings(mut self, settings: Settings) -> Self {
        self.choices.settings = settings;
        self
    }

    /// How often and when handlers without a policy of their own are tried, instead of the settings `attempts_max`,
    /// `delay`, `delay_factor`, `delay_max`, `jitter` and `retry_total_max`.
    pub fn retry(mut self, retry: RetryPolicy) -> Self {
        self.choices.retry = Some(retry);
        self
    }

    /// Lifts events of an older version, `A`, to a newer one, `B`. Several make a chain.
    pub fn upcast<A: Event, B: Event + From<A>>(mut self) -> Self {
        self.choices.upcasts.push(Upcast::new::<A, B>());
        self
    }

    /// What happens to types without a handler. Required unless there is an `on_any`.
    pub fn otherwise(mut self, otherwise: Otherwise) -> Self {
        self.choices.otherwise = Some(otherwise);
        self
    }

    /// Where [`Context::publish`](crate::Context::publish) sends to.
    pub fn publisher(mut self, publisher: impl Publisher) -> Self {
        self.choices.publisher = Some(Arc::new(publisher));
        self
    }

    /// Who is told what happens, instead of [`Telemetry`](crate::Telemetry).
    pub fn observer(mut self, observer: Arc<dyn Observer>) -> Self {
        self.choices.observer = Some(observer);
        self
    }

    /// Where ids are taken from, instead of [`IdFrom::CloudEvents`]. Several are tried in this order.
    pub fn id_from(mut self, from: IdFrom) -> Self {
        self.choices.extractors.push(from);
        self
    }

    /// What happens to a message in which no id is found. Default: [`MissingId::DeadLetter`].
    pub fn missing_id(mut self, missing_id: MissingId) -> Self {
        self.choices.missing_id = missing_id;
        self
    }

    /// Accepts an open window that would keep the consumer from being built.
    pub fn allow(mut self, window: Window) -> Self {
        self.choices.allowed.push(window);
        self
    }

    /// Refuses to build where a handler's level is lower. Default: [`Level::Deduplicated`].
    pub fn require(mut self, level: Level) -> Self {
        self.choices.required = level;
        self
    }

    /// Makes tokens and jitter repeat exactly: for simulations alone. Two processes with one seed would take each
    /// other's claims for their own.
    pub fn seed(mut self, seed: u64) -> Self {
        self.choices.seed = Some(seed);
        self
    }

    /// For test kits, and no part of the stable API: handlers are stepped through, and what was to be published goes to
    /// `publisher`, where one was set.
    #[doc(hidden)]
    pub fn under_test(mut self, stepper: Arc<dyn Stepper>, publisher: Arc<dyn Publisher>) -> Self {
        self.choices.stepper = Some(stepper);
        self.choices.publisher = self.choices.publisher.map(|_| publisher);
        self
    }

    /// Takes out of error texts what must not be stored, logged or put into dead letters, before they are cut.
    pub fn redact(mut self, redact: fn(&str) -> String) -> Self {
        self.choices.redact = Some(redact);
        self
    }
}
