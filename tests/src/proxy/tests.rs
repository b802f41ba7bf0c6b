//! The proxy against a server that answers each byte with the same byte, and counts what it got.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::{After, Proxy};

const SOON: Duration = Duration::from_secs(5);
const QUIET: Duration = Duration::from_millis(100);

struct Echo {
    address: String,
    got: Arc<AtomicUsize>,
}

impl Echo {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let got = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&got);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let count = Arc::clone(&count);
                tokio::spawn(async move {
                    let mut buffer = [0; 4096];
                    while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                        count.fetch_add(read, Ordering::SeqCst);
                        if stream.write_all(&buffer[..read]).await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        Self { address, got }
    }

    async fn got(&self, bytes: usize) {
        timeout(SOON, async {
            while self.got.load(Ordering::SeqCst) < bytes {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await
        .expect("the server gets the bytes");
    }
}

async fn linked() -> (Echo, Proxy, TcpStream) {
    let echo = Echo::start().await;
    let proxy = Proxy::start(echo.address.clone()).await.unwrap();
    let client = TcpStream::connect(proxy.address()).await.unwrap();
    (echo, proxy, client)
}

async fn talk(client: &mut TcpStream, text: &[u8]) -> std::io::Result<Vec<u8>> {
    client.write_all(text).await?;
    hear(client, text.len()).await
}

async fn hear(client: &mut TcpStream, bytes: usize) -> std::io::Result<Vec<u8>> {
    let mut answer = vec![0; bytes];
    timeout(SOON, client.read_exact(&mut answer)).await.expect("an answer or an end")?;
    Ok(answer)
}

async fn silent(client: &mut TcpStream) -> bool {
    timeout(QUIET, client.read(&mut [0])).await.is_err()
}

async fn is_reset(client: &mut TcpStream) -> bool {
    let read = timeout(SOON, client.read(&mut [0])).await.expect("the connection ends");
    matches!(read, Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset)
}

#[tokio::test]
async fn bytes_pass_both_ways_whatever_their_number() {
    let (_echo, proxy, client) = linked().await;
    let sent: Vec<u8> = (0..1_000_000_u32).map(|n| (n % 251) as u8).collect();
    let (mut reading, mut writing) = client.into_split();
    let expected = sent.clone();
    let writer = tokio::spawn(async move {
        writing.write_all(&sent).await.unwrap();
        writing.shutdown().await.unwrap();
    });
    let mut got = Vec::new();
    timeout(SOON, reading.read_to_end(&mut got)).await.unwrap().unwrap();
    writer.await.unwrap();
    assert_eq!(got, expected);
    assert_eq!((proxy.accepted(), proxy.resets()), (1, 0));
}

#[tokio::test]
async fn a_cut_resets_what_is_open_and_what_comes_until_it_heals() {
    let (echo, proxy, mut client) = linked().await;
    assert_eq!(talk(&mut client, b"one").await.unwrap(), b"one");
    proxy.cut();
    assert!(is_reset(&mut client).await);
    let mut refused = TcpStream::connect(proxy.address()).await.unwrap();
    assert!(talk(&mut refused, b"two").await.is_err());
    proxy.heal();
    let mut third = TcpStream::connect(proxy.address()).await.unwrap();
    assert_eq!(talk(&mut third, b"three").await.unwrap(), b"three");
    assert_eq!(echo.got.load(Ordering::SeqCst), "onethree".len());
    assert_eq!(proxy.resets(), 2);
}

#[tokio::test]
async fn dropped_connections_may_come_back_at_once() {
    let (_echo, proxy, mut client) = linked().await;
    talk(&mut client, b"one").await.unwrap();
    proxy.drop_connections();
    assert!(is_reset(&mut client).await);
    let mut second = TcpStream::connect(proxy.address()).await.unwrap();
    assert_eq!(talk(&mut second, b"two").await.unwrap(), b"two");
}

#[tokio::test]
async fn a_frozen_link_carries_nothing_and_loses_nothing() {
    let (echo, proxy, mut client) = linked().await;
    talk(&mut client, b"one").await.unwrap();
    proxy.freeze();
    client.write_all(b"two").await.unwrap();
    assert!(silent(&mut client).await);
    assert_eq!(echo.got.load(Ordering::SeqCst), "one".len());
    proxy.heal();
    assert_eq!(hear(&mut client, 3).await.unwrap(), b"two");
}

#[tokio::test]
async fn a_frozen_link_can_be_cut() {
    let (_echo, proxy, mut client) = linked().await;
    talk(&mut client, b"one").await.unwrap();
    proxy.freeze();
    client.write_all(b"two").await.unwrap();
    proxy.drop_connections();
    assert!(is_reset(&mut client).await);
}

#[tokio::test]
async fn swallowed_replies_belong_to_requests_that_arrived() {
    let (echo, proxy, mut client) = linked().await;
    talk(&mut client, b"one").await.unwrap();
    proxy.swallow_replies(QUIET * 3);
    client.write_all(b"two").await.unwrap();
    echo.got("onetwo".len()).await;
    assert!(silent(&mut client).await);
    assert!(is_reset(&mut client).await, "after the time given");
    proxy.heal();
    let mut second = TcpStream::connect(proxy.address()).await.unwrap();
    assert_eq!(talk(&mut second, b"three").await.unwrap(), b"three");
}

#[tokio::test]
async fn a_connection_with_a_gap_does_not_outlive_the_healing_and_one_without_does() {
    let (echo, proxy, mut client) = linked().await;
    let mut idle = TcpStream::connect(proxy.address()).await.unwrap();
    talk(&mut idle, b"one").await.unwrap();
    proxy.swallow_replies(Duration::from_secs(3600));
    client.write_all(b"two").await.unwrap();
    echo.got("onetwo".len()).await;
    assert!(silent(&mut client).await);
    proxy.heal();
    assert!(is_reset(&mut client).await);
    assert_eq!(talk(&mut idle, b"three").await.unwrap(), b"three");
}

#[tokio::test]
async fn the_next_request_is_applied_and_its_reply_lost_once() {
    let (echo, proxy, mut client) = linked().await;
    talk(&mut client, b"one").await.unwrap();
    proxy.cut_after_request(After::Reply);
    client.write_all(b"two").await.unwrap();
    assert!(is_reset(&mut client).await);
    timeout(SOON, proxy.resets_reach(1)).await.unwrap();
    echo.got("onetwo".len()).await;
    let mut second = TcpStream::connect(proxy.address()).await.unwrap();
    assert_eq!(talk(&mut second, b"three").await.unwrap(), b"three");
}

#[tokio::test]
async fn a_request_is_cut_behind_the_byte_that_was_named() {
    let (echo, proxy, mut client) = linked().await;
    proxy.cut_after_request(After::Bytes(5));
    client.write_all(b"abc").await.unwrap();
    echo.got(3).await;
    client.write_all(b"defgh").await.unwrap();
    timeout(SOON, proxy.resets_reach(1)).await.unwrap();
    echo.got(5).await;
    tokio::time::sleep(QUIET).await;
    assert_eq!(echo.got.load(Ordering::SeqCst), 5);
}

#[tokio::test]
async fn a_server_that_is_away_looks_like_a_reset() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    drop(listener);
    let proxy = Proxy::start(address).await.unwrap();
    let mut client = TcpStream::connect(proxy.address()).await.unwrap();
    assert!(is_reset(&mut client).await);
}

#[tokio::test]
async fn connections_end_with_the_proxy() {
    let (_echo, proxy, mut client) = linked().await;
    talk(&mut client, b"one").await.unwrap();
    drop(proxy);
    let read = timeout(SOON, client.read(&mut [0])).await.expect("the connection ends");
    assert!(matches!(read, Ok(0) | Err(_)));
}
