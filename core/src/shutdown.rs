//! When to stop: the signal that orchestrators and terminals send, as a future.

use std::future::Future;
use std::io;

/// Resolves on SIGTERM or Ctrl-C (SIGINT); on Ctrl-C alone where there is no SIGTERM.
///
/// It listens from the call on, not from the first poll. From then on these signals no longer end the process by
/// themselves, also after the future has resolved or was dropped (tokio keeps its handlers): a second SIGTERM or Ctrl-C
/// while the consumers drain changes nothing, and the drain's deadline bounds the wait. To end at once send SIGQUIT
/// (Ctrl-\\) or SIGKILL: what was in flight is delivered again.
///
/// Where the handlers cannot be installed, the future says so in the log and waits for the other signal, or for ever.
///
/// # Panics
///
/// Outside a tokio runtime.
///
/// ```no_run
/// # async fn run() {
/// hapax::shutdown_signal().await; // or: consumer.run(hapax::shutdown_signal()).await?
/// # }
/// ```
pub fn shutdown_signal() -> impl Future<Output = ()> + Send + 'static {
    let signals = listen();
    async move {
        let name = match signals {
            Ok(signals) => signals.first().await,
            Err(error) => {
                tracing::error!(target: "hapax", %error, "cannot listen for signals: shut down by other means");
                std::future::pending().await
            }
        };
        tracing::info!(target: "hapax", signal = name, "shutting down");
    }
}

#[cfg(unix)]
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

#[cfg(unix)]
fn listen() -> io::Result<Signals> {
    use tokio::signal::unix::{SignalKind, signal};
    Ok(Signals { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
}

#[cfg(unix)]
impl Signals {
    async fn first(mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

#[cfg(windows)]
struct Signals(tokio::signal::windows::CtrlC);

#[cfg(windows)]
fn listen() -> io::Result<Signals> {
    tokio::signal::windows::ctrl_c().map(Signals)
}

#[cfg(windows)]
impl Signals {
    async fn first(mut self) -> &'static str {
        self.0.recv().await;
        "Ctrl-C"
    }
}

#[cfg(all(test, unix))]
mod tests {
    use std::process::Command;
    use std::time::Duration;

    use super::*;

    async fn resolves_on(signal: &str) {
        let mut shutdown = std::pin::pin!(shutdown_signal());
        tokio::select! {
            biased;
            () = &mut shutdown => panic!("no signal was sent yet"),
            () = std::future::ready(()) => {}
        }
        let sent = Command::new("kill").args([signal, &std::process::id().to_string()]).status();
        assert!(sent.expect("kill is everywhere").success());
        tokio::time::timeout(Duration::from_secs(10), shutdown).await.expect("the signal resolves it");
    }

    /// One test for both, since signals go to the whole process.
    #[tokio::test]
    async fn sigterm_and_ctrl_c_resolve_it_and_do_not_end_the_process() {
        resolves_on("-TERM").await;
        resolves_on("-INT").await;
    }
}
