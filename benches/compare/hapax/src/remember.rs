//! Fills a store with processed events that no topic has, through its own contract.

use hapax::{BoxError, Claim, ClaimRequest, EventKey, Fingerprint, Outcome, ProcessedStore, Settings};

/// Events of one call.
const BATCH: u64 = 1_024;

pub async fn fill(store: &dyn ProcessedStore, from: u64, events: u64) -> Result<(), BoxError> {
    if events == 0 {
        return Ok(());
    }
    let consumer = store.open("compared", Settings::RETENTION).await?;
    for first in (from..from + events).step_by(BATCH as usize) {
        let request = |number: u64| ClaimRequest {
            consumer,
            key: EventKey::of("compared", "/remembered", &number.to_string()),
            fingerprint: Fingerprint::ANY,
            token: u128::from(number),
            reopen: None,
        };
        let requests: Vec<_> = (first..(first + BATCH).min(from + events)).map(request).collect();
        let claims = store.claim(&requests, Settings::LEASE).await?;
        let granted = claims.into_iter().filter_map(|claim| match claim {
            Claim::Granted(lease, _) => Some((lease, Outcome::Processed)),
            _ => None,
        });
        store.record(&granted.collect::<Vec<_>>()).await?;
    }
    Ok(())
}
