//! Clocks. Leases end by the clock of whichever server looks, so that those of all servers
//! must agree: each compares its own with the database's, which they share.

use std::time::Duration;

use super::{Engine, now};
use crate::domain::time::Timestamp;
use crate::store::StoreError;

/// How far clocks may be apart.
pub(super) const TOLERANCE: Duration = Duration::from_secs(5);

/// Why a server should not be asked.
#[derive(Debug, thiserror::Error)]
pub enum Unready {
    /// The database can't be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The clock is not the database's.
    #[error(transparent)]
    Clock(#[from] ClockOff),
}

/// A clock that is too far from the database's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the clock of this server is {} s {} that of the database: see to NTP", .by.as_secs(), if *.ahead { "ahead of" } else { "behind" })]
pub struct ClockOff {
    by: Duration,
    ahead: bool,
}

/// Compares what the database's clock said with the own one before and after it was asked.
fn compare(before: Timestamp, theirs: Timestamp, after: Timestamp) -> Result<(), ClockOff> {
    let (ahead, behind) = (before.since(theirs), theirs.since(after));
    let by = ahead.max(behind);
    if by <= TOLERANCE {
        return Ok(());
    }
    Err(ClockOff {
        by,
        ahead: ahead > behind,
    })
}

impl Engine {
    /// Whether the clock agrees with the database's.
    pub(super) async fn check_clock(&self) -> Result<(), Unready> {
        let before = now();
        let theirs = self.0.store.clock().await?;
        Ok(compare(before, theirs, now())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_may_be_five_seconds_off_and_an_answer_slow() {
        let at = |seconds: i64| Timestamp::from_micros(1_700_000_000_000_000 + seconds * 1_000_000);
        assert_eq!(compare(at(0), at(0), at(0)), Ok(()));
        assert_eq!(compare(at(0), at(5), at(0)), Ok(()));
        assert_eq!(compare(at(0), at(-5), at(0)), Ok(()));
        assert_eq!(
            compare(at(0), at(8), at(9)),
            Ok(()),
            "it was asked for long"
        );
        let off = compare(at(0), at(7), at(1)).expect_err("behind");
        assert!(off.to_string().contains("6 s behind"), "{off}");
        let off = compare(at(0), at(-3_600), at(1)).expect_err("ahead");
        assert!(off.to_string().contains("3600 s ahead of"), "{off}");
    }
}
