//! The audit log: the ledger, newest first.

use axum::extract::State;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::super::call::{Answer, Call};
use super::super::problem::Fault;
use super::super::{Gateway, wire};
use super::{Done, Params, Question, iso, limit, must_be_absent, params, stamp, time};
use crate::domain::permission::Permission;
use crate::proto;
use crate::proto::ledger_server::Ledger as _;

#[derive(Debug, Deserialize)]
pub(super) struct Filters {
    tenant_id: Option<String>,
    key_id: Option<String>,
    operation: Option<String>,
    from: Option<String>,
    to: Option<String>,
    resource_type: Option<String>,
    resource_id: Option<String>,
    status: Option<String>,
    error_code: Option<String>,
    status_min: Option<String>,
    status_max: Option<String>,
    trace_id: Option<String>,
    request_id: Option<String>,
    search: Option<String>,
    sort_by: Option<String>,
    sort_dir: Option<String>,
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

/// What is looked for in the entries of a page.
#[derive(Debug)]
struct Wanted {
    key_id: Option<String>,
    trace_id: Option<String>,
    request_id: Option<String>,
    resource_id: Option<String>,
    /// Any of these, divided by commas.
    error_code: Option<String>,
}

impl Wanted {
    fn fits(&self, log: &Log) -> bool {
        let text =
            |found: &Option<Value>| found.as_ref().and_then(Value::as_str).map(str::to_owned);
        let is = |wanted: &Option<String>, found| wanted.is_none() || *wanted == text(found);
        let codes = self.error_code.as_deref();
        is(&self.key_id, &log.key_id)
            && is(&self.trace_id, &log.trace_id)
            && is(&self.request_id, &log.request_id)
            && is(&self.resource_id, &log.resource_id)
            && codes.is_none_or(|codes| {
                let found = text(&log.error_code);
                codes
                    .split(',')
                    .any(|code| found.as_deref() == Some(code.trim()))
            })
    }
}

pub(super) async fn list(
    State(gateway): State<Gateway>,
    call: Call,
    filters: Params<Filters>,
) -> Done {
    let asker = gateway.operator(&call, Permission::Audit).await?;
    let filters = params(filters)?;
    must_be_absent(&[
        ("resource_type", &filters.resource_type),
        ("status", &filters.status),
        ("status_min", &filters.status_min),
        ("status_max", &filters.status_max),
        ("search", &filters.search),
        ("sort_by", &filters.sort_by),
        ("sort_dir", &filters.sort_dir),
    ])?;
    let tenant = filters.tenant_id;
    let tenant = tenant.ok_or_else(|| Fault::field("tenant_id", "given"))?;
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
    let wanted = Wanted {
        key_id: filters.key_id,
        trace_id: filters.trace_id.map(|id| id.to_ascii_lowercase()),
        request_id: filters.request_id,
        resource_id: filters.resource_id.map(|id| id.to_ascii_lowercase()),
        error_code: filters.error_code,
    };
    let question = Question::new(&format!("logs\0{wanted:?}"));
    let at = |field, text: Option<String>| {
        let time = text.map(|text| time(field, &text)).transpose()?;
        Ok::<_, Fault>(time.map(stamp))
    };
    // Rows show milliseconds: both ends are within.
    let until = |field, text: Option<String>| {
        let time = text.map(|text| time(field, &text)).transpose()?;
        let next = jiff::SignedDuration::from_millis(1);
        let after = |time: jiff::Timestamp| time.checked_add(next).unwrap_or(time);
        Ok::<_, Fault>(time.map(|time| stamp(after(time))))
    };
    let message = proto::ListEntriesRequest {
        tenant,
        kinds,
        start_time: at("from", filters.from)?,
        end_time: until("to", filters.to)?,
        descending: true,
        page_size: limit(filters.limit.as_ref())?,
        page_token: question.token(filters.cursor)?,
        ..proto::ListEntriesRequest::default()
    };
    let page = gateway
        .services
        .list_entries(asker.request(message))
        .await?;
    let page = page.into_inner();
    let logs = page.entries.into_iter().map(worded);
    Answer::new(&Logs {
        logs: logs.filter(|log| wanted.fits(log)).collect(),
        next: question.next(&page.next_page_token),
    })
}
