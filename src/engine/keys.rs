//! API keys: made and revoked under their tenant's head, read through a cache.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::provision::{Failure, Redo, one_entry, replay};
use super::{Call, Engine, EngineError, now};
use crate::domain::id::{IdempotencyKey, KeyHash, KeyId, Method, TenantId};
use crate::domain::key::{NewKey, StoredKey};
use crate::domain::ledger::{Body, EntryKind, KeyRecord, Request};
use crate::domain::refusal::Refusal;
use crate::domain::request::Digest;
use crate::domain::time::Timestamp;
use crate::store::{StoreError, hot, keys, provisioning};

/// How long a key is taken from the cache: a revoked one is refused by every
/// server after this time.
const FRESH: Duration = Duration::from_secs(1);
/// Most keys that are kept.
const KEPT: usize = 10_000;

/// Keys that were read a moment ago, unknown ones too.
#[derive(Debug, Default)]
pub(super) struct Cache(Mutex<HashMap<KeyId, (Instant, Option<StoredKey>)>>);

impl Cache {
    fn get(&self, id: &KeyId) -> Option<Option<StoredKey>> {
        let cache = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (read_at, key) = cache.get(id)?;
        (read_at.elapsed() < FRESH).then(|| key.clone())
    }

    fn put(&self, id: &KeyId, key: Option<StoredKey>) {
        let mut cache = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if cache.len() >= KEPT {
            cache.clear();
        }
        cache.insert(id.clone(), (Instant::now(), key));
    }

    fn forget(&self, id: &KeyId) {
        let mut cache = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        cache.remove(id);
    }
}

impl Engine {
    /// A key, as it was at most a second ago.
    pub async fn find_key(&self, id: &KeyId) -> Result<Option<StoredKey>, EngineError> {
        if let Some(known) = self.0.keys.get(id) {
            return Ok(known);
        }
        let key = self.0.store.find_key(id).await?;
        self.0.keys.put(id, key.clone());
        Ok(key)
    }

    /// A tenant's keys, oldest first.
    pub async fn keys(
        &self,
        tenant: &TenantId,
        after: Option<(Timestamp, KeyId)>,
        limit: i64,
    ) -> Result<Vec<StoredKey>, EngineError> {
        if !tenant.is_system() {
            self.must_exist(tenant).await?;
        }
        Ok(self.0.store.keys(tenant, after, limit).await?)
    }

    /// Makes a key. True: an earlier call with the same idempotency key made it.
    pub async fn create_key(
        &self,
        new: &NewKey,
        key: Option<&IdempotencyKey>,
        call: &Call,
    ) -> Result<(StoredKey, bool), EngineError> {
        let mut redo = Redo::new();
        loop {
            let result = self.try_create_key(new, key, call).await;
            if let Some(settled) = redo.settle(result).await {
                return settled;
            }
        }
    }

    async fn try_create_key(
        &self,
        new: &NewKey,
        key: Option<&IdempotencyKey>,
        call: &Call,
    ) -> Result<(StoredKey, bool), Failure> {
        let chain = new.chain();
        let only = BTreeSet::from([chain.clone()]);
        let now = now();
        let mut conn = self.0.store.connect().await?;
        let mut tx = hot::begin(&mut conn).await?;
        if chain.is_system() {
            provisioning::ensure_heads(&mut tx, &only).await?;
        }
        let heads = hot::read_heads(&mut tx, &only, true).await?;
        let head = heads.get(&chain).ok_or(Refusal::TenantNotFound)?;
        let mut body = Body::new(chain.clone(), EntryKind::ApiKeyCreated).from_origin(&call.origin);
        body.idempotency_key = key.cloned();
        body.request = Some(Request {
            document: vec![("api_key".into(), content(&new.record()))],
            ..Request::default()
        });
        let pin = key.map(|key| KeyHash::of(&chain, Method::CreateApiKey, key));
        if let Some(first) = replay(&mut tx, &chain, pin, &body).await? {
            let id = first.api_key.map(|record| record.key_id);
            let id = id.ok_or_else(|| StoreError::Corrupt("an entry names no key".into()))?;
            let key = keys::read_key(&mut tx, &id).await?;
            return Ok((key.ok_or(Refusal::ApiKeyNotFound)?, true));
        }
        body.api_key = Some(new.record());
        keys::insert_key(&mut tx, new, now).await?;
        hot::write(&mut tx, &[one_entry(chain, head, body, pin, now)]).await?;
        let key = keys::read_key(&mut tx, &new.id).await?;
        hot::commit(tx).await?;
        self.0.keys.forget(&new.id);
        Ok((key.ok_or(Refusal::ApiKeyNotFound)?, false))
    }

    /// Ends a key. `visible_to`: only one of this tenant.
    pub async fn revoke_key(
        &self,
        visible_to: Option<&TenantId>,
        id: &KeyId,
        call: &Call,
    ) -> Result<StoredKey, EngineError> {
        let mut redo = Redo::new();
        loop {
            let result = self.try_revoke_key(visible_to, id, call).await;
            if let Some(settled) = redo.settle(result).await {
                return settled;
            }
        }
    }

    async fn try_revoke_key(
        &self,
        visible_to: Option<&TenantId>,
        id: &KeyId,
        call: &Call,
    ) -> Result<StoredKey, Failure> {
        let now = now();
        let mut conn = self.0.store.connect().await?;
        let mut tx = hot::begin(&mut conn).await?;
        let visible = |key: &StoredKey| visible_to.is_none_or(|t| key.tenant.as_ref() == Some(t));
        let key = keys::read_key(&mut tx, id).await?.filter(visible);
        let key = key.ok_or(Refusal::ApiKeyNotFound)?;
        let chain = key.tenant.clone().unwrap_or_else(TenantId::system);
        let only = BTreeSet::from([chain.clone()]);
        let heads = hot::read_heads(&mut tx, &only, true).await?;
        let head = heads.get(&chain).ok_or(Refusal::TenantNotFound)?;
        // Under the lock: another call may have been first.
        let key = keys::read_key(&mut tx, id).await?;
        let key = key.ok_or(Refusal::ApiKeyNotFound)?;
        if key.revoked_at.is_some() {
            return Ok(key);
        }
        let mut body = Body::new(chain.clone(), EntryKind::ApiKeyRevoked).from_origin(&call.origin);
        body.api_key = Some(KeyRecord {
            key_id: key.id.clone(),
            display_name: key.display_name.clone(),
            permissions: key.permissions.iter().map(|p| p.as_str().into()).collect(),
            subject_prefix: key.subject_prefix.as_ref().map(|f| f.as_str().into()),
            expires_at: key.expires_at,
        });
        keys::revoke_key(&mut tx, id, now).await?;
        hot::write(&mut tx, &[one_entry(chain, head, body, None, now)]).await?;
        hot::commit(tx).await?;
        self.0.keys.forget(id);
        Ok(StoredKey {
            revoked_at: Some(now),
            ..key
        })
    }
}

/// What of a key a retry must repeat: all but its id, which is random.
fn content(record: &KeyRecord) -> Digest {
    let record = KeyRecord {
        key_id: KeyId::parse("0").expect("a digit is a key id"),
        ..record.clone()
    };
    let text = serde_json::to_vec(&record)
        .expect("keys are text and values plain types: nothing can fail in memory");
    Digest::of(&text)
}
