//! Events for the memory broker, which nobody else can reach: CloudEvents from standard input, one JSON document a line.

use std::io::{BufRead, Read};
use std::sync::Arc;

use hapax::Headers;
use hapax_memory::MemoryBroker;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::brokers::Queue;

/// Lines read ahead.
const AHEAD_MAX: usize = 64;
/// Longest line; a longer one is cut, and set aside as too large.
const LINE_MAX: u64 = 2 << 20;

/// Feeds the memory broker; any other has its events from elsewhere.
pub(crate) fn from_stdin(queue: &Queue) -> Option<JoinHandle<()>> {
    let Queue::Memory(broker) = queue else { return None };
    let (lines, receiver) = mpsc::channel(AHEAD_MAX);
    // Not joined: it may wait for standard input when the program ends.
    std::thread::spawn(move || read(&lines));
    Some(tokio::spawn(feed(receiver, Arc::clone(broker))))
}

fn read(lines: &mpsc::Sender<Vec<u8>>) {
    let mut stdin = std::io::stdin().lock();
    loop {
        let mut line = Vec::new();
        match stdin.by_ref().take(LINE_MAX).read_until(b'\n', &mut line) {
            Ok(0) => return,
            Ok(_) if line.trim_ascii().is_empty() => continue,
            Ok(_) => {}
            Err(error) => return tracing::error!(%error, "standard input cannot be read further"),
        }
        if !line.ends_with(b"\n") && line.len() as u64 == LINE_MAX && stdin.skip_until(b'\n').is_err() {
            return;
        }
        if lines.blocking_send(line).is_err() {
            return;
        }
    }
}

async fn feed(mut lines: mpsc::Receiver<Vec<u8>>, broker: Arc<MemoryBroker>) {
    let publisher = broker.publisher();
    while let Some(line) = lines.recv().await {
        publisher.send_wire(Headers::from_iter([("content-type", "application/cloudevents+json")]), line).await;
    }
}
