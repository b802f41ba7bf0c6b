//! Faults at start: each with a code, what is wrong, why it matters and the remedy as code, all told together.
//!
//! docs/errors.md has a section for each code; a test holds the two together.

use std::borrow::Cow;
use std::fmt;

use crate::error::Error;

/// One thing that keeps a consumer from being built.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Fault {
    /// Stable and searchable: the heading in docs/errors.md.
    pub code: &'static str,
    /// What is wrong, with the values that disagree.
    pub what: Cow<'static, str>,
    /// What would happen if it were let through.
    pub why: Cow<'static, str>,
    /// What to write instead, as code; several are separated by "or".
    pub remedy: Cow<'static, str>,
}

impl Fault {
    pub(crate) fn new(
        code: &'static str,
        what: impl Into<Cow<'static, str>>,
        why: impl Into<Cow<'static, str>>,
        remedy: impl Into<Cow<'static, str>>,
    ) -> Self {
        debug_assert!(CODES.contains(&code), "`{code}` is missing in fault::CODES");
        Self { code, what: what.into(), why: why.into(), remedy: remedy.into() }
    }

    /// Broker or store did not answer as they should when they were probed.
    pub(crate) fn probed(who: Probed, error: &Error) -> Self {
        let mut text = error.to_string();
        let mut source = std::error::Error::source(error);
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        let (unreachable, refused) = match who {
            Probed::Broker => (BROKER_UNREACHABLE, "broker-refused"),
            Probed::Store => (STORE_UNREACHABLE, "store-refused"),
        };
        if error.is_retryable() {
            Self::new(
                unreachable,
                format!("the {who} did not answer: {text}"),
                "nothing can be received or recorded without it, and what it can promise is not known",
                "start it, or correct its address; BuildError::is_retryable() tells that trying again may help",
            )
        } else {
            Self::new(
                refused,
                format!("the {who} refused: {text}"),
                "it answers, but not with what a consumer needs",
                "do as the text says; trying again without a change does not help",
            )
        }
    }
}

const BROKER_UNREACHABLE: &str = "broker-unreachable";
const STORE_UNREACHABLE: &str = "store-unreachable";

/// Who is probed at start.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Probed {
    Broker,
    Store,
}

impl fmt::Display for Probed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Broker => "broker",
            Self::Store => "store",
        })
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}] {}\n    why: {}\n    remedy: {}", self.code, self.what, self.why, self.remedy)
    }
}

/// Everything that keeps a consumer from being built, or settings from being read.
///
/// `Debug` reads as `Display` does, so that `fn main() -> Result<(), BuildError>` and `unwrap` print it for people.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct BuildError {
    /// At least one, in the order in which they were found.
    pub faults: Vec<Fault>,
}

impl BuildError {
    /// Nothing, where there is no fault.
    pub(crate) fn check(faults: Vec<Fault>) -> Result<(), Self> {
        if faults.is_empty() { Ok(()) } else { Err(Self { faults }) }
    }

    /// Whether a fault has this code.
    pub fn has(&self, code: &str) -> bool {
        self.faults.iter().any(|fault| fault.code == code)
    }

    /// Whether building again later can succeed without anybody changing anything: every fault is that broker or store
    /// did not answer.
    pub fn is_retryable(&self) -> bool {
        self.faults.iter().all(|fault| [BROKER_UNREACHABLE, STORE_UNREACHABLE].contains(&fault.code))
    }
}

impl fmt::Display for BuildError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.faults.len() {
            1 => f.write_str("1 fault, see docs/errors.md:")?,
            faults => write!(f, "{faults} faults, see docs/errors.md:")?,
        }
        for fault in &self.faults {
            write!(f, "\n  {fault}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for BuildError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for BuildError {}

/// Every code, sorted: docs/errors.md has a section for each.
pub(crate) const CODES: &[&str] = &[
    "broker-deliveries-max",
    "broker-refused",
    "broker-unreachable",
    "call-timeout-beyond-lease",
    "concurrency-beyond-broker",
    "concurrency-beyond-in-flight",
    "event-type-invalid",
    "handler-missing",
    "handler-twice",
    "held-beyond-broker",
    "id-from-invalid",
    "id-from-unreachable",
    "key-forgotten",
    "level-below-required",
    "name-invalid",
    "order-not-kept",
    "otherwise-and-any",
    "otherwise-missing",
    "pool-too-small",
    "position-not-stable",
    "publish-in-transaction",
    "retention-lt-horizon",
    "retry-beyond-broker",
    "retry-invalid",
    "retry-overtaken",
    "retry-twice",
    "setting-invalid",
    "setting-out-of-bounds",
    "setting-unknown",
    "state-after-handler",
    "store-evicts",
    "store-refused",
    "store-unreachable",
    "tx-timeout-beyond-lease",
    "upcast-backwards",
    "upcast-leads-nowhere",
    "upcast-of-another-type",
    "upcast-twice",
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    const DOCS: &str = include_str!("../../docs/errors.md");

    fn sections() -> Vec<(&'static str, &'static str)> {
        let mut sections: Vec<_> = DOCS.split("\n## ").skip(1).filter_map(|text| text.split_once('\n')).collect();
        sections.retain(|(heading, _)| heading.starts_with('`'));
        sections.into_iter().map(|(heading, text)| (heading.trim_matches('`'), text)).collect()
    }

    #[test]
    fn every_code_has_a_section_in_the_docs_and_every_section_a_code() {
        let documented: Vec<_> = sections().into_iter().map(|(code, _)| code).collect();
        assert_eq!(documented, CODES, "docs/errors.md, in the order of fault::CODES");
        assert!(CODES.is_sorted());
    }

    #[test]
    fn every_section_says_what_why_and_the_remedy() {
        for (code, text) in sections() {
            for part in ["**What**", "**Why**", "**Remedy**"] {
                assert!(text.contains(part), "{code} lacks {part}");
            }
        }
    }

    #[test]
    fn every_code_is_raised_somewhere() {
        let sources = [
            include_str!("fault.rs").split("pub(crate) const CODES").next().unwrap_or_default(),
            include_str!("settings.rs"),
            include_str!("settings/env.rs"),
            include_str!("guarantee/windows.rs"),
            include_str!("consumer/builder.rs"),
            include_str!("consumer/builder/checks.rs"),
        ]
        .concat();
        for code in CODES {
            assert!(sources.contains(&format!("\"{code}\"")), "no check raises `{code}`");
        }
    }

    #[test]
    fn display_and_debug_list_every_fault_with_its_remedy() {
        let one = Fault::new("handler-missing", "no handler", "nothing would happen", ".on(handler)");
        let two = Fault::new("name-invalid", "the name is empty", "records need one", "a name");
        let error = BuildError { faults: vec![one, two] };
        let text = error.to_string();
        assert!(text.starts_with("2 faults"), "{text}");
        for part in ["[handler-missing] no handler", "remedy: .on(handler)", "[name-invalid]"] {
            assert!(text.contains(part), "{text}");
        }
        assert_eq!(format!("{error:?}"), text);
    }

    #[test]
    fn only_an_outage_is_retryable() {
        let outage = Fault::probed(Probed::Store, &Error::new(ErrorKind::Unavailable, "probe").because("down"));
        let refusal = Fault::probed(Probed::Broker, &Error::new(ErrorKind::Configuration, "open").because("no topic"));
        assert!(BuildError { faults: vec![outage.clone()] }.is_retryable());
        assert!(!BuildError { faults: vec![outage, refusal] }.is_retryable());
    }
}
