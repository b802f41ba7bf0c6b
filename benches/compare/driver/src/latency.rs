//! Latency at rates that are offered, not taken: from sending to the handler beside the raw client, and within hapax from
//! the receipt of a delivery to its handler and to its settlement.

use serde::{Deserialize, Serialize};

use crate::compare::paced;
use crate::contender::{Contender, Place};
use crate::feed::Error;

const OFFERED_PER_S: [u64; 3] = [100, 1_000, 10_000];
pub const SECONDS: u64 = 5;

/// Medians and 99 of 100, in milliseconds.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Latency {
    pub broker: String,
    pub contender: String,
    pub offered_per_s: u64,
    /// From sending to the handler's start.
    pub handler: (f64, f64),
    /// From receipt to the handler's start, and to settlement: hapax alone.
    pub start: Option<(f64, f64)>,
    pub settlement: Option<(f64, f64)>,
}

pub async fn run(brokers: &[String], size: usize, place: &Place) -> Result<Vec<Latency>, Error> {
    let mut found = Vec::new();
    for broker in brokers {
        let contenders = [
            Contender::new(broker, "raw", "none"),
            Contender::hapax(broker, "memory", "L1"),
            Contender::hapax(broker, "redis", "L2"),
            Contender::hapax(broker, "postgres", "L2"),
            Contender::hapax(broker, "sqlite", "L2"),
        ];
        for offered_per_s in OFFERED_PER_S {
            for contender in &contenders {
                let more: &[&str] = if contender.name == "hapax" { &["--stages"] } else { &[] };
                match paced(contender, place, offered_per_s, offered_per_s * SECONDS, size, more).await {
                    Ok((outcome, stages)) => {
                        let Some(handler) = outcome.p50_ms.zip(outcome.p99_ms) else { continue };
                        let (start, settlement) =
                            stages.map_or((None, None), |stages| (stages.start, stages.settlement));
                        let title = contender.title();
                        eprintln!(
                            "  {broker} at {offered_per_s}/s: {title:<20} handler {handler:?}, start {start:?}, settled {settlement:?}"
                        );
                        found.push(Latency {
                            broker: broker.clone(),
                            contender: title,
                            offered_per_s,
                            handler,
                            start,
                            settlement,
                        });
                    }
                    Err(error) => eprintln!("  {broker} at {offered_per_s}/s: {error}"),
                }
            }
        }
    }
    Ok(found)
}
