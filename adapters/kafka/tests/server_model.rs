//! The model of a consumer group and its offsets (`hapax_testkit::servers::group`) against the server: generated commands,
//! the same answers, the same members and offsets. What the adapter takes for granted is what the server does.

mod support;
mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use fastrand::Rng;
use hapax_testkit::servers::group::{Answer, Answers, Command, Group, Phase};
use support::{Topic, unique};
use wire::{Picture, Real};

const SEEDS: u64 = 60;
const PARTITIONS: u16 = 2;
const INSTANCES: u8 = 2;
const MEMBERS_MAX: usize = 4;

/// How a model answers a command. [`Group::apply`] is the right one.
type Model = fn(&mut Group, &Command) -> Answers;

/// What was answered to which command of which phase.
type Seen = BTreeSet<String>;

/// A command that can be sent now: who waits for an answer does not ask the same again, and does not leave where the server
/// would answer nobody.
fn choose(rng: &mut Rng, group: &Group) -> Command {
    let generation = group.generation()
        + match rng.u8(..20) {
            0..14 => 0,
            14..17 => -1,
            17 => -2,
            18 => 1,
            _ => -1 - group.generation(),
        };
    let live: Vec<_> = group.members().map(|(member, _)| member).filter(|it| group.told().contains(it)).collect();
    let stranger = group.told().last().map_or(1, |last| last + 10);
    let member = match rng.u8(..10) {
        0..7 => rng.choice(live.iter().copied()),
        7..9 => rng.choice(group.told().iter().copied()),
        _ => None,
    };
    let member = member.unwrap_or(stranger);
    let room = group.members().count() < MEMBERS_MAX;
    match rng.u8(..20) {
        0..1 if room => Command::Enter { instance: None },
        1..3 if room => Command::Enter { instance: Some(rng.u8(1..=INSTANCES)) },
        3..8 if !group.waits_to_join(member) => Command::Join { member },
        8..12 if !group.waits_to_sync(member) => Command::Sync { member, generation },
        12 if !group.waits_to_sync(member) => Command::Leave { member },
        13 => Command::Heartbeat { member, generation },
        _ => Command::Commit {
            member: (rng.u8(..6) > 0).then_some(member),
            generation,
            partition: rng.i32(0..i32::from(PARTITIONS)),
            offset: rng.i64(0..100),
        },
    }
}

fn picture(group: &Group) -> Picture {
    let state = match group.phase() {
        Phase::Absent => "Dead",
        Phase::Empty => "Empty",
        Phase::Joining => "PreparingRebalance",
        Phase::Syncing => "CompletingRebalance",
        Phase::Stable => "Stable",
    };
    let told = |member: u8| group.told().contains(&member).then_some(member);
    let mut members: Vec<_> = group.members().map(|(member, instance)| (told(member), instance)).collect();
    members.sort_unstable();
    Picture { state: state.to_owned(), members, offsets: group.offsets().clone() }
}

/// One command: the answers that come with it, no others, and then the same picture.
async fn agree(real: &mut Real, group: &mut Group, command: &Command, model: Model) -> Result<Answers, String> {
    let wanted = model(group, command);
    real.send(command).await?;
    let (mut answers, mut leaders) = (Answers::new(), Vec::new());
    for number in wanted.keys() {
        let (answer, leader) = real.answer(*number).await?;
        answers.insert(*number, answer);
        leaders.extend(leader);
    }
    if answers != wanted {
        return Err(format!("answered {answers:?}, the model says {wanted:?}"));
    }
    for leader in leaders {
        let leader = real.number(&leader).ok_or("nobody knows who leads")?;
        if !group.led_by(leader) {
            return Err(format!("{leader} leads, the model says that it cannot"));
        }
    }
    // Nothing tells when the server has taken a request that waits, other than what changes by it here. Where nothing does,
    // the next command may overtake it: both are answered the same then, in either order.
    let wanted = picture(group);
    let mut seen = real.picture().await;
    for _ in 0..500 {
        if seen == wanted {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
        seen = real.picture().await;
    }
    if seen != wanted {
        return Err(format!("seen {seen:?}, the model says {wanted:?}"));
    }
    match real.unexpected().await {
        none if none.is_empty() => Ok(answers),
        numbers => Err(format!("{numbers:?} answered, the model says that they wait")),
    }
}

/// The sequence of a seed, until model and server differ: then the sequence to read. It is the same each time, but for whom
/// the server lets follow a leader that left.
async fn run(topic: &Topic, seed: u64, model: Model, seen: &mut Seen) -> Result<(), String> {
    let mut rng = Rng::with_seed(seed);
    let partitions = i32::from(PARTITIONS);
    let mut real = Real::new(&topic.servers(), unique("model"), &topic.topic, partitions).await;
    let mut group = Group::default();
    let mut sequence = format!("seed {seed}:");
    let mut commands = BTreeMap::new();
    let mut agreed = Ok(());
    for number in 1..=rng.u32(20..=40) {
        let command = choose(&mut rng, &group);
        commands.insert(number, (command, group.phase(), group.offsets().clone()));
        sequence += &format!("\n{number:>3} {command:?}");
        match agree(&mut real, &mut group, &command, model).await {
            Ok(answers) => {
                sequence += &format!(" -> {answers:?}; {:?}, generation {}", group.phase(), group.generation());
                seen.extend(answers.iter().map(|(number, answer)| kind(&commands[number], *answer)));
            }
            Err(difference) => {
                agreed = Err(format!("{sequence}\n    {difference}"));
                break;
            }
        }
    }
    real.end().await;
    agreed
}

/// The command, when it was sent, and the answer, without numbers.
fn kind((command, phase, offsets): &(Command, Phase, BTreeMap<i32, i64>), answer: Answer) -> String {
    let word = |text: String| text.split([' ', '(']).next().unwrap_or_default().to_owned();
    let mut name = word(format!("{command:?}"));
    if let Command::Commit { partition, offset, .. } = command
        && offsets.get(partition).is_some_and(|before| before > offset)
    {
        name += " backwards";
    }
    format!("{name}, {phase:?}: {}", word(format!("{answer:?}")))
}

#[tokio::test]
async fn the_server_does_what_the_model_says() {
    let topic = Topic::new(PARTITIONS).created().await;
    let mut seen = Seen::new();
    for seed in 0..SEEDS {
        if let Err(difference) = run(&topic, seed, Group::apply, &mut seen).await {
            panic!("{difference}");
        }
    }
    // What the adapter rests on has happened in some of them.
    let rests_on = [
        "Commit, Stable: Done",
        "Commit, Stable: IllegalGeneration",
        "Commit, Stable: UnknownMember",
        "Commit, Stable: FencedInstance",
        "Commit, Syncing: RebalanceInProgress",
        "Commit, Joining: Done",
        "Commit backwards, Stable: Done",
        "Commit, Empty: Done",
        "Commit, Absent: Done",
        "Heartbeat, Joining: RebalanceInProgress",
        "Join, Joining: FencedInstance",
        "Join, Joining: Joined",
        "Sync, Syncing: RebalanceInProgress",
    ];
    let missing: Vec<_> = rests_on.into_iter().filter(|kind| !seen.contains(*kind)).collect();
    assert!(missing.is_empty(), "not among the sequences: {missing:?}\n{seen:#?}");
}

/// From whoever is a member.
fn takes_old_generations(group: &mut Group, command: &Command) -> Answers {
    let mut command = *command;
    if let Command::Commit { generation, .. } = &mut command
        && *generation >= 0
    {
        *generation = group.generation().max(*generation);
    }
    group.apply(&command)
}

fn keeps_offsets_from_going_back(group: &mut Group, command: &Command) -> Answers {
    let mut command = *command;
    if let Command::Commit { partition, offset, .. } = &mut command {
        *offset = group.offsets().get(partition).map_or(*offset, |before| (*before).max(*offset));
    }
    group.apply(&command)
}

/// Whose name another has is as unknown as any other.
fn does_not_fence(group: &mut Group, command: &Command) -> Answers {
    let mut answers = group.apply(command);
    for answer in answers.values_mut().filter(|answer| **answer == Answer::FencedInstance) {
        *answer = Answer::UnknownMember;
    }
    answers
}

/// A commit while members join is one of a generation that is over.
fn takes_no_commits_while_members_join(group: &mut Group, command: &Command) -> Answers {
    let joining = group.phase() == Phase::Joining;
    let mut answers = group.apply(command);
    if joining && matches!(command, Command::Commit { .. }) {
        let refused = |answer: &mut Answer| *answer = Answer::RebalanceInProgress;
        answers.values_mut().filter(|answer| **answer == Answer::Done).for_each(refused);
    }
    answers
}

#[tokio::test]
async fn a_wrong_model_is_found() {
    let topic = Topic::new(PARTITIONS).created().await;
    let wrong: [(&str, Model); 4] = [
        ("takes old generations", takes_old_generations),
        ("keeps offsets from going back", keeps_offsets_from_going_back),
        ("does not fence", does_not_fence),
        ("takes no commits while members join", takes_no_commits_while_members_join),
    ];
    for (name, model) in wrong {
        let mut found = None;
        for seed in 0..SEEDS {
            found = run(&topic, seed, model, &mut Seen::new()).await.err();
            if found.is_some() {
                break;
            }
        }
        let difference = found.unwrap_or_else(|| panic!("a model that {name} agrees with the server"));
        assert!(difference.contains("the model says"), "{name}: {difference}");
    }
}

/// The one that design rests on, by itself: an old generation's late commit takes nothing back, the current one's can.
#[tokio::test]
async fn an_old_generation_commits_nothing_and_the_current_one_also_backwards() {
    let topic = Topic::new(PARTITIONS).created().await;
    let mut real = Real::new(&topic.servers(), unique("model"), &topic.topic, i32::from(PARTITIONS)).await;
    let mut group = Group::default();
    let commit = |generation, offset| Command::Commit { member: Some(1), generation, partition: 0, offset };
    let sequence = [
        (Command::Enter { instance: None }, Some(Answer::Number(1))),
        (Command::Join { member: 1 }, Some(Answer::Joined { member: 1, generation: 1 })),
        (Command::Sync { member: 1, generation: 1 }, Some(Answer::Done)),
        (commit(1, 7), Some(Answer::Done)),
        // Another comes: while it waits, the first one's commit is still taken.
        (Command::Enter { instance: Some(1) }, None),
        (commit(1, 8), Some(Answer::Done)),
        (Command::Join { member: 1 }, Some(Answer::Joined { member: 1, generation: 2 })),
        (commit(2, 9), Some(Answer::RebalanceInProgress)),
        (commit(1, 9), Some(Answer::IllegalGeneration)),
        (Command::Sync { member: 1, generation: 2 }, Some(Answer::Done)),
        (commit(1, 9), Some(Answer::IllegalGeneration)),
        (commit(2, 3), Some(Answer::Done)),
    ];
    for (number, (command, wanted)) in (1..).zip(sequence) {
        let answers = agree(&mut real, &mut group, &command, Group::apply).await;
        let answers = answers.unwrap_or_else(|difference| panic!("{command:?}: {difference}"));
        assert_eq!(answers.get(&number).copied(), wanted, "{command:?}");
    }
    assert_eq!(group.offsets().get(&0), Some(&3), "and it went back");
    real.end().await;
}
