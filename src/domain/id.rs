//! Identifiers. Each is its own type, made only by parsing or by the rule that
//! its constructor names, so that none can be taken for another.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest, Sha256};

/// Longest identifier, in bytes.
pub const NAME_BYTES_MAX: usize = 128;

/// What an identifier looks like, in the words that errors use.
pub const NAME_RULE: &str = "1 to 128 characters of a-z, A-Z, 0-9, '_', '.', '-'";

/// Says what was wanted where a value could not be taken. The caller knows the
/// field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub String);

impl Malformed {
    /// `wants` completes the sentence "the field must be …".
    pub fn new(wants: impl Into<String>) -> Self {
        Self(wants.into())
    }
}

fn is_name(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= NAME_BYTES_MAX
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

/// An identifier as it was written. Two names are equal when they differ only in
/// case; the spelling is kept for display.
#[derive(Clone)]
pub struct Name {
    display: Box<str>,
    /// Only where lower case differs from `display`.
    canonical: Option<Box<str>>,
}

impl Name {
    /// Parses `^[a-zA-Z0-9_.-]{1,128}$`.
    pub fn parse(text: &str) -> Result<Self, Malformed> {
        if !is_name(text) {
            return Err(Malformed::new(NAME_RULE));
        }
        let canonical = text
            .bytes()
            .any(|b| b.is_ascii_uppercase())
            .then(|| text.to_ascii_lowercase().into());
        Ok(Self {
            display: text.into(),
            canonical,
        })
    }

    /// As it was written.
    pub fn display(&self) -> &str {
        &self.display
    }

    /// In lower case: what is compared and stored in scopes.
    pub fn canonical(&self) -> &str {
        self.canonical.as_deref().unwrap_or(&self.display)
    }
}

impl PartialEq for Name {
    fn eq(&self, other: &Self) -> bool {
        self.canonical() == other.canonical()
    }
}

impl Eq for Name {}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.display.fmt(f)
    }
}

impl Serialize for Name {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.display)
    }
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

/// A tenant's name, in lower case. The first part of every key in the database.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TenantId(Arc<str>);

/// The chain of what belongs to no tenant: operators' keys and documents.
const SYSTEM_TENANT: &str = "_remit";

impl TenantId {
    /// Parses a name that a customer may bear: not the reserved `_remit`.
    pub fn parse(text: &str) -> Result<Self, Malformed> {
        let name = Name::parse(text)?;
        if name.canonical() == SYSTEM_TENANT {
            return Err(Malformed::new("a name other than the reserved _remit"));
        }
        Ok(Self(name.canonical().into()))
    }

    /// The chain of what belongs to no tenant.
    pub fn system() -> Self {
        Self(SYSTEM_TENANT.into())
    }

    /// Takes back what `as_str` gave to the store.
    pub fn from_stored(text: &str) -> Result<Self, Malformed> {
        Ok(Self(Name::parse(text)?.canonical().into()))
    }

    /// Whether it is the chain of what belongs to no tenant.
    pub fn is_system(&self) -> bool {
        &*self.0 == SYSTEM_TENANT
    }

    /// In lower case.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for TenantId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for TenantId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::from_stored(&text).map_err(serde::de::Error::custom)
    }
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(
            Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number!(
    /// A budget's number within its tenant, from 1.
    BudgetNo(i32)
);
number!(
    /// A balance's number within its tenant, from 1.
    BalanceNo(i64)
);
number!(
    /// An entry's place in its tenant's chain, from 1 without a gap.
    Sequence(i64)
);

/// The methods whose idempotency keys are apart from each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Method {
    /// `Authority.Reserve`
    Reserve,
    /// `Authority.Commit`
    Commit,
    /// `Authority.Release`
    Release,
    /// `Authority.Extend`
    Extend,
    /// `Authority.Record`
    Record,
    /// `Provisioning.FundBudget`
    FundBudget,
    /// `Provisioning.Provision`
    Provision,
    /// `Provisioning.CreateApiKey`
    CreateApiKey,
    /// `Approvals.ResolveApproval`
    ResolveApproval,
}

impl Method {
    fn as_str(self) -> &'static str {
        match self {
            Self::Reserve => "Reserve",
            Self::Commit => "Commit",
            Self::Release => "Release",
            Self::Extend => "Extend",
            Self::Record => "Record",
            Self::FundBudget => "FundBudget",
            Self::Provision => "Provision",
            Self::CreateApiKey => "CreateApiKey",
            Self::ResolveApproval => "ResolveApproval",
        }
    }
}

/// What a caller names a request by, so that a retry is known as one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct IdempotencyKey(String);

impl IdempotencyKey {
    /// Longest key, in bytes.
    pub const BYTES_MAX: usize = 256;

    /// Parses 1 to 256 bytes without control characters.
    pub fn parse(text: &str) -> Result<Self, Malformed> {
        if text.is_empty() || text.len() > Self::BYTES_MAX || text.chars().any(char::is_control) {
            return Err(Malformed::new("1 to 256 bytes without control characters"));
        }
        Ok(Self(text.to_owned()))
    }

    /// As it was given.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// 128 bits of SHA-256 over tenant, method and idempotency key: the key that the
/// database enforces.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyHash([u8; 16]);

impl KeyHash {
    /// The hash of one key of one method of one tenant.
    pub fn of(tenant: &TenantId, method: Method, key: &IdempotencyKey) -> Self {
        // Neither a tenant nor a method can contain the separator.
        let digest = Sha256::new()
            .chain_update(b"remit.v1\0")
            .chain_update(tenant.as_str())
            .chain_update(b"\0")
            .chain_update(method.as_str())
            .chain_update(b"\0")
            .chain_update(key.as_str())
            .finalize();
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&digest[..16]);
        // The bits of a UUID of version 8 (RFC 9562: the maker's own layout), so
        // that the hash of a Reserve is its reservation's id as it stands.
        bytes[6] = (bytes[6] & 0x0f) | 0x80;
        bytes[8] = (bytes[8] & 0x3f) | 0x80;
        Self(bytes)
    }

    /// For the database.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// Takes back what `as_bytes` gave to the store.
    pub fn from_stored(bytes: &[u8]) -> Result<Self, Malformed> {
        bytes
            .try_into()
            .map(Self)
            .map_err(|_| Malformed::new("16 bytes"))
    }
}

impl fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

/// Names a reservation. Derived from the idempotency key of its Reserve, so that
/// the primary key of reservations is also the check for a repeated Reserve.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReservationId(KeyHash);

impl ReservationId {
    /// The reservation that a Reserve with this key makes.
    pub fn of(key: KeyHash) -> Self {
        Self(key)
    }

    /// Parses a UUID in any of its usual forms.
    pub fn parse(text: &str) -> Result<Self, Malformed> {
        uuid::Uuid::try_parse(text)
            .map(|id| Self(KeyHash(id.into_bytes())))
            .map_err(|_| Malformed::new("a reservation id as Reserve answered it (a UUID)"))
    }

    /// The hash of the key that made it.
    pub fn key_hash(&self) -> KeyHash {
        self.0
    }

    /// What is stored.
    pub fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }
}

impl fmt::Display for ReservationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        uuid::Uuid::from_bytes(self.0.0).hyphenated().fmt(f)
    }
}

impl fmt::Debug for ReservationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for ReservationId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ReservationId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

/// The public part of an API key.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct KeyId(String);

impl KeyId {
    /// Parses 1 to 64 lower-case letters and digits.
    pub fn parse(text: &str) -> Result<Self, Malformed> {
        let fits = !text.is_empty()
            && text.len() <= 64
            && text
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        if !fits {
            return Err(Malformed::new("1 to 64 characters of a-z, 0-9"));
        }
        Ok(Self(text.to_owned()))
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_differ_in_case_are_equal_and_keep_their_spelling() {
        let name = Name::parse("Support-Agent").expect("a valid name");
        assert_eq!(name, Name::parse("support-agent").expect("a valid name"));
        assert_eq!(name.display(), "Support-Agent");
        assert_eq!(name.canonical(), "support-agent");
    }

    #[test]
    fn names_outside_the_alphabet_are_refused() {
        for text in ["", "a b", "a/b", "a:b", "ü", "*", &"x".repeat(129)] {
            assert!(Name::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn the_reserved_tenant_is_refused_in_any_case() {
        assert!(TenantId::parse("_Remit").is_err());
    }

    #[test]
    fn a_key_hash_depends_on_tenant_method_and_key() {
        let tenant = |t| TenantId::parse(t).expect("a valid tenant");
        let key = |k| IdempotencyKey::parse(k).expect("a valid key");
        let base = KeyHash::of(&tenant("a"), Method::Reserve, &key("k"));
        assert_eq!(base, KeyHash::of(&tenant("A"), Method::Reserve, &key("k")));
        assert_ne!(base, KeyHash::of(&tenant("b"), Method::Reserve, &key("k")));
        assert_ne!(base, KeyHash::of(&tenant("a"), Method::Commit, &key("k")));
        assert_ne!(base, KeyHash::of(&tenant("a"), Method::Reserve, &key("K")));
    }

    #[test]
    fn a_reservation_id_survives_its_text() {
        let tenant = TenantId::parse("acme").expect("a valid tenant");
        let key = IdempotencyKey::parse("k").expect("a valid key");
        let id = ReservationId::of(KeyHash::of(&tenant, Method::Reserve, &key));
        assert_eq!(ReservationId::parse(&id.to_string()), Ok(id));
    }
}
