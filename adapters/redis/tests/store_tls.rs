//! TLS against a server with a certificate made for the test, for the store and so for what it shares with the broker.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod store_fixture;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use hapax::ErrorKind;
use hapax_redis::{RedisServer, RedisStore};
use store_fixture::{Private, eventually, free_port, open, process, unique};

/// Certificates in a folder that is removed at the end.
struct Certificates(std::path::PathBuf);

impl Certificates {
    /// An authority, and a server certificate of its for `localhost`.
    fn new() -> Self {
        let folder = std::env::temp_dir().join(format!("hapax-tls-{}", unique()));
        std::fs::create_dir(&folder).unwrap();
        openssl(&folder, "req -x509 -newkey rsa:2048 -nodes -days 2 -keyout ca.key -out ca.pem -subj /CN=hapax-tests");
        for name in ["localhost", "client"] {
            std::fs::write(folder.join("extensions"), format!("subjectAltName=DNS:{name}\n")).unwrap();
            openssl(
                &folder,
                &format!("req -newkey rsa:2048 -nodes -keyout {name}.key -out {name}.csr -subj /CN={name}"),
            );
            let sign = "x509 -req -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile extensions";
            openssl(&folder, &format!("{sign} -in {name}.csr -out {name}.pem"));
        }
        Self(folder)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.0.join(name)).unwrap()
    }
}

impl Drop for Certificates {
    fn drop(&mut self) {
        let _leave_it = std::fs::remove_dir_all(&self.0).is_err();
    }
}

fn openssl(folder: &Path, words: &str) {
    let made =
        Command::new("openssl").args(words.split(' ')).current_dir(folder).output().expect("openssl is installed");
    assert!(made.status.success(), "openssl {words}: {}", String::from_utf8_lossy(&made.stderr));
}

async fn with_tls(certificates: &Certificates, clients: &str) -> (Private, u16) {
    let port = free_port();
    let options = [
        "--tls-port",
        &port.to_string(),
        "--tls-cert-file",
        &certificates.path("localhost.pem"),
        "--tls-key-file",
        &certificates.path("localhost.key"),
        "--tls-ca-cert-file",
        &certificates.path("ca.pem"),
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
