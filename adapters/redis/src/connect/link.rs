//! A connection that is made anew after it broke. Calls share it; what a call failed with is told to its caller, and
//! nothing is sent a second time behind its back but to the other node that a cluster names.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use backon::BackoffBuilder;
use hapax::{Error, ErrorKind, Result};
use redis::aio::{ConnectionLike, MultiplexedConnection};
use redis::cluster_async::ClusterConnection;
use redis::cluster_routing::{Route, RoutingInfo, SingleNodeRoutingInfo, SlotAddr};
use redis::{AsyncConnectionConfig, Cmd, Pipeline, RedisError, RedisResult, Value};
use tokio::time::{Instant, sleep_until, timeout};

use super::RedisServer;
use super::address::{Address, Sentinels};
use crate::error::{ends_connection, error};
use crate::script::Script;

/// Longest pause between two tries to connect.
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// Times that a cluster's connection follows to another node before a call fails.
const REDIRECTIONS_MAX: u32 = 4;

/// Calls to one server, cheap to clone. Dropping the last clone closes the connection.
#[derive(Clone)]
pub(crate) struct Link(Arc<Inner>);

struct Inner {
    server: RedisServer,
    response_timeout: Duration,
    current: Mutex<Current>,
    /// Held by the one that connects.
    connecting: tokio::sync::Mutex<Pauses>,
}

/// Silence towards callers after which a connection is given up, where they have stopped waiting before
/// `response_timeout`: each of them may have a shorter deadline of its own.
const SILENCE_MAX: Duration = Duration::from_secs(1);

/// What calls are sent over, and the how-manyeth it is.
#[derive(Default)]
struct Current {
    connection: Option<Connection>,
    generation: u64,
    silence: Silence,
    /// Tries to connect that have failed so far, and the last reason.
    failures: u64,
    failure: Option<(ErrorKind, String)>,
}

/// How long calls have waited in vain since the last answer on a connection; time that several waited counts once.
#[derive(Default)]
struct Silence {
    waited: Duration,
    until: Option<Instant>,
}

impl Silence {
    /// A call that began then was dropped unanswered.
    fn add(&mut self, begun: Instant) {
        let now = Instant::now();
        let from = self.until.map_or(begun, |until| until.max(begun));
        self.waited += now.saturating_duration_since(from);
        self.until = Some(now);
    }
}

/// A call under way. Dropped before its answer it may have been one of many on a connection that is dead without a word, which
/// no deadline of ours would notice.
struct Waiting<'a> {
    link: &'a Link,
    generation: u64,
    begun: Instant,
    answered: bool,
}

impl Waiting<'_> {
    fn answered(mut self) {
        self.answered = true;
        let mut current = self.link.current();
        if current.generation == self.generation {
            current.silence = Silence::default();
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.answered {
            return;
        }
        let mut current = self.link.current();
        if current.generation != self.generation {
            return;
        }
        current.silence.add(self.begun);
        if current.silence.waited >= SILENCE_MAX {
            current.connection = None;
        }
    }
}

struct Pauses {
    next: backon::ExponentialBackoff,
    not_before: Instant,
}

impl Pauses {
    fn new() -> Self {
        let next = backon::ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(50))
            .with_max_delay(PAUSE_MAX)
            .with_jitter()
            .without_max_times();
        Self { next: next.build(), not_before: Instant::now() }
    }
}

#[derive(Clone)]
enum Connection {
    Node(MultiplexedConnection),
    Cluster(ClusterConnection),
}

impl Connection {
    async fn send(&mut self, command: &Cmd) -> RedisResult<Value> {
        let answer = match self {
            Self::Node(connection) => connection.req_packed_command(command).await,
            Self::Cluster(connection) => connection.req_packed_command(command).await,
        };
        // What the server refuses is a value for the client at this depth.
        answer?.extract_error()
    }
}

impl Link {
    pub(super) fn new(server: RedisServer, response_timeout: Duration) -> Self {
        Self(Arc::new(Inner {
            server,
            response_timeout,
            current: Mutex::default(),
            connecting: tokio::sync::Mutex::new(Pauses::new()),
        }))
    }

    /// One command.
    pub(crate) async fn query(&self, operation: &'static str, command: &Cmd) -> Result<Value> {
        self.call(operation, async |connection| connection.send(command).await).await?.map_err(|e| error(operation, &e))
    }

    /// One command to the primary that holds `key`, for commands that bear no key of their own.
    pub(crate) async fn query_at(&self, operation: &'static str, key: &[u8], command: &Cmd) -> Result<Value> {
        let route = async |connection: &mut Connection| match connection {
            Connection::Node(_) => connection.send(command).await,
            Connection::Cluster(connection) => {
                let node = SingleNodeRoutingInfo::SpecificNode(Route::with_key(key, SlotAddr::Master));
                connection.route_command(command.clone(), RoutingInfo::SingleNode(node)).await?.extract_error()
            }
        };
        self.call(operation, route).await?.map_err(|e| error(operation, &e))
    }

    /// Several commands in one go, one answer each; keys of one slot where it is a cluster. A command that fails is an
    /// answer; an error is that of the connection.
    #[allow(dead_code, reason = "the broker's")]
    pub(crate) async fn pipeline(&self, operation: &'static str, pipeline: &Pipeline) -> Result<Vec<Value>> {
        let count = pipeline.len();
        let send = async |connection: &mut Connection| match connection {
            Connection::Node(connection) => connection.req_packed_commands(pipeline, 0, count).await,
            Connection::Cluster(connection) => connection.req_packed_commands(pipeline, 0, count).await,
        };
        self.call(operation, send).await?.map_err(|e| error(operation, &e))
    }

    /// A script, by its digest, and with its text where the server does not know it: after a restart, a failover to a
    /// replica, or on another node of a cluster.
    pub(crate) async fn run(
        &self,
        operation: &'static str,
        script: &Script,
        keys: &[impl AsRef<[u8]> + Sync],
        arguments: &[impl AsRef<[u8]> + Sync],
    ) -> Result<Value> {
        self.run_command(operation, script, &script.by_digest(keys, arguments)).await
    }

    /// [`run`](Self::run) with a call by digest that the caller has put together.
    pub(crate) async fn run_command(&self, operation: &'static str, script: &Script, command: &Cmd) -> Result<Value> {
        let answer = self.call(operation, async |connection| connection.send(command).await).await?;
        let unknown = redis::ErrorKind::Server(redis::ServerErrorKind::NoScript);
        match answer {
            Err(failed) if failed.kind() == unknown => self.query(operation, &script.by_text(command)).await,
            answer => answer.map_err(|e| error(operation, &e)),
        }
    }

    /// Gives the connection up: what is under way on it fails or goes unanswered, and the next call connects anew.
    #[allow(dead_code, reason = "the broker's")]
    pub(crate) fn reset(&self) {
        self.current().connection = None;
    }

    /// Grows with every connection that is made: whoever sees another number talks to a server that may have restarted.
    #[allow(dead_code, reason = "the broker's")]
    pub(crate) fn generation(&self) -> u64 {
        self.current().generation
    }

    /// The outer error is that there was no connection, or no answer in time; the inner one is the server's.
    async fn call<T>(
        &self,
        operation: &'static str,
        send: impl AsyncFnOnce(&mut Connection) -> RedisResult<T>,
    ) -> Result<RedisResult<T>> {
        let (generation, mut connection) = self.connection(operation).await?;
        let waiting = Waiting { link: self, generation, begun: Instant::now(), answered: false };
        let answer = match timeout(self.0.response_timeout, send(&mut connection)).await {
            Ok(answer) => {
                waiting.answered();
                answer
            }
            Err(_) => {
                self.give_up(generation);
                let why = format!("no answer within {:?}", self.0.response_timeout);
                return Err(Error::new(ErrorKind::Unknown, operation).because(why));
            }
        };
        if answer.as_ref().is_err_and(ends_connection) {
            self.give_up(generation);
        }
        Ok(answer)
    }

    fn current(&self) -> std::sync::MutexGuard<'_, Current> {
        self.0.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn give_up(&self, generation: u64) {
        let mut current = self.current();
        if current.generation == generation {
            current.connection = None;
        }
    }

    /// The connection there is, or a new one. Those who waited for a try that failed share its failure.
    async fn connection(&self, operation: &'static str) -> Result<(u64, Connection)> {
        let failures = match self.there(operation, None) {
            Some(there) => return there,
            None => self.current().failures,
        };
        let mut pauses = self.0.connecting.lock().await;
        if let Some(there) = self.there(operation, Some(failures)) {
            return there;
        }
        sleep_until(pauses.not_before).await;
        match self.0.server.connect(self.0.response_timeout).await {
            Ok(connection) => {
                *pauses = Pauses::new();
                let mut current = self.current();
                current.generation += 1;
                current.silence = Silence::default();
                current.connection = Some(connection.clone());
                Ok((current.generation, connection))
            }
            Err(failed) => {
                pauses.not_before = Instant::now() + pauses.next.next().unwrap_or(PAUSE_MAX);
                let mut current = self.current();
                current.failures += 1;
                current.failure = Some(failed.clone());
                drop(current);
                Err(Error::new(failed.0, operation).because(failed.1))
            }
        }
    }

    fn there(&self, operation: &'static str, failures: Option<u64>) -> Option<Result<(u64, Connection)>> {
        let current = self.current();
        if let Some(connection) = &current.connection {
            return Some(Ok((current.generation, connection.clone())));
        }
        let (kind, why) = current.failure.clone().filter(|_| failures.is_some_and(|count| current.failures > count))?;
        Some(Err(Error::new(kind, operation).because(why)))
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").field("server", &self.0.server).finish_non_exhaustive()
    }
}

impl RedisServer {
    /// A new connection, or why there is none.
    async fn connect(&self, response_timeout: Duration) -> std::result::Result<Connection, (ErrorKind, String)> {
        #[cfg(feature = "tls")]
        super::tls::install_provider();
        // The client's own deadline lies behind ours, so that a call is answered once.
        let connect = async {
            match &self.address {
                Address::Node(node) => self.node(node, response_timeout).await.map(Connection::Node),
                Address::Cluster(nodes) => self.cluster(nodes, response_timeout).await.map(Connection::Cluster),
                Address::Sentinel(sentinels) => self.primary(sentinels, response_timeout).await.map(Connection::Node),
            }
        };
        match timeout(self.connect_timeout, connect).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(failed)) => Err(self.unreachable(&failed)),
            Err(_) => Err((
                ErrorKind::Unavailable,
                format!("no connection to {} within {:?}", self.url, self.connect_timeout),
            )),
        }
    }

    fn unreachable(&self, failed: &RedisError) -> (ErrorKind, String) {
        let told = error("connect", failed);
        // An answer that did not come is no outcome unknown here: nothing was asked.
        let kind = if told.kind() == ErrorKind::Unknown { ErrorKind::Unavailable } else { told.kind() };
        (kind, format!("no connection to {}: {told}", self.url))
    }

    fn config(&self, response_timeout: Duration) -> AsyncConnectionConfig {
        AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.connect_timeout))
            .set_response_timeout(Some(response_timeout * 2))
    }

    async fn node(
        &self,
        node: &redis::ConnectionInfo,
        response_timeout: Duration,
    ) -> RedisResult<MultiplexedConnection> {
        #[cfg(feature = "tls")]
        let client = match node.addr() {
            redis::ConnectionAddr::TcpTls { .. } => {
                redis::Client::build_with_tls(node.clone(), self.certificates.for_client())?
            }
            _ => redis::Client::open(node.clone())?,
        };
        #[cfg(not(feature = "tls"))]
        let client = redis::Client::open(node.clone())?;
        client.get_multiplexed_async_connection_with_config(&self.config(response_timeout)).await
    }

    async fn cluster(
        &self,
        nodes: &[redis::ConnectionInfo],
        response_timeout: Duration,
    ) -> RedisResult<ClusterConnection> {
        let builder = redis::cluster::ClusterClientBuilder::new(nodes.to_vec())
            .retries(REDIRECTIONS_MAX)
            .max_retry_wait(500)
            .connection_timeout(self.connect_timeout)
            .response_timeout(response_timeout * 2)
            .overall_response_timeout(Some(response_timeout * 2));
        #[cfg(feature = "tls")]
        let builder = if nodes.iter().any(|node| matches!(node.addr(), redis::ConnectionAddr::TcpTls { .. })) {
            builder.certs(self.certificates.for_client())
        } else {
            builder
        };
        builder.build()?.get_async_connection().await
    }

    /// Asks the sentinels each time: after a failover they name another.
    async fn primary(&self, known: &Sentinels, response_timeout: Duration) -> RedisResult<MultiplexedConnection> {
        use redis::sentinel::{SentinelClientBuilder, SentinelServerType};
        let addresses = known.addresses.clone();
        let settings = &known.primary;
        let mut builder = SentinelClientBuilder::new(addresses, &known.service, SentinelServerType::Master)?
            .set_client_to_redis_db(settings.db())
            .set_client_to_redis_protocol(settings.protocol());
        if let Some(username) = settings.username() {
            builder = builder.set_client_to_redis_username(username);
        }
        if let Some(password) = settings.password() {
            builder = builder.set_client_to_redis_password(password);
        }
        if let Some(username) = &known.username {
            builder = builder.set_client_to_sentinel_username(username);
        }
        if let Some(password) = &known.password {
            builder = builder.set_client_to_sentinel_password(password);
        }
        if known.tls {
            builder = builder
                .set_client_to_redis_tls_mode(redis::TlsMode::Secure)
                .set_client_to_sentinel_tls_mode(redis::TlsMode::Secure);
            #[cfg(feature = "tls")]
            {
                builder = builder
                    .set_client_to_redis_certificates(self.certificates.for_client())
                    .set_client_to_sentinel_certificates(self.certificates.for_client());
            }
        }
        builder.build()?.get_async_connection_with_config(&self.config(response_timeout)).await
    }
}
