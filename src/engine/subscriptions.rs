//! Subscriptions: made and ended like keys, with an entry in the tenant's chain.

use std::collections::BTreeSet;

use super::provision::{Failure, Redo, one_entry};
use super::{Call, Engine, EngineError, now};
use crate::domain::id::{Name, Sequence, TenantId};
use crate::domain::ledger::{Body, EntryKind};
use crate::domain::refusal::Refusal;
use crate::domain::subscription::{Subscription, SubscriptionRecord};
use crate::store::{batch, hot, subscriptions};

/// Most subscriptions of a tenant.
const PER_TENANT: usize = 16;

impl Engine {
    /// A tenant's subscriptions, by name.
    pub async fn subscriptions(&self, tenant: &TenantId) -> Result<Vec<Subscription>, EngineError> {
        self.must_exist(tenant).await?;
        Ok(self.0.store.subscriptions(tenant).await?)
    }

    /// Makes a subscription, from the tenant's next entry on.
    pub async fn subscribe(
        &self,
        subscription: &Subscription,
        secret: &str,
        call: &Call,
    ) -> Result<Subscription, EngineError> {
        let mut redo = Redo::new();
        loop {
            let result = self.try_subscribe(subscription, secret, call).await;
            if let Some(settled) = redo.settle(result).await {
                return settled;
            }
        }
    }

    async fn try_subscribe(
        &self,
        subscription: &Subscription,
        secret: &str,
        call: &Call,
    ) -> Result<Subscription, Failure> {
        let tenant = &subscription.tenant;
        let mut conn = self.0.store.connect().await?;
        let mut tx = hot::begin(&mut conn).await?;
        let only = BTreeSet::from([tenant.clone()]);
        let heads = hot::read_heads(&mut tx, &only, true).await?;
        let head = heads.get(tenant).ok_or(Refusal::TenantNotFound)?;
        // Whoever makes another one waits for the head.
        if self.0.store.subscriptions(tenant).await?.len() >= PER_TENANT {
            return Err(Refusal::TooManySubscriptions.into());
        }
        let made = Subscription {
            // What it is told of begins after its own entry.
            cursor: Sequence(head.tip.seq.0 + 1),
            ..subscription.clone()
        };
        if !subscriptions::insert(&mut tx, &made, secret).await? {
            return Err(Refusal::SubscriptionExists.into());
        }
        let mut body = Body::new(tenant.clone(), EntryKind::Subscription).from_origin(&call.origin);
        body.subscription = Some(SubscriptionRecord::from(&made));
        let write = one_entry(tenant.clone(), head, body, None, now());
        batch::write(&mut tx, &[write]).await?;
        hot::commit(tx).await?;
        Ok(made)
    }

    /// Ends a subscription, with what it had still to deliver.
    pub async fn unsubscribe(
        &self,
        tenant: &TenantId,
        id: &Name,
        call: &Call,
    ) -> Result<(), EngineError> {
        let mut redo = Redo::new();
        loop {
            let result = self.try_unsubscribe(tenant, id, call).await;
            if let Some(settled) = redo.settle(result).await {
                return settled;
            }
        }
    }

    async fn try_unsubscribe(
        &self,
        tenant: &TenantId,
        id: &Name,
        call: &Call,
    ) -> Result<(), Failure> {
        let all = self.0.store.subscriptions(tenant).await?;
        let found = all.iter().find(|subscription| subscription.id == *id);
        let found = found.ok_or(Refusal::SubscriptionNotFound)?;
        let mut conn = self.0.store.connect().await?;
        let mut tx = hot::begin(&mut conn).await?;
        let only = BTreeSet::from([tenant.clone()]);
        let heads = hot::read_heads(&mut tx, &only, true).await?;
        let head = heads.get(tenant).ok_or(Refusal::TenantNotFound)?;
        if !subscriptions::delete(&mut tx, tenant, id).await? {
            return Err(Refusal::SubscriptionNotFound.into());
        }
        let mut body = Body::new(tenant.clone(), EntryKind::Subscription).from_origin(&call.origin);
        body.subscription = Some(SubscriptionRecord {
            present: false,
            ..SubscriptionRecord::from(found)
        });
        let write = one_entry(tenant.clone(), head, body, None, now());
        batch::write(&mut tx, &[write]).await?;
        hot::commit(tx).await?;
        Ok(())
    }

    /// Delivers again: what was given up, or everything from a sequence on.
    pub async fn redeliver(
        &self,
        tenant: &TenantId,
        id: &Name,
        from: Option<Sequence>,
    ) -> Result<i64, EngineError> {
        let revived = self.0.store.redeliver(tenant, id, from, now()).await?;
        Ok(revived.ok_or(Refusal::SubscriptionNotFound)?)
    }
}
