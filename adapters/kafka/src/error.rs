//! The edge: where an error of rdkafka becomes one of hapax, in one function.
//!
//! librdkafka's texts can quote values of properties, so a configuration error names the property and nothing else, and
//! all others go through the redaction.

use hapax::{Error, ErrorKind, redact};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};

/// The one place where a client's error becomes ours.
pub(crate) fn error(operation: &'static str, error: KafkaError) -> Error {
    match error {
        KafkaError::ClientConfig(_, _, key, _) => Error::new(ErrorKind::Configuration, operation).because(format!(
            "librdkafka does not take property `{key}`: its name, or its value, is not in CONFIGURATION.md of librdkafka"
        )),
        KafkaError::ClientCreation(why) | KafkaError::Subscription(why) | KafkaError::AdminOpCreation(why) => {
            Error::new(ErrorKind::Configuration, operation).because(redact(&why).into_owned())
        }
        error => {
            let code = match &error {
                KafkaError::AdminOp(code) => Some(*code),
                other => other.rdkafka_error_code(),
            };
            let kind = code.map_or(ErrorKind::Internal, kind);
            Error::new(kind, operation).because(redact(&error.to_string()).into_owned()).with_source(error)
        }
    }
}

/// What a code of librdkafka or the broker means for who asked.
pub(crate) fn kind(code: RDKafkaErrorCode) -> ErrorKind {
    use RDKafkaErrorCode as Code;
    match code {
        Code::MessageSizeTooLarge
        | Code::InvalidRecord
        | Code::MessageBatchTooLarge
        | Code::InvalidMessage
        | Code::PolicyViolation => ErrorKind::Rejected,
        // It may have been written: the answer is what is missing.
        Code::MessageTimedOut | Code::OperationTimedOut | Code::RequestTimedOut | Code::PurgeInflight => {
            ErrorKind::Unknown
        }
        Code::QueueFull => ErrorKind::Full,
        _ => ErrorKind::Unavailable,
    }
}

/// Whether a refused commit says that this member is no longer in the group. An old generation alone does not: the same
/// commit is made again under the new one.
pub(crate) fn is_fenced(code: RDKafkaErrorCode) -> bool {
    use RDKafkaErrorCode as Code;
    matches!(code, Code::UnknownMemberId | Code::FencedInstanceId | Code::FencedMemberEpoch | Code::AssignmentLost)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_property_is_named_and_its_value_is_not() {
        let mut config = rdkafka::ClientConfig::new();
        config.set("sasl.mechanisms", "canary-hunter2");
        config.set("no.such.property", "canary-hunter2");
        let refused = config.create_native_config().err().expect("two bad properties");
        let error = error("open", refused);
        assert_eq!(error.kind(), ErrorKind::Configuration);
        assert!(error.to_string().contains("property `"), "{error}");
        assert!(!format!("{error:?} {error}").contains("canary"), "{error:?}");
    }
}
