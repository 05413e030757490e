//! What agents and operators read of the runtime plane.

use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use serde::Deserialize;

use super::call::{Answer, Asker, Call};
use super::problem::Fault;
use super::translate::{self, balances, millis_of};
use super::{Gateway, wire};
use crate::domain::id::{IdempotencyKey, KeyHash, Method, ReservationId, TenantId};
use crate::domain::permission::Permission;
use crate::proto;
use crate::proto::authority_server::Authority as _;

/// What the protocol can sort reservations by.
const ORDERS: [&str; 7] = [
    "reservation_id",
    "tenant",
    "scope_path",
    "status",
    "reserved",
    "created_at_ms",
    "expires_at_ms",
];
/// Most rows of a page.
const ROWS_MAX: i32 = 200;

/// How a call ends.
pub(super) type Done = Result<Answer, Fault>;
/// The reservation of a path.
pub(super) type Id = Result<Path<String>, PathRejection>;

/// A reservation of the protocol's form; any other names none.
pub(super) fn reservation_id(id: Id) -> Result<String, Fault> {
    let Path(id) = id.map_err(|error| Fault::invalid(error.body_text()))?;
    if id.chars().count() > 128 {
        return Err(Fault::field("reservation_id", "1 to 128 characters"));
    }
    match ReservationId::parse(&id) {
        Ok(_) => Ok(id),
        Err(_) => Err(Fault::not_found(id)),
    }
}

/// Whose reservation an operator means.
#[derive(Debug, Deserialize)]
pub(super) struct OfTenant {
    tenant: Option<String>,
}

/// The tenant that an operator's key needs beside a reservation; empty for a tenant's own.
pub(super) fn operators_tenant(
    asker: &Asker,
    of: Result<Query<OfTenant>, QueryRejection>,
) -> Result<String, Fault> {
    let Query(of) = of.map_err(|error| Fault::invalid(error.body_text()))?;
    match asker.tenant().is_empty() {
        true => tenant_of(asker, of.tenant.as_ref()),
        false => Ok(String::new()),
    }
}

pub(super) async fn get_reservation(
    State(gateway): State<Gateway>,
    call: Call,
    id: Id,
    of: Result<Query<OfTenant>, QueryRejection>,
) -> Done {
    let asker = gateway.either(&call, Permission::Read).await?;
    let message = proto::GetReservationRequest {
        reservation_id: reservation_id(id)?,
        tenant: operators_tenant(&asker, of)?,
    };
    let answer = gateway
        .services
        .get_reservation(asker.request(message))
        .await?;
    let found = answer.into_inner().reservation.unwrap_or_default();
    let id = found.reservation_id.clone();
    let Some(found) = translate::reservation(found) else {
        let mut fault = Fault::new(
            StatusCode::CONFLICT,
            "BUDGET_EXCEEDED",
            "it waits for a person: nothing may happen yet",
        );
        fault.detail("reason_code", "APPROVAL_REQUIRED");
        fault.detail("approval_id", id);
        return Err(fault);
    };
    if found.status == wire::ReservationStatus::Expired {
        let mut fault = Fault::new(
            StatusCode::GONE,
            "RESERVATION_EXPIRED",
            "the reservation expired before it was settled",
        );
        let content = serde_json::to_value(&found).unwrap_or_default();
        fault.detail("reservation", content);
        return Err(fault);
    }
    Answer::new(&found)
}

/// What a list is limited to, as `level:value` pairs.
fn scope_of(levels: [(&str, &Option<String>); 5]) -> String {
    let named = levels.into_iter().filter_map(|(level, name)| {
        let name = name
            .as_deref()
            .map(str::trim)
            .filter(|name| !name.is_empty())?;
        Some(format!("{level}:{}", name.to_ascii_lowercase()))
    });
    named.collect::<Vec<_>>().join("/")
}

/// How many rows a page has.
fn limit(limit: Option<&String>) -> Result<i32, Fault> {
    rows(limit)?
        .filter(|limit| (1..=ROWS_MAX).contains(limit))
        .ok_or_else(|| Fault::field("limit", &format!("1 to {ROWS_MAX}")))
}

/// How many rows are asked for: 50 where nothing is said, nothing for too many to count.
pub(super) fn rows(limit: Option<&String>) -> Result<Option<i32>, Fault> {
    let Some(limit) = limit
        .map(|limit| limit.trim())
        .filter(|limit| !limit.is_empty())
    else {
        return Ok(Some(50));
    };
    let limit: Result<i64, _> = limit.parse();
    let limit = limit.map_err(|_| Fault::field("limit", "a number"))?;
    Ok(i32::try_from(limit).ok())
}

/// From and to, both ends inclusive.
struct Times(Option<i64>, Option<i64>);

impl Times {
    fn read(
        (from, from_text): (&str, Option<&String>),
        (to, to_text): (&str, Option<&String>),
    ) -> Result<Self, Fault> {
        let read = |name, text| {
            let time = translate::time(name, text)?;
            Ok::<_, Fault>(time.as_ref().map(millis_of))
        };
        let times = Self(read(from, from_text)?, read(to, to_text)?);
        match times {
            Self(Some(first), Some(last)) if first > last => {
                Err(Fault::field(from, &format!("not later than {to}")))
            }
            times => Ok(times),
        }
    }

    fn have(&self, at: Option<i64>) -> bool {
        let Self(from, to) = self;
        if from.is_none() && to.is_none() {
            return true;
        }
        at.is_some_and(|at| from.is_none_or(|from| at >= from) && to.is_none_or(|to| at <= to))
    }
}

/// The tenant of a list. An operator has to name it, and an agent can name only its own.
fn tenant_of(asker: &Asker, named: Option<&String>) -> Result<String, Fault> {
    let named = named.map_or("", |named| named.trim());
    match (asker.tenant(), named) {
        ("", "") => Err(Fault::field("tenant", "given with an operator's key")),
        ("", named) => Ok(named.to_owned()),
        (own, "") => Ok(own.to_owned()),
        (own, named) if own == named => Ok(own.to_owned()),
        _ => Err(Fault::other_tenant("tenant")),
    }
}

pub(super) async fn list_reservations(
    State(gateway): State<Gateway>,
    call: Call,
    filters: Result<Query<wire::ReservationFilters>, QueryRejection>,
) -> Done {
    let asker = gateway.either(&call, Permission::Read).await?;
    let Query(filters) = filters.map_err(|error| Fault::invalid(error.body_text()))?;
    let tenant = tenant_of(&asker, filters.tenant.as_ref())?;
    let known = |given: &Option<String>, names: &[&str]| {
        let given = given.as_deref().filter(|given| !given.is_empty());
        given.is_none_or(|given| names.iter().any(|name| name.eq_ignore_ascii_case(given)))
    };
    if !known(&filters.sort_by, &ORDERS) {
        let wants = format!("one of {}", ORDERS.join(", "));
        return Err(Fault::field("sort_by", &wants));
    }
    if !known(&filters.sort_dir, &["asc", "desc"]) {
        return Err(Fault::field("sort_dir", "asc or desc"));
    }
    let is = |given: &Option<String>, name| known(given, &[name]);
    if !is(&filters.sort_by, "created_at_ms") || !is(&filters.sort_dir, "desc") {
        return Err(Fault::not_implemented(
            "a list in another order than created_at_ms, newest first",
        ));
    }
    let state = match filters.status.as_deref().unwrap_or("") {
        "" => proto::ReservationState::Unspecified,
        "ACTIVE" => proto::ReservationState::Active,
        "COMMITTED" => proto::ReservationState::Committed,
        "RELEASED" => proto::ReservationState::Released,
        "EXPIRED" => proto::ReservationState::Expired,
        _ => {
            return Err(Fault::field(
                "status",
                "one of ACTIVE, COMMITTED, RELEASED, EXPIRED",
            ));
        }
    };
    let made = Times::read(("from", filters.from.as_ref()), ("to", filters.to.as_ref()))?;
    let expires = Times::read(
        ("expires_from", filters.expires_from.as_ref()),
        ("expires_to", filters.expires_to.as_ref()),
    )?;
    let finalized = Times::read(
        ("finalized_from", filters.finalized_from.as_ref()),
        ("finalized_to", filters.finalized_to.as_ref()),
    )?;
    let include = filters.include.as_deref().unwrap_or("");
    let with_metadata = include.split(',').any(|name| name.trim() == "metadata");
    let scope = scope_of([
        ("workspace", &filters.workspace),
        ("app", &filters.app),
        ("workflow", &filters.workflow),
        ("agent", &filters.agent),
        ("toolset", &filters.toolset),
    ]);
    let limit = limit(filters.limit.as_ref())?;
    let key = filters.idempotency_key.filter(|key| !key.is_empty());
    let (found, next) = match &key {
        // A reservation is named by its key: no list has to be searched.
        Some(key) => {
            let found = by_key(&gateway, &asker, &tenant, key).await?;
            (Vec::from_iter(found), String::new())
        }
        None => {
            let message = proto::ListReservationsRequest {
                tenant,
                state: state.into(),
                scope: scope.clone(),
                page_size: limit,
                page_token: filters.cursor.unwrap_or_default(),
            };
            let page = gateway.services.list_reservations(asker.request(message));
            let page = page.await?.into_inner();
            (page.reservations, page.next_page_token)
        }
    };
    let fits = |row: &proto::Reservation| {
        // The service has looked at these, but where the key named the reservation.
        let filtered = key.is_none();
        let stands = state == proto::ReservationState::Unspecified || row.state() == state;
        let named = scope
            .split('/')
            .all(|pair| row.scope.split('/').any(|own| own == pair));
        let settled = matches!(
            row.state(),
            proto::ReservationState::Committed | proto::ReservationState::Released
        );
        let settle_time = row.settle_time.as_ref().filter(|_| settled);
        (filtered || (stands && (scope.is_empty() || named)))
            && made.have(row.create_time.as_ref().map(millis_of))
            && expires.have(row.expire_time.as_ref().map(millis_of))
            && finalized.have(settle_time.map(millis_of))
    };
    let reservations = found
        .into_iter()
        .filter(fits)
        .filter_map(translate::reservation)
        .map(|row| wire::Reservation {
            idempotency_key: row.idempotency_key.or_else(|| key.clone()),
            committed: None,
            finalized_at_ms: None,
            metadata: row.metadata.filter(|_| with_metadata),
            ..row
        })
        .collect();
    Answer::new(&wire::Reservations {
        reservations,
        next: next.into(),
    })
}

async fn by_key(
    gateway: &Gateway,
    asker: &Asker,
    tenant: &str,
    key: &str,
) -> Result<Option<proto::Reservation>, Fault> {
    let key = IdempotencyKey::parse(key)
        .map_err(|error| Fault::field("idempotency_key", &error.to_string()))?;
    let tenant =
        TenantId::parse(tenant).map_err(|error| Fault::field("tenant", &error.to_string()))?;
    let id = ReservationId::of(KeyHash::of(&tenant, Method::Reserve, &key));
    let message = proto::GetReservationRequest {
        reservation_id: id.to_string(),
        tenant: tenant.to_string(),
    };
    match gateway
        .services
        .get_reservation(asker.request(message))
        .await
    {
        Ok(found) => Ok(found.into_inner().reservation),
        Err(status) if status.code() == tonic::Code::NotFound => Ok(None),
        Err(status) => Err(status.into()),
    }
}

pub(super) async fn list_balances(
    State(gateway): State<Gateway>,
    call: Call,
    filters: Result<Query<wire::BalanceFilters>, QueryRejection>,
) -> Done {
    let asker = gateway.agent(&call, Permission::Read).await?;
    let Query(filters) = filters.map_err(|error| Fault::invalid(error.body_text()))?;
    let scope = scope_of([
        ("workspace", &filters.workspace),
        ("app", &filters.app),
        ("workflow", &filters.workflow),
        ("agent", &filters.agent),
        ("toolset", &filters.toolset),
    ]);
    let tenant_named = filters
        .tenant
        .as_deref()
        .is_some_and(|t| !t.trim().is_empty());
    if scope.is_empty() && !tenant_named {
        return Err(Fault::invalid(
            "Validation failed: at least one of tenant, workspace, app, workflow, agent, toolset \
             must be given",
        ));
    }
    let message = proto::ListBalancesRequest {
        tenant: tenant_of(&asker, filters.tenant.as_ref())?,
        scope,
        page_size: limit(filters.limit.as_ref())?,
        page_token: filters.cursor.unwrap_or_default(),
        include_unopened: true,
        ..proto::ListBalancesRequest::default()
    };
    let page = gateway
        .services
        .list_balances(asker.request(message))
        .await?;
    let page = page.into_inner();
    Answer::new(&wire::Balances {
        balances: balances(&page.balances, |_| true),
        next: page.next_page_token.into(),
    })
}
