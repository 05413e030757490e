//! The published crate `runcycles`, unmodified, against the gateway.

use runcycles::models::{
    Action, Amount, BalanceParams, CommitOveragePolicy, CommitRequest, Decision, DecisionRequest,
    EventCreateRequest, ListReservationsParams, ReservationCreateRequest, ReservationStatus,
    Subject,
};
use runcycles::{CyclesClient, WithCyclesConfig, with_cycles};

use crate::policy::provision;
use crate::support::*;

const ACME: &str = "
tenants: [{tenant: acme, cycles_compatible: {}}]
budgets:
  - {scope: 'tenant:acme', unit: UNIT_TOKENS, allocation: 1000}
  - {scope: 'tenant:acme/agent:bot/toolset:send-email', unit: UNIT_TOKENS, allocation: 0}
";

fn who(toolset: Option<&str>) -> Subject {
    Subject {
        tenant: Some("acme".into()),
        agent: Some("bot".into()),
        toolset: toolset.map(str::to_owned),
        ..Subject::default()
    }
}

fn reservation(tokens: i64) -> ReservationCreateRequest {
    ReservationCreateRequest::builder()
        .subject(who(None))
        .action(Action::new("llm.completion", "model"))
        .estimate(Amount::tokens(tokens))
        .build()
}

fn used(tokens: i64) -> CommitRequest {
    CommitRequest::builder()
        .actual(Amount::tokens(tokens))
        .build()
}

#[tokio::test]
async fn the_published_crate_runs_unmodified() {
    let world = World::start().await;
    provision(&world.operator, ACME).await.expect("a plan");
    let permissions = [
        remit::proto::Permission::Authority,
        remit::proto::Permission::Read,
    ];
    let key = world.key("acme", &permissions, "").await;
    let client = CyclesClient::builder(key, format!("http://{}", world.server.cycles))
        .tenant("acme")
        .journal_enabled(false)
        .build();
    let remaining = async || {
        let params = BalanceParams {
            tenant: Some("acme".into()),
            ..BalanceParams::default()
        };
        let found = client.get_balances(&params).await.expect("balances");
        let root = found
            .balances
            .iter()
            .find(|b| b.scope_path == "tenant:acme");
        root.expect("a balance").remaining.amount
    };

    // Around a call: committed when it is done, released when it fails.
    let config = || WithCyclesConfig::new(Amount::tokens(100)).action("llm.completion", "model");
    let said = with_cycles(&client, config().subject(who(None)), |asked| async move {
        assert_eq!(asked.decision, Decision::Allow);
        Ok(("hello", Amount::tokens(42)))
    });
    assert_eq!(said.await.expect("an answer"), "hello");
    assert_eq!(remaining().await, 958);
    let failed = with_cycles(&client, config().subject(who(None)), |_| async move {
        Err::<((), Amount), _>("the tool failed".into())
    });
    assert!(failed.await.is_err());
    assert_eq!(remaining().await, 958);

    // A no: the body never runs.
    let mail = config().subject(who(Some("send-email")));
    let denied = with_cycles::<_, _, ()>(&client, mail, |_| async { unreachable!("it ran") });
    let denied = denied.await.expect_err("denied");
    assert!(denied.is_budget_exceeded(), "{denied}");
    assert!(denied.request_id().is_some());

    // By hand.
    let guard = client.reserve(reservation(50)).await.expect("a hold");
    assert_eq!(
        guard.affected_scopes(),
        ["tenant:acme", "tenant:acme/agent:bot"]
    );
    guard.extend(30_000).await.expect("more time");
    let id = guard.reservation_id().clone();
    let settled = guard.commit(used(20)).await.expect("settled");
    assert_eq!(
        (settled.charged.amount, settled.released.map(|a| a.amount)),
        (20, Some(30))
    );
    let detail = client.get_reservation(&id).await.expect("a reservation");
    assert_eq!(detail.status, ReservationStatus::Committed);
    let guard = client.reserve(reservation(50)).await.expect("a hold");
    guard.release("not needed").await.expect("given back");
    let late = client
        .commit_reservation(&id, &used(20))
        .await
        .expect_err("settled before");
    assert_eq!(late.status(), Some(409));
    let listed = client
        .list_reservations(&ListReservationsParams::default())
        .await;
    assert_eq!(listed.expect("a list").reservations.len(), 4);

    // Asked beforehand, and told afterwards.
    let question = DecisionRequest::builder()
        .subject(who(None))
        .action(Action::new("llm.completion", "model"))
        .estimate(Amount::tokens(5_000))
        .build();
    let answer = client.decide(&question).await.expect("a decision");
    assert_eq!(answer.decision, Decision::Deny);
    assert_eq!(answer.reason_code.as_deref(), Some("BUDGET_EXCEEDED"));
    let event = EventCreateRequest::builder()
        .subject(who(None))
        .action(Action::new("llm.completion", "model"))
        .actual(Amount::tokens(38))
        .overage_policy(CommitOveragePolicy::Reject)
        .build();
    client.create_event(&event).await.expect("recorded");
    assert_eq!(remaining().await, 900);
    world.database.assert_intact();
}
