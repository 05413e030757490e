//! Remit's words for the protocol's: what callers ask, and what both have in common.

use std::collections::HashMap;
use std::time::Duration;

use pbjson_types as wkt;
use pbjson_types::value::Kind;
use serde_json::Value;

use super::kept::{Given, TAGS, record_metadata};
use super::problem::Fault;
use super::wire;
use crate::domain::id::Name;
use crate::domain::request::{Digest, action_name};
use crate::domain::scope::dimension_key;
use crate::proto;

const DIMENSIONS_MAX: usize = 16;
const DIMENSION_CHARS_MAX: usize = 256;
const TAGS_MAX: usize = 10;
const TAG_CHARS_MAX: usize = 64;
const KIND_CHARS_MAX: usize = 64;
const CUSTOM_KEYS_MAX: usize = 8;

/// What the protocol calls a field of a message.
pub(super) fn field(path: &str) -> String {
    // The admin plane's messages carry one thing each.
    let path = ["tenants[0].", "budgets[0].", "api_key."]
        .into_iter()
        .find_map(|prefix| path.strip_prefix(prefix))
        .unwrap_or(path);
    let name = match path {
        "display_name" => "name",
        "cycles_compatible.max_extensions" => "max_reservation_extensions",
        "cycles_compatible.default_ttl" => "default_reservation_ttl_ms",
        "cycles_compatible.max_ttl" => "max_reservation_ttl_ms",
        "tenant" => "tenant_id",
        "subject_prefix" => "scope_filter",
        "expire_time" => "expires_at",
        "allocation" => "allocated.amount",
        "overdraft_limit" => "overdraft_limit.amount",
        "amount" => "amount.amount",
        "estimates" => "estimate",
        "amounts" => "actual",
        "estimates[0].value" => "estimate.amount",
        "estimates[0].unit" => "estimate.unit",
        "actual[0].value" | "amounts[0].value" => "actual.amount",
        "actual[0].unit" | "amounts[0].unit" => "actual.unit",
        "ttl" => "ttl_ms",
        "grace" => "grace_period_ms",
        "extend_by" => "extend_by_ms",
        "page_token" => "cursor",
        "page_size" => "limit",
        other => other,
    };
    name.to_owned()
}

/// What must be of a field whose bounds the services say in seconds, or with fields that
/// the protocol does not have.
pub(super) fn bounds(field: &str) -> Option<&'static str> {
    match field {
        "ttl_ms" | "default_reservation_ttl_ms" | "max_reservation_ttl_ms" => {
            Some("must be 1000 to 86400000 milliseconds")
        }
        "grace_period_ms" => Some("must be 0 to 60000 milliseconds"),
        "extend_by_ms" => Some("must be 1 to 86400000 milliseconds"),
        _ => None,
    }
}

/// Whether the protocol has a unit of that name.
pub(super) fn is_unit(name: &str) -> bool {
    let unit = proto::Unit::from_str_name(&format!("UNIT_{name}"));
    unit.is_some_and(|unit| known_unit(unit.into()).is_some())
}

pub(super) fn unit(unit: wire::Unit) -> proto::Unit {
    match unit {
        wire::Unit::UsdMicrocents => proto::Unit::UsdMicrocents,
        wire::Unit::Tokens => proto::Unit::Tokens,
        wire::Unit::Credits => proto::Unit::Credits,
        wire::Unit::RiskPoints => proto::Unit::RiskPoints,
    }
}

/// Nothing for the unit that the protocol does not know.
pub(super) fn known_unit(unit: i32) -> Option<wire::Unit> {
    match proto::Unit::try_from(unit) {
        Ok(proto::Unit::UsdMicrocents) => Some(wire::Unit::UsdMicrocents),
        Ok(proto::Unit::Tokens) => Some(wire::Unit::Tokens),
        Ok(proto::Unit::Credits) => Some(wire::Unit::Credits),
        Ok(proto::Unit::RiskPoints) => Some(wire::Unit::RiskPoints),
        Ok(proto::Unit::Calls | proto::Unit::Unspecified) | Err(_) => None,
    }
}

pub(super) fn unit_name(unit: proto::Unit) -> &'static str {
    let name = unit.as_str_name();
    name.strip_prefix("UNIT_").unwrap_or(name)
}

pub(super) fn amount(amount: wire::Amount) -> proto::Amount {
    proto::Amount {
        unit: unit(amount.unit).into(),
        value: amount.amount,
    }
}

/// The amount of a unit; zero where there is none.
pub(super) fn amount_of(amounts: &[proto::Amount], unit: wire::Unit) -> wire::Amount {
    let found = amounts.iter().find(|a| known_unit(a.unit) == Some(unit));
    wire::Amount {
        unit,
        amount: found.map_or(0, |found| found.value),
    }
}

/// The amount in a unit that the protocol knows. Its callers estimate in one, and the
/// catalogue adds risk points to it; of other callers' reservations no more can be shown.
pub(super) fn only_amount(amounts: &[proto::Amount]) -> Option<wire::Amount> {
    let known = || {
        amounts.iter().filter_map(|amount| {
            Some(wire::Amount {
                unit: known_unit(amount.unit)?,
                amount: amount.value,
            })
        })
    };
    let estimated = known().find(|amount| amount.unit != wire::Unit::RiskPoints);
    estimated.or_else(|| known().next())
}

pub(super) fn overage_policy(policy: Option<wire::OveragePolicy>) -> i32 {
    match policy {
        None => proto::OveragePolicy::Unspecified,
        Some(wire::OveragePolicy::Reject) => proto::OveragePolicy::Reject,
        Some(wire::OveragePolicy::AllowIfAvailable) => proto::OveragePolicy::AllowIfAvailable,
        Some(wire::OveragePolicy::AllowWithOverdraft) => proto::OveragePolicy::AllowWithOverdraft,
    }
    .into()
}

pub(super) fn duration(millis: u64) -> wkt::Duration {
    Duration::from_millis(millis).into()
}

pub(super) fn millis_of(time: &wkt::Timestamp) -> i64 {
    time.seconds
        .saturating_mul(1_000)
        .saturating_add(i64::from(time.nanos) / 1_000_000)
}

pub(super) fn millis_left(duration: &wkt::Duration) -> i64 {
    duration
        .seconds
        .saturating_mul(1_000)
        .saturating_add(i64::from(duration.nanos) / 1_000_000)
}

/// A time in a filter; a blank one counts as absent.
pub(super) fn time(name: &str, text: Option<&String>) -> Result<Option<wkt::Timestamp>, Fault> {
    let Some(text) = text.map(|text| text.trim()).filter(|text| !text.is_empty()) else {
        return Ok(None);
    };
    let time: Result<jiff::Timestamp, _> = text.parse();
    let time = time.map_err(|_| Fault::field(name, "a time such as 2026-01-31T12:00:00Z"))?;
    Ok(Some(wkt::Timestamp {
        seconds: time.as_second(),
        nanos: time.subsec_nanosecond(),
    }))
}

/// Who acts; in the key's tenant where none is named.
pub(super) fn subject(subject: wire::Subject, own: &str) -> Result<(proto::Subject, Given), Fault> {
    let wire::Subject {
        tenant,
        workspace,
        app,
        workflow,
        agent,
        toolset,
        dimensions,
    } = subject;
    for (level, name) in [
        ("tenant", &tenant),
        ("workspace", &workspace),
        ("app", &app),
        ("workflow", &workflow),
        ("agent", &agent),
        ("toolset", &toolset),
    ] {
        // To the services an empty one is an absent one.
        if name.as_ref().is_some_and(String::is_empty) {
            let field = format!("subject.{level}");
            return Err(Fault::field(&field, "1 to 128 characters, or absent"));
        }
    }
    let name = Option::unwrap_or_default;
    let mut subject = proto::Subject {
        tenant: name(tenant),
        workspace: name(workspace),
        app: name(app),
        workflow: name(workflow),
        agent: name(agent),
        toolset: name(toolset),
        dimensions: HashMap::new(),
    };
    if levels(&subject).next().is_none() {
        return Err(Fault::field(
            "subject",
            "given, with at least one of tenant, workspace, app, workflow, agent, toolset",
        ));
    }
    if subject.tenant.is_empty() {
        own.clone_into(&mut subject.tenant);
    }
    let dimensions = dimensions.unwrap_or_default();
    if dimensions.len() > DIMENSIONS_MAX {
        return Err(Fault::field("subject.dimensions", "at most 16 entries"));
    }
    for (key, value) in &dimensions {
        if key.is_empty() || value.chars().count() > DIMENSION_CHARS_MAX {
            let field = format!("subject.dimensions[{key}]");
            return Err(Fault::field(&field, "named, and at most 256 characters"));
        }
        let name = key.to_ascii_lowercase();
        let coordinate = match Name::parse(value) {
            Ok(_) => value.clone(),
            // Takes part in scopes all the same: a budget for each value holds for it.
            // Case is ignored in scopes.
            Err(_) => format!("sha256-{}", Digest::of(value.to_lowercase().as_bytes())),
        };
        // No scope can say any other name, so that no budget can hang on it.
        let told = dimension_key(&name).is_ok();
        if told && subject.dimensions.insert(name, coordinate).is_some() {
            let wants = "named once each, whatever the case";
            return Err(Fault::field("subject.dimensions", wants));
        }
    }
    let as_given = |(key, value): (&String, &String)| subject.dimensions.get(key) == Some(value);
    let kept = match dimensions.iter().all(as_given) {
        true => None,
        false => serde_json::to_string(&dimensions).ok(),
    };
    Ok((subject, Given(kept)))
}

/// The levels that a subject names, from the root down.
pub(super) fn levels(subject: &proto::Subject) -> impl Iterator<Item = (&'static str, &str)> {
    [
        ("tenant", &subject.tenant),
        ("workspace", &subject.workspace),
        ("app", &subject.app),
        ("workflow", &subject.workflow),
        ("agent", &subject.agent),
        ("toolset", &subject.toolset),
    ]
    .into_iter()
    .filter(|(_, name)| !name.is_empty())
    .map(|(level, name)| (level, name.as_str()))
}

/// What is done, and what is to be kept of it in the metadata.
pub(super) fn action(
    action: wire::Action,
) -> Result<(proto::Action, HashMap<String, String>), Fault> {
    let wire::Action {
        kind,
        name,
        tags,
        policy_keys,
    } = action;
    if kind.chars().count() > KIND_CHARS_MAX || action_name(&kind).is_err() {
        return Err(Fault::field(
            "action.kind",
            "1 to 64 characters without control characters, '*', '?' and spaces around it",
        ));
    }
    let mut kept = HashMap::new();
    if let Some(tags) = tags.filter(|tags| !tags.is_empty()) {
        if tags.len() > TAGS_MAX || tags.iter().any(|tag| tag.chars().count() > TAG_CHARS_MAX) {
            return Err(Fault::field(
                "action.tags",
                "at most 10 of at most 64 characters",
            ));
        }
        kept.insert(TAGS.to_owned(), Value::from(tags).to_string());
    }
    let action = proto::Action {
        name,
        kind,
        arguments: policy_keys.map(arguments).transpose()?,
    };
    Ok((action, kept))
}

/// What rules read as the arguments: callers of the protocol send no others.
fn arguments(keys: wire::PolicyKeys) -> Result<wkt::Struct, Fault> {
    let wire::PolicyKeys {
        host,
        recipient_domain,
        resource_type,
        path_prefix,
        custom,
    } = keys;
    let custom = custom.unwrap_or_default();
    if custom.len() > CUSTOM_KEYS_MAX {
        let field = "action.policy_keys.custom";
        return Err(Fault::field(field, "at most 8 entries"));
    }
    let text = |text: String| wkt::Value {
        kind: Some(Kind::StringValue(text)),
    };
    let named = [
        ("host", host),
        ("recipient_domain", recipient_domain),
        ("resource_type", resource_type),
        ("path_prefix", path_prefix),
    ];
    let named = named
        .into_iter()
        .filter_map(|(name, key)| Some((name.to_owned(), text(key?))));
    let mut fields: HashMap<_, _> = named.collect();
    if !custom.is_empty() {
        let custom = custom.into_iter().map(|(name, key)| (name, text(key)));
        let custom = wkt::Struct {
            fields: custom.collect(),
        };
        let kind = Some(Kind::StructValue(custom));
        fields.insert("custom".to_owned(), wkt::Value { kind });
    }
    Ok(wkt::Struct { fields })
}

/// As much of a text as fits, in bytes.
pub(super) fn cut(text: Option<String>, most: usize) -> String {
    let mut text = text.unwrap_or_default().replace('\0', "");
    text.truncate(text.floor_char_boundary(most));
    text
}

/// What was measured.
pub(super) fn metrics(metrics: Option<wire::Metrics>) -> Option<proto::Metrics> {
    let wire::Metrics {
        tokens_input,
        tokens_output,
        latency_ms,
        model_version,
        custom,
    } = metrics?;
    Some(proto::Metrics {
        tokens_input,
        tokens_output,
        latency_ms,
        model_version: cut(model_version, 128),
        custom: record_metadata(custom),
    })
}
