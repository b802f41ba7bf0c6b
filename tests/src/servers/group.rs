//! What Kafka does with a consumer group (of the classic protocol) and its offsets, as a model: no time, no network, one
//! command after the other.
//!
//! The adapter is built on what is written here, and `adapters/kafka` checks it against a real server with generated
//! commands. What surprises: a member may commit while others already join anew, whoever is of the current generation may
//! move an offset backwards, and a commit without a member is taken as long as nobody is in the group.

use std::collections::BTreeMap;

/// A group. Members are numbered from 1, in the order in which the server makes up their ids.
#[derive(Clone, Debug, Default)]
pub struct Group {
    phase: Phase,
    generation: i32,
    members: BTreeMap<u8, Member>,
    /// Ids that were handed out and have not joined yet.
    pending: Vec<u8>,
    /// Of each number whose holder came with the name of an instance: which.
    instances: BTreeMap<u8, u8>,
    leader: Option<u8>,
    offsets: BTreeMap<i32, i64>,
    numbers: u8,
    /// Numbers whose holder was told its id.
    told: Vec<u8>,
    commands: u32,
}

/// Where a group is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// There is no group.
    #[default]
    Absent,
    /// Nobody is in it.
    Empty,
    /// Members join: waits for all.
    Joining,
    /// All have joined, the leader has not said who gets what.
    Syncing,
    /// Everybody knows.
    Stable,
}

/// The commands of a member that wait for an answer, by number.
#[derive(Clone, Copy, Debug, Default)]
struct Member {
    joining: Option<u32>,
    syncing: Option<u32>,
}

/// A request. A member that came with the name of an instance says it each time.
#[derive(Clone, Copy, Debug)]
pub enum Command {
    /// `JoinGroup` without a member id.
    Enter {
        /// `group.instance.id`.
        instance: Option<u8>,
    },
    /// `JoinGroup` with a member id.
    Join {
        /// Whose.
        member: u8,
    },
    /// `SyncGroup`.
    Sync {
        /// Whose.
        member: u8,
        /// Of which generation it takes itself to be.
        generation: i32,
    },
    /// `Heartbeat`.
    Heartbeat {
        /// Whose.
        member: u8,
        /// Of which generation it takes itself to be.
        generation: i32,
    },
    /// `OffsetCommit`.
    Commit {
        /// Whose; nobody's is an administrator's, or a consumer's that assigns itself.
        member: Option<u8>,
        /// Of which generation it takes itself to be; -1 for none.
        generation: i32,
        /// For which partition.
        partition: i32,
        /// The next to read.
        offset: i64,
    },
    /// `LeaveGroup`.
    Leave {
        /// Who.
        member: u8,
    },
}

/// What it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It was done.
    Done,
    /// This is the id to join with: MEMBER_ID_REQUIRED.
    Number(u8),
    /// A member of this generation.
    Joined {
        /// Its number.
        member: u8,
        /// The generation.
        generation: i32,
    },
    /// UNKNOWN_MEMBER_ID.
    UnknownMember,
    /// ILLEGAL_GENERATION.
    IllegalGeneration,
    /// REBALANCE_IN_PROGRESS.
    RebalanceInProgress,
    /// FENCED_INSTANCE_ID: another has the instance's name now.
    FencedInstance,
}

/// Answers by the number of their command; commands are numbered from 1.
pub type Answers = BTreeMap<u32, Answer>;

impl Group {
    /// Does one command, and says everything that is answered with it: it by itself, or others that waited. Where it is not
    /// in there, it waits.
    pub fn apply(&mut self, command: &Command) -> Answers {
        self.commands += 1;
        let mut answers = Answers::new();
        let at_once = match *command {
            Command::Enter { instance: None } => {
                self.begin();
                let number = self.number();
                self.told.push(number);
                self.pending.push(number);
                Some(Answer::Number(number))
            }
            Command::Enter { instance: Some(instance) } => self.enter(instance, &mut answers),
            Command::Join { member } => self.join(member, &mut answers),
            Command::Sync { member, generation } => self.sync(member, generation, &mut answers),
            Command::Heartbeat { member, generation } => Some(match (self.of(member, generation), self.phase) {
                (Err(refused), _) => refused,
                (Ok(()), Phase::Joining) => Answer::RebalanceInProgress,
                (Ok(()), _) => Answer::Done,
            }),
            Command::Commit { member, generation, partition, offset } => Some(match self.commits(member, generation) {
                Err(refused) => refused,
                Ok(()) => {
                    self.begin();
                    // Not only forwards.
                    self.offsets.insert(partition, offset);
                    Answer::Done
                }
            }),
            Command::Leave { member } => Some(self.leave(member, &mut answers)),
        };
        answers.extend(at_once.map(|answer| (self.commands, answer)));
        for answer in answers.values() {
            if let Answer::Joined { member, .. } = answer
                && !self.told.contains(member)
            {
                self.told.push(*member);
            }
        }
        answers
    }

    /// A member that joined was told that this one leads. Whether it can be so: who follows a leader that left is left open.
    pub fn led_by(&mut self, leader: u8) -> bool {
        *self.leader.get_or_insert(leader) == leader && self.members.contains_key(&leader)
    }

    /// Where it is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Of the last time that all had joined, or left.
    pub fn generation(&self) -> i32 {
        self.generation
    }

    /// Its members by number, and under the name of which instance.
    pub fn members(&self) -> impl Iterator<Item = (u8, Option<u8>)> {
        self.members.keys().map(|member| (*member, self.instance(*member)))
    }

    /// The numbers whose ids were told, of members and of those that are not any more.
    pub fn told(&self) -> &[u8] {
        &self.told
    }

    /// With the name of which instance it came.
    pub fn instance(&self, member: u8) -> Option<u8> {
        self.instances.get(&member).copied()
    }

    /// Whether its `JoinGroup` waits.
    pub fn waits_to_join(&self, member: u8) -> bool {
        self.members.get(&member).is_some_and(|member| member.joining.is_some())
    }

    /// Whether its `SyncGroup` waits.
    pub fn waits_to_sync(&self, member: u8) -> bool {
        self.members.get(&member).is_some_and(|member| member.syncing.is_some())
    }

    /// What was committed, by partition.
    pub fn offsets(&self) -> &BTreeMap<i32, i64> {
        &self.offsets
    }

    fn begin(&mut self) {
        if self.phase == Phase::Absent {
            self.phase = Phase::Empty;
        }
    }

    fn number(&mut self) -> u8 {
        self.numbers += 1;
        self.numbers
    }

    /// Whether it is a member. Where it came with an instance, that comes first.
    fn is_member(&self, member: u8) -> Result<(), Answer> {
        let Some(instance) = self.instance(member) else {
            return if self.members.contains_key(&member) { Ok(()) } else { Err(Answer::UnknownMember) };
        };
        match self.holder(instance) {
            None => Err(Answer::UnknownMember),
            Some(holder) if holder == member => Ok(()),
            Some(_) => Err(Answer::FencedInstance),
        }
    }

    fn holder(&self, instance: u8) -> Option<u8> {
        self.members.keys().copied().find(|member| self.instance(*member) == Some(instance))
    }

    /// Whether it is a member and of this generation.
    fn of(&self, member: u8, generation: i32) -> Result<(), Answer> {
        self.is_member(member)?;
        if generation == self.generation { Ok(()) } else { Err(Answer::IllegalGeneration) }
    }

    /// Whether this commit is taken.
    fn commits(&self, member: Option<u8>, generation: i32) -> Result<(), Answer> {
        let nobody_in = matches!(self.phase, Phase::Absent | Phase::Empty);
        if generation < 0 && nobody_in {
            return Ok(());
        }
        if self.phase == Phase::Absent {
            return Err(Answer::IllegalGeneration);
        }
        self.of(member.ok_or(Answer::UnknownMember)?, generation)?;
        // While others join it is still taken: only when all have joined, it is not.
        if self.phase == Phase::Syncing { Err(Answer::RebalanceInProgress) } else { Ok(()) }
    }

    fn enter(&mut self, instance: u8, answers: &mut Answers) -> Option<Answer> {
        self.begin();
        let holder = self.holder(instance);
        let number = self.number();
        self.instances.insert(number, instance);
        let Some(holder) = holder else {
            return self.add(number, answers);
        };
        // Takes the place over, and whatever the other waits for ends.
        let fenced = self.members.remove(&holder).unwrap_or_default();
        answers.extend([fenced.joining, fenced.syncing].into_iter().flatten().map(|it| (it, Answer::FencedInstance)));
        if self.leader == Some(holder) {
            self.leader = Some(number);
        }
        if self.phase == Phase::Stable {
            self.members.insert(number, Member::default());
            return Some(Answer::Joined { member: number, generation: self.generation });
        }
        self.add(number, answers)
    }

    fn join(&mut self, member: u8, answers: &mut Answers) -> Option<Answer> {
        if self.pending.contains(&member) {
            self.pending.retain(|other| *other != member);
            return self.add(member, answers);
        }
        if let Err(refused) = self.is_member(member) {
            return Some(refused);
        }
        let again = self.phase == Phase::Joining || (self.phase == Phase::Stable && self.leader == Some(member));
        if again {
            return self.add(member, answers);
        }
        Some(Answer::Joined { member, generation: self.generation })
    }

    /// A member waits for all others to join. The first one does not wait.
    fn add(&mut self, member: u8, answers: &mut Answers) -> Option<Answer> {
        self.members.entry(member).or_default().joining = Some(self.commands);
        self.leader = self.leader.or_else(|| (self.members.len() == 1).then_some(member));
        if self.phase == Phase::Empty {
            self.all_joined(answers);
        } else {
            self.rebalance(answers);
        }
        None
    }

    fn sync(&mut self, member: u8, generation: i32, answers: &mut Answers) -> Option<Answer> {
        if let Err(refused) = self.of(member, generation) {
            return Some(refused);
        }
        match self.phase {
            Phase::Joining => Some(Answer::RebalanceInProgress),
            Phase::Syncing => {
                self.members.entry(member).or_default().syncing = Some(self.commands);
                if self.leader == Some(member) {
                    self.phase = Phase::Stable;
                    self.end_of_syncing(Answer::Done, answers);
                }
                None
            }
            Phase::Absent | Phase::Empty | Phase::Stable => Some(Answer::Done),
        }
    }

    fn leave(&mut self, member: u8, answers: &mut Answers) -> Answer {
        if self.pending.contains(&member) {
            self.pending.retain(|other| *other != member);
        } else if let Err(refused) = self.is_member(member) {
            return refused;
        } else {
            // Its `SyncGroup`, where one waits, is never answered.
            let left = self.members.remove(&member).unwrap_or_default();
            answers.extend(left.joining.map(|it| (it, Answer::UnknownMember)));
            self.leader = self.leader.filter(|leader| *leader != member);
        }
        // Also for one that only had an id.
        if self.phase != Phase::Empty {
            self.rebalance(answers);
        }
        Answer::Done
    }

    /// All have to join, where they do not already.
    fn rebalance(&mut self, answers: &mut Answers) {
        let begins = self.phase != Phase::Joining;
        self.phase = Phase::Joining;
        if begins {
            self.end_of_syncing(Answer::RebalanceInProgress, answers);
        }
        let all = self.members.values().all(|member| member.joining.is_some());
        // Whoever has an id is waited for, but not where nobody is left to say for how long.
        if all && (self.pending.is_empty() || (begins && self.members.is_empty())) {
            self.all_joined(answers);
        }
    }

    fn all_joined(&mut self, answers: &mut Answers) {
        self.generation += 1;
        self.phase = if self.members.is_empty() { Phase::Empty } else { Phase::Syncing };
        for (number, member) in &mut self.members {
            let joined = Answer::Joined { member: *number, generation: self.generation };
            answers.extend(member.joining.take().map(|it| (it, joined)));
        }
    }

    fn end_of_syncing(&mut self, answer: Answer, answers: &mut Answers) {
        answers.extend(self.members.values_mut().filter_map(|member| member.syncing.take()).map(|it| (it, answer)));
    }
}
