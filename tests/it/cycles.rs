//! Tenants that keep to the rules of the Cycles protocol, by gRPC.

use remit::proto::*;
use serde_json::json;
use tonic::{Code, Status};

use crate::policy::{action, ask, provision, told};
use crate::support::*;

const ACME: &str = "
tenants: [{tenant: acme, cycles_compatible: {max_extensions: 2, max_ttl: 3600s}}]
budgets:
  - {scope: 'tenant:acme', unit: UNIT_RISK_POINTS, allocation: 100}
  - {scope: 'tenant:acme/agent:poor', unit: UNIT_RISK_POINTS, allocation: 10}
  - {scope: 'tenant:acme/agent:coins', unit: UNIT_TOKENS, allocation: 10, state: BUDGET_STATE_FROZEN}
";

/// A Reserve of some risk points.
fn asks(agent: &str, toolset: &str, points: i64) -> ReserveRequest {
    ReserveRequest {
        subject: Some(Subject {
            agent: agent.into(),
            toolset: toolset.into(),
            ..subject("acme")
        }),
        estimates: crate::support::points(points),
        ..action("act", json!({}))
    }
}

fn stopped(scope: &str, allocation: i64) -> String {
    format!(
        "budgets: [{{scope: '{scope}', unit: UNIT_RISK_POINTS, allocation: {allocation}, state: BUDGET_STATE_FROZEN}}]"
    )
}

async fn world() -> World {
    let world = World::start().await;
    provision(&world.operator, ACME).await.expect("a plan");
    world
}

#[tokio::test]
async fn one_scope_is_named_and_waiting_must_help_in_all() {
    let world = world().await;
    let held = ask(&world.operator, asks("rich", "", 95)).await;
    assert_eq!(told(&held), "ALLOW");
    // The tenant's 5 become 100 when the other one is done; the agent's 10 stay 10.
    for (points, retryable) in [(8, true), (20, false)] {
        let denied = ask(&world.operator, asks("poor", "", points)).await;
        let scopes: Vec<_> = denied.reasons.iter().map(|r| r.scope.as_str()).collect();
        assert_eq!(scopes, ["tenant:acme"]);
        assert_eq!(
            (denied.retryable, denied.retry_after.is_some()),
            (retryable, retryable)
        );
    }
}

#[tokio::test]
async fn scopes_without_a_budget_are_skipped_as_long_as_one_has_the_unit() {
    let world = world().await;
    let answer = ask(&world.operator, asks("any", "nobody-listed", 1)).await;
    assert_eq!(told(&answer), "ALLOW");
    // A budget in another unit, frozen or not, has no say.
    let answer = ask(&world.operator, asks("coins", "", 1)).await;
    assert_eq!(told(&answer), "ALLOW");
    let mut other = asks("any", "", 1);
    other.estimates[0].unit = Unit::Credits.into();
    let refused = world.operator.authority.clone().reserve(other).await;
    assert_eq!(reason(&refused.expect_err("no such unit")), "UNIT_MISMATCH");
    provision(
        &world.operator,
        "tenants: [{tenant: bare, cycles_compatible: {}}]",
    )
    .await
    .expect("a plan");
    let mut nothing = asks("any", "", 1);
    nothing.subject = Some(subject("bare"));
    let answer = ask(&world.operator, nothing).await;
    assert_eq!(told(&answer), "BUDGET_NOT_PROVISIONED");
    world.database.assert_intact();
}

#[tokio::test]
async fn the_first_scope_that_fails_is_the_only_reason() {
    let world = world().await;
    provision(&world.operator, &stopped("tenant:acme/agent:poor", 10))
        .await
        .expect("a plan");
    // An exhausted tenant beats a frozen agent.
    let answer = ask(&world.operator, asks("poor", "", 101)).await;
    assert_eq!(told(&answer), "BUDGET_EXCEEDED");
    assert_eq!(answer.reasons.len(), 1);
    assert_eq!(answer.reasons[0].scope, "tenant:acme");
    // And a frozen tenant an exhausted agent.
    provision(&world.operator, &stopped("tenant:acme", 100))
        .await
        .expect("a plan");
    let answer = ask(&world.operator, asks("poor", "", 11)).await;
    assert_eq!(told(&answer), "BUDGET_FROZEN");
    assert_eq!(answer.reasons.len(), 1);
    assert_eq!(answer.reasons[0].scope, "tenant:acme");
    // What has happened is not taken by a frozen budget either.
    let mut authority = world.operator.authority.clone();
    let recorded = authority.record(RecordRequest {
        idempotency_key: unique("record"),
        subject: Some(subject("acme")),
        action: action("act", json!({})).action,
        amounts: points(1),
        ..RecordRequest::default()
    });
    let refused: Status = recorded.await.expect_err("frozen");
    assert_eq!(reason(&refused), "BUDGET_FROZEN");
    assert_eq!(refused.code(), Code::FailedPrecondition);
    world.database.assert_intact();
}

#[tokio::test]
async fn leases_are_shortened_and_extended_so_many_times() {
    let world = world().await;
    let mut long = asks("any", "", 1);
    long.ttl = Some(pbjson_types::Duration {
        seconds: 7_200,
        nanos: 0,
    });
    let answer = ask(&world.operator, long).await;
    let left = answer.remaining_ttl.expect("a lease").seconds;
    assert!((3_590..=3_600).contains(&left), "{left} s");
    let mut extended = Vec::new();
    for _ in 0..3 {
        let request = ExtendRequest {
            idempotency_key: unique("extend"),
            reservation_id: answer.reservation_id.clone(),
            extend_by: Some(pbjson_types::Duration {
                seconds: 10,
                nanos: 0,
            }),
            tenant: "acme".into(),
            ..ExtendRequest::default()
        };
        extended.push(world.operator.authority.clone().extend(request).await);
    }
    assert!(extended[0].is_ok() && extended[1].is_ok());
    let refused = extended.remove(2).expect_err("twice is enough");
    assert_eq!(reason(&refused), "TOO_MANY_EXTENSIONS");
    world.database.assert_intact();
}

#[tokio::test]
async fn giving_up_default_deny_needs_the_right_to_loosen() {
    let world = World::with_budgets(vec![]).await;
    let key = world.key("acme", &[Permission::Provision], "").await;
    let client = world.server.client(&key);
    let laxer = "tenants: [{tenant: acme, cycles_compatible: {}}]";
    let refused = provision(&client, laxer).await.expect_err("looser");
    assert_eq!(reason(&refused), "LOOSENING_NOT_PERMITTED");
    provision(&world.operator, laxer).await.expect("a plan");
    let stricter = "tenants: [{tenant: acme}]";
    provision(&client, stricter).await.expect("back");
}
