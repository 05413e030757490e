//! The services: authenticate, convert, one engine call, convert back.

mod approvals;
mod authority;
mod ledger;
mod provisioning;

pub use provisioning::random_key;

use crate::engine::Engine;

/// Serves all of `remit.v1` on one engine.
#[derive(Debug, Clone)]
pub struct Services {
    engine: Engine,
}

impl Services {
    /// On an engine.
    pub fn new(engine: Engine) -> Self {
        Self { engine }
    }
}
