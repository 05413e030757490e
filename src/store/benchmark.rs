//! What only `remit bench` asks of a database.

use super::{Store, StoreError, sort};

impl Store {
    /// Brings a new database to where one is that has run for a while: its files of
    /// write-ahead log exist and its shared memory was touched. Otherwise both would
    /// be made inside somebody's commit. For superusers.
    pub(crate) async fn settle_in(&self) -> Result<(), StoreError> {
        let mut conn = self.connect().await?;
        // A row fills a page: 512 MB.
        for statement in [
            "CREATE TABLE settling_in (filler text) WITH (autovacuum_enabled = off);
             ALTER TABLE settling_in ALTER filler SET STORAGE PLAIN",
            "INSERT INTO settling_in SELECT repeat('x', 8000) FROM generate_series(1, 65536)",
            "DROP TABLE settling_in",
            "CHECKPOINT",
        ] {
            sqlx::raw_sql(statement)
                .execute(&mut conn)
                .await
                .map_err(sort)?;
        }
        Ok(())
    }
}
