//! mq-bridge on Kafka: a route with a handler that takes whole batches of 512 (its default), without deduplication or with
//! its store in memory or PostgreSQL. The key of its deduplication is the message's id, which it reads from the record key.

use std::sync::Arc;

use clap::Parser;
use compare_kit::{Arguments, Meter};
use mq_bridge::errors::HandlerError;
use mq_bridge::models::Endpoint;
use mq_bridge::traits::Handler;
use mq_bridge::{CanonicalMessage, Handled, Route};
use serde_json::json;

struct Counting(Arc<Meter>);

#[async_trait::async_trait]
impl Handler for Counting {
    async fn handle(&self, message: CanonicalMessage) -> Result<Handled, HandlerError> {
        self.0.handled(&message.payload);
        Ok(Handled::Ack)
    }
}

#[tokio::main(worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let meter = Arc::new(Meter::new(&arguments));
    let table = arguments.group.replace('-', "_");
    let store = match arguments.store.as_str() {
        "memory" => Some(format!("memory://{table}?max_keys=20000000")),
        "postgres" => Some(format!("{}/{table}", arguments.store_url)),
        _ => None,
    };
    let middlewares: Vec<_> =
        store.iter().map(|store| json!({ "deduplication": { "store": store, "ttl_seconds": 691_200 } })).collect();
    let url = arguments.url.trim_start_matches("kafka://");
    let input: Endpoint = serde_json::from_value(json!({
        "middlewares": middlewares,
        "kafka": { "url": url, "topic": arguments.topic, "group_id": arguments.group },
    }))?;
    let output: Endpoint = serde_json::from_value(json!({ "null": null }))?;
    let route = Route::new(input, output)
        .with_batch_size(512)
        .with_concurrency(arguments.concurrency)
        .with_handler(Counting(Arc::clone(&meter)));
    route.deploy(&table).await?;
    meter.all_handled().await;
    meter.report();
    Route::stop(&table).await;
    if arguments.store == "postgres" {
        let pool = sqlx::PgPool::connect(&arguments.store_url).await?;
        sqlx::raw_sql(sqlx::AssertSqlSafe(format!("DROP TABLE IF EXISTS {table}"))).execute(&pool).await?;
    }
    Ok(())
}
