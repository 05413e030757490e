//! Catalogue, narrowing, rules and freezes, from outside.

use std::time::{Duration, Instant};

use remit::proto::*;
use serde_json::json;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::contention::persist;
use crate::support::*;

/// A document as a file for `remit provision` would say it.
fn document(text: &str) -> ProvisionRequest {
    let mut document: ProvisionRequest = serde_saphyr::from_str(text).expect("a document");
    document.idempotency_key = unique("provision");
    document
}

pub(crate) async fn provision(client: &Client, text: &str) -> Result<ProvisionResponse, Status> {
    let answer = client.provisioning.clone().provision(document(text)).await;
    answer.map(tonic::Response::into_inner)
}

/// What acme has in most of these tests: 100 points, and an e-mail that costs 20.
const ACME: &str = "
tenants: [{tenant: acme, keep_arguments: {hidden_fields: [secret], max_bytes: 1000}}]
budgets: [{scope: 'tenant:acme', unit: UNIT_RISK_POINTS, allocation: 1000}]
tools:
  - {tenant: acme, name: send_email, level: ACTION_LEVEL_EXECUTE, tier: 3, costs: [{unit: UNIT_RISK_POINTS, value: 20}]}
  - {tenant: acme, name: read_*, level: ACTION_LEVEL_READ, tier: 1}
";

fn policy(rules: &str) -> String {
    format!("policies: [{{tenant: acme, rules: [{rules}]}}]")
}

pub(crate) fn action(name: &str, arguments: serde_json::Value) -> ReserveRequest {
    ReserveRequest {
        action: Some(Action {
            name: name.into(),
            arguments: serde_json::from_value(arguments).expect("a struct"),
            ..Action::default()
        }),
        estimates: Vec::new(),
        explain: true,
        ..reserve(0)
    }
}

pub(crate) async fn ask(client: &Client, request: ReserveRequest) -> ReserveResponse {
    let answer = client.authority.clone().reserve(request).await;
    answer.expect("an answer").into_inner()
}

/// A verdict, with a word for decisions that have no reason.
pub(crate) fn told(answer: &ReserveResponse) -> String {
    match answer.reasons.first() {
        Some(reason) => reason.code.clone(),
        None => answer.decision().as_str_name().replace("DECISION_", ""),
    }
}

#[tokio::test]
async fn what_a_tool_is_and_costs_is_not_the_callers_to_say() {
    let world = World::start().await;
    provision(&world.operator, ACME).await.expect("a plan");
    for (estimate, reserved) in [(None, 20), (Some(1), 20), (Some(30), 30)] {
        let mut request = action("send_email", json!({}));
        request.estimates = estimate.map_or_else(Vec::new, points);
        let answer = ask(&world.operator, request).await;
        assert_eq!(answer.reserved[0].value, reserved);
    }
    let unknown = ask(&world.operator, action("wire_money", json!({}))).await;
    assert_eq!(told(&unknown), "UNKNOWN_ACTION");
    let read = ask(&world.operator, action("read_case", json!({}))).await;
    let explanation = read.explanation.expect("an explanation");
    assert_eq!(
        (explanation.listed_as.as_str(), explanation.tier),
        ("read_*", 1)
    );

    // A toolset and a unit that nobody gave a budget stop it, whatever the caller names.
    let more = "
tools:
  - {tenant: acme, name: read_mail, level: ACTION_LEVEL_READ, tier: 1, toolset: mail}
  - {tenant: acme, name: think, level: ACTION_LEVEL_READ, tier: 1, costs: [{unit: UNIT_TOKENS, value: 5}]}
";
    provision(&world.operator, more).await.expect("a plan");
    let mut elsewhere = action("read_mail", json!({}));
    elsewhere.subject = Some(Subject {
        toolset: "other".into(),
        ..subject("acme")
    });
    let answer = ask(&world.operator, elsewhere).await;
    assert_eq!(told(&answer), "BUDGET_NOT_PROVISIONED");
    assert_eq!(answer.reasons[0].scope, "tenant:acme/toolset:mail");
    // A key that is confined to one toolset can't reach another one by an action's name.
    let key = world
        .key("acme", &[Permission::Authority], "toolset:other")
        .await;
    let mut confined = action("read_mail", json!({}));
    confined.subject = Some(Subject {
        toolset: "other".into(),
        ..subject("acme")
    });
    let refused = world.server.client(&key).authority.reserve(confined).await;
    let status = refused.expect_err("not its toolset");
    assert_eq!(reason(&status), "SCOPE_NOT_PERMITTED");
    let answer = ask(&world.operator, action("think", json!({}))).await;
    assert_eq!(told(&answer), "BUDGET_NOT_PROVISIONED");
    assert_eq!(answer.reasons[0].unit(), Unit::Tokens);
    world.database.assert_intact();
}

#[tokio::test]
async fn a_bad_policy_says_where_and_changes_nothing() {
    let world = World::start().await;
    provision(&world.operator, ACME).await.expect("a plan");
    let good = policy("{id: good, when: 'args.n > 1', effect: RULE_EFFECT_DENY}");
    provision(&world.operator, &good).await.expect("a plan");
    let before = world.database.count("SELECT count(*) FROM ledger").await;
    let bad = policy(
        "{id: good, when: 'args.n > 1 && amount > 2', effect: RULE_EFFECT_DENY},
         {id: a b, effect: RULE_EFFECT_DENY},
         {id: caps, effect: RULE_EFFECT_ALLOW_WITH_CAPS}",
    );
    let status = provision(&world.operator, &bad)
        .await
        .expect_err("mistakes");
    assert_eq!(status.code(), Code::InvalidArgument);
    let details = status.get_error_details();
    let named: Vec<_> = details
        .bad_request()
        .map(|bad| {
            bad.field_violations
                .iter()
                .map(|v| v.field.clone())
                .collect()
        })
        .unwrap_or_default();
    assert_eq!(
        named,
        ["policies[0].rules[1].id"],
        "rules are counted once all can be read"
    );
    let status = provision(&world.operator, &bad.replace("a b", "ab")).await;
    let said = status.expect_err("mistakes").message().to_owned();
    assert!(
        said.contains("policies[0].rules[0].when line 1, column 15: unknown variable `amount`"),
        "{said}"
    );
    assert!(
        said.contains("policies[0].rules[2].caps needed with"),
        "{said}"
    );
    let after = world.database.count("SELECT count(*) FROM ledger").await;
    assert_eq!(before, after);
    let answer = ask(&world.operator, action("read_case", json!({"n": 2}))).await;
    assert_eq!(told(&answer), "POLICY_DENIED");
}

#[tokio::test]
async fn the_policy_for_all_tenants_holds_at_once_and_everywhere() {
    let world = World::start().await;
    provision(&world.operator, ACME).await.expect("a plan");
    let lax = policy("{id: mine, match: {tools: [send_email]}, effect: RULE_EFFECT_ALLOW}");
    provision(&world.operator, &lax).await.expect("a plan");
    let other = Server::start(&world.database).await;
    let servers = [world.operator.clone(), other.operator()];
    for client in &servers {
        let answer = ask(client, action("send_email", json!({}))).await;
        assert_eq!(told(&answer), "ALLOW");
    }
    let for_all = "policies: [{all_tenants: true, rules: [
        {id: no-mail, match: {tools: [send_*]}, effect: RULE_EFFECT_DENY, reason: not today}]}]";
    provision(&servers[1], for_all).await.expect("a plan");
    for client in &servers {
        for dry_run in [true, false] {
            let mut request = action("send_email", json!({}));
            request.dry_run = dry_run;
            let answer = ask(client, request).await;
            assert_eq!(told(&answer), "POLICY_DENIED");
            assert!(answer.reasons[0].rule_of_all_tenants);
            let explanation = answer.explanation.expect("an explanation");
            assert_eq!(explanation.all_tenants_policy_version, 1);
            assert_eq!(explanation.matched.len(), 2, "the tenant's own is told too");
        }
    }
    // A tenant's key can read it, and not change it.
    let key = world
        .key(
            "acme",
            &[Permission::Provision, Permission::Loosen, Permission::Read],
            "",
        )
        .await;
    let tenant = world.server.client(&key);
    let status = provision(&tenant, "policies: [{all_tenants: true}]").await;
    assert_eq!(status.expect_err("not its own").code(), Code::NotFound);
    let mut provisioning = tenant.provisioning.clone();
    let read = provisioning.get_policy(GetPolicyRequest {
        tenant: String::new(),
        all_tenants: true,
    });
    let read = read.await.expect("a policy").into_inner();
    assert_eq!(read.policy.expect("a policy").rules[0].id, "no-mail");

    provision(&servers[0], "policies: [{all_tenants: true}]")
        .await
        .expect("a plan");
    for client in &servers {
        let answer = ask(client, action("send_email", json!({}))).await;
        assert_eq!(told(&answer), "ALLOW");
    }
    world.database.assert_intact();
}

#[tokio::test]
async fn what_stops_an_action_is_lifted_only_with_a_permission_of_its_own() {
    let world = World::start().await;
    let strict = format!(
        "{ACME}
budgets: [{{scope: 'tenant:acme', unit: UNIT_RISK_POINTS, allocation: 1000,
    thresholds: [{{from_basis_points: 5000, max_tier: 1}}]}}]
freezes: [{{scope: 'tenant:acme/agent:bad', reason: under review}}]
{}",
        policy("{id: r, when: 'args.n > 1', effect: RULE_EFFECT_DENY}")
    )
    .replacen(
        "budgets: [{scope: 'tenant:acme', unit: UNIT_RISK_POINTS, allocation: 1000}]",
        "",
        1,
    );
    provision(&world.operator, &strict).await.expect("a plan");
    for more in [
        "tools: [{tenant: acme, name: '*_prod', level: ACTION_LEVEL_EXECUTE, tier: 5}]",
        "budgets: [{scope: 'tenant:acme/agent:x', unit: UNIT_RISK_POINTS, allocation: 5}]",
        "absent_budgets: [{scope: 'tenant:acme/agent:x', unit: UNIT_RISK_POINTS}]",
    ] {
        provision(&world.operator, more).await.expect(more);
    }
    let key = world.key("acme", &[Permission::Provision], "").await;
    let tenant = world.server.client(&key);
    let looser = [
        policy("{id: r, when: 'args.n > 1', effect: RULE_EFFECT_DENY, mode: RULE_MODE_SHADOW}"),
        policy("{id: r, when: 'args.n > 2', effect: RULE_EFFECT_DENY}"),
        policy("{id: r, when: 'args.n > 1', effect: RULE_EFFECT_REQUIRE_APPROVAL}"),
        policy(""),
        "absent_freezes: [{scope: 'tenant:acme/agent:bad'}]".to_owned(),
        "budgets: [{scope: 'tenant:acme', unit: UNIT_RISK_POINTS, allocation: 1000}]".to_owned(),
        "tools: [{tenant: acme, name: send_email, level: ACTION_LEVEL_EXECUTE, tier: 2, costs: [{unit: UNIT_RISK_POINTS, value: 20}]}]".to_owned(),
        "tools: [{tenant: acme, name: send_email, level: ACTION_LEVEL_EXECUTE, tier: 3}]".to_owned(),
        "tenants: [{tenant: acme, unknown_action: {level: ACTION_LEVEL_READ, tier: 1}}]".to_owned(),
        "tenants: [{tenant: acme, activity_window: 60s}]".to_owned(),
        // Of `deploy_prod`, the longer glob would say less than `*_prod` does.
        "tools: [{tenant: acme, name: deploy_*, level: ACTION_LEVEL_READ, tier: 1}]".to_owned(),
        // The second budget had been taken away.
        "budgets: [{scope: 'tenant:acme/agent:x', unit: UNIT_RISK_POINTS, allocation: 5, on_exceeded: {require_approval: true}}]".to_owned(),
        // Then nothing that is not listed is denied any more.
        "absent_tools: [{tenant: acme, name: send_email}, {tenant: acme, name: read_*}, {tenant: acme, name: '*_prod'}]".to_owned(),
    ];
    for text in &looser {
        let status = provision(&tenant, text).await.expect_err(text);
        assert_eq!(reason(&status), "LOOSENING_NOT_PERMITTED", "{text}");
    }
    for text in [
        policy(
            "{id: r, when: 'args.n > 1', effect: RULE_EFFECT_DENY},
             {id: more, match: {tools: [send_email]}, when: 'args.n > 0', effect: RULE_EFFECT_DENY}",
        ),
        "tools: [{tenant: acme, name: send_email, level: ACTION_LEVEL_EXECUTE, tier: 4, costs: [{unit: UNIT_RISK_POINTS, value: 30}]}]".to_owned(),
        "tools: [{tenant: acme, name: new_tool, level: ACTION_LEVEL_READ, tier: 1}]".to_owned(),
        "absent_tools: [{tenant: acme, name: new_tool}]".to_owned(),
    ] {
        provision(&tenant, &text).await.expect(&text);
    }
    let mut frozen = action("read_case", json!({"n": 0}));
    frozen.subject = Some(Subject {
        agent: "Bad".into(),
        ..subject("acme")
    });
    let answer = ask(&world.operator, frozen).await;
    assert_eq!(told(&answer), "SCOPE_FROZEN");
    for text in &looser {
        provision(&world.operator, text)
            .await
            .expect("an operator may");
    }
    world.database.assert_intact();
}

#[tokio::test]
async fn the_same_key_gets_the_same_caps_and_a_shadow_rule_only_a_note() {
    let world = World::start().await;
    provision(&world.operator, ACME).await.expect("a plan");
    let rules = policy(
        "{id: caps, match: {tools: [send_email]}, effect: RULE_EFFECT_ALLOW_WITH_CAPS,
          caps: {max_tokens: '500', cooldown_ms: '10'}},
         {id: try, match: {tools: [send_email]}, effect: RULE_EFFECT_DENY, mode: RULE_MODE_SHADOW}",
    );
    provision(&world.operator, &rules).await.expect("a plan");
    let request = action("send_email", json!({"n": 1, "secret": "x"}));
    let first = ask(&world.operator, request.clone()).await;
    assert_eq!(told(&first), "ALLOW_WITH_CAPS");
    let caps = first.caps.clone().expect("caps");
    assert_eq!((caps.max_tokens, caps.cooldown_ms), (Some(500), Some(10)));
    let matched = &first.explanation.as_ref().expect("an explanation").matched;
    let notes: Vec<_> = matched
        .iter()
        .map(|m| (m.rule_id.as_str(), m.mode()))
        .collect();
    assert_eq!(
        notes,
        [("caps", RuleMode::Enforce), ("try", RuleMode::Shadow)]
    );
    provision(&world.operator, &policy(""))
        .await
        .expect("a plan");
    let again = ask(&world.operator, request).await;
    assert!(again.replayed);
    assert_eq!(
        (again.caps, again.explanation),
        (first.caps, first.explanation)
    );
    let kept = "SELECT count(*) FROM ledger WHERE body LIKE
        '%\"arguments\":{\"value\":{\"n\":1,\"secret\":\"[hidden]\"},\"complete\":false}%'";
    assert_eq!(world.database.count(kept).await, 1);
    world.database.assert_intact();
}

#[tokio::test]
async fn a_replay_under_the_policy_in_force_changes_nothing_and_under_another_says_what() {
    let world = World::start().await;
    provision(&world.operator, ACME).await.expect("a plan");
    let in_force = "{id: big, when: 'args.n > 10', effect: RULE_EFFECT_DENY, reason: too big},
        {id: low, when: 'remaining.RISK_POINTS < 900', effect: RULE_EFFECT_ALLOW_WITH_CAPS, caps: {max_tokens: '5'}},
        {id: often, when: 'recent.actions > 4', effect: RULE_EFFECT_REQUIRE_APPROVAL}";
    provision(&world.operator, &policy(in_force))
        .await
        .expect("a plan");
    let mut seen = Vec::new();
    for n in [1, 20, 3, 4, 5, 6, 7, 8] {
        let answer = ask(&world.operator, action("send_email", json!({ "n": n }))).await;
        seen.push(told(&answer));
    }
    assert_eq!(
        seen,
        [
            "ALLOW",
            "POLICY_DENIED",
            "ALLOW",
            "ALLOW",
            "ALLOW",
            "ALLOW",
            "APPROVAL_REQUIRED",
            "APPROVAL_REQUIRED"
        ]
    );
    let hidden = action("send_email", json!({"n": 50, "secret": "y"}));
    ask(&world.operator, hidden).await;
    let entries = world.database.count("SELECT count(*) FROM ledger").await;
    let replay = async |rules: &str| {
        let candidate = document(&policy(rules)).policies.remove(0);
        let request = ReplayPolicyRequest {
            policy: Some(candidate),
            ..ReplayPolicyRequest::default()
        };
        let answer = world.operator.ledger.clone().replay_policy(request).await;
        answer.expect("an answer").into_inner()
    };
    let same = replay(in_force).await;
    assert_eq!((same.decisions, same.unknown), (9, 1));
    assert_eq!(same.changed, []);

    let stricter =
        replay("{id: big, when: 'args.n > 4', effect: RULE_EFFECT_DENY, reason: too big}").await;
    let changed: Vec<_> = stricter
        .changed
        .iter()
        .filter(|c| c.becomes() == Decision::Deny)
        .map(|c| (c.was(), c.becomes_reasons[0].rule_id.as_str()))
        .collect();
    let wanted = [
        (Decision::Allow, "big"),
        (Decision::Allow, "big"),
        (Decision::RequireApproval, "big"),
        (Decision::RequireApproval, "big"),
    ];
    assert_eq!(changed, wanted);
    let laxer = replay("").await;
    let becomes = laxer.changed.iter().map(ChangedDecision::becomes);
    assert_eq!(becomes.collect::<Vec<_>>(), vec![Decision::Allow; 4]);
    let after = world.database.count("SELECT count(*) FROM ledger").await;
    assert_eq!(entries, after, "nothing was written");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_servers_raise_one_incident_and_stop_the_agent() {
    let world = World::start().await;
    provision(&world.operator, ACME).await.expect("a plan");
    let rules = policy(
        "{id: runaway, when: 'recent.denials >= 10', effect: RULE_EFFECT_ESCALATE, freeze: true, reason: it does not stop}",
    );
    provision(&world.operator, &rules).await.expect("a plan");
    let others = [
        Server::start(&world.database).await,
        Server::start(&world.database).await,
    ];
    let clients = [
        world.operator.clone(),
        others[0].operator(),
        others[1].operator(),
    ];
    let mut tasks = tokio::task::JoinSet::new();
    for at in 0..24 {
        let client = clients[at % 3].clone();
        tasks.spawn(async move {
            let mut denied = 0;
            for _ in 0..5 {
                let mut request = action("send_email", json!({}));
                request.estimates = points(5_000);
                let answer = persist(|| {
                    let (mut client, request) = (client.authority.clone(), request.clone());
                    async move { client.reserve(request).await }
                });
                let answer = answer.await.into_inner();
                assert_ne!(told(&answer), "ALLOW");
                denied += usize::from(told(&answer) == "BUDGET_EXCEEDED");
            }
            denied
        });
    }
    let mut denied = 0;
    while let Some(done) = tasks.join_next().await {
        denied += done.expect("no client panics");
    }
    assert_eq!(
        denied, 10,
        "the eleventh attempt and all after it are stopped"
    );
    let incidents = "SELECT count(*) FROM ledger WHERE kind = 'INCIDENT'";
    assert_eq!(world.database.count(incidents).await, 1);
    let mut provisioning = world.operator.provisioning.clone();
    let freezes = provisioning.list_freezes(ListFreezesRequest {
        tenant: "acme".into(),
    });
    let freezes = freezes.await.expect("a list").into_inner().freezes;
    assert_eq!(freezes.len(), 1);
    assert_eq!(
        (freezes[0].scope.as_str(), freezes[0].rule_id.as_str()),
        ("tenant:acme", "runaway")
    );
    // Whatever else it tries, it is frozen once, and free once that is lifted.
    for attempt in 0..11 {
        for tool in ["read_case", "send_email"] {
            let answer = ask(&world.operator, action(tool, json!({"n": attempt}))).await;
            assert_eq!(told(&answer), "SCOPE_FROZEN");
        }
    }
    assert_eq!(
        world.database.count(incidents).await,
        2,
        "one for each tool"
    );
    let lifted = format!("{}\nabsent_freezes: [{{scope: 'tenant:acme'}}]", policy(""));
    provision(&world.operator, &lifted).await.expect("a plan");
    let answer = ask(&world.operator, action("read_case", json!({}))).await;
    assert_eq!(told(&answer), "ALLOW");
    world.database.assert_intact();
}

#[tokio::test]
async fn caps_that_leave_no_tool_say_so() {
    let world = World::start().await;
    provision(&world.operator, ACME).await.expect("a plan");
    let only = |rules: &[(&str, &str)]| {
        let rules = rules.iter().map(|(id, tool)| {
            format!(
                "{{id: {id}, effect: RULE_EFFECT_ALLOW_WITH_CAPS, caps: {{tool_allowlist: ['{tool}']}}}}"
            )
        });
        policy(&rules.collect::<Vec<_>>().join(", "))
    };
    for (rules, left) in [
        (only(&[("a", "read_*"), ("b", "read_case")]), "read_case"),
        (only(&[("a", "search"), ("b", "send_email")]), ""),
    ] {
        provision(&world.operator, &rules).await.expect("a plan");
        let answer = ask(&world.operator, action("read_case", json!({}))).await;
        assert_eq!(answer.decision(), Decision::AllowWithCaps);
        assert_eq!(answer.caps.expect("caps").tool_allowlist, [left]);
    }
}

#[tokio::test]
async fn hostile_arguments_are_decided_closed_and_hold_nobody_up() {
    let world = World::start().await;
    provision(&world.operator, ACME).await.expect("a plan");
    let costly: Vec<String> = (0..100)
        .map(|n| {
            format!("{{id: r{n}, when: 'args.a.exists(x, args.a.exists(y, x == y && x == {n}.5))', effect: RULE_EFFECT_DENY}}")
        })
        .collect();
    provision(&world.operator, &policy(&costly.join(",")))
        .await
        .expect("a plan");
    let mut deep = json!(1);
    for _ in 0..14 {
        deep = json!({ "a": [deep] });
    }
    for arguments in [
        json!({"a": (0..12_000).collect::<Vec<_>>()}),
        json!({"a": (0..60).collect::<Vec<_>>()}),
        json!({"a": "x".repeat(60_000)}),
        json!({"a": null}),
        json!({"a": [null, "\u{202e}\u{1F600}", 1e308, -1e308, 0.1, {"a": []}]}),
        deep,
        json!({}),
    ] {
        let begun = Instant::now();
        let answer = ask(&world.operator, action("read_case", arguments)).await;
        assert!(!answer.reasons.is_empty() || answer.decision() == Decision::Allow);
        // No figure: a lane that is held up is so for minutes.
        assert!(begun.elapsed() < Duration::from_secs(20));
    }
    for (length, code) in [
        (500_000, Code::InvalidArgument),
        (1 << 20, Code::ResourceExhausted),
    ] {
        let long = action("read_case", json!({"a": "x".repeat(length)}));
        let status = world.operator.authority.clone().reserve(long).await;
        assert_eq!(status.expect_err("too long").code(), code);
    }
    world.database.assert_intact();
}

#[tokio::test]
async fn rules_that_were_altered_behind_the_servers_back_are_found_out() {
    let world = World::start().await;
    provision(&world.operator, ACME).await.expect("a plan");
    let rules = policy("{id: r, when: 'args.n > 1', effect: RULE_EFFECT_DENY}");
    provision(&world.operator, &rules).await.expect("a plan");
    let freeze = "freezes: [{scope: 'tenant:acme/agent:bad'}]";
    provision(&world.operator, freeze).await.expect("a plan");
    world.database.assert_intact();
    for (break_it, mend_it, wanted) in [
        (
            "UPDATE documents SET body = replace(body, 'DENY', 'ALLOW') WHERE kind = 'POLICY'",
            "UPDATE documents SET body = replace(body, 'ALLOW', 'DENY') WHERE kind = 'POLICY'",
            "the policy is not stored",
        ),
        (
            "UPDATE documents SET body = replace(body, '\"tier\":3', '\"tier\":1') WHERE kind = 'CATALOGUE'",
            "UPDATE documents SET body = replace(body, '\"EXECUTE\",\"tier\":1', '\"EXECUTE\",\"tier\":3') WHERE kind = 'CATALOGUE'",
            "the catalogue is not stored",
        ),
        (
            "UPDATE documents SET body = replace(body, 'bad', 'bat') WHERE kind = 'FREEZES'",
            "UPDATE documents SET body = replace(body, 'bat', 'bad') WHERE kind = 'FREEZES'",
            "the list of freezes is not stored",
        ),
    ] {
        world.database.sql(break_it).await;
        let output = world.database.verify();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(said.contains(wanted), "{break_it}: {said}");
        world.database.sql(mend_it).await;
        world.database.assert_intact();
    }
}
