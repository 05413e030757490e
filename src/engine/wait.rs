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
use crate::store::StoreError;

/// How often what other processes wrote is looked for.
const LOOK: Duration = Duration::from_secs(1);
/// Reservations that are looked for at once.
const PAGE: usize = 1_000;

type Waited = (TenantId, ReservationId);

/// Those who wait for one reservation.
#[derive(Debug, Default)]
struct Waiters {
    changed: Arc<Notify>,
    count: usize,
}

/// Who waits for what.
#[derive(Debug, Default)]
pub(super) struct Waits(Mutex<HashMap<Waited, Waiters>>);

impl Waits {
    fn with<T>(&self, work: impl FnOnce(&mut HashMap<Waited, Waiters>) -> T) -> T {
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
                waiting.changed.notify_waiters();
            }
        });
    }

    fn join(&self, waited: Waited) -> Place<'_> {
        let changed = self.with(|waits| {
            let waiters = waits.entry(waited.clone()).or_default();
            waiters.count += 1;
            waiters.changed.clone()
        });
        Place {
            waits: self,
            waited,
            changed,
        }
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

/// A place among those who wait. It is given up with the wait, however that ends: callers
/// that go drop it in the middle.
#[derive(Debug)]
struct Place<'a> {
    waits: &'a Waits,
    waited: Waited,
    changed: Arc<Notify>,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.waits.with(|waits| {
            if let Some(waiters) = waits.get_mut(&self.waited) {
                waiters.count -= 1;
                if waiters.count == 0 {
                    waits.remove(&self.waited);
                }
            }
        });
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
            match look_at(&engine, &page).await {
                // One tenant's row that can't be read is no other's matter.
                Err(StoreError::Corrupt(_)) if page.len() > 1 => {
                    for (tenant, needs) in page {
                        let own = BTreeMap::from([(tenant, needs)]);
                        note(look_at(&engine, &own).await);
                    }
                }
                looked => note(looked),
            }
        }
    }
}

/// Wakes those of a page who wait for what has been decided or is over.
async fn look_at(engine: &Engine, page: &BTreeMap<TenantId, Needs>) -> Result<(), StoreError> {
    let found = engine.0.store.needed(page).await?;
    let now = now();
    for (tenant, loaded) in found {
        for reservation in loaded.reservations {
            if !reservation.is_pending() || reservation.is_overdue(now) {
                engine.0.waits.changed(&tenant, reservation.id);
            }
        }
    }
    Ok(())
}

fn note(looked: Result<(), StoreError>) {
    if let Err(error) = looked {
        // Waiters go on waiting; the next round looks again.
        tracing::debug!(%error, "waits were not looked for");
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
        let place = self.0.waits.join((tenant.clone(), id));
        loop {
            // First listen, then look: nothing falls between.
            let woken = place.changed.notified();
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

#[cfg(test)]
mod tests {
    use super::*;

    fn waited() -> Waited {
        let tenant = TenantId::parse("acme").expect("a tenant");
        let id = ReservationId::parse("00000000-0000-8000-8000-000000000000");
        (tenant, id.expect("an id"))
    }

    #[tokio::test]
    async fn whoever_stops_waiting_in_the_middle_leaves_nothing_behind() {
        let waits = Arc::new(Waits::default());
        let (one, other) = (waits.join(waited()), waits.join(waited()));
        drop(one);
        assert_eq!(waits.pages().len(), 1, "somebody still waits");
        drop(other);
        assert!(waits.pages().is_empty());

        let mut waiting = tokio::task::JoinSet::new();
        for _ in 0..100 {
            let waits = waits.clone();
            waiting.spawn(async move { waits.join(waited()).changed.notified().await });
        }
        tokio::task::yield_now().await;
        assert_eq!(waits.pages().len(), 1);
        waiting.shutdown().await;
        assert!(waits.pages().is_empty(), "all were cut off");
    }
}
