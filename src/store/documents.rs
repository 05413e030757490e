//! What a tenant says of its tools and rules: one document of each kind, replaced as a
//! whole, and compiled once for each version.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::PgConnection;

use super::hot::{read_configs, read_needs};
use super::rows::column;
use super::{Store, StoreError, sort};
use crate::domain::budget::Balance;
use crate::domain::id::{BalanceNo, TenantId};
use crate::domain::ledger::Versioned;
use crate::domain::policy::{Policy, PolicyDocument};
use crate::domain::provision::DocumentKind;
use crate::domain::request::Digest;
use crate::domain::state::{Loaded, Needs};
use crate::domain::tenant::{Rules, TenantConfig};
use crate::domain::time::Timestamp;

/// A document as it is stored.
#[derive(Debug, Clone)]
pub(crate) struct Stored {
    version: i64,
    body: String,
}

/// Documents by tenant and kind.
pub(crate) type Documents = HashMap<(TenantId, DocumentKind), Stored>;

/// Reads the documents of some tenants, and those for all.
pub(crate) async fn read_documents(
    conn: &mut PgConnection,
    tenants: &BTreeSet<TenantId>,
) -> Result<Documents, StoreError> {
    let system = TenantId::system();
    let names: BTreeSet<&str> = tenants
        .iter()
        .chain([&system])
        .map(TenantId::as_str)
        .collect();
    let names: Vec<&str> = names.into_iter().collect();
    let rows = sqlx::query(
        "/* read_documents */ SELECT tenant_id, kind, version, body FROM documents
         WHERE tenant_id = ANY($1)",
    )
    .bind(names)
    .fetch_all(conn)
    .await
    .map_err(sort)?;
    rows.iter()
        .map(|row| {
            let tenant = TenantId::from_stored(column(row, "tenant_id")?)?;
            let kind = DocumentKind::parse(column(row, "kind")?)?;
            let stored = Stored {
                version: column(row, "version")?,
                body: column(row, "body")?,
            };
            Ok(((tenant, kind), stored))
        })
        .collect()
}

/// Takes one of some documents apart; nothing was provisioned where there is none.
pub(crate) fn document<T: DeserializeOwned + Default>(
    documents: &Documents,
    tenant: &TenantId,
    kind: DocumentKind,
) -> Result<Versioned<T>, StoreError> {
    match documents.get(&(tenant.clone(), kind)) {
        Some(stored) => Ok(Versioned {
            version: stored.version,
            document: Arc::new(serde_json::from_str(&stored.body)?),
        }),
        None => Ok(Versioned::default()),
    }
}

/// Stores a document in place of the one before.
pub(crate) async fn put_document<T: Serialize>(
    conn: &mut PgConnection,
    tenant: &TenantId,
    kind: DocumentKind,
    document: &Versioned<T>,
) -> Result<(), StoreError> {
    sqlx::query(
        "/* put_document */
         INSERT INTO documents (tenant_id, kind, version, body) VALUES ($1, $2, $3, $4)
         ON CONFLICT (tenant_id, kind) DO UPDATE SET version = excluded.version,
             body = excluded.body",
    )
    .bind(tenant.as_str())
    .bind(kind.as_str())
    .bind(document.version)
    .bind(serde_json::to_string(&document.document)?)
    .execute(conn)
    .await
    .map_err(sort)?;
    Ok(())
}

impl Store {
    /// A tenant with all that decides on its actions.
    pub async fn config(&self, tenant: &TenantId) -> Result<Option<Arc<TenantConfig>>, StoreError> {
        let mut conn = self.acquire().await?;
        let only = BTreeSet::from([tenant.clone()]);
        let mut configs = read_configs(&mut conn, &only, &self.compiled).await?;
        Ok(configs.remove(tenant))
    }

    /// A tenant's policy.
    pub async fn policy(&self, tenant: &TenantId) -> Result<Versioned<PolicyDocument>, StoreError> {
        let mut conn = self.acquire().await?;
        let documents = read_documents(&mut conn, &BTreeSet::from([tenant.clone()])).await?;
        document(&documents, tenant, DocumentKind::Policy)
    }

    /// Balances by their numbers.
    pub async fn balances_numbered(
        &self,
        tenant: &TenantId,
        numbers: BTreeSet<BalanceNo>,
    ) -> Result<Vec<Balance>, StoreError> {
        let needs = Needs {
            balances: numbers,
            ..Needs::default()
        };
        let needs = BTreeMap::from([(tenant.clone(), needs)]);
        let mut loaded = self.needed(&needs).await?;
        Ok(loaded
            .remove(tenant)
            .map(|loaded| loaded.balances)
            .unwrap_or_default())
    }

    /// What some tenants' commands would need, outside the lanes.
    pub async fn needed(
        &self,
        needs: &BTreeMap<TenantId, Needs>,
    ) -> Result<BTreeMap<TenantId, Loaded>, StoreError> {
        let mut conn = self.acquire().await?;
        read_needs(&mut conn, needs).await
    }

    /// Forgets what agents did before a time. What a decision or another process has locked
    /// is left for the next time: nobody waits here while others wait for it.
    pub async fn forget_activity(&self, before: Timestamp) -> Result<(), StoreError> {
        sqlx::query(
            "/* forget_activity */
             WITH old AS (
                 SELECT tenant_id, activity_key FROM activity WHERE last_us < $1
                 FOR UPDATE SKIP LOCKED
             )
             DELETE FROM activity a USING old
             WHERE a.tenant_id = old.tenant_id AND a.activity_key = old.activity_key",
        )
        .bind(before.as_micros())
        .execute(&self.pool)
        .await
        .map_err(sort)?;
        Ok(())
    }
}

/// Policies that are ready to be evaluated, by what they say.
#[derive(Debug, Default)]
pub(crate) struct Compiled(Mutex<HashMap<(Digest, i64, bool), Arc<Policy>>>);

impl Compiled {
    /// Most policies that are kept.
    const KEPT: usize = 4_096;

    /// What decides on a tenant's actions.
    pub(crate) fn rules(
        &self,
        documents: &Documents,
        tenant: &TenantId,
    ) -> Result<Rules, StoreError> {
        let mut policies = Vec::new();
        for (whose, all_tenants) in [(&TenantId::system(), true), (tenant, false)] {
            if let Some(stored) = documents.get(&(whose.clone(), DocumentKind::Policy)) {
                let policy = self.policy(stored, all_tenants)?;
                if !policy.document.rules.is_empty() {
                    policies.push(policy);
                }
            }
        }
        Ok(Rules {
            tools: document(documents, tenant, DocumentKind::Catalogue)?,
            policies,
            freezes: document(documents, tenant, DocumentKind::Freezes)?,
        })
    }

    fn policy(&self, stored: &Stored, all_tenants: bool) -> Result<Arc<Policy>, StoreError> {
        let key = (
            Digest::of(stored.body.as_bytes()),
            stored.version,
            all_tenants,
        );
        // What a panic elsewhere left is whole: policies are only inserted.
        let known = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(policy) = known().get(&key) {
            return Ok(policy.clone());
        }
        let document = Arc::new(serde_json::from_str(&stored.body)?);
        let compiled =
            Policy::compile(document, stored.version, all_tenants).map_err(|faults| {
                let first = faults.first().map(ToString::to_string);
                StoreError::Corrupt(format!("a stored policy does not compile: {first:?}"))
            })?;
        let compiled = Arc::new(compiled);
        let mut known = known();
        if known.len() >= Self::KEPT {
            known.clear();
        }
        known.insert(key, compiled.clone());
        Ok(compiled)
    }
}
