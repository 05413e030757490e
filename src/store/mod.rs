//! PostgreSQL: the only place that contains SQL.
//!
//! **Locks.** Every write begins with the heads of its tenants, in the order of the
//! bytes of their names, whatever the database's collation is; what else it touches
//! belongs to these tenants. So writers wait for each other, never in a circle. What
//! is changed without heads is on tables that no such write locks, one row at a time, or
//! skips rows that are locked.
//!
//! **The fence.** A write moves each head's `fence` from the value that it was
//! decided upon. If one of them has moved, the whole statement fails and nothing
//! is written: decisions made in memory are exactly serialisable, whatever the
//! isolation level, for any number of processes.
//!
//! **Reading.** The head is read before what it guards. What was read later than
//! the head can be newer, never older, and then the write misses the fence.

pub(crate) mod approvals;
mod archive;
pub(crate) mod batch;
mod benchmark;
pub(crate) mod documents;
pub mod embedded;
pub(crate) mod hot;
pub(crate) mod keys;
mod lists;
mod migrations;
mod partitions;
pub(crate) mod provisioning;
mod rows;
pub(crate) mod subscriptions;
mod verification;

use std::str::FromStr as _;
use std::sync::Arc;
use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use sqlx::{Connection as _, PgConnection, Postgres};

use crate::domain::time::Timestamp;

pub use archive::Archivist;
pub use batch::{HeadWrite, TenantWrite};
pub(crate) use benchmark::CopyRows;
pub use hot::Head;
pub use lists::Lapsed;
pub use migrations::{SCHEMA_VERSION, migrate, schema_version};
pub use partitions::Month;
pub use subscriptions::{Delivery, Turn};

/// What can go wrong between here and the database.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another writer was there first; nothing was written. Decide anew.
    #[error("another writer was there first")]
    Conflict,
    /// The database can't be reached; nothing was written.
    #[error("the database can't be reached: {0}")]
    Unavailable(#[source] sqlx::Error),
    /// The connection was lost after a write was sent: it may be committed.
    #[error("the outcome of a write is unknown: {0}")]
    UnknownOutcome(#[source] sqlx::Error),
    /// A row says what no version of this program writes.
    #[error("a stored row can't be read: {0}")]
    Corrupt(String),
    /// The schema is not the one that this program needs.
    #[error(
        "the database's schema has version {found}, this program needs {SCHEMA_VERSION}: run `remit migrate`"
    )]
    Schema {
        /// What it has; 0 for an empty database.
        found: i32,
    },
    /// Anything else that the database said.
    #[error("the database refused a statement: {0}")]
    Database(#[source] sqlx::Error),
}

/// Sorts an error by what it says about the write: by SQLSTATE, never by text.
fn sort(error: sqlx::Error) -> StoreError {
    let Some(database) = error.as_database_error() else {
        return match error {
            sqlx::Error::ColumnDecode { .. }
            | sqlx::Error::Decode(_)
            | sqlx::Error::ColumnNotFound(_)
            | sqlx::Error::TypeNotFound { .. } => StoreError::Corrupt(error.to_string()),
            _ => StoreError::Unavailable(error),
        };
    };
    match database.code().as_deref() {
        // Serialization failure, deadlock, a key that is taken, and the guard at
        // the end of a write, which divides by zero.
        Some("40001" | "40P01" | "23505" | "22012") => StoreError::Conflict,
        // The server is going down, coming up, or has no room for us.
        Some(code)
            if code.starts_with("57P") || code.starts_with("08") || code.starts_with("53") =>
        {
            StoreError::Unavailable(error)
        }
        _ => StoreError::Database(error),
    }
}

/// The same for a statement that commits: a lost connection leaves it open
/// whether it did.
fn sort_write(error: sqlx::Error) -> StoreError {
    match sort(error) {
        StoreError::Unavailable(error) => StoreError::UnknownOutcome(error),
        other => other,
    }
}

/// The way to the database.
#[derive(Debug, Clone)]
pub struct Store {
    options: PgConnectOptions,
    /// For reads outside the lanes.
    pool: PgPool,
    /// Policies by what they say.
    compiled: Arc<documents::Compiled>,
}

/// How long opening a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

impl Store {
    /// Takes a URL; connects on first use.
    pub fn new(url: &str, pool_size: u32) -> Result<Self, StoreError> {
        let options = PgConnectOptions::from_str(url)
            .map_err(StoreError::Database)?
            .application_name("remit")
            // Every statement is written for an index; a planner that guesses
            // otherwise on a fresh table costs a scan that grows with it.
            .options([
                ("enable_seqscan", "off"),
                ("enable_hashjoin", "off"),
                ("enable_mergejoin", "off"),
                ("jit", "off"),
                ("synchronous_commit", "on"),
            ]);
        let pool = PgPoolOptions::new()
            .max_connections(pool_size)
            .acquire_timeout(CONNECT_TIMEOUT)
            .connect_lazy_with(options.clone());
        Ok(Self {
            options,
            pool,
            compiled: Arc::default(),
        })
    }

    /// Policies that are ready to be evaluated.
    pub(crate) fn compiled(&self) -> &documents::Compiled {
        &self.compiled
    }

    /// A connection of the pool.
    async fn acquire(&self) -> Result<PoolConnection<Postgres>, StoreError> {
        self.pool.acquire().await.map_err(sort)
    }

    /// A connection of one's own.
    pub async fn connect(&self) -> Result<PgConnection, StoreError> {
        let connect = PgConnection::connect_with(&self.options);
        match tokio::time::timeout(CONNECT_TIMEOUT, connect).await {
            Ok(connected) => connected.map_err(sort),
            Err(_) => Err(StoreError::Unavailable(sqlx::Error::PoolTimedOut)),
        }
    }

    /// Whether the database answers, with the schema that is needed.
    pub async fn check(&self) -> Result<(), StoreError> {
        let mut conn = self.acquire().await?;
        let found = schema_version(&mut conn).await?;
        if found != SCHEMA_VERSION {
            return Err(StoreError::Schema { found });
        }
        Ok(())
    }

    /// What the database's clock says.
    pub async fn clock(&self) -> Result<Timestamp, StoreError> {
        let micros: i64 = sqlx::query_scalar(
            "/* clock */ SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint",
        )
        .fetch_one(&self.pool)
        .await
        .map_err(sort)?;
        Ok(Timestamp::from_micros(micros))
    }

    /// Ends every connection of the pool.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}
