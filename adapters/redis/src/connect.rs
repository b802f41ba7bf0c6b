//! Where Redis is and how it is reached: one node, a primary that sentinels know, or a cluster. Broker and store share
//! these settings, never their connections: a blocking read holds up everything behind it.

mod address;
mod link;
mod tls;

use std::fmt;
use std::time::Duration;

use hapax::{Result, SecretUrl};

use address::Address;
pub(crate) use link::Link;
use tls::Certificates;

/// How long a connection may take to be made.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long an answer may take. The client's own default of 500 ms is too short for a server under load.
pub const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);

/// Where Redis is and how it is reached. `Debug` shows no credentials.
///
/// | URL | is |
/// |---|---|
/// | `redis://user:password@host:6379/0` | one node; user, password, port and database number may be left out |
/// | `redis-sentinel://user:password@a:26379,b:26379/0?sentinelServiceName=mymaster` | the primary that these sentinels know by that name; `sentinelUsername` and `sentinelPassword` where they ask for them |
/// | `redis-cluster://user:password@a:6379,b:6379` | a cluster that these nodes belong to |
/// | `rediss://`, `rediss-sentinel://`, `rediss-cluster://` | the same with TLS (feature `tls`) |
/// | `unix:///run/redis.sock?db=0` | one node, by its socket |
///
/// `?protocol=resp3` chooses that protocol. Special characters in user and password are percent-encoded.
///
/// ```
/// use hapax_redis::RedisServer;
///
/// let server = RedisServer::at("redis://billing:hunter2@cache-1:6379/2".parse()?)?;
/// assert!(!format!("{server:?}").contains("hunter2"));
/// # Ok::<(), hapax::Error>(())
/// ```
#[derive(Clone)]
#[must_use]
pub struct RedisServer {
    url: SecretUrl,
    address: Address,
    connect_timeout: Duration,
    response_timeout: Duration,
    certificates: Certificates,
}

impl RedisServer {
    /// The server at `url`. Connects to nothing yet.
    ///
    /// # Errors
    /// [`Configuration`](hapax::ErrorKind::Configuration) for a URL of another kind, or with TLS where the feature
    /// `tls` is missing: TLS that was asked for is never left out.
    pub fn at(url: SecretUrl) -> Result<Self> {
        let address = Address::parse(&url)?;
        Ok(Self {
            url,
            address,
            connect_timeout: CONNECT_TIMEOUT,
            response_timeout: RESPONSE_TIMEOUT,
            certificates: Certificates::default(),
        })
    }

    /// How long a connection may take to be made; [`CONNECT_TIMEOUT`].
    pub fn connect_timeout(self, connect_timeout: Duration) -> Self {
        Self { connect_timeout, ..self }
    }

    /// How long an answer may take; [`RESPONSE_TIMEOUT`]. Then the outcome is unknown and the connection is given up.
    pub fn response_timeout(self, response_timeout: Duration) -> Self {
        Self { response_timeout, ..self }
    }

    /// The certificate of the authority (PEM) that signed the server's, instead of those that the machine trusts.
    #[cfg(feature = "tls")]
    pub fn root_certificate(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.certificates.root = Some(pem.into());
        self
    }

    /// A certificate and its key (PEM) by which this client shows who it is.
    #[cfg(feature = "tls")]
    pub fn client_certificate(mut self, pem: impl Into<Vec<u8>>, key_pem: impl Into<Vec<u8>>) -> Self {
        self.certificates.client = Some((pem.into(), key_pem.into()));
        self
    }

    /// Whether it is a cluster, where the keys of one call must lie in one slot.
    pub(crate) fn is_cluster(&self) -> bool {
        self.address.is_cluster()
    }

    /// Whether another server may take over that did not confirm the last writes.
    pub(crate) fn has_failover(&self) -> bool {
        self.address.is_cluster() || self.address.is_sentinel()
    }

    /// A link of its own, which connects when it is first used and again when its connection broke.
    pub(crate) fn link(&self) -> Link {
        Link::new(self.clone(), self.response_timeout)
    }

    /// A link of its own for calls that block on the server for up to `block`.
    #[allow(dead_code, reason = "the broker's")]
    pub(crate) fn blocking_link(&self, block: Duration) -> Link {
        Link::new(self.clone(), self.response_timeout + block)
    }
}

impl fmt::Debug for RedisServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisServer")
            .field("url", &self.url)
            .field("connect_timeout", &self.connect_timeout)
            .field("response_timeout", &self.response_timeout)
            .field("certificates", &self.certificates)
            .finish_non_exhaustive()
    }
}
