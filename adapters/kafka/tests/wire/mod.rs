//! A consumer group at the level of the protocol: each request says member and generation, and nothing is sent by itself.
//!
//! Versions are fixed: the last that names topics by name. Timeouts are longer than any test.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use hapax_testkit::servers::group::{Answer, Command};
use kafka_protocol::error::ResponseError;
use kafka_protocol::messages::describe_groups_response::DescribedGroup;
use kafka_protocol::messages::join_group_request::JoinGroupRequestProtocol;
use kafka_protocol::messages::leave_group_request::MemberIdentity;
use kafka_protocol::messages::offset_commit_request::{OffsetCommitRequestPartition, OffsetCommitRequestTopic};
use kafka_protocol::messages::offset_fetch_request::OffsetFetchRequestTopic;
use kafka_protocol::messages::{
    DeleteGroupsRequest, DescribeGroupsRequest, FindCoordinatorRequest, GroupId, HeartbeatRequest, JoinGroupRequest,
    JoinGroupResponse, LeaveGroupRequest, OffsetCommitRequest, OffsetFetchRequest, RequestHeader, ResponseHeader,
    SyncGroupRequest, TopicName,
};
use kafka_protocol::protocol::{Decodable, HeaderVersion, Request, StrBytes, encode_request_header_into_buffer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

/// How long an answer may take before a test fails.
const SOON: Duration = Duration::from_secs(20);
/// Session and rebalance: nothing ends by itself.
const NEVER_MS: i32 = 600_000;
/// What a member of the consumer protocol subscribes to: version 0, no topics, no data.
const SUBSCRIPTION: &[u8] = &[0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff];

/// A connection. The server answers its requests one after the other: a request that waits holds up all behind it.
struct Line(TcpStream);

impl Line {
    async fn open(address: &str) -> Self {
        let stream = timeout(SOON, TcpStream::connect(address)).await.expect("Kafka takes connections in time");
        let stream = stream.expect("Kafka takes connections");
        stream.set_nodelay(true).expect("a socket's setting");
        Self(stream)
    }

    async fn send<R: Request>(&mut self, request: &R, version: i16) {
        let mut frame = BytesMut::new();
        frame.put_i32(0);
        let header = RequestHeader::default().with_request_api_key(R::KEY).with_request_api_version(version);
        encode_request_header_into_buffer(&mut frame, &header).expect("a header");
        request.encode(&mut frame, version).expect("a request of this version");
        let length = u32::try_from(frame.len() - 4).expect("a small request");
        frame[..4].copy_from_slice(&length.to_be_bytes());
        self.0.write_all(&frame).await.expect("Kafka takes a request");
    }

    async fn answer<R: Request>(&mut self, version: i16) -> Option<R::Response> {
        let frame = async {
            let length = self.0.read_u32().await.expect("Kafka answers");
            let mut frame = vec![0; length as usize];
            self.0.read_exact(&mut frame).await.expect("Kafka answers in full");
            Bytes::from(frame)
        };
        let mut frame = timeout(SOON, frame).await.ok()?;
        ResponseHeader::decode(&mut frame, R::Response::header_version(version)).expect("a header");
        let answer = R::Response::decode(&mut frame, version).expect("an answer of this version");
        assert!(!frame.has_remaining(), "nothing behind the answer");
        Some(answer)
    }

    async fn ask<R: Request>(&mut self, request: &R, version: i16) -> R::Response {
        self.send(request, version).await;
        self.answer::<R>(version).await.expect("Kafka answers in time")
    }

    /// Whether there is something to read.
    async fn is_answered(&self) -> bool {
        timeout(Duration::ZERO, self.0.readable()).await.is_ok()
    }
}

/// A request whose answer may come later, on a connection of its own.
enum Waiting {
    Join { line: Line, member: u8 },
    Sync { line: Line },
}

/// What is seen of a group from outside.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Picture {
    pub(crate) state: String,
    /// Numbers where the id was told, and the names of instances.
    pub(crate) members: Vec<(Option<u8>, Option<u8>)>,
    pub(crate) offsets: BTreeMap<i32, i64>,
}

/// A group of its own on the server, with the server's ids by number.
pub(crate) struct Real {
    address: String,
    line: Line,
    group: GroupId,
    topic: TopicName,
    partitions: i32,
    ids: BTreeMap<u8, StrBytes>,
    instances: BTreeMap<u8, u8>,
    numbers: u8,
    commands: u32,
    waiting: BTreeMap<u32, Waiting>,
    /// Answers that came at once.
    answers: BTreeMap<u32, Answer>,
}

impl Real {
    pub(crate) async fn new(address: &str, group: String, topic: &str, partitions: i32) -> Self {
        let group = StrBytes::from_string(group);
        let mut line = Line::open(address).await;
        // The first that asks has the server make the topic in which it keeps offsets.
        let find = FindCoordinatorRequest::default().with_key(group.clone());
        let found = async {
            while line.ask(&find, 3).await.error_code != 0 {
                sleep(Duration::from_millis(50)).await;
            }
        };
        timeout(SOON, found).await.expect("groups have a coordinator in time");
        Self {
            address: address.to_owned(),
            line,
            group: GroupId(group),
            topic: TopicName(StrBytes::from_string(topic.to_owned())),
            partitions,
            ids: BTreeMap::new(),
            instances: BTreeMap::new(),
            numbers: 0,
            commands: 0,
            waiting: BTreeMap::new(),
            answers: BTreeMap::new(),
        }
    }

    /// Sends one command. Of those that may wait, the answer is left where it is.
    pub(crate) async fn send(&mut self, command: &Command) -> Result<(), String> {
        self.commands += 1;
        let (group, number) = (self.group.clone(), self.commands);
        let answer = match *command {
            Command::Enter { instance } => {
                self.numbers += 1;
                self.instances.extend(instance.map(|instance| (self.numbers, instance)));
                self.join(self.numbers, StrBytes::default()).await;
                return Ok(());
            }
            Command::Join { member } => {
                self.join(member, self.id(member)).await;
                return Ok(());
            }
            Command::Sync { member, generation } => {
                let request = SyncGroupRequest::default()
                    .with_group_id(group)
                    .with_generation_id(generation)
                    .with_member_id(self.id(member))
                    .with_group_instance_id(self.instance(member))
                    .with_protocol_type(Some("consumer".into()))
                    .with_protocol_name(Some("range".into()));
                let mut line = Line::open(&self.address).await;
                line.send(&request, 5).await;
                self.waiting.insert(number, Waiting::Sync { line });
                return Ok(());
            }
            Command::Heartbeat { member, generation } => {
                let request = HeartbeatRequest::default()
                    .with_group_id(group)
                    .with_generation_id(generation)
                    .with_member_id(self.id(member))
                    .with_group_instance_id(self.instance(member));
                plain(self.line.ask(&request, 4).await.error_code)
            }
            Command::Commit { member, generation, partition, offset } => {
                let partition = OffsetCommitRequestPartition::default()
                    .with_partition_index(partition)
                    .with_committed_offset(offset)
                    .with_committed_metadata(Some(StrBytes::default()));
                let topic =
                    OffsetCommitRequestTopic::default().with_name(self.topic.clone()).with_partitions(vec![partition]);
                let request = OffsetCommitRequest::default()
                    .with_group_id(group)
                    .with_generation_id_or_member_epoch(generation)
                    .with_member_id(member.map(|member| self.id(member)).unwrap_or_default())
                    .with_group_instance_id(member.and_then(|member| self.instance(member)))
                    .with_topics(vec![topic]);
                plain(self.line.ask(&request, 8).await.topics[0].partitions[0].error_code)
            }
            Command::Leave { member } => {
                let (id, instance) = (self.id(member), self.instance(member));
                self.leave(id, instance).await
            }
        };
        self.answers.insert(number, answer?);
        Ok(())
    }

    /// The answer to a command, and who leads where it names it.
    pub(crate) async fn answer(&mut self, command: u32) -> Result<(Answer, Option<StrBytes>), String> {
        if let Some(answer) = self.answers.remove(&command) {
            return Ok((answer, None));
        }
        let late = || format!("no answer to {command}, where the model says that there is one");
        match self.waiting.remove(&command).ok_or_else(late)? {
            Waiting::Sync { mut line } => {
                let answer = line.answer::<SyncGroupRequest>(5).await.ok_or_else(late)?;
                Ok((plain(answer.error_code)?, None))
            }
            Waiting::Join { mut line, member } => {
                let joined = line.answer::<JoinGroupRequest>(9).await.ok_or_else(late)?;
                Ok((self.joined(member, &joined)?, (joined.error_code == 0).then_some(joined.leader)))
            }
        }
    }

    /// Commands that were answered although nobody asked for their answer.
    pub(crate) async fn unexpected(&mut self) -> Vec<u32> {
        let mut answered: Vec<_> = self.answers.keys().copied().collect();
        for (number, waiting) in &self.waiting {
            let (Waiting::Join { line, .. } | Waiting::Sync { line }) = waiting;
            if line.is_answered().await {
                answered.push(*number);
            }
        }
        answered
    }

    /// What number an id has.
    pub(crate) fn number(&self, id: &StrBytes) -> Option<u8> {
        self.ids.iter().find(|(_, other)| *other == id).map(|(number, _)| *number)
    }

    pub(crate) async fn picture(&mut self) -> Picture {
        let described = self.described().await;
        let member = |id: &StrBytes, instance: &Option<StrBytes>| {
            let instance = instance.as_ref().map(|name| name.parse().expect("an instance of ours"));
            (self.number(id), instance)
        };
        let mut members: Vec<_> =
            described.members.iter().map(|it| member(&it.member_id, &it.group_instance_id)).collect();
        members.sort_unstable();
        let topic = OffsetFetchRequestTopic::default()
            .with_name(self.topic.clone())
            .with_partition_indexes((0..self.partitions).collect());
        let request = OffsetFetchRequest::default().with_group_id(self.group.clone()).with_topics(Some(vec![topic]));
        let fetched = self.line.ask(&request, 7).await;
        let offsets = fetched.topics.iter().flat_map(|topic| &topic.partitions);
        let offsets = offsets.filter(|it| it.committed_offset >= 0).map(|it| (it.partition_index, it.committed_offset));
        Picture { state: described.group_state.to_string(), members, offsets: offsets.collect() }
    }

    /// Leaves nothing behind.
    pub(crate) async fn end(mut self) {
        let described = self.described().await.members;
        let members = described.into_iter().map(|it| (it.member_id, it.group_instance_id));
        let ids: Vec<_> = self.ids.values().cloned().map(|id| (id, None)).chain(members).collect();
        for (id, instance) in ids {
            let _gone_already = self.leave(id, instance).await;
        }
        let delete = DeleteGroupsRequest::default().with_groups_names(vec![self.group.clone()]);
        self.line.ask(&delete, 2).await;
    }

    async fn described(&mut self) -> DescribedGroup {
        let request = DescribeGroupsRequest::default().with_groups(vec![self.group.clone()]);
        self.line.ask(&request, 5).await.groups.remove(0)
    }

    async fn join(&mut self, member: u8, id: StrBytes) {
        let protocol = JoinGroupRequestProtocol::default()
            .with_name("range".into())
            .with_metadata(Bytes::from_static(SUBSCRIPTION));
        let request = JoinGroupRequest::default()
            .with_group_id(self.group.clone())
            .with_session_timeout_ms(NEVER_MS)
            .with_rebalance_timeout_ms(NEVER_MS)
            .with_member_id(id)
            .with_group_instance_id(self.instance(member))
            .with_protocol_type("consumer".into())
            .with_protocols(vec![protocol]);
        let mut line = Line::open(&self.address).await;
        line.send(&request, 9).await;
        self.waiting.insert(self.commands, Waiting::Join { line, member });
    }

    /// What a `JoinGroup` was answered; from now on the id is known.
    fn joined(&mut self, member: u8, answer: &JoinGroupResponse) -> Result<Answer, String> {
        let required = ResponseError::MemberIdRequired.code();
        if answer.error_code != 0 && answer.error_code != required {
            return plain(answer.error_code);
        }
        let id = self.ids.entry(member).or_insert_with(|| answer.member_id.clone());
        assert_eq!(*id, answer.member_id, "a member keeps its id");
        if answer.error_code == required {
            return Ok(Answer::Number(member));
        }
        Ok(Answer::Joined { member, generation: answer.generation_id })
    }

    async fn leave(&mut self, id: StrBytes, instance: Option<StrBytes>) -> Result<Answer, String> {
        let member = MemberIdentity::default().with_member_id(id).with_group_instance_id(instance);
        let request = LeaveGroupRequest::default().with_group_id(self.group.clone()).with_members(vec![member]);
        let left = self.line.ask(&request, 5).await;
        let of_member = left.members.first().map_or(0, |member| member.error_code);
        plain(if left.error_code == 0 { of_member } else { left.error_code })
    }

    /// An id that no member has, where the number has none.
    fn id(&self, member: u8) -> StrBytes {
        self.ids.get(&member).cloned().unwrap_or_else(|| StrBytes::from_string(format!("nobody-{member}")))
    }

    fn instance(&self, member: u8) -> Option<StrBytes> {
        self.instances.get(&member).map(|instance| StrBytes::from_string(instance.to_string()))
    }
}

fn plain(code: i16) -> Result<Answer, String> {
    match ResponseError::try_from_code(code) {
        None => Ok(Answer::Done),
        Some(ResponseError::UnknownMemberId) => Ok(Answer::UnknownMember),
        Some(ResponseError::IllegalGeneration) => Ok(Answer::IllegalGeneration),
        Some(ResponseError::RebalanceInProgress) => Ok(Answer::RebalanceInProgress),
        Some(ResponseError::FencedInstanceId) => Ok(Answer::FencedInstance),
        Some(other) => Err(format!("answered {other:?}, which no model says")),
    }
}
