//! What is shown and must compile, and what must not: doc tests, nothing else. The examples are beside it.
//!
//! # What must not compile
//!
//! A transactional handler takes the transaction of the consumer's own store:
//!
//! ```
//! use hapax::{Consumer, Context, Failure, Message};
//! use hapax_sqlite::{SqliteStore, SqliteTx};
//! # use std::sync::Arc;
//! async fn handler(_: Arc<Message>, _: SqliteTx, _: Context<()>) -> Result<(), Failure> { Ok(()) }
//! fn wire(store: SqliteStore) { let _ = Consumer::builder("c", hapax_memory::MemoryBroker::new("t"), store).on_any_tx(handler); }
//! ```
//!
//! One for another database is refused:
//!
//! ```compile_fail,E0277
//! use hapax::{Consumer, Context, Failure, Message};
//! use hapax_sqlite::{SqliteStore, SqliteTx};
//! # use std::sync::Arc;
//! struct PgTx;
//! async fn handler(_: Arc<Message>, _: PgTx, _: Context<()>) -> Result<(), Failure> { Ok(()) }
//! fn wire(store: SqliteStore) { let _ = Consumer::builder("c", hapax_memory::MemoryBroker::new("t"), store).on_any_tx(handler); }
//! ```
//!
//! So is any on a store without transactions:
//!
//! ```compile_fail,E0277
//! use hapax::{Consumer, Context, Failure, Message};
//! use hapax_sqlite::{SqliteStore, SqliteTx};
//! # use std::sync::Arc;
//! async fn handler(_: Arc<Message>, _: SqliteTx, _: Context<()>) -> Result<(), Failure> { Ok(()) }
//! fn wire(store: hapax_memory::MemoryStore) { let _ = Consumer::builder("c", hapax_memory::MemoryBroker::new("t"), store).on_any_tx(handler); }
//! ```
//!
//! A handler sees the consumer's own state:
//!
//! ```compile_fail,E0277
//! use hapax::{Consumer, Context, Failure, Message};
//! # use std::sync::Arc;
//! async fn handler(_: Arc<Message>, _: Context<u32>) -> Result<(), Failure> { Ok(()) }
//! fn wire(store: hapax_memory::MemoryStore) { let _ = Consumer::builder("c", hapax_memory::MemoryBroker::new("t"), store).state("text").on_any(handler); }
//! ```
//!
//! and its error says what a failure means:
//!
//! ```compile_fail,E0277
//! use hapax::{Consumer, Context, Message};
//! # use std::sync::Arc;
//! async fn handler(_: Arc<Message>, _: Context<()>) -> Result<(), std::io::Error> { Ok(()) }
//! fn wire(store: hapax_memory::MemoryStore) { let _ = Consumer::builder("c", hapax_memory::MemoryBroker::new("t"), store).on_any(handler); }
//! ```

/// The example of README.md.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
pub struct Readme;
