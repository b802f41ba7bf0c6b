//! Every call to the server has a deadline: lapin's own futures may wait for ever on a connection that is half dead.

use std::future::Future;
use std::time::Duration;

use hapax::Result;

use crate::error;

/// The answer of a call to lapin within `patience`.
pub(crate) async fn within<T>(
    patience: Duration,
    operation: &'static str,
    what: &str,
    call: impl Future<Output = lapin::Result<T>>,
) -> Result<T> {
    match tokio::time::timeout(patience, call).await {
        Ok(answer) => answer.map_err(|e| error::of(&e, operation)),
        Err(_) => Err(error::no_answer(operation, what, patience)),
    }
}
