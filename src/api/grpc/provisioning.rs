//! `remit.v1.Provisioning`

use tonic::{Request, Response, Status};

use super::Services;
use crate::api::auth::Caller;
use crate::api::convert::{self, api_keys, budgets, catalogue, provisioning, rules, tenants};
use crate::api::fields::Fields;
use crate::api::page::Page;
use crate::api::status;
use crate::domain::id::{BudgetNo, KeyId, TenantId};
use crate::domain::key::{KeyText, NewKey};
use crate::domain::permission::Permission;
use crate::domain::refusal::Refusal;
use crate::domain::request::Command;
use crate::domain::time::Timestamp;
use crate::engine;
use crate::proto;
use crate::proto::provisioning_server::Provisioning;

fn not_found(refusal: Refusal) -> Status {
    status::of_refusal(&refusal)
}

#[tonic::async_trait]
impl Provisioning for Services {
    async fn provision(
        &self,
        request: Request<proto::ProvisionRequest>,
    ) -> Result<Response<proto::ProvisionResponse>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::Provision).await?;
        let asked = provisioning::provision(request.into_inner())?;
        let tenants = asked.document.tenants_touched();
        for tenant in tenants.map_err(|_| not_found(Refusal::TenantNotFound))? {
            caller.may_see(&tenant)?;
        }
        let may_loosen = caller.permissions().contains(Permission::Loosen);
        let provisioning = engine::Provisioning {
            document: asked.document,
            key: asked.key,
            pinned_to: caller.chain(),
            may_loosen,
            validate_only: asked.validate_only,
        };
        let provisioned = self.engine.provision(&provisioning, &caller.call()).await?;
        Ok(Response::new(provisioning::provisioned(provisioned)))
    }

    async fn fund_budget(
        &self,
        request: Request<proto::FundBudgetRequest>,
    ) -> Result<Response<proto::FundBudgetResponse>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::Fund).await?;
        let fund = budgets::fund(request.into_inner())?;
        let tenant = fund.funding.scope.tenant();
        let tenant = tenant.map_err(|_| not_found(Refusal::TenantNotFound))?;
        caller.may_see(&tenant)?;
        let command = Command::Fund(Box::new(fund));
        let answer = self
            .engine
            .execute(&tenant, command, &caller.call())
            .await?;
        Ok(Response::new(proto::FundBudgetResponse {
            balance: answer.balances.first().map(convert::balance),
            previous: answer.funded_from.as_deref().map(convert::balance),
            replayed: answer.replayed,
            ledger_sequence: answer.seq.map_or(0, |seq| seq.0),
        }))
    }

    async fn get_budget(
        &self,
        request: Request<proto::GetBudgetRequest>,
    ) -> Result<Response<proto::GetBudgetResponse>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::Read).await?;
        let proto::GetBudgetRequest {
            scope,
            unit,
            period,
        } = request.into_inner();
        let key = budgets::named_budget(&scope, unit, period)?;
        let missing = || {
            not_found(Refusal::BudgetNotFound {
                scope: key.scope.clone(),
                unit: key.unit,
                period: key.period,
            })
        };
        let tenant = key.scope.tenant().map_err(|_| missing())?;
        // Another tenant's budget is one that does not exist.
        caller.may_see(&tenant).map_err(|_| missing())?;
        let confined = caller.confinement();
        if confined.is_some_and(|prefix| !prefix.matches_scope(&key.scope)) {
            return Err(missing());
        }
        let found = self
            .engine
            .budget(&tenant, &key.scope, key.unit, key.period);
        let budget = found.await?.ok_or_else(missing)?;
        Ok(Response::new(proto::GetBudgetResponse {
            budget: Some(budgets::budget(&budget)),
        }))
    }

    async fn list_budgets(
        &self,
        request: Request<proto::ListBudgetsRequest>,
    ) -> Result<Response<proto::ListBudgetsResponse>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::Read).await?;
        let proto::ListBudgetsRequest {
            tenant,
            page_size,
            page_token,
        } = request.into_inner();
        let mut fields = Fields::default();
        let tenant = fields.tenant("tenant", &tenant, caller.tenant());
        let question = format!("budgets\0{tenant:?}");
        let page = Page::parse(&mut fields, page_size, &page_token, &question);
        let (tenant, page) = fields.finish(tenant.zip(Some(page)))?;
        caller.may_see(&tenant)?;
        let after = page
            .after
            .as_deref()
            .and_then(|no| no.parse().ok())
            .map(BudgetNo);
        let found = self.engine.budgets(&tenant, after, page.fetch()).await?;
        let (mut found, next_page_token) = page.cut(found, |last| last.no.to_string());
        if let Some(prefix) = caller.confinement() {
            found.retain(|budget| prefix.matches_scope(&budget.scope));
        }
        Ok(Response::new(proto::ListBudgetsResponse {
            budgets: found.iter().map(budgets::budget).collect(),
            next_page_token,
        }))
    }

    async fn get_tenant(
        &self,
        request: Request<proto::GetTenantRequest>,
    ) -> Result<Response<proto::GetTenantResponse>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::Read).await?;
        let proto::GetTenantRequest { tenant } = request.into_inner();
        let mut fields = Fields::default();
        let tenant = fields.tenant("tenant", &tenant, caller.tenant());
        let tenant = fields.finish(tenant)?;
        caller.may_see(&tenant)?;
        let found = self.engine.tenant(&tenant).await?;
        let found = found.ok_or_else(|| not_found(Refusal::TenantNotFound))?;
        Ok(Response::new(proto::GetTenantResponse {
            tenant: Some(tenants::tenant(&found)),
        }))
    }

    async fn list_tenants(
        &self,
        request: Request<proto::ListTenantsRequest>,
    ) -> Result<Response<proto::ListTenantsResponse>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::Read).await?;
        let proto::ListTenantsRequest {
            page_size,
            page_token,
        } = request.into_inner();
        let mut fields = Fields::default();
        let page = Page::parse(&mut fields, page_size, &page_token, "tenants");
        let page = fields.finish(Some(page))?;
        let found = match caller.tenant() {
            Some(own) => self.engine.tenant(own).await?.into_iter().collect(),
            None => {
                let after = page.after.as_deref().and_then(|t| TenantId::parse(t).ok());
                self.engine.tenants(after, page.fetch()).await?
            }
        };
        let (found, next_page_token) = page.cut(found, |last| last.id.to_string());
        Ok(Response::new(proto::ListTenantsResponse {
            tenants: found.iter().map(tenants::tenant).collect(),
            next_page_token,
        }))
    }

    async fn list_tools(
        &self,
        request: Request<proto::ListToolsRequest>,
    ) -> Result<Response<proto::ListToolsResponse>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::Read).await?;
        let proto::ListToolsRequest { tenant } = request.into_inner();
        let tenant = named_tenant(&caller, &tenant)?;
        let config = self.engine.config(&tenant).await?;
        let tools = &config.rules.tools;
        Ok(Response::new(proto::ListToolsResponse {
            tools: tools
                .document
                .iter()
                .map(|tool| catalogue::tool_message(&tenant, tool))
                .collect(),
            version: tools.version,
        }))
    }

    async fn get_policy(
        &self,
        request: Request<proto::GetPolicyRequest>,
    ) -> Result<Response<proto::GetPolicyResponse>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::Read).await?;
        let proto::GetPolicyRequest {
            tenant,
            all_tenants,
        } = request.into_inner();
        if all_tenants && !tenant.is_empty() {
            let mut fields = Fields::default();
            fields.bad("tenant", "empty with all_tenants");
            fields.finish(None::<()>)?;
        }
        let (tenant, policy) = if all_tenants {
            // It is no secret: every tenant's decisions go by it.
            let system = TenantId::system();
            let policy = self.engine.policy(&system).await?;
            (system, policy)
        } else {
            let tenant = named_tenant(&caller, &tenant)?;
            let found = self.engine.tenant(&tenant).await?;
            found.ok_or_else(|| not_found(Refusal::TenantNotFound))?;
            let policy = self.engine.policy(&tenant).await?;
            (tenant, policy)
        };
        Ok(Response::new(proto::GetPolicyResponse {
            policy: Some(rules::policy_message(&tenant, &policy)),
        }))
    }

    async fn list_freezes(
        &self,
        request: Request<proto::ListFreezesRequest>,
    ) -> Result<Response<proto::ListFreezesResponse>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::Read).await?;
        let proto::ListFreezesRequest { tenant } = request.into_inner();
        let tenant = named_tenant(&caller, &tenant)?;
        let config = self.engine.config(&tenant).await?;
        let freezes = config.rules.freezes.document.iter();
        Ok(Response::new(proto::ListFreezesResponse {
            freezes: freezes.map(rules::freeze_message).collect(),
        }))
    }

    async fn create_api_key(
        &self,
        request: Request<proto::CreateApiKeyRequest>,
    ) -> Result<Response<proto::CreateApiKeyResponse>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::ManageKeys).await?;
        let now = self.engine.now();
        let asked = api_keys::create_api_key(request.into_inner(), caller.tenant(), now)?;
        if let Some(tenant) = &asked.tenant {
            caller.may_see(tenant)?;
            let found = self.engine.tenant(tenant).await?;
            found.ok_or_else(|| not_found(Refusal::TenantNotFound))?;
        }
        let held = caller.permissions();
        if let Some(lacking) = asked.permissions.iter().find(|p| !held.contains(*p)) {
            let message = format!("an API key without PERMISSION_{lacking} can't grant it");
            return Err(status::permission_missing(lacking, message));
        }
        let own = caller.approver_groups();
        let foreign = asked
            .approver_groups
            .iter()
            .find(|group| !own.contains(group));
        if let Some(foreign) = foreign.filter(|_| caller.tenant().is_some()) {
            let message = format!("an API key that does not speak for {foreign} can't grant it");
            return Err(status::permission_missing(Permission::Approve, message));
        }
        let text = random_key()?;
        let new = NewKey {
            id: text.id().clone(),
            tenant: asked.tenant,
            display_name: asked.display_name,
            permissions: asked.permissions,
            subject_prefix: asked.subject_prefix,
            approver_groups: asked.approver_groups,
            secret_sha256: text.secret_sha256(),
            expires_at: asked.expires_at,
        };
        let key = Some(&asked.idempotency_key);
        let created = self.engine.create_key(&new, key, &caller.call()).await;
        let (key, replayed) = created?;
        Ok(Response::new(proto::CreateApiKeyResponse {
            api_key: Some(api_keys::api_key(&key)),
            secret: if replayed {
                String::new()
            } else {
                text.expose()
            },
            replayed,
        }))
    }

    async fn list_api_keys(
        &self,
        request: Request<proto::ListApiKeysRequest>,
    ) -> Result<Response<proto::ListApiKeysResponse>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::ManageKeys).await?;
        let proto::ListApiKeysRequest {
            tenant,
            page_size,
            page_token,
        } = request.into_inner();
        let mut fields = Fields::default();
        let tenant = match (tenant.as_str(), caller.tenant()) {
            ("", None) => Some(TenantId::system()),
            (named, _) => caller.chain_in(&mut fields, "tenant", named),
        };
        let question = format!("keys\0{tenant:?}");
        let page = Page::parse(&mut fields, page_size, &page_token, &question);
        let (tenant, page) = fields.finish(tenant.zip(Some(page)))?;
        caller.may_see(&tenant)?;
        let after = page.after.as_deref().and_then(|place| {
            let (at, id) = place.split_once(' ')?;
            let at = Timestamp::from_micros(at.parse().ok()?);
            Some((at, KeyId::parse(id).ok()?))
        });
        let found = self.engine.keys(&tenant, after, page.fetch()).await?;
        let (found, next_page_token) = page.cut(found, |last| {
            format!("{} {}", last.created_at.as_micros(), last.id)
        });
        Ok(Response::new(proto::ListApiKeysResponse {
            api_keys: found.iter().map(api_keys::api_key).collect(),
            next_page_token,
        }))
    }

    async fn revoke_api_key(
        &self,
        request: Request<proto::RevokeApiKeyRequest>,
    ) -> Result<Response<proto::RevokeApiKeyResponse>, Status> {
        let caller = Caller::of(&self.engine, &request, Permission::ManageKeys).await?;
        let proto::RevokeApiKeyRequest { key_id } = request.into_inner();
        let id = api_keys::key_id(&key_id)?;
        let call = caller.call();
        let revoked = self.engine.revoke_key(caller.tenant(), &id, &call).await?;
        Ok(Response::new(proto::RevokeApiKeyResponse {
            api_key: Some(api_keys::api_key(&revoked)),
        }))
    }
}

/// The tenant that a message names, else the caller's own, which the caller may see.
fn named_tenant(caller: &Caller, named: &str) -> Result<TenantId, Status> {
    let mut fields = Fields::default();
    let tenant = fields.tenant("tenant", named, caller.tenant());
    let tenant = fields.finish(tenant)?;
    caller.may_see(&tenant)?;
    Ok(tenant)
}

/// A key from the machine's randomness.
pub fn random_key() -> Result<KeyText, Status> {
    let (mut id, mut secret) = ([0; 10], [0; 32]);
    let filled = getrandom::fill(&mut id).and_then(|()| getrandom::fill(&mut secret));
    filled.map_err(|_| Status::from(crate::engine::EngineError::Internal))?;
    Ok(KeyText::from_random(id, secret))
}
