//! What the pure core costs: no I/O, one thread.
//!
//! `cargo bench --bench core`

use std::collections::BTreeMap;
use std::sync::Arc;

use divan::{Bencher, black_box};
use remit::domain::amount::{Amount, Amounts, Unit};
use remit::domain::budget::{Budget, BudgetState, CarryOver, Limit, OnExceeded, Terms};
use remit::domain::caps::Caps;
use remit::domain::catalogue::Pattern;
use remit::domain::id::{
    BalanceNo, BudgetNo, IdempotencyKey, KeyHash, Method, Name, ReservationId, Sequence, TenantId,
};
use remit::domain::ledger::Tip;
use remit::domain::period::Calendar;
use remit::domain::policy::{Effect, Match, Mode, Policy, PolicyDocument, Rule};
use remit::domain::request::{
    Action, Arguments, Ask, Command, Commit, Context, Decide, Metadata, Metrics, Origin, Reserve,
};
use remit::domain::scope::{Levels, Scope, Subject};
use remit::domain::state::{Applied, Loaded, Needs, TenantState};
use remit::domain::tenant::{Rules, Settings, Tenant, TenantConfig};
use remit::domain::time::Timestamp;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    divan::main();
}

const SCOPES: [&str; 6] = [
    "tenant:acme",
    "tenant:acme/workspace:prod",
    "tenant:acme/workspace:prod/app:support",
    "tenant:acme/workspace:prod/app:support/workflow:refunds",
    "tenant:acme/workspace:prod/app:support/workflow:refunds/agent:resolver",
    "tenant:acme/workspace:prod/app:support/workflow:refunds/agent:resolver/toolset:payments",
];

fn now() -> Timestamp {
    Timestamp::from_micros(1_800_000_000_000_000)
}

fn name(text: &str) -> Name {
    Name::parse(text).expect("a name")
}

fn amount(value: i64) -> Amounts {
    Amounts::NONE.with(Unit::RiskPoints, Amount::new(value).expect("an amount"))
}

fn ask() -> Ask {
    let levels = Levels {
        workspace: Some(name("prod")),
        app: Some(name("support")),
        workflow: Some(name("refunds")),
        agent: Some(name("resolver")),
        toolset: Some(name("payments")),
    };
    let tenant = TenantId::parse("acme").expect("a tenant");
    Ask {
        subject: Arc::new(Subject::new(tenant, levels, BTreeMap::new()).expect("a subject")),
        action: Arc::new(Action {
            name: "refund_customer".into(),
            kind: Some("tool.payment".into()),
            arguments_sha256: None,
        }),
        estimates: amount(3),
        context: Context::default(),
        arguments: None,
        explain: false,
    }
}

fn origin() -> Origin {
    Origin {
        key: None,
        confinement: None,
        request_id: "01a1fcb5-0dbe-737d-9170-705277deae09".into(),
        trace_id: "cb9cdf6bd65ce1678312d1e12b4985ab".into(),
    }
}

/// A tenant with so many budgets in a chain, each with room and its balance open, beside
/// 1,000 budgets of others.
fn state(depth: usize) -> TenantState {
    let budget = |no: usize, scope: &str| Budget {
        no: BudgetNo(i32::try_from(no).expect("a small number")),
        scope: Scope::parse(scope).expect("a scope"),
        unit: Unit::RiskPoints,
        calendar: Calendar::total(),
        terms: Terms {
            limit: Limit::Allocation(Amount::new(1_000_000_000_000).expect("an amount")),
            overdraft_limit: Amount::ZERO,
            carry_over: CarryOver::None,
            state: BudgetState::Active,
        },
        thresholds: Arc::default(),
        on_exceeded: OnExceeded::Deny,
        present: true,
        limit_seq: Sequence(1),
        created_at: now(),
    };
    let mut budgets: Vec<Budget> = (0..depth).map(|at| budget(at + 1, SCOPES[at])).collect();
    for other in 0..1_000 {
        budgets.push(budget(
            100 + other,
            &format!("tenant:acme/workspace:prod/agent:other{other}"),
        ));
    }
    let tenant = Tenant {
        id: TenantId::parse("acme").expect("a tenant"),
        settings: Settings {
            unprovisioned_rule: remit::domain::tenant::UnprovisionedRule::RequireAnyBudget,
            ..Settings::default()
        },
        created_at: now(),
    };
    let config = Arc::new(TenantConfig::new(tenant, budgets));
    let mut state = TenantState::new(config, Tip::EMPTY, BalanceNo(1));
    apply(&mut state, &reserve(0));
    apply(&mut state, &commit(0));
    state.take_changes();
    state
}

fn key(what: &str, number: u64) -> IdempotencyKey {
    IdempotencyKey::parse(&format!("{what}-{number}")).expect("a key")
}

fn reserve(number: u64) -> Command {
    Command::Reserve(Box::new(Reserve {
        ask: ask(),
        key: Some(key("reserve", number)),
        ttl: None,
        grace: None,
        overage_policy: None,
        metadata: Metadata::default(),
    }))
}

fn commit(number: u64) -> Command {
    let tenant = TenantId::parse("acme").expect("a tenant");
    let reserve = KeyHash::of(&tenant, Method::Reserve, &key("reserve", number));
    Command::Commit(Box::new(Commit {
        key: key("commit", number),
        reservation: ReservationId::of(reserve),
        actual: amount(2),
        metrics: Metrics::default(),
        metadata: Metadata::default(),
    }))
}

/// What a lane does with one command, reading left out.
fn apply(state: &mut TenantState, command: &Command) {
    let mut needs = Needs::default();
    state.needs(command, false, &mut needs);
    if !needs.is_empty() {
        state.load(&needs, Loaded::default());
    }
    match state.apply(command, &origin(), now()) {
        Applied::Done(answer) => drop(black_box(answer.expect("an answer"))),
        Applied::KeyNeeded => panic!("everything is allowed here"),
    }
}

/// Decides upon a chain of budgets, without a record.
#[divan::bench(args = [1, 3, 6])]
fn decide(bencher: Bencher, depth: usize) {
    let mut state = state(depth);
    let origin = origin();
    let command = Command::Decide(Box::new(Decide {
        ask: ask(),
        record: None,
    }));
    bencher.bench_local(|| state.apply(black_box(&command), &origin, now()));
}

/// A reservation and its settlement, with two entries hashed, and what is to be written
/// taken out.
#[divan::bench(args = [1, 3, 6])]
fn reserve_and_commit(bencher: Bencher, depth: usize) {
    let mut state = state(depth);
    let mut number = 0;
    bencher
        .with_inputs(|| {
            number += 1;
            (reserve(number), commit(number))
        })
        .bench_local_values(|(reserve, commit)| {
            apply(&mut state, &reserve);
            apply(&mut state, &commit);
            let changes = state.take_changes();
            let settled: Vec<_> = changes.reservations.iter().map(|r| r.id).collect();
            state.trim(&settled, 16_384);
            changes
        });
}

/// Rules on a refund: 10 about other tools, 5 that do not hold, 5 that do.
fn rules() -> Arc<Policy> {
    let rule = |id: String, when: String, effect, tools: &str| {
        Arc::new(Rule {
            id: id.into(),
            description: "".into(),
            matches: Match {
                tools: vec![Pattern::parse(tools).expect("a pattern")],
                ..Match::default()
            },
            when: when.into(),
            effect,
            mode: Mode::Enforce,
            reason: "".into(),
            caps: Caps::default(),
            approvers: Vec::new(),
            approval_timeout: None,
            freeze: false,
        })
    };
    let holding = [
        "args.amount > 1000 && args.customer.startsWith('c-')",
        "action.tier >= 3 && action.level == 'EXECUTE'",
        "remaining.RISK_POINTS > 10 && utilization.RISK_POINTS < 9000",
        "subject.agent != '' && amounts.RISK_POINTS > 0",
        "environment != 'production'",
    ];
    let mut rules = Vec::new();
    for (at, holds) in holding.into_iter().enumerate() {
        let not = format!("args.amount > 5000 || args.customer == 'c-{at}'");
        rules.push(rule(
            format!("yes{at}"),
            holds.into(),
            Effect::Allow,
            "refund_*",
        ));
        rules.push(rule(format!("no{at}"), not, Effect::Deny, "refund_*"));
        for other in ["mail_*", "deploy_*"] {
            let when = format!("args.amount > {at}");
            let id = format!("{}{at}", &other[..4]);
            rules.push(rule(id, when, Effect::Deny, other));
        }
    }
    let document = Arc::new(PolicyDocument { rules });
    Arc::new(Policy::compile(document, 1, false).expect("a policy"))
}

fn ruled(depth: usize, policy: Arc<Policy>) -> TenantState {
    let plain = state(depth);
    let budgets: Vec<Budget> = plain.config.budgets().map(|b| (**b).clone()).collect();
    let rules = Rules {
        policies: vec![policy],
        ..Rules::default()
    };
    let config = TenantConfig::new(plain.config.tenant.clone(), budgets).with_rules(rules);
    let mut state = TenantState::new(Arc::new(config), Tip::EMPTY, BalanceNo(1));
    apply(
        &mut state,
        &decide_with(serde_json::json!({"amount": 1_250, "customer": "c-20417"})),
    );
    state
}

fn decide_with(arguments: serde_json::Value) -> Command {
    let mut ask = ask();
    ask.arguments = Some(Arc::new(Arguments::of(arguments)));
    Command::Decide(Box::new(Decide { ask, record: None }))
}

/// The same as `decide`, under 20 rules of which 5 match.
#[divan::bench(args = [1, 3, 6])]
fn decide_under_rules(bencher: Bencher, depth: usize) {
    let mut state = ruled(depth, rules());
    let origin = origin();
    let command = decide_with(serde_json::json!({"amount": 1_250, "customer": "c-20417"}));
    bencher.bench_local(|| state.apply(black_box(&command), &origin, now()));
}

/// The most that a policy and arguments can make a decision cost: 100 rules with loops
/// within loops, on a list as long as the bound lets pass.
#[divan::bench]
fn decide_at_the_bound(bencher: Bencher) {
    let rule = |at: usize| {
        let when = format!("args.a.exists(x, args.a.exists(y, x * 3 == y - 1 && x == {at}.5))");
        Arc::new(Rule {
            id: format!("r{at}").into(),
            description: "".into(),
            matches: Match::default(),
            when: when.into(),
            effect: Effect::Deny,
            mode: Mode::Enforce,
            reason: "".into(),
            caps: Caps::default(),
            approvers: Vec::new(),
            approval_timeout: None,
            freeze: false,
        })
    };
    let document = Arc::new(PolicyDocument {
        rules: (0..100).map(rule).collect(),
    });
    let policy = Policy::compile(document, 1, false).expect("a policy");
    let mut state = ruled(1, Arc::new(policy));
    let origin = origin();
    let command = decide_with(serde_json::json!({"a": (0..45).collect::<Vec<_>>()}));
    bencher.bench_local(|| state.apply(black_box(&command), &origin, now()));
}

/// Checking and compiling a document of 20 rules.
#[divan::bench]
fn compile_rules(bencher: Bencher) {
    let document = rules().document.clone();
    bencher.bench_local(|| Policy::compile(black_box(document.clone()), 1, false));
}

/// The hash of an entry of 1,150 bytes and the one before.
#[divan::bench]
fn chain_hash(bencher: Bencher) {
    let body = "x".repeat(1_150);
    let before = remit::domain::ledger::ChainHash::GENESIS;
    bencher.bench_local(|| before.next(black_box(&body)));
}
