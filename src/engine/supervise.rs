//! Panics: what the process can't do without goes on after one.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

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

/// Awaits some work; a panic in it becomes its text. What the work can change and others
/// see must be thrown away then, or be whole after a panic.
pub(super) async fn caught<F: Future>(work: F) -> Result<F::Output, String> {
    let mut work = pin!(work);
    std::future::poll_fn(move |cx| {
        match catch_unwind(AssertUnwindSafe(|| work.as_mut().poll(cx))) {
            Ok(poll) => poll.map(Ok),
            Err(panic) => Poll::Ready(Err(text(&*panic))),
        }
    })
    .await
}

fn text(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic without a text").to_owned()
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

    #[tokio::test]
    async fn a_panic_is_told_by_its_text() {
        let work = async {
            tokio::task::yield_now().await;
            panic!("{} is broken", "it");
        };
        let told: Result<(), String> = caught(work).await;
        assert_eq!(told, Err("it is broken".to_owned()));
        assert_eq!(caught(async { 7 }).await, Ok(7));
    }
}
