//! The sweeper: gives back what reservations hold whose time is over.
//!
//! It finds them by the end of their grace and sends each through its tenant's
//! lane, where it is decided anew whether the time is over; so any number of
//! processes may sweep the same reservations. A round looks at what has lapsed since
//! the one before; now and then one looks back further, for what was written late or
//! by a process whose clock differs. How far the oldest of these came is stored, so that a server
//! that starts need not look at everything there ever was.
//!
//! What can't be expired now, because its tenant's queue is full or a row can't be read,
//! is remembered and tried again; it keeps nobody else's waiting. Nothing is swept while
//! the clock is not the database's: a clock that is ahead would end leases that live.

use std::collections::BTreeSet;
use std::ops::Bound::{Excluded, Unbounded};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, MissedTickBehavior};

use super::clock::{TOLERANCE, Unready};
use super::{Call, Engine, EngineError};
use crate::domain::request::{Command, Origin};
use crate::domain::time::Timestamp;
use crate::store::{Lapsed, StoreError};

/// Every so many rounds, how far one looks back. What is looked at was settled long ago
/// for the most part, so that all of these together read what lapses in a few seconds.
const LOOK_BACK: [(u32, Duration); 2] = [
    (10, Duration::from_secs(15)),
    (600, Duration::from_secs(600)),
];
/// How long what agents did is kept: longer than any tenant's window.
const ACTIVITY_KEPT: Duration = Duration::from_secs(25 * 3_600);
/// How long before the ledger's months end that is said.
const MONTH_AHEAD: Duration = Duration::from_secs(60 * 86_400);
/// Reservations that are read, or tried again, at once.
const PAGE: usize = 500;
/// Most reservations that are remembered as to be tried again.
const LEFT: usize = 20_000;
/// How often the same is said of the clock.
const SAID: Duration = Duration::from_secs(60);

/// Sweeps until the server stops.
pub(super) async fn run(engine: Engine, interval: Duration) {
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let stopping = engine.stopping();
    let mut sweeper = Sweeper {
        engine,
        swept_until: None,
        round: 0,
        left: Left::default(),
    };
    let mut said: Option<Instant> = None;
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stopping.cancelled() => return,
        }
        match sweeper.round().await {
            Ok(()) => {}
            Err(Cut::Unready(Unready::Clock(off))) => {
                if said.is_none_or(|at| at.elapsed() >= SAID) {
                    said = Some(Instant::now());
                    tracing::warn!(%off, "nothing is swept");
                }
            }
            Err(error) => tracing::debug!(%error, "a sweep was cut short"),
        }
    }
}

/// Why a round did not come to its end.
#[derive(Debug, thiserror::Error)]
enum Cut {
    #[error(transparent)]
    Unready(#[from] Unready),
    #[error(transparent)]
    Engine(#[from] EngineError),
}

impl From<StoreError> for Cut {
    fn from(error: StoreError) -> Self {
        Self::Unready(error.into())
    }
}

struct Sweeper {
    engine: Engine,
    /// How far the last round came.
    swept_until: Option<Timestamp>,
    round: u32,
    left: Left,
}

impl Sweeper {
    /// One round; the first one of a process goes on where any process's deepest one ended.
    async fn round(&mut self) -> Result<(), Cut> {
        self.engine.check_clock().await?;
        let now = self.engine.now();
        let due = LOOK_BACK
            .iter()
            .filter(|(every, _)| self.round.is_multiple_of(*every));
        let back = due.map(|(_, back)| *back).max().unwrap_or_default();
        let deepest = LOOK_BACK.iter().all(|(_, other)| back >= *other);
        let store = self.engine.0.store.clone();
        let since = match self.swept_until {
            Some(since) => since,
            None => store.swept_until().await?,
        };
        let tried_again = self.left.turn(PAGE);
        self.expire(tried_again).await?;
        let mut from = begin(since, back, now);
        let forgotten = self.left.forgotten.filter(|_| deepest);
        if let Some(at) = forgotten {
            from = from.min(at);
            self.left.forgotten = None;
        }
        if let Err(cut) = self.sweep(from, now).await {
            self.left.forget(forgotten);
            return Err(cut);
        }
        if deepest {
            let swept = self.left.first().map_or(now, |left| left.min(now));
            store
                .set_swept_until(swept, now.saturating_add(TOLERANCE))
                .await?;
            let counts_no_more = back_from(now, ACTIVITY_KEPT);
            store.forget_activity(counts_no_more).await?;
            if !store.has_month(now.saturating_add(MONTH_AHEAD)).await? {
                tracing::warn!(
                    "the ledger's months end soon: run `remit migrate`, or restart a server that migrates"
                );
            }
        }
        self.swept_until = Some(now);
        self.round = self.round.wrapping_add(1);
        Ok(())
    }

    /// Expires what is overdue in a window, page by page.
    async fn sweep(&mut self, from: Timestamp, until: Timestamp) -> Result<(), Cut> {
        let mut after = None;
        loop {
            let store = &self.engine.0.store;
            let page = store.overdue(from, after.as_ref(), until, PAGE).await?;
            let full = page.len() == PAGE;
            after = page.last().cloned();
            self.expire(page).await?;
            if !full {
                return Ok(());
            }
        }
    }

    /// Expires some reservations and notes those that can't be now. Ends early where none
    /// can be.
    async fn expire(&mut self, page: Vec<Lapsed>) -> Result<(), Cut> {
        let engine = &self.engine;
        let expired = join_all(page.iter().map(|lapsed| expire(engine, lapsed))).await;
        for (lapsed, expired) in page.into_iter().zip(expired) {
            match expired {
                Ok(()) => self.left.done(&lapsed),
                Err(error @ EngineError::Unavailable { .. }) => return Err(error.into()),
                Err(error) => self.left.put(lapsed, &error),
            }
        }
        Ok(())
    }
}

/// Where a round begins to look. What was swept up to a time to come was swept by a wrong
/// clock.
fn begin(since: Timestamp, back: Duration, now: Timestamp) -> Timestamp {
    if since > now.saturating_add(TOLERANCE) {
        return Timestamp::default();
    }
    back_from(since, back).max(Timestamp::default())
}

fn back_from(at: Timestamp, back: Duration) -> Timestamp {
    let back = i64::try_from(back.as_micros()).unwrap_or(i64::MAX);
    Timestamp::from_micros(at.as_micros().saturating_sub(back))
}

/// Reservations that could not be expired.
#[derive(Debug, Default)]
struct Left {
    known: BTreeSet<Lapsed>,
    /// The last one that was tried again.
    tried: Option<Lapsed>,
    /// When the first one of those lapsed for which there was no room.
    forgotten: Option<Timestamp>,
}

impl Left {
    fn put(&mut self, lapsed: Lapsed, error: &EngineError) {
        if self.known.is_empty() {
            tracing::warn!(%error, tenant = %lapsed.tenant, "reservations can't be expired now");
        }
        if self.known.len() >= LEFT && !self.known.contains(&lapsed) {
            self.forget(Some(lapsed.at));
            return;
        }
        self.known.insert(lapsed);
    }

    /// Something that lapsed then has to be looked for again.
    fn forget(&mut self, at: Option<Timestamp>) {
        self.forgotten = self.forgotten.into_iter().chain(at).min();
    }

    fn done(&mut self, lapsed: &Lapsed) {
        if self.known.remove(lapsed) && self.known.is_empty() {
            tracing::info!("every reservation that could not be expired has been by now");
        }
    }

    /// When the first one lapsed.
    fn first(&self) -> Option<Timestamp> {
        let known = self.known.first().map(|first| first.at);
        known.into_iter().chain(self.forgotten).min()
    }

    /// Some of them, so that each has its turn.
    fn turn(&mut self, most: usize) -> Vec<Lapsed> {
        let after = self.tried.take().map_or(Unbounded, Excluded);
        let some: Vec<Lapsed> = self
            .known
            .range((after, Unbounded))
            .take(most)
            .cloned()
            .collect();
        self.tried = some.last().filter(|_| some.len() == most).cloned();
        some
    }
}

async fn expire(engine: &Engine, lapsed: &Lapsed) -> Result<(), EngineError> {
    let call = Call {
        origin: Origin {
            key: None,
            confinement: None,
            request_id: "".into(),
            trace_id: "".into(),
        },
        deadline: None,
    };
    let Lapsed { tenant, id, .. } = lapsed;
    match engine.execute(tenant, Command::Expire(*id), &call).await {
        Ok(_) => Ok(()),
        Err(EngineError::Refused(refusal)) => {
            tracing::error!(%refusal, %tenant, reservation = %id, "a reservation can't be expired");
            Ok(())
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::id::{ReservationId, TenantId};

    fn lapsed(at: usize) -> Lapsed {
        let id = format!("00000000-0000-8000-8000-{at:012}");
        Lapsed {
            at: Timestamp::from_micros(i64::try_from(at).expect("a time")),
            tenant: TenantId::parse("acme").expect("a tenant"),
            id: ReservationId::parse(&id).expect("an id"),
        }
    }

    #[test]
    fn each_that_is_left_has_its_turn() {
        let mut left = Left::default();
        for at in 1..=5 {
            left.put(lapsed(at), &EngineError::Internal);
        }
        let mut turn = || -> Vec<i64> {
            let some = left.turn(2);
            some.iter().map(|lapsed| lapsed.at.as_micros()).collect()
        };
        assert_eq!([turn(), turn(), turn()], [vec![1, 2], vec![3, 4], vec![5]]);
        assert_eq!(turn(), [1, 2], "from the front again");
        left.done(&lapsed(1));
        assert_eq!(left.first(), Some(Timestamp::from_micros(2)));
    }

    #[test]
    fn what_there_is_no_room_for_is_looked_for_again() {
        let mut left = Left::default();
        for at in 0..LEFT {
            left.put(lapsed(at + 10), &EngineError::Internal);
        }
        assert_eq!(left.forgotten, None);
        left.put(lapsed(10), &EngineError::Internal);
        assert_eq!(left.forgotten, None, "it is known already");
        left.put(lapsed(7), &EngineError::Internal);
        left.put(lapsed(8), &EngineError::Internal);
        assert_eq!(left.first(), Some(Timestamp::from_micros(7)));
        assert_eq!(left.known.len(), LEFT);
    }

    #[test]
    fn a_round_goes_on_from_the_one_before_and_never_from_a_time_to_come() {
        let at = |seconds: i64| Timestamp::from_micros(seconds * 1_000_000);
        let back = Duration::from_secs(600);
        assert_eq!(begin(at(5_000), back, at(5_001)), at(4_400));
        assert_eq!(
            begin(at(5_004), back, at(5_000)),
            at(4_404),
            "clocks differ a little"
        );
        assert_eq!(begin(at(90_000), back, at(5_000)), at(0));
        assert_eq!(begin(at(5), back, at(5_000)), at(0));
    }
}
