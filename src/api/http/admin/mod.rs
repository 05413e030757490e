//! The admin plane: what operators and provisioning scripts call.
//!
//! An operator's key in `X-Admin-API-Key` may do what it holds permissions for. A tenant's
//! key in `X-Cycles-API-Key` makes, funds and reads its tenant's budgets, and nothing else.

mod audit;
mod budgets;
mod funding;
mod keys;
mod lists;
mod tenants;

use std::convert::Infallible;

use axum::Router;
use axum::extract::rejection::QueryRejection;
use axum::extract::{FromRequestParts, Query, State};
use axum::http::Uri;
use axum::http::request::Parts;
use axum::routing::{any, delete, get, post};
use pbjson_types as wkt;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::call::{Answer, Call};
use super::problem::Fault;
use super::{Gateway, wire};
use crate::domain::permission::{Permission, Permissions};
use crate::domain::request::Digest;

type Done = Result<Answer, Fault>;

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
                .get(lists::list)
                .patch(budgets::update),
        )
        .route("/v1/admin/budgets/lookup", get(budgets::look_up))
        .route("/v1/admin/budgets/fund", post(funding::fund))
        .route("/v1/admin/budgets/freeze", post(budgets::freeze))
        .route("/v1/admin/budgets/unfreeze", post(budgets::unfreeze))
        .route("/v1/balances", get(lists::balances))
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

/// The parameters of a call. A blank one counts as not given.
pub(super) struct Params<T>(Result<Query<T>, QueryRejection>);

impl<S: Sync, T: DeserializeOwned> FromRequestParts<S> for Params<T> {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        let is_given = |pair: &&str| {
            let value = pair.split_once('=').map_or("", |(_, value)| value);
            !value.replace("%20", "+").bytes().all(|b| b == b'+')
        };
        let query = parts.uri.query().unwrap_or("");
        let given: Vec<_> = query.split('&').filter(is_given).collect();
        let uri = Uri::try_from(format!("/?{}", given.join("&")));
        let uri = uri.as_ref().unwrap_or(&parts.uri);
        Ok(Self(Query::try_from_uri(uri)))
    }
}

fn params<T>(Params(given): Params<T>) -> Result<T, Fault> {
    given
        .map(|Query(given)| given)
        .map_err(|error| Fault::invalid(error.body_text()))
}

/// What a cursor belongs to beside what the service was asked: the filters that are
/// applied here.
struct Question(String);

impl Question {
    fn new(filters: &str) -> Self {
        Self(hex::encode(&Digest::of(filters.as_bytes()).0[..8]))
    }

    /// The service's token in a cursor of this question.
    fn token(&self, cursor: Option<String>) -> Result<String, Fault> {
        let Some(cursor) = cursor else {
            return Ok(String::new());
        };
        let token = cursor
            .strip_prefix(&self.0)
            .filter(|token| !token.is_empty());
        let token = token.ok_or_else(|| {
            Fault::field("cursor", "a next_cursor of the same question, or absent")
        })?;
        Ok(token.to_owned())
    }

    fn next(&self, token: &str) -> wire::Next {
        match token {
            "" => String::new().into(),
            token => format!("{}{token}", self.0).into(),
        }
    }
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

/// A time in a body or a filter. One of the last hours of the year 9999, which people write
/// for "never", is the latest that can be kept.
fn time(field: &str, text: &str) -> Result<jiff::Timestamp, Fault> {
    let wants = || Fault::field(field, "a time such as 2026-01-31T12:00:00Z");
    let text = text.trim();
    if let Ok(time) = text.parse() {
        return Ok(time);
    }
    let pieces = jiff::fmt::temporal::Pieces::parse(text).map_err(|_| wants())?;
    match (pieces.date().year(), pieces.time(), pieces.offset()) {
        (9999, Some(_), Some(_)) => Ok(jiff::Timestamp::MAX),
        _ => Err(wants()),
    }
}

/// A time as the services take it.
fn stamp(time: jiff::Timestamp) -> wkt::Timestamp {
    wkt::Timestamp {
        seconds: time.as_second(),
        nanos: time.subsec_nanosecond(),
    }
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

/// What a key can do here, for a page that shows or hides things by it. What is left out
/// nobody can.
#[derive(Default, Serialize)]
struct Capabilities {
    view_overview: bool,
    view_tenants: bool,
    manage_tenants: bool,
    view_budgets: bool,
    manage_budgets: bool,
    view_api_keys: bool,
    manage_api_keys: bool,
    view_policies: bool,
    manage_policies: bool,
    view_webhooks: bool,
    manage_webhooks: bool,
    view_events: bool,
    view_audit: bool,
    view_reservations: bool,
    manage_reservations: bool,
}

/// Any key may look at itself.
async fn introspect(State(gateway): State<Gateway>, call: Call) -> Done {
    let asker = gateway.anyone(&call).await?;
    let held = asker.caller.permissions();
    let may = |permission| held.contains(permission);
    let tenant = asker.tenant();
    let operates = tenant.is_empty();
    let provisions = may(Permission::Provision) && may(Permission::Read);
    Answer::new(&Introspection {
        authenticated: true,
        auth_type: if operates { "admin" } else { "tenant" },
        tenant_id: (!operates).then(|| tenant.to_owned()),
        permissions: match operates && Permissions::all().is_subset(held) {
            true => vec!["*"],
            false => keys::named(held, operates),
        },
        capabilities: Capabilities {
            view_tenants: operates && may(Permission::Read),
            manage_tenants: operates && provisions,
            view_budgets: may(Permission::Read),
            manage_budgets: provisions && may(Permission::Fund),
            view_api_keys: operates && may(Permission::ManageKeys),
            manage_api_keys: operates && may(Permission::ManageKeys),
            view_audit: operates && may(Permission::Audit),
            view_reservations: may(Permission::Read),
            manage_reservations: may(Permission::Authority),
            ..Capabilities::default()
        },
    })
}
