//! The edge: where an error of sqlx or SQLite becomes one of hapax, in one function.
//!
//! A [`Fault`] is that error before it is known for which callers it is: a commit shared by several calls fails for
//! all of them.

use std::sync::Arc;

use hapax::{Error, ErrorKind};

/// SQLite's primary result codes, <https://www.sqlite.org/rescode.html>.
mod code {
    pub(super) const ERROR: i32 = 1;
    pub(super) const PERM: i32 = 3;
    pub(super) const BUSY: i32 = 5;
    pub(super) const LOCKED: i32 = 6;
    pub(super) const READONLY: i32 = 8;
    pub(super) const CORRUPT: i32 = 11;
    pub(super) const FULL: i32 = 13;
    pub(super) const CANTOPEN: i32 = 14;
    pub(super) const TOOBIG: i32 = 18;
    pub(super) const CONSTRAINT: i32 = 19;
    pub(super) const MISMATCH: i32 = 20;
    pub(super) const RANGE: i32 = 25;
    pub(super) const NOTADB: i32 = 26;
}

/// What went wrong, before it is said during which operation.
#[derive(Clone, Debug)]
pub(crate) struct Fault {
    pub(crate) kind: ErrorKind,
    text: String,
    source: Option<Arc<sqlx::Error>>,
}

impl Fault {
    pub(crate) fn new(kind: ErrorKind, text: impl Into<String>) -> Self {
        Self { kind, text: text.into(), source: None }
    }

    pub(crate) fn incompatible(text: impl Into<String>) -> Self {
        Self::new(ErrorKind::Incompatible, text)
    }

    pub(crate) fn configuration(text: impl Into<String>) -> Self {
        Self::new(ErrorKind::Configuration, text)
    }

    /// As seen while a store is opened: what cannot be opened or written now is a matter of settings, not of time.
    pub(crate) fn at_open(self, path: &std::path::Path) -> Self {
        let path = path.display();
        match self.source.as_deref().and_then(primary_code) {
            Some(code::READONLY | code::CANTOPEN | code::PERM) => Self {
                kind: ErrorKind::Configuration,
                text: format!(
                    "{path} cannot be opened for writing ({}): let this process write the file and its folder, \
                     where SQLite keeps the -wal and -shm files",
                    self.text
                ),
                ..self
            },
            _ => Self { text: format!("{path}: {}", self.text), ..self },
        }
    }

    pub(crate) fn is_busy(&self) -> bool {
        matches!(self.source.as_deref().and_then(primary_code), Some(code::BUSY | code::LOCKED))
    }

    /// A commit whose answer was lost or whose write failed may have taken place; one that found no room or no lock has
    /// not.
    pub(crate) fn at_commit(self) -> Self {
        match self.source.as_deref().and_then(primary_code) {
            Some(code::FULL | code::BUSY | code::LOCKED) => self,
            _ if self.kind == ErrorKind::Unavailable => Self { kind: ErrorKind::Unknown, ..self },
            _ => self,
        }
    }

    pub(crate) fn during(self, operation: &'static str) -> Error {
        let error = Error::new(self.kind, operation).because(self.text);
        match self.source {
            Some(source) => error.with_source(source),
            None => error,
        }
    }
}

impl From<sqlx::Error> for Fault {
    fn from(error: sqlx::Error) -> Self {
        let kind = match &error {
            sqlx::Error::Database(database) => match primary_code(&error) {
                Some(code::CORRUPT | code::NOTADB) => ErrorKind::Incompatible,
                Some(code::CONSTRAINT | code::MISMATCH | code::TOOBIG | code::RANGE) => ErrorKind::Rejected,
                // A table or column of ours is gone.
                Some(code::ERROR) if database.message().starts_with("no such") => ErrorKind::Incompatible,
                Some(code::ERROR) => ErrorKind::Internal,
                // Locked, full, read-only for now, input or output failed, interrupted, out of memory.
                _ => ErrorKind::Unavailable,
            },
            sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_) => ErrorKind::Incompatible,
            sqlx::Error::Io(_)
            | sqlx::Error::PoolTimedOut
            | sqlx::Error::PoolClosed
            | sqlx::Error::WorkerCrashed
            | sqlx::Error::BeginFailed => ErrorKind::Unavailable,
            sqlx::Error::Configuration(_) => ErrorKind::Configuration,
            _ => ErrorKind::Internal,
        };
        Self { kind, text: error.to_string(), source: Some(Arc::new(error)) }
    }
}

/// The one place where a client's error becomes ours.
pub(crate) fn error(operation: &'static str, error: sqlx::Error) -> Error {
    Fault::from(error).during(operation)
}

fn primary_code(error: &sqlx::Error) -> Option<i32> {
    let code = error.as_database_error()?.code()?;
    code.parse::<i32>().ok().map(|extended| extended & 0xff)
}
