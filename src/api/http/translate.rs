//! The protocol's words for Remit's, and back.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use pbjson_types as wkt;
use pbjson_types::value::Kind;
use serde_json::Value;

use super::problem::{Denial, Fault};
use super::strict::{Free, given, kept};
use super::wire;
use crate::api::fields::{MAP_BYTES_MAX, MAP_KEY_MAX, MAP_MAX, VALUE_MAX};
use crate::domain::id::Name;
use crate::domain::request::{Digest, action_name};
use crate::domain::scope::dimension_key;
use crate::proto;

/// Names of the metadata under which is kept what Remit does not know: tags, ...
const TAGS: &str = "cycles.tags";
/// ... the idempotency key as text, ...
const KEY: &str = "cycles.idempotency_key";
/// ... dimensions as they were given, where a scope can't say them; what is too long for one
/// value goes on under `cycles.dimensions.1` and so on, ...
const DIMENSIONS: &str = "cycles.dimensions";
/// ... and how many fields did not fit into a record of what has happened already.
const LEFT_OUT: &str = "cycles.left_out";
/// What names of the caller's own may not begin with.
const RESERVED: &str = "cycles.";
/// Places for these names: dimensions have two, enough for the protocol's longest in ASCII.
const KEPT_MAX: usize = 4;
/// Most names of the caller's own.
const METADATA_MAX: usize = MAP_MAX - KEPT_MAX;
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

/// Dimensions as they were given, where the subject does not say them.
#[derive(Debug, Default)]
pub(super) struct Given(Option<String>);

impl Given {
    /// Keeps them in a record's metadata, as far as there is room: they are only given back
    /// from it, so that nothing is refused for them.
    pub(super) fn keep(self, metadata: &mut HashMap<String, String>) {
        let text = self.0.unwrap_or_default();
        let mut parts = Vec::new();
        let mut rest = text.as_str();
        while !rest.is_empty() {
            let (part, after) = rest.split_at(rest.floor_char_boundary(VALUE_MAX));
            parts.push((dimensions_part(parts.len()), part.to_owned()));
            rest = after;
        }
        let of = |(name, part): (&String, &String)| name.len() + part.len();
        let bytes: usize = metadata.iter().map(of).sum();
        let more: usize = parts.iter().map(|(name, part)| of((name, part))).sum();
        if metadata.len() + parts.len() <= MAP_MAX && bytes + more <= MAP_BYTES_MAX {
            metadata.extend(parts);
        }
    }

    /// What [`Self::keep`] kept, taken out again.
    fn take(metadata: &mut HashMap<String, String>) -> Option<BTreeMap<String, String>> {
        let parts = (0..).map_while(|part| metadata.remove(&dimensions_part(part)));
        serde_json::from_str(&parts.collect::<String>()).ok()
    }
}

fn dimensions_part(part: usize) -> String {
    match part {
        0 => DIMENSIONS.to_owned(),
        part => format!("{DIMENSIONS}.{part}"),
    }
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
fn levels(subject: &proto::Subject) -> impl Iterator<Item = (&'static str, &str)> {
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

/// Every scope of a subject from the root down, and the scopes of balances that are none of
/// them: with dimensions, or of fewer levels.
pub(super) fn affected_scopes<'a>(
    subject: &proto::Subject,
    of_balances: impl IntoIterator<Item = &'a String>,
) -> (Vec<String>, String) {
    let mut scopes: Vec<String> = Vec::new();
    for (level, name) in levels(subject) {
        let segment = format!("{level}:{}", name.to_ascii_lowercase());
        scopes.push(match scopes.last() {
            None => segment,
            Some(parent) => format!("{parent}/{segment}"),
        });
    }
    let path = scopes.last().cloned().unwrap_or_default();
    for scope in of_balances {
        if !scopes.contains(scope) {
            scopes.push(scope.clone());
        }
    }
    (scopes, path)
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

/// The caller's metadata.
pub(super) fn metadata(given: Option<Free>) -> Result<HashMap<String, String>, Fault> {
    let metadata: HashMap<_, _> = kept(given.unwrap_or_default()).collect();
    if metadata.len() > METADATA_MAX {
        let wants = format!("at most {METADATA_MAX} entries");
        return Err(Fault::field("metadata", &wants));
    }
    match metadata.keys().find(|name| name.starts_with(RESERVED)) {
        Some(name) => Err(Fault::field(
            &format!("metadata.{name}"),
            "named otherwise: `cycles.` is reserved",
        )),
        None => Ok(metadata),
    }
}

/// What becomes of the idempotency key in the metadata of a reservation, from where
/// [`reservation`] answers it.
pub(super) fn kept_key(key: &str) -> (String, String) {
    (KEY.to_owned(), key.to_owned())
}

/// The caller's metadata on what has happened already: it must not fail for what only goes
/// into the record, so that what does not fit is left out, and counted.
pub(super) fn record_metadata(given: Option<Free>) -> HashMap<String, String> {
    let mut bytes = LEFT_OUT.len() + VALUE_MAX;
    let mut fitting = HashMap::new();
    let mut left_out = 0_u32;
    for (name, value) in kept(given.unwrap_or_default()) {
        let fits = !name.is_empty()
            && name.len() <= MAP_KEY_MAX
            && value.len() <= VALUE_MAX
            && fitting.len() < METADATA_MAX
            && bytes + name.len() + value.len() <= MAP_BYTES_MAX
            && !name.contains('\0')
            && !value.contains('\0')
            && !name.starts_with(RESERVED);
        if fits {
            bytes += name.len() + value.len();
            fitting.insert(name, value);
        } else {
            left_out += 1;
        }
    }
    if left_out > 0 {
        fitting.insert(LEFT_OUT.to_owned(), left_out.to_string());
    }
    fitting
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

/// The balances in some units, the protocol's own.
pub(super) fn balances(
    balances: &[proto::Balance],
    shown: impl Fn(wire::Unit) -> bool,
) -> Vec<wire::Balance> {
    balances
        .iter()
        .filter_map(|balance| {
            let unit = known_unit(balance.unit).filter(|unit| shown(*unit))?;
            Some(self::balance(balance, unit))
        })
        .collect()
}

fn balance(balance: &proto::Balance, unit: wire::Unit) -> wire::Balance {
    let of = |amount| wire::Amount { unit, amount };
    let used = [balance.reserved, balance.spent, balance.debt]
        .into_iter()
        .fold(0, i64::saturating_add);
    let leaf = balance.scope.rsplit('/').next().unwrap_or_default();
    wire::Balance {
        scope: leaf.to_owned(),
        scope_path: balance.scope.clone(),
        // Without a limit: as much as the protocol can say.
        remaining: of(balance.remaining.unwrap_or(i64::MAX.saturating_sub(used))),
        reserved: of(balance.reserved),
        spent: of(balance.spent),
        allocated: of(balance.allocated.unwrap_or(i64::MAX)),
        debt: (balance.debt > 0).then(|| of(balance.debt)),
        overdraft_limit: (balance.overdraft_limit > 0).then(|| of(balance.overdraft_limit)),
        is_over_limit: balance.over_limit.then_some(true),
    }
}

pub(super) fn caps(caps: Option<proto::Caps>) -> Option<wire::Caps> {
    let caps = caps?;
    // The protocol's numbers have 32 bits.
    let number = |number: i64| number.min(i32::MAX.into());
    let tools = |tools: Vec<String>| Some(tools).filter(|tools| !tools.is_empty());
    Some(wire::Caps {
        max_tokens: caps.max_tokens.map(number),
        max_steps_remaining: caps.max_steps_remaining.map(number),
        tool_allowlist: tools(caps.tool_allowlist),
        tool_denylist: tools(caps.tool_denylist),
        cooldown_ms: caps.cooldown_ms.map(number),
    })
}

/// What the protocol calls a decision; nothing where it lets nothing happen.
pub(super) fn allowed(decision: proto::Decision) -> Option<wire::Decision> {
    match decision {
        proto::Decision::Allow => Some(wire::Decision::Allow),
        proto::Decision::AllowWithCaps => Some(wire::Decision::AllowWithCaps),
        proto::Decision::RequireApproval | proto::Decision::Deny | proto::Decision::Unspecified => {
            None
        }
    }
}

/// Why Decide lets nothing happen.
pub(super) fn denial_of_decide(answer: &proto::DecideResponse, scope_path: &str) -> Denial {
    Denial {
        reasons: answer.reasons.clone(),
        approval: None,
        no_budget: answer.balances.is_empty(),
        scope_path: scope_path.to_owned(),
        retryable: answer.retryable,
        retry_after: answer.retry_after.and_then(|after| after.try_into().ok()),
        decision_id: answer.decision_id.clone(),
        sequence: answer.ledger_sequence,
        replayed: false,
    }
}

/// Why Reserve lets nothing happen.
pub(super) fn denial_of_reserve(answer: &proto::ReserveResponse, scope_path: &str) -> Denial {
    Denial {
        reasons: answer.reasons.clone(),
        approval: answer.approval.clone(),
        no_budget: answer.balances.is_empty(),
        scope_path: scope_path.to_owned(),
        retryable: answer.retryable,
        retry_after: answer.retry_after.and_then(|after| after.try_into().ok()),
        decision_id: answer.decision_id.clone(),
        sequence: answer.ledger_sequence,
        replayed: answer.replayed,
    }
}

/// A reservation that holds or held in `scopes`; nothing for one that the protocol has no
/// word for: it waits for a person.
pub(super) fn reservation(
    found: proto::Reservation,
    scopes: &[String],
) -> Option<wire::Reservation> {
    let status = match found.state() {
        proto::ReservationState::Active => wire::ReservationStatus::Active,
        proto::ReservationState::Committed => wire::ReservationStatus::Committed,
        // A person refused it; what it held was given back.
        proto::ReservationState::Released | proto::ReservationState::Rejected => {
            wire::ReservationStatus::Released
        }
        proto::ReservationState::Expired => wire::ReservationStatus::Expired,
        proto::ReservationState::PendingApproval | proto::ReservationState::Unspecified => {
            return None;
        }
    };
    let finalized = matches!(
        status,
        wire::ReservationStatus::Committed | wire::ReservationStatus::Released
    );
    let subject = found.subject.unwrap_or_default();
    let action = found.action.unwrap_or_default();
    let (affected_scopes, scope_path) = affected_scopes(&subject, scopes);
    let reserved = only_amount(&found.reserved).unwrap_or(wire::Amount {
        unit: wire::Unit::Credits,
        amount: 0,
    });
    let mut metadata = found.metadata;
    let tags = metadata.remove(TAGS);
    let tags = tags.and_then(|tags| serde_json::from_str(&tags).ok());
    let idempotency_key = metadata.remove(KEY);
    let dimensions = Given::take(&mut metadata);
    let metadata: serde_json::Map<_, _> = metadata
        .into_iter()
        .map(|(name, text)| (name, given(&text)))
        .collect();
    let committed = status == wire::ReservationStatus::Committed;
    Some(wire::Reservation {
        reservation_id: found.reservation_id,
        status,
        idempotency_key,
        subject: subject_of(subject, dimensions),
        action: wire::Action {
            kind: action.kind,
            name: action.name,
            tags,
            policy_keys: None,
        },
        reserved,
        created_at_ms: found.create_time.as_ref().map_or(0, millis_of),
        expires_at_ms: found.expire_time.as_ref().map_or(0, millis_of),
        scope_path,
        affected_scopes,
        committed: committed.then(|| amount_of(&found.committed, reserved.unit)),
        finalized_at_ms: found
            .settle_time
            .as_ref()
            .filter(|_| finalized)
            .map(millis_of),
        metadata: Some(metadata).filter(|metadata| !metadata.is_empty()),
    })
}

/// `given` are its dimensions where they are kept as they were given.
fn subject_of(subject: proto::Subject, given: Option<BTreeMap<String, String>>) -> wire::Subject {
    let name = |name: String| Some(name).filter(|name| !name.is_empty());
    let dimensions = given.unwrap_or_else(|| subject.dimensions.into_iter().collect());
    wire::Subject {
        tenant: name(subject.tenant),
        workspace: name(subject.workspace),
        app: name(subject.app),
        workflow: name(subject.workflow),
        agent: name(subject.agent),
        toolset: name(subject.toolset),
        dimensions: Some(dimensions).filter(|dimensions| !dimensions.is_empty()),
    }
}
