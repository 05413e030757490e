//! One tenant's key with another tenant's names: as if they did not exist.

use remit::proto::*;
use tonic::{Code, Status};

use crate::policy::provision;
use crate::support::*;

#[tokio::test]
async fn another_tenants_things_answer_as_if_they_did_not_exist() {
    let world = World::with_budgets(vec![budget("tenant:acme", Unit::RiskPoints, 100)]).await;
    let other = vec![budget("tenant:other", Unit::RiskPoints, 100)];
    world.provision("other", other).await;
    let held = world.operator.clone().authority.reserve(reserve(5)).await;
    let held = held.expect("an answer").into_inner().reservation_id;
    let missing = "00000000-0000-8000-8000-000000000000";
    let all = [
        Permission::Authority,
        Permission::Read,
        Permission::Provision,
        Permission::Loosen,
        Permission::Fund,
        Permission::ManageKeys,
        Permission::Audit,
        Permission::Approve,
    ];
    let key = world.key("other", &all, "").await;
    let acme_key = world.key("acme", &all, "").await;
    let acme_key_id = acme_key.split('_').nth(1).expect("a key id").to_owned();
    let before = world.database.count("SELECT count(*) FROM ledger").await;

    // Each RPC once with acme's names and once with names that nobody has.
    let mut answers: Vec<(&str, Status, Status)> = Vec::new();
    for (tenant, id, key_id) in [
        ("acme", held.as_str(), acme_key_id.as_str()),
        ("nobody", missing, "ffff"),
    ] {
        let client = world.server.client(&key);
        let got = every_rpc(client, tenant, id, key_id).await;
        for (at, (name, status)) in got.into_iter().enumerate() {
            match answers.get_mut(at) {
                Some(pair) => pair.2 = status,
                None => answers.push((name, status.clone(), status)),
            }
        }
    }
    for (name, theirs, nobodys) in answers {
        assert_eq!(theirs.code(), Code::NotFound, "{name}: {theirs:?}");
        assert_eq!(theirs.code(), nobodys.code(), "{name}");
        assert_eq!(reason(&theirs), reason(&nobodys), "{name}");
    }
    // The same ids without naming the tenant: looked for among the key's own.
    let mut authority = world.server.client(&key).authority;
    let mut settle = commit(&held, Vec::new());
    settle.tenant = String::new();
    let status = authority.commit(settle).await.expect_err("not found");
    assert_eq!(reason(&status), "RESERVATION_NOT_FOUND");
    let after = world.database.count("SELECT count(*) FROM ledger").await;
    assert_eq!(before, after, "nothing was written");
}

async fn every_rpc(
    client: Client,
    tenant: &str,
    id: &str,
    key_id: &str,
) -> Vec<(&'static str, Status)> {
    let Client {
        mut authority,
        mut provisioning,
        mut ledger,
        mut approvals,
        mut events,
    } = client;
    let mut got = Vec::new();
    macro_rules! refused {
        ($name:literal, $call:expr) => {
            got.push(($name, $call.await.err().expect($name)));
        };
    }
    let tenant_field = tenant.to_owned();
    let action = Some(Action {
        name: "act".into(),
        ..Action::default()
    });
    refused!(
        "Decide",
        authority.decide(DecideRequest {
            subject: Some(subject(tenant)),
            action: action.clone(),
            ..DecideRequest::default()
        })
    );
    let mut request = reserve(1);
    request.subject = Some(subject(tenant));
    refused!("Reserve", authority.reserve(request));
    let mut request = commit(id, Vec::new());
    request.tenant = tenant_field.clone();
    refused!("Commit", authority.commit(request));
    let mut request = release(id);
    request.tenant = tenant_field.clone();
    refused!("Release", authority.release(request));
    refused!(
        "Extend",
        authority.extend(ExtendRequest {
            idempotency_key: unique("x"),
            reservation_id: id.into(),
            extend_by: Some(pbjson_types::Duration {
                seconds: 5,
                nanos: 0
            }),
            tenant: tenant_field.clone(),
            ..ExtendRequest::default()
        })
    );
    refused!(
        "Record",
        authority.record(RecordRequest {
            idempotency_key: unique("x"),
            subject: Some(subject(tenant)),
            action,
            ..RecordRequest::default()
        })
    );
    refused!(
        "GetReservation",
        authority.get_reservation(GetReservationRequest {
            reservation_id: id.into(),
            tenant: tenant_field.clone(),
        })
    );
    refused!(
        "ListReservations",
        authority.list_reservations(ListReservationsRequest {
            tenant: tenant_field.clone(),
            ..ListReservationsRequest::default()
        })
    );
    refused!(
        "ListBalances",
        authority.list_balances(ListBalancesRequest {
            tenant: tenant_field.clone(),
            ..ListBalancesRequest::default()
        })
    );
    let waits = || AwaitReservationRequest {
        reservation_id: id.into(),
        tenant: tenant_field.clone(),
        ..AwaitReservationRequest::default()
    };
    refused!("AwaitReservation", authority.await_reservation(waits()));
    refused!(
        "WaitReservation",
        authority.wait_reservation(WaitReservationRequest {
            reservation_id: id.into(),
            tenant: tenant_field.clone(),
        })
    );
    refused!(
        "ListApprovals",
        approvals.list_approvals(ListApprovalsRequest {
            tenant: tenant_field.clone(),
            ..ListApprovalsRequest::default()
        })
    );
    refused!(
        "GetApproval",
        approvals.get_approval(GetApprovalRequest {
            approval_id: id.into(),
            tenant: tenant_field.clone(),
        })
    );
    refused!(
        "ResolveApproval",
        approvals.resolve_approval(ResolveApprovalRequest {
            idempotency_key: unique("x"),
            approval_id: id.into(),
            resolution: Some(resolve_approval_request::Resolution::Approve(true)),
            tenant: tenant_field.clone(),
            ..ResolveApprovalRequest::default()
        })
    );
    refused!(
        "WatchApprovals",
        approvals.watch_approvals(WatchApprovalsRequest {
            tenant: tenant_field.clone(),
        })
    );
    refused!(
        "CreateSubscription",
        events.create_subscription(CreateSubscriptionRequest {
            subscription: Some(Subscription {
                subscription_id: "spy".into(),
                tenant: tenant_field.clone(),
                url: "https://hooks.example/".into(),
                event_types: vec![EventType::ActionDenied.into()],
                ..Subscription::default()
            }),
        })
    );
    refused!(
        "ListSubscriptions",
        events.list_subscriptions(ListSubscriptionsRequest {
            tenant: tenant_field.clone(),
        })
    );
    refused!(
        "DeleteSubscription",
        events.delete_subscription(DeleteSubscriptionRequest {
            subscription_id: "s".into(),
            tenant: tenant_field.clone(),
        })
    );
    refused!(
        "RedeliverEvents",
        events.redeliver_events(RedeliverEventsRequest {
            subscription_id: "s".into(),
            tenant: tenant_field.clone(),
            from_sequence: 0,
        })
    );
    let policy = || Policy {
        tenant: tenant_field.clone(),
        ..Policy::default()
    };
    refused!(
        "Provision a policy",
        provisioning.provision(ProvisionRequest {
            idempotency_key: unique("x"),
            policies: vec![policy()],
            ..ProvisionRequest::default()
        })
    );
    refused!(
        "ListTools",
        provisioning.list_tools(ListToolsRequest {
            tenant: tenant_field.clone(),
        })
    );
    refused!(
        "GetPolicy",
        provisioning.get_policy(GetPolicyRequest {
            tenant: tenant_field.clone(),
            all_tenants: false,
        })
    );
    refused!(
        "ListFreezes",
        provisioning.list_freezes(ListFreezesRequest {
            tenant: tenant_field.clone(),
        })
    );
    refused!(
        "ReplayPolicy",
        ledger.replay_policy(ReplayPolicyRequest {
            policy: Some(policy()),
            ..ReplayPolicyRequest::default()
        })
    );
    let scope = format!("tenant:{tenant}");
    refused!(
        "Provision",
        provisioning.provision(ProvisionRequest {
            idempotency_key: unique("x"),
            budgets: vec![budget(&scope, Unit::Tokens, 1)],
            ..ProvisionRequest::default()
        })
    );
    refused!(
        "FundBudget",
        provisioning.fund_budget(FundBudgetRequest {
            idempotency_key: unique("x"),
            scope: scope.clone(),
            unit: Unit::RiskPoints.into(),
            operation: FundOperation::Credit.into(),
            amount: 1,
            ..FundBudgetRequest::default()
        })
    );
    refused!(
        "GetBudget",
        provisioning.get_budget(GetBudgetRequest {
            scope,
            unit: Unit::RiskPoints.into(),
            ..GetBudgetRequest::default()
        })
    );
    refused!(
        "ListBudgets",
        provisioning.list_budgets(ListBudgetsRequest {
            tenant: tenant_field.clone(),
            ..ListBudgetsRequest::default()
        })
    );
    refused!(
        "GetTenant",
        provisioning.get_tenant(GetTenantRequest {
            tenant: tenant_field.clone()
        })
    );
    refused!(
        "CreateApiKey",
        provisioning.create_api_key(CreateApiKeyRequest {
            idempotency_key: unique("x"),
            api_key: Some(ApiKey {
                tenant: tenant_field.clone(),
                permissions: vec![Permission::Read.into()],
                ..ApiKey::default()
            }),
        })
    );
    refused!(
        "ListApiKeys",
        provisioning.list_api_keys(ListApiKeysRequest {
            tenant: tenant_field.clone(),
            ..ListApiKeysRequest::default()
        })
    );
    refused!(
        "RevokeApiKey",
        provisioning.revoke_api_key(RevokeApiKeyRequest {
            key_id: key_id.into()
        })
    );
    refused!(
        "ListEntries",
        ledger.list_entries(ListEntriesRequest {
            tenant: tenant_field.clone(),
            ..ListEntriesRequest::default()
        })
    );
    refused!(
        "GetEntry",
        ledger.get_entry(GetEntryRequest {
            tenant: tenant_field.clone(),
            sequence: 1
        })
    );
    refused!(
        "WatchEntries",
        ledger.watch_entries(WatchEntriesRequest {
            tenant: tenant_field.clone(),
            after_sequence: None,
        })
    );
    refused!(
        "VerifyLedger",
        ledger.verify_ledger(VerifyLedgerRequest {
            tenant: tenant_field
        })
    );
    got
}

#[tokio::test]
async fn a_confined_key_acts_and_sees_within_its_subjects_only() {
    let world = World::with_budgets(vec![budget("tenant:acme", Unit::RiskPoints, 100)]).await;
    let foreign = world.operator.clone().authority.reserve(reserve(5)).await;
    let foreign = foreign.expect("an answer").into_inner().reservation_id;
    let both = [Permission::Authority, Permission::Read];
    let key = world.key("acme", &both, "agent:bot").await;
    let mut authority = world.server.client(&key).authority;

    let outside = authority.reserve(reserve(1)).await.expect_err("outside");
    assert_eq!(reason(&outside), "SCOPE_NOT_PERMITTED");
    let settled = authority.commit(commit(&foreign, Vec::new())).await;
    assert_eq!(
        reason(&settled.expect_err("unseen")),
        "RESERVATION_NOT_FOUND"
    );

    let mut request = reserve(1);
    request.subject = Some(Subject {
        agent: "bot".into(),
        ..subject("acme")
    });
    let inside = authority
        .reserve(request)
        .await
        .expect("an answer")
        .into_inner();
    assert_eq!(verdict(&inside), "ALLOW");
    let listed = authority
        .list_reservations(ListReservationsRequest::default())
        .await;
    let listed = listed.expect("a list").into_inner().reservations;
    let ids: Vec<_> = listed.iter().map(|r| r.reservation_id.as_str()).collect();
    assert_eq!(ids, [inside.reservation_id.as_str()]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_whose_policy_cannot_be_read_is_refused_alone() {
    let world = World::with_budgets(vec![budget("tenant:acme", Unit::RiskPoints, 10_000)]).await;
    let broken = "
tenants: [{tenant: broken}]
budgets: [{scope: 'tenant:broken', unit: UNIT_RISK_POINTS, allocation: 10000}]
policies: [{tenant: broken, rules: [{id: often, when: 'recent.denials > 1000', effect: RULE_EFFECT_DENY}]}]
";
    provision(&world.operator, broken).await.expect("a plan");
    for tenant in ["a", "b", "y", "z"] {
        let scope = format!("tenant:{tenant}");
        let own = vec![budget(&scope, Unit::RiskPoints, 10_000)];
        world.provision(tenant, own).await;
    }
    world
        .database
        .sql("UPDATE documents SET body = replace(body, '> 1000', '> ') WHERE tenant_id = 'broken'")
        .await;
    // Which has read none of it before, and decides all of it at once.
    let server = Server::start_with(&world.database, &["--lanes", "1"]).await;
    let client = server.operator();
    let ask = |tenant: &'static str| {
        let (mut authority, mut request) = (client.authority.clone(), reserve(1));
        request.subject = Some(subject(tenant));
        async move { (tenant, authority.reserve(request).await) }
    };
    for _ in 0..5 {
        let mut asked = tokio::task::JoinSet::new();
        for _ in 0..20 {
            for tenant in ["a", "b", "broken", "acme", "y", "z"] {
                asked.spawn(ask(tenant));
            }
        }
        while let Some(answered) = asked.join_next().await {
            match answered.expect("no caller panics") {
                ("broken", answer) => {
                    let status = answer.expect_err("nothing can be decided");
                    assert_eq!(status.code(), Code::Internal);
                    assert_eq!(reason(&status), "INTERNAL");
                }
                (tenant, answer) => {
                    let answer = answer.unwrap_or_else(|status| panic!("{tenant}: {status:?}"));
                    assert_eq!(verdict(&answer.into_inner()), "ALLOW", "{tenant}");
                }
            }
        }
    }
    world
        .database
        .sql("UPDATE documents SET body = replace(body, '> ', '> 1000') WHERE tenant_id = 'broken'")
        .await;
    let (_, mended) = ask("broken").await;
    assert_eq!(verdict(&mended.expect("an answer").into_inner()), "ALLOW");
    world.database.assert_intact();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_cannot_be_read_is_refused_alone() {
    let world = World::with_budgets(vec![budget("tenant:acme", Unit::RiskPoints, 10_000)]).await;
    let other = vec![budget("tenant:other", Unit::RiskPoints, 10_000)];
    world.provision("other", other).await;
    let mut clients = Vec::new();
    for tenant in ["acme", "other"] {
        let key = world.key(tenant, &[Permission::Read], "").await;
        clients.push(world.server.client(&key).authority);
    }
    let list = |at: usize| {
        let mut authority = clients[at].clone();
        async move {
            let request = ListBalancesRequest::default();
            authority.list_balances(request).await
        }
    };
    for at in 0..2 {
        list(at).await.expect("balances");
    }
    world
        .database
        .sql("UPDATE api_keys SET permissions = 'EVERYTHING' WHERE tenant_id = 'other'")
        .await;
    let mut refused = 0;
    let begun = std::time::Instant::now();
    // Keys in use are read together once a second.
    while begun.elapsed() < std::time::Duration::from_secs(4) {
        let (one, other) = tokio::join!(list(0), list(1));
        one.expect("balances");
        if let Err(status) = other {
            assert_eq!(status.code(), Code::Internal);
            refused += 1;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert!(refused > 0, "it was read");
}
