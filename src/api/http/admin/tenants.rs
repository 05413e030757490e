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
use super::{Done, Params, iso, limit, must_be_absent, params};
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
    #[serde(
        default,
        rename = "reservation_expiry_policy",
        deserialize_with = "word_or_none"
    )]
    _reservation_expiry_policy: Option<ExpiryPolicy>,
    /// Taken and kept nowhere.
    #[serde(rename = "metadata")]
    _metadata: Option<Free>,
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

/// The settings that are given, over those that stand, and the names of what changes.
fn settled(given: Given, stands: proto::Tenant) -> (proto::Tenant, Vec<String>) {
    let mut tenant = stands;
    let mut mask = Vec::new();
    if let Some(name) = given.name {
        tenant.display_name = name;
        mask.push("display_name".to_owned());
    }
    if let Some(status) = given.status {
        let state = match status {
            Status::Active => proto::TenantState::Active,
            Status::Suspended => proto::TenantState::Suspended,
            Status::Closed => proto::TenantState::Closed,
        };
        tenant.state = state.into();
        mask.push("state".to_owned());
    }
    if let Some(policy) = given.default_commit_overage_policy {
        tenant.default_overage_policy = translate::overage_policy(Some(policy));
        mask.push("default_overage_policy".to_owned());
    }
    let ttls = (
        given.default_reservation_ttl_ms,
        given.max_reservation_ttl_ms,
    );
    if ttls != (None, None) || given.max_reservation_extensions.is_some() {
        let rules = tenant.cycles_compatible.get_or_insert_default();
        if let Some(ttl) = ttls.0 {
            rules.default_ttl = Some(translate::duration(ttl));
        }
        if let Some(ttl) = ttls.1 {
            rules.max_ttl = Some(translate::duration(ttl));
        }
        if let Some(count) = given.max_reservation_extensions {
            rules.max_extensions = Some(count);
        }
        mask.push("cycles_compatible".to_owned());
    }
    (tenant, mask)
}

async fn find(gateway: &Gateway, asker: &Asker, tenant: &str) -> Result<proto::Tenant, Fault> {
    let message = proto::GetTenantRequest {
        tenant: tenant.to_owned(),
    };
    let found = gateway.services.get_tenant(asker.request(message)).await?;
    Ok(found.into_inner().tenant.unwrap_or_default())
}

pub(super) async fn create(State(gateway): State<Gateway>, call: Call, body: Body) -> Done {
    let asker = gateway.either(&call, Permission::Provision).await?;
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
    let fresh = proto::Tenant {
        tenant: id.clone(),
        cycles_compatible: Some(proto::CyclesRules::default()),
        ..proto::Tenant::default()
    };
    let (tenant, _) = settled(given, fresh);
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
    let asker = gateway.either(&call, Permission::Provision).await?;
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
    let stands = find(&gateway, &asker, &id).await?;
    let native = stands.cycles_compatible.is_none();
    let (tenant, mask) = settled(given, stands);
    // It would give up default-deny with them.
    if native && mask.iter().any(|field| field == "cycles_compatible") {
        return Err(Fault::new(
            axum::http::StatusCode::CONFLICT,
            "INVALID_REQUEST",
            "ttl and extensions are set only for tenants that are cycles_compatible",
        ));
    }
    if mask.is_empty() {
        return Err(Fault::invalid(
            "Validation failed: nothing is to be changed",
        ));
    }
    let message = proto::ProvisionRequest {
        idempotency_key: fresh_key(),
        tenants: vec![proto::Tenant {
            create_time: None,
            ..tenant
        }],
        update_mask: Some(pbjson_types::FieldMask { paths: mask }),
        ..proto::ProvisionRequest::default()
    };
    gateway.services.provision(asker.request(message)).await?;
    Answer::new(&worded(find(&gateway, &asker, &id).await?))
}

pub(super) async fn look_up(
    State(gateway): State<Gateway>,
    call: Call,
    id: Result<Path<String>, PathRejection>,
) -> Done {
    let asker = gateway.either(&call, Permission::Read).await?;
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
    let asker = gateway.either(&call, Permission::Read).await?;
    let filters = params(filters)?;
    must_be_absent(&[
        ("parent_tenant_id", &filters.parent_tenant_id),
        ("search", &filters.search),
        ("sort_by", &filters.sort_by),
        ("sort_dir", &filters.sort_dir),
    ])?;
    let message = proto::ListTenantsRequest {
        page_size: limit(filters.limit.as_ref())?,
        page_token: filters.cursor.unwrap_or_default(),
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
        next: page.next_page_token.into(),
    })
}
