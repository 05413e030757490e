//! Waiting until a person has decided.
//!
//! Waiters sleep. This process's own writes wake those of the reservations that they
//! changed; for what other processes write, and for times that pass, one task looks once
//! a second, for all waiters in one read for each page of them.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, MissedTickBehavior};

use super::{Engine, EngineError, now};
use crate::domain::id::{ReservationId, TenantId};
use crate::domain::refusal::Refusal;
use crate::domain::reservation::Reservation;
use crate::domain::state::Needs;

/// How often what other processes wrote is looked for.
const LOOK: Duration = Duration::from_secs(1);
/// Reservations that are looked for at once.
const PAGE: usize = 1_000;

type Waited = (TenantId, ReservationId);

/// Who waits for what.
#[derive(Debug, Default)]
pub(super) struct Waits(Mutex<HashMap<Waited, Arc<Notify>>>);

impl Waits {
    fn with<T>(&self, work: impl FnOnce(&mut HashMap<Waited, Arc<Notify>>) -> T) -> T {
        // What a panic elsewhere left is whole: entries are only added and removed.
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Wakes those who wait for a reservation.
    pub(super) fn changed(&self, tenant: &TenantId, reservation: ReservationId) {
        self.with(|waits| {
            if waits.is_empty() {
                return;
            }
            if let Some(waiting) = waits.get(&(tenant.clone(), reservation)) {
                waiting.notify_waiters();
            }
        });
    }

    fn join(&self, waited: &Waited) -> Arc<Notify> {
        self.with(|waits| waits.entry(waited.clone()).or_default().clone())
    }

    /// Forgets a reservation that nobody waits for any more.
    fn leave(&self, waited: &Waited, own: &Arc<Notify>) {
        self.with(|waits| {
            // The map's own, and the one that leaves.
            if Arc::strong_count(own) <= 2 {
                waits.remove(waited);
            }
        });
    }

    fn pages(&self) -> Vec<BTreeMap<TenantId, Needs>> {
        let mut waited: Vec<Waited> = self.with(|waits| waits.keys().cloned().collect());
        waited.sort();
        let page = |chunk: &[Waited]| {
            let mut needs: BTreeMap<TenantId, Needs> = BTreeMap::new();
            for (tenant, reservation) in chunk {
                let needs = needs.entry(tenant.clone()).or_default();
                needs.reservations.insert(*reservation);
            }
            needs
        };
        waited.chunks(PAGE).map(page).collect()
    }
}

/// Looks for what others decided, until the server stops.
pub(super) async fn look(engine: Engine) {
    let stopping = engine.stopping();
    let mut ticks = tokio::time::interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stopping.cancelled() => return,
        }
        for page in engine.0.waits.pages() {
            match engine.0.store.needed(&page).await {
                Ok(found) => {
                    let now = now();
                    for (tenant, loaded) in found {
                        for reservation in loaded.reservations {
                            if !reservation.is_pending() || reservation.is_overdue(now) {
                                engine.0.waits.changed(&tenant, reservation.id);
                            }
                        }
                    }
                }
                // Waiters go on waiting; the next round looks again.
                Err(error) => tracing::debug!(%error, "waits were not looked for"),
            }
        }
    }
}

impl Engine {
    /// A reservation once it waits for nobody any more, or as it is at `until`.
    pub async fn decided(
        &self,
        tenant: &TenantId,
        id: ReservationId,
        until: Option<Instant>,
    ) -> Result<Reservation, EngineError> {
        let waited = (tenant.clone(), id);
        let waiting = self.0.waits.join(&waited);
        let result = self.decided_of(tenant, id, until, &waiting).await;
        self.0.waits.leave(&waited, &waiting);
        result
    }

    async fn decided_of(
        &self,
        tenant: &TenantId,
        id: ReservationId,
        until: Option<Instant>,
        waiting: &Notify,
    ) -> Result<Reservation, EngineError> {
        loop {
            // First listen, then look: nothing falls between.
            let woken = waiting.notified();
            tokio::pin!(woken);
            woken.as_mut().enable();
            let found = self.reservation(tenant, id).await?;
            let found = found.ok_or(Refusal::ReservationNotFound(id))?;
            if !found.is_pending() || found.is_overdue(now()) {
                return Ok(found);
            }
            let over = async {
                match until {
                    Some(until) => tokio::time::sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = woken => {}
                () = over => return Ok(found),
            }
        }
    }
}
