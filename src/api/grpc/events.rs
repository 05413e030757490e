//! `remit.v1.Events`

use tonic::{Request, Response, Status};

use super::Services;
use crate::api::auth::Caller;
use crate::api::convert::events as words;
use crate::api::fields::Fields;
use crate::api::status;
use crate::domain::id::Sequence;
use crate::domain::permission::Permission;
use crate::proto;
use crate::proto::events_server::Events;

#[tonic::async_trait]
impl Events for Services {
    async fn create_subscription(
        &self,
        request: Request<proto::CreateSubscriptionRequest>,
    ) -> Result<Response<proto::CreateSubscriptionResponse>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::Provision).await?;
        // What it is told is the ledger.
        if !caller.permissions().contains(Permission::Audit) {
            let message = "a subscription tells what stands in the ledger: the API key lacks PERMISSION_AUDIT";
            return Err(status::permission_missing(Permission::Audit, message));
        }
        let now = self.engine.now();
        let asked = words::create(request.into_inner(), caller.tenant(), self.reach, now)?;
        caller.may_see(&asked.tenant)?;
        let mut random = [0; 32];
        getrandom::fill(&mut random)
            .map_err(|_| Status::from(crate::engine::EngineError::Internal))?;
        let secret = format!("whsec_{}", hex::encode(random));
        let made = self
            .engine
            .subscribe(&asked, &secret, &caller.call())
            .await?;
        Ok(Response::new(proto::CreateSubscriptionResponse {
            subscription: Some(words::subscription(&made)),
            secret,
        }))
    }

    async fn list_subscriptions(
        &self,
        request: Request<proto::ListSubscriptionsRequest>,
    ) -> Result<Response<proto::ListSubscriptionsResponse>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::Audit).await?;
        let proto::ListSubscriptionsRequest { tenant } = request.into_inner();
        let mut fields = Fields::default();
        let tenant = fields.tenant("tenant", &tenant, caller.tenant());
        let tenant = fields.finish(tenant)?;
        caller.may_see(&tenant)?;
        let found = self.engine.subscriptions(&tenant).await?;
        Ok(Response::new(proto::ListSubscriptionsResponse {
            subscriptions: found.iter().map(words::subscription).collect(),
        }))
    }

    async fn delete_subscription(
        &self,
        request: Request<proto::DeleteSubscriptionRequest>,
    ) -> Result<Response<proto::DeleteSubscriptionResponse>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::Provision).await?;
        let proto::DeleteSubscriptionRequest {
            subscription_id,
            tenant,
        } = request.into_inner();
        let (tenant, id) = words::named(&subscription_id, &tenant, caller.tenant())?;
        caller.may_see(&tenant)?;
        self.engine
            .unsubscribe(&tenant, &id, &caller.call())
            .await?;
        Ok(Response::new(proto::DeleteSubscriptionResponse {}))
    }

    async fn redeliver_events(
        &self,
        request: Request<proto::RedeliverEventsRequest>,
    ) -> Result<Response<proto::RedeliverEventsResponse>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::Provision).await?;
        let proto::RedeliverEventsRequest {
            subscription_id,
            tenant,
            from_sequence,
        } = request.into_inner();
        let (tenant, id) = words::named(&subscription_id, &tenant, caller.tenant())?;
        if from_sequence < 0 {
            let mut fields = Fields::default();
            fields.bad("from_sequence", "0 or more");
            fields.finish(None::<()>)?;
        }
        caller.may_see(&tenant)?;
        let from = (from_sequence > 0).then_some(Sequence(from_sequence));
        let revived = self.engine.redeliver(&tenant, &id, from).await?;
        Ok(Response::new(proto::RedeliverEventsResponse { revived }))
    }
}
