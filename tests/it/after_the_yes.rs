//! What an agent may make of an action that was let in: no more than what was decided.

use remit::proto::*;
use serde_json::json;

use crate::policy::{action, ask, provision, told};
use crate::support::*;

async fn extend(client: &Client, id: &str, additional: i64) -> ExtendResponse {
    let request = ExtendRequest {
        idempotency_key: unique("extend"),
        reservation_id: id.into(),
        additional: points(additional),
        tenant: "acme".into(),
        ..ExtendRequest::default()
    };
    let answer = client.authority.clone().extend(request).await;
    answer.expect("an answer").into_inner()
}

fn verdict(answer: &ExtendResponse) -> &str {
    match answer.reasons.first() {
        Some(reason) => &reason.code,
        None => answer.decision().as_str_name(),
    }
}

#[tokio::test]
async fn more_of_an_action_is_decided_as_all_of_it_would_be() {
    let world = World::start().await;
    let document = "
tenants: [{tenant: acme}]
budgets: [{scope: 'tenant:acme', unit: UNIT_RISK_POINTS, allocation: 10000}]
tools: [{tenant: acme, name: '*', level: ACTION_LEVEL_EXECUTE, tier: 5}]
policies:
  - tenant: acme
    rules:
      - {id: prod, match: {tools: [deploy], environments: ['prod*']}, effect: RULE_EFFECT_REQUIRE_APPROVAL}
      - {id: whom, match: {tools: [call]}, when: \"actor == 'mallory' && amounts.RISK_POINTS > 5\", effect: RULE_EFFECT_DENY}
      - {id: large, match: {tools: [pay]}, when: 'amounts.RISK_POINTS > 100', effect: RULE_EFFECT_DENY}
      - {id: runaway, match: {tools: [crawl]}, when: 'amounts.RISK_POINTS > 100', effect: RULE_EFFECT_ESCALATE, freeze: true}
      - {id: away, match: {tools: [send]}, when: \"args.to == 'ext' && amounts.RISK_POINTS > 100\", effect: RULE_EFFECT_DENY}
";
    provision(&world.operator, document).await.expect("a plan");
    let reserved = |tool: &str, context: Context| {
        let mut request = action(tool, json!({"to": "ext"}));
        request.estimates = points(5);
        request.context = Some(context);
        let client = world.operator.clone();
        async move { ask(&client, request).await }
    };
    let context = |environment: &str, actor: &str| Context {
        environment: environment.into(),
        actor: actor.into(),
        ..Context::default()
    };

    // Where it happens, and on whose behalf, is still known.
    let waits = reserved("deploy", context("prod-eu", "")).await;
    let id = waits.approval.expect("an approval").approval_id;
    let approve = ResolveApprovalRequest {
        idempotency_key: unique("resolve"),
        approval_id: id.clone(),
        resolution: Some(resolve_approval_request::Resolution::Approve(true)),
        approver: "jo@acme.example".into(),
        tenant: "acme".into(),
        ..ResolveApprovalRequest::default()
    };
    let key = world.key("acme", &[Permission::Approve], "").await;
    let mut approvals = world.server.client(&key).approvals;
    let resolved = approvals.resolve_approval(approve);
    resolved.await.expect("an approval");
    let more = extend(&world.operator, &id, 5_000).await;
    assert_eq!(verdict(&more), "APPROVAL_REQUIRED");
    assert_eq!(more.reserved[0].value, 5, "nothing changed");
    let staging = reserved("deploy", context("staging", "")).await;
    let more = extend(&world.operator, &staging.reservation_id, 5_000).await;
    assert_eq!(verdict(&more), "DECISION_ALLOW");
    let mallory = reserved("call", context("", "mallory")).await;
    assert_eq!(told(&mallory), "ALLOW");
    let more = extend(&world.operator, &mallory.reservation_id, 1).await;
    assert_eq!(verdict(&more), "POLICY_DENIED");

    // Many small steps are one large one.
    let pay = reserved("pay", Context::default()).await;
    for (additional, wanted) in [
        (50, "DECISION_ALLOW"),
        (45, "DECISION_ALLOW"),
        (1, "POLICY_DENIED"),
    ] {
        let more = extend(&world.operator, &pay.reservation_id, additional).await;
        assert_eq!(verdict(&more), wanted, "{additional}");
    }

    // Arguments are not kept: a rule that reads them can't be told, and holds.
    let send = reserved("send", Context::default()).await;
    assert_eq!(told(&send), "ALLOW");
    let more = extend(&world.operator, &send.reservation_id, 1).await;
    assert_eq!(verdict(&more), "POLICY_ERROR");

    // What would stop an agent stops it here too, until an operator lifts it.
    let crawl = reserved("crawl", Context::default()).await;
    let more = extend(&world.operator, &crawl.reservation_id, 96).await;
    assert_eq!(verdict(&more), "SCOPE_FROZEN");
    let incidents = "SELECT count(*) FROM ledger WHERE kind = 'INCIDENT'";
    assert_eq!(world.database.count(incidents).await, 1);
    assert_eq!(
        told(&reserved("call", Context::default()).await),
        "SCOPE_FROZEN"
    );
    world.database.assert_intact();
}

#[tokio::test]
async fn risk_points_of_the_catalogue_are_used_whatever_is_committed() {
    let world = World::start().await;
    let document = "
tenants: [{tenant: acme}]
budgets:
  - {scope: 'tenant:acme', unit: UNIT_RISK_POINTS, allocation: 100}
  - {scope: 'tenant:acme', unit: UNIT_TOKENS, allocation: 1000}
tools:
  - {tenant: acme, name: send, level: ACTION_LEVEL_EXECUTE, tier: 3,
     costs: [{unit: UNIT_RISK_POINTS, value: 20}, {unit: UNIT_TOKENS, value: 100}]}
";
    provision(&world.operator, document).await.expect("a plan");
    let amount = |unit: Unit, value| Amount {
        unit: unit.into(),
        value,
    };
    for (points, charged) in [(1, 20), (0, 20), (30, 30)] {
        let mut request = action("send", json!({}));
        request.estimates = vec![amount(Unit::RiskPoints, 30)];
        let id = ask(&world.operator, request).await.reservation_id;
        let commit = CommitRequest {
            idempotency_key: unique("commit"),
            reservation_id: id,
            actual: vec![amount(Unit::RiskPoints, points), amount(Unit::Tokens, 7)],
            tenant: "acme".into(),
            ..CommitRequest::default()
        };
        let mut authority = world.operator.authority.clone();
        let answer = authority.commit(commit.clone()).await.expect("a commit");
        let of = |amounts: &[Amount], unit: Unit| {
            let of_unit = amounts.iter().find(|amount| amount.unit() == unit);
            of_unit.map(|amount| amount.value)
        };
        let answer = answer.into_inner();
        // Tokens are an estimate until they are known.
        assert_eq!(of(&answer.charged, Unit::RiskPoints), Some(charged));
        assert_eq!(of(&answer.charged, Unit::Tokens), Some(7));
        let again = authority
            .commit(commit)
            .await
            .expect("a replay")
            .into_inner();
        assert!(again.replayed);
        assert_eq!(again.charged, answer.charged);
    }
    // What was not done is given back whole.
    let id = ask(&world.operator, action("send", json!({})))
        .await
        .reservation_id;
    let release = ReleaseRequest {
        idempotency_key: unique("release"),
        reservation_id: id,
        tenant: "acme".into(),
        ..ReleaseRequest::default()
    };
    let released = world.operator.authority.clone().release(release).await;
    assert_eq!(
        released.expect("a release").into_inner().balances[0].spent,
        70
    );
    world.database.assert_intact();
}
