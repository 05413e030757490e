//! The sweeper: gives back what reservations hold whose time is over.
//!
//! It finds them by the end of their grace and sends each through its tenant's
//! lane, where it is decided anew whether the time is over; so any number of
//! processes may sweep the same reservations. It looks back a little at each
//! round and a lot once in a while, for what a slow round or another process's
//! clock has left behind; the first round looks at everything.

use std::time::Duration;

use tokio::time::MissedTickBehavior;

use super::{Call, Engine, EngineError};
use crate::domain::id::{ReservationId, TenantId};
use crate::domain::request::{Command, Origin};
use crate::domain::time::Timestamp;

/// How far an ordinary round looks back.
const LOOK_BACK: Duration = Duration::from_secs(10);
/// How far every `DEEP_EVERY`th round looks back.
const LOOK_BACK_DEEP: Duration = Duration::from_secs(600);
const DEEP_EVERY: u32 = 60;
/// Reservations read at once.
const PAGE: i64 = 500;

pub(super) async fn run(engine: Engine, interval: Duration) {
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let stopping = engine.stopping();
    let mut swept_until = Timestamp::from_micros(0);
    let mut round = 0_u32;
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stopping.cancelled() => return,
        }
        let now = engine.now();
        let back = if round % DEEP_EVERY == DEEP_EVERY - 1 {
            LOOK_BACK_DEEP
        } else {
            LOOK_BACK
        };
        let back = i64::try_from(back.as_micros()).unwrap_or(0);
        let from = Timestamp::from_micros((swept_until.as_micros() - back).max(0));
        match sweep(&engine, from, now).await {
            Ok(()) => {
                swept_until = now;
                round = round.wrapping_add(1);
            }
            Err(error) => tracing::debug!(%error, "a sweep was cut short"),
        }
    }
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
