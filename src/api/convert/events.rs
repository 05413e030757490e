//! The messages of `Events`.

use tonic::Status;

use super::time;
use crate::api::fields::Fields;
use crate::domain::event::EventType;
use crate::domain::id::{Name, Sequence, TenantId};
use crate::domain::subscription::{Subscription, Target};
use crate::domain::time::Timestamp;
use crate::proto;
use crate::webhooks::Reach;

fn parse_type(value: i32) -> Option<EventType> {
    match proto::EventType::try_from(value) {
        Ok(proto::EventType::ApprovalRequested) => Some(EventType::ApprovalRequested),
        Ok(proto::EventType::ApprovalResolved) => Some(EventType::ApprovalResolved),
        Ok(proto::EventType::ApprovalExpired) => Some(EventType::ApprovalExpired),
        Ok(proto::EventType::ActionDenied) => Some(EventType::ActionDenied),
        Ok(proto::EventType::IncidentRaised) => Some(EventType::IncidentRaised),
        Ok(proto::EventType::FreezeChanged) => Some(EventType::FreezeChanged),
        Ok(proto::EventType::BudgetThreshold) => Some(EventType::BudgetThreshold),
        Ok(proto::EventType::BudgetExhausted) => Some(EventType::BudgetExhausted),
        Ok(proto::EventType::Unspecified) | Err(_) => None,
    }
}

impl From<EventType> for proto::EventType {
    fn from(of: EventType) -> Self {
        match of {
            EventType::ApprovalRequested => Self::ApprovalRequested,
            EventType::ApprovalResolved => Self::ApprovalResolved,
            EventType::ApprovalExpired => Self::ApprovalExpired,
            EventType::ActionDenied => Self::ActionDenied,
            EventType::IncidentRaised => Self::IncidentRaised,
            EventType::FreezeChanged => Self::FreezeChanged,
            EventType::BudgetThreshold => Self::BudgetThreshold,
            EventType::BudgetExhausted => Self::BudgetExhausted,
        }
    }
}

/// Takes a CreateSubscriptionRequest.
pub fn create(
    message: proto::CreateSubscriptionRequest,
    own: Option<&TenantId>,
    reach: Reach,
    now: Timestamp,
) -> Result<Subscription, Status> {
    let mut fields = Fields::default();
    let Some(proto::Subscription {
        subscription_id,
        tenant,
        url,
        event_types,
        create_time: _,
        delivered_sequence: _,
        retrying: _,
        dead: _,
        last_error: _,
    }) = message.subscription
    else {
        fields.bad("subscription", "given");
        return fields.finish(None);
    };
    let tenant = fields.tenant("subscription.tenant", &tenant, own);
    let id = fields.take(
        "subscription.subscription_id",
        Name::parse(&subscription_id),
    );
    let target = fields.take("subscription.url", Target::parse(&url, reach.private));
    if target.as_ref().is_some_and(|target| !reach.allows(target)) {
        fields.bad("subscription.url", "an address outside of private networks");
    }
    let mut types = Vec::new();
    for (at, value) in event_types.iter().enumerate() {
        match parse_type(*value) {
            Some(of) => types.push(of),
            None => fields.bad(
                format!("subscription.event_types[{at}]"),
                "a known EventType",
            ),
        }
    }
    if event_types.is_empty() {
        fields.bad("subscription.event_types", "at least one EventType");
    }
    types.sort_unstable();
    types.dedup();
    let made = tenant.zip(id).zip(target);
    fields.finish(made.map(|((tenant, id), target)| Subscription {
        tenant,
        id,
        target,
        types,
        created_at: now,
        cursor: Sequence(0),
        retrying: 0,
        dead: 0,
        last_error: None,
    }))
}

/// What names a subscription.
pub fn named(id: &str, tenant: &str, own: Option<&TenantId>) -> Result<(TenantId, Name), Status> {
    let mut fields = Fields::default();
    let tenant = fields.tenant("tenant", tenant, own);
    let id = fields.take("subscription_id", Name::parse(id));
    fields.finish(tenant.zip(id))
}

/// Words a subscription.
pub fn subscription(subscription: &Subscription) -> proto::Subscription {
    proto::Subscription {
        subscription_id: subscription.id.display().to_owned(),
        tenant: subscription.tenant.to_string(),
        url: subscription.target.as_str().to_owned(),
        event_types: subscription
            .types
            .iter()
            .map(|of| proto::EventType::from(*of).into())
            .collect(),
        create_time: Some(time(subscription.created_at)),
        delivered_sequence: subscription.cursor.0,
        retrying: subscription.retrying,
        dead: subscription.dead,
        last_error: subscription
            .last_error
            .as_deref()
            .unwrap_or_default()
            .to_owned(),
    }
}
