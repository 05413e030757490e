//! Many clients, several servers, one budget: exactly what it affords.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use remit::proto::*;
use sqlx::Connection as _;
use tonic::{Code, Status};

use crate::support::*;

/// Repeats a call with the same content while the answer says that this is safe.
pub(crate) async fn persist<T, F: Future<Output = Result<T, Status>>>(call: impl Fn() -> F) -> T {
    loop {
        match call().await {
            Ok(answer) => return answer,
            Err(status) => match status.code() {
                Code::Unavailable
                | Code::Aborted
                | Code::ResourceExhausted
                | Code::DeadlineExceeded
                | Code::Cancelled
                | Code::Unknown => {
                    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                }
                _ => panic!("{status:?}"),
            },
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_budget_that_affords_k_actions_allows_exactly_k() {
    const CLIENTS: usize = 64;
    const EACH: usize = 5;
    const AFFORDED: i64 = 100;

    let world = World::with_budgets(vec![
        budget("tenant:acme", Unit::RiskPoints, 1_000_000),
        budget("tenant:acme/agent:bot", Unit::RiskPoints, AFFORDED * 3),
    ])
    .await;
    let others = [
        Server::start(&world.database).await,
        Server::start(&world.database).await,
    ];
    let servers = [&world.server, &others[0], &others[1]];
    let allowed = Arc::new(AtomicI64::new(0));
    let mut tasks = tokio::task::JoinSet::new();
    for at in 0..CLIENTS {
        let client = servers[at % servers.len()].operator();
        let allowed = allowed.clone();
        tasks.spawn(async move {
            for _ in 0..EACH {
                let mut request = reserve(3);
                request.subject = Some(Subject {
                    agent: "bot".into(),
                    ..subject("acme")
                });
                let answer = persist(|| {
                    let (mut client, request) = (client.authority.clone(), request.clone());
                    async move { client.reserve(request).await }
                });
                let answer = answer.await.into_inner();
                if answer.decision() == Decision::Allow {
                    allowed.fetch_add(1, Ordering::Relaxed);
                } else {
                    assert_eq!(verdict(&answer), "BUDGET_EXCEEDED");
                }
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.expect("no client panics");
    }
    assert_eq!(allowed.load(Ordering::Relaxed), AFFORDED);
    world.database.assert_intact();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commits_releases_expiries_and_retries_keep_the_sums() {
    const CLIENTS: usize = 32;

    let world = World::with_budgets(vec![budget("tenant:acme", Unit::RiskPoints, 200)]).await;
    let others = [
        Server::start(&world.database).await,
        Server::start(&world.database).await,
    ];
    let servers = [&world.server, &others[0], &others[1]];
    let spent = Arc::new(AtomicI64::new(0));
    let mut tasks = tokio::task::JoinSet::new();
    for at in 0..CLIENTS {
        // Retries go to another server than the first attempt.
        let clients: Vec<_> = (0..3)
            .map(|n| servers[(at + n) % 3].operator().authority)
            .collect();
        let spent = spent.clone();
        tasks.spawn(async move {
            for round in 0..6_usize {
                let mut request = reserve(4);
                request.ttl = Some(pbjson_types::Duration {
                    seconds: 1,
                    nanos: 0,
                });
                request.grace = Some(pbjson_types::Duration {
                    seconds: 0,
                    nanos: 0,
                });
                let mut answers = Vec::new();
                for client in &clients {
                    let answer = persist(|| {
                        let (mut client, request) = (client.clone(), request.clone());
                        async move { client.reserve(request).await }
                    });
                    answers.push(answer.await.into_inner());
                    if answers[0].decision() != Decision::Allow {
                        break;
                    }
                }
                if answers[0].decision() != Decision::Allow {
                    continue;
                }
                let id = answers[0].reservation_id.clone();
                assert!(
                    answers.iter().all(|a| a.reservation_id == id),
                    "one key, one hold"
                );
                match (at + round) % 3 {
                    0 => {
                        let settle = commit(&id, points(3));
                        for client in &clients {
                            match client.clone().commit(settle.clone()).await {
                                Ok(_) => {}
                                Err(status) if reason(&status) == "RESERVATION_EXPIRED" => break,
                                Err(status) => panic!("{status:?}"),
                            }
                            if std::ptr::eq(client, &clients[0]) {
                                spent.fetch_add(3, Ordering::Relaxed);
                            }
                        }
                    }
                    1 => {
                        let settle = release(&id);
                        for client in &clients {
                            let released = client.clone().release(settle.clone()).await;
                            if let Err(status) = released {
                                assert_eq!(reason(&status), "RESERVATION_EXPIRED");
                            }
                        }
                    }
                    _ => {} // left to expire
                }
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.expect("no client panics");
    }
    for _ in 0..200 {
        let open = world
            .database
            .count("SELECT count(*) FROM reservations WHERE state = 'ACTIVE'");
        if open.await == 0 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    let balance = "SELECT spent FROM balances WHERE tenant_id = 'acme'";
    assert_eq!(
        world.database.count(balance).await,
        spent.load(Ordering::Relaxed)
    );
    let held = "SELECT reserved FROM balances WHERE tenant_id = 'acme'";
    assert_eq!(world.database.count(held).await, 0);
    world.database.assert_intact();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heads_are_locked_by_the_bytes_of_names_whatever_the_collation() {
    let world = World::start().await;
    for tenant in ["a-1", "a_1"] {
        world.provision(tenant, Vec::new()).await;
    }
    // As on a database of somebody's own, where `a_1` comes before `a-1`.
    world
        .database
        .sql("ALTER TABLE heads ALTER COLUMN tenant_id TYPE text COLLATE \"en-x-icu\"")
        .await;
    let order = "SELECT count(*) FROM (SELECT tenant_id FROM heads WHERE tenant_id LIKE 'a%'
                 ORDER BY tenant_id LIMIT 1) f WHERE tenant_id = 'a_1'";
    assert_eq!(world.database.count(order).await, 1);

    let mut held = sqlx::PgConnection::connect(&world.database.url())
        .await
        .expect("a connection");
    let mut first = held.begin().await.expect("a transaction");
    sqlx::query("SELECT 1 FROM heads WHERE tenant_id = 'a-1' FOR UPDATE")
        .execute(&mut *first)
        .await
        .expect("a lock");
    let mut provisioning = world.operator.clone().provisioning;
    let both = ProvisionRequest {
        idempotency_key: unique("provision"),
        budgets: ["a-1", "a_1"]
            .map(|tenant| budget(&format!("tenant:{tenant}"), Unit::Tokens, 5))
            .into(),
        ..ProvisionRequest::default()
    };
    let provisioned = tokio::spawn(async move { provisioning.provision(both).await });
    let waits = "SELECT count(*) FROM pg_stat_activity
                 WHERE wait_event_type = 'Lock' AND query LIKE '/* lock_heads */%'";
    let begun = std::time::Instant::now();
    while world.database.count(waits).await == 0 {
        assert!(
            begun.elapsed().as_secs() < 30,
            "it waits for the first head"
        );
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    // It waits for the first one and has none yet: whoever has the first gets the second.
    sqlx::query("SELECT 1 FROM heads WHERE tenant_id = 'a_1' FOR UPDATE NOWAIT")
        .execute(&mut *first)
        .await
        .expect("nobody has it");
    first.commit().await.expect("an end");
    let provisioned = provisioned.await.expect("no panic");
    assert!(provisioned.expect("a plan").into_inner().applied);
    world.database.assert_intact();
}
