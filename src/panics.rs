//! Panics: what must go on after one catches it.

use std::any::Any;
use std::panic::AssertUnwindSafe;

use futures_util::FutureExt as _;

/// Awaits some work; a panic in it becomes its text. What the work can change and others
/// see must be thrown away then, or be whole after a panic.
pub(crate) async fn caught<F: Future>(work: F) -> Result<F::Output, String> {
    let done = AssertUnwindSafe(work).catch_unwind().await;
    done.map_err(|panic| text(&*panic))
}

/// What a panic said.
pub(crate) fn text(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic without a text").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

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
