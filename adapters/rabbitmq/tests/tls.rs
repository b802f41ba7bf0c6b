//! TLS with certificates made for the test: a terminator stands before the plain port of RabbitMQ.

mod rabbit;

use std::sync::Arc;
use std::time::Duration;

use hapax::{Broker, ErrorKind, Outgoing, Publisher, SecretUrl, Settlement};
use hapax_rabbitmq::lapin::tcp::OwnedTLSConfig;
use hapax_rabbitmq::{RabbitBroker, RabbitPublisher};
use hapax_testkit::servers::certificates::Certificates;
use rabbit::raw::{self, Raw};
use rabbit::{GROUP, Rabbit, event, ids, letter, limits, receive, settle, soon};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

const CANARY: &str = "c4nary";

fn trusted(certificates: &Certificates, ca: &str) -> OwnedTLSConfig {
    OwnedTLSConfig { identity: None, cert_chain: Some(certificates.read(ca)) }
}

/// Ends TLS and passes the rest on.
struct Terminator {
    port: u16,
    task: JoinHandle<()>,
}

impl Terminator {
    async fn start(certificates: &Certificates, upstream: String) -> Self {
        let chain = CertificateDer::pem_slice_iter(certificates.read("localhost.pem").as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .expect("certificates");
        let key = PrivateKeyDer::from_pem_slice(certificates.read("localhost.key").as_bytes()).expect("a key");
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("ring knows them")
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .expect("the key is of the certificate");
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("bound").port();
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let (acceptor, upstream) = (acceptor.clone(), upstream.clone());
                connections.spawn(async move {
                    let Ok(mut client) = acceptor.accept(client).await else { return };
                    let Ok(mut server) = TcpStream::connect(upstream).await else { return };
                    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                });
            }
        });
        Self { port, task }
    }
}

impl Drop for Terminator {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Login, host and path of a URL.
fn parts(url: &str) -> (&str, &str, &str) {
    let rest = url.split_once("://").expect("a url").1;
    let (authority, path) = rest.split_once('/').expect("with a virtual host");
    let (login, host) = authority.rsplit_once('@').expect("with a login");
    (login, host, path)
}

fn builder(rabbit: &Rabbit, url: &str, tls: OwnedTLSConfig) -> hapax_rabbitmq::RabbitBrokerBuilder {
    let builder = RabbitBroker::builder(SecretUrl::parse(url).expect("a url"), rabbit.queue.clone(), GROUP);
    builder.retry_steps([Duration::from_millis(500)]).tls(tls)
}

#[tokio::test]
async fn everything_goes_over_tls_with_an_authority_of_ones_own() {
    let (rabbit, certificates) = (Rabbit::fresh(), Certificates::new());
    let (login, host, path) = parts(rabbit.url.expose());
    let terminator = Terminator::start(&certificates, host.to_owned()).await;
    let url = format!("amqps://{login}@localhost:{}/{path}", terminator.port);
    let broker = builder(&rabbit, &url, trusted(&certificates, "ca.pem")).build().expect("the settings hold");
    broker.open(limits(8)).await.expect("the broker opens");
    let publisher = RabbitPublisher::builder(SecretUrl::parse(&url).expect("a url")).default_key(&*rabbit.queue);
    let publisher = publisher.tls(trusted(&certificates, "ca.pem")).build().expect("the settings hold");
    publisher.publish(vec![Outgoing::new(event(1))]).await.remove(0).expect("it is sent");
    let held = receive(&broker, 1).await.remove(0);
    settle(&broker, held.receipt, Settlement::Retry { after: Duration::ZERO }).await.expect("it waits");
    let again = receive(&broker, 1).await.remove(0);
    assert_eq!(ids(std::slice::from_ref(&again)), ["1"]);
    settle(&broker, again.receipt, letter()).await.expect("it is set aside");
    // What is decrypted is screened: 5,000 arrays in one another.
    let nested = (0_u32..5_000).rev().flat_map(|at| [&b"A"[..], &(at * 5 + 1).to_be_bytes()].concat());
    let nested = nested.chain([b'V']).collect();
    let mut raw = Raw::connect(rabbit.url.expose()).await;
    raw.publish(&rabbit.queue, &raw::table(&[(b"deep", nested)]), b"body").await;
    let deep = receive(&broker, 1).await.remove(0);
    assert!(deep.message.defect().is_some());
    settle(&broker, deep.receipt, letter()).await.expect("it is set aside");
    soon("close", broker.close()).await.expect("it closes");
    publisher.close().await;
}

#[tokio::test]
async fn a_server_that_cannot_be_trusted_is_told_without_secrets() {
    let (rabbit, certificates) = (Rabbit::fresh(), Certificates::new());
    let (_, host, path) = parts(rabbit.url.expose());
    let terminator = Terminator::start(&certificates, host.to_owned()).await;
    let at = |host: &str| format!("amqps://shop:{CANARY}@{host}:{}/{path}", terminator.port);
    for (what, url, tls) in [
        ("another authority", at("localhost"), trusted(&certificates, "other.pem")),
        ("the system's authorities", at("localhost"), OwnedTLSConfig::default()),
        ("another name", at("127.0.0.1"), trusted(&certificates, "ca.pem")),
    ] {
        let broker = builder(&rabbit, &url, tls).build().expect("the settings hold");
        let error = soon("open", broker.open(limits(8))).await.expect_err(what);
        // A certificate may have run out while the service runs: what is to be sent then is tried again.
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{what}: {error}");
        let text = error.to_string();
        assert!(text.contains("certificate") && text.contains(".tls("), "{what}: {text}");
        assert!(!format!("{error:?} {broker:?}").contains(CANARY), "{error:?}");
    }
}

/// A chain that does not read would leave only the system's authorities, and nobody would know why nothing is trusted.
#[tokio::test]
async fn a_chain_that_does_not_read_is_told_at_build() {
    let rabbit = Rabbit::fresh();
    for chain in ["", "no certificate", "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n"] {
        let tls = OwnedTLSConfig { identity: None, cert_chain: Some(chain.into()) };
        let error = builder(&rabbit, "amqps://localhost", tls.clone()).build().expect_err("it is no certificate");
        assert!(error.kind() == ErrorKind::Configuration && error.to_string().contains("tls:"), "{error}");
        let url = SecretUrl::parse("amqps://localhost").expect("a url");
        assert!(RabbitPublisher::builder(url).tls(tls).build().is_err());
    }
}
