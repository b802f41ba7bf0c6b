//! The model of a stream and its group (`hapax_testkit::servers::stream`) against the server: generated commands, the same
//! answers, the same pending list. What the adapter takes for granted is what the server does.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use hapax_testkit::servers::Server;
use hapax_testkit::servers::stream::{Answer, Command, Pending, Stream};
use proptest::prelude::*;
use redis::Value;

fn command() -> impl Strategy<Value = Command> {
    let (consumer, entry) = (1u8..4, 1u64..12);
    prop_oneof![
        4 => Just(Command::Add),
        4 => (consumer.clone(), 1usize..4).prop_map(|(consumer, count)| Command::Read { consumer, count }),
        1 => consumer.clone().prop_map(|consumer| Command::ReadOwn { consumer }),
        3 => entry.clone().prop_map(|entry| Command::Ack { entry }),
        2 => (consumer.clone(), entry.clone(), any::<bool>())
            .prop_map(|(consumer, entry, just_id)| Command::Claim { consumer, entry, just_id }),
        1 => consumer.clone().prop_map(|consumer| Command::ClaimAll { consumer }),
        1 => entry.prop_map(|entry| Command::Delete { entry }),
        1 => consumer.prop_map(|consumer| Command::Forget { consumer }),
    ]
}

/// The server's side: a stream of its own, and the server's ids by number.
struct Real {
    connection: redis::Connection,
    key: String,
    ids: BTreeMap<u64, String>,
}

impl Real {
    fn new() -> Self {
        static STREAMS: AtomicU64 = AtomicU64::new(0);
        let number = STREAMS.fetch_add(1, Ordering::Relaxed);
        let key = format!("hapax-model-{}-{number}", std::process::id());
        let client = redis::Client::open(Server::Redis.url()).expect("an address");
        let mut connection = client.get_connection().expect("Redis answers");
        let mut create = redis::cmd("XGROUP");
        create.arg("CREATE").arg(&key).arg("g").arg("0").arg("MKSTREAM");
        create.exec(&mut connection).expect("a group");
        Self { connection, key, ids: BTreeMap::new() }
    }

    /// An id that no entry has, where the number has none.
    fn id(&self, entry: u64) -> String {
        self.ids.get(&entry).cloned().unwrap_or_else(|| format!("1-{entry}"))
    }

    fn number(&self, id: &str) -> u64 {
        *self.ids.iter().find(|(_, other)| *other == id).expect("an entry of ours").0
    }

    fn ask(&mut self, name: &str, arguments: &[&str]) -> Value {
        redis::cmd(name).arg(arguments).query(&mut self.connection).expect("the server takes the command")
    }

    fn apply(&mut self, command: &Command) -> Answer {
        let key = self.key.clone();
        match *command {
            Command::Add => {
                let id = text(self.ask("XADD", &[&key, "*", "f", "v"]));
                let entry = self.ids.len() as u64 + 1;
                self.ids.insert(entry, id);
                Answer::Number(entry)
            }
            Command::Read { consumer, count } => {
                let (consumer, count) = (consumer.to_string(), count.to_string());
                let read = self.ask("XREADGROUP", &["GROUP", "g", &consumer, "COUNT", &count, "STREAMS", &key, ">"]);
                Answer::Entries(self.of_stream(read))
            }
            Command::ReadOwn { consumer } => {
                let consumer = consumer.to_string();
                let read = self.ask("XREADGROUP", &["GROUP", "g", &consumer, "STREAMS", &key, "0"]);
                Answer::Entries(self.of_stream(read))
            }
            Command::Ack { entry } => {
                let id = self.id(entry);
                Answer::Number(number(&self.ask("XACK", &[&key, "g", &id])))
            }
            Command::Claim { consumer, entry, just_id } => {
                let (id, consumer) = (self.id(entry), consumer.to_string());
                let mut arguments = vec![key.as_str(), "g", &consumer, "0", &id];
                arguments.extend(just_id.then_some("JUSTID"));
                let claimed = list(self.ask("XCLAIM", &arguments));
                let ids = claimed.into_iter().map(|claimed| if just_id { text(claimed) } else { entry_of(claimed).0 });
                Answer::Entries(ids.map(|id| (self.number(&id), true)).collect())
            }
            Command::ClaimAll { consumer } => {
                let consumer = consumer.to_string();
                let mut answer = list(self.ask("XAUTOCLAIM", &[&key, "g", &consumer, "0", "0-0"])).into_iter().skip(1);
                let mut next = || list(answer.next().expect("three parts"));
                let entries = next().into_iter().map(|entry| self.number(&entry_of(entry).0)).collect();
                let gone = next().into_iter().map(|id| self.number(&text(id))).collect();
                Answer::Taken { entries, gone }
            }
            Command::Delete { entry } => {
                let id = self.id(entry);
                Answer::Number(number(&self.ask("XDEL", &[&key, &id])))
            }
            Command::Forget { consumer } => {
                let consumer = consumer.to_string();
                Answer::Number(number(&self.ask("XGROUP", &["DELCONSUMER", &key, "g", &consumer])))
            }
        }
    }

    fn pending(&mut self) -> BTreeMap<u64, Pending> {
        let key = self.key.clone();
        let pending = list(self.ask("XPENDING", &[&key, "g", "-", "+", "1000"]));
        let one = |entry: Value| {
            let mut parts = list(entry).into_iter();
            let mut next = || parts.next().expect("four parts");
            let (id, consumer) = (text(next()), text(next()).parse().expect("a number"));
            let count = parts.nth(1).as_ref().map(number).expect("a count");
            (self.number(&id), Pending { consumer, count })
        };
        pending.into_iter().map(one).collect()
    }

    /// The entries of an answer about one stream, and whether each has its content.
    fn of_stream(&self, answer: Value) -> Vec<(u64, bool)> {
        if matches!(answer, Value::Nil) {
            return Vec::new();
        }
        let stream = list(answer).into_iter().next().expect("one stream");
        let entries = list(list(stream).into_iter().nth(1).expect("its entries"));
        entries.into_iter().map(entry_of).map(|(id, there)| (self.number(&id), there)).collect()
    }
}

impl Drop for Real {
    fn drop(&mut self) {
        let _left_to_the_server = redis::cmd("DEL").arg(&self.key).exec(&mut self.connection).is_err();
    }
}

fn list(value: Value) -> Vec<Value> {
    match value {
        Value::Array(values) => values,
        other => panic!("a list, not {other:?}"),
    }
}

fn text(value: Value) -> String {
    match value {
        Value::BulkString(bytes) => String::from_utf8(bytes).expect("a text"),
        Value::SimpleString(text) => text,
        other => panic!("a text, not {other:?}"),
    }
}

fn number(value: &Value) -> u64 {
    match value {
        Value::Int(number) => u64::try_from(*number).expect("a count"),
        other => panic!("a number, not {other:?}"),
    }
}

/// Id of an entry, and whether it has its content.
fn entry_of(value: Value) -> (String, bool) {
    let mut parts = list(value).into_iter();
    let id = text(parts.next().expect("an id"));
    (id, !matches!(parts.next(), None | Some(Value::Nil)))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_server_does_what_the_model_says(commands in prop::collection::vec(command(), 1..60)) {
        let (mut model, mut real) = (Stream::default(), Real::new());
        for (step, command) in commands.iter().enumerate() {
            prop_assert_eq!(real.apply(command), model.apply(command), "step {}: {:?}", step, command);
            prop_assert_eq!(&real.pending(), model.pending(), "pending after step {}: {:?}", step, command);
        }
    }
}

/// The one that design rests on, by itself: an old owner's late XACK takes away what another has.
#[test]
fn a_foreign_ack_takes_the_entry_away() {
    let (mut model, mut real) = (Stream::default(), Real::new());
    let commands = [
        Command::Add,
        Command::Read { consumer: 1, count: 1 },
        Command::Claim { consumer: 2, entry: 1, just_id: false },
        Command::Ack { entry: 1 },
        Command::ClaimAll { consumer: 2 },
    ];
    let answers: Vec<_> = commands.iter().map(|command| (real.apply(command), model.apply(command))).collect();
    assert!(answers.iter().all(|(real, model)| real == model), "{answers:?}");
    assert_eq!(answers[3].0, Answer::Number(1), "nobody asks whose it was");
    assert_eq!(answers[4].0, Answer::Taken { entries: Vec::new(), gone: Vec::new() }, "and it is gone");
}
