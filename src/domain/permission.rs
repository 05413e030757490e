//! What an API key may do.

use super::budget::named;
use super::id::Malformed;

named! {
    /// One thing that a key may do.
    Permission {
        /// Decide, Reserve, Commit, Release, Extend, Record.
        Authority = "AUTHORITY",
        /// Every Get and List of reservations, balances, budgets and tenants.
        Read = "READ",
        /// Provision.
        Provision = "PROVISION",
        /// Provision changes that lift a stop.
        Loosen = "LOOSEN",
        /// FundBudget.
        Fund = "FUND",
        /// CreateApiKey, ListApiKeys, RevokeApiKey.
        ManageKeys = "MANAGE_KEYS",
        /// Every RPC of Ledger.
        Audit = "AUDIT",
        /// Every RPC of Approvals.
        Approve = "APPROVE",
    }
}

/// A set of permissions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Permissions(u8);

impl Permissions {
    /// Every permission: the first operator's.
    pub fn all() -> Self {
        Permission::ALL.iter().copied().collect()
    }

    /// Whether one is in the set.
    pub fn contains(self, permission: Permission) -> bool {
        self.0 & (1 << permission as u8) != 0
    }

    /// Whether every one is in the other set.
    pub fn is_subset(self, other: Self) -> bool {
        self.0 & !other.0 == 0
    }

    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// In the order of [`Permission::ALL`].
    pub fn iter(self) -> impl Iterator<Item = Permission> {
        Permission::ALL
            .iter()
            .copied()
            .filter(move |permission| self.contains(*permission))
    }

    /// Names divided by commas.
    pub fn to_text(self) -> String {
        let names: Vec<_> = self.iter().map(Permission::as_str).collect();
        names.join(",")
    }

    /// Parses what `to_text` wrote.
    pub fn parse(text: &str) -> Result<Self, Malformed> {
        text.split(',').map(Permission::parse).collect()
    }
}

impl FromIterator<Permission> for Permissions {
    fn from_iter<I: IntoIterator<Item = Permission>>(iter: I) -> Self {
        Self(iter.into_iter().fold(0, |bits, p| bits | 1 << p as u8))
    }
}
