//! TLS against a server with a certificate made for the test, for the store and so for what it shares with the broker.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod store_fixture;

use std::time::Duration;

use hapax::ErrorKind;
use hapax_redis::{RedisServer, RedisStore};
use hapax_testkit::servers::certificates::Certificates;
use store_fixture::{Private, eventually, free_port, open, process};

async fn with_tls(certificates: &Certificates, clients: &str) -> (Private, u16) {
    let port = free_port();
    let file = |name: &str| certificates.path(name).display().to_string();
    let options = [
        "--tls-port",
        &port.to_string(),
        "--tls-cert-file",
        &file("localhost.pem"),
        "--tls-key-file",
        &file("localhost.key"),
        "--tls-ca-cert-file",
        &file("ca.pem"),
        "--tls-auth-clients",
        clients,
    ];
    let server = Private::start(&options).await;
    eventually("it listens", async || tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok()).await;
    (server, port)
}

fn at(host: &str, port: u16) -> RedisServer {
    RedisServer::at(format!("rediss://{host}:{port}").parse().unwrap()).unwrap().connect_timeout(Duration::from_secs(3))
}

#[tokio::test]
async fn tls_requested_never_plaintext() {
    // https://github.com/ag2ai/faststream/pull/2935: a client that was asked for TLS fell back to plaintext.
    let certificates = Certificates::new();
    let (server, port) = with_tls(&certificates, "no").await;
    let trusted = || at("localhost", port).root_certificate(certificates.read("ca.pem"));
    let store = RedisStore::builder(trusted()).connect().await.unwrap();
    let consumer = open(&store).await;
    process(&store, consumer, 0..100).await;
    for (what, server) in [
        ("a plaintext server", at("localhost", server.port()).root_certificate(certificates.read("ca.pem"))),
        ("an authority that is not trusted", at("localhost", port)),
        ("another name", at("127.0.0.1", port).root_certificate(certificates.read("ca.pem"))),
        ("sentinels over plaintext", {
            let url = format!("rediss-sentinel://localhost:{}?sentinelServiceName=main", server.port());
            RedisServer::at(url.parse().unwrap()).unwrap().connect_timeout(Duration::from_secs(3))
        }),
        ("a cluster over plaintext", {
            let url = format!("rediss-cluster://localhost:{}", server.port());
            RedisServer::at(url.parse().unwrap()).unwrap().connect_timeout(Duration::from_secs(3))
        }),
    ] {
        let refused = RedisStore::builder(server).connect().await.err();
        let refused = refused.unwrap_or_else(|| panic!("{what} is taken"));
        assert!(matches!(refused.kind(), ErrorKind::Unavailable | ErrorKind::Configuration), "{what}: {refused}");
    }
}

#[tokio::test]
async fn a_client_shows_its_certificate_where_the_server_asks() {
    let certificates = Certificates::new();
    let (_server, port) = with_tls(&certificates, "yes").await;
    let bare = || at("localhost", port).root_certificate(certificates.read("ca.pem"));
    assert!(RedisStore::builder(bare()).connect().await.is_err(), "without one it is refused");
    let with = bare().client_certificate(certificates.read("client.pem"), certificates.read("client.key"));
    let text = format!("{with:?}");
    assert!(!text.contains("PRIVATE") && !text.contains("45, 45"), "{text}");
    let store = RedisStore::builder(with).connect().await.unwrap();
    let consumer = open(&store).await;
    process(&store, consumer, 0..1).await;
}
