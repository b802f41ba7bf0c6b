//! What people write by hand, and what bounds every framework: the client's loop alone, the loop with a store in
//! batches, the idempotent consumer one message after the other, the transaction for each message.

mod batched;
mod by_hand;
mod raw;
mod source;
mod store;

use clap::Parser;
use compare_kit::{Arguments, Meter};
use source::Error;

#[tokio::main(worker_threads = 2)]
async fn main() -> Result<(), Error> {
    let arguments = Arguments::parse();
    let meter = Meter::new(&arguments);
    match arguments.contender.as_str() {
        "raw" => raw::run(&arguments, &meter).await,
        "batched" => batched::run(&arguments, &meter).await,
        "by-hand" => by_hand::one_by_one(&arguments, &meter).await,
        "by-hand-tx" => by_hand::in_transactions(&arguments, meter).await,
        other => Err(format!("there is no contender {other}").into()),
    }?;
    store::Store::drop_all(&arguments).await
}
