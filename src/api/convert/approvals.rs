//! The messages of `Approvals`.

use tonic::Status;

use super::answers::{context_message, reason, subject_message};
use super::rules::explanation_message;
use super::{amounts, time};
use crate::api::fields::Fields;
use crate::domain::amount::Unit;
use crate::domain::approve::{ApprovalRecord, ApprovalState};
use crate::domain::id::{ReservationId, TenantId};
use crate::domain::ledger::Body;
use crate::domain::request::Resolve;
use crate::domain::time::Timestamp;
use crate::proto;

/// A state to list by; PENDING where it is unspecified.
pub fn state(fields: &mut Fields, value: i32) -> ApprovalState {
    match proto::ApprovalState::try_from(value) {
        Ok(proto::ApprovalState::Unspecified | proto::ApprovalState::Pending) => {
            ApprovalState::Pending
        }
        Ok(proto::ApprovalState::Approved) => ApprovalState::Approved,
        Ok(proto::ApprovalState::Rejected) => ApprovalState::Rejected,
        Ok(proto::ApprovalState::Expired) => ApprovalState::Expired,
        Ok(proto::ApprovalState::Withdrawn) => ApprovalState::Withdrawn,
        Err(_) => {
            fields.bad("state", "a known ApprovalState");
            ApprovalState::Pending
        }
    }
}

/// What names an approval.
pub fn named(
    approval_id: &str,
    tenant: &str,
    own: Option<&TenantId>,
) -> Result<(TenantId, ReservationId), Status> {
    let mut fields = Fields::default();
    let tenant = fields.tenant("tenant", tenant, own);
    let id = fields.take("approval_id", ReservationId::parse(approval_id));
    fields.finish(tenant.zip(id))
}

/// Takes a ResolveApprovalRequest, and the tenant that it is about.
pub fn resolve(
    message: proto::ResolveApprovalRequest,
    own: Option<&TenantId>,
    groups: &[Box<str>],
) -> Result<(TenantId, Resolve), Status> {
    let proto::ResolveApprovalRequest {
        idempotency_key,
        approval_id,
        resolution,
        approver,
        note,
        tenant,
    } = message;
    let mut fields = Fields::default();
    let tenant = fields.tenant("tenant", &tenant, own);
    let key = fields.key(&idempotency_key);
    let reservation = fields.take("approval_id", ReservationId::parse(&approval_id));
    let approve = match resolution {
        Some(proto::resolve_approval_request::Resolution::Approve(true)) => Some(true),
        Some(proto::resolve_approval_request::Resolution::Reject(true)) => Some(false),
        // False could be meant either way.
        Some(_) | None => {
            fields.bad("approve", "true, or reject: true instead");
            None
        }
    };
    let approver = fields.text("approver", approver, 256);
    let note = fields.text("note", note, 1_024);
    let made = key.zip(reservation).zip(approve);
    let made = made.map(|((key, reservation), approve)| Resolve {
        key,
        reservation,
        approve,
        groups: groups.to_vec(),
        approver,
        note,
    });
    fields.finish(tenant.zip(made))
}

fn state_message(state: ApprovalState) -> proto::ApprovalState {
    match state {
        ApprovalState::Pending => proto::ApprovalState::Pending,
        ApprovalState::Approved => proto::ApprovalState::Approved,
        ApprovalState::Rejected => proto::ApprovalState::Rejected,
        ApprovalState::Expired => proto::ApprovalState::Expired,
        ApprovalState::Withdrawn => proto::ApprovalState::Withdrawn,
    }
}

/// Words an approval; `asked` is the entry that asked, which may be archived.
pub fn approval(
    tenant: &TenantId,
    record: &ApprovalRecord,
    asked: Option<&Body>,
    now: Timestamp,
) -> proto::Approval {
    let resolution = record.resolution.as_ref();
    let action = asked.and_then(|body| body.action.as_deref());
    let kept = asked.and_then(|body| body.arguments.as_ref());
    let digest = action.and_then(|action| action.arguments_sha256);
    // Calls are the server's own count: nobody decides on them.
    let amounts_of = asked.map(|body| {
        let shown = body
            .reserved
            .iter()
            .filter(|(unit, _)| *unit != Unit::Calls);
        shown.collect()
    });
    proto::Approval {
        approval_id: record.reservation.to_string(),
        tenant: tenant.to_string(),
        state: state_message(record.state(now)).into(),
        create_time: Some(time(record.requested_at)),
        expire_time: Some(time(record.approval.deadline)),
        approvers: record
            .approval
            .approvers
            .iter()
            .map(|groups| proto::ApproverSet {
                groups: groups.iter().map(ToString::to_string).collect(),
            })
            .collect(),
        subject: asked
            .and_then(|body| body.subject.as_deref())
            .map(subject_message),
        action: action.map(|action| proto::Action {
            name: action.name.to_string(),
            kind: action.kind.as_deref().unwrap_or_default().to_owned(),
            arguments: kept.and_then(|kept| serde_json::from_value(kept.value.clone()).ok()),
        }),
        arguments_incomplete: digest.is_some() && !kept.is_some_and(|kept| kept.complete),
        arguments_sha256: digest.map_or_else(String::new, |digest| digest.to_string()),
        context: asked.map(|body| context_message(&body.context)),
        amounts: amounts_of.map_or_else(Vec::new, |of| amounts(&of)),
        reasons: asked.map_or_else(Vec::new, |body| body.reasons.iter().map(reason).collect()),
        explanation: asked
            .and_then(|body| body.explanation.as_deref())
            .map(explanation_message),
        requested_by: record
            .approval
            .requested_by
            .as_ref()
            .map_or_else(String::new, ToString::to_string),
        reserve_sequence: record.reserve_seq.0,
        resolve_time: resolution.map(|resolution| time(resolution.at)),
        resolved_by: resolution
            .and_then(|resolution| resolution.by.as_ref())
            .map_or_else(String::new, ToString::to_string),
        approver: resolution.map_or_else(String::new, |of| of.approver.to_string()),
        note: resolution.map_or_else(String::new, |of| of.note.to_string()),
        resolve_sequence: resolution.map_or(0, |resolution| resolution.seq.0),
    }
}
