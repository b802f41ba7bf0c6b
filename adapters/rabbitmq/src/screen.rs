//! What RabbitMQ sends, screened before lapin reads it.
//!
//! lapin reads nested headers by recursion on a thread of its own, so one message of another client, a few thousand arrays in
//! one another, overflows a stack, which ends the process, and does so again at the next delivery. A name or a routing key that
//! is no UTF-8, or a header frame that RabbitMQ made larger than agreed, ends the connection each time. Here such a message is
//! mended and arrives; where its headers were changed it is marked, and goes to the dead letters. The rest passes as it is.

mod header;
mod method;

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use async_rs::traits::Reactor;
use async_rs::util::RuntimeParts;
use async_rs::{Runtime, Tokio};
use futures_io::{AsyncRead, AsyncWrite};
use futures_util::Stream;
use lapin::tcp::{AMQPUriTcpExt, AsyncTcpStream, OwnedTLSConfig};
use lapin::uri::AMQPUri;
use lapin::{Connection, ConnectionProperties};

use header::HEAD_BYTES;
pub(crate) use header::MARK;

/// Bytes of one read.
const READ_BYTES: usize = 64 * 1024;
/// The most bytes of a frame that is kept until it is complete. RabbitMQ takes frames of 128 KiB unless told otherwise.
const KEPT_BYTES_MAX: usize = 64 * 1024 * 1024;
const METHOD: u8 = 1;
const HEADER: u8 = 2;
/// Class and method of `connection.tune`.
const TUNE: [u8; 4] = [0, 10, 0, 30];

type Transport = AsyncTcpStream<<Tokio as Reactor>::TcpStream>;

/// Connects as lapin does, with the screen in between; for `amqps` it stands behind the decryption.
pub(crate) async fn connect(
    uri: AMQPUri,
    properties: ConnectionProperties,
    tls: OwnedTLSConfig,
) -> lapin::Result<Connection> {
    let runtime = Runtime::new(RuntimeParts::new(Tokio::current(), Plumbing(Tokio::current())));
    let asked = uri.query.frame_max.unwrap_or_default();
    let connecting = async move |uri: AMQPUri, _: Runtime<RuntimeParts<Tokio, Plumbing>>| {
        let runtime = Runtime::new(Tokio::current());
        let transport = uri.connect_with_config_async(tls.as_ref(), &runtime).await?;
        Ok(AsyncTcpStream::Plain(Screened::new(transport, asked)))
    };
    Connection::connector(uri, runtime, connecting, properties).await
}

/// A transport whose incoming frames are screened.
pub(crate) struct Screened<T> {
    transport: T,
    screen: Screen,
    scratch: Box<[u8]>,
}

impl<T> Screened<T> {
    fn new(transport: T, frame_max: u32) -> Self {
        let screen = Screen { frame_max: agreed(frame_max, 0), ..Screen::default() };
        Self { transport, screen, scratch: vec![0; READ_BYTES].into() }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Screened<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut [u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        loop {
            let handed_out = this.screen.hand_out(out);
            if handed_out > 0 || out.is_empty() {
                return Poll::Ready(Ok(handed_out));
            }
            let read = ready!(Pin::new(&mut this.transport).poll_read(cx, &mut this.scratch))?;
            if read == 0 {
                return Poll::Ready(Ok(0));
            }
            this.screen.take_in(&this.scratch[..read])?;
        }
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Screened<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.transport).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.transport).poll_write_vectored(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.transport).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.transport).poll_close(cx)
    }
}

/// The smaller of two frame sizes, where 0 is none.
fn agreed(one: u32, other: u32) -> u32 {
    if one == 0 || other == 0 { one.max(other) } else { one.min(other) }
}

/// Frames on their way in.
#[derive(Debug, Default)]
struct Screen {
    bytes: Vec<u8>,
    /// So many of them were handed out.
    handed_out: usize,
    /// So many of them may be.
    ready: usize,
    /// How many bytes still to come pass without a look: the rest of a frame.
    passing: usize,
    /// The largest frame of this connection, as the server said; 0 before.
    frame_max: u32,
}

impl Screen {
    fn hand_out(&mut self, out: &mut [u8]) -> usize {
        let count = out.len().min(self.ready - self.handed_out);
        out[..count].copy_from_slice(&self.bytes[self.handed_out..self.handed_out + count]);
        self.handed_out += count;
        count
    }

    /// Everything that was ready has been handed out.
    fn take_in(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.bytes.drain(..self.handed_out);
        self.ready -= self.handed_out;
        self.handed_out = 0;
        self.bytes.extend_from_slice(bytes);
        loop {
            let pass = self.passing.min(self.bytes.len() - self.ready);
            self.passing -= pass;
            self.ready += pass;
            let Some(head) = self.bytes.get(self.ready..self.ready + HEAD_BYTES) else { return Ok(()) };
            let (kind, size) = (head[0], u32::from_be_bytes([head[3], head[4], head[5], head[6]]) as usize);
            let whole = size.saturating_add(HEAD_BYTES + 1);
            if kind != HEADER && kind != METHOD {
                self.passing = whole;
                continue;
            }
            if whole > KEPT_BYTES_MAX {
                return Err(invalid("a frame is larger than anybody makes it"));
            }
            if self.bytes.len() - self.ready < whole {
                return Ok(());
            }
            let frame = self.ready..self.ready + whole;
            if kind == METHOD {
                if method::mend(&mut self.bytes[frame.clone()]) {
                    tracing::warn!(
                        "RabbitMQ: the routing key of a message, or an explanation, is no UTF-8; it is read with `?`"
                    );
                }
                self.hear_tune(frame);
                self.ready += whole;
                continue;
            }
            let most = if self.frame_max == 0 { usize::MAX } else { self.frame_max as usize };
            let mended = header::mend(&mut self.bytes[frame.clone()], most);
            match mended.map_err(|_| invalid("a content header is not as AMQP says"))? {
                None => self.ready += whole,
                Some(mended) => {
                    tracing::warn!(
                        "RabbitMQ: the headers of a message are nested too deeply, no UTF-8, or too large for a frame; it arrives \
                         without what cannot be read"
                    );
                    self.ready += mended.len();
                    self.bytes.splice(frame, mended);
                }
            }
        }
    }

    fn hear_tune(&mut self, frame: std::ops::Range<usize>) {
        let arguments = self.bytes[frame].get(HEAD_BYTES..).and_then(|payload| payload.strip_prefix(&TUNE));
        if let Some([_, _, a, b, c, d, ..]) = arguments {
            self.frame_max = agreed(self.frame_max, u32::from_be_bytes([*a, *b, *c, *d]));
        }
    }
}

fn invalid(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// Tokio's reactor with screened streams, since lapin takes no stream but its reactor's.
#[derive(Clone, Debug)]
pub(crate) struct Plumbing(Tokio);

impl Reactor for Plumbing {
    type TcpStream = Screened<Transport>;
    type Sleep = <Tokio as Reactor>::Sleep;

    /// lapin registers nothing.
    fn register<H: io::Read + io::Write + Send + 'static>(
        &self,
        _: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        Err::<Self::TcpStream, _>(io::ErrorKind::Unsupported.into())
    }

    fn sleep(&self, how_long: Duration) -> Self::Sleep {
        self.0.sleep(how_long)
    }

    fn interval(&self, every: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.0.interval(every)
    }

    fn tcp_connect_addr(
        &self,
        address: SocketAddr,
    ) -> impl Future<Output = io::Result<Self::TcpStream>> + Send + 'static {
        let connecting = self.0.tcp_connect_addr(address);
        async move { Ok(Screened::new(AsyncTcpStream::Plain(connecting.await?), 0)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, channel: u8, payload: &[u8]) -> Vec<u8> {
        let size = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&[kind, 0, channel][..], &size, payload, &[0xce]].concat()
    }

    /// A content header with one property, the type of the content.
    fn header(content_type: &[u8]) -> Vec<u8> {
        let length = u8::try_from(content_type.len()).unwrap();
        frame(HEADER, 1, &[&[0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0x80, 0][..], &[length], content_type].concat())
    }

    fn tune(frame_max: u32) -> Vec<u8> {
        frame(METHOD, 0, &[&TUNE[..], &[0, 9], &frame_max.to_be_bytes(), &[0, 60]].concat())
    }

    /// What comes out when so many bytes come in, and are asked for, at a time.
    fn screened(bytes: &[u8], at_a_time: usize) -> (Vec<u8>, Screen) {
        let (mut screen, mut all, mut out) = (Screen::default(), Vec::new(), vec![0; at_a_time]);
        for chunk in bytes.chunks(at_a_time) {
            screen.take_in(chunk).unwrap();
            while let count @ 1.. = screen.hand_out(&mut out) {
                all.extend_from_slice(&out[..count]);
            }
        }
        (all, screen)
    }

    #[test]
    fn what_is_sound_passes_however_it_is_cut() {
        let body = frame(3, 1, &[2; 300]);
        let stream = [tune(131_072), header(b"text/plain"), body.clone(), frame(8, 0, &[]), header(b""), body].concat();
        for at_a_time in [1, 2, 7, 8, 64, 10_000] {
            assert_eq!(screened(&stream, at_a_time).0, stream, "{at_a_time} at a time");
        }
    }

    #[test]
    fn only_the_header_that_is_not_sound_is_changed_however_it_is_cut() {
        let (first, last) = ([tune(0), frame(3, 1, &[0xff; 20])].concat(), [header(b"a"), frame(3, 1, &[1])].concat());
        let stream = [first.clone(), header(b"\xff"), last.clone()].concat();
        let whole = screened(&stream, stream.len()).0;
        let changed =
            whole.strip_prefix(&*first).and_then(|rest| rest.strip_suffix(&*last)).expect("the rest as it was");
        assert!(changed.windows(MARK.len()).any(|part| part == MARK.as_bytes()), "{changed:?}");
        for at_a_time in [1, 3, 9, 50] {
            assert_eq!(screened(&stream, at_a_time).0, whole, "{at_a_time} at a time");
        }
    }

    #[test]
    fn the_size_of_a_frame_is_the_smaller_of_what_both_said() {
        assert_eq!(screened(&tune(131_072), 5).1.frame_max, 131_072);
        let mut asked = Screen { frame_max: 8_192, ..Screen::default() };
        asked.take_in(&tune(131_072)).unwrap();
        assert_eq!(asked.frame_max, 8_192);
        assert_eq!([agreed(0, 0), agreed(0, 5), agreed(5, 0), agreed(5, 4)], [0, 5, 5, 4]);
    }

    /// Instead of memory without a bound.
    #[test]
    fn a_frame_that_nobody_makes_is_an_error() {
        let mut screen = Screen::default();
        let error = screen.take_in(&[HEADER, 0, 1, 0xff, 0xff, 0xff, 0xff, 0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
