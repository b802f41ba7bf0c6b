//! The edge: where an error of sqlx or PostgreSQL becomes one of hapax, in one function.
//!
//! Only the server's message and code are told and kept: its detail can quote rows. No text holds a URL, since the store
//! never sees one.

use std::sync::Arc;

use hapax::{Error, ErrorKind};

/// SQLSTATE codes, <https://www.postgresql.org/docs/current/errcodes-appendix.html>.
pub(crate) mod code {
    pub(crate) const LOCK_NOT_AVAILABLE: &str = "55P03";
    pub(crate) const SERIALIZATION_FAILURE: &str = "40001";
    pub(crate) const DEADLOCK_DETECTED: &str = "40P01";
    pub(crate) const QUERY_CANCELED: &str = "57014";
    pub(crate) const NO_TRANSACTION: &str = "25P01";
    pub(crate) const IDLE_IN_TRANSACTION: &str = "25P03";
    pub(crate) const UNKNOWN_SAVEPOINT: &str = "3B001";
    pub(crate) const UNDEFINED_TABLE: &str = "42P01";
    pub(crate) const UNDEFINED_COLUMN: &str = "42703";
    pub(crate) const INVALID_SCHEMA: &str = "3F000";
    pub(crate) const INSUFFICIENT_PRIVILEGE: &str = "42501";
    pub(crate) const INVALID_DATABASE: &str = "3D000";
    /// `EXECUTE` of a name that is not known on this server connection.
    pub(crate) const UNKNOWN_STATEMENT: &str = "26000";
    /// `PREPARE` of one that is.
    pub(crate) const KNOWN_STATEMENT: &str = "42P05";
    /// What `finish.sql` runs into where it did not write its mark.
    pub(crate) const DIVISION_BY_ZERO: &str = "22012";
    /// Among others a prepared statement whose answer would have another shape than before.
    pub(crate) const NOT_SUPPORTED: &str = "0A000";
}

/// What went wrong, before it is said during which operation.
#[derive(Clone, Debug)]
pub(crate) struct Fault {
    pub(crate) kind: ErrorKind,
    text: String,
    /// The server's code, if it was the server that answered.
    code: Option<Box<str>>,
    /// What sqlx itself says; never what the server answered.
    source: Option<Arc<sqlx::Error>>,
}

impl Fault {
    pub(crate) fn new(kind: ErrorKind, text: impl Into<String>) -> Self {
        Self { kind, text: text.into(), code: None, source: None }
    }

    pub(crate) fn unavailable(text: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unavailable, text)
    }

    pub(crate) fn incompatible(text: impl Into<String>) -> Self {
        Self::new(ErrorKind::Incompatible, text)
    }

    pub(crate) fn configuration(text: impl Into<String>) -> Self {
        Self::new(ErrorKind::Configuration, text)
    }

    pub(crate) fn rejected(text: impl Into<String>) -> Self {
        Self::new(ErrorKind::Rejected, text)
    }

    /// The same, but an item's own doing.
    pub(crate) fn of_an_item(self) -> Self {
        Self { kind: ErrorKind::Rejected, ..self }
    }

    pub(crate) fn has_code(&self, code: &str) -> bool {
        self.code.as_deref() == Some(code)
    }

    /// Whether it is about a statement's being prepared or not, and not about what it does.
    pub(crate) fn is_of_preparing(&self) -> bool {
        [code::UNKNOWN_STATEMENT, code::KNOWN_STATEMENT, code::NOT_SUPPORTED].iter().any(|code| self.has_code(code))
    }

    /// Whether the connection may be used again: the server refused a statement, and went on.
    pub(crate) fn leaves_connection(&self) -> bool {
        match self.code.as_deref() {
            // Inside a transaction that nobody ends (25), or read-only (25006), where another server may take writes; one
            // that shuts down closes the connection itself.
            Some(code) => !["08", "25", "57P"].iter().any(|class| code.starts_with(class)),
            None => false,
        }
    }

    /// A handler's transaction in which nothing more can be done because of what the handler did to it: its failure.
    /// What is wrong with the tables themselves is told by the next claim, outside of it.
    pub(crate) fn in_transaction(self) -> Self {
        let is_of_handler = match self.code.as_deref() {
            // An aborted transaction, or one turned read-only; but not one that the server ended for its idling.
            Some(code) if code.starts_with("25") => code != code::IDLE_IN_TRANSACTION,
            // A page is damaged.
            Some(code) if code.starts_with("XX") => false,
            Some(_) => matches!(self.kind, ErrorKind::Internal | ErrorKind::Configuration | ErrorKind::Incompatible),
            None => false,
        };
        if !is_of_handler {
            return self;
        }
        let text = format!(
            "the handler left a transaction that cannot be recorded in: {}; return the error of a statement that \
             failed, take a savepoint for what may fail, and set back what was set",
            self.text
        );
        Self { kind: ErrorKind::Rejected, text, ..self }
    }

    /// A commit whose answer was lost may have taken place; one that the server refused has not.
    pub(crate) fn at_commit(self) -> Self {
        let told = self.in_transaction();
        match told.code.as_deref() {
            // Deferred constraints, their triggers and the like: what the handler wrote is refused.
            Some(_) if told.kind == ErrorKind::Rejected => told,
            Some(code::SERIALIZATION_FAILURE | code::DEADLOCK_DETECTED) => told,
            _ => Self { kind: ErrorKind::Unknown, ..told },
        }
    }

    /// A commit that was not refused for what the handler wrote: whoever asks by the event's own claim is told, and a
    /// handler that fails so again and again comes to its last attempt.
    pub(crate) fn at_last_commit(self) -> Self {
        let told = self.at_commit();
        let kind = if told.kind == ErrorKind::Rejected { told.kind } else { ErrorKind::Unknown };
        Self { kind, ..told }
    }

    /// Whether the server answered, and is still inside the transaction, if only to end it.
    pub(crate) fn leaves_transaction(&self) -> bool {
        let code = self.code.as_deref();
        code.is_some_and(|code| code != code::NO_TRANSACTION && !code.starts_with("08") && !code.starts_with("57P"))
    }

    /// Whether it is about the transaction's own state: aborted, read-only, not there.
    pub(crate) fn is_of_transaction(&self) -> bool {
        self.code.as_deref().is_some_and(|code| code.starts_with("25"))
    }

    /// Whether the connection is lost or ended, whoever says so.
    pub(crate) fn is_of_connection(&self) -> bool {
        self.code.as_deref().is_none_or(|code| code.starts_with("08") || code.starts_with("57P"))
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
            sqlx::Error::Database(_) => kind_of(&sqlstate(&error).unwrap_or_default()),
            sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_) | sqlx::Error::ColumnIndexOutOfBounds { .. } => {
                ErrorKind::Incompatible
            }
            sqlx::Error::Io(_)
            | sqlx::Error::Protocol(_)
            | sqlx::Error::PoolTimedOut
            | sqlx::Error::PoolClosed
            | sqlx::Error::WorkerCrashed
            // A connection of the pool that sqlx knows to be inside a transaction, which nobody ended.
            | sqlx::Error::InvalidSavePointStatement
            | sqlx::Error::BeginFailed => ErrorKind::Unavailable,
            sqlx::Error::Configuration(_) | sqlx::Error::Tls(_) => ErrorKind::Configuration,
            _ => ErrorKind::Internal,
        };
        let Some(database) = error.as_database_error() else {
            return Self { kind, text: error.to_string(), code: None, source: Some(Arc::new(error)) };
        };
        let code = sqlstate(&error).unwrap_or_default();
        Self { kind, text: format!("{} ({code})", database.message()), code: Some(code.into()), source: None }
    }
}

/// What a code of the server means for the caller. PgBouncer says that it has no server with `08P01`.
fn kind_of(sqlstate: &str) -> ErrorKind {
    match sqlstate {
        code::LOCK_NOT_AVAILABLE | code::QUERY_CANCELED => ErrorKind::Unavailable,
        code::UNDEFINED_TABLE | code::UNDEFINED_COLUMN | code::INVALID_SCHEMA => ErrorKind::Incompatible,
        code::INSUFFICIENT_PRIVILEGE | code::INVALID_DATABASE => ErrorKind::Configuration,
        _ => match sqlstate.get(..2).unwrap_or_default() {
            // Connection, transaction state, transaction rolled back, resources, operator intervention, system.
            "08" | "25" | "40" | "53" | "57" | "58" => ErrorKind::Unavailable,
            "28" => ErrorKind::Configuration,
            // Cardinality: one key twice in a batch, which halving it separates.
            "21" | "22" | "23" => ErrorKind::Rejected,
            // A page of a table or an index is damaged.
            "XX" => ErrorKind::Incompatible,
            _ => ErrorKind::Internal,
        },
    }
}

fn sqlstate(error: &sqlx::Error) -> Option<String> {
    Some(error.as_database_error()?.code()?.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passes_by_itself_is_asked_again_and_what_an_item_causes_is_rejected() {
        for passing in [
            "40001", "40P01", "55P03", "57014", "57P01", "57P03", "08006", "08P01", "53300", "53100", "25006", "25P02",
            "25001",
        ] {
            assert_eq!(kind_of(passing), ErrorKind::Unavailable, "{passing}");
        }
        for refused in ["21000", "22021", "23505"] {
            assert_eq!(kind_of(refused), ErrorKind::Rejected, "{refused}");
        }
        for (code, kind) in [
            ("42P01", ErrorKind::Incompatible),
            ("XX001", ErrorKind::Incompatible),
            ("42501", ErrorKind::Configuration),
            ("28P01", ErrorKind::Configuration),
            ("42601", ErrorKind::Internal),
        ] {
            assert_eq!(kind_of(code), kind, "{code}");
        }
    }
}
