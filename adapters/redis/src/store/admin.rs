//! `StoreAdmin`: looking into the store. Redis removes what is expired by itself, so there is nothing to sweep.

use async_trait::async_trait;
use hapax::{ConsumerId, EventKey, RecordView, Result, Status, StoreAdmin, Swept};
use redis::{Value, cmd};

use super::codec::{self, strange};
use super::{FORGET, LIST, LOOK, RedisStore, keys};

impl RedisStore {
    async fn number(&self, consumer: &str, operation: &'static str) -> Result<Option<ConsumerId>> {
        let mut find = cmd("HGET");
        find.arg(self.keys().numbers()).arg(consumer);
        let found = self.link().query(operation, &find).await?;
        let text: Option<String> = redis::from_redis_value(found).map_err(|_| strange(operation))?;
        text.map(|text| text.parse().map(ConsumerId).map_err(|_| strange(operation))).transpose()
    }

    /// Walks over one partition and keeps the oldest records in `status`, at most `limit`.
    async fn walk(
        &self,
        consumer: ConsumerId,
        status: Status,
        limit: usize,
        partition: u16,
        oldest: &mut Vec<(u64, RecordView)>,
    ) -> Result<()> {
        let keys = [self.keys().fence(partition)];
        let state = codec::state(status).to_string();
        let mut cursor = b"0".to_vec();
        loop {
            let arguments = [cursor, self.keys().pattern(partition, consumer), state.clone().into_bytes()];
            let answer = self.link().run("list", &LIST, &keys, &arguments).await?;
            let parts: Vec<Vec<u8>> = redis::from_redis_value(answer).map_err(|_| strange("list"))?;
            let [now, next, found @ ..] = parts.as_slice() else { return Err(strange("list")) };
            let now = codec::moment(now).ok_or_else(|| strange("list"))?;
            for pair in found.chunks_exact(2) {
                let key = keys::event(&pair[0]).ok_or_else(|| strange("list"))?;
                oldest.push(codec::view(key, &pair[1], now, "list")?);
            }
            // A walk may tell one key twice.
            oldest.sort_by_key(|(time, view)| (*time, view.key));
            oldest.dedup_by_key(|(_, view)| view.key);
            oldest.truncate(limit);
            if next == b"0" {
                return Ok(());
            }
            cursor = next.clone();
        }
    }
}

#[async_trait]
impl StoreAdmin for RedisStore {
    async fn look_up(&self, consumer: &str, key: EventKey) -> Result<Option<RecordView>> {
        let Some(number) = self.number(consumer, "look_up").await? else { return Ok(None) };
        let answer = self.link().run("look_up", &LOOK, &[self.record_key(number, key)], &[b""; 0]).await?;
        let (now, record): (Vec<u8>, Option<Vec<u8>>) =
            redis::from_redis_value(answer).map_err(|_| strange("look_up"))?;
        let now = codec::moment(&now).ok_or_else(|| strange("look_up"))?;
        let view = record.map(|record| codec::view(key, &record, now, "look_up")).transpose()?;
        Ok(view.map(|(_, view)| view))
    }

    /// Walks over every key of the server's database: for an operator's eyes, not for a loop.
    async fn list(&self, consumer: &str, status: Status, limit: usize) -> Result<Vec<RecordView>> {
        let Some(number) = self.number(consumer, "list").await? else { return Ok(Vec::new()) };
        let mut oldest = Vec::new();
        for partition in 0..self.partitions() {
            self.walk(number, status, limit, partition, &mut oldest).await?;
        }
        Ok(oldest.into_iter().map(|(_, view)| view).collect())
    }

    /// Nothing to do: Redis removes expired records itself.
    async fn sweep(&self, _limit: usize) -> Result<Swept> {
        Ok(Swept::default())
    }

    async fn forget(&self, consumer: &str, key: EventKey) -> Result<bool> {
        let Some(number) = self.number(consumer, "forget").await? else { return Ok(false) };
        let fence = self.keys().fence(keys::partition(key, self.partitions()));
        let answer = self.link().run("forget", &FORGET, &[fence, self.record_key(number, key)], &[b""; 0]).await?;
        match answer {
            Value::Int(count) => Ok(count > 0),
            _ => Err(strange("forget")),
        }
    }
}
