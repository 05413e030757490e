//! Operators' documents: several tenants at once, in one transaction, under the
//! locks of all their heads.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use sqlx::PgConnection;

use super::{Call, Engine, EngineError, now};
use crate::domain::id::{IdempotencyKey, KeyHash, Method, Sequence, TenantId};
use crate::domain::ledger::{Body, Change, EntryKind, Request, Tip};
use crate::domain::provision::{Document, DocumentKind, Plan};
use crate::domain::refusal::Refusal;
use crate::domain::state::{Changes, Loaded, Needs};
use crate::domain::time::Timestamp;
use crate::store::documents::put_document;
use crate::store::{Head, HeadWrite, StoreError, TenantWrite, batch, hot, provisioning};

/// What became of a document.
#[derive(Debug, Clone)]
pub struct Provisioned {
    /// In its order.
    pub changes: Vec<Change>,
    /// It is the first answer to the same key again.
    pub replayed: bool,
    /// It is in force.
    pub applied: bool,
}

/// Either way an operator's change can fail.
#[derive(Debug)]
pub(super) enum Failure {
    Refused(Refusal),
    Store(StoreError),
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<Failure> for EngineError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Refused(refusal) => Self::Refused(refusal),
            Failure::Store(error) => error.into(),
        }
    }
}

/// Redoes an operator's change that lost against another writer, a few times.
#[derive(Debug)]
pub(super) struct Redo {
    left: u32,
    pause: Duration,
}

impl Redo {
    pub(super) fn new() -> Self {
        Self {
            left: 5,
            pause: Duration::from_millis(5),
        }
    }

    /// The result, unless it is worth another attempt.
    pub(super) async fn settle<T>(
        &mut self,
        result: Result<T, Failure>,
    ) -> Option<Result<T, EngineError>> {
        match result {
            Err(Failure::Store(StoreError::Conflict)) if self.left > 0 => {
                self.left -= 1;
                tokio::time::sleep(self.pause).await;
                self.pause *= 2;
                None
            }
            Ok(done) => Some(Ok(done)),
            Err(failure) => Some(Err(failure.into())),
        }
    }
}

/// A document and how it is to be applied.
#[derive(Debug)]
pub struct Provisioning {
    /// What shall be.
    pub document: Document,
    /// Makes a retry safe; nothing where only the plan is wanted.
    pub key: Option<IdempotencyKey>,
    /// The chain that the key is pinned in: the caller's tenant, or the
    /// operators'.
    pub pinned_to: TenantId,
    /// The caller may lift stops.
    pub may_loosen: bool,
    /// Only the plan is wanted.
    pub validate_only: bool,
}

impl Engine {
    /// Applies a document whole or not at all, or only plans it.
    pub async fn provision(
        &self,
        provisioning: &Provisioning,
        call: &Call,
    ) -> Result<Provisioned, EngineError> {
        let mut redo = Redo::new();
        loop {
            let result = self.try_provision(provisioning, call).await;
            if let Some(settled) = redo.settle(result).await {
                return settled;
            }
        }
    }

    async fn try_provision(
        &self,
        provisioning: &Provisioning,
        call: &Call,
    ) -> Result<Provisioned, Failure> {
        let mut conn = self.0.store.connect().await?;
        let mut tx = hot::begin(&mut conn).await?;
        let mut run = Run {
            conn: &mut tx,
            document: &provisioning.document,
            key: provisioning.key.as_ref(),
            pinned_to: &provisioning.pinned_to,
            call,
            now: now(),
        };
        let (provisioned, written) = run
            .apply(provisioning.may_loosen, provisioning.validate_only)
            .await?;
        if provisioned.applied && !provisioned.replayed {
            hot::commit(tx).await?;
            for written in written {
                // Nobody has to be listening.
                let _ = self.0.written.send(written);
            }
        }
        Ok(provisioned)
    }
}

struct Run<'a> {
    conn: &'a mut PgConnection,
    document: &'a Document,
    key: Option<&'a IdempotencyKey>,
    pinned_to: &'a TenantId,
    call: &'a Call,
    now: Timestamp,
}

impl Run<'_> {
    async fn apply(
        &mut self,
        may_loosen: bool,
        validate_only: bool,
    ) -> Result<(Provisioned, Vec<(TenantId, Sequence)>), Failure> {
        let mut tenants = self
            .document
            .tenants_touched()
            .map_err(|_| Refusal::TenantNotFound)?;
        let named = tenants.clone();
        tenants.insert(self.pinned_to.clone());
        let current = provisioning::read_current(self.conn, &named).await?;
        // Heads are made only for tenants that the document makes, so that a
        // mistyped name leaves nothing behind.
        let made: BTreeSet<TenantId> = self.document.tenants.iter().map(|t| t.id.clone()).collect();
        for tenant in &named {
            let exists = current.get(tenant).is_some_and(|c| c.tenant.is_some());
            if !exists && !tenant.is_system() && !made.contains(tenant) {
                return Err(Refusal::TenantNotFound.into());
            }
        }
        provisioning::ensure_heads(self.conn, &tenants).await?;
        if self.document.is_for_all_tenants() {
            provisioning::lock_all_heads(self.conn).await?;
        }
        let heads = hot::read_heads(self.conn, &tenants, true).await?;
        // Only now nobody else changes it.
        let current = provisioning::read_current(self.conn, &named).await?;
        let pin = self
            .key
            .map(|key| KeyHash::of(self.pinned_to, Method::Provision, key));
        if let Some(first) = replay(self.conn, self.pinned_to, pin, &self.probe()).await? {
            let provisioned = Provisioned {
                changes: first.changes,
                replayed: true,
                applied: true,
            };
            return Ok((provisioned, Vec::new()));
        }
        let next =
            |tenant: &TenantId| Sequence(heads.get(tenant).map_or(0, |head| head.tip.seq.0) + 1);
        let plan = Plan::new(self.document, &current, may_loosen, self.now, next)?;
        let applied = !validate_only;
        let mut written = Vec::new();
        if applied {
            written = self.write(&plan, &heads, pin).await?;
        }
        let provisioned = Provisioned {
            changes: plan.changes,
            replayed: false,
            applied,
        };
        Ok((provisioned, written))
    }

    fn probe(&self) -> Body {
        let mut body =
            Body::new(self.pinned_to.clone(), EntryKind::Provision).from_origin(&self.call.origin);
        body.idempotency_key = self.key.cloned();
        body.request = Some(Request {
            document: self.document.digests.clone(),
            ..Request::default()
        });
        body
    }

    async fn write(
        &mut self,
        plan: &Plan,
        heads: &BTreeMap<TenantId, Head>,
        pin: Option<KeyHash>,
    ) -> Result<Vec<(TenantId, Sequence)>, Failure> {
        let mut bodies: BTreeMap<TenantId, Body> = BTreeMap::new();
        for (tenant, own) in plan.tenants.iter().filter(|(_, own)| !own.is_empty()) {
            let mut body =
                Body::new(tenant.clone(), EntryKind::Provision).from_origin(&self.call.origin);
            body.changes = own.changes.clone();
            body.settings = own.tenant.as_ref().map(|t| t.settings.clone());
            body.budgets = own.provisioned();
            body.catalogue = own.tools.clone();
            body.policy = own.policy.clone();
            body.freezes = own.freezes.clone();
            bodies.insert(tenant.clone(), body);
            if let Some(tenant) = &own.tenant {
                provisioning::put_tenant(self.conn, tenant).await?;
            }
            provisioning::put_budgets(self.conn, tenant, &own.budgets).await?;
            if let Some(tools) = &own.tools {
                put_document(self.conn, tenant, DocumentKind::Catalogue, tools).await?;
            }
            if let Some(policy) = &own.policy {
                put_document(self.conn, tenant, DocumentKind::Policy, policy).await?;
            }
            if let Some(freezes) = &own.freezes {
                put_document(self.conn, tenant, DocumentKind::Freezes, freezes).await?;
            }
            provisioning::bump_config(self.conn, tenant).await?;
        }
        // The entry that the key is pinned to holds the whole plan.
        let probe = self.probe();
        let pinned = bodies
            .entry(self.pinned_to.clone())
            .or_insert_with(|| probe.clone());
        pinned.idempotency_key = probe.idempotency_key;
        pinned.request = probe.request;
        pinned.changes = plan.changes.clone();

        let mut writes = Vec::new();
        for (tenant, body) in bodies {
            let Some(head) = heads.get(&tenant) else {
                continue;
            };
            let pin = pin.filter(|_| tenant == *self.pinned_to);
            writes.push(one_entry(tenant, head, body, pin, self.now));
        }
        if plan
            .tenants
            .get(&TenantId::system())
            .is_some_and(|own| own.policy.is_some())
        {
            let written: Vec<_> = writes.iter().map(|write| &write.tenant).collect();
            provisioning::move_fences(self.conn, &written).await?;
        }
        batch::write(self.conn, &writes).await?;
        Ok(writes
            .into_iter()
            .map(|write| (write.tenant, write.head.tip.seq))
            .collect())
    }
}

/// A write of a single entry, with a key pinned to it.
pub(super) fn one_entry(
    tenant: TenantId,
    head: &Head,
    body: Body,
    pin: Option<KeyHash>,
    now: Timestamp,
) -> TenantWrite {
    let mut tip: Tip = head.tip;
    let entry = tip.append(body, now);
    TenantWrite {
        tenant,
        head: HeadWrite {
            fence: head.fence,
            tip,
            next_balance: head.next_balance,
        },
        changes: Changes {
            keys: pin.into_iter().map(|key| (key, entry.body.seq)).collect(),
            entries: vec![entry],
            ..Changes::default()
        },
    }
}

/// The entry that a key is pinned to, if it is; refuses another request with the
/// same key.
pub(super) async fn replay(
    conn: &mut PgConnection,
    chain: &TenantId,
    pin: Option<KeyHash>,
    probe: &Body,
) -> Result<Option<Body>, Failure> {
    let Some(pin) = pin else {
        return Ok(None);
    };
    let mut needs = Needs::default();
    needs.keys.insert(pin);
    let found = read_one(conn, chain, needs).await?;
    let Some((key, seq)) = found.keys.first().copied() else {
        return Ok(None);
    };
    let mut needs = Needs::default();
    needs.entries.insert((key, seq));
    let body = read_one(conn, chain, needs)
        .await?
        .bodies
        .pop()
        .map(|(_, body)| body)
        .ok_or(Refusal::AnswerArchived)?;
    match body.first_difference(probe) {
        Some(field) => Err(Refusal::IdempotencyMismatch { field }.into()),
        None => Ok(Some(body)),
    }
}

async fn read_one(
    conn: &mut PgConnection,
    chain: &TenantId,
    needs: Needs,
) -> Result<Loaded, StoreError> {
    let mut loaded = hot::read_needs(conn, &BTreeMap::from([(chain.clone(), needs)])).await?;
    Ok(loaded.remove(chain).unwrap_or_default())
}
