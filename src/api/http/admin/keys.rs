//! API keys, and what the protocol calls their permissions.

use std::collections::BTreeSet;

use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use serde::{Deserialize, Serialize};
use tonic::Status;

use super::super::call::{Answer, Call};
use super::super::problem::Fault;
use super::super::runtime::fresh_key;
use super::super::strict::Free;
use super::super::{Gateway, wire};
use super::{Done, Params, Question, iso, limit, must_be_absent, params, stamp, time};
use crate::api::status::of_refusal;
use crate::domain::id::TenantId;
use crate::domain::permission::{Permission, Permissions};
use crate::domain::refusal::Refusal;
use crate::domain::tenant::TenantState;
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

/// What a permission of the protocol lets a key do. Those for what Remit leaves out, and
/// for what only operators do, let it do nothing; none lets it lift a stop.
fn meant(name: &str) -> Option<&'static [Permission]> {
    use Permission::{Audit, Authority, Fund, ManageKeys, Provision, Read};
    Some(match name {
        "reservations:create"
        | "reservations:commit"
        | "reservations:release"
        | "reservations:extend" => &[Authority],
        "reservations:list" | "balances:read" | "budgets:read" | "admin:read"
        | "admin:tenants:read" | "admin:budgets:read" => &[Read],
        "budgets:write" | "admin:write" | "admin:budgets:write" => &[Read, Provision, Fund],
        "admin:apikeys:read" | "admin:apikeys:write" => &[ManageKeys],
        "admin:audit:read" => &[Audit],
        "admin:tenants:write"
        | "policies:read"
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

/// What the protocol calls what a key may do; of an operator's also what is not a tenant's.
pub(super) fn named(held: Permissions, operates: bool) -> Vec<&'static str> {
    use Permission::{Audit, Authority, Fund, ManageKeys, Provision, Read};
    let may = |needs: &[Permission]| needs.iter().all(|one| held.contains(*one));
    let tenants: [(&[_], &[&str]); 5] = [
        (&[Authority], &DEFAULT[..4]),
        (
            &[Read],
            &["reservations:list", "balances:read", "budgets:read"],
        ),
        (&[Read, Provision, Fund], &["budgets:write"]),
        (&[ManageKeys], &["admin:apikeys:write"]),
        (&[Audit], &["admin:audit:read"]),
    ];
    let operators: [(&[_], &[&str]); 3] = [
        (&[Read], &["admin:tenants:read", "admin:budgets:read"]),
        (&[Read, Provision], &["admin:tenants:write"]),
        (&[Read, Provision, Fund], &["admin:budgets:write"]),
    ];
    let operators = operators.into_iter().filter(|_| operates);
    tenants
        .into_iter()
        .chain(operators)
        .filter(|(needs, _)| may(needs))
        .flat_map(|(_, names)| names.iter().copied())
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
    let held = key.permissions().filter_map(held).collect();
    let permissions = named(held, key.tenant.is_empty());
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
        scope_filter: (!key.subject_prefix.is_empty()).then(|| vec![key.subject_prefix]),
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

/// Refuses a tenant that is over. By the engine, since a key that makes keys need not be one
/// that reads tenants; a tenant that does not exist is the service's to refuse.
async fn must_be_open(gateway: &Gateway, tenant: &str) -> Result<(), Fault> {
    let Ok(tenant) = TenantId::parse(tenant) else {
        return Ok(());
    };
    let found = gateway.services.engine().tenant(&tenant).await;
    match found.map_err(Status::from)? {
        Some(found) if found.settings.state == TenantState::Closed => {
            Err(of_refusal(&Refusal::TenantClosed).into())
        }
        _ => Ok(()),
    }
}

/// What a key's subjects must have. In the protocol each entry of a filter lets more
/// subjects in; a key of Remit's is confined to one path.
fn confinement(filters: Vec<String>) -> Result<String, Fault> {
    if filters.iter().any(|filter| filter.trim().is_empty()) {
        // A variable that was not set: without it the key would be anybody's.
        return Err(Fault::field("scope_filter", "free of blank entries"));
    }
    if filters.iter().any(|filter| filter.contains('*')) {
        return Err(Fault::not_implemented("a scope_filter with wildcards"));
    }
    let mut filters = filters.into_iter();
    match (filters.next(), filters.next()) {
        (None, _) => Ok(String::new()),
        (Some(only), None) => Ok(only),
        (Some(_), Some(_)) => Err(Fault::field(
            "scope_filter",
            "one entry, such as workspace:prod/agent:bot: of several each would let subjects \
             in by itself, and a key is confined to one path",
        )),
    }
}

pub(super) async fn create(State(gateway): State<Gateway>, call: Call, body: Body) -> Done {
    let asker = gateway.operator(&call, Permission::ManageKeys).await?;
    let given: Given = gateway.json(&call, body).await?;
    // Without a tenant it would be an operator's.
    if given.tenant_id.is_empty() {
        return Err(Fault::field("tenant_id", "given"));
    }
    if given.name.trim().is_empty() {
        return Err(Fault::field("name", "1 to 256 characters"));
    }
    must_be_open(&gateway, &given.tenant_id).await?;
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
        permissions.extend(meant.iter().map(|permission| permission.as_str()));
    }
    if permissions.is_empty() {
        let wants = format!(
            "such that the key can do something: here {} lets it do nothing",
            asked.join(", ")
        );
        return Err(Fault::field("permissions", &wants));
    }
    let subject_prefix = confinement(given.scope_filter.unwrap_or_default())?;
    let confinable = [Permission::Authority, Permission::Read].map(Permission::as_str);
    if !subject_prefix.is_empty() && permissions.iter().any(|one| !confinable.contains(one)) {
        return Err(Fault::field(
            "permissions",
            "those of agents (reservations:*, balances:read, budgets:read) together with \
             scope_filter: budgets:write and admin permissions are not confined by it",
        ));
    }
    let permissions = permissions.into_iter().map(|permission| {
        let name = format!("PERMISSION_{permission}");
        proto::Permission::from_str_name(&name).map_or(0, i32::from)
    });
    let expires = match &given.expires_at {
        Some(text) => time("expires_at", text)?,
        None => jiff::Timestamp::now()
            .checked_add(jiff::SignedDuration::from_hours(LIFE_DAYS * 24))
            .map_err(|_| Fault::internal())?,
    };
    let message = proto::CreateApiKeyRequest {
        idempotency_key: fresh_key(),
        api_key: Some(proto::ApiKey {
            tenant: given.tenant_id,
            display_name: given.name,
            permissions: permissions.collect(),
            subject_prefix,
            expire_time: Some(stamp(expires)),
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
    let asker = gateway.operator(&call, Permission::ManageKeys).await?;
    let filters = params(filters)?;
    must_be_absent(&[
        ("search", &filters.search),
        ("sort_by", &filters.sort_by),
        ("sort_dir", &filters.sort_dir),
    ])?;
    let status = filters.status;
    if let Some(status) = &status
        && !["ACTIVE", "REVOKED", "EXPIRED"].contains(&status.as_str())
    {
        return Err(Fault::field("status", "one of ACTIVE, REVOKED, EXPIRED"));
    }
    let question = Question::new(&format!("keys\0{status:?}"));
    let message = proto::ListApiKeysRequest {
        tenant: filters.tenant_id.unwrap_or_default(),
        page_size: limit(filters.limit.as_ref())?,
        page_token: question.token(filters.cursor)?,
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
        next: question.next(&page.next_page_token),
    })
}

/// Ends a key. The reason in the query is taken and kept nowhere.
pub(super) async fn revoke(
    State(gateway): State<Gateway>,
    call: Call,
    id: Result<Path<String>, PathRejection>,
) -> Done {
    let asker = gateway.operator(&call, Permission::ManageKeys).await?;
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
            assert!(named(held.collect(), false).contains(&name), "{name}");
        }
        for name in named(Permissions::all(), true) {
            assert!(meant(name).is_some(), "{name}");
        }
        let reads = Permissions::from_iter([Permission::Read]);
        let told = named(reads, true);
        assert!(told.contains(&"admin:tenants:read"), "{told:?}");
        assert!(
            told.iter().all(|name| !name.ends_with(":write")),
            "{told:?}"
        );
        assert_eq!(meant("everything"), None);
    }

    #[test]
    fn no_permission_of_the_protocol_lifts_a_stop() {
        let read = std::fs::read_to_string("docs/cycles-openapi.yaml").expect("the description");
        let names = read
            .lines()
            .filter_map(|line| line.trim().strip_prefix("- "));
        let known: Vec<_> = names
            .filter_map(|name| Some((name, meant(name)?)))
            .collect();
        assert_eq!(known.len(), 27, "{known:?}");
        for (name, meant) in known {
            assert!(!meant.contains(&Permission::Loosen), "{name}");
        }
    }

    #[test]
    fn a_filter_confines_to_one_path_or_is_refused() {
        let of = |filters: &[&str]| confinement(filters.iter().map(|f| (*f).to_owned()).collect());
        assert_eq!(of(&[]).expect("unconfined"), "");
        assert_eq!(of(&["agent:a"]).expect("a path"), "agent:a");
        for blank in [&[""][..], &[" "], &["agent:a", ""]] {
            assert_eq!(of(blank).expect_err("blank").status, 400);
        }
        let either = of(&["agent:a", "agent:b"]).expect_err("two of them");
        assert_eq!(
            (either.status.as_u16(), either.error),
            (400, "INVALID_REQUEST")
        );
    }
}
