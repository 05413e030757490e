//! The gateway under fire: a tenant closed in mid-flight, kill -9, no database, TLS.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use remit::proto::*;
use serde_json::{Value, json};

use crate::policy::provision;
use crate::support::*;

const ACME: &str = "
tenants: [{tenant: acme, cycles_compatible: {}}]
budgets: [{scope: 'tenant:acme', unit: UNIT_RISK_POINTS, allocation: 1000000}]
";

/// A client of the protocol.
#[derive(Clone)]
struct Agent {
    client: reqwest::Client,
    base: Arc<RwLock<String>>,
    key: String,
}

impl Agent {
    async fn of(world: &World) -> Self {
        provision(&world.operator, ACME).await.expect("a plan");
        let permissions = [Permission::Authority, Permission::Read];
        Self {
            client: reqwest::Client::new(),
            base: Arc::new(RwLock::new(format!("http://{}", world.server.cycles))),
            key: world.key("acme", &permissions, "").await,
        }
    }

    /// Status and body, or nothing where the connection broke.
    async fn post(&self, path: &str, body: &Value) -> Option<(u16, Value)> {
        let url = format!("{}{path}", self.base.read().expect("not poisoned"));
        let request = self
            .client
            .post(url)
            .header("x-cycles-api-key", &self.key)
            .header("content-type", "application/json")
            .timeout(Duration::from_secs(20))
            .body(body.to_string());
        let answer = request.send().await.ok()?;
        let status = answer.status().as_u16();
        let text = answer.text().await.ok()?;
        let body = serde_json::from_str(&text);
        Some((status, body.unwrap_or_else(|_| panic!("JSON: {text}"))))
    }

    /// Sends the same until it is answered otherwise than by a fault of the server's, as
    /// the protocol's clients do.
    async fn persist(&self, path: &str, body: &Value) -> (u16, Value) {
        let begun = Instant::now();
        loop {
            match self.post(path, body).await {
                Some((status, body)) if status < 500 => return (status, body),
                _ => tokio::time::sleep(Duration::from_millis(30)).await,
            }
            assert!(begun.elapsed() < Duration::from_secs(60), "no answer");
        }
    }
}

fn reservation(points: i64) -> Value {
    json!({
        "idempotency_key": unique("reserve"),
        "subject": {"tenant": "acme", "agent": "bot"},
        "action": {"kind": "tool.x", "name": "act"},
        "estimate": {"unit": "RISK_POINTS", "amount": points},
    })
}

fn actual(points: i64) -> Value {
    json!({
        "idempotency_key": unique("commit"),
        "actual": {"unit": "RISK_POINTS", "amount": points},
    })
}

fn id(body: &Value) -> &str {
    body["reservation_id"].as_str().expect("a reservation")
}

async fn root(operator: &Client) -> Balance {
    let request = ListBalancesRequest {
        tenant: "acme".into(),
        ..ListBalancesRequest::default()
    };
    let found = operator.clone().authority.list_balances(request).await;
    found.expect("balances").into_inner().balances.remove(0)
}

#[tokio::test]
async fn a_tenant_that_is_closed_in_mid_flight_settles_nothing_more() {
    let world = World::start().await;
    let agent = Agent::of(&world).await;
    let told = Arc::new(Mutex::new((0_i64, 0_usize)));
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let (agent, told) = (agent.clone(), told.clone());
        tasks.spawn(async move {
            loop {
                let (status, held) = agent.persist("/v1/reservations", &reservation(2)).await;
                if status == 409 {
                    assert_eq!(held["error"], "TENANT_CLOSED", "{held}");
                    break;
                }
                assert_eq!(status, 200, "{held}");
                let path = format!("/v1/reservations/{}/commit", id(&held));
                let (status, settled) = agent.persist(&path, &actual(1)).await;
                let mut told = told.lock().expect("not poisoned");
                match status {
                    200 => told.0 += 1,
                    _ => {
                        assert_eq!(settled["error"], "TENANT_CLOSED", "{settled}");
                        told.1 += 1;
                    }
                }
            }
        });
    }
    while told.lock().expect("not poisoned").0 < 50 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let url = format!("http://{}/v1/admin/tenants/acme", world.server.cycles_admin);
    let closed = agent
        .client
        .patch(url)
        .header("x-admin-api-key", &world.server.key)
        .header("content-type", "application/json")
        .body(r#"{"status":"CLOSED"}"#);
    let closed = closed.send().await.expect("an answer");
    assert_eq!(closed.status(), 200);
    tasks.join_all().await;
    let (spent, cut) = *told.lock().expect("not poisoned");
    let balance = root(&world.operator).await;
    assert_eq!(balance.spent, spent);
    assert_eq!(balance.reserved, 2 * cut as i64, "what was cut off lapses");
    // A question is answered, not refused.
    let mut question = reservation(1);
    question["dry_run"] = true.into();
    for path in ["/v1/reservations", "/v1/decide"] {
        if path == "/v1/decide" {
            question
                .as_object_mut()
                .expect("an object")
                .remove("dry_run");
        }
        let (status, body) = agent.persist(path, &question).await;
        let (decision, reason) = (&body["decision"], &body["reason_code"]);
        assert_eq!(
            (status, decision, reason),
            (200, &json!("DENY"), &json!("TENANT_CLOSED"))
        );
    }
    world.database.assert_intact();
}

#[tokio::test]
async fn ten_kills_of_the_server_lose_and_double_nothing() {
    let mut world = World::start().await;
    let agent = Agent::of(&world).await;
    let told: Arc<Mutex<BTreeMap<String, i64>>> = Arc::default();
    let stop = Arc::new(Mutex::new(false));
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let (agent, told, stop) = (agent.clone(), told.clone(), stop.clone());
        tasks.spawn(async move {
            while !*stop.lock().expect("not poisoned") {
                let (status, held) = agent.persist("/v1/reservations", &reservation(2)).await;
                assert_eq!(status, 200, "{held}");
                let path = format!("/v1/reservations/{}/commit", id(&held));
                let (status, settled) = agent.persist(&path, &actual(1)).await;
                assert_eq!(
                    (status, &settled["status"]),
                    (200, &json!("COMMITTED")),
                    "{settled}"
                );
                let before = told
                    .lock()
                    .expect("not poisoned")
                    .insert(id(&held).to_owned(), 1);
                assert_eq!(before, None, "one key, one hold");
            }
        });
    }
    let answered = || told.lock().expect("not poisoned").len();
    for _ in 0..10 {
        let (from, begun) = (answered(), Instant::now());
        while answered() < from + 10 {
            assert!(begun.elapsed() < Duration::from_secs(60), "stuck");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        world.server.kill();
        world.server.restart(&world.database).await;
        *agent.base.write().expect("not poisoned") = format!("http://{}", world.server.cycles);
    }
    *stop.lock().expect("not poisoned") = true;
    tasks.join_all().await;
    let balance = root(&world.server.operator()).await;
    assert_eq!(balance.spent, answered() as i64);
    assert_eq!(balance.reserved, 0);
    world.database.assert_intact();
}

#[tokio::test]
async fn without_a_database_nothing_is_decided_and_health_says_so() {
    let world = World::start().await;
    let agent = Agent::of(&world).await;
    let (status, _) = agent.persist("/v1/reservations", &reservation(1)).await;
    assert_eq!(status, 200);
    let health = async || {
        let url = format!("http://{}/actuator/health", world.server.cycles);
        let answer = agent.client.get(url).send().await.expect("an answer");
        let status = answer.status().as_u16();
        (status, answer.text().await.expect("a body"))
    };
    assert_eq!(health().await, (200, r#"{"status":"UP"}"#.to_owned()));
    // Stopped, not ended: it would be started again.
    let postmaster = Pid::from_raw(world.database.postmaster().expect("a server"));
    let processes = std::fs::read_dir("/proc").expect("processes");
    let children = processes.filter_map(|entry| {
        let stat = std::fs::read_to_string(entry.ok()?.path().join("stat")).ok()?;
        let (pid, rest) = stat.split_once(' ')?;
        let parent = rest.rsplit_once(')')?.1.split_whitespace().nth(1)?;
        (parent.parse() == Ok(postmaster.as_raw())).then(|| pid.parse().ok().map(Pid::from_raw))?
    });
    let all: Vec<_> = children.chain([postmaster]).collect();
    let send = |signal| {
        for pid in &all {
            kill(*pid, signal).expect("a process");
        }
    };
    send(Signal::SIGSTOP);
    let begun = Instant::now();
    while health().await != (503, r#"{"status":"DOWN"}"#.to_owned()) {
        assert!(begun.elapsed() < Duration::from_secs(20), "still up");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let waiting = reservation(1);
    let (status, body) = agent
        .post("/v1/reservations", &waiting)
        .await
        .expect("an answer");
    assert!((503..=504).contains(&status), "{status} {body}");
    assert_eq!(body["error"], "INTERNAL_ERROR");
    send(Signal::SIGCONT);
    // The same request, once.
    let (status, body) = agent.persist("/v1/reservations", &waiting).await;
    assert_eq!(status, 200, "{body}");
    assert_eq!(root(&world.operator).await.reserved, 2);
    world.database.assert_intact();
}

#[tokio::test]
async fn with_a_certificate_both_planes_speak_tls_alone() {
    let database = Database::start().await;
    let file = |name: &str| database.folder.path().join(name);
    let (cert, key) = (file("cert.pem"), file("key.pem"));
    std::fs::write(&cert, include_str!("tls/cert.pem")).expect("a file");
    std::fs::write(&key, include_str!("tls/key.pem")).expect("a file");
    let text = |path: &std::path::Path| path.to_str().expect("a path").to_owned();
    let more = ["--tls-cert", &text(&cert), "--tls-key", &text(&key)].map(str::to_owned);
    let more: Vec<_> = more.iter().map(String::as_str).collect();
    let server = Server::start_with(&database, &more).await;
    let trusted = reqwest::Certificate::from_pem(include_bytes!("tls/cert.pem"));
    let client = reqwest::Client::builder()
        .add_root_certificate(trusted.expect("a certificate"))
        .build()
        .expect("a client");
    for address in [&server.cycles, &server.cycles_admin] {
        let port = address.rsplit(':').next().expect("a port");
        let url = format!("https://localhost:{port}/actuator/health");
        let answer = client.get(url).send().await.expect("an answer");
        assert_eq!(answer.status(), 200);
        let plain = format!("http://localhost:{port}/actuator/health");
        assert!(client.get(plain).send().await.is_err(), "no plain HTTP");
    }
}

#[tokio::test]
async fn a_full_server_says_when_to_come_back_and_is_not_taken_for_a_dead_one() {
    let database = Database::start().await;
    let server = Server::start_with(&database, &["--max-concurrent-requests", "1"]).await;
    let operator = server.operator();
    provision(&operator, ACME).await.expect("a plan");
    // Both doors share the places; a stream keeps the only one.
    let watch = WatchEntriesRequest {
        tenant: "acme".into(),
        after_sequence: Some(0),
    };
    let mut ledger = operator.ledger.clone();
    let mut entries = ledger
        .watch_entries(watch)
        .await
        .expect("a stream")
        .into_inner();
    entries
        .message()
        .await
        .expect("a message")
        .expect("an entry");
    let url = |path: &str| format!("http://{}{path}", server.cycles);
    let client = reqwest::Client::new();
    let asked = client
        .post(url("/v1/reservations"))
        .header("x-cycles-api-key", &server.key)
        .header("content-type", "application/json")
        .body(reservation(1).to_string());
    let refused = asked.send().await.expect("an answer");
    assert_eq!(refused.status(), 429);
    assert_eq!(refused.headers()["retry-after"], "1");
    let body: Value = serde_json::from_str(&refused.text().await.expect("a body")).expect("JSON");
    assert_eq!(body["error"], "LIMIT_EXCEEDED");
    let healthy = client.get(url("/actuator/health")).send().await;
    assert_eq!(healthy.expect("an answer").status(), 200);
}

#[tokio::test]
async fn the_admin_plane_lifts_no_default_deny_in_passing() {
    let world = World::with_budgets(vec![budget("tenant:acme", Unit::RiskPoints, 10)]).await;
    let client = reqwest::Client::new();
    let patch = async |body: &'static str| {
        let url = format!("http://{}/v1/admin/tenants/acme", world.server.cycles_admin);
        let request = client
            .patch(url)
            .header("x-admin-api-key", &world.server.key)
            .header("content-type", "application/json");
        let answer = request.body(body).send().await.expect("an answer");
        (
            answer.status().as_u16(),
            answer.text().await.expect("a body"),
        )
    };
    // What native tenants have too can be changed, and changes nothing else.
    assert_eq!(patch(r#"{"name":"Acme"}"#).await.0, 200);
    let (status, body) = patch(r#"{"max_reservation_ttl_ms":60000}"#).await;
    assert_eq!(status, 409, "{body}");
    let mut uncovered = reserve(1);
    uncovered.subject.as_mut().expect("a subject").toolset = "send-email".into();
    let answer = world.operator.clone().authority.reserve(uncovered).await;
    let answer = answer.expect("an answer").into_inner();
    assert_eq!(verdict(&answer), "BUDGET_NOT_PROVISIONED");
}

#[tokio::test]
async fn two_keys_are_none() {
    let world = World::start().await;
    let agent = Agent::of(&world).await;
    let url = format!("http://{}/v1/balances?tenant=acme", world.server.cycles);
    let asked = || {
        agent
            .client
            .get(&url)
            .header("x-cycles-api-key", &agent.key)
    };
    let one = asked().send().await.expect("an answer");
    assert_eq!(one.status(), 200);
    let two = asked().header("x-cycles-api-key", &world.server.key);
    let two = two.send().await.expect("an answer");
    assert_eq!(two.status(), 401);
}

#[tokio::test]
async fn a_call_is_named_and_counted_and_its_trace_goes_into_the_ledger() {
    const OWN: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const OTHER: &str = "0af7651916cd43dd8448eb211c80319c";
    let database = Database::start().await;
    let metrics = database.folder.path().join("metrics");
    let metrics_file = metrics.to_str().expect("a path");
    let more = [
        "--metrics-listen",
        "127.0.0.1:0",
        "--metrics-port-file",
        metrics_file,
    ];
    let server = Server::start_with(&database, &more).await;
    let operator = server.operator();
    provision(&operator, ACME).await.expect("a plan");
    let request = CreateApiKeyRequest {
        idempotency_key: unique("key"),
        api_key: Some(ApiKey {
            tenant: "acme".into(),
            permissions: vec![Permission::Authority.into()],
            ..ApiKey::default()
        }),
    };
    let created = operator.clone().provisioning.create_api_key(request).await;
    let agents_key = created.expect("a key").into_inner().secret;
    let client = reqwest::Client::new();
    let decide = async |headers: &[(&str, &str)]| {
        let mut asked = client
            .post(format!("http://{}/v1/decide", server.cycles))
            .header("x-cycles-api-key", &agents_key)
            .header("x-request-id", "mine")
            .header("content-type", "application/json")
            .body(reservation(1).to_string());
        for (name, value) in headers {
            asked = asked.header(*name, *value);
        }
        let answer = asked.send().await.expect("an answer");
        assert_eq!(answer.status(), 200);
        let header = |name: &str| answer.headers()[name].to_str().expect("text").to_owned();
        assert_eq!(header("x-ratelimit-remaining"), "-1");
        assert_ne!(header("x-request-id"), "mine");
        (
            header("x-cycles-trace-id"),
            header("x-remit-ledger-sequence"),
        )
    };
    let upper = OWN.to_uppercase();
    let parent = format!("00-{OTHER}-00f067aa0ba902b7-01");
    assert_eq!(decide(&[("x-cycles-trace-id", &upper)]).await.0, OWN);
    let (fresh, _) = decide(&[("x-cycles-trace-id", "nonsense")]).await;
    assert!(fresh.len() == 32 && fresh != OWN, "{fresh}");
    let both = [("traceparent", parent.as_str()), ("x-cycles-trace-id", OWN)];
    let (trace, sequence) = decide(&both).await;
    assert_eq!(trace, OTHER);
    let request = GetEntryRequest {
        tenant: "acme".into(),
        sequence: sequence.parse().expect("a number"),
    };
    let entry = operator.ledger.clone().get_entry(request).await;
    let body = entry
        .expect("an entry")
        .into_inner()
        .entry
        .expect("one")
        .body;
    let body: Value = serde_json::from_str(&body).expect("JSON");
    assert_eq!(
        (&body["kind"], &body["trace_id"]),
        (&json!("DECIDE"), &json!(OTHER))
    );

    // The audit log is the ledger: who asked, and what.
    let logs = client
        .get(format!(
            "http://{}/v1/admin/audit/logs?tenant_id=acme&limit=1",
            server.cycles_admin
        ))
        .header("x-admin-api-key", &server.key);
    let logs = logs
        .send()
        .await
        .expect("an answer")
        .text()
        .await
        .expect("a body");
    let logs: Value = serde_json::from_str(&logs).expect("JSON");
    let (row, key) = (&logs["logs"][0], agents_key.split('_').nth(1));
    assert_eq!(
        (&row["operation"], row["key_id"].as_str()),
        (&json!("DECIDE"), key)
    );

    let address = std::fs::read_to_string(&metrics).expect("an address");
    let text = client.get(format!("http://{address}/metrics")).send().await;
    let text = text.expect("an answer").text().await.expect("a body");
    let line = r#"remit_requests_total{method="cycles.v1/Decide",code="OK"} 3"#;
    assert!(text.contains(line), "{text}");
}

/// An answer with its headers.
#[derive(Debug)]
struct Reply {
    status: u16,
    headers: reqwest::header::HeaderMap,
    body: Value,
}

impl Reply {
    fn said(&self) -> (u16, &str) {
        (self.status, self.body["error"].as_str().unwrap_or(""))
    }

    fn header(&self, name: &str) -> &str {
        let value = self.headers.get(name);
        value.map_or("", |value| value.to_str().expect("text"))
    }

    fn has_replayed(&self) -> bool {
        self.header("x-remit-replayed") == "true"
    }
}

/// One call on the runtime plane. Without a body it is a GET.
async fn call(world: &World, key: (&'static str, &str), path: &str, body: Option<&Value>) -> Reply {
    let client = reqwest::Client::new();
    let url = format!("http://{}{path}", world.server.cycles);
    let request = match body {
        None => client.get(url),
        Some(body) => client
            .post(url)
            .header("content-type", "application/json")
            .body(body.to_string()),
    };
    let answer = request.header(key.0, key.1).send().await;
    let answer = answer.expect("an answer");
    let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
    let text = answer.text().await.expect("a body");
    Reply {
        status,
        headers,
        body: serde_json::from_str(&text).expect("JSON"),
    }
}

impl Agent {
    async fn call(&self, world: &World, path: &str, body: Option<&Value>) -> Reply {
        call(world, ("x-cycles-api-key", &self.key), path, body).await
    }
}

const ASKS: &str = "
policies:
  - tenant: acme
    rules: [{id: ask, effect: RULE_EFFECT_REQUIRE_APPROVAL, approval_timeout: 4s, match: {tools: [act]}}]
";

/// Decides as a person does.
async fn resolve(world: &World, id: &Value, approve: bool) {
    use resolve_approval_request::Resolution::{Approve, Reject};
    let resolution = if approve { Approve(true) } else { Reject(true) };
    let request = ResolveApprovalRequest {
        idempotency_key: unique("resolve"),
        approval_id: id.as_str().expect("an id").into(),
        resolution: Some(resolution),
        tenant: "acme".into(),
        approver: "rosa".into(),
        ..ResolveApprovalRequest::default()
    };
    let mut approvals = world.operator.approvals.clone();
    let answer = approvals.resolve_approval(request);
    answer.await.expect("resolved");
}

#[tokio::test]
async fn what_a_person_has_approved_is_granted_under_its_key_while_it_is_held_or_used() {
    let world = World::start().await;
    let mut agent = Agent::of(&world).await;
    // A key that may act and not read is told its own grants too.
    agent.key = world.key("acme", &[Permission::Authority], "").await;
    provision(&world.operator, ASKS).await.expect("a plan");
    for end in ["COMMITTED", "RELEASED", "EXPIRED"] {
        let mut asked = reservation(3);
        let ttl_ms = if end == "EXPIRED" { 1_000 } else { 60_000 };
        (asked["ttl_ms"], asked["grace_period_ms"]) = (ttl_ms.into(), 0.into());
        let first = agent.call(&world, "/v1/reservations", Some(&asked)).await;
        assert_eq!(first.said(), (409, "BUDGET_EXCEEDED"));
        assert_eq!(first.body["details"]["reason_code"], "APPROVAL_REQUIRED");
        let again = agent.call(&world, "/v1/reservations", Some(&asked)).await;
        assert_eq!(again.body["details"], first.body["details"]);
        resolve(&world, &first.body["details"]["approval_id"], true).await;
        if end == "EXPIRED" {
            // Nobody has heard the yes, and nothing is held any more.
            tokio::time::sleep(Duration::from_millis(1_100)).await;
            let after = agent.call(&world, "/v1/reservations", Some(&asked)).await;
            assert_eq!(after.said(), (409, "BUDGET_EXCEEDED"));
            assert_eq!(after.body["details"]["reason_code"], "RESERVATION_EXPIRED");
            continue;
        }
        let granted = agent.call(&world, "/v1/reservations", Some(&asked)).await;
        assert_eq!(granted.status, 200, "{granted:?}");
        assert!(granted.has_replayed());
        assert_eq!(granted.body["decision"], "ALLOW");
        let left = granted.body["remaining_ttl_ms"].as_i64().expect("a lease");
        assert!((1..=60_000).contains(&left), "{left} ms");
        // Another request under the key is none that anybody approved.
        let mut other = asked.clone();
        other["estimate"]["amount"] = 4.into();
        let refused = agent.call(&world, "/v1/reservations", Some(&other)).await;
        assert_eq!(refused.said(), (409, "IDEMPOTENCY_MISMATCH"));
        let path = format!("/v1/reservations/{}", id(&granted.body));
        let settled = match end {
            "COMMITTED" => {
                let path = format!("{path}/commit");
                agent.call(&world, &path, Some(&actual(2))).await.status
            }
            _ => {
                let path = format!("{path}/release");
                let body = json!({"idempotency_key": unique("release")});
                agent.call(&world, &path, Some(&body)).await.status
            }
        };
        assert_eq!(settled, 200);
        let after = agent.call(&world, "/v1/reservations", Some(&asked)).await;
        if end == "RELEASED" {
            assert_eq!(after.said(), (409, "BUDGET_EXCEEDED"));
            assert_eq!(
                after.body["details"]["reason_code"],
                "RESERVATION_FINALIZED"
            );
            continue;
        }
        assert_eq!(after.status, 200, "{end}: {after:?}");
        assert!(after.has_replayed());
        let wanted = {
            let mut wanted = granted.body.clone();
            wanted["remaining_ttl_ms"] = 0.into();
            wanted
        };
        assert_eq!(after.body, wanted, "{end}");
    }
    assert_eq!(root(&world.operator).await.spent, 2);
    world.database.assert_intact();
}

#[tokio::test]
async fn what_nobody_approved_says_how_it_ended() {
    let world = World::start().await;
    let agent = Agent::of(&world).await;
    provision(&world.operator, ASKS).await.expect("a plan");
    for end in ["REJECTED", "WITHDRAWN", "EXPIRED"] {
        let asked = reservation(3);
        let first = agent.call(&world, "/v1/reservations", Some(&asked)).await;
        let approval = &first.body["details"]["approval_id"];
        match end {
            "REJECTED" => resolve(&world, approval, false).await,
            "WITHDRAWN" => {
                let id = approval.as_str().expect("an id");
                let path = format!("/v1/reservations/{id}/release");
                let body = json!({"idempotency_key": unique("release")});
                let released = agent.call(&world, &path, Some(&body)).await;
                assert_eq!(released.status, 200, "{released:?}");
            }
            _ => tokio::time::sleep(Duration::from_millis(4_100)).await,
        }
        let after = agent.call(&world, "/v1/reservations", Some(&asked)).await;
        assert_eq!(after.said(), (409, "BUDGET_EXCEEDED"), "{end}");
        let details = &after.body["details"];
        let code = format!("APPROVAL_{end}");
        assert_eq!(details["reason_code"], code.as_str());
        assert_eq!(details["deny_detail"]["reason_code"], code.as_str());
        assert_eq!(&details["approval_id"], approval);
        assert_eq!(details["retryable"], false);
        let text = after.body.to_string();
        assert!(!text.contains("has to approve"), "{text}");
    }
    assert_eq!(root(&world.operator).await.spent, 0);
    world.database.assert_intact();
}

#[tokio::test]
async fn each_header_takes_its_own_kind_of_key() {
    let world = World::start().await;
    let agent = Agent::of(&world).await;
    let held = agent
        .call(&world, "/v1/reservations", Some(&reservation(1)))
        .await;
    let path = format!("/v1/reservations/{}", id(&held.body));
    let operator = world.server.key.as_str();
    // Agents' calls are made with a tenant's key.
    let question = reservation(1);
    let mut event = reservation(1);
    event.as_object_mut().expect("an object").remove("estimate");
    event["actual"] = json!({"unit": "RISK_POINTS", "amount": 1});
    let release = json!({"idempotency_key": unique("release")});
    let extend = json!({"idempotency_key": unique("extend"), "extend_by_ms": 1_000});
    let calls = [
        ("/v1/decide".to_owned(), Some(&question)),
        ("/v1/reservations".to_owned(), Some(&question)),
        ("/v1/events".to_owned(), Some(&event)),
        ("/v1/balances?tenant=acme".to_owned(), None),
        ("/v1/reservations?tenant=acme".to_owned(), None),
        (format!("{path}?tenant=acme"), None),
        (format!("{path}/commit"), Some(&actual(1))),
        (format!("{path}/extend"), Some(&extend)),
        (format!("{path}/release?tenant=acme"), Some(&release)),
    ];
    for (path, body) in &calls {
        let refused = call(&world, ("x-cycles-api-key", operator), path, *body).await;
        assert_eq!(refused.said(), (401, "UNAUTHORIZED"), "{path}");
        assert_eq!(refused.header("x-cycles-tenant"), "");
        let message = refused.body["message"].as_str().expect("a text");
        assert!(message.contains("a key of the tenant"), "{message}");
    }
    // And an operator's header takes no tenant's, where it is looked at.
    for (path, body) in [&calls[4], &calls[5], &calls[8]] {
        let refused = call(&world, ("x-admin-api-key", &agent.key), path, *body).await;
        assert_eq!(refused.said(), (401, "UNAUTHORIZED"), "{path}");
        let let_in = call(&world, ("x-admin-api-key", operator), path, *body).await;
        assert_eq!(let_in.status, 200, "{path}: {let_in:?}");
    }
}

#[tokio::test]
async fn whose_key_it_is_is_said_where_it_may_not_do_this() {
    let world = World::start().await;
    let mut agent = Agent::of(&world).await;
    agent.key = world.key("acme", &[Permission::Read], "").await;
    let refused = agent
        .call(&world, "/v1/reservations", Some(&reservation(1)))
        .await;
    assert_eq!(refused.said(), (403, "FORBIDDEN"));
    assert_eq!(refused.header("x-cycles-tenant"), "acme");
}

#[tokio::test]
async fn a_reservation_has_one_spelling() {
    let world = World::start().await;
    let agent = Agent::of(&world).await;
    let held = agent
        .call(&world, "/v1/reservations", Some(&reservation(1)))
        .await;
    let known = id(&held.body).to_owned();
    let extend = json!({"idempotency_key": "once", "extend_by_ms": 1_000});
    let of = |id: &str| format!("/v1/reservations/{id}/extend");
    let first = agent.call(&world, &of(&known), Some(&extend)).await;
    let again = agent
        .call(&world, &of(&known.to_uppercase()), Some(&extend))
        .await;
    assert_eq!(again.status, 200, "{again:?}");
    assert!(again.has_replayed(), "extended once");
    assert_eq!(again.body["expires_at_ms"], first.body["expires_at_ms"]);
    for other in [
        known.replace('-', ""),
        format!("urn:uuid:{known}"),
        format!("%7B{known}%7D"),
        "not-a-uuid".into(),
        "00000000-0000-8000-8000-000000000000".into(),
    ] {
        let unknown = agent.call(&world, &of(&other), Some(&extend)).await;
        assert_eq!(unknown.said(), (404, "NOT_FOUND"), "{other}");
        let message = unknown.body["message"].as_str().expect("a text");
        assert!(message.starts_with("Resource not found: "), "{message}");
        let read = agent
            .call(&world, &format!("/v1/reservations/{other}"), None)
            .await;
        assert_eq!(read.said(), (404, "NOT_FOUND"), "{other}");
        assert_eq!(read.body["message"], message);
        // What is wrong with the rest comes first.
        let mut bad = extend.clone();
        bad["extend_by_ms"] = 0.into();
        let refused = agent.call(&world, &of(&other), Some(&bad)).await;
        assert_eq!(refused.said(), (400, "INVALID_REQUEST"), "{other}");
        let message = "Validation failed: extend_by_ms: must be 1 to 86400000 milliseconds";
        assert_eq!(refused.body["message"], message);
        let mut bad = actual(1);
        bad["actual"]["amount"] = (-1).into();
        let path = format!("/v1/reservations/{other}/commit");
        let refused = agent.call(&world, &path, Some(&bad)).await;
        assert_eq!(refused.said(), (400, "INVALID_REQUEST"), "{other}");
    }
}

#[tokio::test]
async fn a_reservation_is_read_with_the_scopes_that_hold_it() {
    const MANY: &str = "
tenants:
  - {tenant: acme, cycles_compatible: {}}
  - {tenant: native}
budgets:
  - {scope: 'tenant:acme', unit: UNIT_RISK_POINTS, allocation: 1000}
  - {scope: 'tenant:acme/agent:bot', unit: UNIT_RISK_POINTS, allocation: 1000}
  - {scope: 'tenant:acme/run:*', unit: UNIT_RISK_POINTS, allocation: 1000}
  - {scope: 'tenant:native/toolset:mail', unit: UNIT_RISK_POINTS, allocation: 1000}
  - {scope: 'tenant:native/toolset:other', unit: UNIT_RISK_POINTS, allocation: 1000}
tools: [{tenant: native, name: act, level: ACTION_LEVEL_WRITE, tier: 2, toolset: mail}]
";
    let world = World::start().await;
    provision(&world.operator, MANY).await.expect("a plan");
    let permissions = [Permission::Authority, Permission::Read];
    for (tenant, subject, wanted) in [
        (
            "acme",
            json!({"workspace": "w", "agent": "bot", "dimensions": {"run": "R1"}}),
            json!([
                "tenant:acme",
                "tenant:acme/workspace:w",
                "tenant:acme/workspace:w/agent:bot",
                "tenant:acme/agent:bot",
                "tenant:acme/run:r1",
            ]),
        ),
        (
            "native",
            json!({"toolset": "other"}),
            json!([
                "tenant:native",
                "tenant:native/toolset:other",
                "tenant:native/toolset:mail"
            ]),
        ),
    ] {
        let key = world.key(tenant, &permissions, "").await;
        let key = ("x-cycles-api-key", key.as_str());
        let mut asked = reservation(1);
        asked["subject"] = subject;
        let held = call(&world, key, "/v1/reservations", Some(&asked)).await;
        assert_eq!(held.body["affected_scopes"], wanted, "{held:?}");
        let path = format!("/v1/reservations/{}", id(&held.body));
        let read = call(&world, key, &path, None).await;
        assert_eq!(read.body["affected_scopes"], wanted, "{read:?}");
        let listed = call(&world, key, "/v1/reservations", None).await;
        assert_eq!(listed.body["reservations"][0]["affected_scopes"], wanted);
        // Also once there is no such budget any more.
        let gone = format!(
            "absent_budgets: [{{scope: 'tenant:{tenant}/agent:bot', unit: UNIT_RISK_POINTS}}]"
        );
        if tenant == "acme" {
            provision(&world.operator, &gone).await.expect("a plan");
            let read = call(&world, key, &path, None).await;
            assert_eq!(read.body["affected_scopes"], wanted);
        }
    }
    // It is found in the toolset in which the catalogue has it act.
    let key = world.key("native", &permissions, "").await;
    for (toolset, rows) in [("mail", 1), ("other", 1), ("chat", 0)] {
        let path = format!("/v1/reservations?toolset={toolset}");
        let listed = call(&world, ("x-cycles-api-key", &key), &path, None).await;
        let found = listed.body["reservations"].as_array().map(Vec::len);
        assert_eq!(found, Some(rows), "{toolset}: {listed:?}");
    }
}

#[tokio::test]
async fn pages_are_filled_whatever_they_are_filtered_by() {
    let world = World::start().await;
    let agent = Agent::of(&world).await;
    let mut ends = Vec::new();
    for _ in 0..2 {
        for _ in 0..6 {
            let held = agent
                .call(&world, "/v1/reservations", Some(&reservation(1)))
                .await;
            assert_eq!(held.status, 200);
        }
        ends.push(jiff::Timestamp::now().to_string());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let pages = async |question: String| {
        let mut rows = Vec::new();
        let mut cursor = String::new();
        loop {
            let path = format!("/v1/reservations?{question}{cursor}");
            let page = agent.call(&world, &path, None).await;
            assert_eq!(page.status, 200, "{page:?}");
            let found = page.body["reservations"].as_array().expect("rows");
            rows.push(found.len());
            match page.body["next_cursor"].as_str() {
                None => {
                    assert_eq!(page.body["has_more"], false);
                    return rows;
                }
                Some(next) => cursor = format!("&cursor={next}"),
            }
        }
    };
    let (early, late) = (&ends[0], &ends[1]);
    assert_eq!(pages("limit=5".into()).await, [5, 5, 2]);
    assert_eq!(pages(format!("limit=4&to={early}")).await, [4, 2]);
    assert_eq!(pages(format!("limit=3&to={early}")).await, [3, 3]);
    assert_eq!(pages(format!("limit=4&from={early}")).await, [4, 2]);
    assert_eq!(pages(format!("limit=4&from={late}")).await, [0]);
    assert_eq!(pages(format!("limit=50&expires_to={late}")).await, [0]);
    // A cursor belongs to its question.
    let first = format!("/v1/reservations?limit=2&to={early}");
    let first = agent.call(&world, &first, None).await;
    let cursor = first.body["next_cursor"].as_str().expect("more");
    for other in [
        "",
        &format!("&to={late}"),
        &format!("&to={early}&agent=bot"),
    ] {
        let path = format!("/v1/reservations?limit=2{other}&cursor={cursor}");
        let refused = agent.call(&world, &path, None).await;
        assert_eq!(refused.said(), (400, "INVALID_REQUEST"), "{other}");
        let message = refused.body["message"].as_str().expect("a text");
        assert!(message.contains("cursor"), "{message}");
    }
}

#[tokio::test]
async fn dimensions_of_the_protocols_own_bounds_pass_and_come_back() {
    let world = World::start().await;
    let agent = Agent::of(&world).await;
    let dimensions = |value: &str| {
        let all = (0..16).map(|at| (format!("key-{at}"), json!(value.repeat(256))));
        Value::Object(all.collect())
    };
    for (value, comes_back) in [("x", true), ("@", true), ("名", false)] {
        let mut asked = reservation(1);
        asked["subject"]["dimensions"] = dimensions(value);
        asked["action"]["tags"] = json!(["a", "b"]);
        let metadata = (0..60).map(|at| (format!("m{at}"), json!("text")));
        asked["metadata"] = Value::Object(metadata.collect());
        let held = agent.call(&world, "/v1/reservations", Some(&asked)).await;
        assert_eq!(held.status, 200, "{held:?}");
        let path = format!("/v1/reservations/{}", id(&held.body));
        let read = agent.call(&world, &path, None).await;
        let (given, back) = (
            &asked["subject"]["dimensions"],
            &read.body["subject"]["dimensions"],
        );
        // What there is no room for is told as scopes say it.
        match comes_back {
            true => assert_eq!(back, given),
            false => assert!(
                back["key-0"]
                    .as_str()
                    .is_some_and(|v| v.starts_with("sha256-"))
            ),
        }
        assert_eq!(read.body["metadata"], asked["metadata"]);
        let asked = asked.as_object_mut().expect("an object");
        let amount = asked.remove("estimate").expect("an amount");
        let decide = json!({
            "idempotency_key": unique("decide"), "subject": asked["subject"],
            "action": asked["action"], "estimate": amount,
        });
        let decided = agent.call(&world, "/v1/decide", Some(&decide)).await;
        assert_eq!(decided.status, 200, "{decided:?}");
        let mut event = decide.clone();
        let event = event.as_object_mut().expect("an object");
        event.remove("estimate");
        event.insert("actual".into(), amount);
        event.insert("metadata".into(), json!({"long": "x".repeat(4_000)}));
        let event = Value::Object(event.clone());
        let applied = agent.call(&world, "/v1/events", Some(&event)).await;
        assert_eq!(applied.status, 201, "{applied:?}");
    }
    world.database.assert_intact();
}

#[tokio::test]
async fn errors_speak_of_the_protocols_own_fields() {
    let world = World::start().await;
    let agent = Agent::of(&world).await;
    let message = async |path: &str, body: Option<&Value>| {
        let refused = agent.call(&world, path, body).await;
        assert_eq!(refused.said().0 / 100, 4, "{refused:?}");
        refused.body["message"].as_str().expect("a text").to_owned()
    };
    const NAME: &str = "must be 1 to 128 characters of a-z, A-Z, 0-9, '_', '.', '-'";
    for (query, field) in [
        ("/v1/reservations?tenant=BAD!", "tenant"),
        ("/v1/balances?tenant=BAD!", "tenant"),
        ("/v1/reservations?agent=*", "agent"),
        ("/v1/reservations?agent=%00", "agent"),
        ("/v1/balances?workspace=*", "workspace"),
        ("/v1/balances?toolset=%00", "toolset"),
    ] {
        let wanted = format!("Validation failed: {field}: {NAME}");
        assert_eq!(message(query, None).await, wanted, "{query}");
    }
    let mut asked = reservation(1);
    asked["ttl_ms"] = 1.into();
    let wanted = "Validation failed: ttl_ms: must be 1000 to 86400000 milliseconds";
    assert_eq!(message("/v1/reservations", Some(&asked)).await, wanted);
    asked["ttl_ms"] = 60_000.into();
    let held = agent.call(&world, "/v1/reservations", Some(&asked)).await;
    asked["estimate"]["amount"] = 2.into();
    let wanted = "the idempotency key was used for another request: estimate differs";
    assert_eq!(message("/v1/reservations", Some(&asked)).await, wanted);
    let path = format!("/v1/reservations/{}/extend", id(&held.body));
    let mut extend = json!({"idempotency_key": "e", "extend_by_ms": 1_000});
    agent.call(&world, &path, Some(&extend)).await;
    extend["extend_by_ms"] = 2_000.into();
    let wanted = "the idempotency key was used for another request: extend_by_ms differs";
    assert_eq!(message(&path, Some(&extend)).await, wanted);
    for kind in ["a*b", " a", "a?", &"x".repeat(65)] {
        let mut asked = reservation(1);
        asked["action"]["kind"] = kind.into();
        let wanted = "Validation failed: action.kind: must be 1 to 64 characters without control \
                      characters, '*', '?' and spaces around it";
        assert_eq!(message("/v1/reservations", Some(&asked)).await, wanted);
    }
    let mut asked = reservation(1);
    let metadata = (0..61).map(|at| (format!("m{at}"), json!(at)));
    asked["metadata"] = Value::Object(metadata.collect());
    let wanted = "Validation failed: metadata: must be at most 60 entries";
    assert_eq!(message("/v1/reservations", Some(&asked)).await, wanted);
}

#[tokio::test]
async fn the_numbers_of_a_refusal_are_numbers() {
    const POOR: &str = "
budgets:
  - {scope: 'tenant:acme', unit: UNIT_RISK_POINTS, allocation: 10, overdraft_limit: 5}
  - {scope: 'tenant:acme', unit: UNIT_CALLS, allocation: 10}
";
    let world = World::start().await;
    let agent = Agent::of(&world).await;
    provision(&world.operator, POOR).await.expect("a plan");
    let mut event = json!({
        "idempotency_key": unique("event"), "subject": {"agent": "bot"},
        "action": {"kind": "k", "name": "act"},
        "actual": {"unit": "RISK_POINTS", "amount": 11}, "overage_policy": "REJECT",
    });
    let refused = agent.call(&world, "/v1/events", Some(&event)).await;
    assert_eq!(refused.said(), (409, "BUDGET_EXCEEDED"));
    assert_eq!(refused.body["details"]["reason"], "OVERAGE_REJECTED");
    assert_eq!(refused.body["details"]["actual"], 11);
    event["overage_policy"] = "ALLOW_WITH_OVERDRAFT".into();
    event["actual"]["amount"] = 16.into();
    let refused = agent.call(&world, "/v1/events", Some(&event)).await;
    assert_eq!(refused.said(), (409, "OVERDRAFT_LIMIT_EXCEEDED"));
    let details = &refused.body["details"];
    assert_eq!(
        (&details["limit"], &details["scope"]),
        (&json!(5), &json!("tenant:acme"))
    );
    // And the units are the protocol's.
    event["actual"] = json!({"unit": "TOKENS", "amount": 1});
    let refused = agent.call(&world, "/v1/events", Some(&event)).await;
    assert_eq!(refused.said(), (400, "UNIT_MISMATCH"));
    assert_eq!(
        refused.body["details"]["expected_units"],
        json!(["RISK_POINTS"])
    );
}

#[tokio::test]
async fn fields_of_the_next_version_are_taken_and_mean_something() {
    const TO: &str = "
policies:
  - tenant: acme
    rules:
      - {id: inside, effect: RULE_EFFECT_DENY, when: \"has(args.recipient_domain) && args.recipient_domain != 'acme.example'\"}
      - {id: team, effect: RULE_EFFECT_DENY, when: \"has(args.custom) && args.custom.team == 'none'\"}
";
    let world = World::start().await;
    let agent = Agent::of(&world).await;
    provision(&world.operator, TO).await.expect("a plan");
    let asked = |keys: Value| {
        let mut asked = reservation(1);
        asked["action"]["policy_keys"] = keys;
        asked
    };
    for (keys, rule) in [
        (json!({}), None),
        (
            json!({"recipient_domain": "acme.example", "host": "smtp"}),
            None,
        ),
        (json!({"recipient_domain": "else.example"}), Some("inside")),
        (json!({"custom": {"team": "none"}}), Some("team")),
    ] {
        let answer = agent
            .call(&world, "/v1/reservations", Some(&asked(keys)))
            .await;
        match rule {
            None => assert_eq!(answer.status, 200, "{answer:?}"),
            Some(rule) => {
                let why = &answer.body["details"]["deny_detail"];
                assert_eq!(why["blocked_by_policy"], rule, "{answer:?}");
            }
        }
    }
    let many = (0..9).map(|at| (format!("k{at}"), json!("v")));
    let many = json!({"custom": Value::Object(many.collect())});
    for keys in [
        json!({"surprise": "x"}),
        json!({"host": 5}),
        json!("host"),
        many,
    ] {
        let refused = agent
            .call(&world, "/v1/reservations", Some(&asked(keys)))
            .await;
        assert_eq!(refused.said(), (400, "INVALID_REQUEST"));
    }
    // What is observed is answered as a question, whatever `dry_run` says.
    let before = root(&world.operator).await;
    for (keys, decision) in [
        (json!({}), "ALLOW"),
        (json!({"recipient_domain": "x"}), "DENY"),
    ] {
        let mut observed = asked(keys);
        observed["observe_mode"] = "OBSERVE".into();
        let answer = agent
            .call(&world, "/v1/reservations", Some(&observed))
            .await;
        assert_eq!(
            (answer.status, &answer.body["decision"]),
            (200, &json!(decision))
        );
        assert!(answer.body.get("reservation_id").is_none(), "{answer:?}");
    }
    assert_eq!(root(&world.operator).await, before);
    for mode in ["ENFORCE", "DISABLED"] {
        let mut enforced = asked(json!({}));
        enforced["observe_mode"] = mode.into();
        let answer = agent
            .call(&world, "/v1/reservations", Some(&enforced))
            .await;
        assert!(
            answer.body["reservation_id"].is_string(),
            "{mode}: {answer:?}"
        );
    }
    world.database.assert_intact();
}

#[tokio::test]
async fn what_the_catalogue_adds_is_shown_beside_nothing() {
    let world = World::start().await;
    let agent = Agent::of(&world).await;
    let document = "
budgets:
  - {scope: 'tenant:acme', unit: UNIT_RISK_POINTS, allocation: 1000}
  - {scope: 'tenant:acme', unit: UNIT_USD_MICROCENTS, allocation: 1000}
  - {scope: 'tenant:acme', unit: UNIT_TOKENS, allocation: 1000,
     thresholds: [{from_basis_points: 0, caps: {max_tokens: '9'}}]}
tools:
  - {tenant: acme, name: act, level: ACTION_LEVEL_EXECUTE, tier: 3,
     costs: [{unit: UNIT_RISK_POINTS, value: 20}]}
";
    provision(&world.operator, document).await.expect("a plan");
    let asks = |dry_run: bool| {
        let mut asked = reservation(7);
        asked["estimate"]["unit"] = "USD_MICROCENTS".into();
        asked["dry_run"] = dry_run.into();
        asked
    };
    let seven = json!({"unit": "USD_MICROCENTS", "amount": 7});
    for dry_run in [true, false] {
        let asked = asks(dry_run);
        let held = agent.call(&world, "/v1/reservations", Some(&asked)).await;
        assert_eq!(held.body["reserved"], seven, "{held:?}");
        assert_eq!(held.body["caps"]["max_tokens"], 9);
        if dry_run {
            continue;
        }
        let path = format!("/v1/reservations/{}", id(&held.body));
        let read = agent.call(&world, &path, None).await;
        assert_eq!(read.body["reserved"], seven, "{read:?}");
        let body = json!({"idempotency_key": unique("release")});
        let path = format!("{path}/release");
        let released = agent.call(&world, &path, Some(&body)).await;
        assert_eq!(released.body["released"], seven, "{released:?}");
    }
    // The points of what is asked in points are at least the catalogue's, also when it is
    // only asked about.
    let mut asked = reservation(1);
    asked["estimate"]["unit"] = "RISK_POINTS".into();
    asked["dry_run"] = true.into();
    let would = agent.call(&world, "/v1/reservations", Some(&asked)).await;
    assert_eq!(would.body["reserved"]["amount"], 20, "{would:?}");

    // Caps hold for what waits, too, once it is approved.
    provision(&world.operator, ASKS).await.expect("a plan");
    let asked = asks(false);
    let waits = agent.call(&world, "/v1/reservations", Some(&asked)).await;
    resolve(&world, &waits.body["details"]["approval_id"], true).await;
    let granted = agent.call(&world, "/v1/reservations", Some(&asked)).await;
    assert_eq!(granted.body["decision"], "ALLOW_WITH_CAPS", "{granted:?}");
    assert_eq!(granted.body["caps"]["max_tokens"], 9);
    world.database.assert_intact();
}

#[tokio::test]
async fn a_customer_is_the_same_in_capitals() {
    let world = World::start().await;
    let agent = Agent::of(&world).await;
    let each = "budgets: [{scope: 'tenant:acme/customer:*', unit: UNIT_TOKENS, allocation: 10}]";
    provision(&world.operator, each).await.expect("a plan");
    for (customer, status) in [("jane@acme.example", 200), ("Jane@ACME.example", 409)] {
        let mut asked = reservation(10);
        asked["estimate"]["unit"] = "TOKENS".into();
        asked["subject"]["dimensions"] = json!({"customer": customer});
        let answer = agent.call(&world, "/v1/reservations", Some(&asked)).await;
        assert_eq!(answer.status, status, "{answer:?}");
    }
}
