//! Invariant: a failure means what its author said: the class of a user's own error survives its way through a handler, and
//! an error that says nothing is tried again.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use hapax::{Context, Failure, FailureExt, IntoFailure, Message, Reason, Status};

use crate::rig::{Rig, event};

#[derive(Debug)]
enum ChargeError {
    Declined,
    Busy,
}

impl fmt::Display for ChargeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if matches!(self, Self::Declined) { "declined by the bank" } else { "the bank is busy" })
    }
}

impl std::error::Error for ChargeError {}

impl IntoFailure for ChargeError {
    fn into_failure(self) -> Failure {
        match self {
            Self::Declined => Failure::permanent("card declined").with_source(self),
            Self::Busy => Failure::retryable("busy").with_source(self),
        }
    }
}

fn charge(message: &Message) -> Result<(), ChargeError> {
    let data = &message.data[..];
    if data == b"declined" { Err(ChargeError::Declined) } else { Err(ChargeError::Busy) }
}

async fn typed(message: Arc<Message>, _: Context<()>) -> Result<(), ChargeError> {
    charge(&message)
}

async fn classified(message: Arc<Message>, _: Context<()>) -> Result<(), Failure> {
    charge(&message).classified()?;
    Ok(())
}

async fn bare(message: Arc<Message>, _: Context<()>) -> Result<(), Failure> {
    charge(&message)?;
    Ok(())
}

/// How often a handler ran for a declined card before it was set aside, why, and the error's text.
async fn outcome(wire: impl FnOnce(crate::rig::Builder) -> crate::rig::Builder) -> (u32, Reason, String) {
    let rig = Rig::new();
    let billing = rig.start("billing", |c| wire(c).attempts_max(3)).await;
    rig.send(event("1").with_data("text/plain", "declined")).await;
    rig.settled().await;
    let (_, letter) = rig.dead_letter();
    assert_eq!(rig.status("billing", "1").await, Some(Status::DeadLettered));
    billing.stop().await;
    (letter.attempts, letter.reason, letter.error.to_string())
}

#[tokio::test(start_paused = true)]
async fn an_error_that_classifies_itself_keeps_its_class() {
    let declined = (1, Reason::Permanent, "card declined: declined by the bank".to_owned());
    assert_eq!(outcome(|c| c.on_any(typed)).await, declined);
    assert_eq!(outcome(|c| c.on_any(classified)).await, declined);
}

/// The trap that is documented on `Failure` and `FailureExt`: `?` takes every error for one that may be gone next time.
#[tokio::test(start_paused = true)]
async fn a_bare_question_mark_makes_it_retryable() {
    let retried = (3, Reason::AttemptsExhausted, "declined by the bank".to_owned());
    assert_eq!(outcome(|c| c.on_any(bare)).await, retried);
}

#[tokio::test(start_paused = true)]
async fn each_class_can_be_given_on_the_way() {
    async fn permanent(_: Arc<Message>, _: Context<()>) -> Result<(), Failure> {
        "x".parse::<u8>().permanent("no number")?;
        Ok(())
    }
    async fn later(_: Arc<Message>, _: Context<()>) -> Result<(), Failure> {
        "x".parse::<u8>().retry_after(Duration::from_secs(60))?;
        Ok(())
    }
    async fn not_yet(_: Arc<Message>, _: Context<()>) -> Result<(), Failure> {
        "x".parse::<u8>().not_yet("no order", Duration::from_secs(60))?;
        Ok(())
    }
    let (attempts, reason, error) = outcome(|c| c.on_any(permanent)).await;
    assert_eq!((attempts, reason, &error[..10]), (1, Reason::Permanent, "no number:"));
    let begun = tokio::time::Instant::now();
    assert_eq!(outcome(|c| c.on_any(later)).await.1, Reason::AttemptsExhausted);
    let took = begun.elapsed().as_secs();
    assert_eq!(took, 120, "twice the time that the failure said");
    assert_eq!(outcome(|c| c.on_any(not_yet)).await.1, Reason::NeverReady);
}
