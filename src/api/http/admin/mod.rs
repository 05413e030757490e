//! The admin plane: what operators and provisioning scripts call.
//!
//! An operator's key in `X-Admin-API-Key` may do what it holds permissions for; a tenant's
//! key in `X-Cycles-API-Key` the same within its tenant.

mod audit;
mod budgets;
mod funding;
mod keys;
mod tenants;

use axum::Router;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::routing::{any, delete, get, post};
use pbjson_types as wkt;
use serde::Serialize;

use super::Gateway;
use super::call::{Answer, Call};
use super::problem::Fault;
use crate::domain::permission::Permission;

type Done = Result<Answer, Fault>;
type Params<T> = Result<Query<T>, QueryRejection>;

/// Most rows of a page.
const ROWS_MAX: i32 = 100;

/// How many rows a page has; out of bounds the nearest that is within, as in the original.
fn limit(limit: Option<&String>) -> Result<i32, Fault> {
    Ok(super::reads::rows(limit)?.map_or(ROWS_MAX, |rows| rows.clamp(1, ROWS_MAX)))
}

pub(super) fn routes() -> Router<Gateway> {
    let mut routes = Router::new()
        .route(
            "/v1/admin/tenants",
            post(tenants::create).get(tenants::list),
        )
        .route(
            "/v1/admin/tenants/{id}",
            get(tenants::look_up).patch(tenants::update),
        )
        .route("/v1/admin/api-keys", post(keys::create).get(keys::list))
        .route(
            "/v1/admin/api-keys/{id}",
            delete(keys::revoke).patch(left_out),
        )
        .route(
            "/v1/admin/budgets",
            post(budgets::create)
                .get(budgets::list)
                .patch(budgets::update),
        )
        .route("/v1/admin/budgets/lookup", get(budgets::look_up))
        .route("/v1/admin/budgets/fund", post(funding::fund))
        .route("/v1/admin/budgets/freeze", post(budgets::freeze))
        .route("/v1/admin/budgets/unfreeze", post(budgets::unfreeze))
        .route("/v1/balances", get(budgets::balances))
        .route("/v1/auth/introspect", get(introspect))
        .route("/v1/admin/audit/logs", get(audit::list));
    for path in [
        "/v1/admin/tenants/bulk-action",
        "/v1/admin/budgets/bulk-action",
        "/v1/admin/policies",
        "/v1/admin/policies/{id}",
        "/v1/auth/validate",
        "/v1/admin/overview",
        "/v1/admin/webhooks",
        "/v1/admin/webhooks/{*rest}",
        "/v1/webhooks",
        "/v1/webhooks/{*rest}",
        "/v1/admin/events",
        "/v1/admin/events/{id}",
        "/v1/events",
        "/v1/admin/config/webhook-security",
    ] {
        routes = routes.route(path, any(left_out));
    }
    routes
}

/// What the original has here and Remit does in its own way.
async fn left_out() -> Fault {
    Fault::not_implemented("this endpoint")
}

/// The parameters of a call.
fn params<T>(given: Params<T>) -> Result<T, Fault> {
    given
        .map(|Query(given)| given)
        .map_err(|error| Fault::invalid(error.body_text()))
}

/// Refuses settings that would have no effect, and filters and orders that are not served:
/// a list without them would be another.
fn must_be_absent<T>(fields: &[(&str, &Option<T>)]) -> Result<(), Fault> {
    match fields.iter().find(|(_, given)| given.is_some()) {
        Some((name, _)) => Err(Fault::not_implemented(&format!("`{name}`"))),
        None => Ok(()),
    }
}

/// A time as the admin plane writes it.
fn iso(time: Option<&wkt::Timestamp>) -> Option<String> {
    let time = time?;
    let time = jiff::Timestamp::new(time.seconds, time.nanos).ok()?;
    Some(format!("{time:.3}"))
}

/// Who a key is.
#[derive(Serialize)]
struct Introspection {
    authenticated: bool,
    auth_type: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    tenant_id: Option<String>,
    permissions: Vec<&'static str>,
    capabilities: Capabilities,
}

/// What a key can do, for a page that shows or hides things by it.
#[derive(Serialize)]
struct Capabilities {
    view_tenants: bool,
    manage_tenants: bool,
    view_budgets: bool,
    manage_budgets: bool,
    view_api_keys: bool,
    manage_api_keys: bool,
    view_audit: bool,
    view_reservations: bool,
}

async fn introspect(State(gateway): State<Gateway>, call: Call) -> Done {
    let asker = gateway.either(&call, Permission::Read).await?;
    let held = asker.caller.permissions();
    let may = |permission| held.contains(permission);
    let tenant = asker.tenant();
    let operates = tenant.is_empty();
    Answer::new(&Introspection {
        authenticated: true,
        auth_type: if operates { "admin" } else { "tenant" },
        tenant_id: (!operates).then(|| tenant.to_owned()),
        permissions: match operates {
            true => vec!["*"],
            false => keys::named(held.iter()),
        },
        capabilities: Capabilities {
            view_tenants: operates,
            manage_tenants: operates && may(Permission::Provision),
            view_budgets: true,
            manage_budgets: may(Permission::Provision),
            view_api_keys: may(Permission::ManageKeys),
            manage_api_keys: may(Permission::ManageKeys),
            view_audit: may(Permission::Audit),
            view_reservations: true,
        },
    })
}
