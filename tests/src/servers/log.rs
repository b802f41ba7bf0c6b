//! What Kafka does with the offsets of a group on one partition, as a model: no time, no network, one command after the
//! other.
//!
//! The adapter is built on what is written here, and `adapters/kafka` checks it against a real server with generated
//! commands. What surprises: a commit may go backwards, and nothing tells; only a member of an older generation is refused.

/// The committed offset of a group with one partition, and who may commit.
#[derive(Clone, Debug, Default)]
pub struct Offsets {
    committed: Option<i64>,
    /// The member that has the partition.
    owner: Option<u8>,
}

/// A command of one member. There are as many members as have joined and not left.
#[derive(Clone, Debug)]
pub enum Command {
    /// This member takes over: whoever had the partition is fenced, as after a session that ended.
    TakeOver {
        /// Whose.
        member: u8,
    },
    /// Commits this offset.
    Commit {
        /// Whose.
        member: u8,
        /// The next to be read.
        offset: i64,
    },
    /// Asks where the group stands.
    Committed,
}

/// What it is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It was done.
    Done,
    /// Refused: the member is of an older generation, or unknown.
    Refused,
    /// The committed offset.
    At(Option<i64>),
}

impl Offsets {
    /// Does one command.
    pub fn apply(&mut self, command: &Command) -> Answer {
        match *command {
            Command::TakeOver { member } => {
                self.owner = Some(member);
                Answer::Done
            }
            Command::Commit { member, .. } if self.owner != Some(member) => Answer::Refused,
            Command::Commit { offset, .. } => {
                // Whatever was committed before.
                self.committed = Some(offset);
                Answer::Done
            }
            Command::Committed => Answer::At(self.committed),
        }
    }
}
