//! One connection through the proxy: two pumps, and what ends them early.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;

use super::{After, Mode, Shared};

const BUFFER_BYTES: usize = 16 * 1024;
const CONNECT_MAX: Duration = Duration::from_secs(5);

/// Why a connection ended.
enum Ending {
    /// Both directions are closed as the peers closed them.
    Closed,
    /// A peer, or its socket, failed.
    Broken,
    /// By order, on both sides.
    Cut,
    /// By order on the client's side; the server still gets what was passed, and then an end.
    CutBehindRequest,
}

pub(super) async fn run(mut client: TcpStream, shared: Arc<Shared>) {
    let mut mode = shared.mode.subscribe();
    let born = mode.borrow().cuts;
    let connect = tokio::time::timeout(CONNECT_MAX, TcpStream::connect(&shared.upstream));
    let Ok(Ok(mut server)) = connect.await else {
        reset(client);
        return shared.count_reset();
    };
    // Frames pass as they come: a proxy that waits would be slower than the link it stands for.
    let _ = client.set_nodelay(true);
    let _ = server.set_nodelay(true);
    match carry(&mut client, &mut server, &shared, &mut mode, born).await {
        Ending::Closed => return,
        Ending::Broken => {
            reset(client);
            return reset(server);
        }
        Ending::CutBehindRequest => reset(client),
        Ending::Cut => {
            reset(client);
            reset(server);
        }
    }
    shared.count_reset();
}

/// Ends a connection so that its peer sees a reset, and not an orderly end.
pub(super) fn reset(stream: TcpStream) {
    // Without it the peer sees an end of stream; nothing else to do about a socket that is broken already.
    let _ = stream.set_zero_linger();
    drop(stream);
}

async fn carry(
    client: &mut TcpStream,
    server: &mut TcpStream,
    shared: &Shared,
    mode: &mut watch::Receiver<Mode>,
    born: u64,
) -> Ending {
    let (from_client, to_client) = client.split();
    let (from_server, to_server) = server.split();
    // Whether the request that `After::Reply` waits for went through this connection.
    let (request, asked) = watch::channel(false);
    let requests = requests(from_client, to_server, shared, request);
    let replies = replies(from_server, to_client, shared, asked);
    tokio::select! {
        // An order to cut comes before bytes that are ready.
        biased;
        _ = mode.wait_for(|mode| mode.cuts > born) => Ending::Cut,
        ended = async { tokio::try_join!(requests, replies) } => match ended {
            Ok(_) => Ending::Closed,
            Err(ending) => ending,
        },
    }
}

async fn requests(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    shared: &Shared,
    asked: watch::Sender<bool>,
) -> Result<(), Ending> {
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut mode = shared.mode.subscribe();
    loop {
        let count = from.read(&mut buffer).await?;
        flowing(&mut mode).await;
        if count == 0 {
            to.shutdown().await?;
            return Ok(());
        }
        let (pass, cut) = shared.take_armed(count, &asked);
        to.write_all(&buffer[..pass]).await?;
        if cut {
            return Err(Ending::CutBehindRequest);
        }
    }
}

async fn replies(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    shared: &Shared,
    asked: watch::Receiver<bool>,
) -> Result<(), Ending> {
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut mode = shared.mode.subscribe();
    loop {
        let count = from.read(&mut buffer).await?;
        flowing(&mut mode).await;
        if *asked.borrow() {
            return Err(Ending::Cut);
        }
        let swallow = mode.borrow_and_update().swallow;
        if let Some(cut_after) = swallow {
            return Err(lose(from, &mut buffer, &mut mode, cut_after).await);
        }
        if count == 0 {
            to.shutdown().await?;
            return Ok(());
        }
        to.write_all(&buffer[..count]).await?;
    }
}

/// Reads what the server says and throws it away, until the connection is to end: a stream with a gap is never continued.
async fn lose(
    mut from: impl AsyncRead + Unpin,
    buffer: &mut [u8],
    mode: &mut watch::Receiver<Mode>,
    cut_after: Duration,
) -> Ending {
    let drain = async {
        while matches!(from.read(buffer).await, Ok(1..)) {}
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = drain => {}
        () = tokio::time::sleep(cut_after) => {}
        _ = mode.wait_for(|mode| mode.swallow.is_none()) => {}
    }
    Ending::Cut
}

async fn flowing(mode: &mut watch::Receiver<Mode>) {
    // The sender is held by the caller's `Shared`.
    let _ = mode.wait_for(|mode| !mode.frozen).await;
}

impl Shared {
    fn count_reset(&self) {
        self.resets.send_modify(|resets| *resets += 1);
    }

    /// How much of `count` bytes of a request pass, and whether the connection is cut behind them.
    fn take_armed(&self, count: usize, asked: &watch::Sender<bool>) -> (usize, bool) {
        let mut answer = (count, false);
        self.mode.send_if_modified(|mode| {
            match mode.armed {
                None => {}
                Some(After::Reply) => {
                    mode.armed = None;
                    asked.send_replace(true);
                }
                Some(After::Bytes(left)) if count < left => mode.armed = Some(After::Bytes(left - count)),
                Some(After::Bytes(left)) => {
                    mode.armed = None;
                    answer = (left, true);
                }
            }
            // Nobody waits for this part of the mode.
            false
        });
        answer
    }
}

impl From<io::Error> for Ending {
    fn from(_: io::Error) -> Self {
        Self::Broken
    }
}
