//! webhook_worker
fn main() {}
