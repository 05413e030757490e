//! `remit.v1.Approvals`

use futures_util::{StreamExt as _, stream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{Services, Told, while_good};
use crate::api::auth::Caller;
use crate::api::convert::{self, answers, approvals as words};
use crate::api::fields::Fields;
use crate::api::page::Page;
use crate::api::status;
use crate::domain::approve::{ApprovalRecord, ApprovalState};
use crate::domain::id::{ReservationId, Sequence, TenantId};
use crate::domain::ledger::{Body, EntryKind};
use crate::domain::permission::Permission;
use crate::domain::query::{ApprovalQuery, EntryQuery, ReservationQuery};
use crate::domain::refusal::Refusal;
use crate::domain::request::Command;
use crate::domain::scope::ScopeFilter;
use crate::domain::time::Timestamp;
use crate::engine::Engine;
use crate::proto;
use crate::proto::approvals_server::Approvals;

/// Approvals that a watcher is sent at once.
const WATCH_PAGE: i64 = 100;
/// Earlier reservations that a person is shown.
const EARLIER: i64 = 10;

#[tonic::async_trait]
impl Approvals for Services {
    async fn list_approvals(
        &self,
        request: Request<proto::ListApprovalsRequest>,
    ) -> Result<Response<proto::ListApprovalsResponse>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::Approve).await?;
        let proto::ListApprovalsRequest {
            tenant,
            state,
            mine,
            page_size,
            page_token,
        } = request.into_inner();
        let mut fields = Fields::default();
        let tenant = fields.tenant("tenant", &tenant, caller.tenant());
        let question = format!("approvals\0{tenant:?}\0{state}\0{mine}");
        let page = Page::parse(&mut fields, page_size, &page_token, &question);
        let after = page.after.as_deref().and_then(|place| {
            let (deadline, id) = place.split_once(' ')?;
            let deadline = Timestamp::from_micros(deadline.parse().ok()?);
            Some((deadline, ReservationId::parse(id).ok()?))
        });
        let query = ApprovalQuery {
            state: words::state(&mut fields, state),
            after,
            limit: page.fetch(),
            now: self.engine.now(),
        };
        let (tenant, query) = fields.finish(tenant.zip(Some(query)))?;
        caller.may_see(&tenant)?;
        let found = self.engine.approvals(&tenant, &query).await?;
        let (mut found, next_page_token) = page.cut(found, |last| {
            let deadline = last.approval.deadline.as_micros();
            format!("{deadline} {}", last.reservation)
        });
        if mine {
            let own = Some(caller.key_id());
            found.retain(|record| {
                record.approval.admits(caller.approver_groups())
                    && record.approval.requested_by.as_ref() != own
            });
        }
        let approvals = worded(&self.engine, &tenant, &found).await?;
        Ok(Response::new(proto::ListApprovalsResponse {
            approvals,
            next_page_token,
        }))
    }

    async fn get_approval(
        &self,
        request: Request<proto::GetApprovalRequest>,
    ) -> Result<Response<proto::GetApprovalResponse>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::Approve).await?;
        let proto::GetApprovalRequest {
            approval_id,
            tenant,
        } = request.into_inner();
        let (tenant, id) = words::named(&approval_id, &tenant, caller.tenant())?;
        caller.may_see(&tenant)?;
        let record = found(&self.engine, &tenant, id).await?;
        let reservation = self.engine.reservation(&tenant, id).await?;
        let reservation = reservation.ok_or_else(|| missing(id))?;
        let balances = self.engine.applicable(&tenant, &reservation).await?;
        let run = reservation.subject.dimensions().get("run");
        let scope = match run {
            Some(run) => format!("run:{}", run.canonical()),
            None => reservation.subject.agent_scope(),
        };
        let query = ReservationQuery {
            state: None,
            scope: ScopeFilter::parse(&scope).into_iter().collect(),
            before: Some((Timestamp::default(), id)),
            limit: EARLIER,
            now: self.engine.now(),
        };
        let now = query.now;
        let earlier = self.engine.reservations(&tenant, query).await?;
        let mut approvals = worded(&self.engine, &tenant, &[record]).await?;
        Ok(Response::new(proto::GetApprovalResponse {
            approval: approvals.pop(),
            balances: balances.iter().map(convert::balance).collect(),
            earlier: earlier
                .iter()
                .map(|reservation| answers::reservation(reservation, now))
                .collect(),
        }))
    }

    async fn resolve_approval(
        &self,
        request: Request<proto::ResolveApprovalRequest>,
    ) -> Result<Response<proto::ResolveApprovalResponse>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::Approve).await?;
        let groups = caller.approver_groups();
        let (tenant, resolve) = words::resolve(request.into_inner(), caller.tenant(), groups)?;
        caller.may_see(&tenant)?;
        let id = resolve.reservation;
        let command = Command::Resolve(Box::new(resolve));
        let answer = self
            .engine
            .execute(&tenant, command, &caller.call())
            .await?;
        let record = found(&self.engine, &tenant, id).await?;
        let mut approvals = worded(&self.engine, &tenant, &[record]).await?;
        Ok(Response::new(proto::ResolveApprovalResponse {
            approval: approvals.pop(),
            replayed: answer.replayed,
            ledger_sequence: answer.seq.map_or(0, |seq| seq.0),
        }))
    }

    type WatchApprovalsStream = Told<proto::WatchApprovalsResponse>;

    async fn watch_approvals(
        &self,
        request: Request<proto::WatchApprovalsRequest>,
    ) -> Result<Response<Self::WatchApprovalsStream>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::Approve).await?;
        let proto::WatchApprovalsRequest { tenant } = request.into_inner();
        let mut fields = Fields::default();
        let tenant = fields.tenant("tenant", &tenant, caller.tenant());
        let tenant = fields.finish(tenant)?;
        caller.may_see(&tenant)?;
        let last = self.engine.last_sequence(&tenant).await?;
        let last = last.ok_or_else(|| status::of_refusal(&Refusal::TenantNotFound))?;
        let (sender, receiver) = mpsc::channel(usize::try_from(WATCH_PAGE).unwrap_or(1));
        let engine = self.engine.clone();
        tokio::spawn(async move {
            if let Err(error) = watch(engine, tenant, last, &sender).await {
                // Nobody has to be reading any more.
                let _ = sender.send(Err(error)).await;
            }
        });
        let stopped = stream::once(async { Err(status::stopping()) });
        let approvals = ReceiverStream::new(receiver).chain(stopped);
        let engine = self.engine.clone();
        Ok(Response::new(while_good(engine, caller, approvals)))
    }
}

fn missing(id: ReservationId) -> Status {
    status::of_refusal(&Refusal::ReservationNotFound(id))
}

async fn found(
    engine: &Engine,
    tenant: &TenantId,
    id: ReservationId,
) -> Result<ApprovalRecord, Status> {
    let record = engine.approval(tenant, id).await?;
    record.ok_or_else(|| missing(id))
}

/// Approvals in words, with what the entries say that asked for them.
async fn worded(
    engine: &Engine,
    tenant: &TenantId,
    records: &[ApprovalRecord],
) -> Result<Vec<proto::Approval>, Status> {
    let now = engine.now();
    let mut worded = Vec::with_capacity(records.len());
    for record in records {
        let entry = engine.entry(tenant, record.reserve_seq).await?;
        let asked: Option<Body> = entry.and_then(|entry| serde_json::from_str(&entry.text).ok());
        worded.push(words::approval(tenant, record, asked.as_ref(), now));
    }
    Ok(worded)
}

type Sender = mpsc::Sender<Result<proto::WatchApprovalsResponse, Status>>;

/// Sends what waits, then what is asked for or ends, until the reader goes or the server
/// stops.
async fn watch(
    engine: Engine,
    tenant: TenantId,
    mut after: Sequence,
    sender: &Sender,
) -> Result<(), Status> {
    let stopping = engine.stopping();
    let mut written = engine.written();
    let mut place = None;
    loop {
        let query = ApprovalQuery {
            state: ApprovalState::Pending,
            after: place,
            limit: WATCH_PAGE,
            now: engine.now(),
        };
        let page = engine.approvals(&tenant, &query).await?;
        place = page
            .last()
            .map(|last| (last.approval.deadline, last.reservation));
        for approval in worded(&engine, &tenant, &page).await? {
            if send(&engine, sender, approval).await.is_err() {
                return Ok(());
            }
        }
        if place.is_none() {
            break;
        }
    }
    loop {
        let query = EntryQuery {
            kinds: vec![
                EntryKind::Reserve,
                EntryKind::Resolve,
                EntryKind::Expire,
                EntryKind::Release,
            ],
            decision: None,
            reservation: None,
            from: None,
            until: None,
            descending: false,
            after: Some(after),
            limit: WATCH_PAGE,
        };
        let page = engine.entries(&tenant, query).await?;
        if page.is_empty() {
            tokio::select! {
                () = written.wait(&tenant, after) => continue,
                () = sender.closed() => return Ok(()),
                () = stopping.cancelled() => return Ok(()),
            }
        }
        for entry in page {
            after = entry.seq;
            let Ok(body) = serde_json::from_str::<Body>(&entry.text) else {
                continue;
            };
            let Some(id) = body.reservation else {
                continue;
            };
            let asks = body.kind != EntryKind::Reserve || body.approval.is_some();
            let record = if asks {
                engine.approval(&tenant, id).await?
            } else {
                None
            };
            // A release or expiry of what never waited is nobody's here; nor is one that
            // was approved before.
            let own = |record: &ApprovalRecord| {
                let resolved = record.resolution.as_ref().map(|resolution| resolution.seq);
                body.kind == EntryKind::Reserve || resolved == Some(body.seq)
            };
            let Some(record) = record.filter(own) else {
                continue;
            };
            for approval in worded(&engine, &tenant, &[record]).await? {
                if send(&engine, sender, approval).await.is_err() {
                    return Ok(());
                }
            }
        }
    }
}

/// Fails when nobody reads any more, or the server stops while nobody does.
async fn send(engine: &Engine, sender: &Sender, approval: proto::Approval) -> Result<(), ()> {
    let message = proto::WatchApprovalsResponse {
        approval: Some(approval),
    };
    let stopping = engine.stopping();
    tokio::select! {
        sent = sender.send(Ok(message)) => sent.map_err(|_| ()),
        () = stopping.cancelled() => Err(()),
    }
}
