//! Where RabbitMQ is: a URL of one or several nodes, and the way to a connection.
//!
//! lapin's own URI type prints its password in `Debug`, takes an IPv6 address for `localhost`, and ignores parameters that it
//! does not know, so what it holds stays in here and is checked here.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hapax::{Error, ErrorKind, Result, SecretUrl};
use lapin::tcp::OwnedTLSConfig;
use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{Connection, ConnectionProperties};
use tokio::time::timeout;

use crate::{error, screen};

/// Heartbeats are asked for this often unless the URL says otherwise: a silent connection is found after two.
const HEARTBEAT_S: u16 = 10;
/// RabbitMQ's own default: what others may send with it must fit, and a dead letter with its reason too.
const FRAME_BYTES_MIN: u32 = 131_072;
/// What is asked for unless the URL says less. lapin sets buffers of many frames aside; without a bound on either side they are of
/// 4 GiB each.
const FRAME_BYTES_MAX: u32 = 1_048_576;
const PARAMETERS: [&str; 5] = ["heartbeat", "frame_max", "channel_max", "connection_timeout", "auth_mechanism"];

/// The nodes of one RabbitMQ, and what it takes to reach them.
pub(crate) struct Address {
    shown: SecretUrl,
    nodes: Vec<AMQPUri>,
    /// The node that is tried first: the last that answered, or the one after the last that was tried.
    next: AtomicUsize,
    tls: OwnedTLSConfig,
    patience: Duration,
}

impl Address {
    /// Takes `amqp://user:password@host:port/vhost?heartbeat=10`; hosts may be several, separated by commas.
    pub(crate) fn parse(url: &SecretUrl, patience: Duration) -> Result<Self> {
        let mut nodes = Vec::new();
        for one in each_host(url.expose()) {
            nodes.push(node(&one)?);
        }
        let own = nodes.iter().find_map(|node| node.query.connection_timeout).map(Duration::from_millis);
        let (shown, patience) = (url.clone(), own.unwrap_or(patience));
        Ok(Self { shown, nodes, next: AtomicUsize::new(0), tls: OwnedTLSConfig::default(), patience })
    }

    #[cfg(feature = "tls")]
    pub(crate) fn with_tls(mut self, tls: OwnedTLSConfig) -> Result<Self> {
        use rustls_pki_types::{CertificateDer, pem::PemObject};
        if let Some(chain) = &tls.cert_chain {
            let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(chain.as_bytes()).collect();
            if certificates.map_or(true, |certificates| certificates.is_empty()) {
                let why = "tls: cert_chain holds no certificate, or one that does not read; give it in PEM";
                return Err(Error::new(ErrorKind::Configuration, "connect").because(why));
            }
        }
        self.tls = tls;
        Ok(self)
    }

    /// Connects to the first node that answers. `role` is shown by RabbitMQ's own tools.
    pub(crate) async fn connect(&self, role: &str) -> Result<Connection> {
        let first = self.next.load(Ordering::Relaxed);
        let mut last = None;
        for at in 0..self.nodes.len() {
            let at = (first + at) % self.nodes.len();
            // Beforehand: who waits for this may give up while a node is silent, and would meet it first each time.
            self.next.store((at + 1) % self.nodes.len(), Ordering::Relaxed);
            match self.connect_to(&self.nodes[at], role).await {
                Ok(connection) => {
                    self.next.store(at, Ordering::Relaxed);
                    return Ok(connection);
                }
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| Error::new(ErrorKind::Configuration, "connect").because("the url names no host")))
    }

    async fn connect_to(&self, node: &AMQPUri, role: &str) -> Result<Connection> {
        // Without lapin's own recovery: it hides a lost session from its deliveries, and a channel that the server closed leaves
        // its consumer waiting for ever.
        let properties = ConnectionProperties::default().with_connection_name(format!("hapax {role}").into());
        let connecting = screen::connect(node.clone(), properties, self.tls.clone());
        match timeout(self.patience, connecting).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(e)) => {
                let (told, mut why) = (error::of(&e, "connect"), error::text(&e));
                if why.contains("certificate") {
                    why.push_str(". Trust its authority with .tls(..), and name the host as its certificate does");
                }
                Err(Error::new(told.kind(), "connect").because(format!("{}: {why}", self.shown)))
            }
            Err(_) => Err(Error::new(ErrorKind::Unavailable, "connect")
                .because(format!("{}: no connection within {:?}", self.shown, self.patience))),
        }
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.shown)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.shown.fmt(f)
    }
}

/// One URL for each host of a list.
fn each_host(url: &str) -> Vec<String> {
    let Some((scheme, rest)) = url.split_once("://") else { return vec![url.to_owned()] };
    let (authority, behind) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    let (user, hosts) = authority.rsplit_once('@').map_or(("", authority), |(user, hosts)| (user, hosts));
    let at = if user.is_empty() { "" } else { "@" };
    hosts.split(',').map(|host| format!("{scheme}://{user}{at}{host}{behind}")).collect()
}

fn node(url: &str) -> Result<AMQPUri> {
    let wrong = |why: String| Error::new(ErrorKind::Configuration, "connect").because(why);
    let query = url.split_once('?').map_or("", |(_, query)| query.split('#').next().unwrap_or_default());
    for name in query.split('&').filter_map(|pair| pair.split('=').next()).filter(|name| !name.is_empty()) {
        if !PARAMETERS.contains(&name) {
            let known = PARAMETERS.join(", ");
            return Err(wrong(format!("url: the parameter `{name}` is not known; known are {known}")));
        }
    }
    let authority = url.split_once("://").map_or("", |(_, rest)| rest.split(['/', '?']).next().unwrap_or_default());
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    if host.is_empty() {
        return Err(wrong("url: it names no host".into()));
    }
    // The error of the parser may quote the password.
    let parsed: Result<AMQPUri, _> = url.parse();
    let mut node = parsed.map_err(|_| {
        wrong("url: it is not of the form amqp://user:password@host:port/vhost, with reserved characters as %XX".into())
    })?;
    if let Some((address, _)) = host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        address.clone_into(&mut node.authority.host);
    }
    if node.vhost.is_empty() {
        return Err(wrong("url: the virtual host is empty; leave out the last `/`, or write `/` as %2f".into()));
    }
    if node.scheme == AMQPScheme::AMQPS && !cfg!(feature = "tls") {
        return Err(wrong("url: amqps needs the feature `tls` of hapax-rabbitmq".into()));
    }
    if node.query.frame_max.is_some_and(|most| (1..FRAME_BYTES_MIN).contains(&most)) {
        let why = "url: frame_max is less than 131072: RabbitMQ delivers all headers of a message in one frame, whatever was agreed";
        return Err(wrong(why.into()));
    }
    if node.query.frame_max.is_some_and(|most| most > FRAME_BYTES_MAX) {
        let why =
            "url: frame_max is more than 1048576, and memory for many frames is set aside; leave it out, or take less";
        return Err(wrong(why.into()));
    }
    node.query.frame_max = node.query.frame_max.filter(|most| *most != 0).or(Some(FRAME_BYTES_MAX));
    node.query.heartbeat.get_or_insert(HEARTBEAT_S);
    Ok(node)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(url: &str) -> Result<Address> {
        Address::parse(&SecretUrl::parse(url)?, Duration::from_secs(1))
    }

    #[test]
    fn a_list_of_hosts_is_several_nodes_with_one_login() {
        let address = parsed("amqp://shop:c4nary@mq-1:5673,mq-2/sales?heartbeat=7").unwrap();
        let nodes: Vec<_> = address.nodes.iter().map(|n| (n.authority.host.as_str(), n.authority.port)).collect();
        assert_eq!(nodes, [("mq-1", 5673), ("mq-2", 5672)]);
        for node in &address.nodes {
            assert_eq!((node.vhost.as_str(), node.query.heartbeat), ("sales", Some(7)));
            assert_eq!(node.authority.userinfo.password, "c4nary");
        }
    }

    #[test]
    fn a_heartbeat_is_asked_for_and_the_default_vhost_is_the_root() {
        let address = parsed("amqp://localhost").unwrap();
        assert_eq!((address.nodes[0].vhost.as_str(), address.nodes[0].query.heartbeat), ("/", Some(HEARTBEAT_S)));
    }

    /// The parser of amq-protocol-uri 10.6 takes an IPv6 address for `localhost`.
    #[test]
    fn an_ipv6_address_is_not_localhost() {
        assert_eq!(parsed("amqp://shop:c4nary@[fd00::7]:5673/x").unwrap().nodes[0].authority.host, "fd00::7");
    }

    /// lapin sets buffers aside for what was agreed, 4 GiB where neither side names a size.
    #[test]
    fn frames_have_a_bound_whatever_the_server_says() {
        for url in ["amqp://mq/x", "amqp://mq/x?frame_max=0", "amqp://mq/x?frame_max=1048576"] {
            assert_eq!(parsed(url).unwrap().nodes[0].query.frame_max, Some(1_048_576), "{url}");
        }
        assert_eq!(parsed("amqp://mq/x?frame_max=131072").unwrap().nodes[0].query.frame_max, Some(131_072));
        let error = parsed("amqp://mq/x?frame_max=1048577").unwrap_err();
        assert!(error.to_string().contains("frame_max is more than 1048576"), "{error}");
    }

    #[test]
    fn what_is_wrong_with_a_url_is_told_without_quoting_it() {
        assert!(parsed("amqp://mq/x?frame_max=131072").is_ok() && parsed("amqp://mq/x?frame_max=0").is_ok());
        for (url, part) in [
            ("amqp://shop:c4nary@mq/x?verify=verify_none", "parameter `verify`"),
            ("http://shop:c4nary@mq/x", "amqp://user:password@host"),
            ("amqp://shop:c4nary@mq/", "virtual host is empty"),
            ("amqp://shop:c4nary@/x", "names no host"),
            ("amqp://shop:c4nary@mq/x?frame_max=8192", "frame_max is less than 131072"),
            ("amqp://shop:c4nary@mq/x?heartbeat=often", "amqp://user:password@host"),
        ] {
            let error = parsed(url).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Configuration, "{url}");
            assert!(error.to_string().contains(part), "{url}: {error}");
            assert!(!format!("{error} {error:?}").contains("c4nary"), "{error:?}");
        }
    }

    #[cfg(not(feature = "tls"))]
    #[test]
    fn tls_without_the_feature_is_refused_and_never_plain() {
        let error = parsed("amqps://mq/x").unwrap_err();
        assert!(error.to_string().contains("feature `tls`"), "{error}");
    }
}
