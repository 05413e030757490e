//! The runtime plane: what agents call to act.

use axum::Router;
use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use serde_json::json;
use tonic::Status;
use uuid::Uuid;

use super::answered::{self, affected_scopes, allowed, balances};
use super::call::{Answer, Asker, Call};
use super::kept;
use super::problem::Fault;
use super::reads::{
    Done, Id, Named, OfTenant, get_reservation, list_balances, list_reservations, tenant_meant,
};
use super::translate::{self, millis_left, millis_of};
use super::{Gateway, wire};
use crate::api::convert::{answers, authority as words};
use crate::domain::approve::ApprovalState;
use crate::domain::id::{IdempotencyKey, ReservationId, TenantId};
use crate::domain::permission::Permission;
use crate::domain::request::Digest;
use crate::proto;
use crate::proto::authority_server::Authority as _;

/// How long after a lease it can still be settled, in milliseconds, where nothing is said.
const GRACE_MS: u64 = 5_000;

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

/// Refuses a subject of another tenant than the key's. The protocol compares them exactly,
/// before any lower-casing, and after everything else that can be wrong with the request.
fn must_be_own(
    asker: &Asker,
    named: Option<&String>,
    otherwise_right: impl FnOnce() -> Result<(), Status>,
) -> Result<(), Fault> {
    match named {
        Some(named) if named != asker.tenant() => {
            otherwise_right()?;
            Err(Fault::other_tenant("subject.tenant"))
        }
        _ => Ok(()),
    }
}

fn scopes_of(balances: &[proto::Balance]) -> impl Iterator<Item = &String> {
    balances.iter().map(|balance| &balance.scope)
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
    kept::metadata(asked.metadata)?;
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
    let (affected_scopes, path) = affected_scopes(&subject, scopes_of(&answer.balances));
    let decision = allowed(answer.decision());
    let denial = answered::denial_of_decide(&answer, &path);
    if decision.is_none() && denial.suspended() {
        return Err(denial.into());
    }
    let body = wire::Decided {
        decision: decision.unwrap_or(wire::Decision::Deny),
        reason_code: decision.is_none().then(|| denial.reason_code()),
        caps: answered::caps(answer.caps),
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
    let mut metadata = kept::metadata(asked.metadata)?;
    metadata.extend(of_action);
    metadata.extend([kept::kept_key(&asked.idempotency_key)]);
    of_subject.keep(&mut metadata);
    let observes = asked.observe_mode == Some(wire::ObserveMode::Observe);
    let dry_run = asked.dry_run.unwrap_or(false) || observes;
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
    let (affected_scopes, path) = affected_scopes(&subject, scopes_of(&answer.balances));
    let Some(decision) = allowed(answer.decision()) else {
        if let Some(granted) = since_asked(&gateway, &subject.tenant, &answer).await? {
            let now = jiff::Timestamp::now().as_millisecond();
            let expires_at_ms = granted.expire_time.as_ref().map(millis_of);
            let is_held = granted.state() == proto::ReservationState::Active;
            let left = expires_at_ms.map(|at| if is_held { (at - now).max(0) } else { 0 });
            let caps = answered::caps(answer.caps);
            let body = wire::Reserved {
                decision: match caps {
                    None => wire::Decision::Allow,
                    Some(_) => wire::Decision::AllowWithCaps,
                },
                caps,
                reservation_id: Some(granted.reservation_id),
                affected_scopes,
                expires_at_ms,
                remaining_ttl_ms: left,
                scope_path: path,
                reserved: Some(translate::amount_of(&granted.reserved, unit)),
                balances: Some(balances(&answer.balances, |shown| shown == unit)),
                ..wire::Reserved::default()
            };
            let said = Answer::new(&body)?.decided(answer.decision_id);
            return Ok(said.recorded(granted.reserve_sequence, true));
        }
        let denial = answered::denial_of_reserve(&answer, &path);
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
        reserved: Some(translate::amount_of(&answer.reserved, unit)),
        caps: answered::caps(answer.caps),
        balances: Some(balances(&answer.balances, |shown| shown == unit)),
        ..wire::Reserved::default()
    };
    let said = Answer::new(&body)?.decided(answer.decision_id);
    Ok(said.recorded(answer.ledger_sequence, answer.replayed))
}

/// What has become of an approval since it was asked for under the same key: the
/// reservation that a person has granted while it is held or once it was used, nothing while
/// it waits, and else a fault. Clients of the protocol can't wait: they ask again.
///
/// Whoever is told the replay is told its end: that needs no permission to read.
async fn since_asked(
    gateway: &Gateway,
    tenant: &str,
    answer: &proto::ReserveResponse,
) -> Result<Option<proto::Reservation>, Fault> {
    let Some(approval) = answer.approval.as_ref().filter(|_| answer.replayed) else {
        return Ok(None);
    };
    let named = TenantId::parse(tenant).and_then(|tenant| {
        let id = ReservationId::parse(&approval.approval_id)?;
        Ok((tenant, id))
    });
    let (tenant, id) = named.map_err(|error| {
        tracing::error!(%error, "an approval that was answered can't be named");
        Fault::internal()
    })?;
    let engine = gateway.services.engine();
    let found = engine.approval(&tenant, id).await.map_err(Status::from)?;
    let (code, how) = match found.map(|record| record.state(engine.now())) {
        None | Some(ApprovalState::Pending) => return Ok(None),
        Some(ApprovalState::Approved) => {
            let found = engine.reservation(&tenant, id).await;
            let Some(found) = found.map_err(Status::from)? else {
                return Ok(None);
            };
            let found = answers::reservation(&found, engine.now());
            match found.state() {
                // This may be the first time that the caller hears of it: a yes must be of
                // something that is held, or was used already.
                proto::ReservationState::Active | proto::ReservationState::Committed => {
                    return Ok(Some(found));
                }
                proto::ReservationState::Released => (
                    "RESERVATION_FINALIZED",
                    "it was approved, and then released",
                ),
                _ => (
                    "RESERVATION_EXPIRED",
                    "it was approved, and not used in time",
                ),
            }
        }
        Some(ApprovalState::Rejected) => ("APPROVAL_REJECTED", "a person has refused it"),
        Some(ApprovalState::Expired) => ("APPROVAL_EXPIRED", "nobody approved it in time"),
        Some(ApprovalState::Withdrawn) => (
            "APPROVAL_WITHDRAWN",
            "it was released while it waited for a person",
        ),
    };
    let mut fault = Fault::new(
        StatusCode::CONFLICT,
        "BUDGET_EXCEEDED",
        format!("{how}: nothing is held under this idempotency key"),
    );
    let fix = "ask again under another idempotency key";
    fault.detail("reason_code", code);
    fault.detail("retryable", false);
    fault.detail(
        "deny_detail",
        json!({"reason_code": code, "suggested_fix": fix}),
    );
    fault.detail("approval_id", approval.approval_id.as_str());
    fault.detail("decision_id", answer.decision_id.as_str());
    fault.decision_id.clone_from(&answer.decision_id);
    fault.sequence = answer.ledger_sequence;
    fault.replayed = true;
    Err(fault)
}

async fn commit(State(gateway): State<Gateway>, call: Call, id: Id, body: Body) -> Done {
    let asker = gateway.agent(&call, Permission::Authority).await?;
    let asked: wire::Commit = gateway.json(&call, body).await?;
    call.must_agree(&asked.idempotency_key)?;
    let unit = asked.actual.unit;
    let named = Named::parse(id)?;
    let message = proto::CommitRequest {
        idempotency_key: key_within(&named.text(), &asked.idempotency_key)?,
        reservation_id: named.text(),
        actual: vec![translate::amount(asked.actual)],
        metrics: translate::metrics(asked.metrics),
        metadata: kept::record_metadata(asked.metadata),
        tenant: String::new(),
    };
    named.known(|| words::commit(message.clone(), asker.caller.tenant()).map(drop))?;
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
    let named = Named::parse(id)?;
    let message = proto::ReleaseRequest {
        idempotency_key: key_within(&named.text(), &asked.idempotency_key)?,
        reservation_id: named.text(),
        reason: translate::cut(asked.reason, 256),
        tenant: tenant_meant(&asker, of)?.to_string(),
    };
    named.known(|| words::release(message.clone(), asker.caller.tenant()).map(drop))?;
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
    let named = Named::parse(id)?;
    let message = proto::ExtendRequest {
        idempotency_key: key_within(&named.text(), &asked.idempotency_key)?,
        reservation_id: named.text(),
        extend_by: Some(translate::duration(asked.extend_by_ms)),
        ..proto::ExtendRequest::default()
    };
    named.known(|| words::extend(message.clone(), asker.caller.tenant()).map(drop))?;
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
    let mut metadata = kept::record_metadata(asked.metadata);
    metadata.extend(of_action);
    of_subject.keep(&mut metadata);
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

/// A key for a call that names none.
pub(super) fn fresh_key() -> String {
    Uuid::new_v4().to_string()
}
