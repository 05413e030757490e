//! A step by HTTP, and whether the answer's body is one that published clients take.

use serde_json::{Value, json};

use super::table::{Action, By, Caps, Decide, Event, Post, Request, Reserve, Row, Subject, Unit};
use super::{Play, Seen};

/// An answer as it came in.
struct Reply {
    status: u16,
    replayed: bool,
    body: Value,
}

/// Sends a step's request and words the answer.
pub(super) async fn ask(
    play: &Play,
    by: By,
    request: &Request<'_>,
    key: &str,
) -> Result<Seen, String> {
    let of = |of: &str, verb: &str| -> Result<String, String> {
        let path = format!("/v1/reservations/{}{verb}", play.reservation(of)?);
        Ok(match by {
            By::Operator => format!("{path}?tenant={}", play.tenant),
            _ => path,
        })
    };
    let (path, body) = match request {
        Request::Reserve(reserve) => (
            "/v1/reservations".to_owned(),
            reserve_body(play, reserve, key),
        ),
        Request::Decide(decide) => ("/v1/decide".to_owned(), decide_body(play, decide, key)),
        Request::Commit(commit) => {
            let actual = amount(commit.unit, commit.amount);
            let body = json!({"idempotency_key": key, "actual": actual});
            (of(&commit.of, "/commit")?, body)
        }
        Request::Release(release) => {
            let mut body = json!({"idempotency_key": key});
            put(&mut body, "reason", release.reason.as_deref());
            (of(&release.of, "/release")?, body)
        }
        Request::Extend(extend) => {
            let body = json!({"idempotency_key": key, "extend_by_ms": extend.by_ms});
            (of(&extend.of, "/extend")?, body)
        }
        Request::Event(event) => ("/v1/events".to_owned(), event_body(play, event, key)),
        Request::Get(get) => (of(&get.of, "")?, Value::Null),
        Request::Fund(fund) => {
            let mut body = json!({
                "idempotency_key": key,
                "operation": fund.operation,
                "amount": amount(fund.unit, fund.amount),
            });
            put(
                &mut body,
                "spent",
                fund.spent.map(|spent| amount(fund.unit, spent)),
            );
            // Nothing in a scope needs escaping in a query.
            let (scope, unit) = (play.named(&fund.scope), fund.unit.word());
            (
                format!("/v1/admin/budgets/fund?scope={scope}&unit={unit}"),
                body,
            )
        }
        Request::Post(post) => return own_words(play, by, post).await,
        Request::Provision(_) | Request::Resolve(_) | Request::Wait(_) | Request::Balances(_) => {
            return Err("this is no request by HTTP".into());
        }
    };
    let text = (!body.is_null()).then(|| body.to_string());
    let reply = send(play, by, &path, text, &[]).await?;
    if let Some(refused) = refused(&reply)? {
        return Ok(refused);
    }
    taken(play, request, &reply)
}

/// What the tenant's own key can read of its balances.
pub(super) async fn balances(play: &Play) -> Result<Vec<Row>, String> {
    let path = format!("/v1/balances?tenant={}&limit=200", play.tenant);
    let reply = send(play, By::Agent, &path, None, &[]).await?;
    let body = &reply.body;
    fields(body, &["balances", "has_more", "next_cursor"], &[])?;
    if body["has_more"] != false || !body["next_cursor"].is_null() {
        return Err(format!("more than one page: {body}"));
    }
    rows(&body["balances"])
}

/// Sends one request; without a body it is a GET.
async fn send(
    play: &Play,
    by: By,
    path: &str,
    body: Option<String>,
    headers: &[(&String, String)],
) -> Result<Reply, String> {
    let server = &play.world.server;
    let plane = if path.starts_with("/v1/admin/") {
        &server.cycles_admin
    } else {
        &server.cycles
    };
    let url = format!("http://{plane}{path}");
    let client = reqwest::Client::new();
    let mut request = match body {
        Some(body) => client
            .post(url)
            .header("content-type", "application/json")
            .body(body),
        None => client.get(url),
    };
    let header = match by {
        By::Operator => "x-admin-api-key",
        _ => "x-cycles-api-key",
    };
    if by != By::Nobody {
        request = request.header(header, play.api_key(by));
    }
    for (name, value) in headers {
        request = request.header(name.as_str(), value);
    }
    let reply = request.send().await.map_err(|error| error.to_string())?;
    let status = reply.status().as_u16();
    let header = |name: &str| {
        let value = reply.headers().get(name)?;
        value.to_str().ok().map(str::to_owned)
    };
    let replayed = header("x-remit-replayed").as_deref() == Some("true");
    let request_id = header("x-request-id").ok_or("no X-Request-Id")?;
    let trace_id = header("x-cycles-trace-id").ok_or("no X-Cycles-Trace-Id")?;
    let text = reply.text().await.map_err(|error| error.to_string())?;
    let body: Value =
        serde_json::from_str(&text).map_err(|error| format!("{status}, {error}: {text}"))?;
    if text.len() != body.to_string().len() {
        return Err(format!("the JSON is not compact: {text}"));
    }
    if body["error"].is_string() {
        let ids = (body["request_id"].as_str(), body["trace_id"].as_str());
        if ids != (Some(&request_id), Some(&trace_id)) {
            return Err(format!("{ids:?} are not the headers' ids: {body}"));
        }
    }
    Ok(Reply {
        status,
        replayed,
        body,
    })
}

/// An error in the protocol's words; nothing for a success.
fn refused(reply: &Reply) -> Result<Option<Seen>, String> {
    let Reply { status, body, .. } = reply;
    if (200..300).contains(status) {
        return Ok(None);
    }
    let required = ["error", "message", "request_id", "trace_id"];
    fields(body, &required, &["details"])?;
    let code = body["error"].as_str().ok_or("an error without a code")?;
    let details = &body["details"];
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let scope = text(&details["deny_detail"]["blocked_by_scope"]);
    Ok(Some(Seen {
        said: format!("{status} {code}"),
        reason_code: text(&details["reason_code"]),
        scope: scope.or_else(|| text(&details["scope"])),
        reservation: text(&details["approval_id"]),
        message: text(&body["message"]),
        details: Some(details.clone()),
        replayed: reply.replayed,
        code: Some(code.to_owned()),
        ..Seen::default()
    }))
}

/// A success, once its body has exactly the fields of the protocol.
fn taken(play: &Play, request: &Request, reply: &Reply) -> Result<Seen, String> {
    let Reply { status, body, .. } = reply;
    let wanted = if matches!(request, Request::Event(_)) {
        201
    } else {
        200
    };
    if *status != wanted {
        return Err(format!("status {status}: {body}"));
    }
    if has_null(body) {
        return Err(format!("a null in {body}"));
    }
    let seen = match request {
        Request::Reserve(reserve) => reserved(play, reserve, body)?,
        Request::Decide(decide) => {
            let required = ["decision", "affected_scopes"];
            fields(body, &required, &["reason_code", "retry_after_ms", "caps"])?;
            chain(play, &decide.subject, body)?;
            Seen {
                said: verdict(body),
                affected_scopes: Some(texts(&body["affected_scopes"])),
                caps: caps(body)?,
                ..Seen::default()
            }
        }
        Request::Commit(commit) => {
            fields(body, &["status", "charged", "balances"], &["released"])?;
            Seen {
                said: said(body, "status"),
                charged: of_unit(&body["charged"], commit.unit)?,
                released: of_unit(&body["released"], commit.unit)?,
                ..Seen::default()
            }
        }
        Request::Release(_) => {
            fields(body, &["status", "released", "balances"], &[])?;
            Seen {
                said: said(body, "status"),
                released: body["released"]["amount"].as_i64(),
                ..Seen::default()
            }
        }
        Request::Extend(_) => {
            let required = ["status", "expires_at_ms", "remaining_ttl_ms", "balances"];
            fields(body, &required, &[])?;
            Seen {
                said: said(body, "status"),
                ttl_ms: body["remaining_ttl_ms"].as_i64(),
                expires_at_ms: body["expires_at_ms"].as_i64(),
                ..Seen::default()
            }
        }
        Request::Event(event) => {
            fields(body, &["status", "event_id", "balances"], &["charged"])?;
            let charged = of_unit(&body["charged"], event.unit)?;
            if charged == Some(event.amount) {
                return Err(format!("`charged` of the whole amount: {body}"));
            }
            Seen {
                said: said(body, "status"),
                // Only said where it is less.
                charged: charged.or(Some(event.amount)),
                ..Seen::default()
            }
        }
        Request::Get(_) => Seen {
            said: said(body, "status"),
            charged: body["committed"]["amount"].as_i64(),
            ..Seen::default()
        },
        Request::Fund(fund) => Seen {
            said: if body["operation"] == json!(fund.operation) {
                "FUNDED".into()
            } else {
                body.to_string()
            },
            allocated: of_unit(&body["new_allocated"], fund.unit)?,
            remaining: of_unit(&body["new_remaining"], fund.unit)?,
            ..Seen::default()
        },
        Request::Post(_)
        | Request::Provision(_)
        | Request::Resolve(_)
        | Request::Wait(_)
        | Request::Balances(_) => Seen::default(),
    };
    Ok(Seen {
        balances: rows(&body["balances"])?,
        replayed: reply.replayed,
        ..seen
    })
}

fn reserved(play: &Play, reserve: &Reserve, body: &Value) -> Result<Seen, String> {
    let denied = body["decision"] == "DENY";
    let both = ["decision", "affected_scopes", "scope_path"];
    let lease = ["reservation_id", "expires_at_ms", "remaining_ttl_ms"];
    let held = ["reserved", "balances"];
    let optional = ["caps", "reason_code"];
    match (reserve.dry_run, denied) {
        (false, _) => fields(body, &[&both[..], &lease, &held].concat(), &optional)?,
        (true, false) => fields(body, &[&both[..], &held].concat(), &optional)?,
        (true, true) => {
            let required = [&both[..], &["reason_code"]].concat();
            fields(body, &required, &["retry_after_ms"])?;
        }
    }
    let path = chain(play, &reserve.subject, body)?;
    if body["scope_path"] != json!(path) {
        return Err(format!("scope_path is not {path}: {body}"));
    }
    Ok(Seen {
        said: verdict(body),
        reservation: body["reservation_id"].as_str().map(str::to_owned),
        reserved: of_unit(&body["reserved"], reserve.unit)?,
        ttl_ms: body["remaining_ttl_ms"].as_i64(),
        expires_at_ms: body["expires_at_ms"].as_i64(),
        affected_scopes: Some(texts(&body["affected_scopes"])),
        caps: caps(body)?,
        ..Seen::default()
    })
}

/// Every scope on the way down to the subject stands first, budgeted or not; then those of
/// other budgets that count. Answers the deepest.
fn chain(play: &Play, subject: &Subject, body: &Value) -> Result<String, String> {
    let levels = [
        ("workspace", &subject.workspace),
        ("app", &subject.app),
        ("workflow", &subject.workflow),
        ("agent", &subject.agent),
        ("toolset", &subject.toolset),
    ];
    let tenant = subject.tenant.as_deref().map(|tenant| play.named(tenant));
    let mut path = format!("tenant:{}", tenant.unwrap_or_else(|| play.tenant.clone()));
    let mut chain = vec![path.clone()];
    for (level, value) in levels {
        if let Some(value) = value {
            path = format!("{path}/{level}:{}", value.to_ascii_lowercase());
            chain.push(path.clone());
        }
    }
    if texts(&body["affected_scopes"]).starts_with(&chain) {
        return Ok(path);
    }
    Err(format!(
        "affected_scopes begin otherwise than {chain:?}: {body}"
    ))
}

/// A request that the case writes itself.
async fn own_words(play: &Play, by: By, post: &Post) -> Result<Seen, String> {
    let fill = |text: &str| {
        let held = play.reservations.iter();
        held.fold(play.named(text), |text, (name, held)| {
            text.replace(&format!("{{{name}}}"), &held.id)
        })
    };
    let headers: Vec<_> = post
        .headers
        .iter()
        .map(|(name, value)| (name, fill(value)))
        .collect();
    let reply = send(
        play,
        by,
        &fill(&post.path),
        Some(fill(&post.body)),
        &headers,
    )
    .await?;
    if let Some(refused) = refused(&reply)? {
        return Ok(refused);
    }
    Ok(Seen {
        said: reply.status.to_string(),
        replayed: reply.replayed,
        ..Seen::default()
    })
}

fn reserve_body(play: &Play, reserve: &Reserve, key: &str) -> Value {
    let mut body = json!({
        "idempotency_key": key,
        "subject": subject(play, &reserve.subject),
        "action": action(&reserve.action),
        "estimate": amount(reserve.unit, reserve.amount),
    });
    put(&mut body, "ttl_ms", reserve.ttl_ms);
    put(&mut body, "grace_period_ms", reserve.grace_period_ms);
    let policy = reserve.overage_policy.map(|policy| policy.word());
    put(&mut body, "overage_policy", policy);
    put(&mut body, "dry_run", reserve.dry_run.then_some(true));
    body
}

fn decide_body(play: &Play, decide: &Decide, key: &str) -> Value {
    json!({
        "idempotency_key": key,
        "subject": subject(play, &decide.subject),
        "action": action(&decide.action),
        "estimate": amount(decide.unit, decide.amount),
    })
}

fn event_body(play: &Play, event: &Event, key: &str) -> Value {
    let mut body = json!({
        "idempotency_key": key,
        "subject": subject(play, &event.subject),
        "action": action(&event.action),
        "actual": amount(event.unit, event.amount),
    });
    let policy = event.overage_policy.map(|policy| policy.word());
    put(&mut body, "overage_policy", policy);
    body
}

fn subject(play: &Play, subject: &Subject) -> Value {
    let mut body = json!({});
    let tenant = subject.tenant.as_deref().map(|tenant| play.named(tenant));
    put(&mut body, "tenant", tenant);
    put(&mut body, "workspace", subject.workspace.as_deref());
    put(&mut body, "app", subject.app.as_deref());
    put(&mut body, "workflow", subject.workflow.as_deref());
    put(&mut body, "agent", subject.agent.as_deref());
    put(&mut body, "toolset", subject.toolset.as_deref());
    let dimensions = Some(&subject.dimensions).filter(|dimensions| !dimensions.is_empty());
    put(&mut body, "dimensions", dimensions.map(|all| json!(all)));
    body
}

fn action(action: &Action) -> Value {
    json!({"kind": action.kind, "name": action.name})
}

fn amount(unit: Unit, amount: i64) -> Value {
    json!({"unit": unit.word(), "amount": amount})
}

/// A field that is only sent where there is something to say.
fn put(body: &mut Value, name: &str, value: Option<impl Into<Value>>) {
    if let Some(value) = value {
        body[name] = value.into();
    }
}

/// Refuses a field that is missing, and one that the protocol does not know.
fn fields(body: &Value, required: &[&str], optional: &[&str]) -> Result<(), String> {
    let object = body
        .as_object()
        .ok_or_else(|| format!("no object: {body}"))?;
    let missing = required.iter().find(|name| !object.contains_key(**name));
    if let Some(missing) = missing {
        return Err(format!("no {missing:?} in {body}"));
    }
    let known = |name: &String| required.iter().chain(optional).any(|known| known == name);
    match object.keys().find(|name| !known(name)) {
        Some(more) => Err(format!("{more:?} in {body}")),
        None => Ok(()),
    }
}

fn has_null(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(values) => values.iter().any(has_null),
        Value::Object(fields) => fields.values().any(has_null),
        _ => false,
    }
}

fn verdict(body: &Value) -> String {
    match body["decision"].as_str() {
        Some("DENY") => format!("200 {}", said(body, "reason_code")),
        _ => said(body, "decision"),
    }
}

fn said(body: &Value, field: &str) -> String {
    body[field]
        .as_str()
        .map_or_else(|| body.to_string(), str::to_owned)
}

fn texts(values: &Value) -> Vec<String> {
    let values = values.as_array().into_iter().flatten();
    values
        .filter_map(|value| value.as_str().map(str::to_owned))
        .collect()
}

/// Nothing where there is no amount. An amount in another unit is a mistake.
fn of_unit(value: &Value, unit: Unit) -> Result<Option<i64>, String> {
    if value.is_null() {
        return Ok(None);
    }
    fields(value, &["unit", "amount"], &[])?;
    if value["unit"] != unit.word() {
        return Err(format!("{value} where {} were asked for", unit.word()));
    }
    let amount = value["amount"].as_i64();
    amount
        .map(Some)
        .ok_or_else(|| format!("no integer: {value}"))
}

fn caps(body: &Value) -> Result<Option<Caps>, String> {
    let given = body.get("caps").cloned();
    let caps = given.map(serde_json::from_value).transpose();
    caps.map_err(|error| format!("{error} in {body}"))
}

fn rows(balances: &Value) -> Result<Vec<Row>, String> {
    let balances = balances.as_array().into_iter().flatten();
    balances.map(row).collect()
}

fn row(balance: &Value) -> Result<Row, String> {
    let required = [
        "scope",
        "scope_path",
        "remaining",
        "reserved",
        "spent",
        "allocated",
    ];
    let optional = ["debt", "overdraft_limit", "is_over_limit"];
    fields(balance, &required, &optional)?;
    let word = balance["remaining"]["unit"].as_str().unwrap_or_default();
    let known = Unit::of_word(word).filter(|unit| *unit != Unit::Calls);
    let unit = known.ok_or_else(|| format!("no unit of the protocol: {balance}"))?;
    let amount = |name: &str| -> Result<i64, String> {
        of_unit(&balance[name], unit).map(Option::unwrap_or_default)
    };
    for name in ["debt", "overdraft_limit"] {
        if balance.get(name).is_some() && amount(name)? == 0 {
            return Err(format!("{name} of nothing: {balance}"));
        }
    }
    let over_limit = balance.get("is_over_limit").is_some();
    if over_limit && balance["is_over_limit"] != true {
        return Err(format!("is_over_limit that is not true: {balance}"));
    }
    let scope = balance["scope_path"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    if balance["scope"].as_str() != scope.rsplit('/').next() {
        return Err(format!(
            "scope is not the last segment of {scope}: {balance}"
        ));
    }
    let row = Row {
        scope,
        unit,
        remaining: amount("remaining")?,
        reserved: amount("reserved")?,
        spent: amount("spent")?,
        debt: amount("debt")?,
        over_limit,
    };
    let used = row.remaining + row.reserved + row.spent + row.debt;
    if amount("allocated")? != used {
        return Err(format!("the columns don't add up: {balance}"));
    }
    Ok(row)
}
