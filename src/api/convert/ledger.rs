//! The messages of `Ledger`.

use super::answers::{decision as decision_message, reason};
use super::time;
use crate::api::fields::Fields;
use crate::domain::id::TenantId;
use crate::domain::ledger::{Body, Decision, EntryKind};
use crate::domain::query::StoredEntry;
use crate::domain::replay::Redecided;
use crate::domain::verify::Report;
use crate::proto;

fn kind(kind: EntryKind) -> proto::EntryKind {
    match kind {
        EntryKind::Decide => proto::EntryKind::Decide,
        EntryKind::Reserve => proto::EntryKind::Reserve,
        EntryKind::Commit => proto::EntryKind::Commit,
        EntryKind::Release => proto::EntryKind::Release,
        EntryKind::Extend => proto::EntryKind::Extend,
        EntryKind::Expire => proto::EntryKind::Expire,
        EntryKind::Record => proto::EntryKind::Record,
        EntryKind::Fund => proto::EntryKind::Fund,
        EntryKind::BalanceOpened => proto::EntryKind::BalanceOpened,
        EntryKind::CreditExpired => proto::EntryKind::CreditExpired,
        EntryKind::Provision => proto::EntryKind::Provision,
        EntryKind::ApiKeyCreated => proto::EntryKind::ApiKeyCreated,
        EntryKind::ApiKeyRevoked => proto::EntryKind::ApiKeyRevoked,
        EntryKind::Incident => proto::EntryKind::Incident,
        EntryKind::Resolve => proto::EntryKind::Resolve,
        EntryKind::Subscription => proto::EntryKind::Subscription,
    }
}

/// Takes kinds to filter by.
pub fn kinds(fields: &mut Fields, values: &[i32]) -> Vec<EntryKind> {
    let mut kinds = Vec::new();
    for (at, value) in values.iter().enumerate() {
        let parsed = match proto::EntryKind::try_from(*value) {
            Ok(proto::EntryKind::Decide) => EntryKind::Decide,
            Ok(proto::EntryKind::Reserve) => EntryKind::Reserve,
            Ok(proto::EntryKind::Commit) => EntryKind::Commit,
            Ok(proto::EntryKind::Release) => EntryKind::Release,
            Ok(proto::EntryKind::Extend) => EntryKind::Extend,
            Ok(proto::EntryKind::Expire) => EntryKind::Expire,
            Ok(proto::EntryKind::Record) => EntryKind::Record,
            Ok(proto::EntryKind::Fund) => EntryKind::Fund,
            Ok(proto::EntryKind::BalanceOpened) => EntryKind::BalanceOpened,
            Ok(proto::EntryKind::CreditExpired) => EntryKind::CreditExpired,
            Ok(proto::EntryKind::Provision) => EntryKind::Provision,
            Ok(proto::EntryKind::ApiKeyCreated) => EntryKind::ApiKeyCreated,
            Ok(proto::EntryKind::ApiKeyRevoked) => EntryKind::ApiKeyRevoked,
            Ok(proto::EntryKind::Incident) => EntryKind::Incident,
            Ok(proto::EntryKind::Resolve) => EntryKind::Resolve,
            Ok(proto::EntryKind::Subscription) => EntryKind::Subscription,
            Ok(proto::EntryKind::Unspecified) | Err(_) => {
                fields.bad(format!("kinds[{at}]"), "a known EntryKind");
                continue;
            }
        };
        kinds.push(parsed);
    }
    kinds
}

/// Takes a decision to filter by; nothing where it is unspecified.
pub fn decision(fields: &mut Fields, value: i32) -> Option<Decision> {
    match proto::Decision::try_from(value) {
        Ok(proto::Decision::Unspecified) => None,
        Ok(proto::Decision::Allow) => Some(Decision::Allow),
        Ok(proto::Decision::AllowWithCaps) => Some(Decision::AllowWithCaps),
        Ok(proto::Decision::RequireApproval) => Some(Decision::RequireApproval),
        Ok(proto::Decision::Deny) => Some(Decision::Deny),
        Err(_) => {
            fields.bad("decision", "a known Decision");
            None
        }
    }
}

/// Words an entry.
pub fn entry(tenant: &TenantId, entry: StoredEntry) -> proto::Entry {
    let StoredEntry {
        seq,
        time: at,
        kind: of,
        decision,
        text,
        prev_hash,
        hash,
    } = entry;
    proto::Entry {
        tenant: tenant.to_string(),
        sequence: seq.0,
        time: Some(time(at)),
        kind: kind(of).into(),
        decision: decision.map_or(0, |decision| decision_message(decision).into()),
        body: text,
        prev_hash: prev_hash.0.to_vec(),
        hash: hash.0.to_vec(),
    }
}

/// Words a decision that would have been another one.
pub fn changed(body: &Body, redecided: &Redecided) -> proto::ChangedDecision {
    let subject = body.subject.as_ref();
    let action = body.action.as_ref();
    proto::ChangedDecision {
        sequence: body.seq.0,
        time: Some(time(body.time)),
        scope: subject.map_or_else(String::new, |subject| subject.scope_text()),
        action: action.map_or_else(String::new, |action| action.name.to_string()),
        was: body.decision.map_or(0, |was| decision_message(was).into()),
        was_reasons: body.reasons.iter().map(reason).collect(),
        becomes: decision_message(redecided.verdict.decision()).into(),
        becomes_reasons: redecided.verdict.reasons().iter().map(reason).collect(),
        caps_differ: redecided.caps_differ(body),
    }
}

/// Words a verification.
pub fn report(report: Report) -> proto::VerifyLedgerResponse {
    let Report {
        entries,
        archived,
        last,
        problem,
    } = report;
    let first_bad = problem.as_ref().and_then(|problem| problem.seq);
    proto::VerifyLedgerResponse {
        intact: problem.is_none(),
        entries,
        archived,
        last_sequence: last.seq.0,
        last_hash: last.hash.0.to_vec(),
        first_bad_sequence: first_bad.map_or(0, |seq| seq.0),
        problem: problem.map_or_else(String::new, |problem| problem.text),
    }
}
