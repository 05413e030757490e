//! The runtime plane: what agents call.

use axum::Router;
use axum::body::Body;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::routing::{get, post};
use serde::Deserialize;
use uuid::Uuid;

use super::call::{Answer, Asker, Call};
use super::problem::Fault;
use super::translate::{self, affected_scopes, allowed, balances, millis_left, millis_of};
use super::{Gateway, wire};
use crate::api::convert::authority as words;
use crate::domain::id::{IdempotencyKey, KeyHash, Method, ReservationId};
use crate::domain::permission::Permission;
use crate::domain::request::Digest;
use crate::proto;
use crate::proto::authority_server::Authority as _;

/// How long after a lease it can still be settled, in milliseconds, where nothing is said.
const GRACE_MS: u64 = 5_000;
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

pub(super) fn routes() -> Router<Gateway> {
    Router::new()
        .route("/v1/decide", post(decide))
        .route("/v1/reservations", post(reserve).get(list_reservations))
        .route("/v1/reservations/{id}", get(get_reservation))
        .route("/v1/reservations/{id}/commit", post(commit))
        .route("/v1/reservations/{id}/release", post(release))
        .route("/v1/reservations/{id}/extend", post(extend))
        .route("/v1/events", post(create_event))
        .route("/v1/balances", get(list_balances))
}

type Done = Result<Answer, Fault>;
type Id = Result<Path<String>, PathRejection>;

/// Refuses a subject of another tenant than the key's. The protocol compares them exactly,
/// before any lower-casing, and after everything else that can be wrong with the request.
fn must_be_own(
    asker: &Asker,
    named: Option<&String>,
    otherwise_right: impl FnOnce() -> Result<(), tonic::Status>,
) -> Result<(), Fault> {
    let own = asker.tenant();
    match named {
        Some(named) if !own.is_empty() && named != own => {
            otherwise_right()?;
            Err(Fault::new(
                axum::http::StatusCode::FORBIDDEN,
                "FORBIDDEN",
                "subject.tenant is not the tenant of the API key",
            ))
        }
        _ => Ok(()),
    }
}

/// A reservation of the protocol's form; any other names none.
fn reservation_id(id: Id) -> Result<String, Fault> {
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
struct OfTenant {
    tenant: Option<String>,
}

/// The tenant that an operator's key needs beside a reservation; empty for a tenant's own.
fn operators_tenant(
    asker: &Asker,
    of: Result<Query<OfTenant>, QueryRejection>,
) -> Result<String, Fault> {
    let Query(of) = of.map_err(|error| Fault::invalid(error.body_text()))?;
    match asker.tenant().is_empty() {
        true => tenant_of(asker, of.tenant.as_ref()),
        false => Ok(String::new()),
    }
}

/// An idempotency key within a reservation: the protocol keeps those of what settles or
/// extends it apart from other reservations'.
fn key_within(reservation: &str, key: &str) -> Result<String, Fault> {
    let parsed = IdempotencyKey::parse(key);
    parsed.map_err(|error| Fault::field("idempotency_key", &error.to_string()))?;
    let joined = format!("{reservation}/{key}");
    Ok(match IdempotencyKey::parse(&joined) {
        Ok(_) => joined,
        Err(_) => format!("{reservation}/sha256:{}", Digest::of(key.as_bytes())),
    })
}

async fn decide(State(gateway): State<Gateway>, call: Call, body: Body) -> Done {
    let asker = gateway.agent(&call, Permission::Authority).await?;
    let asked: wire::Decide = gateway.json(&call, body).await?;
    call.must_agree(&asked.idempotency_key)?;
    let named = asked.subject.tenant.clone();
    let (subject, _) = translate::subject(asked.subject, asker.tenant())?;
    let (action, _) = translate::action(asked.action)?;
    // Metadata of a decision is taken and kept nowhere.
    translate::metadata(asked.metadata)?;
    let message = proto::DecideRequest {
        idempotency_key: asked.idempotency_key,
        subject: Some(subject.clone()),
        action: Some(action),
        estimates: vec![translate::amount(asked.estimate)],
        record: true,
        ..proto::DecideRequest::default()
    };
    must_be_own(&asker, named.as_ref(), || {
        words::decide(message.clone(), None).map(drop)
    })?;
    let answer = gateway.services.decide(asker.request(message)).await?;
    let answer = answer.into_inner();
    let (affected_scopes, path) = affected_scopes(&subject, &answer.balances);
    let decision = allowed(answer.decision());
    let denial = translate::denial_of_decide(&answer, &path);
    if decision.is_none() && denial.suspended() {
        return Err(denial.into());
    }
    let body = wire::Decided {
        decision: decision.unwrap_or(wire::Decision::Deny),
        reason_code: decision.is_none().then(|| denial.reason_code()),
        caps: translate::caps(answer.caps),
        retry_after_ms: denial.retry_after_ms(),
        affected_scopes,
    };
    let said = Answer::new(&body)?.decided(answer.decision_id);
    Ok(said.recorded(answer.ledger_sequence, false))
}

async fn reserve(State(gateway): State<Gateway>, call: Call, body: Body) -> Done {
    let asker = gateway.agent(&call, Permission::Authority).await?;
    let asked: wire::Reserve = gateway.json(&call, body).await?;
    call.must_agree(&asked.idempotency_key)?;
    let named = asked.subject.tenant.clone();
    let (subject, of_subject) = translate::subject(asked.subject, asker.tenant())?;
    let (action, of_action) = translate::action(asked.action)?;
    let mut metadata = translate::metadata(asked.metadata)?;
    metadata.extend(of_subject);
    metadata.extend(of_action);
    metadata.extend([translate::kept_key(&asked.idempotency_key)]);
    let dry_run = asked.dry_run.unwrap_or(false);
    let unit = asked.estimate.unit;
    let message = proto::ReserveRequest {
        idempotency_key: asked.idempotency_key,
        subject: Some(subject.clone()),
        action: Some(action),
        estimates: vec![translate::amount(asked.estimate)],
        ttl: asked.ttl_ms.map(translate::duration),
        // The protocol fills it in before requests are compared.
        grace: Some(translate::duration(
            asked.grace_period_ms.unwrap_or(GRACE_MS),
        )),
        overage_policy: translate::overage_policy(asked.overage_policy),
        metadata,
        dry_run,
        ..proto::ReserveRequest::default()
    };
    must_be_own(&asker, named.as_ref(), || {
        words::reserve(message.clone(), None).map(drop)
    })?;
    let answer = gateway.services.reserve(asker.request(message)).await?;
    let answer = answer.into_inner();
    let (affected_scopes, path) = affected_scopes(&subject, &answer.balances);
    let Some(decision) = allowed(answer.decision()) else {
        let denial = translate::denial_of_reserve(&answer, &path);
        // Only a question can be answered DENY: an agent could take a 200 for a yes.
        if !dry_run || denial.suspended() {
            return Err(denial.into());
        }
        return Answer::new(&wire::Reserved {
            decision: wire::Decision::Deny,
            reason_code: Some(denial.reason_code()),
            retry_after_ms: denial.retry_after_ms(),
            affected_scopes,
            scope_path: path,
            ..wire::Reserved::default()
        });
    };
    let body = wire::Reserved {
        decision,
        reservation_id: (!dry_run).then_some(answer.reservation_id),
        affected_scopes,
        expires_at_ms: answer.expire_time.as_ref().map(millis_of),
        remaining_ttl_ms: answer.remaining_ttl.as_ref().map(millis_left),
        scope_path: path,
        reserved: Some(match dry_run {
            true => asked.estimate,
            false => translate::amount_of(&answer.reserved, unit),
        }),
        caps: translate::caps(answer.caps),
        balances: Some(balances(&answer.balances, |shown| shown == unit)),
        ..wire::Reserved::default()
    };
    let said = Answer::new(&body)?.decided(answer.decision_id);
    Ok(said.recorded(answer.ledger_sequence, answer.replayed))
}

async fn commit(State(gateway): State<Gateway>, call: Call, id: Id, body: Body) -> Done {
    let asker = gateway.agent(&call, Permission::Authority).await?;
    let asked: wire::Commit = gateway.json(&call, body).await?;
    call.must_agree(&asked.idempotency_key)?;
    let unit = asked.actual.unit;
    let reservation_id = reservation_id(id)?;
    let message = proto::CommitRequest {
        idempotency_key: key_within(&reservation_id, &asked.idempotency_key)?,
        reservation_id,
        actual: vec![translate::amount(asked.actual)],
        metrics: translate::metrics(asked.metrics),
        metadata: translate::record_metadata(asked.metadata),
        tenant: String::new(),
    };
    let answer = gateway.services.commit(asker.request(message)).await?;
    let answer = answer.into_inner();
    let released = translate::amount_of(&answer.released, unit);
    let body = wire::Committed {
        status: "COMMITTED",
        charged: translate::amount_of(&answer.charged, unit),
        released: (released.amount > 0).then_some(released),
        balances: balances(&answer.balances, |shown| shown == unit),
    };
    Ok(Answer::new(&body)?.recorded(answer.ledger_sequence, answer.replayed))
}

async fn release(
    State(gateway): State<Gateway>,
    call: Call,
    id: Id,
    of: Result<Query<OfTenant>, QueryRejection>,
    body: Body,
) -> Done {
    let asker = gateway.either(&call, Permission::Authority).await?;
    let asked: wire::Release = gateway.json(&call, body).await?;
    call.must_agree(&asked.idempotency_key)?;
    let reservation_id = reservation_id(id)?;
    let message = proto::ReleaseRequest {
        idempotency_key: key_within(&reservation_id, &asked.idempotency_key)?,
        reservation_id,
        reason: translate::cut(asked.reason, 256),
        tenant: operators_tenant(&asker, of)?,
    };
    let answer = gateway.services.release(asker.request(message)).await?;
    let answer = answer.into_inner();
    let body = wire::Released {
        status: "RELEASED",
        released: translate::only_amount(&answer.released).unwrap_or(wire::Amount {
            unit: wire::Unit::Credits,
            amount: 0,
        }),
        balances: balances(&answer.balances, |_| true),
    };
    Ok(Answer::new(&body)?.recorded(answer.ledger_sequence, answer.replayed))
}

async fn extend(State(gateway): State<Gateway>, call: Call, id: Id, body: Body) -> Done {
    let asker = gateway.agent(&call, Permission::Authority).await?;
    let asked: wire::Extend = gateway.json(&call, body).await?;
    call.must_agree(&asked.idempotency_key)?;
    let reservation_id = reservation_id(id)?;
    let message = proto::ExtendRequest {
        idempotency_key: key_within(&reservation_id, &asked.idempotency_key)?,
        reservation_id,
        extend_by: Some(translate::duration(asked.extend_by_ms)),
        ..proto::ExtendRequest::default()
    };
    let answer = gateway.services.extend(asker.request(message)).await?;
    let answer = answer.into_inner();
    let body = wire::Extended {
        status: "ACTIVE",
        expires_at_ms: answer.expire_time.as_ref().map_or(0, millis_of),
        remaining_ttl_ms: answer.remaining_ttl.as_ref().map_or(0, millis_left),
        balances: balances(&answer.balances, |_| true),
    };
    Ok(Answer::new(&body)?.recorded(answer.ledger_sequence, answer.replayed))
}

async fn create_event(State(gateway): State<Gateway>, call: Call, body: Body) -> Done {
    let asker = gateway.agent(&call, Permission::Authority).await?;
    let asked: wire::Event = gateway.json(&call, body).await?;
    call.must_agree(&asked.idempotency_key)?;
    let named = asked.subject.tenant.clone();
    let (subject, of_subject) = translate::subject(asked.subject, asker.tenant())?;
    let (action, of_action) = translate::action(asked.action)?;
    let mut metadata = translate::record_metadata(asked.metadata);
    metadata.extend(of_subject);
    metadata.extend(of_action);
    let unit = asked.actual.unit;
    let tenant = subject.tenant.clone();
    let message = proto::RecordRequest {
        idempotency_key: asked.idempotency_key,
        subject: Some(subject),
        action: Some(action),
        amounts: vec![translate::amount(asked.actual)],
        overage_policy: translate::overage_policy(asked.overage_policy),
        metrics: translate::metrics(asked.metrics),
        metadata,
        ..proto::RecordRequest::default()
    };
    must_be_own(&asker, named.as_ref(), || {
        words::record(message.clone(), None).map(drop)
    })?;
    let answer = gateway.services.record(asker.request(message)).await?;
    let answer = answer.into_inner();
    let uncovered = translate::amount_of(&answer.uncovered, unit);
    let body = wire::Applied {
        status: "APPLIED",
        event_id: event_id(&tenant, answer.ledger_sequence),
        charged: (uncovered.amount > 0).then(|| translate::amount_of(&answer.charged, unit)),
        balances: balances(&answer.balances, |shown| shown == unit),
    };
    let said = Answer::created(&body)?;
    Ok(said.recorded(answer.ledger_sequence, answer.replayed))
}

/// The name of an event: a UUID made of its place in the ledger, so that a replay has the
/// same.
fn event_id(tenant: &str, sequence: i64) -> String {
    let place = format!("event\0{}\0{sequence}", tenant.to_ascii_lowercase());
    let digest = Digest::of(place.as_bytes());
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest.0[..16]);
    uuid::Builder::from_custom_bytes(bytes)
        .into_uuid()
        .to_string()
}

async fn get_reservation(
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
            axum::http::StatusCode::CONFLICT,
            "BUDGET_EXCEEDED",
            "it waits for a person: nothing may happen yet",
        );
        fault.detail("reason_code", "APPROVAL_REQUIRED");
        fault.detail("approval_id", id);
        return Err(fault);
    };
    if found.status == wire::ReservationStatus::Expired {
        let mut fault = Fault::new(
            axum::http::StatusCode::GONE,
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
        _ => Err(Fault::new(
            axum::http::StatusCode::FORBIDDEN,
            "FORBIDDEN",
            "tenant is not the tenant of the API key",
        )),
    }
}

async fn list_reservations(
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
        let by_list = key.is_none();
        let stands = state == proto::ReservationState::Unspecified || row.state() == state;
        let named = scope
            .split('/')
            .all(|pair| row.scope.split('/').any(|own| own == pair));
        let settled = matches!(
            row.state(),
            proto::ReservationState::Committed | proto::ReservationState::Released
        );
        let settle_time = row.settle_time.as_ref().filter(|_| settled);
        (by_list || (stands && (scope.is_empty() || named)))
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
        has_more: !next.is_empty(),
        next_cursor: Some(next).filter(|next| !next.is_empty()),
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
    let tenant = crate::domain::id::TenantId::parse(tenant)
        .map_err(|error| Fault::field("tenant", &error.to_string()))?;
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

async fn list_balances(
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
        has_more: !page.next_page_token.is_empty(),
        next_cursor: Some(page.next_page_token).filter(|next| !next.is_empty()),
    })
}

/// A key for a call that names none.
pub(super) fn fresh_key() -> String {
    Uuid::new_v4().to_string()
}
