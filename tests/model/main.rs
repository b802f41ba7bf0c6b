//! A model of one delivery's life (design.md section 6), explored exhaustively: whatever crashes, pauses and lost
//! answers do, in whatever order, the invariants of semantics.md section 3.2 hold; and each wrong variant breaks them.
//!
//! **Modelled.** One event, of which the broker holds one or two copies. Each may be delivered again at any time until
//! it is acked, to two or three workers that follow the life step by step. The store's record: claimed, waiting (due or
//! not), doomed, processed, dead-lettered, with fence, attempt, crashes and token. A handler that succeeds, fails
//! retryably, for good, or uncounted; with its effect apart from the record or in one transaction with it. The dead
//! letter in its weakest form: placed and acked in two steps, between `Doomed` and `DeadLettered`. Renewal, the retry
//! wait, sweep, an operator who sends dead letters back, even the same one twice.
//!
//! **Faults**, each so often as the scenario says: a worker dies; a lease expires under a worker that lives; a
//! worker stops waiting for the store, whose request takes place at any later time or never (a lost answer is one that
//! takes place at once; a commit becomes unknown, and the worker claims again with its token); the broker's answer or
//! the ack itself is lost; the store forgets the record (a window, hence only in a variant).
//!
//! **Left out.** Other events, so lanes, batches and the kill switch. Fingerprints and conflicts. Clocks: a deadline
//! passes at any moment, and the claim floor of a forgotten record is simply above every fence granted. Sessions: an ack
//! of a delivery that is no longer its worker's counts (the weakest broker, Redis). Settling `Retry`: the copy is given
//! back. A failure comes before the effect; partial effects are the crash explorer's matter. What a handler publishes.
//! Liveness is that of states, not of paths: nobody has work left, or everything is settled.
//!
//! | variant | broken |
//! |---|---|
//! | the protocol | nothing; not promised: S13 without a transaction |
//! | A completion without fence | S2 S6 |
//! | B release without fence | S2 S3 S4 S6 S12 S15 S16 |
//! | C attempts counted on failure | S15 S16 |
//! | D record deleted on ack | S2 S3 S4 S12 S15 S16 |
//! | E fenced worker acks | S1 S7 S8 |
//! | E' fenced worker drops its delivery | L1 |
//! | F store forgets a record | S2 S3 S4 S12 S15 S16 |
//! | G ack while another holds the event | S1 S7 |
//! | H marked before the handler runs | S1 |
//! | I dead letter before any mark | S2 S3 |
//! | I' dead letter after the last mark | S1 S7 S22 |
//! | J any duplicate of a dead letter reopens | S2 S3 S15 S16 `EveryLetterRuns` |
//! | J' reopen token never spent | S2 S3 S15 S16 |
//! | J'' no reopening while doomed | `RedriveRuns` `EveryLetterRuns` |
//! | J''' only the last letter reopens | `EveryLetterRuns` |
//! | K renewal without fence | S4 S6 S12 |
//! | L sweep too early | S2 S3 S12 S15 S16 S24 |
//! | L' sweep of anything | S2 S3 S4 S12 S15 S16 S24 |
//! | M uncounted failure keeps its attempt | `ChancesKept` |
//! | M' uncounted failure lowers the fence | S5 |
//! | N retry wait ignored | S20 |
//! | O one token for a whole process | S4 S12 S15 |
//! | P unknown commit tried again within its attempt | S15 |
//! | P' that, and the transaction commits on `AlreadyDone` | S12 S13 S15 |
//!
//! `specification.rs` ties the model's store to `hapax::record`, the machine that every store is checked against.

mod exploration;
mod holds;
mod invariant;
mod protocol;
mod rest;
mod scenario;
mod specification;
mod state;
mod store;
mod variant;
mod witness;
mod wrong;
