//! lapin's errors as ours, in one place. Texts are redacted: a client's error may quote what it was given.

use std::borrow::Cow;

use hapax::{Error, ErrorKind};
use lapin::protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError};

/// What lapin's error means for a call to the broker.
pub(crate) fn of(error: &lapin::Error, operation: &'static str) -> Error {
    Error::new(kind(error), operation).because(text(error))
}

/// What it says, without credentials.
pub(crate) fn text(error: &lapin::Error) -> String {
    match hapax::redact(&error.to_string()) {
        Cow::Borrowed(text) => text.to_owned(),
        Cow::Owned(text) => text,
    }
}

fn kind(error: &lapin::Error) -> ErrorKind {
    let lapin::ErrorKind::ProtocolError(answer) = error.kind() else {
        return match error.kind() {
            lapin::ErrorKind::InvalidProtocolVersion(_) => ErrorKind::Incompatible,
            lapin::ErrorKind::SerialisationError(_) => ErrorKind::Rejected,
            lapin::ErrorKind::AuthProviderError(_) | lapin::ErrorKind::NoDefaultRuntime => ErrorKind::Configuration,
            _ => ErrorKind::Unavailable,
        };
    };
    match answer.kind() {
        AMQPErrorKind::Soft(soft) => match soft {
            AMQPSoftError::CONTENTTOOLARGE => ErrorKind::Rejected,
            AMQPSoftError::NOCONSUMERS | AMQPSoftError::NOROUTE => ErrorKind::Unavailable,
            AMQPSoftError::ACCESSREFUSED
            | AMQPSoftError::NOTFOUND
            | AMQPSoftError::RESOURCELOCKED
            | AMQPSoftError::PRECONDITIONFAILED => ErrorKind::Configuration,
        },
        AMQPErrorKind::Hard(hard) => match hard {
            // The node is shutting down, or an operator closed the connection.
            AMQPHardError::CONNECTIONFORCED | AMQPHardError::INTERNALERROR | AMQPHardError::RESOURCEERROR => {
                ErrorKind::Unavailable
            }
            AMQPHardError::INVALIDPATH | AMQPHardError::NOTALLOWED | AMQPHardError::NOTIMPLEMENTED => {
                ErrorKind::Configuration
            }
            _ => ErrorKind::Internal,
        },
    }
}

/// The channel error in it, if it is one: the connection lives on.
pub(crate) fn soft(error: &lapin::Error) -> Option<AMQPSoftError> {
    match error.kind() {
        lapin::ErrorKind::ProtocolError(answer) => match answer.kind() {
            AMQPErrorKind::Soft(soft) => Some(soft.clone()),
            AMQPErrorKind::Hard(_) => None,
        },
        _ => None,
    }
}

/// No answer within a deadline.
pub(crate) fn no_answer(operation: &'static str, what: &str, patience: std::time::Duration) -> Error {
    Error::new(ErrorKind::Unknown, operation).because(format!("no answer to {what} within {patience:?}"))
}
