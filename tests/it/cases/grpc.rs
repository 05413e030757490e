//! A step by gRPC.

use std::time::Duration;

use remit::proto;
use tonic::Status;
use tonic_types::StatusExt as _;

use super::table::{Action, By, Caps, Request, Row, Subject, Unit};
use super::{Play, Seen};

/// Sends a step's request and words the answer.
pub(super) async fn ask(
    play: &Play,
    by: By,
    request: &Request<'_>,
    key: &str,
) -> Result<Seen, String> {
    let client = play.world.server.client(play.api_key(by));
    // Only an operator must name it.
    let tenant = match by {
        By::Operator => play.tenant.clone(),
        _ => String::new(),
    };
    let (mut authority, mut provisioning) = (client.authority, client.provisioning);
    let idempotency_key = key.to_owned();
    let seen = match request {
        Request::Reserve(reserve) => {
            let message = proto::ReserveRequest {
                idempotency_key,
                subject: Some(subject(play, &reserve.subject)),
                action: Some(action(&reserve.action)),
                estimates: vec![amount(reserve.unit, reserve.amount)],
                ttl: reserve.ttl_ms.map(millis),
                grace: reserve.grace_period_ms.map(millis),
                overage_policy: reserve
                    .overage_policy
                    .map_or(0, |policy| policy.proto().into()),
                dry_run: reserve.dry_run,
                ..proto::ReserveRequest::default()
            };
            let answer = authority
                .reserve(message)
                .await
                .map(tonic::Response::into_inner);
            answer.map(|answer| reserved(&answer, reserve.unit))
        }
        Request::Decide(decide) => {
            let message = proto::DecideRequest {
                idempotency_key,
                subject: Some(subject(play, &decide.subject)),
                action: Some(action(&decide.action)),
                estimates: vec![amount(decide.unit, decide.amount)],
                ..proto::DecideRequest::default()
            };
            let answer = authority
                .decide(message)
                .await
                .map(tonic::Response::into_inner);
            answer.map(|answer| Seen {
                said: verdict(answer.decision(), &answer.reasons),
                scope: scope(&answer.reasons),
                caps: answer.caps.map(caps),
                ..Seen::default()
            })
        }
        Request::Commit(commit) => {
            let message = proto::CommitRequest {
                idempotency_key,
                reservation_id: play.reservation(&commit.of)?,
                actual: vec![amount(commit.unit, commit.amount)],
                tenant,
                ..proto::CommitRequest::default()
            };
            let answer = authority
                .commit(message)
                .await
                .map(tonic::Response::into_inner);
            answer.map(|answer| Seen {
                said: "COMMITTED".into(),
                charged: of_unit(&answer.charged, commit.unit),
                uncovered: of_unit(&answer.uncovered, commit.unit),
                released: of_unit(&answer.released, commit.unit),
                balances: rows(&answer.balances),
                replayed: answer.replayed,
                ..Seen::default()
            })
        }
        Request::Release(release) => {
            let message = proto::ReleaseRequest {
                idempotency_key,
                reservation_id: play.reservation(&release.of)?,
                reason: release.reason.clone().unwrap_or_default(),
                tenant,
            };
            let answer = authority
                .release(message)
                .await
                .map(tonic::Response::into_inner);
            answer.map(|answer| Seen {
                said: "RELEASED".into(),
                released: first(&answer.released),
                balances: rows(&answer.balances),
                replayed: answer.replayed,
                ..Seen::default()
            })
        }
        Request::Extend(extend) => {
            let message = proto::ExtendRequest {
                idempotency_key,
                reservation_id: play.reservation(&extend.of)?,
                extend_by: Some(millis(extend.by_ms)),
                tenant,
                ..proto::ExtendRequest::default()
            };
            let answer = authority
                .extend(message)
                .await
                .map(tonic::Response::into_inner);
            answer.map(|answer| Seen {
                said: match answer.decision() {
                    proto::Decision::Allow => "ACTIVE".into(),
                    decision => verdict(decision, &answer.reasons),
                },
                ttl_ms: answer.remaining_ttl.map(in_millis),
                expires_at_ms: answer.expire_time.map(at_millis),
                balances: rows(&answer.balances),
                replayed: answer.replayed,
                ..Seen::default()
            })
        }
        Request::Event(event) => {
            let message = proto::RecordRequest {
                idempotency_key,
                subject: Some(subject(play, &event.subject)),
                action: Some(action(&event.action)),
                amounts: vec![amount(event.unit, event.amount)],
                overage_policy: event
                    .overage_policy
                    .map_or(0, |policy| policy.proto().into()),
                ..proto::RecordRequest::default()
            };
            let answer = authority
                .record(message)
                .await
                .map(tonic::Response::into_inner);
            answer.map(|answer| Seen {
                said: "APPLIED".into(),
                charged: of_unit(&answer.charged, event.unit),
                uncovered: of_unit(&answer.uncovered, event.unit),
                balances: rows(&answer.balances),
                replayed: answer.replayed,
                ..Seen::default()
            })
        }
        Request::Get(get) => {
            let message = proto::GetReservationRequest {
                reservation_id: play.reservation(&get.of)?,
                tenant,
            };
            let answer = authority.get_reservation(message).await;
            let answer = answer.map(|answer| answer.into_inner().reservation.unwrap_or_default());
            answer.map(|answer| Seen {
                said: answer
                    .state()
                    .as_str_name()
                    .replace("RESERVATION_STATE_", ""),
                charged: first(&answer.committed),
                ..Seen::default()
            })
        }
        Request::Fund(fund) => {
            let operation = format!("FUND_OPERATION_{}", fund.operation);
            let operation = proto::FundOperation::from_str_name(&operation);
            let operation = operation.ok_or("an operation")?;
            let (amount, allocated) = match operation {
                proto::FundOperation::ResetSpent => (fund.spent.unwrap_or(0), Some(fund.amount)),
                _ => (fund.amount, None),
            };
            let message = proto::FundBudgetRequest {
                idempotency_key,
                scope: play.named(&fund.scope),
                unit: fund.unit.proto().into(),
                operation: operation.into(),
                amount,
                allocated,
                credit_surplus: operation == proto::FundOperation::RepayDebt,
                ..proto::FundBudgetRequest::default()
            };
            let answer = provisioning.fund_budget(message).await;
            answer.map(|answer| {
                let answer = answer.into_inner();
                let balance = answer.balance.unwrap_or_default();
                Seen {
                    said: "FUNDED".into(),
                    allocated: balance.allocated,
                    remaining: balance.remaining,
                    balances: rows(&[balance]),
                    replayed: answer.replayed,
                    ..Seen::default()
                }
            })
        }
        Request::Post(_)
        | Request::Provision(_)
        | Request::Resolve(_)
        | Request::Wait(_)
        | Request::Balances(_) => {
            return Err("this is no request by gRPC".into());
        }
    };
    let seen = seen.or_else(|status| refused(&status))?;
    let asked = match request {
        Request::Commit(commit) => commit.amount,
        Request::Event(event) => event.amount,
        _ => return Ok(seen),
    };
    let total = seen
        .charged
        .map(|charged| charged + seen.uncovered.unwrap_or(0));
    match total {
        Some(total) if total != asked => Err(format!("{total} of {asked} is accounted for")),
        _ => Ok(seen),
    }
}

fn reserved(answer: &proto::ReserveResponse, unit: Unit) -> Seen {
    let waits = answer
        .approval
        .as_ref()
        .map(|approval| approval.approval_id.clone());
    let held = Some(answer.reservation_id.clone()).filter(|id| !id.is_empty());
    Seen {
        said: verdict(answer.decision(), &answer.reasons),
        scope: scope(&answer.reasons),
        reservation: held.or(waits),
        reserved: of_unit(&answer.reserved, unit),
        ttl_ms: answer.remaining_ttl.map(in_millis),
        expires_at_ms: answer.expire_time.map(at_millis),
        caps: answer.caps.clone().map(caps),
        balances: rows(&answer.balances),
        replayed: answer.replayed,
        ..Seen::default()
    }
}

fn refused(status: &Status) -> Result<Seen, String> {
    let details = status.get_error_details();
    let info = details.error_info().ok_or_else(|| format!("{status}"))?;
    Ok(Seen {
        said: format!("refused {}", info.reason),
        scope: info.metadata.get("scope").cloned(),
        ..Seen::default()
    })
}

fn verdict(decision: proto::Decision, reasons: &[proto::Reason]) -> String {
    let decision = decision.as_str_name().replace("DECISION_", "");
    match reasons.first() {
        Some(reason) => format!("{decision} {}", reason.code),
        None => decision,
    }
}

fn scope(reasons: &[proto::Reason]) -> Option<String> {
    let scope = reasons.first().map(|reason| reason.scope.clone());
    scope.filter(|scope| !scope.is_empty())
}

fn subject(play: &Play, subject: &Subject) -> proto::Subject {
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    proto::Subject {
        tenant: play.named(&text(&subject.tenant)),
        workspace: text(&subject.workspace),
        app: text(&subject.app),
        workflow: text(&subject.workflow),
        agent: text(&subject.agent),
        toolset: text(&subject.toolset),
        dimensions: subject.dimensions.clone().into_iter().collect(),
    }
}

fn action(action: &Action) -> proto::Action {
    proto::Action {
        name: action.name.clone(),
        kind: action.kind.clone(),
        ..proto::Action::default()
    }
}

fn amount(unit: Unit, value: i64) -> proto::Amount {
    proto::Amount {
        unit: unit.proto().into(),
        value,
    }
}

fn of_unit(amounts: &[proto::Amount], unit: Unit) -> Option<i64> {
    let mut amounts = amounts.iter();
    let found = amounts.find(|amount| amount.unit() == unit.proto());
    found.map(|amount| amount.value)
}

/// What a caller asked for, beside the calls that the server counts.
fn first(amounts: &[proto::Amount]) -> Option<i64> {
    let mut amounts = amounts.iter();
    let found = amounts.find(|amount| amount.unit() != proto::Unit::Calls);
    found.map(|amount| amount.value)
}

fn caps(caps: proto::Caps) -> Caps {
    let list = |list: Vec<String>| (!list.is_empty()).then_some(list);
    Caps {
        max_tokens: caps.max_tokens,
        max_steps_remaining: caps.max_steps_remaining,
        tool_allowlist: list(caps.tool_allowlist),
        tool_denylist: list(caps.tool_denylist),
        cooldown_ms: caps.cooldown_ms,
    }
}

fn rows(balances: &[proto::Balance]) -> Vec<Row> {
    balances.iter().filter_map(row).collect()
}

/// Nothing where the budget has no limit.
pub(super) fn row(balance: &proto::Balance) -> Option<Row> {
    Some(Row {
        scope: balance.scope.clone(),
        unit: Unit::of_proto(balance.unit())?,
        remaining: balance.remaining?,
        reserved: balance.reserved,
        spent: balance.spent,
        debt: balance.debt,
        over_limit: balance.over_limit,
    })
}

fn millis(ms: u64) -> pbjson_types::Duration {
    Duration::from_millis(ms).into()
}

fn in_millis(duration: pbjson_types::Duration) -> i64 {
    duration.seconds * 1_000 + i64::from(duration.nanos) / 1_000_000
}

fn at_millis(time: pbjson_types::Timestamp) -> i64 {
    time.seconds * 1_000 + i64::from(time.nanos) / 1_000_000
}
