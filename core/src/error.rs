//! The one error of hapax and its adapters: what went wrong, during which operation, and whether asking again can help.
//!
//! A handler's failure is another type ([`Failure`](crate::Failure)), because it is a verdict about an event and not
//! about hapax. Texts never hold secrets: adapters convert a client's error here, at their edge, and redact it there.

use std::borrow::Cow;
use std::fmt;

/// Any error, boxed: what a [`Failure`](crate::Failure) or an [`Error`] keeps as its source.
pub type BoxError = Box<dyn std::error::Error + Send + Sync + 'static>;

/// The result of every operation of hapax.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of trouble an [`Error`] is, so that code can decide without reading texts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The broker or store cannot be reached, or answered that it cannot serve now. Asking again can help.
    Unavailable,
    /// No answer came before the deadline: whether the operation took place is unknown. Every operation of the
    /// contracts can be repeated, so asking again is safe.
    Unknown,
    /// The request as it stands is refused and will be refused again. A batch is halved until the culprit is alone.
    Rejected,
    /// The receipt's session has ended, or the delivery was settled already: nothing was done and nothing needs to be.
    Stale,
    /// Settings contradict each other, the broker, or the store. The text names the setting and the remedy.
    Configuration,
    /// What is stored is not what this version of hapax wrote: damaged, foreign, or newer. Nothing was changed.
    Incompatible,
    /// A limit that was set refuses more (a full store, a full queue).
    Full,
    /// An invariant of hapax itself does not hold: a bug, to be reported.
    Internal,
}

impl ErrorKind {
    /// The kind as a lower-case word: the value of metric labels.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unavailable => "unavailable",
            Self::Unknown => "unknown",
            Self::Rejected => "rejected",
            Self::Stale => "stale",
            Self::Configuration => "configuration",
            Self::Incompatible => "incompatible",
            Self::Full => "full",
            Self::Internal => "internal",
        }
    }
}

/// What went wrong in hapax, a broker or a store.
///
/// ```
/// use hapax::{Error, ErrorKind};
///
/// let error = Error::new(ErrorKind::Unavailable, "claim").because("the server is restarting");
/// assert!(error.is_retryable());
/// assert_eq!(error.to_string(), "claim: the server is restarting");
/// ```
pub struct Error {
    kind: ErrorKind,
    operation: &'static str,
    message: Cow<'static, str>,
    source: Option<BoxError>,
}

impl Error {
    /// An error of `kind` in `operation` (a verb of the contracts: `claim`, `settle`, `open`).
    pub fn new(kind: ErrorKind, operation: &'static str) -> Self {
        Self { kind, operation, message: Cow::Borrowed(kind.as_str()), source: None }
    }

    /// Says why, in a sentence for people. Must not hold secrets or payloads.
    #[must_use]
    pub fn because(self, message: impl Into<Cow<'static, str>>) -> Self {
        Self { message: message.into(), ..self }
    }

    /// Keeps the client's error as the source. Its text must not hold secrets.
    #[must_use]
    pub fn with_source(self, source: impl Into<BoxError>) -> Self {
        Self { source: Some(source.into()), ..self }
    }

    /// What kind of trouble it is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The verb during which it happened.
    pub fn operation(&self) -> &'static str {
        self.operation
    }

    /// Whether the same request can succeed later without anybody changing anything.
    pub fn is_retryable(&self) -> bool {
        matches!(self.kind, ErrorKind::Unavailable | ErrorKind::Unknown | ErrorKind::Full)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.operation, self.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Error")
            .field("kind", &self.kind)
            .field("operation", &self.operation)
            .field("message", &self.message)
            .field("source", &self.source)
            .finish()
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}
