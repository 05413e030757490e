//! API keys.

use sqlx::PgConnection;
use sqlx::postgres::PgRow;

use super::rows::{column, time, time_or_none};
use super::{Store, StoreError, sort};
use crate::domain::id::{KeyId, TenantId};
use crate::domain::key::{NewKey, StoredKey};
use crate::domain::permission::Permissions;
use crate::domain::request::Digest;
use crate::domain::scope::ScopeFilter;
use crate::domain::time::Timestamp;

fn stored_key(row: &PgRow) -> Result<StoredKey, StoreError> {
    let tenant = TenantId::from_stored(column(row, "tenant_id")?)?;
    let prefix: Option<&str> = column(row, "subject_prefix")?;
    let digest: &[u8] = column(row, "secret_sha256")?;
    Ok(StoredKey {
        id: KeyId::parse(column(row, "key_id")?)?,
        tenant: (!tenant.is_system()).then_some(tenant),
        display_name: column::<String>(row, "display_name")?.into(),
        permissions: Permissions::parse(column(row, "permissions")?)?,
        subject_prefix: prefix.map(ScopeFilter::parse).transpose()?,
        approver_groups: column::<&str>(row, "approver_groups")?
            .split(',')
            .filter(|group| !group.is_empty())
            .map(Into::into)
            .collect(),
        secret_sha256: Digest(
            digest
                .try_into()
                .map_err(|_| StoreError::Corrupt("a secret's digest has not 32 bytes".into()))?,
        ),
        expires_at: time_or_none(row, "expires_us")?,
        created_at: time(row, "created_us")?,
        revoked_at: time_or_none(row, "revoked_us")?,
    })
}

/// Keys that were looked up: one that can't be read is no other's matter.
#[derive(Debug, Default)]
pub struct FoundKeys {
    /// Those that exist.
    pub keys: Vec<StoredKey>,
    /// Those that exist and can't be read.
    pub unreadable: Vec<KeyId>,
}

impl Store {
    /// Those of some keys that exist.
    pub async fn find_keys(&self, ids: &[KeyId]) -> Result<FoundKeys, StoreError> {
        let ids: Vec<&str> = ids.iter().map(KeyId::as_str).collect();
        let rows = sqlx::query("/* find_keys */ SELECT * FROM api_keys WHERE key_id = ANY($1)")
            .bind(ids)
            .fetch_all(&self.pool)
            .await
            .map_err(sort)?;
        let mut found = FoundKeys::default();
        for row in &rows {
            match stored_key(row) {
                Ok(key) => found.keys.push(key),
                Err(error) => {
                    let id = KeyId::parse(column(row, "key_id")?)?;
                    tracing::error!(%error, key = %id, "a key can't be read");
                    found.unreadable.push(id);
                }
            }
        }
        Ok(found)
    }

    /// A tenant's keys, oldest first.
    pub async fn keys(
        &self,
        tenant: &TenantId,
        after: Option<(Timestamp, KeyId)>,
        limit: i64,
    ) -> Result<Vec<StoredKey>, StoreError> {
        let (at, id) = match &after {
            Some((at, id)) => (at.as_micros(), id.as_str()),
            None => (i64::MIN, ""),
        };
        let rows = sqlx::query(
            "/* keys */ SELECT * FROM api_keys
             WHERE tenant_id = $1 AND (created_us, key_id) > ($2, $3)
             ORDER BY created_us, key_id LIMIT $4",
        )
        .bind(tenant.as_str())
        .bind(at)
        .bind(id)
        .bind(limit)
        .fetch_all(&self.pool)
        .await
        .map_err(sort)?;
        rows.iter().map(stored_key).collect()
    }
}

/// Reads a key under the head lock of its tenant.
pub(crate) async fn read_key(
    conn: &mut PgConnection,
    id: &KeyId,
) -> Result<Option<StoredKey>, StoreError> {
    let row = sqlx::query("/* read_key */ SELECT * FROM api_keys WHERE key_id = $1")
        .bind(id.as_str())
        .fetch_optional(conn)
        .await
        .map_err(sort)?;
    row.as_ref().map(stored_key).transpose()
}

/// Inserts a key.
pub(crate) async fn insert_key(
    conn: &mut PgConnection,
    key: &NewKey,
    now: Timestamp,
) -> Result<(), StoreError> {
    sqlx::query(
        "/* insert_key */ INSERT INTO api_keys (key_id, tenant_id, display_name, permissions,
             subject_prefix, secret_sha256, expires_us, created_us, approver_groups)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
    )
    .bind(key.id.as_str())
    .bind(key.chain().as_str().to_owned())
    .bind(&*key.display_name)
    .bind(key.permissions.to_text())
    .bind(key.subject_prefix.as_ref().map(ScopeFilter::as_str))
    .bind(key.secret_sha256.0.to_vec())
    .bind(key.expires_at.map(Timestamp::as_micros))
    .bind(now.as_micros())
    .bind(key.approver_groups.join(","))
    .execute(conn)
    .await
    .map_err(sort)?;
    Ok(())
}

/// Marks a key as revoked.
pub(crate) async fn revoke_key(
    conn: &mut PgConnection,
    id: &KeyId,
    now: Timestamp,
) -> Result<(), StoreError> {
    sqlx::query("/* revoke_key */ UPDATE api_keys SET revoked_us = $2 WHERE key_id = $1")
        .bind(id.as_str())
        .bind(now.as_micros())
        .execute(conn)
        .await
        .map_err(sort)?;
    Ok(())
}
