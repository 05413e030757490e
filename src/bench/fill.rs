//! Fills a database as years of use would.

use crate::store::Store;

/// Fills.
pub(super) async fn fill(
    _store: &Store,
    _entries: u64,
    _tenants: u32,
    _depth: u8,
) -> anyhow::Result<()> {
    anyhow::bail!("not yet")
}
