//! What `Authority` answers.

use super::{amounts, balance, duration, rules, time, unit};
use crate::domain::answer::Answer;
use crate::domain::id::{Name, TenantId};
use crate::domain::ledger::Decision;
use crate::domain::refusal::Reason;
use crate::domain::request::Context;
use crate::domain::reservation::{Reservation, SettlementKind, Status as Standing};
use crate::domain::scope::Subject;
use crate::domain::time::Timestamp;
use crate::proto;

/// Words a decision.
pub(crate) fn decision(decision: Decision) -> proto::Decision {
    match decision {
        Decision::Allow => proto::Decision::Allow,
        Decision::AllowWithCaps => proto::Decision::AllowWithCaps,
        Decision::RequireApproval => proto::Decision::RequireApproval,
        Decision::Deny => proto::Decision::Deny,
    }
}

pub(super) fn reason(reason: &Reason) -> proto::Reason {
    let shortage = reason.shortage;
    let rule = reason.rule.as_ref();
    proto::Reason {
        code: reason.code.as_str().to_owned(),
        message: reason.to_string(),
        scope: reason.scope.as_deref().unwrap_or_default().to_owned(),
        unit: reason.unit.map_or(0, |of| unit(of).into()),
        asked: shortage.map_or(0, |short| short.asked.get()),
        remaining: shortage.map_or(0, |short| short.remaining),
        held_by_others: shortage.map_or(0, |short| short.held_by_others.get()),
        rule_id: rule.map_or_else(String::new, |rule| rule.id.to_string()),
        rule_of_all_tenants: rule.is_some_and(|rule| rule.all_tenants),
        remedy: reason.remedy(),
    }
}

fn reasons(answer: &Answer) -> Vec<proto::Reason> {
    answer.verdict.reasons().iter().map(reason).collect()
}

fn balances(answer: &Answer) -> Vec<proto::Balance> {
    answer.balances.iter().map(balance).collect()
}

fn caps(answer: &Answer) -> Option<proto::Caps> {
    answer.verdict.caps().map(rules::caps_message)
}

fn explanation(answer: &Answer) -> Option<proto::Explanation> {
    answer
        .explanation
        .as_deref()
        .map(rules::explanation_message)
}

fn sequence(answer: &Answer) -> i64 {
    answer.seq.map_or(0, |seq| seq.0)
}

/// `<tenant>/<sequence>`; empty where nothing was recorded.
fn decision_id(tenant: &TenantId, answer: &Answer) -> String {
    answer
        .seq
        .map_or_else(String::new, |seq| format!("{tenant}/{seq}"))
}

/// Words the answer to Decide.
pub fn decided(tenant: &TenantId, answer: &Answer) -> proto::DecideResponse {
    proto::DecideResponse {
        decision: decision(answer.verdict.decision()).into(),
        reasons: reasons(answer),
        caps: caps(answer),
        retryable: answer.verdict.retry_after().is_some(),
        retry_after: answer.verdict.retry_after().map(duration),
        balances: balances(answer),
        ledger_sequence: sequence(answer),
        decision_id: decision_id(tenant, answer),
        explanation: explanation(answer),
    }
}

/// Words the answer to Reserve.
pub fn reserved(tenant: &TenantId, answer: &Answer) -> proto::ReserveResponse {
    let lease = answer.lease.as_ref();
    proto::ReserveResponse {
        decision: decision(answer.verdict.decision()).into(),
        reservation_id: lease.map_or_else(String::new, |l| l.reservation.to_string()),
        reasons: reasons(answer),
        caps: caps(answer),
        retryable: answer.verdict.retry_after().is_some(),
        retry_after: answer.verdict.retry_after().map(duration),
        reserved: amounts(lease.map_or(&answer.would_hold, |l| &l.reserved)),
        expire_time: lease.map(|l| time(l.expires_at)),
        remaining_ttl: lease.map(|l| duration(l.remaining)),
        balances: balances(answer),
        replayed: answer.replayed,
        ledger_sequence: sequence(answer),
        decision_id: decision_id(tenant, answer),
        explanation: explanation(answer),
        approval: answer
            .waits
            .as_ref()
            .map(|(id, approval)| proto::PendingApproval {
                approval_id: id.to_string(),
                expire_time: Some(time(approval.deadline)),
            }),
    }
}

/// Words the answer to Commit.
pub fn committed(answer: &Answer) -> proto::CommitResponse {
    proto::CommitResponse {
        charged: amounts(&answer.charged),
        released: amounts(&answer.released),
        uncovered: amounts(&answer.uncovered),
        balances: balances(answer),
        replayed: answer.replayed,
        ledger_sequence: sequence(answer),
    }
}

/// Words the answer to Release.
pub fn released(answer: &Answer) -> proto::ReleaseResponse {
    proto::ReleaseResponse {
        released: amounts(&answer.released),
        balances: balances(answer),
        replayed: answer.replayed,
        ledger_sequence: sequence(answer),
    }
}

/// Words the answer to Extend.
pub fn extended(answer: &Answer) -> proto::ExtendResponse {
    let lease = answer.lease.as_ref();
    proto::ExtendResponse {
        decision: decision(answer.verdict.decision()).into(),
        reasons: reasons(answer),
        retryable: answer.verdict.retry_after().is_some(),
        retry_after: answer.verdict.retry_after().map(duration),
        reserved: lease.map_or_else(Vec::new, |l| amounts(&l.reserved)),
        expire_time: lease.map(|l| time(l.expires_at)),
        remaining_ttl: lease.map(|l| duration(l.remaining)),
        balances: balances(answer),
        replayed: answer.replayed,
        ledger_sequence: sequence(answer),
        caps: caps(answer),
    }
}

/// Words the answer to Record.
pub fn recorded(answer: &Answer) -> proto::RecordResponse {
    proto::RecordResponse {
        charged: amounts(&answer.charged),
        uncovered: amounts(&answer.uncovered),
        balances: balances(answer),
        replayed: answer.replayed,
        ledger_sequence: sequence(answer),
    }
}

/// Words circumstances.
pub(super) fn context_message(context: &Context) -> proto::Context {
    proto::Context {
        environment: context.environment.to_string(),
        actor: context.actor.to_string(),
        reason: context.reason.to_string(),
    }
}

pub(super) fn subject_message(subject: &Subject) -> proto::Subject {
    let text = |name: &Option<Name>| {
        name.as_ref()
            .map_or_else(String::new, |name| name.display().to_owned())
    };
    let levels = subject.levels();
    proto::Subject {
        tenant: subject.tenant.to_string(),
        workspace: text(&levels.workspace),
        app: text(&levels.app),
        workflow: text(&levels.workflow),
        agent: text(&levels.agent),
        toolset: text(&levels.toolset),
        dimensions: subject
            .dimensions()
            .iter()
            .map(|(key, value)| (key.to_string(), value.display().to_owned()))
            .collect(),
    }
}

/// Words a reservation as it is now.
pub fn reservation(reservation: &Reservation, now: Timestamp) -> proto::Reservation {
    let settlement = match &reservation.status {
        Standing::Pending | Standing::Active => None,
        Standing::Settled(settlement) => Some(settlement),
    };
    let state = match settlement.map(|settlement| settlement.kind) {
        Some(SettlementKind::Committed) => proto::ReservationState::Committed,
        Some(SettlementKind::Released) => proto::ReservationState::Released,
        Some(SettlementKind::Expired) => proto::ReservationState::Expired,
        Some(SettlementKind::Rejected) => proto::ReservationState::Rejected,
        None if reservation.is_overdue(now) => proto::ReservationState::Expired,
        None if reservation.is_pending() => proto::ReservationState::PendingApproval,
        None => proto::ReservationState::Active,
    };
    proto::Reservation {
        reservation_id: reservation.id.to_string(),
        state: state.into(),
        subject: Some(subject_message(&reservation.subject)),
        action: Some(proto::Action {
            name: reservation.action.name.to_string(),
            kind: reservation
                .action
                .kind
                .as_deref()
                .unwrap_or_default()
                .to_owned(),
            arguments: None,
        }),
        reserved: amounts(&reservation.reserved()),
        committed: settlement.map_or_else(Vec::new, |s| amounts(&s.charged)),
        create_time: Some(time(reservation.created_at)),
        expire_time: Some(time(reservation.expires_at)),
        grace: Some(duration(reservation.grace)),
        settle_time: settlement.map(|settlement| time(settlement.at)),
        overage_policy: super::overage_policy(reservation.overage_policy).into(),
        scope: reservation.subject.scope_text(),
        reserve_sequence: reservation.reserve_seq.0,
        settle_sequence: settlement.map_or(0, |settlement| settlement.seq.0),
        metadata: reservation
            .metadata
            .iter()
            .map(|(key, value)| (key.to_string(), value.to_string()))
            .collect(),
    }
}
