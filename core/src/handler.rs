//! Handlers and how they fail: what users write, and the four things a failure can mean.

use std::borrow::Cow;
use std::fmt;
use std::future::Future;
use std::time::Duration;

use crate::context::Context;
use crate::error::BoxError;

/// Takes an event. Plain async functions are handlers; a struct implements it for state of its own.
///
/// The future may be dropped at any await point: when its lease is lost, at its timeout, at shutdown.
///
/// ```
/// use hapax::{Context, Event, Failure, Handler};
/// # use serde::{Deserialize, Serialize};
/// #[derive(Serialize, Deserialize)]
/// struct OrderPlaced { cents: i64 }
/// impl Event for OrderPlaced { const TYPE: &'static str = "com.shop.order.placed"; }
///
/// async fn placed(event: OrderPlaced, cx: Context<()>) -> Result<(), Failure> {
///     println!("{} cents, attempt {}", event.cents, cx.attempt());
///     Ok(())
/// }
///
/// struct Audit { threshold: i64 }
/// impl Handler<OrderPlaced, ()> for Audit {
///     type Error = Failure;
///     async fn handle(&self, event: OrderPlaced, _: Context<()>) -> Result<(), Failure> {
///         if event.cents > self.threshold { return Err(Failure::permanent("beyond the threshold")); }
///         Ok(())
///     }
/// }
/// fn is_handler(_: impl Handler<OrderPlaced, ()>) {}
/// is_handler(placed);
/// is_handler(Audit { threshold: 100 });
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no handler for `{E}` with state `{S}`",
    label = "not a handler",
    note = "a handler is `async fn(E, Context<S>) -> Result<(), F>` where F is `hapax::Failure` or implements `hapax::IntoFailure`",
    note = "`S` is what `.state(..)` was given before this handler was added"
)]
pub trait Handler<E, S>: Send + Sync + 'static {
    /// How it fails.
    type Error: IntoFailure;

    /// Makes the event take effect.
    fn handle(&self, event: E, cx: Context<S>) -> impl Future<Output = Result<(), Self::Error>> + Send;
}

impl<E, S, F, Fut, Er> Handler<E, S> for F
where
    F: Fn(E, Context<S>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<(), Er>> + Send,
    Er: IntoFailure,
{
    type Error = Er;

    fn handle(&self, event: E, cx: Context<S>) -> impl Future<Output = Result<(), Er>> + Send {
        self(event, cx)
    }
}

/// Takes an event and the store's transaction: its effects through the transaction and the processed mark commit
/// together. The transaction goes back when the handler drops it.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no transactional handler for `{E}` with transaction `{T}` and state `{S}`",
    label = "not a transactional handler",
    note = "a transactional handler is `async fn(E, Tx, Context<S>) -> Result<(), F>` where Tx is the store's own (`SqliteTx`, `PgTx`)"
)]
pub trait TxHandler<E, T, S>: Send + Sync + 'static {
    /// How it fails.
    type Error: IntoFailure;

    /// Makes the event take effect through `tx`.
    fn handle(&self, event: E, tx: T, cx: Context<S>) -> impl Future<Output = Result<(), Self::Error>> + Send;
}

impl<E, T, S, F, Fut, Er> TxHandler<E, T, S> for F
where
    F: Fn(E, T, Context<S>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<(), Er>> + Send,
    Er: IntoFailure,
{
    type Error = Er;

    fn handle(&self, event: E, tx: T, cx: Context<S>) -> impl Future<Output = Result<(), Er>> + Send {
        self(event, tx, cx)
    }
}

/// What a failure means for the event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// Trying again may help; counts as an attempt.
    Retryable {
        /// Not before; `None` leaves it to the policy.
        after: Option<Duration>,
    },
    /// Trying again cannot help: to the dead letters.
    Permanent,
    /// A prerequisite is missing: not counted, bounded by `not_yet_max`.
    NotYet {
        /// Look again after this long.
        after: Duration,
    },
    /// The handler's own dependency is down: not counted, trips the kill switch.
    Unavailable,
}

/// Why a handler did not succeed. Deliberately no [`std::error::Error`], so that `?` turns every error into one.
///
/// `?` on any error gives a retryable failure. On a type that implements [`IntoFailure`], inside a handler that returns
/// `Failure`, `?` takes that blanket conversion too: return the type itself, or write
/// [`.classified()?`](FailureExt::classified), to keep its class.
///
/// ```
/// use hapax::{Failure, FailureExt, FailureKind};
///
/// fn parse(text: &str) -> Result<u32, Failure> {
///     Ok(text.parse().permanent("no number")?)
/// }
/// assert_eq!(parse("x").unwrap_err().kind(), FailureKind::Permanent);
/// ```
pub struct Failure {
    kind: FailureKind,
    reason: Cow<'static, str>,
    source: Option<BoxError>,
}

impl Failure {
    /// Try again when the policy says so. `reason` is short and static: it selects delays and labels.
    pub fn retryable(reason: &'static str) -> Self {
        Self::new(FailureKind::Retryable { after: None }, reason)
    }

    /// Trying again cannot help.
    pub fn permanent(reason: &'static str) -> Self {
        Self::new(FailureKind::Permanent, reason)
    }

    /// A prerequisite is missing; look again after this long. Not counted as an attempt.
    pub fn not_yet(reason: &'static str, after: Duration) -> Self {
        Self::new(FailureKind::NotYet { after }, reason)
    }

    /// The handler's own dependency is down. Not counted as an attempt; trips the kill switch.
    pub fn unavailable(reason: &'static str) -> Self {
        Self::new(FailureKind::Unavailable, reason)
    }

    fn new(kind: FailureKind, reason: &'static str) -> Self {
        Self { kind, reason: Cow::Borrowed(reason), source: None }
    }

    /// A retryable or not-yet failure that says itself when to try again; the others stay as they are.
    #[must_use]
    pub fn after(mut self, wait: Duration) -> Self {
        match &mut self.kind {
            FailureKind::Retryable { after } => *after = Some(wait),
            FailureKind::NotYet { after } => *after = wait,
            FailureKind::Permanent | FailureKind::Unavailable => {}
        }
        self
    }

    /// Keeps the error behind it.
    #[must_use]
    pub fn with_source(self, source: impl Into<BoxError>) -> Self {
        Self { source: Some(source.into()), ..self }
    }

    /// What it means for the event.
    pub fn kind(&self) -> FailureKind {
        self.kind
    }

    /// The short reason; empty if it came from `?`.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// The error behind it.
    pub fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

impl<E: Into<BoxError>> From<E> for Failure {
    /// Retryable, with the error as its source.
    fn from(error: E) -> Self {
        Self::new(FailureKind::Retryable { after: None }, "").with_source(error)
    }
}

impl fmt::Display for Failure {
    /// Reason and the chain of sources.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        if !self.reason.is_empty() {
            f.write_str(&self.reason)?;
            separator = ": ";
        }
        let mut source = self.source();
        while let Some(error) = source {
            write!(f, "{separator}{error}")?;
            separator = ": ";
            source = error.source();
        }
        Ok(())
    }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Failure")
            .field("kind", &self.kind)
            .field("reason", &self.reason)
            .field("source", &self.source)
            .finish()
    }
}

/// A user's error type that classifies itself.
///
/// ```
/// use hapax::{Failure, IntoFailure};
///
/// enum ChargeError { Declined, Busy }
/// impl IntoFailure for ChargeError {
///     fn into_failure(self) -> Failure {
///         match self {
///             Self::Declined => Failure::permanent("card declined"),
///             Self::Busy => Failure::unavailable("payment provider busy"),
///         }
///     }
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` does not say what its failure means",
    note = "return `hapax::Failure` from the handler (then `?` works on every error and is retryable), or `impl hapax::IntoFailure for {Self}`"
)]
pub trait IntoFailure: Send + 'static {
    /// What it means for the event.
    fn into_failure(self) -> Failure;
}

impl IntoFailure for Failure {
    fn into_failure(self) -> Failure {
        self
    }
}

impl IntoFailure for std::convert::Infallible {
    fn into_failure(self) -> Failure {
        match self {}
    }
}

/// Gives a result's error a class on the way through `?`.
pub trait FailureExt<T, E> {
    /// Keeps the class that the error's own [`IntoFailure`] says. A bare `?` would make it retryable.
    fn classified(self) -> Result<T, Failure>
    where
        E: IntoFailure;

    /// Trying again cannot help.
    fn permanent(self, reason: &'static str) -> Result<T, Failure>
    where
        E: Into<BoxError>;

    /// Try again after this long.
    fn retry_after(self, wait: Duration) -> Result<T, Failure>
    where
        E: Into<BoxError>;

    /// The handler's own dependency is down.
    fn unavailable(self, reason: &'static str) -> Result<T, Failure>
    where
        E: Into<BoxError>;

    /// A prerequisite is missing; look again after this long.
    fn not_yet(self, reason: &'static str, after: Duration) -> Result<T, Failure>
    where
        E: Into<BoxError>;
}

impl<T, E> FailureExt<T, E> for Result<T, E> {
    fn classified(self) -> Result<T, Failure>
    where
        E: IntoFailure,
    {
        self.map_err(IntoFailure::into_failure)
    }

    fn permanent(self, reason: &'static str) -> Result<T, Failure>
    where
        E: Into<BoxError>,
    {
        self.map_err(|error| Failure::permanent(reason).with_source(error))
    }

    fn retry_after(self, wait: Duration) -> Result<T, Failure>
    where
        E: Into<BoxError>,
    {
        self.map_err(|error| Failure::retryable("").with_source(error).after(wait))
    }

    fn unavailable(self, reason: &'static str) -> Result<T, Failure>
    where
        E: Into<BoxError>,
    {
        self.map_err(|error| Failure::unavailable(reason).with_source(error))
    }

    fn not_yet(self, reason: &'static str, after: Duration) -> Result<T, Failure>
    where
        E: Into<BoxError>,
    {
        self.map_err(|error| Failure::not_yet(reason, after).with_source(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    enum ChargeError {
        Declined,
    }

    impl std::fmt::Debug for ChargeError {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("Declined")
        }
    }
    impl fmt::Display for ChargeError {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("declined")
        }
    }
    impl std::error::Error for ChargeError {}
    impl IntoFailure for ChargeError {
        fn into_failure(self) -> Failure {
            Failure::permanent("declined")
        }
    }

    fn charge() -> Result<(), ChargeError> {
        Err(ChargeError::Declined)
    }

    #[test]
    fn a_question_mark_makes_any_error_retryable_and_classified_keeps_its_class() {
        let bare = || -> Result<(), Failure> { Ok(charge()?) };
        let kept = || -> Result<(), Failure> {
            charge().classified()?;
            Ok(())
        };
        assert_eq!(bare().expect_err("it fails").kind(), FailureKind::Retryable { after: None });
        assert_eq!(kept().expect_err("it fails").kind(), FailureKind::Permanent);
    }

    #[test]
    fn a_failure_reads_as_reason_and_sources() {
        let failure = Failure::permanent("no number").with_source("x".parse::<u8>().expect_err("no number"));
        assert_eq!(failure.to_string(), "no number: invalid digit found in string");
    }
}
