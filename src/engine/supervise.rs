//! What the process can't do without goes on after a panic.

use std::time::Duration;

use crate::panics::caught;

/// Between a panic and the next beginning.
const PAUSE: Duration = Duration::from_millis(100);

/// Does a task's work, and begins it anew after a panic, with nothing of what the panic
/// may have left half changed. Ends with the work.
pub(super) async fn supervised<F: Future<Output = ()>>(task: &'static str, begin: impl Fn() -> F) {
    while let Err(panic) = caught(begin()).await {
        tracing::error!(task, panic, "a task panicked and begins anew");
        tokio::time::sleep(PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[tokio::test]
    async fn what_panics_begins_anew_until_it_ends() {
        let begun = AtomicU32::new(0);
        supervised("test", || async {
            let before = begun.fetch_add(1, Ordering::Relaxed);
            tokio::task::yield_now().await;
            assert_eq!(before, 2, "not yet");
        })
        .await;
        assert_eq!(begun.load(Ordering::Relaxed), 3);
    }
}
