//! Webhooks, from outside: receivers that fail in every way, and nothing is lost.

use std::collections::{BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hmac::{Hmac, KeyInit as _, Mac as _};
use remit::proto::resolve_approval_request::Resolution;
use remit::proto::*;
use serde_json::{Value, json};
use sha2::Sha256;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::policy::{action, ask, provision, told};
use crate::support::*;

const ACME: &str = "
tenants: [{tenant: acme}]
budgets:
  - {scope: 'tenant:acme', unit: UNIT_RISK_POINTS, allocation: 100, thresholds: [{from_basis_points: 5000, max_tier: 3}]}
tools:
  - {tenant: acme, name: '*', level: ACTION_LEVEL_EXECUTE, tier: 1, costs: [{unit: UNIT_RISK_POINTS, value: 50}]}
policies:
  - tenant: acme
    rules:
      - {id: never, match: {tools: [never]}, effect: RULE_EFFECT_DENY, reason: it is nobody's}
      - {id: asks, match: {tools: [asks]}, effect: RULE_EFFECT_REQUIRE_APPROVAL}
      - {id: hasty, match: {tools: [hasty]}, effect: RULE_EFFECT_REQUIRE_APPROVAL, approval_timeout: 1s}
      - {id: alarm, match: {tools: [alarm]}, effect: RULE_EFFECT_ESCALATE, reason: look}
";

/// What a receiver does with a request; then it takes all of them.
#[derive(Debug, Clone)]
enum Mood {
    Fails,
    Redirects(String),
    Dawdles,
    Closes,
}

/// One request as it came.
#[derive(Debug, Clone)]
struct Got {
    id: String,
    signature: String,
    body: String,
    taken: bool,
}

impl Got {
    fn entry(&self) -> Value {
        let message: Value = serde_json::from_str(&self.body).expect("JSON");
        assert_eq!(message["id"], self.id);
        message["entry"].clone()
    }

    fn types(&self) -> Vec<String> {
        let message: Value = serde_json::from_str(&self.body).expect("JSON");
        serde_json::from_value(message["types"].clone()).expect("names")
    }

    fn assert_signed(&self, secret: &str) {
        let (at, hex) = self
            .signature
            .strip_prefix("t=")
            .and_then(|rest| rest.split_once(",v1="))
            .expect("a signature");
        let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).expect("a secret");
        mac.update(format!("{at}.{}", self.body).as_bytes());
        let tag = hex::decode(hex).expect("hex");
        mac.verify_slice(&tag).expect("signed with the secret");
    }
}

#[derive(Clone)]
struct Receiver {
    address: SocketAddr,
    got: Arc<Mutex<Vec<Got>>>,
    moods: Arc<Mutex<VecDeque<Mood>>>,
}

impl Receiver {
    /// Listens nowhere yet.
    async fn down() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        Self {
            address: listener.local_addr().expect("an address"),
            got: Arc::default(),
            moods: Arc::default(),
        }
    }

    async fn up(self) -> Self {
        let listener = TcpListener::bind(self.address).await.expect("its port");
        let receiver = self.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let receiver = receiver.clone();
                // A sender that gives up is what some of these tests are about.
                tokio::spawn(async move { receiver.answer(stream).await.ok() });
            }
        });
        self
    }

    async fn start(moods: &[Mood]) -> Self {
        let receiver = Self::down().await;
        receiver.lock().0.extend(moods.iter().cloned());
        receiver.up().await
    }

    fn lock(
        &self,
    ) -> (
        std::sync::MutexGuard<'_, VecDeque<Mood>>,
        std::sync::MutexGuard<'_, Vec<Got>>,
    ) {
        let moods = self.moods.lock().unwrap_or_else(PoisonError::into_inner);
        let got = self.got.lock().unwrap_or_else(PoisonError::into_inner);
        (moods, got)
    }

    async fn answer(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let mut bytes = Vec::new();
        let (head, length) = loop {
            let text = String::from_utf8_lossy(&bytes).into_owned();
            if let Some((head, _)) = text.split_once("\r\n\r\n") {
                let length = header(head, "content-length");
                break (head.to_owned(), length.parse::<usize>().expect("a length"));
            }
            if stream.read_buf(&mut bytes).await? == 0 {
                return Ok(());
            }
        };
        let begins = head.len() + 4;
        while bytes.len() < begins + length {
            stream.read_buf(&mut bytes).await?;
        }
        let mood = self.lock().0.pop_front();
        let got = Got {
            id: header(&head, "remit-event-id"),
            signature: header(&head, "remit-signature"),
            body: String::from_utf8(bytes.split_off(begins)).expect("text"),
            taken: mood.is_none(),
        };
        self.lock().1.push(got);
        let status = match mood {
            None => "204 No Content".to_owned(),
            Some(Mood::Fails) => "500 Internal Server Error".to_owned(),
            Some(Mood::Redirects(to)) => format!("307 Temporary Redirect\r\nlocation: {to}"),
            Some(Mood::Dawdles) => {
                tokio::time::sleep(Duration::from_secs(12)).await;
                "204 No Content".to_owned()
            }
            Some(Mood::Closes) => {
                stream.write_all(b"HTTP/1.1 20").await?;
                return stream.shutdown().await;
            }
        };
        let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        stream.write_all(answer.as_bytes()).await?;
        stream.shutdown().await
    }

    fn got(&self) -> Vec<Got> {
        self.lock().1.clone()
    }

    /// Ids that were taken, each once, in the order of the first time.
    fn taken(&self) -> Vec<String> {
        let mut seen = BTreeSet::new();
        let got = self.got().into_iter().filter(|got| got.taken);
        got.map(|got| got.id)
            .filter(|id| seen.insert(id.clone()))
            .collect()
    }

    async fn wait_for(&self, count: usize) -> Vec<String> {
        for _ in 0..600 {
            let taken = self.taken();
            if taken.len() >= count {
                return taken;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("{:?} of {count} after a minute", self.taken());
    }
}

fn header(head: &str, name: &str) -> String {
    let mut lines = head.lines().filter_map(|line| line.split_once(": "));
    let found = lines.find(|(key, _)| key.eq_ignore_ascii_case(name));
    found.map_or_else(String::new, |(_, value)| value.to_owned())
}

/// A server that may call receivers on this host.
async fn start() -> World {
    let database = Database::start().await;
    let server = Server::start_with(&database, &["--webhooks-allow-private"]).await;
    let operator = server.operator();
    provision(&operator, ACME).await.expect("a plan");
    World {
        server,
        database,
        operator,
    }
}

/// The secret of a new subscription.
async fn subscribe(world: &World, id: &str, url: &str, types: &[EventType]) -> String {
    let request = CreateSubscriptionRequest {
        subscription: Some(Subscription {
            subscription_id: id.into(),
            tenant: "acme".into(),
            url: url.into(),
            event_types: types.iter().map(|of| (*of).into()).collect(),
            ..Subscription::default()
        }),
    };
    let mut events = world.operator.events.clone();
    let made = events.create_subscription(request).await;
    made.expect("a subscription").into_inner().secret
}

async fn subscriptions(world: &World) -> Vec<Subscription> {
    let request = ListSubscriptionsRequest {
        tenant: "acme".into(),
    };
    let mut events = world.operator.events.clone();
    let listed = events.list_subscriptions(request).await;
    listed.expect("a list").into_inner().subscriptions
}

async fn redeliver(world: &World, id: &str, from: i64) -> i64 {
    let request = RedeliverEventsRequest {
        subscription_id: id.into(),
        tenant: "acme".into(),
        from_sequence: from,
    };
    let mut events = world.operator.events.clone();
    let answer = events.redeliver_events(request).await;
    answer.expect("an answer").into_inner().revived
}

/// An action that is denied, and told to whoever wants to know.
async fn denied(client: &Client) {
    let answer = ask(client, action("never", json!({}))).await;
    assert_eq!(told(&answer), "POLICY_DENIED");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_fails_misses_nothing_and_holds_nobody_up() {
    let world = start().await;
    let trap = Receiver::start(&[]).await;
    let elsewhere = format!("http://{}/", trap.address);
    let fine = Receiver::start(&[]).await;
    let down = Receiver::down().await;
    let mut all = vec![("fine", fine.clone()), ("down", down.clone())];
    for (name, mood) in [
        ("failing", Mood::Fails),
        ("redirecting", Mood::Redirects(elsewhere)),
        ("slow", Mood::Dawdles),
        ("closing", Mood::Closes),
    ] {
        all.push((name, Receiver::start(&vec![mood; 2]).await));
    }
    let mut secrets = Vec::new();
    for (name, receiver) in &all {
        let url = format!("http://{}/{name}", receiver.address);
        secrets.push(subscribe(&world, name, &url, &[EventType::ActionDenied]).await);
    }
    // Each has the deadline of a request, whatever receivers do meanwhile.
    for _ in 0..5 {
        denied(&world.operator).await;
    }
    let taken = fine.wait_for(5).await;
    let mut in_order = taken.clone();
    in_order.sort_by_key(|id| {
        id.rsplit('/')
            .next()
            .and_then(|seq| seq.parse::<i64>().ok())
    });
    assert_eq!(taken, in_order);
    assert_eq!(fine.got().len(), 5, "each once");
    denied(&world.operator).await;
    let down = down.up().await;
    for (name, receiver) in &all {
        let mut taken = receiver.wait_for(6).await;
        taken.sort();
        let mut wanted = fine.wait_for(6).await;
        wanted.sort();
        assert_eq!(taken, wanted, "{name}");
    }
    assert_eq!(down.taken().len(), 6);
    assert!(trap.got().is_empty(), "no redirect is followed");
    for ((_, receiver), secret) in all.iter().zip(&secrets) {
        receiver
            .got()
            .iter()
            .for_each(|got| got.assert_signed(secret));
    }
    for _ in 0..100 {
        if subscriptions(&world)
            .await
            .iter()
            .all(|of| of.retrying == 0)
        {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    for subscription in subscriptions(&world).await {
        assert_eq!((subscription.retrying, subscription.dead), (0, 0));
    }
    world.database.assert_intact();
    let leaked = world
        .database
        .count("SELECT count(*) FROM ledger WHERE body LIKE '%whsec_%'");
    assert_eq!(leaked.await, 0, "no secret in the ledger");
}

#[tokio::test]
async fn a_killed_server_goes_on_where_it_was() {
    let mut world = start().await;
    let receiver = Receiver::start(&vec![Mood::Fails; 3]).await;
    let url = format!("http://{}/", receiver.address);
    subscribe(&world, "s", &url, &[EventType::ActionDenied]).await;
    for _ in 0..3 {
        denied(&world.operator).await;
    }
    world.server.kill();
    let again = ["--webhooks-allow-private"];
    world.server = Server::start_with(&world.database, &again).await;
    world.operator = world.server.operator();
    receiver.wait_for(3).await;
    world.database.assert_intact();
}

#[tokio::test]
async fn what_was_given_up_or_lost_is_delivered_again_by_command() {
    let world = start().await;
    let receiver = Receiver::start(&[Mood::Fails]).await;
    let url = format!("http://{}/", receiver.address);
    subscribe(&world, "s", &url, &[EventType::ActionDenied]).await;
    denied(&world.operator).await;
    while subscriptions(&world).await[0].retrying == 0 {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    world
        .database
        .sql("UPDATE deliveries SET state = 'DEAD'")
        .await;
    let listed = subscriptions(&world).await.remove(0);
    assert_eq!((listed.retrying, listed.dead), (0, 1));
    assert_eq!(
        listed.last_error,
        "the receiver answered 500 Internal Server Error"
    );
    assert_eq!(redeliver(&world, "s", 0).await, 1);
    receiver.wait_for(1).await;

    let seq = receiver.got()[0].entry()["seq"].as_i64().expect("a number");
    redeliver(&world, "s", seq).await;
    for _ in 0..100 {
        if receiver.got().len() == 3 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let ids: BTreeSet<_> = receiver.got().into_iter().map(|got| got.id).collect();
    assert_eq!(
        (receiver.got().len(), ids.len()),
        (3, 1),
        "one id, however often"
    );

    let gone = DeleteSubscriptionRequest {
        subscription_id: "s".into(),
        tenant: "acme".into(),
    };
    let mut events = world.operator.events.clone();
    events.delete_subscription(gone).await.expect("its end");
    denied(&world.operator).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(receiver.got().len(), 3);
    world.database.assert_intact();
}

#[tokio::test]
async fn each_kind_of_event_is_told() {
    let world = start().await;
    let receiver = Receiver::start(&[]).await;
    let url = format!("http://{}/", receiver.address);
    let all: Vec<_> = (1..=8)
        .filter_map(|of| EventType::try_from(of).ok())
        .collect();
    assert_eq!(all.len(), 8);
    subscribe(&world, "all", &url, &all).await;

    let asked = ask(&world.operator, action("asks", json!({}))).await;
    let id = asked.approval.expect("an approval").approval_id;
    let key = world.key("acme", &[Permission::Approve], "").await;
    let request = ResolveApprovalRequest {
        idempotency_key: unique("resolve"),
        approval_id: id,
        resolution: Some(Resolution::Reject(true)),
        ..ResolveApprovalRequest::default()
    };
    let mut approvals = world.server.client(&key).approvals;
    approvals.resolve_approval(request).await.expect("a no");
    ask(&world.operator, action("hasty", json!({}))).await;
    denied(&world.operator).await;
    ask(&world.operator, action("alarm", json!({}))).await;
    for _ in 0..3 {
        // What waited in vain holds its part until then.
        tokio::time::sleep(Duration::from_secs(1)).await;
        ask(&world.operator, action("work", json!({}))).await;
    }
    let freeze = "freezes: [{scope: 'tenant:acme/agent:bot', reason: stop}]";
    provision(&world.operator, freeze).await.expect("a plan");
    let mut told = BTreeSet::new();
    for _ in 0..300 {
        told = receiver.got().iter().flat_map(Got::types).collect();
        if told.len() == all.len() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let wanted = [
        "action.denied",
        "approval.expired",
        "approval.requested",
        "approval.resolved",
        "budget.exhausted",
        "budget.threshold",
        "freeze.changed",
        "incident.raised",
    ];
    assert_eq!(told.into_iter().collect::<Vec<_>>(), wanted);
}

#[tokio::test]
async fn a_name_that_points_inside_is_not_called() {
    let world = World::start().await;
    provision(&world.operator, ACME).await.expect("a plan");
    let receiver = Receiver::start(&[]).await;
    let url = format!("https://localhost:{}/", receiver.address.port());
    subscribe(&world, "s", &url, &[EventType::ActionDenied]).await;
    denied(&world.operator).await;
    let failed = loop {
        let listed = subscriptions(&world).await.remove(0);
        if listed.retrying == 1 {
            break listed;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert!(
        failed.last_error.ends_with("no public address"),
        "{}",
        failed.last_error
    );
    assert!(receiver.got().is_empty());
}

#[tokio::test]
async fn a_subscription_needs_the_right_to_read_the_ledger_and_a_name_of_its_own() {
    let world = start().await;
    let key = world.key("acme", &[Permission::Provision], "").await;
    let request = || CreateSubscriptionRequest {
        subscription: Some(Subscription {
            subscription_id: "s".into(),
            tenant: "acme".into(),
            url: "https://hooks.example/".into(),
            event_types: vec![EventType::ActionDenied.into()],
            ..Subscription::default()
        }),
    };
    let mut events = world.server.client(&key).events;
    let status = events.create_subscription(request()).await;
    assert_eq!(
        reason(&status.expect_err("no auditor")),
        "PERMISSION_MISSING"
    );
    let mut events = world.operator.events.clone();
    events
        .create_subscription(request())
        .await
        .expect("the first");
    let status = events.create_subscription(request()).await;
    assert_eq!(reason(&status.expect_err("taken")), "SUBSCRIPTION_EXISTS");
    for at in 1..16 {
        let mut another = request();
        if let Some(subscription) = &mut another.subscription {
            subscription.subscription_id = format!("s{at}");
        }
        events.create_subscription(another).await.expect("another");
    }
    let mut another = request();
    if let Some(subscription) = &mut another.subscription {
        subscription.subscription_id = "s16".into();
    }
    let status = events.create_subscription(another).await;
    assert_eq!(
        reason(&status.expect_err("too many")),
        "TOO_MANY_SUBSCRIPTIONS"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscription_that_cannot_be_read_keeps_no_other_back() {
    let world = start().await;
    let fine = Receiver::start(&[]).await;
    let url = format!("http://{}/", fine.address);
    for id in ["broken", "fine"] {
        subscribe(&world, id, &url, &[EventType::ActionDenied]).await;
    }
    world
        .database
        .sql("UPDATE subscriptions SET event_types = 'EVERYTHING' WHERE subscription_id = 'broken'")
        .await;
    denied(&world.operator).await;
    fine.wait_for(1).await;
}
