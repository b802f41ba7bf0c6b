//! URLs: which kind of server they mean, and each host in the client's own form.

use std::borrow::Cow;

use hapax::{Error, ErrorKind, Result, SecretUrl};
use redis::{ConnectionInfo, IntoConnectionInfo};

const SERVICE_NAME: &str = "sentinelServiceName";
const SENTINEL_USERNAME: &str = "sentinelUsername";
const SENTINEL_PASSWORD: &str = "sentinelPassword";

/// What a URL means. Holds credentials.
#[derive(Clone)]
pub(super) enum Address {
    Node(Box<ConnectionInfo>),
    Cluster(Vec<ConnectionInfo>),
    Sentinel(Box<Sentinels>),
}

/// Sentinels and the primary they are asked for.
#[derive(Clone)]
pub(super) struct Sentinels {
    pub(super) addresses: Vec<redis::ConnectionAddr>,
    pub(super) service: String,
    /// User, password, database and protocol of the primary.
    pub(super) primary: redis::RedisConnectionInfo,
    pub(super) username: Option<String>,
    pub(super) password: Option<String>,
    pub(super) tls: bool,
}

impl Address {
    pub(super) fn is_cluster(&self) -> bool {
        matches!(self, Self::Cluster(_))
    }

    pub(super) fn is_sentinel(&self) -> bool {
        matches!(self, Self::Sentinel(_))
    }

    pub(super) fn parse(url: &SecretUrl) -> Result<Self> {
        let scheme = url.scheme().to_ascii_lowercase();
        let tls = scheme.starts_with("rediss");
        if tls && !cfg!(feature = "tls") {
            return Err(refused(format!("{scheme}:// needs the feature `tls` of hapax-redis, which is not enabled")));
        }
        if url.expose().contains('#') {
            return Err(refused("a fragment (#insecure) is not taken: certificates are always checked"));
        }
        match scheme.as_str() {
            "redis" | "rediss" | "unix" | "redis+unix" | "valkey" | "valkeys" if !several(url) => {
                Ok(Self::Node(Box::new(node(url.expose())?)))
            }
            "redis" | "rediss" => Err(refused(format!(
                "several hosts need a scheme that says what they are: {scheme}-cluster:// or {scheme}-sentinel://"
            ))),
            "redis-cluster" | "rediss-cluster" => {
                let parts = Parts::of(url);
                if !matches!(parts.path, "" | "/" | "/0") {
                    return Err(refused("a cluster has no database but 0: leave the path of the url empty"));
                }
                let nodes = parts.nodes(tls, 6379, parts.query).collect::<Result<_>>()?;
                Ok(Self::Cluster(nodes))
            }
            "redis-sentinel" | "rediss-sentinel" => sentinels(url, tls),
            _ => Err(refused(format!(
                "{scheme}:// is no scheme of Redis: redis://, redis-sentinel://, redis-cluster://, each with rediss for \
                 TLS, or unix://"
            ))),
        }
    }
}

fn refused(why: impl Into<Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Configuration, "parse url").because(why)
}

/// The client's own reading of one URL. Its error is not quoted: it may quote the URL.
fn node(url: &str) -> Result<ConnectionInfo> {
    url.into_connection_info().map_err(|_| {
        refused("the client does not take this url: redis://user:password@host:port/database?protocol=resp3")
    })
}

fn several(url: &SecretUrl) -> bool {
    Parts::of(url).hosts.contains(',')
}

/// A URL with hosts, cut at its signs; `SecretUrl` has checked its shape.
struct Parts<'a> {
    credentials: Option<&'a str>,
    hosts: &'a str,
    path: &'a str,
    query: &'a str,
}

impl<'a> Parts<'a> {
    fn of(url: &'a SecretUrl) -> Self {
        let rest = url.expose().split_once("://").map_or("", |(_, rest)| rest);
        let (authority, behind) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        let (credentials, hosts) = match authority.rsplit_once('@') {
            Some((credentials, hosts)) => (Some(credentials), hosts),
            None => (None, authority),
        };
        let (path, query) = behind.split_once('?').unwrap_or((behind, ""));
        Self { credentials, hosts, path, query }
    }

    /// Each host in a URL of its own, with credentials, path and the given parameters.
    fn nodes(&self, tls: bool, port: u16, query: &str) -> impl Iterator<Item = Result<ConnectionInfo>> {
        let scheme = if tls { "rediss" } else { "redis" };
        let credentials = self.credentials.map_or_else(String::new, |text| format!("{text}@"));
        let query = if query.is_empty() { String::new() } else { format!("?{query}") };
        self.hosts.split(',').map(move |host| {
            let last = host.rsplit(']').next().unwrap_or(host);
            let host = if last.contains(':') { Cow::Borrowed(host) } else { format!("{host}:{port}").into() };
            node(&format!("{scheme}://{credentials}{host}{}{query}", self.path))
        })
    }
}

fn sentinels(url: &SecretUrl, tls: bool) -> Result<Address> {
    let parts = Parts::of(url);
    let (mut service, mut username, mut password, mut others) = (None, None, None, Vec::new());
    for pair in parts.query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        match name {
            SERVICE_NAME => service = Some(decoded(value)?),
            SENTINEL_USERNAME => username = Some(decoded(value)?),
            SENTINEL_PASSWORD => password = Some(decoded(value)?),
            _ => others.push(pair),
        }
    }
    let service = service.filter(|name| !name.is_empty()).ok_or_else(|| {
        refused(format!("sentinels are asked for a primary by its name: add ?{SERVICE_NAME}=mymaster to the url"))
    })?;
    let nodes = parts.nodes(tls, 26379, &others.join("&")).collect::<Result<Vec<_>>>()?;
    let primary = nodes.first().ok_or_else(|| refused("the url names no sentinel"))?.redis_settings().clone();
    let addresses = nodes.iter().map(|node| node.addr().clone()).collect();
    Ok(Address::Sentinel(Box::new(Sentinels { addresses, service, primary, username, password, tls })))
}

fn decoded(text: &str) -> Result<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, behind @ ..] = rest {
        rest = behind;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digits = behind.get(..2).and_then(|two| std::str::from_utf8(two).ok());
        let byte = digits.and_then(|two| u8::from_str_radix(two, 16).ok());
        bytes.push(byte.ok_or_else(|| refused("a % in the url is not followed by two hexadecimal digits"))?);
        rest = &behind[2..];
    }
    String::from_utf8(bytes).map_err(|_| refused("a parameter of the url is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(url: &str) -> Result<Address> {
        Address::parse(&SecretUrl::parse(url).expect("a url"))
    }

    fn refusal(url: &str) -> String {
        match parse(url) {
            Ok(_) => panic!("{url} is taken"),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Configuration);
                error.to_string()
            }
        }
    }

    #[test]
    fn one_node_has_user_password_and_database() {
        let Ok(Address::Node(node)) = parse("redis://bill:p%40ss@cache:7000/3") else { panic!("a node") };
        assert_eq!(node.addr().to_string(), "cache:7000");
        let settings = node.redis_settings();
        assert_eq!((settings.username(), settings.password(), settings.db()), (Some("bill"), Some("p@ss"), 3));
    }

    #[test]
    fn each_node_of_a_cluster_has_the_credentials_and_a_port() {
        let Ok(Address::Cluster(nodes)) = parse("redis-cluster://bill:pass@a,b:7001,[::1]") else {
            panic!("a cluster")
        };
        let addresses: Vec<_> = nodes.iter().map(|node| node.addr().to_string()).collect();
        assert_eq!(addresses, ["a:6379", "b:7001", "::1:6379"]);
        assert!(nodes.iter().all(|node| node.redis_settings().password() == Some("pass")));
        assert!(refusal("redis-cluster://a/2").contains("no database but 0"));
    }

    #[test]
    fn sentinels_are_asked_by_name_and_the_credentials_are_the_primarys() {
        let url =
            "redis-sentinel://bill:pass@a,b:5000/2?sentinelServiceName=main&sentinelPassword=s%26p&protocol=resp3";
        let Ok(Address::Sentinel(found)) = parse(url) else { panic!("sentinels") };
        let addresses: Vec<_> = found.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["a:26379", "b:5000"]);
        assert_eq!((found.service.as_str(), found.password.as_deref()), ("main", Some("s&p")));
        assert_eq!((found.primary.password(), found.primary.db()), (Some("pass"), 2));
        assert!(refusal("redis-sentinel://a,b/0").contains("sentinelServiceName"));
    }

    #[test]
    fn what_cannot_be_meant_is_refused_with_the_remedy_and_without_the_password() {
        for (url, says) in [
            ("redis://u:canary@a,b", "redis-cluster://"),
            ("amqp://u:canary@a", "no scheme of Redis"),
            ("redis://u:canary@a/x", "redis://user:password@host"),
            ("redis://u:canary@a#insecure", "always checked"),
        ] {
            let error = refusal(url);
            assert!(error.contains(says) && !error.contains("canary"), "{error}");
        }
    }

    #[cfg(not(feature = "tls"))]
    #[test]
    fn tls_requested_never_plaintext() {
        // https://github.com/ag2ai/faststream/pull/2935
        for url in ["rediss://a", "rediss-cluster://a,b", "rediss-sentinel://a?sentinelServiceName=m"] {
            assert!(refusal(url).contains("feature `tls`"), "{url}");
        }
    }
}
