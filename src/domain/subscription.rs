//! Subscriptions: who is told of what happens.

use serde::{Deserialize, Serialize};

use super::event::EventType;
use super::id::{Malformed, Name, Sequence, TenantId};
use super::time::Timestamp;

/// Longest address.
const URL_BYTES_MAX: usize = 2_048;

/// Where events go. Its host is checked when they are sent, too: names change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Target(Box<str>);

impl Target {
    /// Takes `https://host[:port][/path][?query]`; plain HTTP only where it is allowed.
    pub fn parse(text: &str, plain: bool) -> Result<Self, Malformed> {
        let wants = || {
            Malformed::new(format!(
                "an address of at most {URL_BYTES_MAX} bytes that begins with https://, without user, password or fragment"
            ))
        };
        if text.len() > URL_BYTES_MAX || text.contains('#') || text.chars().any(char::is_whitespace)
        {
            return Err(wants());
        }
        let uri: http::Uri = text.parse().map_err(|_| wants())?;
        let scheme = uri.scheme_str();
        let fits = scheme == Some("https") || (plain && scheme == Some("http"));
        let authority = uri.authority().ok_or_else(wants)?;
        if !fits || authority.as_str().contains('@') || authority.host().is_empty() {
            return Err(wants());
        }
        Ok(Self(text.into()))
    }

    /// As given.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Who is told of what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subscription {
    /// Whose events.
    pub tenant: TenantId,
    /// Names it within the tenant.
    pub id: Name,
    /// Where they go.
    pub target: Target,
    /// What of.
    pub types: Vec<EventType>,
    /// When it was made.
    pub created_at: Timestamp,
    /// Entries up to here were delivered, or tried once.
    pub cursor: Sequence,
    /// How many failed and are tried again.
    pub retrying: i64,
    /// How many were given up.
    pub dead: i64,
    /// Why the newest of those failed.
    pub last_error: Option<Box<str>>,
}

/// A subscription as the ledger records it, without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubscriptionRecord {
    /// Names it.
    pub id: Name,
    /// Where events go.
    pub url: Box<str>,
    /// What of.
    pub types: Vec<EventType>,
    /// False once it is gone.
    pub present: bool,
}

impl From<&Subscription> for SubscriptionRecord {
    fn from(subscription: &Subscription) -> Self {
        Self {
            id: subscription.id.clone(),
            url: subscription.target.as_str().into(),
            types: subscription.types.clone(),
            present: true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_addresses_are_taken() {
        for text in ["https://hooks.example/x?y=1", "https://[2001:db8::1]:8443/"] {
            assert!(Target::parse(text, false).is_ok(), "{text}");
        }
        for text in [
            "http://hooks.example/",
            "https://",
            "https://user:secret@hooks.example/",
            "https://hooks.example/#part",
            "ftp://hooks.example/",
            "hooks.example",
            "https://hooks.example/a b",
        ] {
            assert!(Target::parse(text, false).is_err(), "{text}");
        }
        assert!(Target::parse("http://127.0.0.1:8080/", true).is_ok());
    }
}
