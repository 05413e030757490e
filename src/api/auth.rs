//! Who calls. A [`Caller`] is made here and nowhere else.

use std::time::Duration;

use tokio::time::Instant;
use tonic::{Request, Status};

use super::layers::{Deadline, RequestIdentity};
use super::{fields::Fields, status};
use crate::domain::id::{KeyId, TenantId};
use crate::domain::key::{KeyText, StoredKey};
use crate::domain::permission::{Permission, Permissions};
use crate::domain::refusal::Refusal;
use crate::domain::request::Origin;
use crate::domain::scope::{ScopeFilter, Subject};
use crate::engine::{Call, Engine, EngineError};

/// How often the key of an answer that goes on is looked at again.
const LOOK: Duration = Duration::from_secs(1);

fn refused() -> Status {
    status::unauthenticated("API_KEY_INVALID", "the API key is not valid")
}

/// An authenticated caller.
#[derive(Debug)]
pub struct Caller {
    key: StoredKey,
    identity: RequestIdentity,
    deadline: Option<Instant>,
}

impl Caller {
    /// Authenticates a request, before anything of its message is looked at.
    pub async fn of<T>(
        engine: &Engine,
        request: &Request<T>,
        needs: Permission,
    ) -> Result<Self, Status> {
        let caller = Self::known(engine, request).await?;
        caller.must_hold(needs)?;
        Ok(caller)
    }

    /// Whose key it is, whatever that may do.
    pub async fn known<T>(engine: &Engine, request: &Request<T>) -> Result<Self, Status> {
        let header = request.metadata().get("authorization").ok_or_else(|| {
            status::unauthenticated(
                "API_KEY_MISSING",
                "an API key is needed: send it as `authorization: Bearer rmt_...`",
            )
        })?;
        let text = header.to_str().map_err(|_| refused())?;
        let token = match text.split_once(' ') {
            Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => token.trim(),
            _ => return Err(refused()),
        };
        let text = KeyText::parse(token).map_err(|_| refused())?;
        let key = engine.find_key(text.id()).await?;
        let key = key
            .filter(|key| key.admits(&text, engine.now()))
            .ok_or_else(refused)?;
        let extensions = request.extensions();
        let identity = extensions.get::<RequestIdentity>().cloned();
        Ok(Self {
            key,
            identity: identity.unwrap_or_else(RequestIdentity::generate),
            deadline: extensions.get::<Deadline>().map(|deadline| deadline.0),
        })
    }

    /// Refuses a key that lacks a permission.
    pub fn must_hold(&self, permission: Permission) -> Result<(), Status> {
        // A confined key is one agent's: it can't reach beyond its own subjects.
        let confinable = matches!(permission, Permission::Authority | Permission::Read);
        let fits = confinable || self.key.subject_prefix.is_none();
        if self.key.permissions.contains(permission) && fits {
            return Ok(());
        }
        let message = format!("the API key lacks PERMISSION_{permission}");
        Err(status::permission_missing(permission, message))
    }

    /// Refuses once the key is revoked or over: before each thing that is told by an answer
    /// that goes on. It is as the key was at most a second ago.
    pub async fn must_stand(&self, engine: &Engine) -> Result<(), Status> {
        if self.stands(engine).await? {
            Ok(())
        } else {
            Err(refused())
        }
    }

    /// Returns once the key is revoked or over, with what the caller is told then.
    pub async fn fallen(&self, engine: &Engine) -> Status {
        loop {
            tokio::time::sleep(LOOK).await;
            // What can't be read now is read again; nothing is told meanwhile.
            if let Ok(false) = self.stands(engine).await {
                return refused();
            }
        }
    }

    async fn stands(&self, engine: &Engine) -> Result<bool, EngineError> {
        let key = engine.find_key(&self.key.id).await?;
        Ok(key.is_some_and(|key| {
            key.secret_sha256 == self.key.secret_sha256 && key.in_force(engine.now())
        }))
    }

    /// What the engine is told of the caller.
    pub fn call(&self) -> Call {
        Call {
            origin: Origin {
                key: Some(self.key.id.clone()),
                confinement: self.key.subject_prefix.clone(),
                request_id: self.identity.request_id.clone(),
                trace_id: self.identity.trace_id.clone(),
            },
            deadline: self.deadline,
        }
    }

    /// The public part of the key.
    pub fn key_id(&self) -> &KeyId {
        &self.key.id
    }

    /// The tenant that the key belongs to; nothing for an operator's.
    pub fn tenant(&self) -> Option<&TenantId> {
        self.key.tenant.as_ref()
    }

    /// What the key may do.
    pub fn permissions(&self) -> Permissions {
        self.key.permissions
    }

    /// Groups that the key speaks for when it decides on approvals.
    pub fn approver_groups(&self) -> &[Box<str>] {
        &self.key.approver_groups
    }

    /// Subjects that the key is confined to.
    pub fn confinement(&self) -> Option<&ScopeFilter> {
        self.key.subject_prefix.as_ref()
    }

    /// The chain that a document's key is pinned in.
    pub fn chain(&self) -> TenantId {
        self.key.tenant.clone().unwrap_or_else(TenantId::system)
    }

    /// The tenant that a message names, else the key's own; an operator may also
    /// name the operators' own chain. [`Self::may_see`] comes after it.
    pub fn chain_in(&self, fields: &mut Fields, field: &str, named: &str) -> Option<TenantId> {
        let system = TenantId::system();
        if self.key.tenant.is_none() && named.eq_ignore_ascii_case(system.as_str()) {
            return Some(system);
        }
        fields.tenant(field, named, self.key.tenant.as_ref())
    }

    /// Whether a tenant is the caller's to see. Another one than the key's is one
    /// that does not exist.
    pub fn may_see(&self, tenant: &TenantId) -> Result<(), Status> {
        match &self.key.tenant {
            Some(own) if own != tenant => Err(status::of_refusal(&Refusal::TenantNotFound)),
            _ => Ok(()),
        }
    }

    /// Whether the caller may act for a subject.
    pub fn may_act_for(&self, subject: &Subject) -> Result<(), Status> {
        self.may_see(&subject.tenant)?;
        match &self.key.subject_prefix {
            Some(prefix) if !prefix.matches(subject) => Err(status::denied(
                "SCOPE_NOT_PERMITTED",
                format!("the API key may only act for {}", prefix.as_str()),
                &[("subject_prefix", prefix.as_str().to_owned())],
            )),
            _ => Ok(()),
        }
    }

    /// Filters of a list: what was asked for, and what the key is confined to.
    pub fn filters(&self, asked: Option<ScopeFilter>) -> Vec<ScopeFilter> {
        asked
            .into_iter()
            .chain(self.key.subject_prefix.clone())
            .collect()
    }
}
