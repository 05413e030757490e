//! The audit log: the ledger, newest first.

use axum::extract::State;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::super::call::{Answer, Call};
use super::super::problem::Fault;
use super::super::{Gateway, translate, wire};
use super::{Done, Params, iso, limit, must_be_absent, params};
use crate::domain::permission::Permission;
use crate::proto;
use crate::proto::ledger_server::Ledger as _;

#[derive(Debug, Deserialize)]
pub(super) struct Filters {
    tenant_id: Option<String>,
    operation: Option<String>,
    from: Option<String>,
    to: Option<String>,
    resource_type: Option<String>,
    error_code: Option<String>,
    status_min: Option<String>,
    status_max: Option<String>,
    trace_id: Option<String>,
    request_id: Option<String>,
    search: Option<String>,
    limit: Option<String>,
    cursor: Option<String>,
}

/// One entry.
#[derive(Debug, Serialize)]
struct Log {
    /// `<tenant>/<ledger sequence>`
    log_id: String,
    timestamp: Option<String>,
    tenant_id: String,
    /// The kind of the entry.
    operation: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_id: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    request_id: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    trace_id: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    resource_id: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error_code: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    subject: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    action: Option<Value>,
    /// The whole entry, exactly as it is hashed, and its hash.
    metadata: Metadata,
}

#[derive(Debug, Serialize)]
struct Metadata {
    entry: Value,
    hash: String,
}

#[derive(Debug, Serialize)]
struct Logs {
    logs: Vec<Log>,
    #[serde(flatten)]
    next: wire::Next,
}

fn worded(entry: proto::Entry) -> Log {
    let body: Value = serde_json::from_str(&entry.body).unwrap_or_default();
    let field = |name: &str| body.get(name).filter(|value| !value.is_null()).cloned();
    let error_code = body
        .pointer("/reasons/0/code")
        .filter(|_| entry.decision() == proto::Decision::Deny)
        .cloned();
    let kind = entry.kind().as_str_name();
    Log {
        log_id: format!("{}/{}", entry.tenant, entry.sequence),
        timestamp: iso(entry.time.as_ref()),
        operation: kind.trim_start_matches("ENTRY_KIND_").to_owned(),
        key_id: field("key"),
        request_id: field("request_id"),
        trace_id: field("trace_id"),
        resource_id: field("reservation"),
        error_code,
        subject: field("subject"),
        action: field("action"),
        tenant_id: entry.tenant,
        metadata: Metadata {
            entry: body,
            hash: hex::encode(&entry.hash),
        },
    }
}

pub(super) async fn list(
    State(gateway): State<Gateway>,
    call: Call,
    filters: Params<Filters>,
) -> Done {
    let asker = gateway.either(&call, Permission::Audit).await?;
    let filters = params(filters)?;
    must_be_absent(&[
        ("resource_type", &filters.resource_type),
        ("error_code", &filters.error_code),
        ("status_min", &filters.status_min),
        ("status_max", &filters.status_max),
        ("trace_id", &filters.trace_id),
        ("request_id", &filters.request_id),
        ("search", &filters.search),
    ])?;
    let tenant = filters.tenant_id.filter(|tenant| !tenant.is_empty());
    if tenant.is_none() && asker.tenant().is_empty() {
        return Err(Fault::field("tenant_id", "given with an operator's key"));
    }
    let mut kinds = Vec::new();
    for name in filters.operation.as_deref().unwrap_or("").split(',') {
        if name.is_empty() {
            continue;
        }
        let kind = proto::EntryKind::from_str_name(&format!("ENTRY_KIND_{name}"));
        let kind = kind.ok_or_else(|| {
            Fault::field(
                "operation",
                "a list of kinds of ledger entries, such as RESERVE",
            )
        })?;
        kinds.push(kind.into());
    }
    let message = proto::ListEntriesRequest {
        tenant: tenant.unwrap_or_default(),
        kinds,
        start_time: translate::time("from", filters.from.as_ref())?,
        end_time: translate::time("to", filters.to.as_ref())?,
        descending: true,
        page_size: limit(filters.limit.as_ref())?,
        page_token: filters.cursor.unwrap_or_default(),
        ..proto::ListEntriesRequest::default()
    };
    let page = gateway
        .services
        .list_entries(asker.request(message))
        .await?;
    let page = page.into_inner();
    Answer::new(&Logs {
        logs: page.entries.into_iter().map(worded).collect(),
        next: page.next_page_token.into(),
    })
}
