//! What the services answer, in the protocol's words.

use std::collections::BTreeMap;

use super::kept::{Given, KEY, TAGS};
use super::problem::Denial;
use super::strict::given;
use super::translate::{amount_of, known_unit, levels, millis_of, only_amount};
use super::wire;
use crate::proto;

/// Every scope of a subject from the root down, and the scopes of balances that are none of
/// them: with dimensions, or of fewer levels.
pub(super) fn affected_scopes<'a>(
    subject: &proto::Subject,
    of_balances: impl IntoIterator<Item = &'a String>,
) -> (Vec<String>, String) {
    let mut scopes: Vec<String> = Vec::new();
    for (level, name) in levels(subject) {
        let segment = format!("{level}:{}", name.to_ascii_lowercase());
        scopes.push(match scopes.last() {
            None => segment,
            Some(parent) => format!("{parent}/{segment}"),
        });
    }
    let path = scopes.last().cloned().unwrap_or_default();
    for scope in of_balances {
        if !scopes.contains(scope) {
            scopes.push(scope.clone());
        }
    }
    (scopes, path)
}

/// The balances in some units, the protocol's own.
pub(super) fn balances(
    balances: &[proto::Balance],
    shown: impl Fn(wire::Unit) -> bool,
) -> Vec<wire::Balance> {
    balances
        .iter()
        .filter_map(|balance| {
            let unit = known_unit(balance.unit).filter(|unit| shown(*unit))?;
            Some(self::balance(balance, unit))
        })
        .collect()
}

fn balance(balance: &proto::Balance, unit: wire::Unit) -> wire::Balance {
    let of = |amount| wire::Amount { unit, amount };
    let used = [balance.reserved, balance.spent, balance.debt]
        .into_iter()
        .fold(0, i64::saturating_add);
    let leaf = balance.scope.rsplit('/').next().unwrap_or_default();
    wire::Balance {
        scope: leaf.to_owned(),
        scope_path: balance.scope.clone(),
        // Without a limit: as much as the protocol can say.
        remaining: of(balance.remaining.unwrap_or(i64::MAX.saturating_sub(used))),
        reserved: of(balance.reserved),
        spent: of(balance.spent),
        allocated: of(balance.allocated.unwrap_or(i64::MAX)),
        debt: (balance.debt > 0).then(|| of(balance.debt)),
        overdraft_limit: (balance.overdraft_limit > 0).then(|| of(balance.overdraft_limit)),
        is_over_limit: balance.over_limit.then_some(true),
    }
}

pub(super) fn caps(caps: Option<proto::Caps>) -> Option<wire::Caps> {
    let caps = caps?;
    // The protocol's numbers have 32 bits.
    let number = |number: i64| number.min(i32::MAX.into());
    let tools = |tools: Vec<String>| Some(tools).filter(|tools| !tools.is_empty());
    Some(wire::Caps {
        max_tokens: caps.max_tokens.map(number),
        max_steps_remaining: caps.max_steps_remaining.map(number),
        tool_allowlist: tools(caps.tool_allowlist),
        tool_denylist: tools(caps.tool_denylist),
        cooldown_ms: caps.cooldown_ms.map(number),
    })
}

/// What the protocol calls a decision; nothing where it lets nothing happen.
pub(super) fn allowed(decision: proto::Decision) -> Option<wire::Decision> {
    match decision {
        proto::Decision::Allow => Some(wire::Decision::Allow),
        proto::Decision::AllowWithCaps => Some(wire::Decision::AllowWithCaps),
        proto::Decision::RequireApproval | proto::Decision::Deny | proto::Decision::Unspecified => {
            None
        }
    }
}

/// Why Decide lets nothing happen.
pub(super) fn denial_of_decide(answer: &proto::DecideResponse, scope_path: &str) -> Denial {
    Denial {
        reasons: answer.reasons.clone(),
        approval: None,
        no_budget: answer.balances.is_empty(),
        scope_path: scope_path.to_owned(),
        retryable: answer.retryable,
        retry_after: answer.retry_after.and_then(|after| after.try_into().ok()),
        decision_id: answer.decision_id.clone(),
        sequence: answer.ledger_sequence,
        replayed: false,
    }
}

/// Why Reserve lets nothing happen.
pub(super) fn denial_of_reserve(answer: &proto::ReserveResponse, scope_path: &str) -> Denial {
    Denial {
        reasons: answer.reasons.clone(),
        approval: answer.approval.clone(),
        no_budget: answer.balances.is_empty(),
        scope_path: scope_path.to_owned(),
        retryable: answer.retryable,
        retry_after: answer.retry_after.and_then(|after| after.try_into().ok()),
        decision_id: answer.decision_id.clone(),
        sequence: answer.ledger_sequence,
        replayed: answer.replayed,
    }
}

/// A reservation that holds or held in `scopes`; nothing for one that the protocol has no
/// word for: it waits for a person.
pub(super) fn reservation(
    found: proto::Reservation,
    scopes: &[String],
) -> Option<wire::Reservation> {
    let status = match found.state() {
        proto::ReservationState::Active => wire::ReservationStatus::Active,
        proto::ReservationState::Committed => wire::ReservationStatus::Committed,
        // A person refused it; what it held was given back.
        proto::ReservationState::Released | proto::ReservationState::Rejected => {
            wire::ReservationStatus::Released
        }
        proto::ReservationState::Expired => wire::ReservationStatus::Expired,
        proto::ReservationState::PendingApproval | proto::ReservationState::Unspecified => {
            return None;
        }
    };
    let finalized = matches!(
        status,
        wire::ReservationStatus::Committed | wire::ReservationStatus::Released
    );
    let subject = found.subject.unwrap_or_default();
    let action = found.action.unwrap_or_default();
    let (affected_scopes, scope_path) = affected_scopes(&subject, scopes);
    let reserved = only_amount(&found.reserved).unwrap_or(wire::Amount {
        unit: wire::Unit::Credits,
        amount: 0,
    });
    let mut metadata = found.metadata;
    let tags = metadata.remove(TAGS);
    let tags = tags.and_then(|tags| serde_json::from_str(&tags).ok());
    let idempotency_key = metadata.remove(KEY);
    let dimensions = Given::take(&mut metadata);
    let metadata: serde_json::Map<_, _> = metadata
        .into_iter()
        .map(|(name, text)| (name, given(&text)))
        .collect();
    let committed = status == wire::ReservationStatus::Committed;
    Some(wire::Reservation {
        reservation_id: found.reservation_id,
        status,
        idempotency_key,
        subject: subject_of(subject, dimensions),
        action: wire::Action {
            kind: action.kind,
            name: action.name,
            tags,
            policy_keys: None,
        },
        reserved,
        created_at_ms: found.create_time.as_ref().map_or(0, millis_of),
        expires_at_ms: found.expire_time.as_ref().map_or(0, millis_of),
        scope_path,
        affected_scopes,
        committed: committed.then(|| amount_of(&found.committed, reserved.unit)),
        finalized_at_ms: found
            .settle_time
            .as_ref()
            .filter(|_| finalized)
            .map(millis_of),
        metadata: Some(metadata).filter(|metadata| !metadata.is_empty()),
    })
}

/// `given` are its dimensions where they are kept as they were given.
fn subject_of(subject: proto::Subject, given: Option<BTreeMap<String, String>>) -> wire::Subject {
    let name = |name: String| Some(name).filter(|name| !name.is_empty());
    let dimensions = given.unwrap_or_else(|| subject.dimensions.into_iter().collect());
    wire::Subject {
        tenant: name(subject.tenant),
        workspace: name(subject.workspace),
        app: name(subject.app),
        workflow: name(subject.workflow),
        agent: name(subject.agent),
        toolset: name(subject.toolset),
        dimensions: Some(dimensions).filter(|dimensions| !dimensions.is_empty()),
    }
}
