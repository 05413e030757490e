//! Bounds the requests in work in this process. One too many is refused at once:
//! waiting here would only add to what the engine's own queues already bound.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Code, Status};
use tonic_types::ErrorDetails;

use super::{HEALTH_PREFIX, refusal};

/// When a refused client should come back: requests take milliseconds, so by then
/// many slots have changed hands.
const RETRY_DELAY: Duration = Duration::from_millis(250);

/// Places for requests in work; clones share them.
#[derive(Debug, Clone)]
pub struct Slots {
    free: Arc<Semaphore>,
    limit: usize,
}

/// One request's place. Free again when it is dropped, which is when the answer's body
/// has been sent or given up.
#[derive(Debug)]
pub(in crate::api) struct Slot {
    _permit: Option<OwnedSemaphorePermit>,
}

impl Slots {
    pub(super) fn new(limit: usize) -> Self {
        let limit = limit.min(Semaphore::MAX_PERMITS);
        Self {
            free: Arc::new(Semaphore::new(limit)),
            limit,
        }
    }

    /// Takes a slot, or makes the refusal. A health check needs none: a busy server
    /// must not look like a dead one.
    pub(in crate::api) fn take(&self, path: &str) -> Result<Slot, Status> {
        if path.starts_with(HEALTH_PREFIX) {
            return Ok(Slot { _permit: None });
        }
        match self.free.clone().try_acquire_owned() {
            Ok(permit) => Ok(Slot {
                _permit: Some(permit),
            }),
            Err(_) => Err(refusal(
                Code::ResourceExhausted,
                "TOO_MANY_REQUESTS",
                &format!("the server has {} requests in work, its limit", self.limit),
                [("limit".to_owned(), self.limit.to_string())].into(),
                ErrorDetails::with_retry_info(Some(RETRY_DELAY)),
            )),
        }
    }
}
