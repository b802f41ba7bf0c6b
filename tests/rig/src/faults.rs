//! What a planned fault does, to whom, and what is written down about it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hapax_testkit::proxy::After;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

use crate::crew::Worker;
use crate::links::Link;
use crate::plan::{Cut, Fault, Planned, Side};
use crate::producer::Order;
use crate::scribe::{Scribe, away, back};
use crate::servers::Servers;

/// How long a cut waits for the request that it is to cut off.
const ARMED_MAX: Duration = Duration::from_secs(3);

/// How long an outage is felt after its end.
const FELT: Duration = Duration::from_secs(5);

/// Everything that faults happen to.
#[derive(Debug)]
pub(crate) struct Field {
    pub(crate) servers: Servers,
    /// Broker and store are one server.
    pub(crate) one_server: bool,
    /// The last one joins and leaves.
    pub(crate) workers: Vec<Arc<Worker>>,
    pub(crate) scribe: Arc<Scribe>,
    pub(crate) lease: Duration,
    pub(crate) orders: mpsc::Sender<Order>,
    pub(crate) counts: Mutex<BTreeMap<&'static str, u32>>,
    /// What went wrong that no checker sees: a worker that did not end, one that ended by itself.
    pub(crate) troubles: Mutex<Vec<String>>,
    /// Starts that failed while a server was away, and were tried again.
    pub(crate) started_again: AtomicU32,
    /// How many servers and links are away, and when the last one came back.
    pub(crate) away: AtomicU32,
    pub(crate) back: Mutex<Option<Instant>>,
    /// Held while something is done to a server.
    pub(crate) server: tokio::sync::Mutex<()>,
}

impl Field {
    /// Does it, and returns when its victim is whole again.
    pub(crate) async fn inject(&self, planned: Planned) -> Result<(), String> {
        let Planned { fault, draw, .. } = planned;
        match fault {
            Fault::Kill | Fault::Pause | Fault::Terminate => self.hit_worker(fault, draw).await,
            Fault::JoinAndLeave => self.join_and_leave(draw).await,
            Fault::Link(side, cut) => {
                self.hit_link(fault, side, cut, draw).await;
                Ok(())
            }
            Fault::ServerKill(side) | Fault::ServerStop(side) | Fault::ServerAway(side) | Fault::ServerPause(side) => {
                self.hit_server(fault, side, draw).await
            }
            Fault::Duplicates => self.order(fault, Order::Resend(draw)).await,
            Fault::Conflicts => self.order(fault, Order::Conflict(draw)).await,
        }
    }

    pub(crate) fn trouble(&self, what: String) {
        eprintln!("rig: {what}");
        self.troubles.lock().expect("nobody panics while holding it").push(what);
    }

    /// Whether a server or a link is away, or was a moment ago.
    pub(crate) fn is_away(&self) -> bool {
        let back = *self.back.lock().expect("nobody panics while holding it");
        self.away.load(Ordering::Relaxed) > 0 || back.is_some_and(|at| at.elapsed() < FELT)
    }

    fn is_back(&self) {
        self.away.fetch_sub(1, Ordering::Relaxed);
        *self.back.lock().expect("nobody panics while holding it") = Some(Instant::now());
    }

    pub(crate) fn started_again(&self) {
        self.started_again.fetch_add(1, Ordering::Relaxed);
    }

    fn count(&self, fault: Fault) {
        *self.counts.lock().expect("nobody panics while holding it").entry(fault.name()).or_default() += 1;
    }

    async fn order(&self, fault: Fault, order: Order) -> Result<(), String> {
        self.orders.send(order).await.map_err(|_| "the producer has ended".to_owned())?;
        self.count(fault);
        self.scribe.fault(None, fault);
        Ok(())
    }

    async fn hit_worker(&self, fault: Fault, draw: u64) -> Result<(), String> {
        let victims = &self.workers[..self.workers.len() - 1];
        let (worker, mut state) = match from(victims, draw).find_map(|worker| Some((worker, worker.try_hold()?))) {
            Some(free) => free,
            None => {
                let worker = from(victims, draw).next().ok_or("there is no worker")?;
                (worker, worker.hold().await)
            }
        };
        self.count(fault);
        self.scribe.fault(Some(worker.number), fault);
        match fault {
            Fault::Pause => worker.pause(&mut state, self.lease + millis(draw, 500, 2500)).await,
            Fault::Terminate => {
                if let Err(trouble) = worker.terminate(&mut state, || self.is_away()).await {
                    self.trouble(trouble);
                }
            }
            _ => {
                worker.kill(&mut state).await;
                sleep(millis(draw, 100, 1500)).await;
            }
        }
        worker.start(&mut state).await
    }

    async fn join_and_leave(&self, draw: u64) -> Result<(), String> {
        let worker = self.workers.last().ok_or("there is no worker")?;
        let mut state = worker.hold().await;
        self.count(Fault::JoinAndLeave);
        self.scribe.fault(Some(worker.number), Fault::JoinAndLeave);
        worker.start(&mut state).await?;
        sleep(millis(draw, 3000, 9000)).await;
        if let Err(trouble) = worker.terminate(&mut state, || self.is_away()).await {
            self.trouble(trouble);
        }
        Ok(())
    }

    async fn hit_link(&self, fault: Fault, side: Side, cut: Cut, draw: u64) {
        let links: Vec<Arc<Link>> =
            self.workers[..self.workers.len() - 1].iter().filter_map(|w| w.link(side)).collect();
        let Some((link, _busy)) = from(&links, draw).find_map(|link| Some((link, link.busy.try_lock().ok()?))) else {
            return;
        };
        self.count(fault);
        self.scribe.fault(link.worker, fault);
        self.away.fetch_add(1, Ordering::Relaxed);
        self.scribe.mark(link.worker, away(side));
        let proxy = &link.proxy;
        match cut {
            Cut::Drop => proxy.drop_connections(),
            Cut::Away => {
                proxy.cut();
                sleep(millis(draw, 300, 2300)).await;
            }
            Cut::Freeze => {
                proxy.freeze();
                sleep(millis(draw, 500, 3500)).await;
            }
            Cut::Swallow => {
                proxy.swallow_replies(Duration::from_millis(400));
                sleep(millis(draw, 300, 1200)).await;
            }
            Cut::Reply | Cut::Frame => {
                let after = if cut == Cut::Reply { After::Reply } else { After::Bytes(draw as usize % 500 + 1) };
                let resets = proxy.resets();
                proxy.cut_after_request(after);
                let _ = timeout(ARMED_MAX, proxy.resets_reach(resets + 1)).await;
            }
        }
        proxy.heal();
        self.scribe.mark(link.worker, back(side));
        self.is_back();
    }

    async fn hit_server(&self, fault: Fault, side: Side, draw: u64) -> Result<(), String> {
        let _held = self.server.lock().await;
        let servers = &self.servers;
        self.count(fault);
        self.scribe.fault(None, fault);
        self.away.fetch_add(1, Ordering::Relaxed);
        self.mark_server(side, away);
        match fault {
            Fault::ServerPause(_) => {
                servers.pause(side).await?;
                sleep(millis(draw, 1000, 3000)).await;
                servers.resume(side).await?;
            }
            Fault::ServerKill(_) => {
                servers.kill(side).await?;
                sleep(millis(draw, 0, 1000)).await;
                servers.start(side).await?;
            }
            _ => {
                servers.stop(side).await?;
                if matches!(fault, Fault::ServerAway(_)) {
                    sleep(self.lease + Duration::from_secs(2)).await;
                }
                servers.start(side).await?;
            }
        }
        self.mark_server(side, back);
        self.is_back();
        Ok(())
    }

    fn mark_server(&self, side: Side, mark: fn(Side) -> &'static str) {
        if self.one_server {
            self.scribe.mark(None, mark(Side::Broker));
            self.scribe.mark(None, mark(Side::Store));
        } else {
            self.scribe.mark(None, mark(side));
        }
    }
}

/// All of them, beginning with the one that was drawn.
fn from<T>(all: &[T], draw: u64) -> impl Iterator<Item = &T> {
    let first = (draw % all.len().max(1) as u64) as usize;
    all[first..].iter().chain(&all[..first])
}

fn millis(draw: u64, least: u64, most: u64) -> Duration {
    // Other digits than those that chose the victim.
    Duration::from_millis(least + (draw >> 16) % (most - least + 1))
}
