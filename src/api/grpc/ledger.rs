//! `remit.v1.Ledger`

use futures_util::{StreamExt as _, stream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{Services, Told, while_good};
use crate::api::auth::Caller;
use crate::api::convert::{ledger as words, rules};
use crate::api::fields::Fields;
use crate::api::page::Page;
use crate::api::status;
use crate::domain::id::{Sequence, TenantId};
use crate::domain::ledger::EntryKind;
use crate::domain::permission::Permission;
use crate::domain::query::EntryQuery;
use crate::domain::refusal::Refusal;
use crate::engine::Engine;
use crate::proto;
use crate::proto::ledger_server::Ledger;

/// Entries that a watcher is read at once.
const WATCH_PAGE: i64 = 100;

fn not_found(refusal: Refusal) -> Status {
    status::of_refusal(&refusal)
}

impl Services {
    /// The end of a chain, which must exist and be the caller's to see.
    async fn chain(&self, caller: &Caller, tenant: &TenantId) -> Result<Sequence, Status> {
        caller.may_see(tenant)?;
        let last = self.engine.last_sequence(tenant).await?;
        last.ok_or_else(|| not_found(Refusal::TenantNotFound))
    }
}

#[tonic::async_trait]
impl Ledger for Services {
    async fn list_entries(
        &self,
        request: Request<proto::ListEntriesRequest>,
    ) -> Result<Response<proto::ListEntriesResponse>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::Audit).await?;
        let mut message = request.into_inner();
        let (page_size, page_token) = (message.page_size, std::mem::take(&mut message.page_token));
        let mut fields = Fields::default();
        let tenant = caller.chain_in(&mut fields, "tenant", &message.tenant);
        message.page_size = 0;
        message.tenant = tenant
            .as_ref()
            .map_or_else(String::new, TenantId::to_string);
        let question = format!("entries\0{message:?}");
        let proto::ListEntriesRequest {
            tenant: _,
            kinds,
            decision,
            reservation_id,
            start_time,
            end_time,
            descending,
            page_size: _,
            page_token: _,
        } = message;
        let page = Page::parse(&mut fields, page_size, &page_token, &question);
        let reservation = match reservation_id.as_str() {
            "" => None,
            id => fields.reservation(id),
        };
        let query = EntryQuery {
            kinds: words::kinds(&mut fields, &kinds),
            decision: words::decision(&mut fields, decision),
            reservation,
            from: fields.time("start_time", start_time),
            until: fields.time("end_time", end_time),
            descending,
            after: page
                .after
                .as_deref()
                .and_then(|seq| seq.parse().ok())
                .map(Sequence),
            limit: page.fetch(),
        };
        let (tenant, query) = fields.finish(tenant.zip(Some(query)))?;
        self.chain(&caller, &tenant).await?;
        let found = self.engine.entries(&tenant, query).await?;
        let (found, next_page_token) = page.cut(found, |last| last.seq.to_string());
        Ok(Response::new(proto::ListEntriesResponse {
            entries: found
                .into_iter()
                .map(|e| words::entry(&tenant, e))
                .collect(),
            next_page_token,
        }))
    }

    async fn get_entry(
        &self,
        request: Request<proto::GetEntryRequest>,
    ) -> Result<Response<proto::GetEntryResponse>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::Audit).await?;
        let proto::GetEntryRequest { tenant, sequence } = request.into_inner();
        let mut fields = Fields::default();
        if sequence < 1 {
            fields.bad("sequence", "1 or more");
        }
        let tenant = caller.chain_in(&mut fields, "tenant", &tenant);
        let (tenant, seq) = fields.finish(tenant.zip(Some(Sequence(sequence))))?;
        self.chain(&caller, &tenant).await?;
        let found = self.engine.entry(&tenant, seq).await?;
        let found = found.ok_or_else(|| not_found(Refusal::EntryNotFound))?;
        Ok(Response::new(proto::GetEntryResponse {
            entry: Some(words::entry(&tenant, found)),
        }))
    }

    type WatchEntriesStream = Told<proto::WatchEntriesResponse>;

    async fn watch_entries(
        &self,
        request: Request<proto::WatchEntriesRequest>,
    ) -> Result<Response<Self::WatchEntriesStream>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::Audit).await?;
        let proto::WatchEntriesRequest {
            tenant,
            after_sequence,
        } = request.into_inner();
        let mut fields = Fields::default();
        let tenant = caller.chain_in(&mut fields, "tenant", &tenant);
        if after_sequence.is_some_and(|after| after < 0) {
            fields.bad("after_sequence", "0 or more");
        }
        let tenant = fields.finish(tenant)?;
        let last = self.chain(&caller, &tenant).await?;
        let after = after_sequence.map_or(last, Sequence);
        // A slow reader slows its own task down, nothing else.
        let (sender, receiver) = mpsc::channel(usize::try_from(WATCH_PAGE).unwrap_or(1));
        tokio::spawn(watch(self.engine.clone(), tenant, after, sender));
        // The task ends without an error of its own only when the server stops. The
        // word for it stands here and not in the channel, which may be full.
        let stopped = stream::once(async { Err(status::stopping()) });
        let entries = ReceiverStream::new(receiver).chain(stopped);
        let engine = self.engine.clone();
        Ok(Response::new(while_good(engine, caller, entries)))
    }

    async fn verify_ledger(
        &self,
        request: Request<proto::VerifyLedgerRequest>,
    ) -> Result<Response<proto::VerifyLedgerResponse>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::Audit).await?;
        let proto::VerifyLedgerRequest { tenant } = request.into_inner();
        let mut fields = Fields::default();
        let tenant = caller.chain_in(&mut fields, "tenant", &tenant);
        let tenant = fields.finish(tenant)?;
        caller.may_see(&tenant)?;
        let report = self.engine.verify(&tenant).await?;
        Ok(Response::new(words::report(report)))
    }

    async fn replay_policy(
        &self,
        request: Request<proto::ReplayPolicyRequest>,
    ) -> Result<Response<proto::ReplayPolicyResponse>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::Audit).await?;
        let mut message = request.into_inner();
        let (page_size, page_token) = (message.page_size, std::mem::take(&mut message.page_token));
        message.page_size = 0;
        let question = format!("replay\0{:?}\0{message:?}", caller.tenant());
        let proto::ReplayPolicyRequest {
            policy,
            tenant: named,
            start_time,
            end_time,
            page_size: _,
            page_token: _,
        } = message;
        let mut fields = Fields::default();
        let candidate = match policy {
            Some(policy) => rules::policy(&mut fields, "policy", policy),
            None => {
                fields.bad("policy", "given");
                None
            }
        };
        let own = candidate.as_ref().map(|(whose, _)| whose);
        let own = own.filter(|whose| !whose.is_system()).or(caller.tenant());
        let tenant = fields.tenant("tenant", &named, own);
        if let Some((whose, _)) = &candidate
            && !whose.is_system()
            && tenant.as_ref().is_some_and(|tenant| tenant != whose)
        {
            fields.bad("tenant", "the policy's tenant, or empty");
        }
        let page = Page::parse(&mut fields, page_size, &page_token, &question);
        let query = EntryQuery {
            kinds: vec![EntryKind::Decide, EntryKind::Reserve],
            decision: None,
            reservation: None,
            from: fields.time("start_time", start_time),
            until: fields.time("end_time", end_time),
            descending: false,
            after: page
                .after
                .as_deref()
                .and_then(|seq| seq.parse().ok())
                .map(Sequence),
            limit: page.fetch(),
        };
        let ((whose, document), tenant) = fields.finish(candidate.zip(tenant))?;
        self.chain(&caller, &tenant).await?;
        let found = self.engine.entries(&tenant, query).await?;
        let (found, next_page_token) = page.cut(found, |last| last.seq.to_string());
        let decisions = i64::try_from(found.len()).unwrap_or(i64::MAX);
        let redecided = self.engine.redecide(&tenant, &found, &whose, document);
        let redecided = redecided.await?;
        let unknown = redecided.iter().filter(|(_, redecided)| redecided.unknown);
        let differing = redecided
            .iter()
            .filter(|(body, redecided)| redecided.differs(body));
        Ok(Response::new(proto::ReplayPolicyResponse {
            decisions,
            unknown: i64::try_from(unknown.count()).unwrap_or(i64::MAX),
            changed: differing
                .map(|(body, redecided)| words::changed(body, redecided))
                .collect(),
            next_page_token,
        }))
    }
}

type Sender = mpsc::Sender<Result<proto::WatchEntriesResponse, Status>>;

/// Sends entries until the reader goes or the server stops.
async fn watch(engine: Engine, tenant: TenantId, mut after: Sequence, sender: Sender) {
    let stopping = engine.stopping();
    let mut written = engine.written();
    loop {
        let query = EntryQuery {
            kinds: Vec::new(),
            decision: None,
            reservation: None,
            from: None,
            until: None,
            descending: false,
            after: Some(after),
            limit: WATCH_PAGE,
        };
        let page = match engine.entries(&tenant, query).await {
            Ok(page) => page,
            Err(error) => {
                // Nobody has to be reading any more.
                let _ = sender.send(Err(error.into())).await;
                return;
            }
        };
        if page.is_empty() {
            tokio::select! {
                () = written.wait(&tenant, after) => continue,
                () = sender.closed() => return,
                () = stopping.cancelled() => return,
            }
        }
        for entry in page {
            after = entry.seq;
            let message = proto::WatchEntriesResponse {
                entry: Some(words::entry(&tenant, entry)),
            };
            // Also while a reader that does not read keeps the channel full.
            tokio::select! {
                sent = sender.send(Ok(message)) => if sent.is_err() { return },
                () = stopping.cancelled() => return,
            }
        }
    }
}
