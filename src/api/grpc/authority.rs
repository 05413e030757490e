//! `remit.v1.Authority`

use futures_util::{StreamExt as _, stream};
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use super::{Services, Told, while_good};
use crate::api::auth::Caller;
use crate::api::convert::{self, answers, authority as words};
use crate::api::fields::Fields;
use crate::api::page::Page;
use crate::api::status;
use crate::domain::id::{BalanceNo, ReservationId, TenantId};
use crate::domain::permission::Permission;
use crate::domain::query::{BalanceQuery, ReservationQuery};
use crate::domain::refusal::Refusal;
use crate::domain::request::{Command, RecordOf};
use crate::domain::reservation::Reservation;
use crate::domain::scope::Scope;
use crate::domain::time::Timestamp;
use crate::proto;
use crate::proto::authority_server::Authority;

impl Services {
    /// A reservation that is the caller's to see.
    pub(in crate::api) async fn seen(
        &self,
        caller: &Caller,
        tenant: &TenantId,
        id: ReservationId,
    ) -> Result<Reservation, Status> {
        caller.may_see(tenant)?;
        let found = self.engine.reservation(tenant, id).await?;
        let confined = caller.filters(None);
        found
            .filter(|found| confined.iter().all(|filter| filter.matches(&found.subject)))
            .ok_or_else(|| status::of_refusal(&Refusal::ReservationNotFound(id)))
    }
}

#[tonic::async_trait]
impl Authority for Services {
    async fn decide(
        &self,
        request: Request<proto::DecideRequest>,
    ) -> Result<Response<proto::DecideResponse>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::Authority).await?;
        let decide = words::decide(request.into_inner(), caller.tenant())?;
        caller.may_act_for(&decide.ask.subject)?;
        let tenant = decide.ask.subject.tenant.clone();
        let command = Command::Decide(Box::new(decide));
        let answer = self
            .engine
            .execute(&tenant, command, &caller.call())
            .await?;
        Ok(Response::new(answers::decided(&tenant, &answer)))
    }

    async fn reserve(
        &self,
        request: Request<proto::ReserveRequest>,
    ) -> Result<Response<proto::ReserveResponse>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::Authority).await?;
        let reserve = words::reserve(request.into_inner(), caller.tenant())?;
        caller.may_act_for(&reserve.ask.subject)?;
        let tenant = reserve.ask.subject.tenant.clone();
        let command = Command::Reserve(Box::new(reserve));
        let answer = self
            .engine
            .execute(&tenant, command, &caller.call())
            .await?;
        Ok(Response::new(answers::reserved(&tenant, &answer)))
    }

    async fn commit(
        &self,
        request: Request<proto::CommitRequest>,
    ) -> Result<Response<proto::CommitResponse>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::Authority).await?;
        let (tenant, commit) = words::commit(request.into_inner(), caller.tenant())?;
        caller.may_see(&tenant)?;
        let command = Command::Commit(Box::new(commit));
        let answer = self
            .engine
            .execute(&tenant, command, &caller.call())
            .await?;
        Ok(Response::new(answers::committed(&answer)))
    }

    async fn release(
        &self,
        request: Request<proto::ReleaseRequest>,
    ) -> Result<Response<proto::ReleaseResponse>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::Authority).await?;
        let (tenant, release) = words::release(request.into_inner(), caller.tenant())?;
        caller.may_see(&tenant)?;
        let command = Command::Release(Box::new(release));
        let answer = self
            .engine
            .execute(&tenant, command, &caller.call())
            .await?;
        Ok(Response::new(answers::released(&answer)))
    }

    async fn extend(
        &self,
        request: Request<proto::ExtendRequest>,
    ) -> Result<Response<proto::ExtendResponse>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::Authority).await?;
        let (tenant, extend) = words::extend(request.into_inner(), caller.tenant())?;
        caller.may_see(&tenant)?;
        let command = Command::Extend(Box::new(extend));
        let answer = self
            .engine
            .execute(&tenant, command, &caller.call())
            .await?;
        Ok(Response::new(answers::extended(&answer)))
    }

    async fn record(
        &self,
        request: Request<proto::RecordRequest>,
    ) -> Result<Response<proto::RecordResponse>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::Authority).await?;
        let (tenant, record) = words::record(request.into_inner(), caller.tenant())?;
        match &record.of {
            RecordOf::Action(of) => caller.may_act_for(&of.0)?,
            RecordOf::Expired(_) => caller.may_see(&tenant)?,
        }
        let command = Command::Record(Box::new(record));
        let answer = self
            .engine
            .execute(&tenant, command, &caller.call())
            .await?;
        Ok(Response::new(answers::recorded(&answer)))
    }

    async fn get_reservation(
        &self,
        request: Request<proto::GetReservationRequest>,
    ) -> Result<Response<proto::GetReservationResponse>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::Read).await?;
        let proto::GetReservationRequest {
            reservation_id,
            tenant,
        } = request.into_inner();
        let mut fields = Fields::default();
        let tenant = fields.tenant("tenant", &tenant, caller.tenant());
        let id = fields.reservation(&reservation_id);
        let (tenant, id) = fields.finish(tenant.zip(id))?;
        let reservation = self.seen(&caller, &tenant, id).await?;
        Ok(Response::new(proto::GetReservationResponse {
            reservation: Some(answers::reservation(&reservation, self.engine.now())),
        }))
    }

    type WaitReservationStream = Told<proto::WaitReservationResponse>;

    async fn wait_reservation(
        &self,
        request: Request<proto::WaitReservationRequest>,
    ) -> Result<Response<Self::WaitReservationStream>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::Read).await?;
        let proto::WaitReservationRequest {
            reservation_id,
            tenant,
        } = request.into_inner();
        let mut fields = Fields::default();
        let tenant = fields.tenant("tenant", &tenant, caller.tenant());
        let id = fields.reservation(&reservation_id);
        let (tenant, id) = fields.finish(tenant.zip(id))?;
        let first = self.seen(&caller, &tenant, id).await?;
        let engine = self.engine.clone();
        let word = move |reservation: &Reservation, now| proto::WaitReservationResponse {
            reservation: Some(answers::reservation(reservation, now)),
        };
        let now = engine.now();
        let waits = first.is_pending() && !first.is_overdue(now);
        let sent = stream::once(std::future::ready(Ok(word(&first, now))));
        if !waits {
            return Ok(Response::new(Box::pin(sent)));
        }
        let decided = stream::once(async move {
            let stopping = engine.stopping();
            let decided = tokio::select! {
                decided = engine.decided(&tenant, id, None) => decided?,
                () = stopping.cancelled() => return Err(status::stopping()),
            };
            Ok(word(&decided, engine.now()))
        });
        let told = sent.chain(decided);
        Ok(Response::new(while_good(self.engine.clone(), caller, told)))
    }

    async fn await_reservation(
        &self,
        request: Request<proto::AwaitReservationRequest>,
    ) -> Result<Response<proto::AwaitReservationResponse>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::Read).await?;
        let asked = words::await_reservation(request.into_inner(), caller.tenant())?;
        let (tenant, id, timeout) = asked;
        self.seen(&caller, &tenant, id).await?;
        let until = Instant::now() + timeout;
        let stopping = self.engine.stopping();
        let decided = tokio::select! {
            decided = self.engine.decided(&tenant, id, Some(until)) => decided?,
            () = stopping.cancelled() => return Err(status::stopping()),
            fallen = caller.fallen(&self.engine) => return Err(fallen),
        };
        caller.must_stand(&self.engine).await?;
        Ok(Response::new(proto::AwaitReservationResponse {
            reservation: Some(answers::reservation(&decided, self.engine.now())),
        }))
    }

    async fn list_reservations(
        &self,
        request: Request<proto::ListReservationsRequest>,
    ) -> Result<Response<proto::ListReservationsResponse>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::Read).await?;
        let proto::ListReservationsRequest {
            tenant,
            state,
            scope,
            page_size,
            page_token,
        } = request.into_inner();
        let mut fields = Fields::default();
        let tenant = fields.tenant("tenant", &tenant, caller.tenant());
        let question = format!("reservations\0{tenant:?}\0{state}\0{scope}");
        let page = Page::parse(&mut fields, page_size, &page_token, &question);
        let before = page.after.as_deref().map(|place| {
            let id = ReservationId::parse(place);
            fields.take("page_token", id)
        });
        let query = ReservationQuery {
            state: words::state_filter(&mut fields, state),
            scope: caller.filters(words::scope_filter(&mut fields, &scope)),
            before: before.flatten().map(|id| (Timestamp::default(), id)),
            limit: page.fetch(),
            now: self.engine.now(),
        };
        let (tenant, query) = fields.finish(tenant.zip(Some(query)))?;
        caller.may_see(&tenant)?;
        let now = query.now;
        let found = self.engine.reservations(&tenant, query).await?;
        let (found, next_page_token) = page.cut(found, |last| last.id.to_string());
        Ok(Response::new(proto::ListReservationsResponse {
            reservations: found.iter().map(|r| answers::reservation(r, now)).collect(),
            next_page_token,
        }))
    }

    async fn list_balances(
        &self,
        request: Request<proto::ListBalancesRequest>,
    ) -> Result<Response<proto::ListBalancesResponse>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::Read).await?;
        let proto::ListBalancesRequest {
            tenant,
            scope,
            include_past,
            page_size,
            page_token,
            include_unopened,
            exact,
        } = request.into_inner();
        let mut fields = Fields::default();
        let tenant = fields.tenant("tenant", &tenant, caller.tenant());
        let question =
            format!("balances\0{tenant:?}\0{scope}\0{include_past}\0{include_unopened}\0{exact}");
        let page = Page::parse(&mut fields, page_size, &page_token, &question);
        let exact = match exact {
            true => fields.take("scope", Scope::parse(&scope)),
            false => None,
        };
        let query = BalanceQuery {
            exact,
            include_unopened,
            scope: caller.filters(words::scope_filter(&mut fields, &scope)),
            include_past,
            after: page
                .after
                .as_deref()
                .and_then(|no| no.parse().ok())
                .map(BalanceNo),
            limit: page.fetch(),
            now: self.engine.now(),
        };
        let (tenant, query) = fields.finish(tenant.zip(Some(query)))?;
        caller.may_see(&tenant)?;
        let found = self.engine.balances(&tenant, query).await?;
        let (found, next_page_token) = page.cut(found, |(no, _)| no.to_string());
        Ok(Response::new(proto::ListBalancesResponse {
            balances: found
                .iter()
                .map(|(_, view)| convert::balance(view))
                .collect(),
            next_page_token,
        }))
    }
}
