//! Migrations: forward only, each in one transaction.

use sha2::{Digest as _, Sha256};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use super::{StoreError, partitions, sort};

/// The version that this program needs.
pub const SCHEMA_VERSION: i32 = 7;

/// The version from which on the ledger has months.
const PARTITIONED: i32 = 2;

const MIGRATIONS: [(i32, &str, &str); SCHEMA_VERSION as usize] = [
    (
        1,
        "initial",
        include_str!("../../migrations/0001_initial.sql"),
    ),
    (
        2,
        "partitioned_ledger",
        include_str!("../../migrations/0002_partitioned_ledger.sql"),
    ),
    (
        3,
        "move_ledger",
        include_str!("../../migrations/0003_move_ledger.sql"),
    ),
    (
        4,
        "policy",
        include_str!("../../migrations/0004_policy.sql"),
    ),
    (
        5,
        "approvals",
        include_str!("../../migrations/0005_approvals.sql"),
    ),
    (
        6,
        "webhooks",
        include_str!("../../migrations/0006_webhooks.sql"),
    ),
    (
        7,
        "cycles",
        include_str!("../../migrations/0007_cycles.sql"),
    ),
];

const SERVICE_ROLE: &str = include_str!("../../migrations/service_role.sql");

/// The version of a database; 0 for an empty one.
pub async fn schema_version(conn: &mut PgConnection) -> Result<i32, StoreError> {
    let exists: bool = sqlx::query_scalar(
        "/* schema_version */ SELECT to_regclass('remit_migrations') IS NOT NULL",
    )
    .fetch_one(&mut *conn)
    .await
    .map_err(sort)?;
    if !exists {
        return Ok(0);
    }
    sqlx::query_scalar(
        "/* schema_version */ SELECT coalesce(max(version), 0) FROM remit_migrations",
    )
    .fetch_one(conn)
    .await
    .map_err(sort)
}

/// Brings a database to [`SCHEMA_VERSION`], makes the ledger's months ahead of time,
/// and gives a role what the server needs. Answers the versions that were applied. Safe to run from several
/// processes at once.
pub async fn migrate(
    conn: &mut PgConnection,
    service_role: Option<&str>,
    now_us: i64,
) -> Result<Vec<i32>, StoreError> {
    sqlx::raw_sql(
        "CREATE TABLE IF NOT EXISTS remit_migrations (
             version    integer PRIMARY KEY,
             name       text    NOT NULL,
             sha256     text    NOT NULL,
             applied_at timestamptz NOT NULL DEFAULT now()
         );
         INSERT INTO remit_migrations (version, name, sha256) VALUES (0, 'lock', '')
         ON CONFLICT (version) DO NOTHING",
    )
    .execute(&mut *conn)
    .await
    .map_err(sort)?;
    let mut tx = conn.begin().await.map_err(sort)?;
    // One process at a time: the others wait here and then find the work done.
    sqlx::query("/* migrate */ SELECT 1 FROM remit_migrations WHERE version = 0 FOR UPDATE")
        .execute(&mut *tx)
        .await
        .map_err(sort)?;
    let current = schema_version(&mut tx).await?;
    let mut applied = Vec::new();
    for (version, name, sql) in MIGRATIONS.iter().filter(|(v, _, _)| *v > current) {
        sqlx::raw_sql(*sql).execute(&mut *tx).await.map_err(sort)?;
        sqlx::query(
            "/* migrate */ INSERT INTO remit_migrations (version, name, sha256) VALUES ($1, $2, $3)",
        )
        .bind(version)
        .bind(name)
        .bind(hex::encode(Sha256::digest(sql)))
        .execute(&mut *tx)
        .await
        .map_err(sort)?;
        if *version == PARTITIONED {
            partitions::ensure(&mut tx, now_us).await?;
        }
        applied.push(*version);
    }
    partitions::ensure(&mut tx, now_us).await?;
    if let Some(role) = service_role {
        let quoted = format!("\"{}\"", role.replace('"', "\"\""));
        let grants = SERVICE_ROLE.replace("\"remit_service\"", &quoted);
        sqlx::raw_sql(AssertSqlSafe(grants))
            .execute(&mut *tx)
            .await
            .map_err(sort)?;
    }
    tx.commit().await.map_err(sort)?;
    Ok(applied)
}
