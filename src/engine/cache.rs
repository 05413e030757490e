//! What a lane keeps of its tenants between batches: bounded by tenants and by rows over
//! all of them, so that a process that meets many busy tenants does not grow with them.

use std::collections::HashMap;

use crate::domain::id::TenantId;
use crate::domain::state::TenantState;
use crate::store::Head;

/// Most balances, reservations and keys that are kept of one tenant.
pub(super) const ROWS_KEPT: usize = 16_384;

/// How much is kept.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// Most tenants.
    pub(super) tenants: usize,
    /// Most rows over all of them.
    pub(super) rows: usize,
}

impl Bounds {
    /// Of one lane: some tens of megabytes at the most.
    pub(super) const LANE: Self = Self {
        tenants: 8_192,
        rows: 131_072,
    };
}

/// A tenant's state and the head that it was read at.
#[derive(Debug)]
pub(super) struct Cached {
    pub(super) head: Head,
    pub(super) state: TenantState,
    /// Rows that were counted of it, with what was configured.
    rows: usize,
    configured: usize,
    /// The batch that used it last.
    used: u64,
}

/// Tenants' states.
#[derive(Debug)]
pub(super) struct Cache {
    bounds: Bounds,
    tenants: HashMap<TenantId, Cached>,
    rows: usize,
    batches: u64,
}

impl Cache {
    pub(super) fn new(bounds: Bounds) -> Self {
        Self {
            bounds,
            tenants: HashMap::new(),
            rows: 0,
            batches: 0,
        }
    }

    pub(super) fn get(&self, tenant: &TenantId) -> Option<&Cached> {
        self.tenants.get(tenant)
    }

    pub(super) fn get_mut(&mut self, tenant: &TenantId) -> Option<&mut Cached> {
        self.tenants.get_mut(tenant)
    }

    pub(super) fn contains(&self, tenant: &TenantId) -> bool {
        self.tenants.contains_key(tenant)
    }

    pub(super) fn insert(&mut self, tenant: TenantId, head: Head, state: TenantState) {
        self.remove(&tenant);
        let tools = state.config.rules.tools.document.len();
        let configured = state.config.budgets().count() + tools;
        let cached = Cached {
            head,
            state,
            rows: configured,
            configured,
            used: self.batches,
        };
        self.rows += cached.rows;
        self.tenants.insert(tenant, cached);
    }

    pub(super) fn remove(&mut self, tenant: &TenantId) {
        if let Some(gone) = self.tenants.remove(tenant) {
            self.rows -= gone.rows;
        }
    }

    /// After a batch: counts anew what is kept of its tenants. Where all together is too
    /// much, first keys are forgotten, which only repeated requests need, then those
    /// tenants that were not asked about for longest.
    pub(super) fn settle<'a>(&mut self, touched: impl Iterator<Item = &'a TenantId>) {
        self.batches += 1;
        for tenant in touched {
            if let Some(cached) = self.tenants.get_mut(tenant) {
                cached.state.trim(&[], ROWS_KEPT);
                cached.used = self.batches;
                self.rows -= cached.rows;
                cached.rows = cached.configured + cached.state.rows();
                self.rows += cached.rows;
            }
        }
        let keys_went = self.rows > self.bounds.rows;
        if keys_went {
            self.rows = 0;
            for cached in self.tenants.values_mut() {
                cached.state.forget_keys();
                cached.rows = cached.configured + cached.state.rows();
                self.rows += cached.rows;
            }
        }
        // Where little would be gained by keys alone, it would have to be done again soon.
        if self.rows > self.bounds.rows / 4 * 3 && keys_went
            || self.tenants.len() > self.bounds.tenants
        {
            self.forget_coldest();
        }
    }

    /// Down to half of the bounds, so that it is rarely done; but what is in use now stays,
    /// however much it is.
    fn forget_coldest(&mut self) {
        let mut by_use: Vec<(u64, TenantId)> = self
            .tenants
            .iter()
            .filter(|(_, cached)| cached.used < self.batches)
            .map(|(tenant, cached)| (cached.used, tenant.clone()))
            .collect();
        by_use.sort_unstable();
        for (_, tenant) in by_use {
            let few = self.tenants.len() <= self.bounds.tenants / 2;
            if few && self.rows <= self.bounds.rows / 2 {
                return;
            }
            self.remove(&tenant);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::domain::id::{BalanceNo, BudgetNo, IdempotencyKey, KeyHash, Method, Sequence};
    use crate::domain::ledger::Tip;
    use crate::domain::state::{Loaded, Needs};
    use crate::domain::tenant::{Settings, Tenant, TenantConfig};
    use crate::domain::time::Timestamp;

    fn tenant(at: usize) -> TenantId {
        TenantId::parse(&format!("t{at}")).expect("a tenant")
    }

    fn insert(cache: &mut Cache, id: &TenantId) {
        let tenant = Tenant {
            id: id.clone(),
            settings: Settings::default(),
            created_at: Timestamp::default(),
        };
        let config = Arc::new(TenantConfig::new(tenant, []));
        let head = Head {
            fence: 1,
            tip: Tip::EMPTY,
            next_balance: BalanceNo(1),
            config_version: 0,
        };
        let state = TenantState::new(config, head.tip, head.next_balance);
        cache.insert(id.clone(), head, state);
    }

    /// Looks up keys and accounts, as requests do.
    fn use_it(cache: &mut Cache, id: &TenantId, keys: usize, accounts: usize) {
        let mut needs = Needs::default();
        for at in 0..keys {
            let key = IdempotencyKey::parse(&format!("k{at}")).expect("a key");
            needs.keys.insert(KeyHash::of(id, Method::Commit, &key));
        }
        for at in 0..accounts {
            let scope = format!("tenant:{id}/run:{at}");
            needs.accounts.insert((BudgetNo(1), scope.into()));
        }
        let cached = cache.get_mut(id).expect("it is kept");
        cached.state.load(&needs, Loaded::default());
        cache.settle(std::iter::once(id));
    }

    #[test]
    fn what_is_kept_of_all_tenants_is_bounded() {
        let mut cache = Cache::new(Bounds {
            tenants: 100,
            rows: 1_000,
        });
        insert(&mut cache, &tenant(0));
        use_it(&mut cache, &tenant(0), 900, 10);
        insert(&mut cache, &tenant(1));
        use_it(&mut cache, &tenant(1), 200, 10);
        assert_eq!(cache.rows, 20, "keys go first, and both stay");
        for at in 2..12 {
            insert(&mut cache, &tenant(at));
            use_it(&mut cache, &tenant(at), 0, 100);
            use_it(&mut cache, &tenant(1), 0, 10);
        }
        assert!(cache.rows <= 1_000, "{}", cache.rows);
        assert!(cache.contains(&tenant(1)), "it was in use");
        assert!(cache.contains(&tenant(11)), "it was the last one");
        assert!(!cache.contains(&tenant(0)), "it was the coldest");
        for at in 20..400 {
            insert(&mut cache, &tenant(at));
            use_it(&mut cache, &tenant(at), 1, 0);
            assert!(cache.tenants.len() <= 100);
        }
        let counted: usize = cache.tenants.values().map(|cached| cached.rows).sum();
        assert_eq!(counted, cache.rows);
    }

    #[test]
    fn what_is_in_use_stays_however_much_it_is() {
        let mut cache = Cache::new(Bounds {
            tenants: 100,
            rows: 1_000,
        });
        insert(&mut cache, &tenant(0));
        insert(&mut cache, &tenant(1));
        use_it(&mut cache, &tenant(0), 0, 100);
        for _ in 0..3 {
            use_it(&mut cache, &tenant(1), 0, 1_500);
            assert!(cache.contains(&tenant(1)));
        }
        assert!(!cache.contains(&tenant(0)), "others make room");
    }

    #[test]
    fn what_only_reads_does_not_grow_without_end() {
        let mut cache = Cache::new(Bounds::LANE);
        insert(&mut cache, &tenant(0));
        use_it(&mut cache, &tenant(0), 0, ROWS_KEPT + 1);
        assert_eq!(cache.rows, 0);
        let seen = cache.get(&tenant(0)).map(|cached| cached.head.tip.seq);
        assert_eq!(seen, Some(Sequence(0)));
    }
}
