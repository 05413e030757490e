//! The services: authenticate, convert, one engine call, convert back.

mod approvals;
mod authority;
mod events;
mod ledger;
mod provisioning;

pub use provisioning::random_key;

use std::pin::Pin;

use futures_util::{Stream, StreamExt as _, stream};
use tonic::Status;

use crate::api::auth::Caller;
use crate::engine::Engine;
use crate::webhooks::Reach;

/// An answer that goes on.
type Told<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Tells what comes for as long as the caller's key is good: it is looked at again before
/// each message, and once a second while there is none.
fn while_good<T: Send + 'static>(
    engine: Engine,
    caller: Caller,
    items: impl Stream<Item = Result<T, Status>> + Send + 'static,
) -> Told<T> {
    let next = async |(mut items, engine, caller): (Told<T>, Engine, Caller)| {
        let item = tokio::select! {
            item = items.next() => item?,
            status = caller.fallen(&engine) => Err(status),
        };
        let item = match item {
            Ok(item) => caller.must_stand(&engine).await.map(|()| item),
            Err(status) => Err(status),
        };
        Some((item, (items, engine, caller)))
    };
    let items: Told<T> = Box::pin(items);
    Box::pin(stream::unfold((items, engine, caller), next))
}

/// Serves all of `remit.v1` on one engine.
#[derive(Debug, Clone)]
pub struct Services {
    engine: Engine,
    reach: Reach,
}

impl Services {
    /// On an engine, for webhooks that may go as far as `reach`.
    pub fn new(engine: Engine, reach: Reach) -> Self {
        Self { engine, reach }
    }

    /// What is asked to decide.
    pub(crate) fn engine(&self) -> &Engine {
        &self.engine
    }
}
