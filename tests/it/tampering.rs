//! A ledger that was altered behind the server's back is found out.

use crate::support::*;

async fn with_entries() -> World {
    let world = World::with_budgets(vec![budget(
        "tenant:acme",
        remit::proto::Unit::RiskPoints,
        100,
    )])
    .await;
    let mut authority = world.operator.clone().authority;
    for _ in 0..5 {
        authority.reserve(reserve(1)).await.expect("an answer");
    }
    let denied = authority.reserve(reserve(1_000)).await;
    assert_eq!(
        verdict(&denied.expect("an answer").into_inner()),
        "BUDGET_EXCEEDED"
    );
    world.database.assert_intact();
    world
}

#[tokio::test]
async fn verify_names_the_first_bad_entry() {
    let world = with_entries().await;
    let cases: [(&'static str, &'static str, &str); 8] = [
        (
            "UPDATE ledger SET body = replace(body, '\"act\"', '\"bct\"') WHERE tenant_id = 'acme' AND seq = 4",
            "UPDATE ledger SET body = replace(body, '\"bct\"', '\"act\"') WHERE tenant_id = 'acme' AND seq = 4",
            "BROKEN at entry 4:",
        ),
        (
            "CREATE TABLE kept AS SELECT * FROM ledger WHERE tenant_id = 'acme' AND seq = 3;
             DELETE FROM ledger WHERE tenant_id = 'acme' AND seq = 3",
            "INSERT INTO ledger SELECT * FROM kept",
            "BROKEN at entry 3:",
        ),
        (
            "UPDATE ledger SET seq = -seq WHERE tenant_id = 'acme' AND seq IN (3, 4);
             UPDATE ledger SET seq = 7 + seq WHERE tenant_id = 'acme' AND seq < 0",
            "UPDATE ledger SET seq = -seq WHERE tenant_id = 'acme' AND seq IN (3, 4);
             UPDATE ledger SET seq = 7 + seq WHERE tenant_id = 'acme' AND seq < 0",
            "BROKEN at entry 3:",
        ),
        (
            "CREATE TABLE tail AS SELECT * FROM ledger WHERE tenant_id = 'acme' AND seq = 8;
             DELETE FROM ledger WHERE tenant_id = 'acme' AND seq = 8",
            "INSERT INTO ledger SELECT * FROM tail",
            "BROKEN at entry 8:",
        ),
        (
            "UPDATE ledger SET decision = NULL WHERE tenant_id = 'acme' AND seq = 5",
            "UPDATE ledger SET decision = 'ALLOW' WHERE tenant_id = 'acme' AND seq = 5",
            "BROKEN at entry 5: the body says another decision",
        ),
        (
            "UPDATE ledger SET decision = 'ALLOW' WHERE tenant_id = 'acme' AND seq = 8",
            "UPDATE ledger SET decision = 'DENY' WHERE tenant_id = 'acme' AND seq = 8",
            "BROKEN at entry 8: the body says another decision",
        ),
        (
            "CREATE TABLE found AS SELECT seq, reservation_id FROM ledger WHERE tenant_id = 'acme';
             UPDATE ledger SET reservation_id = decode(repeat('00', 16), 'hex')
             WHERE tenant_id = 'acme' AND seq = 6",
            "UPDATE ledger l SET reservation_id = f.reservation_id FROM found f
             WHERE l.tenant_id = 'acme' AND l.seq = f.seq",
            "BROKEN at entry 6: the body says another decision or reservation",
        ),
        (
            "UPDATE balances SET reserved = reserved - 1 WHERE tenant_id = 'acme'",
            "UPDATE balances SET reserved = reserved + 1 WHERE tenant_id = 'acme'",
            "BROKEN: balance 1",
        ),
    ];
    for (break_it, mend_it, wanted) in cases {
        world.database.sql(break_it).await;
        let output = world.database.verify();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(!output.status.success(), "{break_it}");
        assert!(
            said.contains(&format!("acme: {wanted}")),
            "{break_it}: {said}"
        );
        world.database.sql(mend_it).await;
        world.database.assert_intact();
    }
}
