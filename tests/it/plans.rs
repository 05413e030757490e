//! How PostgreSQL carries out what every decision asks of it, on large tables: as it
//! logged it while real servers worked, with generic plans.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use remit::proto::*;

use crate::contention::persist;
use crate::support::*;

/// Every statement on the path of a decision, by the name in its comment.
const HOT: [&str; 16] = [
    "find_keys",
    "read_heads",
    "lock_heads",
    "read_tenants",
    "read_budgets",
    "read_keys",
    "read_entries",
    "read_reservations",
    "read_balances",
    "read_accounts",
    "write_batch",
    "write_batch_more",
    "read_documents",
    "read_activity",
    "standing",
    "overdue",
];

/// Rows of others: 20,000 tenants, 300,000 entries in two months.
const LARGE: &str = "
    SET synchronous_commit = off;
    CREATE TEMP TABLE t AS SELECT 'other' || i AS name, i FROM generate_series(1, 20000) i;
    CREATE TEMP TABLE clock AS SELECT (extract(epoch FROM now()) * 1e6)::bigint AS us;
    INSERT INTO tenants SELECT name, '', 'ACTIVE', 'REQUIRE_ANY_BUDGET', 'REJECT', 0 FROM t;
    INSERT INTO heads SELECT name, 1, 15, decode(repeat('00', 32), 'hex'), 0, 2, 1 FROM t;
    INSERT INTO api_keys SELECT name, name, '', 'READ', NULL, '', NULL, 0, NULL FROM t;
    INSERT INTO budgets SELECT name, 1, 'tenant:' || name, 'RISK_POINTS', 'TOTAL', 'UTC', 5, 0,
        'NONE', 'ACTIVE', true, 1, 0 FROM t;
    INSERT INTO balances SELECT name, 1, 1, 'tenant:' || name,
        substring(sha256(('tenant:' || name)::bytea), 1, 16), 0, NULL, 0, 0, 0, 0, NULL, NULL, NULL
        FROM t;
    INSERT INTO reservations SELECT name, substring(sha256((name || n)::bytea), 1, 16),
        'tenant:' || name, '{}', 0, n, 2, 'COMMITTED', '[]', i, i, 0, n, NULL
        FROM t, generate_series(1, 7) n;
    INSERT INTO idempotency_keys SELECT name, substring(sha256((name || n)::bytea), 1, 16), n
        FROM t, generate_series(1, 7) n;
    INSERT INTO documents SELECT name, 'POLICY', 1, '{\"rules\":[]}' FROM t;
    INSERT INTO activity SELECT name, substring(sha256((name || n)::bytea), 1, 16), 0, '{}'
        FROM t, generate_series(1, 3) n;
    INSERT INTO ledger SELECT name, n, us + n % 2 * 2678400000000, 'RESERVE', 'ALLOW', NULL,
        repeat('x', 200), decode(repeat('00', 32), 'hex'), decode(repeat('00', 32), 'hex')
        FROM clock, t, generate_series(1, 15) n;
    ANALYZE;";

/// What PostgreSQL logged of one statement.
#[derive(Default)]
struct Plans {
    seen: usize,
    /// Lines of plans that read more than an index gives.
    bad: BTreeSet<String>,
}

/// Reads what auto_explain has written, by the statements' names.
fn plans(log: &str) -> BTreeMap<String, Plans> {
    let mut plans: BTreeMap<String, Plans> = BTreeMap::new();
    for block in log.split("duration: ").skip(1) {
        let Some((_, after)) = block.split_once("/* ") else {
            continue;
        };
        let Some((name, plan)) = after.split_once(" */") else {
            continue;
        };
        let of = plans.entry(name.to_owned()).or_default();
        of.seen += 1;
        let bad = ["Seq Scan on ", "Hash Join", "Merge Join"];
        for line in plan.lines() {
            if bad.iter().any(|bad| line.contains(bad)) {
                let line = line.split("(cost").next().unwrap_or(line);
                of.bad.insert(line.trim().to_owned());
            }
        }
    }
    plans
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_statement_of_a_decision_reads_by_index_alone() {
    let world = World::with_budgets(vec![
        budget("tenant:acme", Unit::RiskPoints, 1_000_000),
        budget("tenant:acme/agent:bot", Unit::RiskPoints, 1_000_000),
    ])
    .await;
    // And one whose rules read what agents did of late.
    let rule = Rule {
        id: "often".into(),
        when: "recent.denials > 1000".into(),
        effect: RuleEffect::Deny.into(),
        ..Rule::default()
    };
    let watched = ProvisionRequest {
        idempotency_key: unique("provision"),
        tenants: vec![Tenant {
            tenant: "watched".into(),
            ..Tenant::default()
        }],
        budgets: vec![budget("tenant:watched", Unit::RiskPoints, 1_000_000)],
        policies: vec![Policy {
            tenant: "watched".into(),
            rules: vec![rule],
            ..Policy::default()
        }],
        ..ProvisionRequest::default()
    };
    let mut provisioning = world.operator.clone().provisioning;
    provisioning.provision(watched).await.expect("a plan");
    world.database.sql(LARGE).await;
    world
        .database
        .sql(
            "ALTER DATABASE remit SET session_preload_libraries = 'auto_explain';
             ALTER DATABASE remit SET auto_explain.log_min_duration = 0;
             ALTER DATABASE remit SET plan_cache_mode = 'force_generic_plan'",
        )
        .await;
    // Only new connections are watched.
    let servers = [
        Server::start(&world.database).await,
        Server::start(&world.database).await,
    ];
    let clients = servers.each_ref().map(Server::operator);

    // What each server has never seen, the other one did: everything is read.
    for turn in 0..4 {
        let (one, other) = (&clients[turn % 2], &clients[(turn + 1) % 2]);
        let (mut one, mut other) = (one.authority.clone(), other.authority.clone());
        let mut request = reserve(3);
        request.subject = Some(Subject {
            agent: "bot".into(),
            ..subject("acme")
        });
        let first = one.reserve(request.clone()).await.expect("an answer");
        let id = first.into_inner().reservation_id;
        let again = other.reserve(request).await.expect("the same again");
        assert_eq!(again.into_inner().reservation_id, id);
        let settling = commit(&id, points(2));
        other.commit(settling.clone()).await.expect("a settlement");
        one.commit(settling).await.expect("the same again");
        let mut request = reserve(1);
        request.subject = Some(subject("watched"));
        one.reserve(request).await.expect("an answer");
        let denied = reserve(10_000_000);
        let denial = one.reserve(denied).await.expect("a denial").into_inner();
        assert_eq!(verdict(&denial), "BUDGET_EXCEEDED");
    }

    // A connection that is lost in the middle of a write leaves open whether it stands.
    let over = Arc::new(AtomicBool::new(false));
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let (client, over) = (clients[0].authority.clone(), over.clone());
        callers.spawn(async move {
            while !over.load(Ordering::Relaxed) {
                let request = reserve(1);
                persist(|| {
                    let (mut client, request) = (client.clone(), request.clone());
                    async move { client.reserve(request).await }
                })
                .await;
            }
        });
    }
    let log = world.database.folder.path().join("data/postgres.log");
    let found = || plans(&std::fs::read_to_string(&log).expect("PostgreSQL's log"));
    for _ in 0..400 {
        world
            .database
            .sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                 WHERE application_name = 'remit' AND query LIKE '/* write_batch%'",
            )
            .await;
        tokio::time::sleep(Duration::from_millis(25)).await;
        let found = found();
        if HOT.iter().all(|name| found.contains_key(*name)) {
            break;
        }
    }
    over.store(true, Ordering::Relaxed);
    while let Some(done) = callers.join_next().await {
        done.expect("no caller panics");
    }

    let found = found();
    for name in HOT {
        let plans = found.get(name);
        let plans = plans.unwrap_or_else(|| panic!("{name} was not carried out"));
        assert!(plans.seen > 0);
        assert!(plans.bad.is_empty(), "{name}: {:?}", plans.bad);
    }
}
