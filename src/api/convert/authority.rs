//! What `Authority` is asked.

use std::collections::BTreeMap;
use std::time::Duration;

use tonic::Status;

use super::parse_overage_policy;
use crate::api::arguments;
use crate::api::fields::Fields;
use crate::domain::amount::{Amount, Amounts};
use crate::domain::id::{Malformed, Name, ReservationId, TenantId};
use crate::domain::query::StateFilter;
use crate::domain::request::{
    Action, Arguments, Ask, Commit, Context, Decide, Extend, ExtendBy, Grace, Metrics, Record,
    RecordOf, Release, Reserve, Ttl, action_name,
};
use crate::domain::scope::{Levels, ScopeFilter, Subject, dimension_key};
use crate::proto;

/// A subject; its tenant is the caller's own where it names none.
fn subject(
    fields: &mut Fields,
    message: Option<proto::Subject>,
    own: Option<&TenantId>,
) -> Option<Subject> {
    let Some(message) = message else {
        fields.bad("subject", "given");
        return None;
    };
    let proto::Subject {
        tenant,
        workspace,
        app,
        workflow,
        agent,
        toolset,
        dimensions,
    } = message;
    let tenant = fields.tenant("subject.tenant", &tenant, own);
    let levels = Levels {
        workspace: fields.name("subject.workspace", &workspace),
        app: fields.name("subject.app", &app),
        workflow: fields.name("subject.workflow", &workflow),
        agent: fields.name("subject.agent", &agent),
        toolset: fields.name("subject.toolset", &toolset),
    };
    let mut parsed = BTreeMap::new();
    // By key, so that the same message is always answered the same.
    for (key, value) in dimensions.into_iter().collect::<BTreeMap<_, _>>() {
        if let Err(Malformed(wants)) = dimension_key(&key) {
            fields.bad("subject.dimensions", format!("made of keys of {wants}"));
            continue;
        }
        let field = format!("subject.dimensions[{key}]");
        if let Some(value) = fields.take(&field, Name::parse(&value)) {
            parsed.insert(key.into(), value);
        }
    }
    // Their number is checked with the rest: also where the tenant is bad.
    let tenant_or_any = tenant.clone().unwrap_or_else(TenantId::system);
    let subject = Subject::new(tenant_or_any, levels, parsed);
    let subject = fields.take("subject.dimensions", subject);
    tenant.and(subject)
}

fn action(
    fields: &mut Fields,
    message: Option<proto::Action>,
) -> Option<(Action, Option<Arguments>)> {
    let Some(message) = message else {
        fields.bad("action", "given");
        return None;
    };
    let proto::Action {
        name,
        kind,
        arguments,
    } = message;
    let name = fields.take("action.name", action_name(&name));
    let kind = match kind.as_str() {
        "" => None,
        kind => fields.take("action.kind", action_name(kind)),
    };
    let arguments = arguments
        .and_then(|arguments| fields.take("action.arguments", arguments::parse(arguments)));
    let (digest, arguments) = arguments.unzip();
    let action = Action {
        name: name?,
        kind,
        arguments_sha256: digest,
    };
    Some((action, arguments))
}

fn context(fields: &mut Fields, message: Option<proto::Context>) -> Context {
    let proto::Context {
        environment,
        actor,
        reason,
    } = message.unwrap_or_default();
    Context {
        environment: fields.text("context.environment", environment, 128),
        actor: fields.text("context.actor", actor, 256),
        reason: fields.text("context.reason", reason, 1_024),
    }
}

fn metrics(fields: &mut Fields, message: Option<proto::Metrics>) -> Metrics {
    let proto::Metrics {
        tokens_input,
        tokens_output,
        latency_ms,
        model_version,
        custom,
    } = message.unwrap_or_default();
    let mut count = |field: &str, value: Option<i64>| {
        value.and_then(|value| fields.take(field, Amount::new(value)))
    };
    Metrics {
        tokens_input: count("metrics.tokens_input", tokens_input),
        tokens_output: count("metrics.tokens_output", tokens_output),
        latency_ms: count("metrics.latency_ms", latency_ms),
        model_version: fields.text("metrics.model_version", model_version, 128),
        custom: fields.metadata("metrics.custom", custom),
    }
}

/// What Decide and Reserve have in common.
fn ask(
    fields: &mut Fields,
    subject_message: Option<proto::Subject>,
    action_message: Option<proto::Action>,
    estimates: Vec<proto::Amount>,
    context_message: Option<proto::Context>,
    explain: bool,
    own: Option<&TenantId>,
) -> Option<Ask> {
    let subject = subject(fields, subject_message, own);
    let action = action(fields, action_message);
    let estimates = fields.amounts("estimates", estimates);
    let context = context(fields, context_message);
    let (action, arguments) = action?;
    Some(Ask {
        subject: subject?.into(),
        action: action.into(),
        estimates,
        context,
        arguments: arguments.map(Into::into),
        explain,
    })
}

/// Takes a DecideRequest.
pub fn decide(message: proto::DecideRequest, own: Option<&TenantId>) -> Result<Decide, Status> {
    let proto::DecideRequest {
        idempotency_key,
        subject,
        action,
        estimates,
        context,
        record,
        explain,
    } = message;
    let mut fields = Fields::default();
    let key = match (record, idempotency_key.is_empty()) {
        (false, true) => None,
        _ => fields.key(&idempotency_key),
    };
    let ask = ask(
        &mut fields,
        subject,
        action,
        estimates,
        context,
        explain,
        own,
    );
    let made = ask.map(|ask| Decide {
        ask,
        record: key.filter(|_| record),
    });
    fields.finish(made)
}

/// Takes a ReserveRequest.
pub fn reserve(message: proto::ReserveRequest, own: Option<&TenantId>) -> Result<Reserve, Status> {
    let proto::ReserveRequest {
        idempotency_key,
        subject,
        action,
        estimates,
        ttl,
        grace,
        overage_policy,
        context,
        metadata,
        dry_run,
        explain,
    } = message;
    let mut fields = Fields::default();
    let key = match (dry_run, idempotency_key.is_empty()) {
        (true, true) => None,
        _ => fields.key(&idempotency_key),
    };
    let ask = ask(
        &mut fields,
        subject,
        action,
        estimates,
        context,
        explain,
        own,
    );
    let ttl = fields.duration("ttl", ttl);
    let ttl = ttl.and_then(|ttl| fields.take("ttl", Ttl::new(ttl)));
    let grace = fields.duration("grace", grace);
    let grace = grace.and_then(|grace| fields.take("grace", Grace::new(grace)));
    let overage_policy = parse_overage_policy(&mut fields, "overage_policy", overage_policy);
    let metadata = fields.metadata("metadata", metadata);
    let made = ask.map(|ask| Reserve {
        ask,
        key: key.filter(|_| !dry_run),
        ttl,
        grace,
        overage_policy,
        metadata,
    });
    fields.finish(made)
}

/// Takes a CommitRequest, and the tenant that it is about.
pub fn commit(
    message: proto::CommitRequest,
    own: Option<&TenantId>,
) -> Result<(TenantId, Commit), Status> {
    let proto::CommitRequest {
        idempotency_key,
        reservation_id,
        actual,
        metrics: metrics_message,
        metadata,
        tenant,
    } = message;
    let mut fields = Fields::default();
    let tenant = fields.tenant("tenant", &tenant, own);
    let key = fields.key(&idempotency_key);
    let reservation = fields.reservation(&reservation_id);
    let actual = fields.amounts("actual", actual);
    let metrics = metrics(&mut fields, metrics_message);
    let metadata = fields.metadata("metadata", metadata);
    let made = key.zip(reservation).map(|(key, reservation)| Commit {
        key,
        reservation,
        actual,
        metrics,
        metadata,
    });
    fields.finish(tenant.zip(made))
}

/// Takes a ReleaseRequest, and the tenant that it is about.
pub fn release(
    message: proto::ReleaseRequest,
    own: Option<&TenantId>,
) -> Result<(TenantId, Release), Status> {
    let proto::ReleaseRequest {
        idempotency_key,
        reservation_id,
        reason,
        tenant,
    } = message;
    let mut fields = Fields::default();
    let tenant = fields.tenant("tenant", &tenant, own);
    let key = fields.key(&idempotency_key);
    let reservation = fields.reservation(&reservation_id);
    let reason = fields.text("reason", reason, 256);
    let made = key.zip(reservation).map(|(key, reservation)| Release {
        key,
        reservation,
        reason,
    });
    fields.finish(tenant.zip(made))
}

/// Takes an ExtendRequest, and the tenant that it is about.
pub fn extend(
    message: proto::ExtendRequest,
    own: Option<&TenantId>,
) -> Result<(TenantId, Extend), Status> {
    let proto::ExtendRequest {
        idempotency_key,
        reservation_id,
        extend_by,
        additional,
        tenant,
    } = message;
    let mut fields = Fields::default();
    let tenant = fields.tenant("tenant", &tenant, own);
    let key = fields.key(&idempotency_key);
    let reservation = fields.reservation(&reservation_id);
    let named = extend_by.is_some();
    let by = fields.duration("extend_by", extend_by);
    let by = by.and_then(|by| fields.take("extend_by", ExtendBy::new(by)));
    // One mistake of it is enough.
    let malformed = named && by.is_none();
    let by = by.unwrap_or_default();
    let nothing_more = additional.is_empty();
    let additional = fields.amounts("additional", additional);
    if by == ExtendBy::default() && nothing_more && !malformed {
        fields.bad(
            "extend_by",
            "more than 0s where nothing additional is asked",
        );
    }
    let made = key.zip(reservation).map(|(key, reservation)| Extend {
        key,
        reservation,
        by,
        additional,
    });
    fields.finish(tenant.zip(made))
}

/// Takes a RecordRequest, and the tenant that it is about.
pub fn record(
    message: proto::RecordRequest,
    own: Option<&TenantId>,
) -> Result<(TenantId, Record), Status> {
    let proto::RecordRequest {
        idempotency_key,
        subject: subject_message,
        action: action_message,
        amounts,
        overage_policy,
        metrics: metrics_message,
        context: context_message,
        metadata,
        reservation_id,
        tenant: named,
    } = message;
    let mut fields = Fields::default();
    let key = fields.key(&idempotency_key);
    let of = if reservation_id.is_empty() {
        let subject = subject(&mut fields, subject_message, own);
        let action = action(&mut fields, action_message).map(|(action, _)| action);
        if !named.is_empty() {
            let named = fields.take("tenant", TenantId::parse(&named));
            let tenant = subject.as_ref().map(|subject| &subject.tenant);
            if named.is_some() && tenant.is_some() && named.as_ref() != tenant {
                fields.bad("tenant", "the subject's tenant, or empty");
            }
        }
        let of = subject.zip(action);
        of.map(|of| (of.0.tenant.clone(), RecordOf::Action(Box::new(of))))
    } else {
        let tenant = fields.tenant("tenant", &named, own);
        if subject_message.is_some() {
            fields.bad("subject", "empty together with reservation_id");
        }
        if action_message.is_some() {
            fields.bad("action", "empty together with reservation_id");
        }
        let reservation = fields.reservation(&reservation_id);
        tenant.zip(reservation.map(RecordOf::Expired))
    };
    let amounts: Amounts = fields.amounts("amounts", amounts);
    let overage_policy = parse_overage_policy(&mut fields, "overage_policy", overage_policy);
    let metrics = metrics(&mut fields, metrics_message);
    let context = context(&mut fields, context_message);
    let metadata = fields.metadata("metadata", metadata);
    let made = key.zip(of).map(|(key, (tenant, of))| {
        let record = Record {
            key,
            of,
            amounts,
            overage_policy,
            metrics,
            context,
            metadata,
        };
        (tenant, record)
    });
    fields.finish(made)
}

/// How long an AwaitReservation waits where nothing is said, and at the most.
const AWAIT_DEFAULT: Duration = Duration::from_secs(25);
const AWAIT_MAX: Duration = Duration::from_secs(55);

/// Takes an AwaitReservationRequest: whose, which and how long.
pub fn await_reservation(
    message: proto::AwaitReservationRequest,
    own: Option<&TenantId>,
) -> Result<(TenantId, ReservationId, Duration), Status> {
    let proto::AwaitReservationRequest {
        reservation_id,
        timeout,
        tenant,
    } = message;
    let mut fields = Fields::default();
    let tenant = fields.tenant("tenant", &tenant, own);
    let reservation = fields.reservation(&reservation_id);
    let timeout = fields.duration("timeout", timeout).unwrap_or(AWAIT_DEFAULT);
    if timeout > AWAIT_MAX {
        fields.bad("timeout", "0s to 55s");
    }
    let made = tenant.zip(reservation);
    fields.finish(made.map(|(tenant, reservation)| (tenant, reservation, timeout)))
}

/// A filter by scope that may be empty.
pub fn scope_filter(fields: &mut Fields, text: &str) -> Option<ScopeFilter> {
    match text {
        "" => None,
        text => fields.take("scope", ScopeFilter::parse(text)),
    }
}

/// A filter by state that may be unspecified.
pub fn state_filter(fields: &mut Fields, value: i32) -> Option<StateFilter> {
    match proto::ReservationState::try_from(value) {
        Ok(proto::ReservationState::Unspecified) => None,
        Ok(proto::ReservationState::Active) => Some(StateFilter::Active),
        Ok(proto::ReservationState::Committed) => Some(StateFilter::Committed),
        Ok(proto::ReservationState::Released) => Some(StateFilter::Released),
        Ok(proto::ReservationState::Expired) => Some(StateFilter::Expired),
        Ok(proto::ReservationState::PendingApproval) => Some(StateFilter::Pending),
        Ok(proto::ReservationState::Rejected) => Some(StateFilter::Rejected),
        Err(_) => {
            fields.bad("state", "a known ReservationState");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use tonic_types::StatusExt as _;

    use super::*;

    #[test]
    fn every_bad_field_is_named_at_once() {
        let message = proto::ReserveRequest {
            idempotency_key: String::new(),
            subject: Some(proto::Subject {
                agent: "a b".into(),
                ..proto::Subject::default()
            }),
            action: None,
            estimates: vec![proto::Amount { unit: 5, value: -1 }],
            overage_policy: 9,
            ..proto::ReserveRequest::default()
        };
        let status = reserve(message, None).expect_err("a refusal");
        let details = status.get_error_details();
        let mut named: Vec<_> = details
            .bad_request()
            .map(|bad| {
                bad.field_violations
                    .iter()
                    .map(|v| v.field.as_str())
                    .collect()
            })
            .unwrap_or_default();
        named.sort_unstable();
        assert_eq!(
            named,
            [
                "action",
                "estimates[0].unit",
                "estimates[0].value",
                "idempotency_key",
                "overage_policy",
                "subject.agent",
                "subject.tenant",
            ]
        );
    }
}
