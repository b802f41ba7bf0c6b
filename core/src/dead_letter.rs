//! Dead letters: a message set aside with a reason, and the bounded set of headers it bears.
//!
//! The headers are public API: dashboards and redrive tools of others read them. They are written here for all
//! adapters, and taken off here when a dead letter is sent back.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;

use crate::broker::Origin;
use crate::message::{Headers, Message};

/// Every header that hapax writes begins with this; what others send under it is not believed.
pub const RESERVED_PREFIX: &str = "hapax-";

/// The version of the dead-letter headers.
pub const DEAD_LETTER_VERSION: u32 = 1;

const VERSION: &str = "hapax-dead-letter";
const REASON: &str = "hapax-reason";
const ERROR: &str = "hapax-error";
const CONSUMER: &str = "hapax-consumer";
const ATTEMPTS: &str = "hapax-attempts";
const FIRST: &str = "hapax-first-unix-ms";
const LAST: &str = "hapax-last-unix-ms";
const ORIGIN: &str = "hapax-origin";
pub(crate) const REOPEN: &str = "hapax-reopen";

/// Why a message was set aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Reason {
    /// The handler said that trying again cannot help.
    Permanent,
    /// Every attempt failed.
    AttemptsExhausted,
    /// The time allowed for all attempts together is over.
    TimeExhausted,
    /// Too many claims ended without an outcome: the process died, or the handler outlived its lease.
    CrashesExhausted,
    /// The prerequisite it waited for did not come within `not_yet_max`.
    NeverReady,
    /// Same source and id as an event that is known, but other data.
    Conflict,
    /// No id was found by any extractor.
    MissingId,
    /// It does not read as its content mode or type says.
    Undecodable,
    /// A limit on size, headers, id or depth is exceeded.
    BeyondLimit,
    /// No handler for its type, and [`Otherwise::DeadLetter`](crate::Otherwise::DeadLetter).
    UnknownType,
    /// A version of its type that this consumer does not know.
    UnknownVersion,
    /// The store refuses this one event for good.
    Refused,
}

impl Reason {
    pub(crate) const ALL: [Self; 12] = [
        Self::Permanent,
        Self::AttemptsExhausted,
        Self::TimeExhausted,
        Self::CrashesExhausted,
        Self::NeverReady,
        Self::Conflict,
        Self::MissingId,
        Self::Undecodable,
        Self::BeyondLimit,
        Self::UnknownType,
        Self::UnknownVersion,
        Self::Refused,
    ];

    /// The reason as a stable word: in headers, records and metric labels.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Permanent => "permanent",
            Self::AttemptsExhausted => "attempts-exhausted",
            Self::TimeExhausted => "time-exhausted",
            Self::CrashesExhausted => "crashes-exhausted",
            Self::NeverReady => "never-ready",
            Self::Conflict => "conflict",
            Self::MissingId => "missing-id",
            Self::Undecodable => "undecodable",
            Self::BeyondLimit => "beyond-limit",
            Self::UnknownType => "unknown-type",
            Self::UnknownVersion => "unknown-version",
            Self::Refused => "refused",
        }
    }

    /// The reason that [`as_str`](Self::as_str) wrote. A word of a newer version reads as [`Reason::Permanent`]: the
    /// event stays doomed, whatever the cause was.
    pub fn from_word(word: &str) -> Self {
        Self::ALL.into_iter().find(|reason| reason.as_str() == word).unwrap_or(Self::Permanent)
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A message set aside. The adapter places it with its original bytes and headers, plus [`headers`](Self::headers).
#[derive(Clone, Debug)]
pub struct DeadLetter {
    /// Why.
    pub reason: Reason,
    /// The last error for people: at most `error_text_max` bytes, one line.
    pub error: Box<str>,
    /// Which consumer set it aside.
    pub consumer: Arc<str>,
    /// How often the handler was started.
    pub attempts: u32,
    /// When the first attempt began, by this process' clock.
    pub first: SystemTime,
    /// When it was set aside, by this process' clock.
    pub last: SystemTime,
    /// Where the message stood.
    pub origin: Option<Arc<Origin>>,
    /// What lets it run once more when it is sent back; none where no record was written.
    pub reopen: Option<NonZeroU64>,
}

impl DeadLetter {
    /// The headers of a dead letter: at most nine, of bounded length.
    pub fn headers(&self) -> Headers {
        let mut headers = Headers::new();
        let mut put = |name: &str, value: String| headers.push(name, Bytes::from(value));
        put(VERSION, DEAD_LETTER_VERSION.to_string());
        put(REASON, self.reason.as_str().to_owned());
        put(ERROR, one_line(&self.error));
        put(CONSUMER, self.consumer.to_string());
        put(ATTEMPTS, self.attempts.to_string());
        put(FIRST, unix_ms(self.first).to_string());
        put(LAST, unix_ms(self.last).to_string());
        if let Some(origin) = &self.origin {
            put(ORIGIN, one_line(&format!("{}/{}", origin.place, origin.position)));
        }
        if let Some(token) = self.reopen {
            put(REOPEN, token.to_string());
        }
        headers
    }

    /// Puts [`headers`](Self::headers) on the original ones. Those of an earlier dead letter of the same message go, so
    /// that it bears one reopen token.
    pub fn mark(&self, headers: &mut Headers) {
        headers.retain(|name| !is_reserved(name));
        for (name, value) in self.headers().iter() {
            headers.push(name, value.clone());
        }
    }
}

/// Takes the headers of hapax off a message that arrives: the reopen token is kept apart, the rest is not believed.
pub(crate) fn take_off(message: &mut Message) {
    if !message.headers.iter().any(|(name, _)| is_reserved(name)) {
        return;
    }
    message.reopen = message.headers.get_str(REOPEN).and_then(|token| token.parse().ok());
    message.headers.retain(|name| !is_reserved(name));
}

/// Whether a header is one of hapax itself.
pub(crate) fn is_reserved(name: &str) -> bool {
    name.get(..RESERVED_PREFIX.len()).is_some_and(|prefix| prefix.eq_ignore_ascii_case(RESERVED_PREFIX))
}

/// Cuts `text` to `max` bytes at a character and replaces control characters, so that it cannot forge log lines or headers.
pub(crate) fn cut(text: &str, max: usize) -> Box<str> {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    one_line(&text[..end]).into_boxed_str()
}

fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn unix_ms(time: SystemTime) -> u128 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_millis()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn letter() -> DeadLetter {
        DeadLetter {
            reason: Reason::Permanent,
            error: "no such\r\norder".into(),
            consumer: "billing".into(),
            attempts: 3,
            first: SystemTime::UNIX_EPOCH,
            last: SystemTime::UNIX_EPOCH + Duration::from_secs(2),
            origin: Some(Arc::new(Origin { place: "orders".into(), position: "17".into() })),
            reopen: NonZeroU64::new(42),
        }
    }

    #[test]
    fn an_error_text_cannot_forge_a_header_line() {
        assert_eq!(letter().headers().get_str(ERROR), Some("no such  order"));
    }

    #[test]
    fn a_dead_letter_sent_back_bears_its_token_and_nothing_else_of_ours() {
        let mut message = Message { headers: letter().headers(), ..Message::default() }.with_header("x-tenant", "7");
        message.headers.push("HAPAX-Forged", "1");
        take_off(&mut message);
        assert_eq!(message.reopen(), NonZeroU64::new(42));
        assert_eq!(message.headers.iter().map(|(name, _)| name).collect::<Vec<_>>(), ["x-tenant"]);
    }

    #[test]
    fn a_dead_letter_of_a_dead_letter_bears_one_token() {
        let mut headers = Headers::new();
        headers.push("x-tenant", "7");
        DeadLetter { reopen: NonZeroU64::new(41), ..letter() }.mark(&mut headers);
        letter().mark(&mut headers);
        assert_eq!(headers.get_str("x-tenant"), Some("7"));
        assert_eq!(headers.len(), 1 + letter().headers().len());
        assert_eq!(headers.get_str(REOPEN), Some("42"));
    }

    /// Bug 75 of semantics.md section 4: a forged token is no more than a number that the record must bear out.
    #[test]
    fn forged_retry_headers_are_clamped() {
        for forged in ["-1", "18446744073709551616", "0", "abc", ""] {
            let mut message = Message::default().with_header(REOPEN, forged.to_owned());
            take_off(&mut message);
            assert_eq!(message.reopen(), None, "{forged:?}");
        }
    }

    #[test]
    fn a_cut_text_ends_at_a_character() {
        assert_eq!(&*cut("añb", 2), "a");
        assert_eq!(&*cut("a\nb", 10), "a b");
    }

    #[test]
    fn every_reason_reads_back() {
        for reason in Reason::ALL {
            assert_eq!(Reason::from_word(reason.as_str()), reason);
        }
    }
}
