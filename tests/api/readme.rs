//! README.md says of levels and windows what is computed, and names no command that nothing runs. Its example is a doc test
//! of the examples' package.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use hapax::{Consumer, Context, Effects, Failure, Guarantee, Level, Message, OpenWindow, Otherwise, Route};
use hapax_memory::{MemoryBroker, MemoryStore};
use hapax_sqlite::SqliteTx;

use crate::{OrderPlaced, Shop};

const README: &str = include_str!("../../README.md");

async fn plain(_: OrderPlaced, _: Context<()>) -> Result<(), Failure> {
    Ok(())
}

async fn keyed(_: Arc<Message>, _: Context<()>) -> Result<(), Failure> {
    Ok(())
}

async fn with_tx(_: OrderPlaced, _: SqliteTx, _: Context<()>) -> Result<(), Failure> {
    Ok(())
}

/// One line of the table in the README.
fn line(guarantee: &Guarantee, route: &str, written: &str) -> String {
    let handler = guarantee.handler(route).expect("it has this handler");
    let names = |windows: &[OpenWindow]| -> Vec<String> { windows.iter().map(|w| format!("`{}`", w.window)).collect() };
    let own = names(&handler.windows);
    let own = if own.is_empty() { "none".to_owned() } else { own.join(", ") };
    let common = names(&guarantee.windows).join(", ");
    let Guarantee { broker, store, .. } = guarantee;
    format!("| {broker}, {store} | {written} | {} | {own} | {common} |", handler.level)
}

#[tokio::test]
async fn the_table_of_levels_is_what_is_computed() {
    const KEYED: &str = "`Route::on(..).effects(Effects::keyed(24 h))`";
    let effects = Effects::keyed(Duration::from_hours(24));
    let shop = Shop::open().await;
    let mut table = String::new();

    let broker = MemoryBroker::new("orders");
    let memory = Consumer::builder("billing", broker, MemoryStore::new()).on(plain);
    let memory = memory.add(Route::on_any(keyed).effects(effects)).build().await.expect("memory and memory");
    for (route, written) in [("com.shop.order.placed", "`.on(..)`"), ("*", KEYED)] {
        writeln!(table, "{}", line(memory.guarantee(), route, written)).expect("a string takes it");
    }

    let builder = || Consumer::builder("billing", MemoryBroker::new("orders"), shop.store.clone());
    let sqlite =
        builder().on(plain).add(Route::on_any(keyed).effects(effects)).build().await.expect("memory and SQLite");
    for (route, written) in [("com.shop.order.placed", "`.on(..)`"), ("*", KEYED)] {
        writeln!(table, "{}", line(sqlite.guarantee(), route, written)).expect("a string takes it");
    }
    let sqlite = builder().on_tx(with_tx).otherwise(Otherwise::Ignore).build().await.expect("memory and SQLite");
    writeln!(table, "{}", line(sqlite.guarantee(), "com.shop.order.placed", "`.on_tx(..)`"))
        .expect("a string takes it");
    assert_eq!(sqlite.guarantee().level(), Level::ExactlyOnceEffect);

    assert!(README.contains(&table), "README.md is to hold:\n{table}");
    shop.store.close().await;
}

/// Those in a block of their own are run as they stand by `scripts/readme`; those within a line are parts of the gate.
#[test]
fn every_command_within_a_line_of_the_readme_is_a_part_of_the_gate() {
    const MANIFEST: &str = include_str!("../Cargo.toml");
    const EXAMPLES: &str = include_str!("../../scripts/examples");
    let commands: Vec<&str> = README.split('`').filter(|text| text.starts_with("cargo ")).collect();
    assert!(commands.len() > 3, "{commands:?}");
    for command in commands {
        let known = match command.split_once(" --test ").or_else(|| command.split_once(" --example ")) {
            Some(("cargo test -p hapax-testkit", suite)) => MANIFEST.contains(&format!("[[test]]\nname = \"{suite}\"")),
            Some(("cargo run", example)) => EXAMPLES.contains(&format!("\n{example}() {{\n")),
            _ => false,
        };
        assert!(known, "nothing is known to run `{command}`");
    }
}
