//! Approvals, from outside: a person decides, the hold waits.

use std::time::Duration;

use remit::proto::resolve_approval_request::Resolution;
use remit::proto::*;
use serde_json::json;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::policy::{action, ask, provision, told};
use crate::support::*;

/// Deploys wait for a release manager.
const ACME: &str = "
tenants: [{tenant: acme, keep_arguments: {hidden_fields: [token], max_bytes: 1000}}]
budgets: [{scope: 'tenant:acme', unit: UNIT_RISK_POINTS, allocation: 100}]
tools: [{tenant: acme, name: '*', level: ACTION_LEVEL_EXECUTE, tier: 5, costs: [{unit: UNIT_RISK_POINTS, value: 40}]}]
policies:
  - tenant: acme
    rules:
      - {id: deploys, match: {tools: [trigger_deploy]}, effect: RULE_EFFECT_REQUIRE_APPROVAL, reason: production is somebody's, approvers: [release], approval_timeout: 60s}
      - {id: hasty, match: {tools: [hasty]}, effect: RULE_EFFECT_REQUIRE_APPROVAL, approval_timeout: 1s}
";

struct Gate {
    world: World,
    agent: Client,
    release: Client,
    other: Client,
}

impl Gate {
    async fn start() -> Self {
        let world = World::start().await;
        provision(&world.operator, ACME).await.expect("a plan");
        let agent = world
            .key(
                "acme",
                &[Permission::Authority, Permission::Read, Permission::Approve],
                "",
            )
            .await;
        let release = approver(&world, &["release"]).await;
        let other = approver(&world, &["finance"]).await;
        Self {
            agent: world.server.client(&agent),
            release: world.server.client(&release),
            other: world.server.client(&other),
            world,
        }
    }

    /// Asks for a deploy that waits; the approval's id.
    async fn deploy(&self) -> String {
        let answer = ask(
            &self.agent,
            action("trigger_deploy", json!({"rev": "a1", "token": "t"})),
        )
        .await;
        assert_eq!(told(&answer), "APPROVAL_REQUIRED");
        assert_eq!(
            answer.reservation_id, "",
            "nothing that could be taken for a yes"
        );
        answer.approval.expect("an approval").approval_id
    }

    async fn state(&self, id: &str) -> Reservation {
        let request = GetReservationRequest {
            reservation_id: id.into(),
            ..GetReservationRequest::default()
        };
        let answer = self.agent.authority.clone().get_reservation(request).await;
        answer
            .expect("a reservation")
            .into_inner()
            .reservation
            .expect("a reservation")
    }

    async fn reserved(&self) -> i64 {
        let request = ListBalancesRequest::default();
        let answer = self.agent.authority.clone().list_balances(request).await;
        answer.expect("balances").into_inner().balances[0].reserved
    }
}

async fn approver(world: &World, groups: &[&str]) -> String {
    let request = CreateApiKeyRequest {
        idempotency_key: unique("key"),
        api_key: Some(ApiKey {
            tenant: "acme".into(),
            permissions: vec![Permission::Approve.into()],
            approver_groups: groups.iter().map(|group| (*group).into()).collect(),
            ..ApiKey::default()
        }),
    };
    let mut provisioning = world.operator.clone().provisioning;
    let created = provisioning.create_api_key(request).await;
    created.expect("a key").into_inner().secret
}

async fn resolve(
    client: &Client,
    id: &str,
    approve: bool,
) -> Result<ResolveApprovalResponse, Status> {
    let resolution = if approve {
        Resolution::Approve(true)
    } else {
        Resolution::Reject(true)
    };
    let request = ResolveApprovalRequest {
        idempotency_key: unique("resolve"),
        approval_id: id.into(),
        resolution: Some(resolution),
        approver: "jo@acme.example".into(),
        note: "seen".into(),
        ..ResolveApprovalRequest::default()
    };
    let answer = client.approvals.clone().resolve_approval(request).await;
    answer.map(tonic::Response::into_inner)
}

#[tokio::test]
async fn an_action_waits_is_approved_by_the_right_person_and_runs_once() {
    let gate = Gate::start().await;
    let id = gate.deploy().await;
    assert_eq!(gate.reserved().await, 40, "its budget is held");
    let state = gate.state(&id).await;
    assert_eq!(state.state(), ReservationState::PendingApproval);
    let early = gate
        .agent
        .authority
        .clone()
        .commit(commit(&id, vec![]))
        .await;
    assert_eq!(reason(&early.expect_err("too early")), "APPROVAL_PENDING");

    for (client, why) in [
        (&gate.agent, "OWN_APPROVAL"),
        (&gate.other, "NOT_AN_APPROVER"),
    ] {
        let status = resolve(client, &id, true).await.expect_err(why);
        assert_eq!(
            (status.code(), reason(&status).as_str()),
            (Code::PermissionDenied, why)
        );
    }
    let mut approvals = gate.release.approvals.clone();
    let shown = approvals.get_approval(GetApprovalRequest {
        approval_id: id.clone(),
        ..GetApprovalRequest::default()
    });
    let shown = shown.await.expect("an approval").into_inner();
    let approval = shown.approval.expect("an approval");
    let arguments = approval
        .action
        .as_ref()
        .and_then(|action| action.arguments.clone());
    let arguments = serde_json::to_value(arguments).expect("arguments");
    assert_eq!(arguments, json!({"rev": "a1", "token": "[hidden]"}));
    assert!(approval.arguments_incomplete);
    assert_eq!(approval.reasons[0].rule_id, "deploys");
    assert_eq!(approval.approvers[0].groups, ["release"]);
    assert_eq!(shown.balances[0].remaining, Some(60));

    let approved = resolve(&gate.release, &id, true)
        .await
        .expect("an approval");
    let approval = approved.approval.expect("an approval");
    assert_eq!(approval.state(), ApprovalState::Approved);
    assert_eq!(approval.approver, "jo@acme.example");
    assert_eq!(gate.state(&id).await.state(), ReservationState::Active);
    let late = resolve(&gate.release, &id, false)
        .await
        .expect_err("decided");
    assert_eq!(reason(&late), "APPROVAL_RESOLVED");
    let details = late.get_error_details();
    let metadata = details
        .error_info()
        .map(|info| info.metadata.clone())
        .unwrap_or_default();
    assert_eq!(
        metadata.get("by").map(String::as_str),
        Some("jo@acme.example")
    );
    let done = gate
        .agent
        .authority
        .clone()
        .commit(commit(&id, vec![]))
        .await;
    assert_eq!(done.expect("a commit").into_inner().charged[0].value, 40);
    gate.world.database.assert_intact();
}

#[tokio::test]
async fn the_same_request_waits_once_and_another_one_by_itself() {
    let gate = Gate::start().await;
    let request = action("trigger_deploy", json!({"rev": "a1"}));
    let first = ask(&gate.agent, request.clone()).await;
    let again = ask(&gate.agent, request.clone()).await;
    assert!(again.replayed);
    assert_eq!(first.approval, again.approval);
    assert_eq!(gate.reserved().await, 40);
    let mut changed = action("trigger_deploy", json!({"rev": "b2"}));
    changed.idempotency_key = request.idempotency_key;
    let status = gate.agent.authority.clone().reserve(changed.clone()).await;
    assert_eq!(
        reason(&status.expect_err("other arguments")),
        "IDEMPOTENCY_MISMATCH"
    );
    let mut ledger = gate.world.operator.ledger.clone();
    let listed = ledger.list_entries(ListEntriesRequest {
        tenant: "acme".into(),
        reservation_id: first.approval.clone().expect("an approval").approval_id,
        descending: true,
        ..ListEntriesRequest::default()
    });
    let tried = listed
        .await
        .expect("entries")
        .into_inner()
        .entries
        .remove(0);
    assert_eq!(tried.decision(), Decision::Deny, "and recorded");
    let recorded: serde_json::Value = serde_json::from_str(&tried.body).expect("JSON");
    assert_eq!(recorded["reasons"][0]["code"], "APPROVAL_MISMATCH");
    changed.idempotency_key = unique("reserve");
    let other = ask(&gate.agent, changed).await;
    assert_eq!(told(&other), "APPROVAL_REQUIRED");
    assert_ne!(other.approval, first.approval);
    // What waits is affordable: there is no room for a third.
    let third = ask(&gate.agent, action("trigger_deploy", json!({"rev": "c3"}))).await;
    assert_eq!(told(&third), "BUDGET_EXCEEDED");
    gate.world.database.assert_intact();
}

#[tokio::test]
async fn what_nobody_decides_is_denied_at_its_deadline_and_gives_everything_back() {
    let gate = Gate::start().await;
    let answer = ask(&gate.agent, action("hasty", json!({}))).await;
    let id = answer.approval.expect("an approval").approval_id;
    let mut authority = gate.agent.authority.clone();
    let waited = authority.await_reservation(AwaitReservationRequest {
        reservation_id: id.clone(),
        timeout: Some(pbjson_types::Duration {
            seconds: 20,
            nanos: 0,
        }),
        ..AwaitReservationRequest::default()
    });
    let waited = waited.await.expect("an answer").into_inner().reservation;
    assert_eq!(
        waited.expect("a reservation").state(),
        ReservationState::Expired
    );
    let late = resolve(&gate.release, &id, true)
        .await
        .expect_err("too late");
    assert!(["APPROVAL_EXPIRED", "APPROVAL_RESOLVED"].contains(&reason(&late).as_str()));
    for _ in 0..100 {
        if gate.reserved().await == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(gate.reserved().await, 0);
    gate.world.database.assert_intact();
}

#[tokio::test]
async fn a_deadline_that_passes_while_no_server_runs_is_kept() {
    let mut gate = Gate::start().await;
    let answer = ask(&gate.agent, action("hasty", json!({}))).await;
    let id = answer.approval.expect("an approval").approval_id;
    let key = approver(&gate.world, &["release"]).await;
    gate.world.server.kill();
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    gate.world.server.restart(&gate.world.database).await;
    let late = resolve(&gate.world.server.client(&key), &id, true).await;
    let late = reason(&late.expect_err("too late"));
    assert!(["APPROVAL_EXPIRED", "APPROVAL_RESOLVED"].contains(&late.as_str()));
    let mut authority = gate.world.server.operator().authority;
    for _ in 0..100 {
        let balances = authority.list_balances(ListBalancesRequest {
            tenant: "acme".into(),
            ..ListBalancesRequest::default()
        });
        if balances.await.expect("balances").into_inner().balances[0].reserved == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let state = authority.get_reservation(GetReservationRequest {
        reservation_id: id,
        tenant: "acme".into(),
    });
    let state = state.await.expect("a reservation").into_inner().reservation;
    assert_eq!(
        state.expect("a reservation").state(),
        ReservationState::Expired
    );
    gate.world.database.assert_intact();
}

#[tokio::test]
async fn approving_while_the_deadline_passes_ends_one_way() {
    let gate = Gate::start().await;
    // Half a second around the deadline, in steps.
    for step in 0..6 {
        let answer = ask(&gate.agent, action("hasty", json!({}))).await;
        let id = answer.approval.expect("an approval").approval_id;
        tokio::time::sleep(Duration::from_millis(900 + step * 40)).await;
        let approved = resolve(&gate.other, &id, true).await;
        let state = gate.state(&id).await.state();
        if approved.is_ok() {
            assert_eq!(state, ReservationState::Active);
            let done = gate.agent.authority.clone().release(release(&id)).await;
            done.expect("a release");
        } else {
            assert_eq!(state, ReservationState::Expired);
            let status = gate
                .agent
                .authority
                .clone()
                .commit(commit(&id, vec![]))
                .await;
            assert!(status.is_err(), "never granted by time");
        }
    }
    for _ in 0..100 {
        if gate.reserved().await == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(gate.reserved().await, 0);
    gate.world.database.assert_intact();
}

#[tokio::test]
async fn a_rejection_and_a_withdrawal_give_everything_back() {
    let gate = Gate::start().await;
    let (one, two) = (gate.deploy().await, gate.deploy().await);
    resolve(&gate.release, &one, false)
        .await
        .expect("a rejection");
    assert_eq!(gate.state(&one).await.state(), ReservationState::Rejected);
    let given_up = gate.agent.authority.clone().release(release(&two)).await;
    given_up.expect("a release");
    assert_eq!(gate.reserved().await, 0);
    let status = resolve(&gate.release, &two, true).await.expect_err("gone");
    assert_eq!(reason(&status), "APPROVAL_RESOLVED");
    let mut approvals = gate.release.approvals.clone();
    let listed = approvals.list_approvals(ListApprovalsRequest {
        state: ApprovalState::Withdrawn.into(),
        ..ListApprovalsRequest::default()
    });
    let listed = listed.await.expect("a list").into_inner().approvals;
    assert_eq!(listed.len(), 1);
    gate.world.database.assert_intact();
}

#[tokio::test]
async fn a_stopped_budget_is_not_approved_through() {
    let gate = Gate::start().await;
    let id = gate.deploy().await;
    let frozen = "budgets: [{scope: 'tenant:acme', unit: UNIT_RISK_POINTS, allocation: 100, state: BUDGET_STATE_FROZEN}]";
    provision(&gate.world.operator, frozen)
        .await
        .expect("a plan");
    let status = resolve(&gate.release, &id, true).await.expect_err("frozen");
    assert_eq!(reason(&status), "APPROVAL_STOPPED");
    let thawed = frozen.replace("FROZEN", "ACTIVE");
    provision(&gate.world.operator, &thawed)
        .await
        .expect("a plan");
    resolve(&gate.release, &id, true)
        .await
        .expect("an approval");
    gate.world.database.assert_intact();
}

#[tokio::test]
async fn what_stops_a_new_action_stops_one_that_waited() {
    let gate = Gate::start().await;
    let id = gate.deploy().await;
    // A use that nothing covers marks the budget over its limit.
    let record = RecordRequest {
        idempotency_key: unique("record"),
        subject: Some(subject("acme")),
        action: Some(Action {
            name: "work".into(),
            ..Action::default()
        }),
        amounts: points(70),
        ..RecordRequest::default()
    };
    let recorded = gate.agent.authority.clone().record(record).await;
    assert!(recorded.expect("a use").into_inner().balances[0].over_limit);
    let status = resolve(&gate.release, &id, true).await.expect_err("over");
    assert_eq!(reason(&status), "APPROVAL_STOPPED");
    let fund = FundBudgetRequest {
        idempotency_key: unique("fund"),
        scope: "tenant:acme".into(),
        unit: Unit::RiskPoints.into(),
        operation: FundOperation::Credit.into(),
        ..FundBudgetRequest::default()
    };
    let mut provisioning = gate.world.operator.provisioning.clone();
    provisioning.fund_budget(fund).await.expect("funds");
    resolve(&gate.release, &id, true)
        .await
        .expect("an approval");
    gate.world.database.assert_intact();
}

#[tokio::test]
async fn a_person_grants_no_more_than_what_the_action_asks_for() {
    let gate = Gate::start().await;
    let asks = |allocation| {
        format!(
            "budgets: [{{scope: 'tenant:acme', unit: UNIT_RISK_POINTS, allocation: {allocation}, on_exceeded: {{require_approval: true, approvers: [finance]}}}}]"
        )
    };
    provision(&gate.world.operator, &asks(100))
        .await
        .expect("a plan");
    for _ in 0..2 {
        let held = ask(&gate.agent, action("work", json!({}))).await;
        assert_eq!(told(&held), "ALLOW");
    }
    // Cut below what is held.
    provision(&gate.world.operator, &asks(0))
        .await
        .expect("a plan");
    let waits = ask(&gate.agent, action("work", json!({}))).await;
    let id = waits.approval.expect("an approval").approval_id;
    resolve(&gate.other, &id, true).await.expect("a grant");
    let mut authority = gate.agent.authority.clone();
    let balances = authority.list_balances(ListBalancesRequest::default());
    let balances = balances.await.expect("balances").into_inner().balances;
    let balance = &balances[0];
    assert_eq!(
        (balance.allocated, balance.reserved, balance.remaining),
        (Some(40), 120, Some(-80)),
        "what others hold stays cut"
    );
    gate.world.database.assert_intact();
}

#[tokio::test]
async fn a_budget_that_asks_gets_exactly_what_is_short_once() {
    let gate = Gate::start().await;
    let asks = "budgets: [{scope: 'tenant:acme', unit: UNIT_RISK_POINTS, allocation: 50, on_exceeded: {require_approval: true, approvers: [finance]}}]";
    provision(&gate.world.operator, asks).await.expect("a plan");
    let first = ask(&gate.agent, action("work", json!({}))).await;
    assert_eq!(told(&first), "ALLOW");
    let second = ask(&gate.agent, action("work", json!({}))).await;
    assert_eq!(told(&second), "BUDGET_EXCEEDED");
    assert_eq!(second.decision(), Decision::RequireApproval);
    let id = second.approval.expect("an approval").approval_id;
    assert_eq!(gate.reserved().await, 40, "what is short holds nothing yet");
    resolve(&gate.other, &id, true)
        .await
        .expect("finance grants it");
    let request = ListBalancesRequest::default();
    let balances = gate.agent.authority.clone().list_balances(request).await;
    let balance = balances.expect("balances").into_inner().balances.remove(0);
    assert_eq!(
        (balance.allocated, balance.reserved, balance.remaining),
        (Some(80), 80, Some(0))
    );
    let third = ask(&gate.agent, action("work", json!({}))).await;
    assert_eq!(third.decision(), Decision::RequireApproval, "once");
    gate.world.database.assert_intact();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_approvers_at_once_on_two_servers_one_is_first() {
    let gate = Gate::start().await;
    let other = Server::start(&gate.world.database).await;
    let key = approver(&gate.world, &["release"]).await;
    let elsewhere = other.client(&key);
    for _ in 0..5 {
        let id = gate.deploy().await;
        let (yes, no) = tokio::join!(
            resolve(&gate.release, &id, true),
            resolve(&elsewhere, &id, false)
        );
        let lost = match (&yes, &no) {
            (Ok(_), Err(status)) | (Err(status), Ok(_)) => status,
            both => panic!("exactly one decides: {both:?}"),
        };
        assert_eq!(reason(lost), "APPROVAL_RESOLVED");
        let state = gate.state(&id).await.state();
        let wanted = if yes.is_ok() {
            ReservationState::Active
        } else {
            ReservationState::Rejected
        };
        assert_eq!(state, wanted);
        if yes.is_ok() {
            gate.agent
                .authority
                .clone()
                .release(release(&id))
                .await
                .expect("a release");
        }
    }
    gate.world.database.assert_intact();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiters_hear_of_it_here_elsewhere_and_after_a_kill() {
    let mut gate = Gate::start().await;
    let other = Server::start(&gate.world.database).await;
    let id = gate.deploy().await;
    let request = || WaitReservationRequest {
        reservation_id: id.clone(),
        tenant: "acme".into(),
    };
    let mut streams = Vec::new();
    for client in [gate.world.server.operator(), other.operator()] {
        let mut authority = client.authority;
        let stream = authority.wait_reservation(request()).await;
        let mut stream = stream.expect("a stream").into_inner();
        let first = stream
            .message()
            .await
            .expect("a message")
            .expect("the state");
        let first = first.reservation.expect("a reservation");
        assert_eq!(first.state(), ReservationState::PendingApproval);
        streams.push(stream);
    }
    let key = approver(&gate.world, &["release"]).await;
    let elsewhere = other.client(&key);
    // The agent's server is gone before the decision: the wait goes on elsewhere.
    gate.world.server.kill();
    assert!(
        streams.remove(0).message().await.is_err(),
        "the stream broke"
    );
    resolve(&elsewhere, &id, true).await.expect("an approval");
    let last = streams[0]
        .message()
        .await
        .expect("a message")
        .expect("the end state");
    assert_eq!(
        last.reservation.expect("a reservation").state(),
        ReservationState::Active
    );
    assert!(streams[0].message().await.expect("an end").is_none());
    gate.world.server.restart(&gate.world.database).await;
    let again = gate.world.server.operator();
    let mut again = again
        .authority
        .clone()
        .wait_reservation(request())
        .await
        .expect("a stream")
        .into_inner();
    let state = again
        .message()
        .await
        .expect("a message")
        .expect("the state");
    assert_eq!(
        state.reservation.expect("a reservation").state(),
        ReservationState::Active
    );
    gate.world.database.assert_intact();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_waiters_cost_the_database_no_query_each() {
    const MANY: usize = 1_000;

    let gate = Gate::start().await;
    let roomy = "budgets: [{scope: 'tenant:acme', unit: UNIT_RISK_POINTS, allocation: 1000000}]";
    provision(&gate.world.operator, roomy)
        .await
        .expect("a plan");
    let mut asked = tokio::task::JoinSet::new();
    for _ in 0..MANY {
        let agent = gate.agent.clone();
        asked.spawn(async move {
            let answer = ask(&agent, action("trigger_deploy", json!({}))).await;
            let id = answer.approval.expect("an approval").approval_id;
            let request = WaitReservationRequest {
                reservation_id: id.clone(),
                ..WaitReservationRequest::default()
            };
            let stream = agent.authority.clone().wait_reservation(request).await;
            let mut stream = stream.expect("a stream").into_inner();
            stream
                .message()
                .await
                .expect("a message")
                .expect("the state");
            (id, stream)
        });
    }
    let mut waiting = Vec::new();
    while let Some(done) = asked.join_next().await {
        waiting.push(done.expect("no agent panics"));
    }
    let transactions = "SELECT xact_commit FROM pg_stat_database WHERE datname = 'remit'";
    // An idle connection tells its counts after ten seconds.
    tokio::time::sleep(Duration::from_secs(11)).await;
    let before = gate.world.database.count(transactions).await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    let idle = gate.world.database.count(transactions).await - before;
    assert!(idle < 100, "{idle} transactions while {MANY} wait");

    let mut resolved = tokio::task::JoinSet::new();
    for (at, (id, mut stream)) in waiting.into_iter().enumerate() {
        let release = gate.release.clone();
        resolved.spawn(async move {
            resolve(&release, &id, at % 2 == 0)
                .await
                .expect("a decision");
            let last = stream.message().await.expect("a message").expect("the end");
            let wanted = if at % 2 == 0 {
                ReservationState::Active
            } else {
                ReservationState::Rejected
            };
            assert_eq!(last.reservation.expect("a reservation").state(), wanted);
        });
    }
    while let Some(done) = resolved.join_next().await {
        done.expect("every waiter hears of it");
    }
    gate.world.database.assert_intact();
}

/// Every answer that goes on, under a key: what each ended with.
async fn told_until_the_end(client: Client, id: String) -> Vec<(&'static str, Status)> {
    macro_rules! end_of {
        ($answer:expr) => {
            async {
                let mut told = $answer.await?.into_inner();
                while told.message().await?.is_some() {}
                Ok::<(), Status>(())
            }
        };
    }
    let (tenant, mut ledger) = (String::from("acme"), client.ledger.clone());
    let (mut approvals, mut authority) = (client.approvals.clone(), client.authority.clone());
    let entries = end_of!(ledger.watch_entries(WatchEntriesRequest {
        tenant: tenant.clone(),
        after_sequence: Some(0),
    }));
    let watched = end_of!(approvals.watch_approvals(WatchApprovalsRequest {
        tenant: tenant.clone(),
    }));
    let waited = end_of!(authority.wait_reservation(WaitReservationRequest {
        reservation_id: id.clone(),
        tenant: tenant.clone(),
    }));
    let mut authority = client.authority.clone();
    let awaited = authority.await_reservation(AwaitReservationRequest {
        reservation_id: id.clone(),
        tenant: tenant.clone(),
        ..AwaitReservationRequest::default()
    });
    let (entries, watched, waited, awaited) = tokio::join!(entries, watched, waited, awaited);
    let awaited = awaited.map(|_| ());
    [
        ("WatchEntries", entries),
        ("WatchApprovals", watched),
        ("WaitReservation", waited),
        ("AwaitReservation", awaited),
    ]
    .into_iter()
    .map(|(name, end)| (name, end.expect_err(name)))
    .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_that_go_on_end_with_their_key() {
    let gate = Gate::start().await;
    let other = Server::start(&gate.world.database).await;
    let id = gate.deploy().await;
    let made = async |expire_time| {
        let request = CreateApiKeyRequest {
            idempotency_key: unique("key"),
            api_key: Some(ApiKey {
                tenant: "acme".into(),
                permissions: vec![
                    Permission::Audit.into(),
                    Permission::Approve.into(),
                    Permission::Read.into(),
                ],
                expire_time,
                ..ApiKey::default()
            }),
        };
        let mut provisioning = gate.world.operator.clone().provisioning;
        let made = provisioning.create_api_key(request).await;
        made.expect("a key").into_inner()
    };
    let revoked = made(None).await;
    let soon = pbjson_types::Timestamp {
        seconds: jiff::Timestamp::now().as_second() + 5,
        nanos: 0,
    };
    let expiring = made(Some(soon)).await;
    let mut telling = tokio::task::JoinSet::new();
    for key in [&revoked, &expiring] {
        let client = gate.world.server.client(&key.secret);
        telling.spawn(told_until_the_end(client, id.clone()));
    }
    // Entries go on to be written, and nobody decides.
    let agent = gate.agent.clone();
    let acting = tokio::spawn(async move {
        loop {
            ask(&agent, action("read", json!({}))).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    tokio::time::sleep(Duration::from_secs(1)).await;
    let key_id = revoked.api_key.expect("a key").key_id;
    let mut elsewhere = other.operator().provisioning;
    let request = RevokeApiKeyRequest { key_id };
    elsewhere.revoke_api_key(request).await.expect("an end");
    let all = async {
        while let Some(ends) = telling.join_next().await {
            for (name, status) in ends.expect("no reader panics") {
                assert_eq!(status.code(), Code::Unauthenticated, "{name}: {status:?}");
                assert_eq!(reason(&status), "API_KEY_INVALID", "{name}");
            }
        }
    };
    let ended = tokio::time::timeout(Duration::from_secs(20), all).await;
    ended.expect("each ends by itself");
    acting.abort();
    gate.world.database.assert_intact();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waits_that_are_cut_off_leave_nothing_that_is_looked_for() {
    let gate = Gate::start().await;
    gate.world
        .database
        .sql("ALTER DATABASE remit SET log_statement = 'all'")
        .await;
    // Only new connections are logged.
    let other = Server::start(&gate.world.database).await;
    let id = gate.deploy().await;
    let mut waiting = tokio::task::JoinSet::new();
    for at in 0..20 {
        let (mut authority, id) = (other.operator().authority, id.clone());
        waiting.spawn(async move {
            let tenant = String::from("acme");
            if at % 2 == 0 {
                let mut request = tonic::Request::new(AwaitReservationRequest {
                    reservation_id: id,
                    tenant,
                    ..AwaitReservationRequest::default()
                });
                // Half of these reach their deadline, the others are cut off.
                request.set_timeout(Duration::from_secs(if at % 4 == 0 { 2 } else { 50 }));
                let _ = authority.await_reservation(request).await;
            } else {
                let request = WaitReservationRequest {
                    reservation_id: id,
                    tenant,
                };
                let told = authority.wait_reservation(request).await;
                let mut told = told.expect("a stream").into_inner();
                while let Ok(Some(_)) = told.message().await {}
            }
        });
    }
    let log = gate.world.database.folder.path().join("data/postgres.log");
    let looked = || {
        let log = std::fs::read_to_string(&log).expect("PostgreSQL's log");
        log.matches("/* read_reservations */").count()
    };
    let begun = std::time::Instant::now();
    while looked() < 3 {
        assert!(
            begun.elapsed() < Duration::from_secs(30),
            "it is looked for"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    waiting.shutdown().await;
    let mut before = looked();
    let begun = std::time::Instant::now();
    loop {
        tokio::time::sleep(Duration::from_secs(3)).await;
        let now = looked();
        if now == before {
            break;
        }
        before = now;
        assert!(begun.elapsed() < Duration::from_secs(30), "for ever");
    }
}
