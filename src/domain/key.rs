//! API keys: `rmt_<id>_<secret>`. The secret is 256 random bits, shown once and
//! kept as its SHA-256. A slow hash would protect nothing here, since there is
//! nothing to guess, and would let anyone load the server with bad keys.

use std::fmt;

use subtle::ConstantTimeEq as _;

use super::id::{KeyId, Malformed, TenantId};
use super::ledger::KeyRecord;
use super::permission::Permissions;
use super::request::Digest;
use super::scope::ScopeFilter;
use super::time::Timestamp;

const PREFIX: &str = "rmt_";

/// A key's whole text, secret included. Has no way into a log.
#[derive(Clone)]
pub struct KeyText {
    id: KeyId,
    secret: String,
}

impl KeyText {
    /// Makes a key from random bytes.
    pub fn from_random(id: [u8; 10], secret: [u8; 32]) -> Self {
        Self {
            // Hex digits are what a key id is made of.
            id: KeyId::parse(&hex::encode(id)).expect("hex digits are a key id"),
            secret: hex::encode(secret),
        }
    }

    /// Parses `rmt_<id>_<secret>`.
    pub fn parse(text: &str) -> Result<Self, Malformed> {
        let wants = || Malformed::new("a key of the form rmt_<id>_<secret>");
        let (id, secret) = text
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split_once('_'))
            .ok_or_else(wants)?;
        let is_secret = secret.len() == 64 && secret.bytes().all(|b| b.is_ascii_hexdigit());
        if !is_secret {
            return Err(wants());
        }
        Ok(Self {
            id: KeyId::parse(id).map_err(|_| wants())?,
            secret: secret.to_owned(),
        })
    }

    /// The public part.
    pub fn id(&self) -> &KeyId {
        &self.id
    }

    /// What is stored of the secret.
    pub fn secret_sha256(&self) -> Digest {
        Digest::of(self.secret.as_bytes())
    }

    /// The whole text, to be shown once.
    pub fn expose(&self) -> String {
        format!("{PREFIX}{}_{}", self.id, self.secret)
    }
}

impl fmt::Debug for KeyText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}_…", self.id)
    }
}

/// A key that is to be made.
#[derive(Debug, Clone)]
pub struct NewKey {
    /// The public part.
    pub id: KeyId,
    /// Nothing for an operator's.
    pub tenant: Option<TenantId>,
    /// For people.
    pub display_name: Box<str>,
    /// What it may do.
    pub permissions: Permissions,
    /// Subjects that it is confined to.
    pub subject_prefix: Option<ScopeFilter>,
    /// Groups that it speaks for when it decides on approvals.
    pub approver_groups: Vec<Box<str>>,
    /// What is stored of the secret.
    pub secret_sha256: Digest,
    /// When it ends by itself.
    pub expires_at: Option<Timestamp>,
}

impl NewKey {
    /// The tenant whose chain records it.
    pub fn chain(&self) -> TenantId {
        self.tenant.clone().unwrap_or_else(TenantId::system)
    }

    /// What the ledger records of it.
    pub fn record(&self) -> KeyRecord {
        KeyRecord {
            key_id: self.id.clone(),
            display_name: self.display_name.clone(),
            permissions: self.permissions.iter().map(|p| p.as_str().into()).collect(),
            subject_prefix: self.subject_prefix.as_ref().map(|f| f.as_str().into()),
            approver_groups: self.approver_groups.clone(),
            expires_at: self.expires_at,
        }
    }
}

/// A key as it is stored.
#[derive(Debug, Clone)]
pub struct StoredKey {
    /// The public part.
    pub id: KeyId,
    /// Nothing for an operator's.
    pub tenant: Option<TenantId>,
    /// For people.
    pub display_name: Box<str>,
    /// What it may do.
    pub permissions: Permissions,
    /// Subjects that it is confined to.
    pub subject_prefix: Option<ScopeFilter>,
    /// Groups that it speaks for when it decides on approvals.
    pub approver_groups: Vec<Box<str>>,
    /// SHA-256 of the secret.
    pub secret_sha256: Digest,
    /// When it ends by itself.
    pub expires_at: Option<Timestamp>,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it was revoked.
    pub revoked_at: Option<Timestamp>,
}

impl StoredKey {
    /// Whether this is the key, and in force. Takes the same time for every
    /// wrong secret.
    pub fn admits(&self, text: &KeyText, now: Timestamp) -> bool {
        let same: bool = self.secret_sha256.0.ct_eq(&text.secret_sha256().0).into();
        same & self.in_force(now)
    }

    /// Whether it is neither revoked nor over.
    pub fn in_force(&self, now: Timestamp) -> bool {
        self.revoked_at.is_none() && self.expires_at.is_none_or(|expires| now < expires)
    }
}
