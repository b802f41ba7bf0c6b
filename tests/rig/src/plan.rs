//! Which fault when: drawn from a seed, before anything runs.
//!
//! Faults of servers follow each other with room to recover, or a long run would be one outage; all others fall anywhere
//! and overlap.

use std::time::Duration;

use fastrand::Rng;

use crate::options::Options;

/// Which server, or the link to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Broker,
    Store,
}

/// What is done to a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// Connections are reset, and may come back.
    Drop,
    /// Connections are reset and refused for a while.
    Away,
    /// Half-cut: open, and silent.
    Freeze,
    /// The next request is applied, its reply lost.
    Reply,
    /// All requests are applied, all replies lost, for a while.
    Swallow,
    /// In the middle of a frame.
    Frame,
}

/// One fault, with the random number that chooses its victim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    Kill,
    Pause,
    Terminate,
    JoinAndLeave,
    Link(Side, Cut),
    ServerKill(Side),
    ServerStop(Side),
    ServerAway(Side),
    ServerPause(Side),
    Duplicates,
    Conflicts,
}

impl Fault {
    /// As tables and histories call it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill -9",
            Self::Pause => "pause beyond the lease",
            Self::Terminate => "terminate",
            Self::JoinAndLeave => "join and leave",
            Self::Link(Side::Broker, Cut::Drop) => "cut broker link: reset",
            Self::Link(Side::Broker, Cut::Away) => "cut broker link: refused",
            Self::Link(Side::Broker, Cut::Freeze) => "cut broker link: half",
            Self::Link(Side::Broker, Cut::Reply) => "cut broker link: reply lost",
            Self::Link(Side::Broker, Cut::Swallow) => "cut broker link: replies lost",
            Self::Link(Side::Broker, Cut::Frame) => "cut broker link: in a frame",
            Self::Link(Side::Store, Cut::Drop) => "cut store link: reset",
            Self::Link(Side::Store, Cut::Away) => "cut store link: refused",
            Self::Link(Side::Store, Cut::Freeze) => "cut store link: half",
            Self::Link(Side::Store, Cut::Reply) => "cut store link: reply lost",
            Self::Link(Side::Store, Cut::Swallow) => "cut store link: replies lost",
            Self::Link(Side::Store, Cut::Frame) => "cut store link: in a frame",
            Self::ServerKill(Side::Broker) => "broker restart: kill -9",
            Self::ServerStop(Side::Broker) => "broker restart: in order",
            Self::ServerAway(Side::Broker) => "broker down beyond the lease",
            Self::ServerPause(Side::Broker) => "broker paused",
            Self::ServerKill(Side::Store) => "store restart: kill -9",
            Self::ServerStop(Side::Store) => "store restart: in order",
            Self::ServerAway(Side::Store) => "store down beyond the lease",
            Self::ServerPause(Side::Store) => "store paused",
            Self::Duplicates => "duplicates forced",
            Self::Conflicts => "conflicting bodies",
        }
    }

    /// How often in ten minutes.
    const fn per_ten_minutes(self) -> u32 {
        match self {
            Self::Kill => 54,
            Self::Pause => 17,
            Self::Terminate => 10,
            Self::JoinAndLeave => 8,
            Self::Link(_, Cut::Drop) => 17,
            Self::Link(_, Cut::Away | Cut::Freeze) => 8,
            Self::Link(_, Cut::Reply) => 15,
            Self::Link(_, Cut::Swallow) => 5,
            Self::Link(_, Cut::Frame) => 5,
            Self::ServerKill(_) => 6,
            Self::ServerStop(_) => 5,
            Self::ServerAway(_) => 1,
            Self::ServerPause(_) => 2,
            Self::Duplicates => 40,
            Self::Conflicts => 20,
        }
    }

    const fn of_server(self) -> bool {
        matches!(self, Self::ServerKill(_) | Self::ServerStop(_) | Self::ServerAway(_) | Self::ServerPause(_))
    }

    const fn side(self) -> Option<Side> {
        match self {
            Self::Link(side, _)
            | Self::ServerKill(side)
            | Self::ServerStop(side)
            | Self::ServerAway(side)
            | Self::ServerPause(side) => Some(side),
            _ => None,
        }
    }

    fn all() -> Vec<Self> {
        let mut all =
            vec![Self::Kill, Self::Pause, Self::Terminate, Self::JoinAndLeave, Self::Duplicates, Self::Conflicts];
        for side in [Side::Broker, Side::Store] {
            let cuts = [Cut::Drop, Cut::Away, Cut::Freeze, Cut::Reply, Cut::Swallow, Cut::Frame];
            all.extend(cuts.map(|cut| Self::Link(side, cut)));
            all.extend([
                Self::ServerKill(side),
                Self::ServerStop(side),
                Self::ServerAway(side),
                Self::ServerPause(side),
            ]);
        }
        all
    }
}

/// One line of the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Planned {
    pub(crate) at: Duration,
    pub(crate) fault: Fault,
    /// Chooses the victim, and the fault's length.
    pub(crate) draw: u64,
}

/// Before the first fault: workers start and take their share.
const LEAD: Duration = Duration::from_secs(3);

/// The plan of a run, in the order of its times.
pub(crate) fn draw(options: &Options) -> Vec<Planned> {
    let mut rng = Rng::with_seed(options.seed);
    let faulty = options.faulty();
    let (mut servers, mut others) = (Vec::new(), Vec::new());
    for fault in Fault::all() {
        let wanted =
            options.only.is_empty() || options.only.iter().any(|prefix| fault.name().starts_with(prefix.as_str()));
        if !wanted || (fault.side() == Some(Side::Store) && !options.store.is_server()) {
            continue;
        }
        let exact = f64::from(fault.per_ten_minutes()) * options.minutes / 10.0;
        // A rare fault happens in some of the short runs.
        let count = exact as usize + usize::from(rng.f64() < exact.fract());
        let list = if fault.of_server() { &mut servers } else { &mut others };
        list.extend(std::iter::repeat_n(fault, count));
    }
    rng.shuffle(&mut servers);
    let room = faulty.saturating_sub(LEAD) / (servers.len().max(1) as u32);
    let mut plan: Vec<Planned> = Vec::new();
    for (n, fault) in servers.into_iter().enumerate() {
        let at = LEAD + room * n as u32 + room.mul_f64(rng.f64() / 4.0);
        plan.push(Planned { at, fault, draw: rng.u64(..) });
    }
    for fault in others {
        let at = LEAD + faulty.saturating_sub(LEAD).mul_f64(rng.f64());
        plan.push(Planned { at, fault, draw: rng.u64(..) });
    }
    plan.sort_by_key(|planned| planned.at);
    plan
}

/// Faults that come one by one behind the plan: kills, and a restart of each server.
pub(crate) fn singles(options: &Options) -> Vec<Planned> {
    let mut rng = Rng::with_seed(!options.seed);
    let kills = if options.minutes < 5.0 { 1 } else { 4 };
    let mut faults = vec![Fault::Kill; kills];
    faults.push(Fault::ServerKill(Side::Broker));
    if options.store.is_server() {
        faults.push(Fault::ServerKill(Side::Store));
    }
    let planned = |fault| Planned { at: options.faulty(), fault, draw: rng.u64(..) };
    faults.into_iter().filter(|_| options.only.is_empty()).map(planned).collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn options(more: &str) -> Options {
        let line = format!("rig --broker rabbitmq --store postgres {more}");
        Options::parse_from(line.split_whitespace())
    }

    fn count(plan: &[Planned], of: impl Fn(&str) -> bool) -> usize {
        plan.iter().filter(|planned| of(planned.fault.name())).count()
    }

    #[test]
    fn ten_minutes_hold_what_was_agreed() {
        for seed in 0..20 {
            let plan = draw(&options(&format!("--minutes 10 --seed {seed}")));
            assert!(count(&plan, |name| name == "kill -9") >= 50);
            assert!(count(&plan, |name| name.starts_with("pause")) >= 15);
            assert!(count(&plan, |name| name.starts_with("broker restart")) >= 10);
            assert!(count(&plan, |name| name.starts_with("store restart")) >= 10);
            assert!(count(&plan, |name| name.starts_with("cut ")) >= 100);
        }
    }

    #[test]
    fn a_seed_draws_the_same_plan_and_another_seed_another_one() {
        let plan = |seed: u32| draw(&options(&format!("--minutes 1 --seed {seed}")));
        assert_eq!(plan(7), plan(7));
        assert_ne!(plan(7), plan(8));
    }

    #[test]
    fn a_store_without_a_server_has_no_faults_of_a_server() {
        let line = "rig --broker kafka --store sqlite --minutes 10";
        let plan = draw(&Options::parse_from(line.split_whitespace()));
        assert_eq!(count(&plan, |name| name.contains("store")), 0);
        assert!(count(&plan, |name| name.contains("broker")) > 0);
    }
}
