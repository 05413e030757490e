//! API keys: made and revoked under their tenant's head, read through a cache.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
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
use crate::store::keys::{self, FoundKeys};
use crate::store::{StoreError, batch, hot, provisioning};

/// How long a key is taken from the cache: a revoked one is refused by every
/// server after this time.
const FRESH: Duration = Duration::from_secs(1);
/// Most keys that are kept.
const KEPT: usize = 10_000;
/// Most keys that are read at once.
const PAGE: usize = 1_000;

/// Keys that were read a moment ago, unknown ones too.
#[derive(Debug, Default)]
pub(super) struct Cache {
    known: Mutex<HashMap<KeyId, Known>>,
    /// One caller reads for all; with what became of the last attempt.
    reading: tokio::sync::Mutex<Option<(Instant, EngineError)>>,
}

#[derive(Debug)]
struct Known {
    /// Just before it was read.
    at: Instant,
    key: Option<StoredKey>,
    /// Asked for since.
    used: bool,
}

enum Cached {
    Fresh(Option<StoredKey>),
    Stale,
    Unknown,
}

impl Cache {
    fn known(&self) -> MutexGuard<'_, HashMap<KeyId, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, id: &KeyId) -> Cached {
        match self.known().get_mut(id) {
            None => Cached::Unknown,
            Some(known) => {
                known.used = true;
                if known.at.elapsed() < FRESH {
                    Cached::Fresh(known.key.clone())
                } else {
                    Cached::Stale
                }
            }
        }
    }

    /// This key, and those in use whose time is over or will soon be: a thousand keys in
    /// use are read once a second, not one after the other. Forgets those not in use.
    fn due(&self, id: &KeyId) -> Vec<KeyId> {
        let mut known = self.known();
        known.retain(|_, known| known.used || known.at.elapsed() < FRESH);
        let soon = known
            .iter()
            .filter(|(other, known)| *other != id && known.used && known.at.elapsed() > FRESH / 2);
        let mut due: Vec<KeyId> = soon.map(|(id, _)| id.clone()).take(PAGE - 1).collect();
        due.push(id.clone());
        due
    }

    /// Keeps what was found, and answers one of them. One that can't be read is not kept:
    /// it is looked up by itself each time, and keeps nobody waiting.
    fn put(
        &self,
        at: Instant,
        ids: Vec<KeyId>,
        found: FoundKeys,
        wanted: &KeyId,
    ) -> Result<Option<StoredKey>, EngineError> {
        let FoundKeys { keys, unreadable } = found;
        let mut found: HashMap<KeyId, StoredKey> =
            keys.into_iter().map(|key| (key.id.clone(), key)).collect();
        let own = found.get(wanted).cloned();
        let mut known = self.known();
        if known.len() + ids.len() > KEPT {
            known.clear();
        }
        for id in ids {
            if unreadable.contains(&id) {
                known.remove(&id);
                continue;
            }
            let key = found.remove(&id);
            let used = false;
            known.insert(id, Known { at, key, used });
        }
        if unreadable.contains(wanted) {
            return Err(EngineError::Internal);
        }
        Ok(own)
    }

    fn forget(&self, id: &KeyId) {
        self.known().remove(id);
    }
}

impl Engine {
    /// A key, as it was at most a second ago.
    pub async fn find_key(&self, id: &KeyId) -> Result<Option<StoredKey>, EngineError> {
        let cache = &self.0.keys;
        match cache.get(id) {
            Cached::Fresh(known) => return Ok(known),
            Cached::Stale => {}
            // By itself, so that nobody waits for those who try keys out.
            Cached::Unknown => {
                let (began, ids) = (Instant::now(), vec![id.clone()]);
                let found = self.0.store.find_keys(&ids).await?;
                return cache.put(began, ids, found, id);
            }
        }
        let came = Instant::now();
        let mut last = cache.reading.lock().await;
        if let Cached::Fresh(known) = cache.get(id) {
            return Ok(known);
        }
        if let Some((began, error)) = &*last
            && *began >= came
        {
            return Err(error.clone());
        }
        let began = Instant::now();
        let due = cache.due(id);
        let found = match self.0.store.find_keys(&due).await {
            Ok(found) => found,
            Err(error) => {
                let error = EngineError::from(error);
                *last = Some((began, error.clone()));
                return Err(error);
            }
        };
        cache.put(began, due, found, id)
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
        batch::write(&mut tx, &[one_entry(chain, head, body, pin, now)]).await?;
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
            approver_groups: key.approver_groups.clone(),
            expires_at: key.expires_at,
        });
        keys::revoke_key(&mut tx, id, now).await?;
        batch::write(&mut tx, &[one_entry(chain, head, body, None, now)]).await?;
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
