//! The operator's side: documents, funding, keys, the ledger.

use remit::proto::*;
use tonic::Code;

use crate::support::*;

fn kinds(plan: &ProvisionResponse) -> Vec<ChangeKind> {
    plan.changes.iter().map(Change::kind).collect()
}

#[tokio::test]
async fn a_document_is_applied_once_and_planned_without_effect() {
    let world = World::start().await;
    let mut provisioning = world.operator.clone().provisioning;
    let document = |validate_only| ProvisionRequest {
        idempotency_key: unique("document"),
        tenants: vec![Tenant {
            tenant: "acme".into(),
            ..Tenant::default()
        }],
        budgets: vec![budget("tenant:acme", Unit::Tokens, 10)],
        validate_only,
        ..ProvisionRequest::default()
    };
    let plan = provisioning
        .provision(document(true))
        .await
        .expect("a plan")
        .into_inner();
    assert!(!plan.applied);
    assert_eq!(kinds(&plan), [ChangeKind::Created, ChangeKind::Created]);
    let missing = provisioning
        .get_tenant(GetTenantRequest {
            tenant: "acme".into(),
        })
        .await;
    assert_eq!(missing.expect_err("only planned").code(), Code::NotFound);

    let request = document(false);
    let first = provisioning
        .provision(request.clone())
        .await
        .expect("a plan")
        .into_inner();
    assert!(first.applied);
    let again = provisioning
        .provision(request.clone())
        .await
        .expect("a replay")
        .into_inner();
    assert!(again.replayed);
    assert_eq!(again.changes, first.changes);
    let second = provisioning
        .provision(document(false))
        .await
        .expect("a plan")
        .into_inner();
    assert_eq!(
        kinds(&second),
        [ChangeKind::Unchanged, ChangeKind::Unchanged]
    );
    let mut other = request;
    other.budgets[0].limit = Some(remit::proto::budget::Limit::Allocation(11));
    let status = provisioning.provision(other).await.expect_err("a mismatch");
    assert_eq!(reason(&status), "IDEMPOTENCY_MISMATCH");
    world.database.assert_intact();
}

#[tokio::test]
async fn lowering_an_allocation_below_what_is_used_denies_until_it_recovers() {
    let world = World::with_budgets(vec![budget("tenant:acme", Unit::RiskPoints, 10)]).await;
    let mut authority = world.operator.clone().authority;
    let held = authority
        .reserve(reserve(8))
        .await
        .expect("an answer")
        .into_inner();
    world
        .provision("acme", vec![budget("tenant:acme", Unit::RiskPoints, 5)])
        .await;
    let denied = authority
        .reserve(reserve(1))
        .await
        .expect("an answer")
        .into_inner();
    assert_eq!(denied.reasons[0].remaining, -3);
    authority
        .release(release(&held.reservation_id))
        .await
        .expect("a release");
    let answer = authority
        .reserve(reserve(5))
        .await
        .expect("an answer")
        .into_inner();
    assert_eq!(verdict(&answer), "ALLOW");
    world.database.assert_intact();
}

#[tokio::test]
async fn a_template_gives_each_run_its_own_limit() {
    let world = World::with_budgets(vec![budget("tenant:acme/run:*", Unit::RiskPoints, 10)]).await;
    let mut authority = world.operator.clone().authority;
    for run in ["one", "two"] {
        let mut request = reserve(10);
        request.subject = Some(Subject {
            dimensions: [("run".to_owned(), run.to_owned())].into(),
            ..subject("acme")
        });
        let first = authority
            .reserve(request.clone())
            .await
            .expect("an answer")
            .into_inner();
        assert_eq!(verdict(&first), "ALLOW");
        assert_eq!(first.balances[0].scope, format!("tenant:acme/run:{run}"));
        request.idempotency_key = unique("reserve");
        let second = authority
            .reserve(request)
            .await
            .expect("an answer")
            .into_inner();
        assert_eq!(verdict(&second), "BUDGET_EXCEEDED");
    }
    world.database.assert_intact();
}

#[tokio::test]
async fn funding_changes_one_balance_and_lifts_the_mark_of_a_capped_use() {
    let world = World::with_budgets(vec![budget("tenant:acme", Unit::RiskPoints, 10)]).await;
    let mut authority = world.operator.clone().authority;
    let held = authority
        .reserve(reserve(5))
        .await
        .expect("an answer")
        .into_inner();
    let settled = authority
        .commit(commit(&held.reservation_id, points(20)))
        .await;
    let settled = settled.expect("a commit").into_inner();
    assert_eq!(settled.uncovered[0].value, 10);
    assert!(settled.balances[0].over_limit);
    let denied = authority
        .reserve(reserve(1))
        .await
        .expect("an answer")
        .into_inner();
    assert_eq!(verdict(&denied), "OVERDRAFT_LIMIT_EXCEEDED");

    let mut provisioning = world.operator.clone().provisioning;
    let fund = |operation: FundOperation, amount| FundBudgetRequest {
        idempotency_key: unique("fund"),
        scope: "tenant:acme".into(),
        unit: Unit::RiskPoints.into(),
        operation: operation.into(),
        amount,
        ..FundBudgetRequest::default()
    };
    let credit = fund(FundOperation::Credit, 7);
    let funded = provisioning
        .fund_budget(credit.clone())
        .await
        .expect("a balance")
        .into_inner();
    assert_eq!(funded.balance.and_then(|b| b.remaining), Some(7));
    let again = provisioning
        .fund_budget(credit)
        .await
        .expect("a replay")
        .into_inner();
    assert!(again.replayed);
    let answer = authority
        .reserve(reserve(7))
        .await
        .expect("an answer")
        .into_inner();
    assert_eq!(verdict(&answer), "ALLOW");
    let debit = provisioning
        .fund_budget(fund(FundOperation::Debit, 1))
        .await;
    assert_eq!(
        reason(&debit.expect_err("nothing left")),
        "INSUFFICIENT_REMAINING"
    );
    let reset = provisioning
        .fund_budget(fund(FundOperation::Reset, 100))
        .await;
    let balance = reset
        .expect("a balance")
        .into_inner()
        .balance
        .expect("a balance");
    assert_eq!(
        (balance.allocated, balance.remaining),
        (Some(100), Some(83))
    );
    // What is spent alone, and together with what is allocated.
    for (amount, allocated, then) in [(20, None, (100, 73)), (5, Some(50), (50, 38))] {
        let set = FundBudgetRequest {
            allocated,
            ..fund(FundOperation::ResetSpent, amount)
        };
        let funded = provisioning.fund_budget(set).await.expect("a balance");
        let balance = funded.into_inner().balance.expect("a balance");
        let said = (balance.allocated, balance.remaining);
        assert_eq!(
            (said, balance.spent),
            ((Some(then.0), Some(then.1)), amount)
        );
    }
    // Without a debt everything is beyond it.
    for (credit_surplus, allocated) in [(false, 50), (true, 57)] {
        let repay = FundBudgetRequest {
            credit_surplus,
            ..fund(FundOperation::RepayDebt, 7)
        };
        let funded = provisioning.fund_budget(repay).await.expect("a balance");
        let balance = funded.into_inner().balance.expect("a balance");
        assert_eq!(balance.allocated, Some(allocated));
    }
    world.database.assert_intact();
}

#[tokio::test]
async fn lifting_a_stop_needs_a_permission_of_its_own() {
    let world = World::with_budgets(vec![budget("tenant:acme", Unit::RiskPoints, 10)]).await;
    let key = world.key("acme", &[Permission::Provision], "").await;
    let mut provisioning = world.server.client(&key).provisioning;
    let set = |state: BudgetState| {
        let mut own = budget("tenant:acme", Unit::RiskPoints, 10);
        own.state = state.into();
        ProvisionRequest {
            idempotency_key: unique("document"),
            budgets: vec![own],
            ..ProvisionRequest::default()
        }
    };
    provisioning
        .provision(set(BudgetState::Frozen))
        .await
        .expect("freezing is allowed");
    let status = provisioning
        .provision(set(BudgetState::Active))
        .await
        .expect_err("unfreezing");
    assert_eq!(reason(&status), "LOOSENING_NOT_PERMITTED");
    let absent = ProvisionRequest {
        idempotency_key: unique("document"),
        absent_budgets: vec![BudgetRef {
            scope: "tenant:acme".into(),
            unit: Unit::RiskPoints.into(),
            ..BudgetRef::default()
        }],
        ..ProvisionRequest::default()
    };
    let status = provisioning
        .provision(absent)
        .await
        .expect_err("removing a frozen budget");
    assert_eq!(reason(&status), "LOOSENING_NOT_PERMITTED");
    world.database.assert_intact();
}

#[tokio::test]
async fn a_revoked_key_is_refused_and_a_secret_is_shown_once() {
    let world = World::with_budgets(Vec::new()).await;
    let mut provisioning = world.operator.clone().provisioning;
    let request = CreateApiKeyRequest {
        idempotency_key: unique("key"),
        api_key: Some(ApiKey {
            tenant: "acme".into(),
            permissions: vec![Permission::Read.into()],
            ..ApiKey::default()
        }),
    };
    let made = provisioning
        .create_api_key(request.clone())
        .await
        .expect("a key")
        .into_inner();
    let again = provisioning
        .create_api_key(request)
        .await
        .expect("a replay")
        .into_inner();
    assert!(again.replayed && again.secret.is_empty());
    assert_eq!(again.api_key, made.api_key);
    let mut client = world.server.client(&made.secret).provisioning;
    client
        .get_tenant(GetTenantRequest::default())
        .await
        .expect("a tenant");
    let key_id = made.api_key.expect("a key").key_id;
    provisioning
        .revoke_api_key(RevokeApiKeyRequest { key_id })
        .await
        .expect("an end");
    let status = client
        .get_tenant(GetTenantRequest::default())
        .await
        .expect_err("revoked");
    assert_eq!(status.code(), Code::Unauthenticated);
    world.database.assert_intact();
}

#[tokio::test]
async fn pages_lose_and_repeat_nothing_while_others_write() {
    let world = World::with_budgets(vec![budget("tenant:acme", Unit::RiskPoints, 1_000)]).await;
    let mut authority = world.operator.clone().authority;
    let mut made = Vec::new();
    for _ in 0..7 {
        let held = authority
            .reserve(reserve(1))
            .await
            .expect("an answer")
            .into_inner();
        made.push(held.reservation_id);
    }
    made.reverse();
    let (mut seen, mut page_token) = (Vec::new(), String::new());
    loop {
        let page = authority.list_reservations(ListReservationsRequest {
            tenant: "acme".into(),
            page_size: 3,
            page_token,
            ..ListReservationsRequest::default()
        });
        let page = page.await.expect("a page").into_inner();
        seen.extend(page.reservations.into_iter().map(|r| r.reservation_id));
        page_token = page.next_page_token;
        authority.reserve(reserve(1)).await.expect("an answer");
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(seen, made, "newest first");
}

#[tokio::test]
async fn a_watcher_sees_every_entry_in_order() {
    let world = World::with_budgets(vec![budget("tenant:acme", Unit::RiskPoints, 1_000)]).await;
    let request = WatchEntriesRequest {
        tenant: "acme".into(),
        after_sequence: Some(0),
    };
    let watched = world.operator.clone().ledger.watch_entries(request).await;
    let mut entries = watched.expect("a stream").into_inner();
    let mut authority = world.operator.clone().authority;
    for _ in 0..3 {
        authority.reserve(reserve(1)).await.expect("an answer");
    }
    // The provisioning, the opened balance and three reservations.
    for sequence in 1..=5 {
        let message = entries
            .message()
            .await
            .expect("no error")
            .expect("an entry");
        assert_eq!(message.entry.map(|e| e.sequence), Some(sequence));
    }
}

#[tokio::test]
async fn expiring_credits_lapse_as_far_as_they_were_not_used() {
    let world = World::with_budgets(vec![budget("tenant:acme", Unit::RiskPoints, 10)]).await;
    let mut authority = world.operator.clone().authority;
    let mut provisioning = world.operator.clone().provisioning;
    let soon = std::time::SystemTime::now() + std::time::Duration::from_millis(1_500);
    let since = soon
        .duration_since(std::time::UNIX_EPOCH)
        .expect("after the epoch");
    let credit = FundBudgetRequest {
        idempotency_key: unique("fund"),
        scope: "tenant:acme".into(),
        unit: Unit::RiskPoints.into(),
        operation: FundOperation::Credit.into(),
        amount: 5,
        expire_time: Some(pbjson_types::Timestamp {
            seconds: i64::try_from(since.as_secs()).expect("a time"),
            nanos: i32::try_from(since.subsec_nanos()).expect("below a second"),
        }),
        ..FundBudgetRequest::default()
    };
    provisioning.fund_budget(credit).await.expect("a balance");
    let held = authority
        .reserve(reserve(3))
        .await
        .expect("an answer")
        .into_inner();
    authority
        .commit(commit(&held.reservation_id, Vec::new()))
        .await
        .expect("a commit");
    tokio::time::sleep(std::time::Duration::from_millis(1_600)).await;
    let answer = authority
        .reserve(reserve(1))
        .await
        .expect("an answer")
        .into_inner();
    let balance = &answer.balances[0];
    // Three of the five were used, two lapsed.
    assert_eq!((balance.allocated, balance.remaining), (Some(13), Some(9)));
    world.database.assert_intact();
}

#[tokio::test]
async fn a_document_can_create_alone_or_change_some_fields_alone() {
    let world = World::with_budgets(vec![budget("tenant:acme", Unit::Tokens, 10)]).await;
    let mut provisioning = world.operator.clone().provisioning;
    let document = |budgets| ProvisionRequest {
        idempotency_key: unique("document"),
        budgets,
        ..ProvisionRequest::default()
    };
    // Of two that create the same budget one is refused, with all that it brings.
    let mut second = document(vec![
        budget("tenant:acme/agent:new", Unit::Tokens, 5),
        budget("tenant:acme", Unit::Tokens, 99),
    ]);
    second.create_only = true;
    let refused = provisioning.provision(second.clone()).await;
    let refused = refused.expect_err("it exists");
    assert_eq!(reason(&refused), "ALREADY_PROVISIONED");
    assert_eq!(refused.code(), Code::AlreadyExists);
    second.budgets.truncate(1);
    let made = provisioning.provision(second.clone()).await;
    assert_eq!(
        kinds(&made.expect("a plan").into_inner()),
        [ChangeKind::Created]
    );
    // How it is applied is a part of what a retry must repeat.
    second.create_only = false;
    let other = provisioning.provision(second).await.expect_err("another");
    assert_eq!(reason(&other), "IDEMPOTENCY_MISMATCH");

    // A freeze that does not restate the allocation does not change it.
    let mut freeze = document(vec![Budget {
        state: BudgetState::Frozen.into(),
        ..budget("tenant:acme", Unit::Tokens, 0)
    }]);
    let only = |field: &str| {
        Some(pbjson_types::FieldMask {
            paths: vec![field.to_owned()],
        })
    };
    freeze.update_mask = only("state");
    let plan = provisioning.provision(freeze.clone()).await;
    let plan = plan.expect("a plan").into_inner();
    assert_eq!(plan.changes[0].details, ["state: ACTIVE -> FROZEN"]);
    let named = GetBudgetRequest {
        scope: "tenant:acme".into(),
        unit: Unit::Tokens.into(),
        ..GetBudgetRequest::default()
    };
    let budget_now = provisioning.get_budget(named).await.expect("a budget");
    let budget_now = budget_now.into_inner().budget.expect("a budget");
    assert_eq!(budget_now.limit, Some(budget::Limit::Allocation(10)));
    assert_eq!(budget_now.state(), BudgetState::Frozen);

    // What is not there can't be changed, and what is no field neither.
    freeze.idempotency_key = unique("document");
    freeze.budgets[0].scope = "tenant:acme/agent:nobody".into();
    let missing = provisioning.provision(freeze.clone()).await;
    assert_eq!(reason(&missing.expect_err("missing")), "BUDGET_NOT_FOUND");
    freeze.update_mask = only("colour");
    let unknown = provisioning.provision(freeze.clone()).await;
    assert_eq!(unknown.expect_err("unknown").code(), Code::InvalidArgument);
    freeze.update_mask = only("state");
    freeze.create_only = true;
    let both = provisioning.provision(freeze).await;
    assert_eq!(both.expect_err("both").code(), Code::InvalidArgument);
    world.database.assert_intact();
}

#[tokio::test]
async fn budgets_that_nothing_has_touched_can_be_listed_as_they_will_open() {
    let world = World::with_budgets(vec![
        budget("tenant:acme", Unit::RiskPoints, 10),
        budget("tenant:acme/agent:a", Unit::RiskPoints, 20),
        budget("tenant:acme/agent:b", Unit::RiskPoints, 30),
        budget("tenant:acme/run:*", Unit::RiskPoints, 40),
    ])
    .await;
    let list = async |request: ListBalancesRequest| {
        let mut authority = world.operator.clone().authority;
        let answer = authority.list_balances(request).await.expect("balances");
        answer.into_inner()
    };
    let all = ListBalancesRequest {
        tenant: "acme".into(),
        include_unopened: true,
        page_size: 2,
        ..ListBalancesRequest::default()
    };
    let mut ask = reserve(1);
    ask.subject.as_mut().expect("a subject").agent = "b".into();
    let held = world.operator.clone().authority.reserve(ask).await;
    assert_eq!(
        held.expect("an answer").into_inner().decision(),
        Decision::Allow
    );
    // What is open comes first; over pages each comes once.
    let mut seen = Vec::new();
    let mut request = all.clone();
    loop {
        let page = list(request.clone()).await;
        seen.extend(page.balances.into_iter().map(|b| (b.scope, b.reserved)));
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    let expected = [
        ("tenant:acme", 1),
        ("tenant:acme/agent:b", 1),
        ("tenant:acme/agent:a", 0),
    ];
    assert_eq!(seen, expected.map(|(scope, held)| (scope.to_owned(), held)));
    // One scope alone, opened or not.
    for (scope, remaining) in [("tenant:acme", 9), ("tenant:acme/agent:a", 20)] {
        let found = list(ListBalancesRequest {
            scope: scope.into(),
            exact: true,
            ..all.clone()
        });
        let found = found.await.balances;
        assert_eq!(found.len(), 1, "{scope}");
        assert_eq!(found[0].remaining, Some(remaining));
    }
}
