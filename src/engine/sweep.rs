//! The sweeper: gives back what reservations hold whose time is over.
//!
//! It finds them by the end of their grace and sends each through its tenant's
//! lane, where it is decided anew whether the time is over; so any number of
//! processes may sweep the same reservations. A round looks at what has lapsed since
//! the one before; now and then one looks back further, for what was written late or
//! by a process whose clock differs. How far the oldest of these came is stored, so that a server
//! that starts need not look at everything there ever was.

use std::time::Duration;

use tokio::time::MissedTickBehavior;

use super::{Call, Engine, EngineError};
use crate::domain::id::{ReservationId, TenantId};
use crate::domain::request::{Command, Origin};
use crate::domain::time::Timestamp;

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
/// Reservations read at once.
const PAGE: i64 = 500;

pub(super) async fn run(engine: Engine, interval: Duration) {
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let stopping = engine.stopping();
    let mut swept_until = None;
    let mut round = 0_u32;
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stopping.cancelled() => return,
        }
        let now = engine.now();
        let due = LOOK_BACK
            .iter()
            .filter(|(every, _)| round.is_multiple_of(*every));
        let back = due.map(|(_, back)| *back).max();
        match sweep_since(&engine, swept_until, back.unwrap_or_default(), now).await {
            Ok(()) => {
                swept_until = Some(now);
                round = round.wrapping_add(1);
            }
            Err(error) => tracing::debug!(%error, "a sweep was cut short"),
        }
    }
}

/// One round; the first one of a process goes on where any process's deepest one ended.
async fn sweep_since(
    engine: &Engine,
    swept_until: Option<Timestamp>,
    back: Duration,
    now: Timestamp,
) -> Result<(), EngineError> {
    let store = &engine.0.store;
    let since = match swept_until {
        Some(since) => since,
        None => store.swept_until().await?,
    };
    let back_us = i64::try_from(back.as_micros()).unwrap_or(0);
    let from = Timestamp::from_micros((since.as_micros() - back_us).max(0));
    sweep(engine, from, now).await?;
    if LOOK_BACK.iter().all(|(_, other)| back >= *other) {
        store.set_swept_until(now).await?;
        let counts_no_more =
            now.as_micros() - i64::try_from(ACTIVITY_KEPT.as_micros()).unwrap_or(0);
        store
            .forget_activity(Timestamp::from_micros(counts_no_more))
            .await?;
        if !store.has_month(now.saturating_add(MONTH_AHEAD)).await? {
            tracing::warn!(
                "the ledger's months end soon: run `remit migrate`, or restart a server that migrates"
            );
        }
    }
    Ok(())
}

/// Expires what is overdue in a window, page by page.
async fn sweep(engine: &Engine, from: Timestamp, until: Timestamp) -> Result<(), EngineError> {
    let mut from = from;
    loop {
        let page = engine.0.store.overdue(from, until, PAGE).await?;
        let Some((_, _, last)) = page.last() else {
            return Ok(());
        };
        let (last, full) = (*last, i64::try_from(page.len()).unwrap_or(PAGE) == PAGE);
        let expirations = page
            .into_iter()
            .map(|(tenant, id, _)| expire(engine, tenant, id));
        for result in futures_util::future::join_all(expirations).await {
            result?;
        }
        if !full {
            return Ok(());
        }
        from = last;
    }
}

async fn expire(engine: &Engine, tenant: TenantId, id: ReservationId) -> Result<(), EngineError> {
    let call = Call {
        origin: Origin {
            key: None,
            confinement: None,
            request_id: "".into(),
            trace_id: "".into(),
        },
        deadline: None,
    };
    match engine.execute(&tenant, Command::Expire(id), &call).await {
        Ok(_) => Ok(()),
        Err(EngineError::Refused(refusal)) => {
            tracing::error!(%refusal, %tenant, reservation = %id, "a reservation can't be expired");
            Ok(())
        }
        Err(error) => Err(error),
    }
}
