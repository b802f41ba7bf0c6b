//! AMQP by hand, as far as it takes to publish what no client library would send.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::soon;

/// A connection with one channel in confirm mode.
pub(crate) struct Raw {
    stream: TcpStream,
    pub(crate) frame_max: usize,
}

fn short(text: &[u8]) -> Vec<u8> {
    [&[u8::try_from(text.len()).unwrap()], text].concat()
}

fn long(bytes: &[u8]) -> Vec<u8> {
    [&u32::try_from(bytes.len()).unwrap().to_be_bytes()[..], bytes].concat()
}

/// A text as a value.
pub(crate) fn text(text: &[u8]) -> Vec<u8> {
    [&b"S"[..], &long(text)].concat()
}

/// Names and values as a table.
pub(crate) fn table(entries: &[(&[u8], Vec<u8>)]) -> Vec<u8> {
    long(&entries.iter().flat_map(|(name, value)| [short(name), value.clone()].concat()).collect::<Vec<_>>())
}

impl Raw {
    pub(crate) async fn connect(url: &str) -> Self {
        let rest = url.split_once("://").unwrap().1;
        let (authority, _) = rest.split_once('/').unwrap_or((rest, ""));
        let (login, host) = authority.rsplit_once('@').unwrap();
        let (user, password) = login.split_once(':').unwrap();
        let stream = soon("connect", TcpStream::connect(host)).await.unwrap();
        let mut raw = Self { stream, frame_max: 0 };
        raw.stream.write_all(b"AMQP\0\0\x09\x01").await.unwrap();
        raw.hear(10, 10).await;
        let login = format!("\0{user}\0{password}");
        raw.method(0, 10, 11, &[&long(b"")[..], &short(b"PLAIN"), &long(login.as_bytes()), &short(b"en_US")]).await;
        let tune = raw.hear(10, 30).await;
        raw.frame_max = u32::from_be_bytes(tune[2..6].try_into().unwrap()) as usize;
        raw.method(0, 10, 31, &[&tune[..6], &[0, 0]]).await;
        raw.method(0, 10, 40, &[&short(b"/")[..], &short(b""), &[0]]).await;
        raw.hear(10, 41).await;
        raw.method(1, 20, 10, &[&short(b"")]).await;
        raw.hear(20, 11).await;
        raw.method(1, 85, 10, &[&[0]]).await;
        raw.hear(85, 11).await;
        raw
    }

    /// Publishes through the default exchange and waits for the confirm. `headers` is a table with its length.
    pub(crate) async fn publish(&mut self, queue: &str, headers: &[u8], body: &[u8]) {
        self.publish_with("", queue.as_bytes(), 0, headers, body).await;
    }

    /// The same through an exchange, with any bytes as the key and further flags of properties.
    pub(crate) async fn publish_with(&mut self, exchange: &str, key: &[u8], flags: u16, headers: &[u8], body: &[u8]) {
        self.method(1, 60, 40, &[&[0, 0][..], &short(exchange.as_bytes()), &short(key), &[0]]).await;
        let flags = (flags | (1 << 13)).to_be_bytes();
        let size = (body.len() as u64).to_be_bytes();
        let header = [&[0, 60, 0, 0][..], &size, &flags, headers].concat();
        assert!(header.len() + 8 <= self.frame_max, "{} bytes", header.len());
        self.frame(2, 1, &header).await;
        self.frame(3, 1, body).await;
        self.hear(60, 80).await;
    }

    async fn method(&mut self, channel: u16, class: u16, method: u16, arguments: &[&[u8]]) {
        let payload = [&class.to_be_bytes()[..], &method.to_be_bytes(), &arguments.concat()].concat();
        self.frame(1, channel, &payload).await;
    }

    async fn frame(&mut self, kind: u8, channel: u16, payload: &[u8]) {
        let frame = [&[kind][..], &channel.to_be_bytes(), &long(payload), &[0xce]].concat();
        self.stream.write_all(&frame).await.unwrap();
    }

    /// The arguments of the next method, which is this one.
    async fn hear(&mut self, class: u16, method: u16) -> Vec<u8> {
        let hearing = async {
            loop {
                let mut head = [0; 7];
                self.stream.read_exact(&mut head).await.unwrap();
                let mut payload = vec![0; u32::from_be_bytes(head[3..].try_into().unwrap()) as usize + 1];
                self.stream.read_exact(&mut payload).await.unwrap();
                payload.pop();
                if head[0] == 1 {
                    return payload;
                }
            }
        };
        let payload = soon("an answer", hearing).await;
        let said = (u16::from_be_bytes([payload[0], payload[1]]), u16::from_be_bytes([payload[2], payload[3]]));
        assert_eq!(said, (class, method), "{}", String::from_utf8_lossy(&payload));
        payload[4..].to_vec()
    }
}
