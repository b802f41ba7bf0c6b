//! A TCP proxy between a client under test and a server, which cuts, freezes and loses what passes through it.
//!
//! One [`Proxy`] stands for one link. The client connects to [`Proxy::address`]; the proxy forwards bytes, knows nothing of
//! protocols, and holds at most one buffer of 16 KiB for each direction of a connection. What it does to the link lasts until
//! [`Proxy::heal`]. Dropping the proxy ends it with all its connections.

mod link;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// Most connections of one proxy at a time; further ones are reset.
pub const CONNECTIONS_MAX: usize = 1024;

/// When the connection of a request is cut: see [`Proxy::cut_after_request`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// The server has answered the next request: it is applied, and the answer is lost.
    Reply,
    /// So many bytes of requests have passed: most often in the middle of a frame.
    Bytes(usize),
}

/// A link between clients and one server that can be broken in several ways.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

struct Shared {
    upstream: String,
    mode: watch::Sender<Mode>,
    accepted: AtomicU64,
    resets: watch::Sender<u64>,
}

/// What the link does at the moment.
#[derive(Clone, Copy, Debug, Default)]
struct Mode {
    refuse: bool,
    frozen: bool,
    /// Replies are lost, and a connection that lost one is cut after this time.
    swallow: Option<Duration>,
    armed: Option<After>,
    /// How many times everything was cut; a connection that was born under a lower number is to end.
    cuts: u64,
}

impl Proxy {
    /// Starts a proxy on a free loopback port. `upstream` is `host:port`; it is resolved for each connection, so the server
    /// may come later and may restart.
    ///
    /// # Errors
    /// No port can be bound.
    pub async fn start(upstream: impl Into<String>) -> io::Result<Self> {
        Self::start_at("127.0.0.1:0", upstream).await
    }

    /// As [`start`](Self::start), on an address of the caller's choice, for servers that tell clients where to connect.
    ///
    /// # Errors
    /// The address cannot be bound.
    pub async fn start_at(listen: &str, upstream: impl Into<String>) -> io::Result<Self> {
        let listener = TcpListener::bind(listen).await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            upstream: upstream.into(),
            mode: watch::Sender::new(Mode::default()),
            accepted: AtomicU64::new(0),
            resets: watch::Sender::new(0),
        });
        let accepting = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Ok(Self { address, shared, accepting })
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Resets every connection, and each new one as soon as it is accepted, until [`heal`](Self::heal).
    pub fn cut(&self) {
        self.shared.mode.send_modify(|mode| {
            mode.refuse = true;
            mode.cuts += 1;
        });
    }

    /// Resets every connection once; new ones work.
    pub fn drop_connections(&self) {
        self.shared.mode.send_modify(|mode| mode.cuts += 1);
    }

    /// Half-cut: connections stay open, new ones are accepted, and no byte flows either way until [`heal`](Self::heal); then
    /// what was held flows on.
    pub fn freeze(&self) {
        self.shared.mode.send_modify(|mode| mode.frozen = true);
    }

    /// Requests pass, replies are lost. A connection that lost one is reset after `cut_after`, or earlier by
    /// [`cut`](Self::cut), [`drop_connections`](Self::drop_connections) or [`heal`](Self::heal).
    pub fn swallow_replies(&self, cut_after: Duration) {
        self.shared.mode.send_modify(|mode| mode.swallow = Some(cut_after));
    }

    /// Cuts one connection, once: the one that carries the next request, or the last of so many bytes. The caller learns that
    /// it has happened from [`resets_reach`](Self::resets_reach).
    pub fn cut_after_request(&self, after: After) {
        self.shared.mode.send_modify(|mode| mode.armed = Some(after));
    }

    /// Ends whatever was done to the link. Connections that lost a reply are reset.
    pub fn heal(&self) {
        self.shared.mode.send_modify(|mode| *mode = Mode { cuts: mode.cuts, ..Mode::default() });
    }

    /// Connections accepted so far.
    pub fn accepted(&self) -> u64 {
        self.shared.accepted.load(Ordering::Relaxed)
    }

    /// Connections reset by the proxy so far.
    pub fn resets(&self) -> u64 {
        *self.shared.resets.borrow()
    }

    /// Waits until the proxy has reset so many connections in all. The caller sets the deadline.
    pub async fn resets_reach(&self, count: u64) {
        let mut resets = self.shared.resets.subscribe();
        // The sender lives as long as `self`.
        let _ = resets.wait_for(|resets| *resets >= count).await;
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxy").field("address", &self.address).field("mode", &*self.shared.mode.borrow()).finish()
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    // The connections end with this set, and so with this task.
    let mut links = JoinSet::new();
    loop {
        let Ok((client, _)) = listener.accept().await else {
            // Out of descriptors: the connections that end free some.
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        while links.try_join_next().is_some() {}
        shared.accepted.fetch_add(1, Ordering::Relaxed);
        if shared.mode.borrow().refuse || links.len() >= CONNECTIONS_MAX {
            link::reset(client);
            shared.resets.send_modify(|resets| *resets += 1);
            continue;
        }
        links.spawn(link::run(client, Arc::clone(&shared)));
    }
}

#[cfg(test)]
mod tests;
