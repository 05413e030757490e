//! API keys, asked for and in answers.

use tonic::Status;

use super::{rules, time};
use crate::api::fields::Fields;
use crate::domain::id::{IdempotencyKey, KeyId, TenantId};
use crate::domain::key::StoredKey;
use crate::domain::permission::{Permission, Permissions};
use crate::domain::scope::ScopeFilter;
use crate::domain::time::Timestamp;
use crate::proto;

/// A key as it was asked for, but for its random parts.
#[derive(Debug)]
pub struct AskedKey {
    /// Nothing for an operator's.
    pub tenant: Option<TenantId>,
    /// Makes a retry safe.
    pub idempotency_key: IdempotencyKey,
    /// For people.
    pub display_name: Box<str>,
    /// What it may do.
    pub permissions: Permissions,
    /// Subjects that it is confined to.
    pub subject_prefix: Option<ScopeFilter>,
    /// Groups that it speaks for.
    pub approver_groups: Vec<Box<str>>,
    /// When it ends by itself.
    pub expires_at: Option<Timestamp>,
}

/// Takes a CreateApiKeyRequest. A caller without a tenant may make another
/// operator's key.
pub fn create_api_key(
    message: proto::CreateApiKeyRequest,
    own: Option<&TenantId>,
    now: Timestamp,
) -> Result<AskedKey, Status> {
    let proto::CreateApiKeyRequest {
        idempotency_key,
        api_key,
    } = message;
    let mut fields = Fields::default();
    let idempotency_key = fields.key(&idempotency_key);
    let Some(proto::ApiKey {
        key_id,
        tenant,
        display_name,
        permissions,
        subject_prefix,
        expire_time,
        create_time: _,
        revoke_time: _,
        approver_groups,
    }) = api_key
    else {
        fields.bad("api_key", "given");
        return fields.finish(None);
    };
    if !key_id.is_empty() {
        fields.bad("api_key.key_id", "empty: the server makes it");
    }
    let tenant = match (tenant.as_str(), own) {
        ("", None) => None,
        (named, _) => fields.tenant("api_key.tenant", named, own),
    };
    let display_name = fields.title("api_key.display_name", display_name);
    let mut set = Vec::new();
    for (at, value) in permissions.iter().enumerate() {
        match parse_permission(*value) {
            Some(permission) => set.push(permission),
            None => fields.bad(format!("api_key.permissions[{at}]"), "a known Permission"),
        }
    }
    if permissions.is_empty() {
        fields.bad("api_key.permissions", "at least one Permission");
    }
    let prefix = match subject_prefix.as_str() {
        "" => None,
        text => fields.take("api_key.subject_prefix", ScopeFilter::parse(text)),
    };
    let confinable = |p: &Permission| matches!(p, Permission::Authority | Permission::Read);
    if prefix.is_some() && !set.iter().all(confinable) {
        fields.bad(
            "api_key.permissions",
            "only PERMISSION_AUTHORITY and PERMISSION_READ together with subject_prefix",
        );
    }
    let approver_groups = rules::groups(&mut fields, "api_key.approver_groups", approver_groups);
    if !approver_groups.is_empty() && !set.contains(&Permission::Approve) {
        fields.bad(
            "api_key.approver_groups",
            "empty without PERMISSION_APPROVE",
        );
    }
    let expires_at = fields.time("api_key.expire_time", expire_time);
    if expires_at.is_some_and(|at| at <= now) {
        fields.bad("api_key.expire_time", "in the future");
    }
    let made = idempotency_key.map(|idempotency_key| AskedKey {
        tenant,
        idempotency_key,
        display_name,
        permissions: set.into_iter().collect(),
        subject_prefix: prefix,
        approver_groups,
        expires_at,
    });
    fields.finish(made)
}

fn parse_permission(value: i32) -> Option<Permission> {
    match proto::Permission::try_from(value) {
        Ok(proto::Permission::Authority) => Some(Permission::Authority),
        Ok(proto::Permission::Read) => Some(Permission::Read),
        Ok(proto::Permission::Provision) => Some(Permission::Provision),
        Ok(proto::Permission::Loosen) => Some(Permission::Loosen),
        Ok(proto::Permission::Fund) => Some(Permission::Fund),
        Ok(proto::Permission::ManageKeys) => Some(Permission::ManageKeys),
        Ok(proto::Permission::Audit) => Some(Permission::Audit),
        Ok(proto::Permission::Approve) => Some(Permission::Approve),
        Ok(proto::Permission::Unspecified) | Err(_) => None,
    }
}

fn permission(permission: Permission) -> proto::Permission {
    match permission {
        Permission::Authority => proto::Permission::Authority,
        Permission::Read => proto::Permission::Read,
        Permission::Provision => proto::Permission::Provision,
        Permission::Loosen => proto::Permission::Loosen,
        Permission::Fund => proto::Permission::Fund,
        Permission::ManageKeys => proto::Permission::ManageKeys,
        Permission::Audit => proto::Permission::Audit,
        Permission::Approve => proto::Permission::Approve,
    }
}

/// Words a key, without its secret.
pub fn api_key(key: &StoredKey) -> proto::ApiKey {
    proto::ApiKey {
        key_id: key.id.to_string(),
        tenant: key
            .tenant
            .as_ref()
            .map_or_else(String::new, TenantId::to_string),
        display_name: key.display_name.to_string(),
        permissions: key
            .permissions
            .iter()
            .map(|p| permission(p).into())
            .collect(),
        subject_prefix: key
            .subject_prefix
            .as_ref()
            .map_or_else(String::new, |prefix| prefix.as_str().to_owned()),
        expire_time: key.expires_at.map(time),
        create_time: Some(time(key.created_at)),
        revoke_time: key.revoked_at.map(time),
        approver_groups: key
            .approver_groups
            .iter()
            .map(ToString::to_string)
            .collect(),
    }
}

/// Takes a key's id.
pub fn key_id(text: &str) -> Result<KeyId, Status> {
    let mut fields = Fields::default();
    let id = fields.take("key_id", KeyId::parse(text));
    fields.finish(id)
}
