//! What-if: recorded decisions again, under a policy that is not in force.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Engine, EngineError};
use crate::domain::id::TenantId;
use crate::domain::ledger::Body;
use crate::domain::policy::{Policy, PolicyDocument};
use crate::domain::query::StoredEntry;
use crate::domain::replay::{Redecided, redecide};
use crate::store::StoreError;

impl Engine {
    /// Decides some recorded entries again, with a policy in place of its owner's. Policies
    /// were checked where they came in.
    pub async fn redecide(
        &self,
        tenant: &TenantId,
        entries: &[StoredEntry],
        whose: &TenantId,
        document: Arc<PolicyDocument>,
    ) -> Result<Vec<(Body, Redecided)>, EngineError> {
        let config = self.config(tenant).await?;
        let all_tenants = whose.is_system();
        let candidate = Policy::compile(document, 0, all_tenants)
            .map_err(|_| StoreError::Corrupt("a policy was checked and does not compile".into()))?;
        let standing = config.rules.policies.iter();
        let mut policies: Vec<_> = standing
            .filter(|policy| policy.all_tenants != all_tenants)
            .cloned()
            .collect();
        policies.push(Arc::new(candidate));
        policies.sort_by_key(|policy| !policy.all_tenants);

        let bodies = entries
            .iter()
            .map(|entry| serde_json::from_str::<Body>(&entry.text).map_err(StoreError::from))
            .collect::<Result<Vec<_>, _>>()?;
        let named = bodies.iter().flat_map(|body| &body.movements);
        let numbers = named.map(|movement| movement.balance).collect();
        let balances: BTreeMap<_, _> = self
            .0
            .store
            .balances_numbered(tenant, numbers)
            .await?
            .into_iter()
            .map(|balance| (balance.no, balance))
            .collect();
        let again = |body: Body| {
            let redecided = redecide(&body, &config, &balances, &policies)?;
            Some((body, redecided))
        };
        // Away from the tasks that serve: a page of decisions takes a while.
        Ok(tokio::task::block_in_place(|| {
            bodies.into_iter().filter_map(again).collect()
        }))
    }
}
