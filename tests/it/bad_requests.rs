//! Bad requests through a real client: each gets its code, its reason and the
//! field, nothing panics, nothing is written.

use remit::proto::*;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::support::*;

/// A bad request: what it is, how it was answered, code, reason, named field.
type Row = (
    &'static str,
    Result<(), Status>,
    Code,
    &'static str,
    &'static str,
);

fn seconds(seconds: i64) -> Option<pbjson_types::Duration> {
    Some(pbjson_types::Duration { seconds, nanos: 0 })
}

#[tokio::test]
async fn every_bad_request_is_answered_by_name_and_writes_nothing() {
    let world = World::with_budgets(vec![budget("tenant:acme", Unit::RiskPoints, 100)]).await;
    let mut authority = world.operator.clone().authority;
    let held = authority
        .reserve(reserve(5))
        .await
        .expect("an answer")
        .into_inner();
    let done = authority
        .reserve(reserve(5))
        .await
        .expect("an answer")
        .into_inner();
    let done_commit = commit(&done.reservation_id, Vec::new());
    authority
        .commit(done_commit.clone())
        .await
        .expect("a commit");
    let read_key = world.key("acme", &[Permission::Read], "").await;
    let before = world.database.count("SELECT count(*) FROM ledger").await;

    let rows = rows(
        &world,
        &held.reservation_id,
        &done.reservation_id,
        &done_commit,
        &read_key,
    )
    .await;
    assert!(rows.len() >= 60, "{} rows", rows.len());
    let mut wrong = Vec::new();
    for (what, answer, code, wanted, field) in rows {
        let Err(status) = answer else {
            wrong.push(format!("{what}: was accepted"));
            continue;
        };
        let details = status.get_error_details();
        let got = details
            .error_info()
            .map_or("none", |info| &info.reason)
            .to_owned();
        let named = match details.bad_request() {
            Some(bad) => bad
                .field_violations
                .iter()
                .map(|v| v.field.clone())
                .collect(),
            None => Vec::new(),
        };
        let field_named = field.is_empty() || named.iter().any(|f| f == field);
        if status.code() != code || got != wanted || !field_named {
            wrong.push(format!(
                "{what}: {:?} {got} {named:?} {}",
                status.code(),
                status.message()
            ));
        }
        let leaks = ["SELECT", "INSERT", "sqlx", "panicked"];
        assert!(
            !leaks.iter().any(|word| status.message().contains(word)),
            "{what}"
        );
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let after = world.database.count("SELECT count(*) FROM ledger").await;
    assert_eq!(before, after, "nothing was written");
}

async fn rows(
    world: &World,
    held: &str,
    done: &str,
    done_commit: &CommitRequest,
    read_key: &str,
) -> Vec<Row> {
    let Client {
        mut authority,
        mut provisioning,
        mut ledger,
        approvals: _,
        mut events,
    } = world.operator.clone();
    let invalid = Code::InvalidArgument;
    let mut rows: Vec<Row> = Vec::new();
    macro_rules! row {
        ($what:literal, $call:expr, $code:expr, $reason:literal, $field:literal) => {
            rows.push(($what, $call.await.map(|_| ()), $code, $reason, $field));
        };
    }
    macro_rules! bad_reserve {
        ($what:literal, $field:literal, |$request:ident| $change:expr) => {{
            let mut $request = reserve(1);
            $change;
            row!(
                $what,
                authority.reserve($request),
                invalid,
                "INVALID_REQUEST",
                $field
            );
        }};
    }
    fn who(request: &mut ReserveRequest) -> &mut Subject {
        request.subject.as_mut().expect("a subject")
    }
    fn what(request: &mut ReserveRequest) -> &mut Action {
        request.action.as_mut().expect("an action")
    }
    bad_reserve!("no key", "idempotency_key", |r| r.idempotency_key.clear());
    bad_reserve!("long key", "idempotency_key", |r| r.idempotency_key =
        "x".repeat(257));
    bad_reserve!("control characters", "idempotency_key", |r| r
        .idempotency_key =
        "a\nb".into());
    bad_reserve!("no subject", "subject", |r| r.subject = None);
    bad_reserve!("no tenant", "subject.tenant", |r| who(&mut r)
        .tenant
        .clear());
    bad_reserve!("tenant with a space", "subject.tenant", |r| who(&mut r)
        .tenant =
        "a b".into());
    bad_reserve!("reserved tenant", "subject.tenant", |r| who(&mut r)
        .tenant =
        "_remit".into());
    bad_reserve!("long workspace", "subject.workspace", |r| who(&mut r)
        .workspace =
        "x".repeat(129));
    bad_reserve!("app with a slash", "subject.app", |r| who(&mut r).app =
        "a/b".into());
    bad_reserve!("workflow with a colon", "subject.workflow", |r| who(
        &mut r
    )
    .workflow =
        "a:b".into());
    bad_reserve!("agent beyond ASCII", "subject.agent", |r| who(&mut r)
        .agent =
        "агент".into());
    bad_reserve!("toolset wildcard", "subject.toolset", |r| who(&mut r)
        .toolset =
        "*".into());
    bad_reserve!("dimension named like a level", "subject.dimensions", |r| {
        who(&mut r).dimensions = [("agent".to_owned(), "x".to_owned())].into();
    });
    bad_reserve!("dimension in upper case", "subject.dimensions", |r| {
        who(&mut r).dimensions = [("Run".to_owned(), "x".to_owned())].into();
    });
    bad_reserve!("empty dimension", "subject.dimensions[run]", |r| {
        who(&mut r).dimensions = [("run".to_owned(), String::new())].into();
    });
    bad_reserve!("17 dimensions", "subject.dimensions", |r| {
        who(&mut r).dimensions = (0..65).map(|n| (format!("d{n}"), "x".to_owned())).collect();
    });
    bad_reserve!("no action", "action", |r| r.action = None);
    bad_reserve!("no action name", "action.name", |r| what(&mut r)
        .name
        .clear());
    bad_reserve!("long action name", "action.name", |r| what(&mut r).name =
        "x".repeat(257));
    bad_reserve!("action kind with a wildcard", "action.kind", |r| {
        what(&mut r).kind = "tool.*".into();
    });
    bad_reserve!("action name of two lines", "action.name", |r| {
        what(&mut r).name = "a\nb".into();
    });
    bad_reserve!("metadata of 20 KiB", "metadata", |r| {
        r.metadata = (0..5).map(|n| (n.to_string(), "x".repeat(4_000))).collect();
    });
    bad_reserve!("long arguments", "action.arguments", |r| {
        let json = format!("{{\"a\":\"{}\"}}", "x".repeat(70_000));
        what(&mut r).arguments = serde_json::from_str(&json).ok();
    });
    bad_reserve!("deep arguments", "action.arguments", |r| {
        let json = format!("{{\"a\":{}{}}}", "[".repeat(40), "]".repeat(40));
        what(&mut r).arguments = serde_json::from_str(&json).ok();
    });
    bad_reserve!("negative amount", "estimates[0].value", |r| r.estimates
        [0]
    .value = -1);
    bad_reserve!("smallest amount", "estimates[0].value", |r| r.estimates
        [0]
    .value =
        i64::MIN);
    bad_reserve!("no unit", "estimates[0].unit", |r| r.estimates[0].unit = 0);
    bad_reserve!("unknown unit", "estimates[0].unit", |r| r.estimates[0]
        .unit = 99);
    bad_reserve!("estimated calls", "estimates[0].unit", |r| r.estimates[0]
        .unit =
        Unit::Calls.into());
    bad_reserve!("a unit twice", "estimates[1].unit", |r| r
        .estimates
        .extend(points(2)));
    bad_reserve!("ttl of zero", "ttl", |r| r.ttl = seconds(0));
    bad_reserve!("ttl beyond a day", "ttl", |r| r.ttl = seconds(86_401));
    bad_reserve!("negative ttl", "ttl", |r| r.ttl = seconds(-1));
    bad_reserve!("ttl with too many nanos", "ttl", |r| {
        r.ttl = Some(pbjson_types::Duration {
            seconds: 5,
            nanos: 2_000_000_000,
        });
    });
    bad_reserve!("grace beyond a minute", "grace", |r| r.grace = seconds(61));
    bad_reserve!("unknown overage policy", "overage_policy", |r| r
        .overage_policy =
        9);
    bad_reserve!("long environment", "context.environment", |r| {
        r.context = Some(Context {
            environment: "x".repeat(129),
            ..Context::default()
        });
    });
    bad_reserve!("long reason", "context.reason", |r| {
        r.context = Some(Context {
            reason: "x".repeat(4_097),
            ..Context::default()
        });
    });
    bad_reserve!("65 metadata", "metadata", |r| {
        r.metadata = (0..65).map(|n| (n.to_string(), String::new())).collect();
    });
    bad_reserve!("long metadata", "metadata[k]", |r| {
        r.metadata = [("k".to_owned(), "x".repeat(4_097))].into();
    });

    let mut request = reserve(1);
    request.estimates[0].unit = Unit::Tokens.into();
    row!(
        "unit without a budget",
        authority.reserve(request),
        invalid,
        "UNIT_MISMATCH",
        "estimates"
    );
    let mut request = reserve(1);
    who(&mut request).tenant = "nobody".into();
    row!(
        "unknown tenant",
        authority.reserve(request),
        Code::NotFound,
        "TENANT_NOT_FOUND",
        ""
    );
    let missing = "00000000-0000-8000-8000-000000000000";
    row!(
        "unknown reservation",
        authority.commit(commit(missing, Vec::new())),
        Code::NotFound,
        "RESERVATION_NOT_FOUND",
        ""
    );
    row!(
        "malformed reservation",
        authority.commit(commit("xyz", Vec::new())),
        invalid,
        "INVALID_REQUEST",
        "reservation_id"
    );
    row!(
        "no reservation",
        authority.release(release("")),
        invalid,
        "INVALID_REQUEST",
        "reservation_id"
    );
    let mut request = commit(held, points(-1));
    row!(
        "negative use",
        authority.commit(request.clone()),
        invalid,
        "INVALID_REQUEST",
        "actual[0].value"
    );
    request.actual = vec![Amount {
        unit: Unit::Credits.into(),
        value: 1,
    }];
    row!(
        "unit that was not reserved",
        authority.commit(request.clone()),
        invalid,
        "UNIT_MISMATCH",
        "actual"
    );
    request.actual.clear();
    request.metrics = Some(Metrics {
        tokens_input: Some(-1),
        ..Metrics::default()
    });
    row!(
        "negative metric",
        authority.commit(request),
        invalid,
        "INVALID_REQUEST",
        "metrics.tokens_input"
    );
    let mut request = commit(held, Vec::new());
    request.tenant.clear();
    row!(
        "an operator names no tenant",
        authority.commit(request),
        invalid,
        "INVALID_REQUEST",
        "tenant"
    );
    let finalized = Code::FailedPrecondition;
    row!(
        "commit of a commit",
        authority.commit(commit(done, Vec::new())),
        finalized,
        "RESERVATION_FINALIZED",
        ""
    );
    row!(
        "release of a commit",
        authority.release(release(done)),
        finalized,
        "RESERVATION_FINALIZED",
        ""
    );
    let mut request = done_commit.clone();
    request.actual = points(1);
    row!(
        "same key, other use",
        authority.commit(request),
        Code::AlreadyExists,
        "IDEMPOTENCY_MISMATCH",
        ""
    );
    let mut request = done_commit.clone();
    request.reservation_id = held.into();
    row!(
        "same key, other reservation",
        authority.commit(request),
        Code::AlreadyExists,
        "IDEMPOTENCY_MISMATCH",
        ""
    );
    let mut request = release(held);
    request.reason = "x".repeat(257);
    row!(
        "long release reason",
        authority.release(request),
        invalid,
        "INVALID_REQUEST",
        "reason"
    );
    let extend = |extend_by, additional| ExtendRequest {
        idempotency_key: unique("extend"),
        reservation_id: held.into(),
        extend_by,
        additional,
        tenant: "acme".into(),
    };
    row!(
        "extend by nothing",
        authority.extend(extend(None, Vec::new())),
        invalid,
        "INVALID_REQUEST",
        "extend_by"
    );
    row!(
        "extend by too much",
        authority.extend(extend(seconds(86_401), Vec::new())),
        invalid,
        "INVALID_REQUEST",
        "extend_by"
    );
    row!(
        "extend to too late",
        authority.extend(extend(seconds(86_400), Vec::new())),
        invalid,
        "LEASE_TOO_LONG",
        "extend_by"
    );
    let record = |id: &str| RecordRequest {
        idempotency_key: unique("record"),
        reservation_id: id.into(),
        tenant: "acme".into(),
        ..RecordRequest::default()
    };
    row!(
        "record of an active one",
        authority.record(record(held)),
        finalized,
        "RESERVATION_NOT_EXPIRED",
        ""
    );
    row!(
        "record of nothing",
        authority.record(record("")),
        invalid,
        "INVALID_REQUEST",
        "subject"
    );
    let mut request = record(held);
    request.subject = Some(subject("acme"));
    row!(
        "record with both",
        authority.record(request),
        invalid,
        "INVALID_REQUEST",
        "subject"
    );
    let decide = DecideRequest {
        record: true,
        ..DecideRequest::default()
    };
    row!(
        "recorded decide without a key",
        authority.decide(decide),
        invalid,
        "INVALID_REQUEST",
        "idempotency_key"
    );

    let list = |page_size, page_token: &str| ListBalancesRequest {
        tenant: "acme".into(),
        page_size,
        page_token: page_token.into(),
        ..ListBalancesRequest::default()
    };
    row!(
        "negative page",
        authority.list_balances(list(-1, "")),
        invalid,
        "INVALID_REQUEST",
        "page_size"
    );
    row!(
        "malformed page token",
        authority.list_balances(list(0, "abc")),
        invalid,
        "INVALID_REQUEST",
        "page_token"
    );
    let list = ListReservationsRequest {
        tenant: "acme".into(),
        state: 77,
        ..ListReservationsRequest::default()
    };
    row!(
        "unknown state",
        authority.list_reservations(list),
        invalid,
        "INVALID_REQUEST",
        "state"
    );
    let list = ListReservationsRequest {
        tenant: "acme".into(),
        scope: "agent".into(),
        ..ListReservationsRequest::default()
    };
    row!(
        "malformed scope filter",
        authority.list_reservations(list),
        invalid,
        "INVALID_REQUEST",
        "scope"
    );

    macro_rules! bad_budget {
        ($what:literal, $field:literal, |$budget:ident| $change:expr) => {{
            let mut $budget = budget("tenant:acme/agent:x", Unit::Tokens, 1);
            $change;
            let document = ProvisionRequest {
                idempotency_key: unique("document"),
                budgets: vec![$budget],
                ..ProvisionRequest::default()
            };
            row!(
                $what,
                provisioning.provision(document),
                invalid,
                "INVALID_REQUEST",
                $field
            );
        }};
    }
    bad_budget!("no scope", "budgets[0].scope", |b| b.scope.clear());
    bad_budget!("scope without a tenant", "budgets[0].scope", |b| b.scope =
        "agent:x".into());
    bad_budget!("wildcard in the middle", "budgets[0].scope", |b| b.scope =
        "tenant:acme/agent:*/toolset:x".into());
    bad_budget!("level twice", "budgets[0].scope", |b| b.scope =
        "tenant:acme/agent:a/agent:b".into());
    bad_budget!("negative allocation", "budgets[0].allocation", |b| b
        .limit =
        Some(remit::proto::budget::Limit::Allocation(-1)));
    bad_budget!("no allocation", "budgets[0].allocation", |b| b.limit = None);
    bad_budget!("unlimited: false", "budgets[0].unlimited", |b| b.limit =
        Some(remit::proto::budget::Limit::Unlimited(false)));
    bad_budget!("unknown zone", "budgets[0].time_zone", |b| {
        b.period = Period::Daily.into();
        b.time_zone = "Mars/Olympus".into();
    });
    bad_budget!("zone without a period", "budgets[0].time_zone", |b| b
        .time_zone =
        "Europe/Berlin".into());
    bad_budget!(
        "carry-over without a period",
        "budgets[0].carry_over",
        |b| b.carry_over = CarryOver::Forward.into()
    );
    bad_budget!("unknown period", "budgets[0].period", |b| b.period = 42);
    bad_budget!("negative overdraft", "budgets[0].overdraft_limit", |b| b
        .overdraft_limit =
        -1);
    let twice = ProvisionRequest {
        idempotency_key: unique("document"),
        budgets: vec![
            budget("tenant:acme", Unit::Tokens, 1),
            budget("tenant:acme", Unit::Tokens, 2),
        ],
        ..ProvisionRequest::default()
    };
    row!(
        "a budget twice",
        provisioning.provision(twice),
        invalid,
        "INVALID_REQUEST",
        "budgets[1].scope"
    );
    let stranger = ProvisionRequest {
        idempotency_key: unique("document"),
        budgets: vec![budget("tenant:nobody", Unit::Tokens, 1)],
        ..ProvisionRequest::default()
    };
    row!(
        "a budget of no tenant",
        provisioning.provision(stranger),
        Code::NotFound,
        "TENANT_NOT_FOUND",
        ""
    );
    let fund = |scope: &str, operation, amount| FundBudgetRequest {
        idempotency_key: unique("fund"),
        scope: scope.into(),
        unit: Unit::RiskPoints.into(),
        operation,
        amount,
        ..FundBudgetRequest::default()
    };
    row!(
        "fund nothing",
        provisioning.fund_budget(fund("tenant:acme", 0, 1)),
        invalid,
        "INVALID_REQUEST",
        "operation"
    );
    row!(
        "fund a wildcard",
        provisioning.fund_budget(fund("tenant:acme/run:*", 1, 1)),
        invalid,
        "INVALID_REQUEST",
        "scope"
    );
    row!(
        "fund less than nothing",
        provisioning.fund_budget(fund("tenant:acme", 1, -5)),
        invalid,
        "INVALID_REQUEST",
        "amount"
    );
    let with_allocated = FundBudgetRequest {
        allocated: Some(1),
        ..fund("tenant:acme", 1, 1)
    };
    row!(
        "allocate beside a credit",
        provisioning.fund_budget(with_allocated),
        invalid,
        "INVALID_REQUEST",
        "allocated"
    );
    let less_than_nothing = FundBudgetRequest {
        allocated: Some(-1),
        ..fund("tenant:acme", 4, 1)
    };
    row!(
        "allocate less than nothing",
        provisioning.fund_budget(less_than_nothing),
        invalid,
        "INVALID_REQUEST",
        "allocated"
    );
    let with_surplus = FundBudgetRequest {
        credit_surplus: true,
        ..fund("tenant:acme", 2, 1)
    };
    row!(
        "credit the surplus of a debit",
        provisioning.fund_budget(with_surplus),
        invalid,
        "INVALID_REQUEST",
        "credit_surplus"
    );
    row!(
        "fund what is not there",
        provisioning.fund_budget(fund("tenant:acme/agent:y", 1, 5)),
        Code::NotFound,
        "BUDGET_NOT_FOUND",
        ""
    );
    let key = |key: ApiKey| CreateApiKeyRequest {
        idempotency_key: unique("key"),
        api_key: Some(key),
    };
    let tenant = "acme".to_owned();
    row!(
        "a key for nothing",
        provisioning.create_api_key(key(ApiKey {
            tenant: tenant.clone(),
            ..ApiKey::default()
        })),
        invalid,
        "INVALID_REQUEST",
        "api_key.permissions"
    );
    let confined = ApiKey {
        tenant,
        permissions: vec![Permission::Audit.into()],
        subject_prefix: "agent:x".into(),
        ..ApiKey::default()
    };
    row!(
        "a confined auditor",
        provisioning.create_api_key(key(confined)),
        invalid,
        "INVALID_REQUEST",
        "api_key.permissions"
    );
    row!(
        "revoke what is not there",
        provisioning.revoke_api_key(RevokeApiKeyRequest {
            key_id: "ffff".into()
        }),
        Code::NotFound,
        "API_KEY_NOT_FOUND",
        ""
    );
    row!(
        "entry zero",
        ledger.get_entry(GetEntryRequest {
            tenant: "acme".into(),
            sequence: 0
        }),
        invalid,
        "INVALID_REQUEST",
        "sequence"
    );
    row!(
        "entry beyond the end",
        ledger.get_entry(GetEntryRequest {
            tenant: "acme".into(),
            sequence: 9_999
        }),
        Code::NotFound,
        "ENTRY_NOT_FOUND",
        ""
    );

    macro_rules! bad_subscription {
        ($what:literal, $field:literal, |$subscription:ident| $change:expr) => {{
            let mut $subscription = Subscription {
                subscription_id: "s".into(),
                tenant: "acme".into(),
                url: "https://hooks.example/".into(),
                event_types: vec![EventType::ActionDenied.into()],
                ..Subscription::default()
            };
            $change;
            let request = CreateSubscriptionRequest {
                subscription: Some($subscription),
            };
            let call = events.create_subscription(request);
            row!($what, call, invalid, "INVALID_REQUEST", $field);
        }};
    }
    for url in [
        "http://hooks.example/",
        "https://user:x@hooks.example/",
        "https://127.0.0.1/",
        "https://0x7f.1/",
        "https://2130706433/",
        "https://[::1]:8443/",
        "https://[::ffff:10.0.0.1]/",
        "https://169.254.169.254/latest/meta-data",
    ] {
        bad_subscription!("a webhook that goes inside", "subscription.url", |s| s
            .url =
            url.into());
    }
    bad_subscription!("a webhook of nothing", "subscription.event_types", |s| s
        .event_types
        .clear());
    bad_subscription!(
        "a webhook of what is unknown",
        "subscription.event_types[0]",
        |s| s.event_types = vec![99]
    );
    bad_subscription!(
        "a webhook without a name",
        "subscription.subscription_id",
        |s| s.subscription_id.clear()
    );
    row!(
        "an empty subscription",
        events.create_subscription(CreateSubscriptionRequest::default()),
        invalid,
        "INVALID_REQUEST",
        "subscription"
    );
    row!(
        "redelivery from below zero",
        events.redeliver_events(RedeliverEventsRequest {
            subscription_id: "s".into(),
            tenant: "acme".into(),
            from_sequence: -1,
        }),
        invalid,
        "INVALID_REQUEST",
        "from_sequence"
    );
    row!(
        "redelivery to nobody",
        events.redeliver_events(RedeliverEventsRequest {
            subscription_id: "s".into(),
            tenant: "acme".into(),
            from_sequence: 0,
        }),
        Code::NotFound,
        "SUBSCRIPTION_NOT_FOUND",
        ""
    );
    row!(
        "the end of no subscription",
        events.delete_subscription(DeleteSubscriptionRequest {
            subscription_id: "s".into(),
            tenant: "acme".into(),
        }),
        Code::NotFound,
        "SUBSCRIPTION_NOT_FOUND",
        ""
    );

    let mut nobody = world.server.client("").authority;
    row!(
        "no API key",
        nobody.reserve(reserve(1)),
        Code::Unauthenticated,
        "API_KEY_MISSING",
        ""
    );
    let mut stranger = world
        .server
        .client(&format!("rmt_abc_{}", "0".repeat(64)))
        .authority;
    row!(
        "unknown API key",
        stranger.reserve(reserve(1)),
        Code::Unauthenticated,
        "API_KEY_INVALID",
        ""
    );
    let mut garbled = world.server.client("hello").authority;
    row!(
        "malformed API key",
        garbled.reserve(reserve(1)),
        Code::Unauthenticated,
        "API_KEY_INVALID",
        ""
    );
    let mut reader = world.server.client(read_key).authority;
    row!(
        "key without the permission",
        reader.reserve(reserve(1)),
        Code::PermissionDenied,
        "PERMISSION_MISSING",
        ""
    );
    rows
}
