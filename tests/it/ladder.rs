//! The life of an action, step by step, as an agent meets it.

use std::time::Duration;

use remit::proto::*;
use tonic::Code;

use crate::support::*;

#[tokio::test]
async fn an_action_is_held_committed_and_listed() {
    let world = World::with_budgets(vec![
        budget("tenant:acme", Unit::RiskPoints, 100),
        budget("tenant:acme/agent:bot", Unit::RiskPoints, 50),
    ])
    .await;
    let mut authority = world.operator.clone().authority;
    let mut request = reserve(30);
    request.subject = Some(Subject {
        agent: "Bot".into(),
        ..subject("acme")
    });

    let held = authority
        .reserve(request.clone())
        .await
        .expect("an answer")
        .into_inner();
    assert_eq!(held.decision(), Decision::Allow);
    let remaining: Vec<_> = held.balances.iter().map(|b| b.remaining).collect();
    assert_eq!(remaining, [Some(70), Some(20)], "every level holds");

    let again = authority
        .reserve(request.clone())
        .await
        .expect("a replay")
        .into_inner();
    assert!(again.replayed);
    assert_eq!(again.reservation_id, held.reservation_id);
    assert_eq!(again.ledger_sequence, held.ledger_sequence);

    request.estimates = points(31);
    let mismatch = authority.reserve(request).await.expect_err("a mismatch");
    assert_eq!(mismatch.code(), Code::AlreadyExists);
    assert_eq!(reason(&mismatch), "IDEMPOTENCY_MISMATCH");

    let settle = commit(&held.reservation_id, points(20));
    let settled = authority
        .commit(settle.clone())
        .await
        .expect("a commit")
        .into_inner();
    assert_eq!(settled.charged[0].value, 20);
    assert_eq!(settled.released[0].value, 10);
    let again = authority
        .commit(settle)
        .await
        .expect("a replay")
        .into_inner();
    assert!(again.replayed);
    assert_eq!(again.charged, settled.charged);

    let second = authority.release(release(&held.reservation_id)).await;
    let refused = second.expect_err("settled once");
    assert_eq!(reason(&refused), "RESERVATION_FINALIZED");

    let listed = authority
        .list_reservations(ListReservationsRequest {
            tenant: "acme".into(),
            state: ReservationState::Committed.into(),
            scope: "agent:bot".into(),
            ..ListReservationsRequest::default()
        })
        .await
        .expect("a list")
        .into_inner();
    assert_eq!(listed.reservations.len(), 1);
    assert_eq!(
        listed.reservations[0]
            .subject
            .as_ref()
            .map(|s| s.agent.as_str()),
        Some("Bot")
    );
    world.database.assert_intact();
}

#[tokio::test]
async fn denials_come_in_their_order_and_are_not_pinned_to_their_key() {
    let world = World::with_budgets(vec![budget("tenant:acme", Unit::RiskPoints, 10)]).await;
    let mut authority = world.operator.clone().authority;

    let mut mail = reserve(1);
    mail.subject = Some(Subject {
        toolset: "send-email".into(),
        ..subject("acme")
    });
    let denied = authority
        .reserve(mail.clone())
        .await
        .expect("an answer")
        .into_inner();
    assert_eq!(verdict(&denied), "BUDGET_NOT_PROVISIONED");
    assert!(denied.reservation_id.is_empty());
    assert!(denied.ledger_sequence > 0, "a denial is recorded");

    let approval = vec![budget("tenant:acme/toolset:send-email", Unit::Calls, 1)];
    world.provision("acme", approval).await;
    let allowed = authority
        .reserve(mail)
        .await
        .expect("an answer")
        .into_inner();
    assert_eq!(verdict(&allowed), "ALLOW", "the same key is decided anew");

    let short = authority
        .reserve(reserve(11))
        .await
        .expect("an answer")
        .into_inner();
    assert_eq!(verdict(&short), "BUDGET_EXCEEDED");
    let why = &short.reasons[0];
    assert_eq!((why.asked, why.remaining, why.held_by_others), (11, 9, 1));
    assert!(
        !short.retryable,
        "more than the whole allocation never fits"
    );
    let held = authority
        .reserve(reserve(10))
        .await
        .expect("an answer")
        .into_inner();
    assert!(held.retryable, "it fits when the other hold is over");

    let mut frozen = budget("tenant:acme", Unit::RiskPoints, 10);
    frozen.state = BudgetState::Frozen.into();
    world.provision("acme", vec![frozen]).await;
    let stopped = authority
        .reserve(reserve(11))
        .await
        .expect("an answer")
        .into_inner();
    assert_eq!(verdict(&stopped), "BUDGET_FROZEN", "before what remains");

    let mut tokens = reserve(1);
    tokens.estimates[0].unit = Unit::Tokens.into();
    let mismatch = authority.reserve(tokens).await.expect_err("a refusal");
    assert_eq!(
        reason(&mismatch),
        "UNIT_MISMATCH",
        "before the budgets' state"
    );
    world.database.assert_intact();
}

#[tokio::test]
async fn what_is_not_settled_in_time_is_given_back() {
    let world = World::with_budgets(vec![budget("tenant:acme", Unit::RiskPoints, 10)]).await;
    let mut authority = world.operator.clone().authority;
    let mut request = reserve(10);
    request.ttl = Some(pbjson_types::Duration {
        seconds: 1,
        nanos: 0,
    });
    request.grace = Some(pbjson_types::Duration {
        seconds: 0,
        nanos: 0,
    });
    let held = authority
        .reserve(request)
        .await
        .expect("an answer")
        .into_inner();
    assert_eq!(verdict(&held), "ALLOW");

    let mut next = reserve(10);
    for _ in 0..100 {
        next.idempotency_key = unique("again");
        let answer = authority
            .reserve(next.clone())
            .await
            .expect("an answer")
            .into_inner();
        if verdict(&answer) == "ALLOW" {
            let late = authority
                .commit(commit(&held.reservation_id, Vec::new()))
                .await;
            assert_eq!(reason(&late.expect_err("too late")), "RESERVATION_EXPIRED");
            let record = RecordRequest {
                idempotency_key: unique("record"),
                reservation_id: held.reservation_id.clone(),
                amounts: points(4),
                overage_policy: OveragePolicy::AllowIfAvailable.into(),
                tenant: "acme".into(),
                ..RecordRequest::default()
            };
            let recorded = authority
                .record(record)
                .await
                .expect("a record")
                .into_inner();
            assert_eq!(recorded.uncovered[0].value, 4, "nothing was left for it");
            world.database.assert_intact();
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the hold was never given back");
}

#[tokio::test]
async fn extending_lengthens_the_lease_and_asks_the_ladder_for_more() {
    let world = World::with_budgets(vec![budget("tenant:acme", Unit::RiskPoints, 10)]).await;
    let mut authority = world.operator.clone().authority;
    let held = authority
        .reserve(reserve(4))
        .await
        .expect("an answer")
        .into_inner();
    let extend = |additional, seconds| ExtendRequest {
        idempotency_key: unique("extend"),
        reservation_id: held.reservation_id.clone(),
        extend_by: Some(pbjson_types::Duration { seconds, nanos: 0 }),
        additional,
        tenant: "acme".into(),
    };
    let more = authority
        .extend(extend(points(5), 60))
        .await
        .expect("an answer")
        .into_inner();
    assert_eq!(more.decision(), Decision::Allow);
    let reserved: Vec<_> = more.reserved.iter().map(|a| a.value).collect();
    assert_eq!(reserved, [9]);
    let denied = authority
        .extend(extend(points(2), 60))
        .await
        .expect("an answer")
        .into_inner();
    assert_eq!(denied.decision(), Decision::Deny);
    assert_eq!(denied.expire_time, more.expire_time, "the lease neither");
    let long = authority
        .extend(extend(Vec::new(), 86_400))
        .await
        .expect_err("a refusal");
    assert_eq!(reason(&long), "LEASE_TOO_LONG");
    let settled = authority
        .commit(commit(&held.reservation_id, points(9)))
        .await;
    assert_eq!(settled.expect("a commit").into_inner().balances[0].spent, 9);
    world.database.assert_intact();
}

/// The worked numbers of commits that use more than was reserved: 100 allocated,
/// 30 reserved.
#[tokio::test]
async fn overage_is_rejected_capped_or_owed() {
    let world = World::start().await;
    let mut authority = world.operator.clone().authority;
    let cases = [
        ("a", OveragePolicy::Reject, 0, 31, Err("OVERAGE_REJECTED")),
        (
            "b",
            OveragePolicy::AllowIfAvailable,
            0,
            50,
            Ok((50, 50, 0, false)),
        ),
        (
            "c",
            OveragePolicy::AllowIfAvailable,
            0,
            150,
            Ok((0, 100, 0, true)),
        ),
        (
            "d",
            OveragePolicy::AllowWithOverdraft,
            0,
            150,
            Ok((0, 100, 0, true)),
        ),
        (
            "e",
            OveragePolicy::AllowWithOverdraft,
            60,
            150,
            Ok((-50, 100, 50, false)),
        ),
        (
            "f",
            OveragePolicy::AllowWithOverdraft,
            40,
            150,
            Err("OVERDRAFT_LIMIT_EXCEEDED"),
        ),
    ];
    for (tenant, policy, overdraft, actual, wanted) in cases {
        let mut own = budget(&format!("tenant:{tenant}"), Unit::RiskPoints, 100);
        own.overdraft_limit = overdraft;
        world.provision(tenant, vec![own]).await;
        let mut request = reserve(30);
        request.subject = Some(subject(tenant));
        request.overage_policy = policy.into();
        let held = authority
            .reserve(request)
            .await
            .expect("an answer")
            .into_inner();
        let mut settle = commit(&held.reservation_id, points(actual));
        settle.tenant = tenant.into();
        let got = match authority.commit(settle).await {
            Ok(settled) => {
                let balance = settled.into_inner().balances.remove(0);
                let remaining = balance.remaining.expect("a limit");
                Ok((remaining, balance.spent, balance.debt, balance.over_limit))
            }
            Err(status) => Err(reason(&status)),
        };
        assert_eq!(got, wanted.map_err(str::to_owned), "case {tenant}");
    }
    world.database.assert_intact();
}
