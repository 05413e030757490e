//! The same load through the gateway, as the protocol's clients send it.

use anyhow::Context as _;
use reqwest::StatusCode;
use serde_json::{Value, json};

use super::world::{ACTUAL, ESTIMATE, Loaded};

/// One client with its connections, shared by all callers.
#[derive(Debug, Clone)]
pub(super) struct Gateway {
    client: reqwest::Client,
    base: String,
}

/// What came in place of what was due.
pub(super) enum Failed {
    /// Too much is waiting.
    Refused,
    /// Anything else.
    Otherwise(String),
}

impl Gateway {
    pub(super) fn new(address: &str) -> anyhow::Result<Self> {
        let client = reqwest::Client::builder().tcp_nodelay(true).build();
        Ok(Self {
            client: client.context("an HTTP client")?,
            base: format!("http://{address}/v1/reservations"),
        })
    }

    /// The id of what is held.
    pub(super) async fn reserve(&self, tenant: &Loaded, key: &str) -> Result<String, Failed> {
        let subject = &tenant.subject;
        let levels = [
            ("tenant", &subject.tenant),
            ("workspace", &subject.workspace),
            ("app", &subject.app),
            ("workflow", &subject.workflow),
            ("agent", &subject.agent),
            ("toolset", &subject.toolset),
        ];
        let named = levels.into_iter().filter(|(_, name)| !name.is_empty());
        let subject: serde_json::Map<_, _> = named
            .map(|(level, name)| (level.to_owned(), Value::from(name.as_str())))
            .collect();
        let body = json!({
            "idempotency_key": key,
            "subject": subject,
            "action": {"kind": "tool.payment", "name": "refund_customer"},
            "estimate": {"unit": "RISK_POINTS", "amount": ESTIMATE},
            "ttl_ms": 60_000,
            "overage_policy": "ALLOW_IF_AVAILABLE",
        });
        let answer = self.post(tenant, &self.base, body).await?;
        let id = answer.get("reservation_id").and_then(Value::as_str);
        let id = id.ok_or_else(|| Failed::Otherwise(answer.to_string()))?;
        Ok(id.to_owned())
    }

    /// Settles it with the actual use, or gives it back.
    pub(super) async fn settle(
        &self,
        tenant: &Loaded,
        reservation: &str,
        key: &str,
        commit: bool,
    ) -> Result<(), Failed> {
        let (what, body) = match commit {
            true => (
                "commit",
                json!({
                    "idempotency_key": key,
                    "actual": {"unit": "RISK_POINTS", "amount": ACTUAL},
                }),
            ),
            false => ("release", json!({"idempotency_key": key})),
        };
        let url = format!("{}/{reservation}/{what}", self.base);
        self.post(tenant, &url, body).await.map(drop)
    }

    async fn post(&self, tenant: &Loaded, url: &str, body: Value) -> Result<Value, Failed> {
        let otherwise = |error: reqwest::Error| Failed::Otherwise(error.to_string());
        let request = self
            .client
            .post(url)
            .header("x-cycles-api-key", tenant.key())
            .header("content-type", "application/json")
            .body(body.to_string());
        let answer = request.send().await.map_err(otherwise)?;
        let status = answer.status();
        let body = answer.bytes().await.map_err(otherwise)?;
        match status {
            StatusCode::OK => {
                serde_json::from_slice(&body).map_err(|error| Failed::Otherwise(error.to_string()))
            }
            StatusCode::TOO_MANY_REQUESTS => Err(Failed::Refused),
            status => Err(Failed::Otherwise(format!(
                "{status}: {}",
                String::from_utf8_lossy(&body)
            ))),
        }
    }
}
