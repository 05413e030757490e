//! Webhooks: reads ledgers as they grow, and tells those who have subscribed.
//!
//! The ledger is the outbox: an event is a part of an entry, which was written in the
//! same transaction as the decision, so that none is lost and none costs a decision
//! anything. A subscription's place in its tenant's ledger is its cursor. One process at a
//! time has the turn at a subscription; it sends each event once, in order, and moves the
//! cursor on. What fails is tried again beside that, later and later, until it is given
//! up. So an event arrives at least once, and in order on the first attempt.

mod address;
mod send;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::Url;
use tokio::sync::Semaphore;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::domain::event::{EventType, types_of};
use crate::domain::id::{Sequence, TenantId};
use crate::domain::ledger::Body;
use crate::domain::query::EntryQuery;
use crate::domain::subscription::{Subscription, Target};
use crate::domain::time::Timestamp;
use crate::store::{Delivery, Store, StoreError, Turn};
use send::{Event, Sender};

/// How often new entries are looked for.
const LOOK: Duration = Duration::from_millis(500);
/// How long a turn lasts without a sign of life. Longer than one request may take.
const LEASE: Duration = Duration::from_secs(20);
/// Entries that are read, and deliveries that are taken, at once.
const PAGE: i64 = 500;
/// How often a cursor is written down in the middle of a page: what a killed server tells
/// again.
const NOTE: Duration = Duration::from_secs(1);
/// Subscriptions that are told at the same time.
const AT_ONCE: usize = 64;
/// Attempts after which a delivery is given up: some eight hours.
const ATTEMPTS: i32 = 16;
/// The first pause after a failure, and the longest.
const PAUSE: Duration = Duration::from_secs(5);
const PAUSE_MAX: Duration = Duration::from_secs(3_600);

/// Where webhooks may go.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reach {
    /// Also to private networks and this host, and by plain HTTP.
    pub private: bool,
}

impl Reach {
    /// Whether a target is within reach, as far as can be told without asking for names.
    pub fn allows(self, target: &Target) -> bool {
        self.private || Url::parse(target.as_str()).is_ok_and(|url| !address::is_inside(&url))
    }
}

/// Tells subscribers until the server stops.
pub async fn run(store: Store, reach: Reach, stopping: CancellationToken) {
    let Ok(sender) = Sender::new(reach) else {
        tracing::error!("webhooks are off: no TLS roots were found");
        return;
    };
    let (sender, room) = (Arc::new(sender), Arc::new(Semaphore::new(AT_ONCE)));
    let tasks = TaskTracker::new();
    let mut ticks = tokio::time::interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stopping.cancelled() => break,
        }
        let begun = now();
        let until = begun.saturating_add(LEASE);
        match store.take_turns(begun, until).await {
            Ok(turns) => {
                for turn in turns {
                    let (store, sender, room) = (store.clone(), sender.clone(), room.clone());
                    let stopping = stopping.clone();
                    tasks.spawn(async move {
                        let Ok(_permit) = room.acquire().await else {
                            return;
                        };
                        if now() >= until {
                            return;
                        }
                        if let Err(error) = take(&store, &sender, turn, &stopping).await {
                            tracing::warn!(%error, "a subscription's turn broke off");
                        }
                    });
                }
            }
            Err(error) => tracing::debug!(%error, "subscriptions were not looked for"),
        }
        match store.take_deliveries(begun, until, PAGE).await {
            Ok(deliveries) => {
                for delivery in deliveries {
                    let (store, sender, room) = (store.clone(), sender.clone(), room.clone());
                    tasks.spawn(stopping.clone().run_until_cancelled_owned(async move {
                        let Ok(_permit) = room.acquire().await else {
                            return;
                        };
                        if now() >= until {
                            return;
                        }
                        if let Err(error) = again(&store, &sender, delivery).await {
                            tracing::warn!(%error, "a delivery was not tried again");
                        }
                    }));
                }
            }
            Err(error) => tracing::debug!(%error, "deliveries were not looked for"),
        }
    }
    tasks.close();
    // Only until turns are given back.
    let _ = tokio::time::timeout(Duration::from_secs(2), tasks.wait()).await;
}

fn now() -> Timestamp {
    Timestamp::from_micros(jiff::Timestamp::now().as_microsecond())
}

/// One turn: everything that there is to be told, in order.
async fn take(
    store: &Store,
    sender: &Sender,
    mut turn: Turn,
    stopping: &CancellationToken,
) -> Result<(), StoreError> {
    let mut cursor = turn.subscription.cursor;
    let mut noted = Instant::now();
    loop {
        let page = read(store, &turn.subscription.tenant, cursor, PAGE).await?;
        let Some(last) = page.last().map(|body| body.seq) else {
            // Nothing more: the next one may take it at once.
            store.keep_turn(&turn, cursor, Timestamp::default()).await?;
            return Ok(());
        };
        for event in events(store, &turn.subscription, &page).await? {
            let sent = tokio::select! {
                sent = sender.send(&turn.subscription, &turn.secret, &event) => sent,
                // Perhaps it arrived; whoever goes on sends it again.
                () = stopping.cancelled() => {
                    store.keep_turn(&turn, cursor, Timestamp::default()).await?;
                    return Ok(());
                }
            };
            if let Err(error) = sent {
                let next = now().saturating_add(pause(1, event.seq));
                let failed = store.put_failed(&turn.subscription, event.seq, 1, Some(next), &error);
                failed.await?;
            }
            cursor = event.seq;
            if noted.elapsed() < NOTE {
                continue;
            }
            noted = Instant::now();
            let lease = now().saturating_add(LEASE);
            if !store.keep_turn(&turn, cursor, lease).await? {
                // Somebody else's now, or gone.
                return Ok(());
            }
            turn.lease = lease;
        }
        cursor = last;
        let lease = now().saturating_add(LEASE);
        if !store.keep_turn(&turn, cursor, lease).await? {
            return Ok(());
        }
        turn.lease = lease;
    }
}

/// Another attempt at what failed.
async fn again(store: &Store, sender: &Sender, delivery: Delivery) -> Result<(), StoreError> {
    let of = &delivery.subscription;
    let before = Sequence(delivery.seq.0 - 1);
    let mut page = read(store, &of.tenant, before, 1).await?;
    page.retain(|body| body.seq == delivery.seq);
    let event = events(store, of, &page).await?.pop();
    // Archived meanwhile, or not subscribed to any more: there is nothing to tell.
    let Some(event) = event else {
        return store.delivered(of, delivery.seq).await;
    };
    match sender.send(of, &delivery.secret, &event).await {
        Ok(()) => store.delivered(of, delivery.seq).await,
        Err(error) => {
            let attempts = delivery.attempts + 1;
            let next =
                (attempts < ATTEMPTS).then(|| now().saturating_add(pause(attempts, event.seq)));
            store
                .put_failed(of, event.seq, attempts, next, &error)
                .await
        }
    }
}

async fn read(
    store: &Store,
    tenant: &TenantId,
    after: Sequence,
    limit: i64,
) -> Result<Vec<Body>, StoreError> {
    let query = EntryQuery {
        kinds: Vec::new(),
        decision: None,
        reservation: None,
        from: None,
        until: None,
        descending: false,
        after: Some(after),
        limit,
    };
    let entries = store.entries(tenant, &query).await?;
    let bodies = entries
        .iter()
        .map(|entry| serde_json::from_str(&entry.text));
    Ok(bodies.collect::<Result<_, _>>()?)
}

/// What of some entries a subscription is told.
async fn events(
    store: &Store,
    subscription: &Subscription,
    page: &[Body],
) -> Result<Vec<Event>, StoreError> {
    let of_budgets = subscription.types.contains(&EventType::BudgetThreshold);
    let numbers: BTreeSet<_> = match of_budgets {
        true => page
            .iter()
            .flat_map(|body| body.movements.iter().map(|m| m.balance))
            .collect(),
        false => BTreeSet::new(),
    };
    let config = match numbers.is_empty() {
        true => None,
        false => store.config(&subscription.tenant).await?,
    };
    let balances = match numbers.is_empty() {
        true => Vec::new(),
        false => {
            store
                .balances_numbered(&subscription.tenant, numbers)
                .await?
        }
    };
    let budget = |no| {
        let balance = balances.iter().find(|balance| balance.no == no)?;
        config.as_ref()?.budget(balance.budget).cloned()
    };
    let wanted = |body: &Body| {
        let mut types = types_of(body, budget);
        types.retain(|of| subscription.types.contains(of));
        (!types.is_empty()).then(|| Event::new(body, types))
    };
    Ok(page.iter().filter_map(wanted).collect())
}

/// How long to wait after so many attempts: twice as long each time, and a quarter more or
/// less, so that what failed together does not come back together.
fn pause(attempts: i32, seq: Sequence) -> Duration {
    let doubled = u32::try_from(attempts - 1).unwrap_or(0).min(20);
    let pause = PAUSE.saturating_mul(1 << doubled).min(PAUSE_MAX);
    // Spread by what differs between deliveries; it need not be unpredictable.
    let spread = u32::try_from(seq.0.unsigned_abs() % 51).unwrap_or(0);
    pause * (75 + spread) / 100
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_an_hour() {
        let middle = Sequence(25);
        assert_eq!(pause(1, middle), Duration::from_secs(5));
        assert_eq!(pause(4, middle), Duration::from_secs(40));
        assert_eq!(pause(16, middle), Duration::from_secs(3_600));
        assert!(pause(16, Sequence(50)) <= Duration::from_secs(4_500));
    }
}
