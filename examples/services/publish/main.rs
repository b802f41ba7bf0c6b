//! publish
fn main() {}
