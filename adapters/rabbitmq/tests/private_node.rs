//! What needs a server of its own: alarms, its consumer timeout, a restart, users with few rights.
//!
//! The node is started once, by `scripts/brokers` on ports and in a folder of its own, and ended with the last test that
//! holds it. One test at a time uses it.

mod rabbit;

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use hapax::{Broker, ErrorKind, SecretUrl, Settlement};
use hapax_rabbitmq::{RabbitBroker, Topology};
use rabbit::{GROUP, Rabbit, ids, letter, limits, receive, settle, soon};
use tokio::time::{Instant, timeout};

/// As long as a loaded machine needs to start a node.
const NODE_DEADLINE: Duration = Duration::from_secs(120);

const USUAL_WATERMARK: &[&str] = &["set_vm_memory_high_watermark", "absolute", "1GB"];
const USUAL_TIMEOUT: &[&str] = &[
    "eval",
    "application:set_env(rabbit, consumer_timeout, 1800000), application:set_env(rabbit, channel_tick_interval, 60000).",
];

static NODE: Mutex<Weak<Node>> = Mutex::new(Weak::new());
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

struct Node {
    base: u16,
    data: PathBuf,
}

impl Node {
    fn get() -> Arc<Self> {
        let mut node = NODE.lock().expect("no test panics while it starts the node");
        if let Some(running) = node.upgrade() {
            return running;
        }
        // Below the ports that the system hands out, and all of the set's must be free.
        let free =
            |base: &u16| [369, 672, 673].iter().all(|port| TcpListener::bind(("127.0.0.1", base + port)).is_ok());
        let base = (0..12).map(|n| 20_000 + n * 1_000).find(free).expect("twelve sets of ports, and none is free");
        let data = std::env::temp_dir().join(format!("hapax-rabbitmq-{}", std::process::id()));
        let started = Arc::new(Self { base, data });
        started.script(&["up", "rabbitmq"]);
        *node = Arc::downgrade(&started);
        started
    }

    fn script(&self, arguments: &[&str]) -> String {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/brokers");
        let mut command = Command::new("timeout");
        command.arg(NODE_DEADLINE.as_secs().to_string()).arg(script).args(arguments).stdin(Stdio::null());
        command.env("HAPAX_BROKERS_PORT", self.base.to_string()).env("HAPAX_BROKERS_DATA", &self.data);
        let output = command.output().expect("the script runs");
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Off the runtime's thread: it takes Erlang seconds to start, and this test's connections have heartbeats to send.
    async fn rabbitmqctl(self: &Arc<Self>, arguments: &[&str]) {
        let node = Arc::clone(self);
        let words: Vec<String> = ["rabbitmqctl"].iter().chain(arguments).map(ToString::to_string).collect();
        let told = tokio::task::spawn_blocking(move || {
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            node.script(&words)
        });
        told.await.expect("the script succeeds");
    }

    fn url(&self, user: &str) -> SecretUrl {
        SecretUrl::parse(format!("amqp://{user}:{user}@127.0.0.1:{}/%2f", self.base + 672)).expect("a url")
    }

    /// A queue of its own on this node.
    fn queue(&self) -> Rabbit {
        Rabbit::on(self.url("hapax"))
    }
}

/// What a test that fails would leave behind, for all that come after it.
struct Undo(Arc<Node>, &'static [&'static str]);

impl Drop for Undo {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let words = [&["rabbitmqctl"], self.1].concat();
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.0.script(&words)));
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.script(&["down", "--wipe"])));
        if ended.is_ok() {
            let _ = std::fs::remove_dir_all(&self.data);
        }
    }
}

/// RabbitMQ stops reading from connections that publish while it is short of memory or disk. Dead letters and retries wait,
/// bounded; deliveries and acks, on a connection of their own, go on.
#[tokio::test]
async fn a_blocked_connection_is_back_pressure() {
    let (node, _turn) = (Node::get(), TURN.lock().await);
    let rabbit = node.queue();
    let broker = rabbit.builder().answer_timeout(Duration::from_secs(2)).build().expect("the settings hold");
    broker.open(limits(64)).await.expect("the broker opens");
    rabbit.publish(0..3).await;
    let held = receive(&broker, 2).await;
    let undo = Undo(Arc::clone(&node), USUAL_WATERMARK);
    node.rabbitmqctl(&["set_vm_memory_high_watermark", "absolute", "1"]).await;
    for attempt in 1.. {
        let error = settle(&broker, held[0].receipt, letter()).await.expect_err("publishers are blocked");
        assert!(error.is_retryable(), "{error}");
        if error.to_string().contains("RabbitMQ blocks publishers") {
            break;
        }
        assert!(attempt < 4, "{error}");
    }
    settle(&broker, held[1].receipt, Settlement::Ack).await.expect("acks go on");
    assert_eq!(receive(&broker, 1).await.len(), 1, "deliveries go on");
    assert!(held[0].session.is_live());
    node.rabbitmqctl(USUAL_WATERMARK).await;
    drop(undo);
    let unblocked = Instant::now();
    while let Err(error) = settle(&broker, held[0].receipt, letter()).await {
        assert!(unblocked.elapsed() < rabbit::SOON, "{error}");
    }
    broker.close().await.expect("it closes");
    assert!(rabbit.messages(&rabbit.dead()).await >= Some(1));
}

/// Else what stands beside it in the batch would be sent again with each try, for as long as that lasts.
#[tokio::test]
async fn a_place_that_never_confirms_spares_its_neighbours() {
    let (node, _turn) = (Node::get(), TURN.lock().await);
    let rabbit = node.queue();
    let broker = rabbit.builder().answer_timeout(Duration::from_secs(2)).build().expect("the settings hold");
    broker.open(limits(64)).await.expect("the broker opens");
    rabbit.publish(0..2).await;
    let held = receive(&broker, 2).await;
    let process = |verb: &str| format!("sys:{verb}(list_to_atom(\"%2F_{}\")).", rabbit.dead());
    node.rabbitmqctl(&["eval", &process("suspend")]).await;
    let retry = Settlement::Retry { after: Duration::from_secs(3) };
    let batch = [(held[0].receipt, letter()), (held[1].receipt, retry)];
    let answers = soon("settle", broker.settle(&batch)).await;
    assert!(answers[0].as_ref().is_err_and(hapax::Error::is_retryable), "{answers:?}");
    assert!(answers[1].is_ok(), "{answers:?}");
    node.rabbitmqctl(&["eval", &process("resume")]).await;
    settle(&broker, held[0].receipt, letter()).await.expect("it is set aside");
    assert_eq!(ids(&receive(&broker, 1).await), ["1"]);
    broker.close().await.expect("it closes");
}

/// What goes to places that are silent waits by itself, for a bounded time, and is settled once they answer again.
#[tokio::test]
async fn silent_places_hold_up_nobody_else() {
    let (node, _turn) = (Node::get(), TURN.lock().await);
    let rabbit = node.queue();
    let patience = Duration::from_secs(2);
    let broker = rabbit.builder().answer_timeout(patience).build().expect("the settings hold");
    broker.open(limits(64)).await.expect("the broker opens");
    rabbit.publish(0..12).await;
    let held = receive(&broker, 12).await;
    let process = |verb: &str, queue: &str| format!("sys:{verb}(list_to_atom(\"%2F_{queue}\")).");
    let silent = [rabbit.dead(), rabbit.wait("1500ms"), rabbit.wait("3s")];
    for queue in &silent {
        node.rabbitmqctl(&["eval", &process("suspend", queue)]).await;
    }
    let batch = [
        (held[0].receipt, letter()),
        (held[1].receipt, Settlement::Retry { after: Duration::from_millis(1_500) }),
        (held[2].receipt, Settlement::Retry { after: Duration::from_secs(3) }),
    ];
    for _ in 0..2 {
        let asked = Instant::now();
        let silent = async {
            let answers = soon("settle", broker.settle(&batch)).await;
            assert!(answers.iter().all(|it| it.as_ref().is_err_and(hapax::Error::is_retryable)), "{answers:?}");
            // Declared one after another, and each waited for, they would take many times that.
            assert!(asked.elapsed() < patience + Duration::from_millis(2_500), "{:?}", asked.elapsed());
        };
        silent.await;
    }
    let asked = Instant::now();
    let again = async {
        let _ = soon("settle", broker.settle(&batch)).await;
    };
    let sound = async {
        for (at, delivery) in held[3..].iter().enumerate() {
            tokio::time::sleep(Duration::from_millis(10)).await;
            let retry = Settlement::Retry { after: Duration::from_millis(500) };
            let settlement = if at % 2 == 0 { retry } else { Settlement::Ack };
            settle(&broker, delivery.receipt, settlement).await.expect("it waits for nobody");
        }
        assert!(asked.elapsed() < patience, "{:?}", asked.elapsed());
    };
    tokio::join!(again, sound);
    for queue in &silent {
        node.rabbitmqctl(&["eval", &process("resume", queue)]).await;
    }
    for (receipt, settlement) in batch {
        settle(&broker, receipt, settlement).await.expect("it is placed");
    }
    broker.close().await.expect("it closes");
}

/// Bug 47 (ruby-amqp/bunny#681): the server closed the channel over an unsettled delivery, and nobody noticed.
#[tokio::test]
async fn consumer_timeout_is_surfaced() {
    let (node, _turn) = (Node::get(), TURN.lock().await);
    let short =
        "application:set_env(rabbit, consumer_timeout, 1000), application:set_env(rabbit, channel_tick_interval, 500).";
    let undo = Undo(Arc::clone(&node), USUAL_TIMEOUT);
    node.rabbitmqctl(&["eval", short]).await;
    let rabbit = node.queue();
    let broker = rabbit.opened().await;
    rabbit.publish([1]).await;
    let old = receive(&broker, 1).await.remove(0);
    soon("the server takes it back", old.session.not_live()).await;
    let kind = settle(&broker, old.receipt, Settlement::Ack).await.map_err(|error| error.kind());
    assert_eq!(kind, Err(ErrorKind::Stale));
    let again = receive(&broker, 1).await.remove(0);
    assert_eq!(again.message, old.message);
    settle(&broker, again.receipt, Settlement::Ack).await.expect("the new session settles");
    broker.close().await.expect("it closes");
    node.rabbitmqctl(USUAL_TIMEOUT).await;
    drop(undo);
}

/// Killed with -9 and started again: nothing confirmed is lost, what was unsettled comes again, what waits is not forgotten, and
/// consumption resumes by itself within ten seconds.
#[tokio::test]
async fn a_killed_server_that_is_back_is_consumed_again() {
    let (node, _turn) = (Node::get(), TURN.lock().await);
    let rabbit = node.queue();
    let broker = rabbit.opened().await;
    // RabbitMQ 3.10 tells its directory of queues (a DETS table) only after some seconds; a queue that was created just before
    // the kill is lost with what was confirmed in it.
    tokio::time::sleep(Duration::from_secs(6)).await;
    rabbit.publish(0..20).await;
    let held = receive(&broker, 20).await;
    settle(&broker, held[0].receipt, Settlement::Ack).await.expect("it is acked");
    settle(&broker, held[1].receipt, Settlement::Retry { after: Duration::from_secs(3) }).await.expect("it waits");
    settle(&broker, held[2].receipt, letter()).await.expect("it is set aside");
    let restarting = {
        let node = Arc::clone(&node);
        tokio::task::spawn_blocking(move || node.script(&["restart", "rabbitmq"]))
    };
    timeout(NODE_DEADLINE, restarting).await.expect("it starts in time").expect("it starts");
    let back = Instant::now();
    let again = receive(&broker, 18).await;
    assert!(back.elapsed() < Duration::from_secs(10), "after {:?}", back.elapsed());
    let again: std::collections::BTreeSet<_> = ids(&again).into_iter().collect();
    let expected = (0..20).filter(|id| ![0, 2].contains(id)).map(|id: usize| id.to_string()).collect();
    assert_eq!(again, expected);
    assert_eq!(rabbit.dead_letters().await.len(), 1);
    broker.close().await.expect("it closes");
}

/// The rights that docs/rabbitmq.md lists, and no more.
#[tokio::test]
async fn least_rights_suffice() {
    let (node, _turn) = (Node::get(), TURN.lock().await);
    let rabbit = node.queue();
    let queue = rabbit.queue.clone();
    let own = format!("^{queue}(\\..*)?$");
    let with_default = format!("^(amq\\.default|{queue}(\\..*)?)$");
    for (user, configure, write, read) in [
        // With Topology::Check: consume the queue, publish through the default exchange.
        ("runs", "^$", "^amq\\.default$", &*format!("^{queue}$")),
        // With Topology::Create: the queues of the group too, which dead-letter through the default exchange.
        ("creates", &*own, &*with_default, &*own),
        ("may_nothing", "^$", "^$", "^$"),
    ] {
        node.rabbitmqctl(&["add_user", user, user]).await;
        node.rabbitmqctl(&["set_permissions", user, configure, write, read]).await;
    }
    let as_user =
        |user: &str| RabbitBroker::builder(node.url(user), &*queue, GROUP).retry_steps([Duration::from_millis(500)]);
    let refused = as_user("runs").build().expect("ok").open(limits(8)).await.expect_err("it may not create");
    assert_eq!(refused.kind(), ErrorKind::Configuration);
    assert!(refused.to_string().contains("docs/rabbitmq.md"), "{refused}");

    as_user("creates").build().expect("ok").declare().await.expect("these rights create everything");
    for (user, topology) in [("runs", Topology::Check), ("creates", Topology::Create)] {
        let broker = as_user(user).topology(topology).build().expect("ok");
        broker.open(limits(8)).await.expect("these rights suffice");
        broker.publisher().close().await;
        rabbit.publish([1]).await;
        let held = receive(&broker, 1).await.remove(0);
        settle(&broker, held.receipt, Settlement::Retry { after: Duration::from_millis(1) })
            .await
            .expect("it may wait");
        assert!(broker.waiting_for_retry().await.is_ok());
        let held = receive(&broker, 1).await.remove(0);
        settle(&broker, held.receipt, letter()).await.expect("it may be set aside");
        broker.close().await.expect("it closes");
    }
    let nothing = as_user("may_nothing").topology(Topology::Check).build().expect("ok");
    let refused = nothing.open(limits(8)).await.expect_err("it may not read");
    assert_eq!(refused.kind(), ErrorKind::Configuration, "{refused}");
    assert!(refused.to_string().contains(&queue), "{refused}");
}
