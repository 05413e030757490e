//! Budgets: the balances of Remit's budgets without a period.

use axum::body::Body;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::super::call::{Answer, Asker, Call};
use super::super::problem::Fault;
use super::super::runtime::fresh_key;
use super::super::strict::{Free, object, object_or_none, word, word_or_none};
use super::super::{Gateway, answered, translate, wire};
use super::{Done, Params, iso, must_be_absent, params, tenants};
use crate::domain::permission::Permission;
use crate::domain::request::Digest;
use crate::domain::scope::{Level, Scope};
use crate::proto;
use crate::proto::authority_server::Authority as _;
use crate::proto::provisioning_server::Provisioning as _;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Given {
    scope: String,
    #[serde(deserialize_with = "word")]
    unit: wire::Unit,
    #[serde(deserialize_with = "object")]
    allocated: wire::Amount,
    #[serde(default, deserialize_with = "object_or_none")]
    overdraft_limit: Option<wire::Amount>,
    tenant_id: Option<String>,
    /// Any other value is refused with the body.
    #[serde(default, rename = "rollover_policy", deserialize_with = "word_or_none")]
    _rollover_policy: Option<RolloverPolicy>,
    commit_overage_policy: Option<Value>,
    period_start: Option<Value>,
    period_end: Option<Value>,
    /// Taken and kept nowhere, as in the original.
    #[serde(rename = "metadata")]
    _metadata: Option<Free>,
}

/// The only one that has an effect: nothing rolls over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum RolloverPolicy {
    None,
}

/// A budget and its balance.
#[derive(Debug, Serialize)]
pub(super) struct BudgetLedger {
    ledger_id: String,
    tenant_id: String,
    pub(super) scope: String,
    pub(super) unit: wire::Unit,
    pub(super) allocated: wire::Amount,
    pub(super) remaining: wire::Amount,
    reserved: wire::Amount,
    pub(super) spent: wire::Amount,
    pub(super) debt: wire::Amount,
    overdraft_limit: wire::Amount,
    pub(super) is_over_limit: bool,
    pub(super) status: &'static str,
    rollover_policy: RolloverPolicy,
    #[serde(skip_serializing_if = "Option::is_none")]
    created_at: Option<String>,
}

fn status(state: proto::BudgetState) -> &'static str {
    match state {
        proto::BudgetState::Frozen => "FROZEN",
        proto::BudgetState::Closed => "CLOSED",
        proto::BudgetState::Active | proto::BudgetState::Unspecified => "ACTIVE",
    }
}

/// A balance as a budget; nothing in the unit that the protocol does not know.
pub(super) fn worded(balance: &proto::Balance) -> Option<BudgetLedger> {
    let unit = translate::known_unit(balance.unit)?;
    let of = |amount| wire::Amount { unit, amount };
    let first = balance.scope.split('/').next().unwrap_or_default();
    let shown = answered::balances(std::slice::from_ref(balance), |_| true).pop()?;
    let place = format!(
        "budget\0{}\0{}",
        balance.scope,
        translate::unit_name(balance.unit())
    );
    let mut id = [0; 16];
    id.copy_from_slice(&Digest::of(place.as_bytes()).0[..16]);
    Some(BudgetLedger {
        ledger_id: uuid::Builder::from_custom_bytes(id).into_uuid().to_string(),
        tenant_id: first.trim_start_matches("tenant:").to_owned(),
        scope: balance.scope.clone(),
        unit,
        allocated: shown.allocated,
        remaining: shown.remaining,
        reserved: shown.reserved,
        spent: shown.spent,
        debt: of(balance.debt),
        overdraft_limit: of(balance.overdraft_limit),
        is_over_limit: balance.over_limit,
        status: status(balance.state()),
        // Only budgets without a period are shown.
        rollover_policy: RolloverPolicy::None,
        created_at: None,
    })
}

/// Which budget a call is about.
#[derive(Debug, Deserialize)]
pub(super) struct Which {
    scope: Option<String>,
    unit: Option<String>,
    tenant_id: Option<String>,
}

/// The same, checked.
pub(super) struct Named {
    pub(super) scope: String,
    pub(super) unit: wire::Unit,
    tenant: String,
}

pub(super) fn unit_named(name: &str) -> Option<wire::Unit> {
    serde_json::from_value(name.into()).ok()
}

impl Named {
    fn new(scope: &str, unit: wire::Unit, tenant_id: Option<&String>) -> Result<Self, Fault> {
        let parsed = Scope::parse_concrete(scope);
        let parsed = parsed.map_err(|error| Fault::field("scope", &error.to_string()))?;
        if !parsed.as_str().eq_ignore_ascii_case(scope) {
            return Err(Fault::field("scope", &format!("in order: {parsed}")));
        }
        let tenant = parsed.tenant();
        let tenant = tenant.map_err(|error| Fault::field("scope", &error.to_string()))?;
        let agrees = |named: &String| named.eq_ignore_ascii_case(tenant.as_str());
        if !tenant_id.is_none_or(agrees) {
            return Err(Fault::field(
                "tenant_id",
                "the tenant that the scope begins with",
            ));
        }
        Ok(Self {
            scope: parsed.to_string(),
            unit,
            tenant: tenant.to_string(),
        })
    }

    pub(super) fn read(which: Params<Which>) -> Result<Self, Fault> {
        let which = params(which)?;
        let scope = which.scope.ok_or_else(|| Fault::field("scope", "given"))?;
        let unit = which.unit.as_deref().and_then(unit_named);
        let unit = unit.ok_or_else(|| {
            Fault::field(
                "unit",
                "one of USD_MICROCENTS, TOKENS, CREDITS, RISK_POINTS",
            )
        })?;
        Self::new(&scope, unit, which.tenant_id.as_ref())
    }

    pub(super) async fn find(
        &self,
        gateway: &Gateway,
        asker: &Asker,
    ) -> Result<BudgetLedger, Fault> {
        let message = proto::GetBudgetRequest {
            scope: self.scope.clone(),
            unit: translate::unit(self.unit).into(),
            period: proto::Period::Total.into(),
        };
        let found = gateway.services.get_budget(asker.request(message)).await;
        let budget = found.map_err(not_found)?.into_inner().budget;
        let message = proto::ListBalancesRequest {
            tenant: self.tenant.clone(),
            scope: self.scope.clone(),
            exact: true,
            include_unopened: true,
            page_size: 100,
            ..proto::ListBalancesRequest::default()
        };
        let balances = gateway
            .services
            .list_balances(asker.request(message))
            .await?;
        let balances = balances.into_inner().balances;
        let balance = balances.iter().find(|balance| {
            balance.period() == proto::Period::Total
                && translate::known_unit(balance.unit) == Some(self.unit)
        });
        let mut ledger = balance
            .and_then(worded)
            .ok_or_else(|| Fault::not_found(&self.scope))?;
        ledger.created_at = budget.and_then(|budget| iso(budget.create_time.as_ref()));
        Ok(ledger)
    }

    /// Changes one field of it and leaves the rest. Whether it was otherwise before.
    async fn change(
        &self,
        gateway: &Gateway,
        asker: &Asker,
        budget: proto::Budget,
        field: &str,
    ) -> Result<bool, Fault> {
        let message = proto::ProvisionRequest {
            idempotency_key: fresh_key(),
            budgets: vec![proto::Budget {
                scope: self.scope.clone(),
                unit: translate::unit(self.unit).into(),
                // Not one of the fields: it stays as it is.
                limit: Some(proto::budget::Limit::Allocation(0)),
                ..budget
            }],
            update_mask: Some(pbjson_types::FieldMask {
                paths: vec![field.to_owned()],
            }),
            ..proto::ProvisionRequest::default()
        };
        let changed = gateway.services.provision(asker.request(message)).await;
        let changed = changed.map_err(not_found)?.into_inner().changes;
        let is_change = |change: &proto::Change| change.kind() != proto::ChangeKind::Unchanged;
        Ok(changed.iter().any(is_change))
    }
}

/// Whether a budget of the protocol's can be made at a scope. Of a mistyped level would
/// become a dimension, and a budget that never applies.
fn must_be_of_levels(scope: &str) -> Result<(), Fault> {
    let is_level = |name: &str| Level::ALL.into_iter().any(|level| level.as_str() == name);
    for (level, id) in scope.split('/').filter_map(|part| part.split_once(':')) {
        if !is_level(level) {
            let levels = Level::ALL.map(Level::as_str).join(", ");
            let wants = format!(
                "made of {levels}: {level} is none of them (a budget of a dimension is made by \
                 a document)"
            );
            return Err(Fault::field("scope", &wants));
        }
        let ends = [id.bytes().next(), id.bytes().next_back()];
        let fits = |end: &Option<u8>| end.is_some_and(|end| end.is_ascii_alphanumeric());
        if !ends.iter().all(fits) {
            let wants = format!("made of ids that begin and end with a letter or digit: not {id}");
            return Err(Fault::field("scope", &wants));
        }
    }
    Ok(())
}

/// A budget of another tenant is one that does not exist.
pub(super) fn not_found(status: tonic::Status) -> Fault {
    let mut fault = Fault::from(status);
    if fault.status == axum::http::StatusCode::NOT_FOUND {
        fault.error = "BUDGET_NOT_FOUND";
    }
    fault
}

pub(super) async fn create(State(gateway): State<Gateway>, call: Call, body: Body) -> Done {
    let asker = gateway.either(&call, Permission::Provision).await?;
    // For the answer: nothing may be done that can't be told.
    asker.must_hold(Permission::Read)?;
    let given: Given = gateway.json(&call, body).await?;
    must_be_absent(&[
        ("commit_overage_policy", &given.commit_overage_policy),
        ("period_start", &given.period_start),
        ("period_end", &given.period_end),
    ])?;
    for amount in [Some(given.allocated), given.overdraft_limit]
        .into_iter()
        .flatten()
    {
        if amount.unit != given.unit {
            return Err(Fault::other_unit("allocated and overdraft_limit"));
        }
    }
    let named = Named::new(&given.scope, given.unit, given.tenant_id.as_ref())?;
    must_be_of_levels(&named.scope)?;
    let owner = tenants::find(&gateway, &asker, &named.tenant).await?;
    if owner.state() != proto::TenantState::Active {
        return Err(Fault::invalid(format!(
            "tenant {} is not ACTIVE",
            named.tenant
        )));
    }
    let message = proto::ProvisionRequest {
        idempotency_key: fresh_key(),
        budgets: vec![proto::Budget {
            scope: named.scope.clone(),
            unit: translate::unit(given.unit).into(),
            limit: Some(proto::budget::Limit::Allocation(given.allocated.amount)),
            overdraft_limit: given.overdraft_limit.map_or(0, |limit| limit.amount),
            ..proto::Budget::default()
        }],
        create_only: true,
        ..proto::ProvisionRequest::default()
    };
    gateway.services.provision(asker.request(message)).await?;
    Answer::created(&named.find(&gateway, &asker).await?)
}

pub(super) async fn look_up(
    State(gateway): State<Gateway>,
    call: Call,
    which: Params<Which>,
) -> Done {
    let asker = gateway.either(&call, Permission::Read).await?;
    let named = Named::read(which)?;
    Answer::new(&named.find(&gateway, &asker).await?)
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Change {
    #[serde(default, deserialize_with = "object_or_none")]
    overdraft_limit: Option<wire::Amount>,
    commit_overage_policy: Option<Value>,
    /// Taken and kept nowhere, as in the original.
    metadata: Option<Free>,
}

pub(super) async fn update(
    State(gateway): State<Gateway>,
    call: Call,
    which: Params<Which>,
    body: Body,
) -> Done {
    let asker = gateway.operator(&call, Permission::Provision).await?;
    asker.must_hold(Permission::Read)?;
    let given: Change = gateway.json(&call, body).await?;
    must_be_absent(&[("commit_overage_policy", &given.commit_overage_policy)])?;
    let named = Named::read(which)?;
    match given.overdraft_limit {
        Some(limit) if limit.unit != named.unit => {
            return Err(Fault::other_unit("overdraft_limit"));
        }
        Some(limit) => {
            let budget = proto::Budget {
                overdraft_limit: limit.amount,
                ..proto::Budget::default()
            };
            named
                .change(&gateway, &asker, budget, "overdraft_limit")
                .await?;
        }
        None if given.metadata.is_some() => {}
        None => {
            return Err(Fault::field(
                "overdraft_limit",
                "given: nothing else can be changed here",
            ));
        }
    }
    Answer::new(&named.find(&gateway, &asker).await?)
}

pub(super) async fn freeze(
    State(gateway): State<Gateway>,
    call: Call,
    which: Params<Which>,
) -> Done {
    let asker = gateway.operator(&call, Permission::Provision).await?;
    turn(&gateway, &asker, which, proto::BudgetState::Frozen).await
}

pub(super) async fn unfreeze(
    State(gateway): State<Gateway>,
    call: Call,
    which: Params<Which>,
) -> Done {
    let asker = gateway.operator(&call, Permission::Provision).await?;
    asker.must_hold(Permission::Loosen)?;
    turn(&gateway, &asker, which, proto::BudgetState::Active).await
}

/// Takes a budget to another state. Of many who do so at once one has done it: the others
/// are told by the change itself, since a look beforehand would be true for all of them.
async fn turn(
    gateway: &Gateway,
    asker: &Asker,
    which: Params<Which>,
    to: proto::BudgetState,
) -> Done {
    asker.must_hold(Permission::Read)?;
    let named = Named::read(which)?;
    let budget = proto::Budget {
        state: to.into(),
        ..proto::Budget::default()
    };
    if !named.change(gateway, asker, budget, "state").await? {
        let message = format!("the budget is {} already", status(to));
        let conflict = axum::http::StatusCode::CONFLICT;
        return Err(Fault::new(conflict, "INVALID_REQUEST", message));
    }
    Answer::new(&named.find(gateway, asker).await?)
}
