//! One event on its way: the request, its signature, and what counts as delivered.

use std::sync::Arc;
use std::time::Duration;

use hmac::{Hmac, KeyInit as _, Mac as _};
use reqwest::Url;
use serde::Serialize;
use sha2::Sha256;

use super::Reach;
use super::address::PublicOnly;
use crate::domain::event::EventType;
use crate::domain::id::Sequence;
use crate::domain::ledger::Body;
use crate::domain::subscription::Subscription;

/// How long a receiver may take for a connection, and for everything.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const TIMEOUT: Duration = Duration::from_secs(10);
/// Longest error that is kept.
const ERROR_BYTES_MAX: usize = 300;

/// What is told of one entry.
#[derive(Debug)]
pub(super) struct Event {
    pub(super) seq: Sequence,
    id: String,
    text: String,
}

/// The body of a request.
#[derive(Serialize)]
struct Message<'a> {
    id: &'a str,
    types: &'a [EventType],
    entry: &'a Body,
}

impl Event {
    pub(super) fn new(body: &Body, types: Vec<EventType>) -> Self {
        let id = format!("{}/{}", body.tenant, body.seq);
        let message = Message {
            id: &id,
            types: &types,
            entry: body,
        };
        // Keys are text and values plain types: nothing can fail in memory.
        let text = serde_json::to_string(&message).unwrap_or_default();
        Self {
            seq: body.seq,
            id,
            text,
        }
    }
}

/// `t=<seconds>,v1=<hex>`: HMAC-SHA256 over `<seconds>.<body>`.
fn signature(secret: &str, at: i64, text: &str) -> Option<String> {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).ok()?;
    mac.update(format!("{at}.{text}").as_bytes());
    Some(format!(
        "t={at},v1={}",
        hex::encode(mac.finalize().into_bytes())
    ))
}

/// Sends events.
#[derive(Debug)]
pub(super) struct Sender {
    client: reqwest::Client,
    reach: Reach,
}

impl Sender {
    pub(super) fn new(reach: Reach) -> Result<Self, reqwest::Error> {
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("remit/", env!("CARGO_PKG_VERSION")))
            // A redirect could lead inwards, and a POST loses its body on it.
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(TIMEOUT)
            .no_proxy();
        if !reach.private {
            builder = builder.dns_resolver(Arc::new(PublicOnly)).https_only(true);
        }
        Ok(Self {
            client: builder.build()?,
            reach,
        })
    }

    /// Delivers an event: any 2xx within the time. An error says what came instead.
    pub(super) async fn send(
        &self,
        subscription: &Subscription,
        secret: &str,
        event: &Event,
    ) -> Result<(), String> {
        let url = Url::parse(subscription.target.as_str()).map_err(|error| error.to_string())?;
        if !self.reach.allows(&subscription.target) {
            return Err("the address is in a private network".to_owned());
        }
        let at = jiff::Timestamp::now().as_second();
        let signature = signature(secret, at, &event.text).ok_or("the secret can't sign")?;
        let sent = self
            .client
            .post(url)
            .header("content-type", "application/json")
            .header("remit-event-id", &event.id)
            .header("remit-signature", signature)
            .body(event.text.clone())
            .send()
            .await;
        match sent {
            Ok(answer) if answer.status().is_success() => Ok(()),
            Ok(answer) => Err(format!("the receiver answered {}", answer.status())),
            Err(error) => {
                let said = worded(&error);
                Err(said[..said.floor_char_boundary(ERROR_BYTES_MAX)].to_owned())
            }
        }
    }
}

/// An error with what it came from: the first line alone names only the address.
fn worded(error: &reqwest::Error) -> String {
    let mut said = if error.is_timeout() {
        "no answer in time".to_owned()
    } else {
        "the receiver can't be reached".to_owned()
    };
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        said = format!("{said}: {error}");
        source = error.source();
    }
    said
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_can_be_computed_by_others() {
        // python: hmac.new(b"whsec_1", b'1700000000.{"a":1}', "sha256").hexdigest()
        assert_eq!(
            signature("whsec_1", 1_700_000_000, "{\"a\":1}").as_deref(),
            Some(
                "t=1700000000,v1=2bacf7b77f8a947e36777d445799846ce8389284516e77b94f239ef893b8def7"
            )
        );
    }
}
