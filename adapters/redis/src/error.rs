//! The client's errors become ours here, and nowhere else.

use hapax::{Error, ErrorKind, redact};
use redis::{RedisError, ServerErrorKind};

/// What a call ended with, under the contract's verb `operation`. Never tells a credential.
pub(crate) fn error(operation: &'static str, error: &RedisError) -> Error {
    let text = redact(&error.to_string()).into_owned();
    match kind(error) {
        ErrorKind::Configuration if is_refused_right(&text) => Error::new(ErrorKind::Configuration, operation)
            .because(format!("{text}; docs/redis.md lists the rights that hapax needs")),
        kind => Error::new(kind, operation).because(text),
    }
}

/// What Redis 7 says where a script's command needs a right that its user has not.
const NO_RIGHT: &str = "user executing the script can't";

fn is_refused_right(text: &str) -> bool {
    text.contains("NOPERM") || text.contains("permission") || text.contains(NO_RIGHT)
}

fn kind(error: &RedisError) -> ErrorKind {
    use redis::ErrorKind as Client;
    if error.is_timeout() {
        return ErrorKind::Unknown;
    }
    match error.kind() {
        Client::Server(kind) => of_server(kind, error),
        Client::Extension => of_code(error.code().unwrap_or_default()).unwrap_or(ErrorKind::Unavailable),
        Client::AuthenticationFailed | Client::InvalidClientConfig | Client::EmptySentinelList => {
            ErrorKind::Configuration
        }
        Client::UnexpectedReturnType | Client::Parse => ErrorKind::Incompatible,
        // The connection, the cluster's map, or sentinels that know no primary yet: it may come back.
        _ => ErrorKind::Unavailable,
    }
}

fn of_server(kind: ServerErrorKind, error: &RedisError) -> ErrorKind {
    match kind {
        ServerErrorKind::NoPerm => ErrorKind::Configuration,
        ServerErrorKind::CrossSlot => ErrorKind::Internal,
        ServerErrorKind::ResponseError => of_text(error.detail().unwrap_or_default()),
        // Loading, a failover, a replica where a primary was, a script that blocks: it may come back.
        _ => ErrorKind::Unavailable,
    }
}

/// `ERR ..`. Before Redis 7 what a script's command failed with stands inside the text, behind a dash.
fn of_text(text: &str) -> ErrorKind {
    let inside = text.split_whitespace().filter_map(|word| word.strip_prefix('-')).find_map(of_code);
    if let Some(kind) = inside {
        return kind;
    }
    let settings =
        ["unknown command", "unknown subcommand", "DB index is out of range", "SELECT is not allowed", NO_RIGHT];
    if settings.iter().any(|part| text.contains(part)) {
        return ErrorKind::Configuration;
    }
    if text.contains("user_script") || text.contains("f_") {
        return ErrorKind::Internal;
    }
    ErrorKind::Unavailable
}

fn of_code(code: &str) -> Option<ErrorKind> {
    match code {
        "OOM" => Some(ErrorKind::Full),
        "NOAUTH" | "WRONGPASS" | "NOPERM" => Some(ErrorKind::Configuration),
        "WRONGTYPE" | "HAPAX" => Some(ErrorKind::Incompatible),
        "READONLY" | "MISCONF" | "MASTERDOWN" | "NOREPLICAS" => Some(ErrorKind::Unavailable),
        _ => None,
    }
}

/// Whether the connection that gave this error is of no use any more: broken, silent, or to a server that is no primary.
pub(crate) fn ends_connection(error: &RedisError) -> bool {
    use redis::ErrorKind as Client;
    error.is_timeout()
        || error.is_io_error()
        || error.is_connection_dropped()
        || error.is_unrecoverable_error()
        || error.to_string().contains("READONLY")
        || matches!(error.kind(), Client::Server(ServerErrorKind::ReadOnly | ServerErrorKind::MasterDown))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(code: &str, detail: &str) -> RedisError {
        redis::make_extension_error(code.to_owned(), Some(detail.to_owned()))
    }

    #[test]
    fn codes_are_told_apart() {
        for (code, kind) in [
            ("OOM", ErrorKind::Full),
            ("WRONGTYPE", ErrorKind::Incompatible),
            ("HAPAX", ErrorKind::Incompatible),
            ("NOAUTH", ErrorKind::Configuration),
            ("MISCONF", ErrorKind::Unavailable),
            ("SURPRISE", ErrorKind::Unavailable),
        ] {
            assert_eq!(error("claim", &server(code, "text")).kind(), kind, "{code}");
        }
    }

    #[test]
    fn what_a_script_failed_with_before_redis_7_is_found_inside_the_text() {
        let text = "Error running script (call to f_ab): @user_script:9: @user_script: 9: -OOM command not allowed";
        assert_eq!(of_text(text), ErrorKind::Full);
        assert_eq!(of_text("Error running script (call to f_ab): attempt to index a nil value"), ErrorKind::Internal);
        assert_eq!(
            of_text("The user executing the script can't run this command script: ab, on @user_script:28."),
            ErrorKind::Configuration
        );
        assert_eq!(of_text("max number of clients reached"), ErrorKind::Unavailable);
    }
}
