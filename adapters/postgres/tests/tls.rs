//! TLS on the pool that the store is given, against servers with a certificate made for the test.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod fixture;

use std::process::Command;

use fixture::{Cluster, RETENTION, claim, is_root, lease, number, pool_of, process};
use hapax::{Claim, ErrorKind, Outcome, ProcessedStore, TransactionalStore};
use hapax_postgres::PostgresStore;
use hapax_postgres::sqlx::PgPool;
use hapax_testkit::servers::certificates::Certificates;

const CANARY: &str = "c4nary";

async fn with_tls(certificates: &Certificates) -> Cluster {
    if is_root() {
        let owned = Command::new("chown").args(["-R", "postgres"]).arg(certificates.folder()).status();
        assert!(owned.expect("chown answers").success(), "PostgreSQL takes a key that is its own");
    }
    let file = |setting: &str, name: &str| format!("{setting}={}", certificates.path(name).display());
    let (certificate, key) = (file("ssl_cert_file", "localhost.pem"), file("ssl_key_file", "localhost.key"));
    Cluster::start(&["ssl=on", &certificate, &key]).await
}

fn verified(certificates: &Certificates, ca: &str, host: &str, cluster: &Cluster) -> PgPool {
    let (ca, port) = (certificates.path(ca), cluster.port);
    let url = format!("postgres://hapax:{CANARY}@{host}:{port}/postgres?application_name=store&sslmode=verify-full");
    pool_of(format!("{url}&sslrootcert={}", ca.display()).parse().unwrap(), 5)
}

#[tokio::test]
async fn everything_goes_over_tls_that_the_pool_asks_for() {
    let certificates = Certificates::new();
    let cluster = with_tls(&certificates).await;
    let pool = verified(&certificates, "ca.pem", "localhost", &cluster);
    let store = PostgresStore::builder(pool.clone()).migrate(true).connect().await.unwrap();
    let consumer = store.open("billing", RETENTION).await.unwrap();
    // Twice: the second time the statements are prepared.
    process(&store, consumer, 0..100).await;
    process(&store, consumer, 100..200).await;
    let held = lease(&store, consumer, 200).await;
    let (tx, mut lent) = store.begin().await.unwrap();
    drop(tx);
    store.record_in(&mut lent, &[(held, Outcome::Processed)]).await.unwrap();
    store.commit(lent).await.unwrap();
    for event in [0, 199, 200] {
        assert!(matches!(claim(&store, consumer, event, 1).await, Claim::Processed { .. }), "{event}");
    }
    let connections =
        "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE application_name = 'store'";
    assert!(number(&pool, format!("{connections} AND ssl")).await >= 2, "claims and records have one each");
    assert_eq!(number(&pool, format!("{connections} AND NOT ssl")).await, 0);
}

#[tokio::test]
async fn a_server_that_cannot_be_trusted_is_told_without_secrets() {
    let certificates = Certificates::new();
    let (cluster, plain) = tokio::join!(with_tls(&certificates), Cluster::start(&[]));
    for (what, ca, host, cluster, kind, says) in [
        // A certificate may have run out while the service runs, and be renewed: what is asked then is asked again.
        ("another authority", "other.pem", "localhost", &cluster, ErrorKind::Unavailable, "certificate"),
        ("another name", "ca.pem", "127.0.0.1", &cluster, ErrorKind::Unavailable, "certificate"),
        ("a server without TLS", "ca.pem", "localhost", &plain, ErrorKind::Configuration, "TLS"),
    ] {
        let pool = verified(&certificates, ca, host, cluster);
        let error = PostgresStore::builder(pool).migrate(true).connect().await.expect_err(what);
        assert_eq!(error.kind(), kind, "{what}: {error}");
        assert!(error.to_string().contains(says), "{what}: {error}");
        assert!(!format!("{error} {error:?}").contains(CANARY), "{what}: {error:?}");
    }
}
