//! The services: authenticate, convert, one engine call, convert back.

mod approvals;
mod authority;
mod events;
mod ledger;
mod provisioning;

pub use provisioning::random_key;

use crate::engine::Engine;
use crate::webhooks::Reach;

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
