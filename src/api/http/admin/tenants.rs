//! Tenants. Those made here keep to the rules of the protocol.

use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::super::call::{Answer, Asker, Call};
use super::super::problem::Fault;
use super::super::runtime::fresh_key;
use super::super::strict::{Free, word_or_none};
use super::super::{Gateway, translate, wire};
use super::{Done, Params, Question, iso, limit, must_be_absent, params};
use crate::domain::permission::Permission;
use crate::proto;
use crate::proto::provisioning_server::Provisioning as _;

/// Settings of a tenant, as given.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Given {
    tenant_id: Option<String>,
    name: Option<String>,
    #[serde(default, deserialize_with = "word_or_none")]
    status: Option<Status>,
    #[serde(default, deserialize_with = "word_or_none")]
    default_commit_overage_policy: Option<wire::OveragePolicy>,
    default_reservation_ttl_ms: Option<u64>,
    max_reservation_ttl_ms: Option<u64>,
    max_reservation_extensions: Option<i32>,
    parent_tenant_id: Option<Value>,
    /// Any other value is refused with the body.
    #[serde(default, deserialize_with = "word_or_none")]
    reservation_expiry_policy: Option<ExpiryPolicy>,
    /// Taken and kept nowhere.
    metadata: Option<Free>,
}

/// Whether its agents may act.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub(super) enum Status {
    Active,
    Suspended,
    Closed,
}

/// The only one that has an effect: what is not settled in time is given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum ExpiryPolicy {
    AutoRelease,
}

/// A tenant.
#[derive(Debug, Serialize)]
struct Tenant {
    tenant_id: String,
    name: String,
    status: Status,
    default_commit_overage_policy: wire::OveragePolicy,
    #[serde(skip_serializing_if = "Option::is_none")]
    default_reservation_ttl_ms: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_reservation_ttl_ms: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_reservation_extensions: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    created_at: Option<String>,
}

#[derive(Debug, Serialize)]
struct Tenants {
    tenants: Vec<Tenant>,
    #[serde(flatten)]
    next: wire::Next,
}

fn worded(tenant: proto::Tenant) -> Tenant {
    let status = match tenant.state() {
        proto::TenantState::Suspended => Status::Suspended,
        proto::TenantState::Closed => Status::Closed,
        proto::TenantState::Active | proto::TenantState::Unspecified => Status::Active,
    };
    let default_commit_overage_policy = match tenant.default_overage_policy() {
        proto::OveragePolicy::Reject => wire::OveragePolicy::Reject,
        proto::OveragePolicy::AllowWithOverdraft => wire::OveragePolicy::AllowWithOverdraft,
        proto::OveragePolicy::AllowIfAvailable | proto::OveragePolicy::Unspecified => {
            wire::OveragePolicy::AllowIfAvailable
        }
    };
    let rules = tenant.cycles_compatible.unwrap_or_default();
    Tenant {
        tenant_id: tenant.tenant,
        name: tenant.display_name,
        status,
        default_commit_overage_policy,
        default_reservation_ttl_ms: rules.default_ttl.as_ref().map(translate::millis_left),
        max_reservation_ttl_ms: rules.max_ttl.as_ref().map(translate::millis_left),
        max_reservation_extensions: rules.max_extensions,
        created_at: iso(tenant.create_time.as_ref()),
    }
}

/// The settings that are given, and their names.
fn settings(given: Given, id: &str) -> (proto::Tenant, Vec<&'static str>) {
    let mut tenant = proto::Tenant {
        tenant: id.to_owned(),
        ..proto::Tenant::default()
    };
    let mut mask = Vec::new();
    if let Some(name) = given.name {
        tenant.display_name = name;
        mask.push("display_name");
    }
    if let Some(status) = given.status {
        let state = match status {
            Status::Active => proto::TenantState::Active,
            Status::Suspended => proto::TenantState::Suspended,
            Status::Closed => proto::TenantState::Closed,
        };
        tenant.state = state.into();
        mask.push("state");
    }
    if let Some(policy) = given.default_commit_overage_policy {
        tenant.default_overage_policy = translate::overage_policy(Some(policy));
        mask.push("default_overage_policy");
    }
    let mut rules = proto::CyclesRules::default();
    if let Some(ttl) = given.default_reservation_ttl_ms {
        rules.default_ttl = Some(translate::duration(ttl));
        mask.push("cycles_compatible.default_ttl");
    }
    if let Some(ttl) = given.max_reservation_ttl_ms {
        rules.max_ttl = Some(translate::duration(ttl));
        mask.push("cycles_compatible.max_ttl");
    }
    if let Some(count) = given.max_reservation_extensions {
        rules.max_extensions = Some(count);
        mask.push("cycles_compatible.max_extensions");
    }
    tenant.cycles_compatible = Some(rules);
    (tenant, mask)
}

pub(super) async fn find(
    gateway: &Gateway,
    asker: &Asker,
    tenant: &str,
) -> Result<proto::Tenant, Fault> {
    let message = proto::GetTenantRequest {
        tenant: tenant.to_owned(),
    };
    let found = gateway.services.get_tenant(asker.request(message)).await?;
    Ok(found.into_inner().tenant.unwrap_or_default())
}

pub(super) async fn create(State(gateway): State<Gateway>, call: Call, body: Body) -> Done {
    let asker = gateway.operator(&call, Permission::Provision).await?;
    // For the answer: nothing may be done that can't be told.
    asker.must_hold(Permission::Read)?;
    let given: Given = gateway.json(&call, body).await?;
    must_be_absent(&[("parent_tenant_id", &given.parent_tenant_id)])?;
    let id = given.tenant_id.clone();
    let is_id = |id: &String| {
        let known = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        (3..=64).contains(&id.len()) && id.bytes().all(known)
    };
    let id = id.filter(is_id);
    let wants = "3 to 64 characters of a-z, 0-9, '-'";
    let id = id.ok_or_else(|| Fault::field("tenant_id", wants))?;
    let name = given.name.clone().filter(|name| !name.trim().is_empty());
    let name = name.ok_or_else(|| Fault::field("name", "given"))?;
    if given.status.is_some_and(|status| status != Status::Active) {
        return Err(Fault::field("status", "ACTIVE, or absent"));
    }
    let (tenant, _) = settings(given, &id);
    let message = proto::ProvisionRequest {
        idempotency_key: fresh_key(),
        tenants: vec![tenant],
        create_only: true,
        ..proto::ProvisionRequest::default()
    };
    match gateway.services.provision(asker.request(message)).await {
        Ok(_) => Answer::created(&worded(find(&gateway, &asker, &id).await?)),
        Err(status) if status.code() == tonic::Code::AlreadyExists => {
            let stands = find(&gateway, &asker, &id).await?;
            if stands.display_name != name {
                let mut fault = Fault::from(status);
                fault.message = format!("tenant {id} exists already under another name");
                return Err(fault);
            }
            Answer::new(&worded(stands))
        }
        Err(status) => Err(status.into()),
    }
}

pub(super) async fn update(
    State(gateway): State<Gateway>,
    call: Call,
    id: Result<Path<String>, PathRejection>,
    body: Body,
) -> Done {
    let asker = gateway.operator(&call, Permission::Provision).await?;
    // For the answer: nothing may be done that can't be told.
    asker.must_hold(Permission::Read)?;
    let given: Given = gateway.json(&call, body).await?;
    must_be_absent(&[("parent_tenant_id", &given.parent_tenant_id)])?;
    let Path(id) = id.map_err(|error| Fault::invalid(error.body_text()))?;
    if given.tenant_id.as_ref().is_some_and(|named| *named != id) {
        return Err(Fault::field("tenant_id", "that of the path, or absent"));
    }
    if given
        .name
        .as_ref()
        .is_some_and(|name| name.trim().is_empty())
    {
        return Err(Fault::field("name", "1 to 256 characters, or absent"));
    }
    // Taken, and nothing to be done about.
    let kept = given.metadata.is_some() || given.reservation_expiry_policy.is_some();
    let (tenant, mask) = settings(given, &id);
    let reserves = |field: &&str| field.starts_with("cycles_compatible");
    if mask.is_empty() && !kept {
        return Err(Fault::invalid(
            "Validation failed: nothing is to be changed",
        ));
    }
    if mask.is_empty() || mask.iter().any(reserves) {
        let stands = find(&gateway, &asker, &id).await?;
        if mask.is_empty() {
            return Answer::new(&worded(stands));
        }
        if stands.cycles_compatible.is_none() {
            return Err(Fault::new(
                axum::http::StatusCode::CONFLICT,
                "INVALID_REQUEST",
                "ttl and extensions are set only for tenants that are cycles_compatible",
            ));
        }
    }
    let message = proto::ProvisionRequest {
        idempotency_key: fresh_key(),
        tenants: vec![tenant],
        update_mask: Some(pbjson_types::FieldMask {
            paths: mask.into_iter().map(str::to_owned).collect(),
        }),
        ..proto::ProvisionRequest::default()
    };
    let changed = gateway.services.provision(asker.request(message)).await;
    changed.map_err(|status| {
        let fault = Fault::from(status);
        match fault.error {
            "TENANT_CLOSED" => Fault::field("status", "CLOSED, or absent: it is so for good"),
            _ => fault,
        }
    })?;
    Answer::new(&worded(find(&gateway, &asker, &id).await?))
}

pub(super) async fn look_up(
    State(gateway): State<Gateway>,
    call: Call,
    id: Result<Path<String>, PathRejection>,
) -> Done {
    let asker = gateway.operator(&call, Permission::Read).await?;
    let Path(id) = id.map_err(|error| Fault::invalid(error.body_text()))?;
    Answer::new(&worded(find(&gateway, &asker, &id).await?))
}

#[derive(Debug, Deserialize)]
pub(super) struct Filters {
    status: Option<Status>,
    limit: Option<String>,
    cursor: Option<String>,
    parent_tenant_id: Option<String>,
    search: Option<String>,
    sort_by: Option<String>,
    sort_dir: Option<String>,
}

pub(super) async fn list(
    State(gateway): State<Gateway>,
    call: Call,
    filters: Params<Filters>,
) -> Done {
    let asker = gateway.operator(&call, Permission::Read).await?;
    let filters = params(filters)?;
    must_be_absent(&[
        ("parent_tenant_id", &filters.parent_tenant_id),
        ("search", &filters.search),
        ("sort_by", &filters.sort_by),
        ("sort_dir", &filters.sort_dir),
    ])?;
    let question = Question::new(&format!("tenants\0{:?}", filters.status));
    let message = proto::ListTenantsRequest {
        page_size: limit(filters.limit.as_ref())?,
        page_token: question.token(filters.cursor)?,
    };
    let page = gateway
        .services
        .list_tenants(asker.request(message))
        .await?;
    let page = page.into_inner();
    Answer::new(&Tenants {
        tenants: page
            .tenants
            .into_iter()
            .map(worded)
            .filter(|tenant| filters.status.is_none_or(|status| tenant.status == status))
            .collect(),
        next: question.next(&page.next_page_token),
    })
}
