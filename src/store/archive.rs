//! Old months of the ledger: found, read one chain after the other, and detached with
//! what is needed to verify the rest without them.

use std::collections::BTreeMap;

use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use super::partitions::Month;
use super::rows::{column, time};
use super::verification::raw_entry;
use super::{Store, StoreError, sort};
use crate::domain::id::{Sequence, TenantId};
use crate::domain::ledger::{ChainHash, Tip};
use crate::domain::verify::{Checkpoint, RawEntry};

/// Entries read at once.
const PAGE: i64 = 1_000;

/// Where a chain was last archived up to; nothing where it never was.
pub(super) async fn last_checkpoint(
    conn: &mut PgConnection,
    tenant: &TenantId,
) -> Result<Option<Checkpoint>, StoreError> {
    let row = sqlx::query(
        "/* last_checkpoint */ SELECT seq, time_us, hash, made FROM ledger_checkpoints
         WHERE tenant_id = $1 ORDER BY seq DESC LIMIT 1",
    )
    .bind(tenant.as_str())
    .fetch_optional(conn)
    .await
    .map_err(sort)?;
    let Some(row) = row else {
        return Ok(None);
    };
    let hash = ChainHash::from_stored(column(&row, "hash")?)
        .ok_or_else(|| StoreError::Corrupt("a checkpoint's hash has not 32 bytes".into()))?;
    Ok(Some(Checkpoint {
        tip: Tip {
            seq: Sequence(column(&row, "seq")?),
            hash,
            time: time(&row, "time_us")?,
        },
        made: serde_json::from_str(column(&row, "made")?)?,
    }))
}

/// Reads and detaches months. For the schema's owner, one at a time.
#[derive(Debug)]
pub struct Archivist {
    conn: PgConnection,
}

impl Store {
    /// Where a chain was last archived up to; nothing where it never was.
    pub async fn checkpoint(&self, tenant: &TenantId) -> Result<Option<Checkpoint>, StoreError> {
        let mut conn = self.acquire().await?;
        last_checkpoint(&mut conn, tenant).await
    }

    /// The way to the months; waits while another process archives.
    pub async fn archivist(&self) -> Result<Archivist, StoreError> {
        let mut conn = self.connect().await?;
        // An arbitrary number that nothing else here locks.
        sqlx::query("/* archivist */ SELECT pg_advisory_lock(7266978)")
            .execute(&mut conn)
            .await
            .map_err(sort)?;
        Ok(Archivist { conn })
    }
}

impl Archivist {
    /// The months that are attached and begin before another one, oldest first.
    pub async fn months_before(&mut self, end: Month) -> Result<Vec<Month>, StoreError> {
        let tables: Vec<String> = sqlx::query_scalar(
            "/* months */ SELECT c.relname::text FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
             WHERE i.inhparent = 'ledger'::regclass ORDER BY c.relname",
        )
        .fetch_all(&mut self.conn)
        .await
        .map_err(sort)?;
        let months = tables.iter().filter_map(|table| Month::of_table(table));
        Ok(months.filter(|month| *month < end).collect())
    }

    /// Entries from before a month that have no month of their own.
    pub async fn strays_before(&mut self, end: Month) -> Result<i64, StoreError> {
        sqlx::query_scalar(
            "/* strays_before */ SELECT count(*) FROM ledger_default WHERE time_us < $1",
        )
        .bind(end.start()?)
        .fetch_one(&mut self.conn)
        .await
        .map_err(sort)
    }

    /// The chains that have entries in a month, with where they were archived up to.
    pub async fn chains_in(
        &mut self,
        month: Month,
    ) -> Result<Vec<(TenantId, Option<Checkpoint>)>, StoreError> {
        let names: Vec<String> = sqlx::query_scalar(AssertSqlSafe(format!(
            "/* chains_in */ SELECT DISTINCT tenant_id FROM {} ORDER BY tenant_id",
            month.table()
        )))
        .fetch_all(&mut self.conn)
        .await
        .map_err(sort)?;
        let mut chains = Vec::with_capacity(names.len());
        for name in names {
            let tenant = TenantId::from_stored(&name)?;
            let checkpoint = last_checkpoint(&mut self.conn, &tenant).await?;
            chains.push((tenant, checkpoint));
        }
        Ok(chains)
    }

    /// A chain's next entries in a month; none at its end.
    pub async fn page(
        &mut self,
        month: Month,
        tenant: &TenantId,
        after: Sequence,
    ) -> Result<Vec<RawEntry>, StoreError> {
        let rows = sqlx::query(AssertSqlSafe(format!(
            "/* archive_page */ SELECT * FROM {} WHERE tenant_id = $1 AND seq > $2 ORDER BY seq LIMIT $3",
            month.table()
        )))
        .bind(tenant.as_str())
        .bind(after.0)
        .bind(PAGE)
        .fetch_all(&mut self.conn)
        .await
        .map_err(sort)?;
        rows.iter().map(raw_entry).collect()
    }

    /// Detaches a month and keeps where its chains ended, both or neither. Its table
    /// stays, under its name, or is dropped. Decisions wait for a moment, and this for
    /// them: where it can't have its lock within two seconds nothing has changed.
    pub async fn detach(
        &mut self,
        month: Month,
        checkpoints: &BTreeMap<TenantId, Checkpoint>,
        drop: bool,
    ) -> Result<(), StoreError> {
        let mut tx = self.conn.begin().await.map_err(sort)?;
        let mut columns = (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (tenant, checkpoint) in checkpoints {
            columns.0.push(tenant.as_str());
            columns.1.push(checkpoint.tip.seq.0);
            columns.2.push(checkpoint.tip.time.as_micros());
            columns.3.push(checkpoint.tip.hash.0.to_vec());
            columns.4.push(serde_json::to_string(&checkpoint.made)?);
        }
        sqlx::query(
            "/* put_checkpoints */
             INSERT INTO ledger_checkpoints (tenant_id, seq, time_us, hash, made)
             SELECT * FROM unnest($1::text[], $2::bigint[], $3::bigint[], $4::bytea[], $5::text[])",
        )
        .bind(columns.0)
        .bind(columns.1)
        .bind(columns.2)
        .bind(columns.3)
        .bind(columns.4)
        .execute(&mut *tx)
        .await
        .map_err(sort)?;
        let table = month.table();
        let drop = if drop {
            format!("DROP TABLE {table}")
        } else {
            String::new()
        };
        let detach = format!(
            "SET LOCAL lock_timeout = '2s'; ALTER TABLE ledger DETACH PARTITION {table}; {drop}"
        );
        sqlx::raw_sql(AssertSqlSafe(detach))
            .execute(&mut *tx)
            .await
            .map_err(sort)?;
        tx.commit().await.map_err(sort)
    }
}
