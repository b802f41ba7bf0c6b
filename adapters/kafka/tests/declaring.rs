//! Declaring topics at servers that do not know at once what was just created: what `check` creates stays, so it must not
//! create it too small.
//!
//! A real server knows within milliseconds; this one when the test says so. Nothing about Kafka is proved here, only what
//! this adapter does about answers that any cluster gives.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use bytes::{Bytes, BytesMut};
use hapax_kafka::{Declare, KafkaBroker};
use kafka_protocol::error::ResponseError;
use kafka_protocol::messages::api_versions_response::ApiVersion;
use kafka_protocol::messages::create_topics_response::CreatableTopicResult;
use kafka_protocol::messages::describe_configs_response::{DescribeConfigsResourceResult, DescribeConfigsResult};
use kafka_protocol::messages::metadata_response::{
    MetadataResponseBroker, MetadataResponsePartition, MetadataResponseTopic,
};
use kafka_protocol::messages::{
    ApiVersionsRequest, ApiVersionsResponse, BrokerId, CreateTopicsRequest, CreateTopicsResponse,
    DescribeConfigsRequest, DescribeConfigsResponse, MetadataRequest, MetadataResponse, RequestHeader, ResponseHeader,
};
use kafka_protocol::protocol::{Decodable, Encodable, HeaderVersion, Request, StrBytes};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// What this server's topics take unless they say something else.
const TAKEN: u64 = 6_000_000;
/// What the headers of retries and dead letters have in addition.
const HEADERS: u64 = 64 << 10;
const TOPIC_RESOURCE: i8 = 2;
const TOPIC_CONFIG: i8 = 1;

#[derive(Debug, Default)]
struct State {
    /// What each topic takes, and how often it is still unknown when it is described.
    topics: BTreeMap<String, (u64, u32)>,
    /// How often each new one is.
    unknown: u32,
    /// Whether topics are described at all.
    silent: bool,
}

/// A cluster of one that answers the four questions of `check`.
#[derive(Clone)]
struct Server {
    port: u16,
    state: Arc<Mutex<State>>,
}

impl Server {
    async fn start(state: State) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let server = Self { port, state: Arc::new(Mutex::new(state)) };
        let serving = server.clone();
        // Until the runtime of the test ends.
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serving.clone().serve(stream));
            }
        });
        server
    }

    async fn serve(self, mut stream: TcpStream) {
        while let Ok(length) = stream.read_u32().await {
            let mut frame = vec![0; length as usize];
            if stream.read_exact(&mut frame).await.is_err() {
                return;
            }
            let Some(answer) = self.answer(Bytes::from(frame)) else { continue };
            let length = u32::try_from(answer.len()).expect("a small answer");
            if stream.write_u32(length).await.is_err() || stream.write_all(&answer).await.is_err() {
                return;
            }
        }
    }

    fn answer(&self, mut frame: Bytes) -> Option<BytesMut> {
        let (key, version) = (i16::from_be_bytes([frame[0], frame[1]]), i16::from_be_bytes([frame[2], frame[3]]));
        let mut state = self.state.lock().expect("no panic");
        match key {
            ApiVersionsRequest::KEY => {
                // A client of a later version takes an answer of version 0, and asks no more than it says.
                let (id, _) = read::<ApiVersionsRequest>(&mut frame, version);
                Some(write(&versions(), id, version))
            }
            MetadataRequest::KEY => {
                let (id, asked) = read::<MetadataRequest>(&mut frame, version);
                Some(write(&self.metadata(&state, &asked), id, version))
            }
            CreateTopicsRequest::KEY => {
                let (id, asked) = read::<CreateTopicsRequest>(&mut frame, version);
                Some(write(&created(&mut state, &asked), id, version))
            }
            DescribeConfigsRequest::KEY => {
                let (id, asked) = read::<DescribeConfigsRequest>(&mut frame, version);
                (!state.silent).then(|| write(&described(&mut state, &asked), id, version))
            }
            key => panic!("nobody asks with {key}"),
        }
    }

    fn metadata(&self, state: &State, asked: &MetadataRequest) -> MetadataResponse {
        let partition = MetadataResponsePartition::default()
            .with_leader_id(BrokerId(1))
            .with_replica_nodes(vec![BrokerId(1)])
            .with_isr_nodes(vec![BrokerId(1)]);
        let topics = asked.topics.iter().flatten().filter_map(|topic| topic.name.clone()).map(|name| {
            let known = state.topics.contains_key(name.as_str());
            let error = if known { 0 } else { ResponseError::UnknownTopicOrPartition.code() };
            let partitions = if known { vec![partition.clone()] } else { Vec::new() };
            MetadataResponseTopic::default().with_name(Some(name)).with_error_code(error).with_partitions(partitions)
        });
        let broker = MetadataResponseBroker::default()
            .with_node_id(BrokerId(1))
            .with_host(StrBytes::from_static_str("127.0.0.1"))
            .with_port(i32::from(self.port));
        MetadataResponse::default()
            .with_brokers(vec![broker])
            .with_controller_id(BrokerId(1))
            .with_topics(topics.collect())
    }

    fn takes(&self) -> Vec<u64> {
        self.state.lock().expect("no panic").topics.values().map(|(most, _)| *most).collect()
    }

    /// A member of a group, with one topic for retries and one for dead letters.
    fn broker(&self) -> KafkaBroker {
        let url = format!("kafka://127.0.0.1:{}", self.port).parse().expect("a url");
        let builder = KafkaBroker::builder(url, "billing", ["orders"]).declare(Declare::partitions(1));
        builder.retry_steps([std::time::Duration::from_secs(5)]).build().expect("good settings")
    }
}

fn read<R: Request>(frame: &mut Bytes, version: i16) -> (i32, R) {
    let header = RequestHeader::decode(frame, R::header_version(version)).expect("a header");
    (header.correlation_id, R::decode(frame, version).expect("a request of this version"))
}

fn write<A: Encodable + HeaderVersion>(answer: &A, id: i32, version: i16) -> BytesMut {
    let mut frame = BytesMut::new();
    let header = ResponseHeader::default().with_correlation_id(id);
    header.encode(&mut frame, A::header_version(version)).expect("a header");
    answer.encode(&mut frame, version).expect("an answer of this version");
    frame
}

fn versions() -> ApiVersionsResponse {
    let known = [
        (ApiVersionsRequest::KEY, 0, 3),
        (MetadataRequest::KEY, 0, 9),
        (CreateTopicsRequest::KEY, 2, 4),
        (DescribeConfigsRequest::KEY, 1, 1),
    ];
    let known = known.map(|(key, least, most)| {
        ApiVersion::default().with_api_key(key).with_min_version(least).with_max_version(most)
    });
    ApiVersionsResponse::default().with_api_keys(known.to_vec())
}

fn created(state: &mut State, asked: &CreateTopicsRequest) -> CreateTopicsResponse {
    let unknown = state.unknown;
    let answers = asked.topics.iter().map(|topic| {
        let said = topic.configs.iter().find(|config| &*config.name == "max.message.bytes");
        let said = said.and_then(|config| config.value.as_ref()?.parse().ok());
        state.topics.insert(topic.name.to_string(), (said.unwrap_or(TAKEN), unknown));
        CreatableTopicResult::default().with_name(topic.name.clone())
    });
    CreateTopicsResponse::default().with_topics(answers.collect())
}

fn described(state: &mut State, asked: &DescribeConfigsRequest) -> DescribeConfigsResponse {
    let answers = asked.resources.iter().map(|resource| {
        let answer = DescribeConfigsResult::default()
            .with_resource_type(TOPIC_RESOURCE)
            .with_resource_name(resource.resource_name.clone());
        match state.topics.get_mut(&*resource.resource_name) {
            Some((most, 0)) => {
                let most = DescribeConfigsResourceResult::default()
                    .with_name(StrBytes::from_static_str("max.message.bytes"))
                    .with_config_source(TOPIC_CONFIG)
                    .with_value(Some(StrBytes::from_string(most.to_string())));
                answer.with_configs(vec![most])
            }
            found => {
                if let Some((_, unknown)) = found {
                    *unknown -= 1;
                }
                answer.with_error_code(ResponseError::UnknownTopicOrPartition.code())
            }
        }
    });
    DescribeConfigsResponse::default().with_results(answers.collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dead_letters_take_what_their_topic_takes_though_no_server_can_describe_it_at_first() {
    let server = Server::start(State { unknown: 3, ..State::default() }).await;
    server.broker().check().await.expect("the topics are created and fit");
    assert_eq!(server.takes(), [TAKEN, TAKEN + HEADERS, TAKEN + HEADERS], "orders, its dead letters, its retries");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_created_too_small_for_want_of_an_answer() {
    let server = Server::start(State { silent: true, ..State::default() }).await;
    let broker = server.broker();
    let refused = broker.check().await.expect_err("nobody says what `orders` takes");
    assert!(refused.is_retryable(), "{refused:?}");
    assert_eq!(server.takes(), [TAKEN], "only `orders` is there");
    server.state.lock().expect("no panic").silent = false;
    broker.check().await.expect("the rest is created and fits");
    assert_eq!(server.takes(), [TAKEN, TAKEN + HEADERS, TAKEN + HEADERS]);
}
