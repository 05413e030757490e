//! API keys, and what the protocol calls their permissions.

use std::collections::BTreeSet;

use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use serde::{Deserialize, Serialize};

use super::super::call::{Answer, Call};
use super::super::problem::Fault;
use super::super::runtime::fresh_key;
use super::super::strict::Free;
use super::super::{Gateway, wire};
use super::{Done, Params, iso, limit, must_be_absent, params};
use crate::domain::permission::Permission;
use crate::proto;
use crate::proto::provisioning_server::Provisioning as _;

/// How long a key lives that names no end, as in the original.
const LIFE_DAYS: i64 = 90;
/// What a key may do that names nothing, as in the original.
const DEFAULT: [&str; 6] = [
    "reservations:create",
    "reservations:commit",
    "reservations:release",
    "reservations:extend",
    "reservations:list",
    "balances:read",
];

/// What a permission of the protocol lets a key do. Those for what Remit leaves out let it
/// do nothing.
fn meant(name: &str) -> Option<&'static [Permission]> {
    use Permission::{Audit, Authority, Fund, Loosen, ManageKeys, Provision, Read};
    Some(match name {
        "reservations:create"
        | "reservations:commit"
        | "reservations:release"
        | "reservations:extend" => &[Authority],
        "reservations:list" | "balances:read" | "budgets:read" | "admin:read"
        | "admin:tenants:read" | "admin:budgets:read" => &[Read],
        "budgets:write" | "admin:write" => &[Read, Provision, Fund],
        "admin:tenants:write" | "admin:budgets:write" => &[Read, Provision, Loosen, Fund],
        "admin:apikeys:read" | "admin:apikeys:write" => &[ManageKeys],
        "admin:audit:read" => &[Audit],
        "policies:read"
        | "policies:write"
        | "webhooks:read"
        | "webhooks:write"
        | "events:read"
        | "admin:policies:read"
        | "admin:policies:write"
        | "admin:webhooks:read"
        | "admin:webhooks:write"
        | "admin:events:read" => &[],
        _ => return None,
    })
}

/// What the protocol calls what a key may do.
pub(super) fn named(held: impl Iterator<Item = Permission>) -> Vec<&'static str> {
    held.flat_map(|permission| -> &'static [&'static str] {
        match permission {
            Permission::Authority => &DEFAULT[..4],
            Permission::Read => &["reservations:list", "balances:read", "budgets:read"],
            Permission::Provision => &["budgets:write"],
            Permission::ManageKeys => &["admin:apikeys:write"],
            Permission::Audit => &["admin:audit:read"],
            Permission::Loosen | Permission::Fund | Permission::Approve => &[],
        }
    })
    .copied()
    .collect()
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Given {
    tenant_id: String,
    name: String,
    permissions: Option<Vec<String>>,
    scope_filter: Option<Vec<String>>,
    expires_at: Option<String>,
    /// Taken and kept nowhere.
    #[serde(rename = "description")]
    _description: Option<String>,
    /// Taken and kept nowhere.
    #[serde(rename = "metadata")]
    _metadata: Option<Free>,
}

/// A key that was made.
#[derive(Debug, Serialize)]
struct Created {
    key_id: String,
    /// The whole key, shown once.
    key_secret: String,
    key_prefix: String,
    tenant_id: String,
    permissions: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    created_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at: Option<String>,
}

/// A key, without its secret.
#[derive(Debug, Serialize)]
struct Key {
    key_id: String,
    key_prefix: String,
    tenant_id: String,
    name: String,
    status: &'static str,
    permissions: Vec<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    scope_filter: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    created_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    revoked_at: Option<String>,
}

#[derive(Debug, Serialize)]
struct Keys {
    keys: Vec<Key>,
    #[serde(flatten)]
    next: wire::Next,
}

fn prefix(key_id: &str) -> String {
    format!("rmt_{key_id}")
}

fn worded(key: proto::ApiKey) -> Key {
    let held = key.permissions().filter_map(held);
    let permissions = named(held);
    let over = key.expire_time.is_some_and(|at| {
        jiff::Timestamp::new(at.seconds, at.nanos).is_ok_and(|at| at <= jiff::Timestamp::now())
    });
    Key {
        key_prefix: prefix(&key.key_id),
        permissions,
        status: match (&key.revoke_time, over) {
            (Some(_), _) => "REVOKED",
            (None, true) => "EXPIRED",
            (None, false) => "ACTIVE",
        },
        scope_filter: (!key.subject_prefix.is_empty()).then(|| {
            let pairs = key.subject_prefix.split('/');
            pairs.map(str::to_owned).collect()
        }),
        created_at: iso(key.create_time.as_ref()),
        expires_at: iso(key.expire_time.as_ref()),
        revoked_at: iso(key.revoke_time.as_ref()),
        key_id: key.key_id,
        tenant_id: key.tenant,
        name: key.display_name,
    }
}

fn held(permission: proto::Permission) -> Option<Permission> {
    let name = permission.as_str_name();
    Permission::parse(name.strip_prefix("PERMISSION_")?).ok()
}

pub(super) async fn create(State(gateway): State<Gateway>, call: Call, body: Body) -> Done {
    let asker = gateway.either(&call, Permission::ManageKeys).await?;
    let given: Given = gateway.json(&call, body).await?;
    // Without a tenant it would be an operator's.
    if given.tenant_id.is_empty() {
        return Err(Fault::field("tenant_id", "given"));
    }
    if given.name.trim().is_empty() {
        return Err(Fault::field("name", "1 to 256 characters"));
    }
    let asked = given.permissions.unwrap_or_default();
    let asked = match asked.is_empty() {
        true => DEFAULT.map(str::to_owned).to_vec(),
        false => asked,
    };
    let mut permissions = BTreeSet::new();
    for name in &asked {
        let meant = meant(name).ok_or_else(|| {
            Fault::field(
                "permissions",
                &format!("made of known permissions: {name} is none"),
            )
        })?;
        permissions.extend(meant.iter().map(|permission| {
            let name = format!("PERMISSION_{permission}");
            proto::Permission::from_str_name(&name).map_or(0, i32::from)
        }));
    }
    let filters = given.scope_filter.unwrap_or_default();
    if filters.iter().any(|filter| filter.contains('*')) {
        return Err(Fault::not_implemented("a scope_filter with wildcards"));
    }
    let expires = match &given.expires_at {
        Some(text) => text
            .parse()
            .map_err(|_| Fault::field("expires_at", "a time such as 2026-01-31T12:00:00Z"))?,
        None => jiff::Timestamp::now()
            .checked_add(jiff::SignedDuration::from_hours(LIFE_DAYS * 24))
            .map_err(|_| Fault::internal())?,
    };
    let message = proto::CreateApiKeyRequest {
        idempotency_key: fresh_key(),
        api_key: Some(proto::ApiKey {
            tenant: given.tenant_id,
            display_name: given.name,
            permissions: permissions.into_iter().collect(),
            subject_prefix: filters.join("/"),
            expire_time: Some(pbjson_types::Timestamp {
                seconds: expires.as_second(),
                nanos: expires.subsec_nanosecond(),
            }),
            ..proto::ApiKey::default()
        }),
    };
    let made = gateway
        .services
        .create_api_key(asker.request(message))
        .await?;
    let made = made.into_inner();
    let key = made.api_key.unwrap_or_default();
    Answer::created(&Created {
        key_prefix: prefix(&key.key_id),
        created_at: iso(key.create_time.as_ref()),
        expires_at: iso(key.expire_time.as_ref()),
        key_id: key.key_id,
        key_secret: made.secret,
        tenant_id: key.tenant,
        permissions: asked,
    })
}

#[derive(Debug, Deserialize)]
pub(super) struct Filters {
    tenant_id: Option<String>,
    status: Option<String>,
    search: Option<String>,
    sort_by: Option<String>,
    sort_dir: Option<String>,
    limit: Option<String>,
    cursor: Option<String>,
}

pub(super) async fn list(
    State(gateway): State<Gateway>,
    call: Call,
    filters: Params<Filters>,
) -> Done {
    let asker = gateway.either(&call, Permission::ManageKeys).await?;
    let filters = params(filters)?;
    must_be_absent(&[
        ("search", &filters.search),
        ("sort_by", &filters.sort_by),
        ("sort_dir", &filters.sort_dir),
    ])?;
    let status = filters.status.filter(|status| !status.is_empty());
    if let Some(status) = &status
        && !["ACTIVE", "REVOKED", "EXPIRED"].contains(&status.as_str())
    {
        return Err(Fault::field("status", "one of ACTIVE, REVOKED, EXPIRED"));
    }
    let message = proto::ListApiKeysRequest {
        tenant: filters.tenant_id.unwrap_or_default(),
        page_size: limit(filters.limit.as_ref())?,
        page_token: filters.cursor.unwrap_or_default(),
    };
    let page = gateway
        .services
        .list_api_keys(asker.request(message))
        .await?;
    let page = page.into_inner();
    Answer::new(&Keys {
        keys: page
            .api_keys
            .into_iter()
            .map(worded)
            .filter(|key| status.as_ref().is_none_or(|status| key.status == status))
            .collect(),
        next: page.next_page_token.into(),
    })
}

/// Ends a key. The reason in the query is taken and kept nowhere.
pub(super) async fn revoke(
    State(gateway): State<Gateway>,
    call: Call,
    id: Result<Path<String>, PathRejection>,
) -> Done {
    let asker = gateway.either(&call, Permission::ManageKeys).await?;
    let Path(key_id) = id.map_err(|error| Fault::invalid(error.body_text()))?;
    let message = proto::RevokeApiKeyRequest { key_id };
    let ended = gateway
        .services
        .revoke_api_key(asker.request(message))
        .await?;
    Answer::new(&worded(ended.into_inner().api_key.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_told_no_more_than_it_was_given() {
        for name in DEFAULT {
            let held = meant(name).expect("a permission").iter().copied();
            assert!(named(held).contains(&name), "{name}");
        }
        let all = Permission::ALL.iter().copied();
        for name in named(all) {
            assert!(meant(name).is_some(), "{name}");
        }
        assert_eq!(meant("everything"), None);
    }
}
