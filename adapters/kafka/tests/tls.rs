//! TLS and logins against a server of the test's own: SASL needs only the feature `tls`, but for Kerberos.

mod support;

use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hapax::{Broker, ErrorKind, Outgoing, Publisher, Settlement};
use hapax_testkit::servers::certificates::Certificates;
use support::{SOON, Topic, ack, event, ids, limits, receive, settle};
use tokio::time::timeout;
use tracing_subscriber::filter::LevelFilter;

const PASSWORD: &str = "c4nary-right";
const WRONG: &str = "c4nary-wrong";
/// In both.
const CANARY: &str = "c4nary";

/// Kafka with a listener that asks for TLS and a login beside the plain one.
struct Node {
    base: u16,
    data: PathBuf,
    certificates: Certificates,
}

impl Node {
    fn start() -> Self {
        // Below the ports that the system hands out, and all of the set's must be free.
        let free = |base: &u16| [92, 93, 94].iter().all(|port| TcpListener::bind(("127.0.0.1", base + port)).is_ok());
        let base = (0..12).map(|n| 20_000 + n * 1_000).find(free).expect("twelve sets of ports, and none is free");
        let certificates = Certificates::new();
        let node = Self { base, data: certificates.path("brokers"), certificates };
        let home = node.data.join("kafka");
        std::fs::create_dir_all(&home).expect("a folder");
        std::fs::write(home.join("own.properties"), node.properties()).expect("a file");
        let user = format!("SCRAM-SHA-256=[name=shop,password={PASSWORD}]\n");
        std::fs::write(home.join("own.users"), user).expect("a file");
        node.script(&["up", "kafka"]);
        node
    }

    fn properties(&self) -> String {
        let (plain, controller, secured) = (self.base + 92, self.base + 93, self.base + 94);
        let both = self.certificates.read("localhost.key") + &self.certificates.read("localhost.pem");
        let store = self.certificates.path("store.pem");
        std::fs::write(&store, both).expect("a file");
        let (kafka, own) = ("org.apache.kafka.common.security", "listener.name.secured");
        [
            format!("listeners=PLAINTEXT://127.0.0.1:{plain},CONTROLLER://127.0.0.1:{controller},SECURED://127.0.0.1:{secured}"),
            format!("advertised.listeners=PLAINTEXT://127.0.0.1:{plain},SECURED://localhost:{secured}"),
            "listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SECURED:SASL_SSL".to_owned(),
            format!("{own}.ssl.keystore.type=PEM\n{own}.ssl.keystore.location={}", store.display()),
            format!("{own}.sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256"),
            format!("{own}.plain.sasl.jaas.config={kafka}.plain.PlainLoginModule required user_shop=\"{PASSWORD}\";"),
            format!("{own}.scram-sha-256.sasl.jaas.config={kafka}.scram.ScramLoginModule required;\n"),
        ]
        .join("\n")
    }

    fn script(&self, arguments: &[&str]) {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/brokers");
        let mut command = Command::new("timeout");
        command.args(["120", script]).args(arguments).stdin(Stdio::null());
        command.env("HAPAX_BROKERS_PORT", self.base.to_string()).env("HAPAX_BROKERS_DATA", &self.data);
        let output = command.output().expect("the script runs");
        assert!(output.status.success(), "{arguments:?}: {output:?}");
    }

    /// A topic by way of the listener that asks for a login.
    fn topic(&self, host: &str, ca: &Path, mechanism: &str, password: &str) -> Topic {
        let (secured, ca) = (self.base + 94, ca.display());
        let url = format!("kafkas://shop:{password}@{host}:{secured}/?ssl.ca.location={ca}&sasl.mechanism={mechanism}");
        let mut topic = Topic::at(url.parse().expect("a url"), 1);
        topic.step = Duration::from_secs(1);
        topic
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // The folder goes with the certificates.
        let _ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.script(&["down", "--wipe"])));
    }
}

/// Collects everything that anybody logs.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("no panic while logging").extend_from_slice(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Receives, retries, sets aside: the member, the producer and the one that looks at topics all log in.
async fn a_life(topic: &Topic) {
    let broker = topic.opened().await;
    topic.publish(0..3).await;
    let held = receive(&broker, 3).await;
    settle(&broker, &held[0], Settlement::Retry { after: topic.step }).await;
    ack(&broker, &held[1..]).await;
    let again = receive(&broker, 1).await;
    assert_eq!(ids(&again), ids(&held[..1]));
    ack(&broker, &again).await;
    broker.close().await.expect("it closes");
}

/// The consumer says why, the publisher that nothing was sent, and nobody says the password.
async fn refused(what: &str, says: &str, topic: Topic) {
    let broker = topic.broker();
    let error = timeout(SOON, broker.open(limits())).await.expect("it answers").expect_err(what);
    // A certificate may have run out, or a password be changed, while the service runs: what is asked then is asked again.
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{what}: {error}");
    assert!(error.to_string().contains(says), "{what}: {error}");
    let sent = topic.publisher().publish(vec![Outgoing::new(event(1))]).await.remove(0).expect_err(what);
    let shown = format!("{error} {error:?} {sent} {sent:?} {broker:?} {:?} {:?}", topic.builder(), topic.publisher());
    assert!(!shown.contains(CANARY), "{what}: {shown}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_goes_over_tls_with_a_login_that_is_in_no_text_and_no_log() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_max_level(LevelFilter::TRACE);
    subscriber.with_writer(move || writer.clone()).init();

    let node = Node::start();
    let (ca, other) = (node.certificates.path("ca.pem"), node.certificates.path("other.pem"));
    for mechanism in ["PLAIN", "SCRAM-SHA-256"] {
        a_life(&node.topic("localhost", &ca, mechanism, PASSWORD)).await;
    }
    let (unverified, unknown) = ("certificate verify failed", "Authentication failed");
    // Side by side: each takes as long as the patience of `open` and of `publish`.
    tokio::join!(
        refused("another authority", unverified, node.topic("localhost", &other, "PLAIN", PASSWORD)),
        refused("another name", unverified, node.topic("127.0.0.1", &ca, "PLAIN", PASSWORD)),
        refused("a wrong password", unknown, node.topic("localhost", &ca, "PLAIN", WRONG)),
        refused("a wrong password for SCRAM", unknown, node.topic("localhost", &ca, "SCRAM-SHA-256", WRONG)),
    );
    let logged = String::from_utf8_lossy(&log.0.lock().expect("no panic while logging")).into_owned();
    assert!(logged.contains(unverified) && logged.contains(unknown), "the client's own log is looked at too");
    assert_eq!(logged.lines().find(|line| line.contains(CANARY)), None);
}
