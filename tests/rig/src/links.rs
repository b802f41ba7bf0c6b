//! The links between workers and servers: a proxy for each worker and side, so that one can be cut and the others not.
//!
//! Kafka tells its clients where to connect, which can be one proxy only: all workers share it.

use std::sync::Arc;

use hapax_testkit::proxy::Proxy;

use crate::servers::Environment;

/// A link, and the address that leads through it.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) proxy: Proxy,
    pub(crate) url: String,
    /// Whose it is; nobody's means that all share it.
    pub(crate) worker: Option<u32>,
    /// Held while something is done to it.
    pub(crate) busy: tokio::sync::Mutex<()>,
}

impl Link {
    /// Through a proxy of its own to the server of `url`.
    pub(crate) async fn to(url: &str, worker: u32) -> Result<Arc<Self>, String> {
        let (before, server, after) = split(url)?;
        let proxy = Proxy::start(server).await.map_err(|error| format!("a proxy cannot start: {error}"))?;
        let url = format!("{before}{}{after}", proxy.address());
        Ok(Arc::new(Self { proxy, url, worker: Some(worker), busy: tokio::sync::Mutex::default() }))
    }

    /// The one to a Kafka that advertises it.
    pub(crate) async fn to_kafka(environment: &Environment) -> Result<Arc<Self>, String> {
        let listen = environment.get("HAPAX_KAFKA_PROXY_LISTEN")?;
        let target = environment.get("HAPAX_KAFKA_PROXY_TARGET")?;
        let proxy = Proxy::start_at(listen, target).await.map_err(|error| format!("a proxy at {listen}: {error}"))?;
        let url = format!("kafka://{}", proxy.address());
        Ok(Arc::new(Self { proxy, url, worker: None, busy: tokio::sync::Mutex::default() }))
    }
}

/// What stands before the server's address, the address, and what stands behind it.
fn split(url: &str) -> Result<(&str, &str, &str), String> {
    let unfit = || format!("{} is no address with a host and a port", redacted(url));
    let begin = url.find("://").ok_or_else(unfit)? + 3;
    let end = url[begin..].find('/').map_or(url.len(), |at| begin + at);
    let begin = url[begin..end].rfind('@').map_or(begin, |at| begin + at + 1);
    let server = &url[begin..end];
    if !server.contains(':') {
        return Err(unfit());
    }
    Ok((&url[..begin], server, &url[end..]))
}

fn redacted(url: &str) -> &str {
    url.rsplit_once('@').map_or(url, |(_, server)| server)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_found_between_its_credentials_and_its_path() {
        assert_eq!(split("redis://h:1"), Ok(("redis://", "h:1", "")));
        assert_eq!(split("amqp://a:b@h:1/%2f"), Ok(("amqp://a:b@", "h:1", "/%2f")));
        assert_eq!(split("postgres://a:b@h:1/db?x=y"), Ok(("postgres://a:b@", "h:1", "/db?x=y")));
        assert!(split("postgres://a:b@h/db").is_err());
    }
}
