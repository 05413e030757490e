//! Rules as examples: what is refused when it is provisioned, and what matches when it is
//! evaluated.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::json;

use super::condition::Condition;
use super::facts::{Asked, BudgetFacts, Facts};
use super::ruling::{Ruling, rule};
use super::*;
use crate::domain::activity::Counts;
use crate::domain::amount::{Amount, Amounts, Unit};
use crate::domain::catalogue::Resolved;
use crate::domain::id::{Name, TenantId};
use crate::domain::narrowing::BasisPoints;
use crate::domain::request::{Action, Arguments, Context};
use crate::domain::scope::{Levels, Subject};

fn deny(id: &str, when: &str) -> Rule {
    Rule {
        id: id.into(),
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
    }
}

fn compile(rules: Vec<Rule>) -> Result<Policy, Vec<Fault>> {
    let rules = rules.into_iter().map(Arc::new).collect();
    Policy::compile(Arc::new(PolicyDocument { rules }), 1, false)
}

fn faults(rules: Vec<Rule>) -> Vec<String> {
    let faults = compile(rules).expect_err("a mistake");
    let worded = faults
        .iter()
        .map(|fault| format!("{}.{} {fault}", fault.rule, fault.field));
    worded.collect()
}

fn mistake(when: &str) -> String {
    match Condition::compile(when) {
        Ok(_) => panic!("no mistake found in {when}"),
        Err((at, text)) => format!("{at:?} {text}"),
    }
}

/// Evaluates rules on an e-mail that costs 20 of 100 points, 60 of which are used.
fn ruled(rules: Vec<Rule>, arguments: serde_json::Value) -> Ruling {
    let policy = compile(rules).unwrap_or_else(|faults| panic!("{faults:?}"));
    let action = Action {
        name: "send_email".into(),
        kind: Some("tool.email".into()),
        arguments_sha256: None,
    };
    let resolved = Resolved {
        listed_as: None,
        level: ActionLevel::Execute,
        tier: Tier::new(3).expect("a tier"),
        kind: action.kind.clone(),
        toolset: None,
        costs: Amounts::NONE,
    };
    let levels = Levels {
        agent: Name::parse("Resolver").ok(),
        ..Levels::default()
    };
    let tenant = TenantId::parse("acme").expect("a tenant");
    let customer = (Box::from("customer"), Name::parse("c-1").expect("a name"));
    let subject = Subject::new(tenant, levels, BTreeMap::from([customer])).expect("a subject");
    let context = Context {
        environment: "production".into(),
        actor: "jo".into(),
        reason: "".into(),
    };
    let arguments = Arguments::of(arguments);
    let facts = Facts {
        action: &action,
        resolved: Some(&resolved),
        subject: &subject,
        context: &context,
        amounts: Amounts::NONE.with(Unit::RiskPoints, Amount::new(20).expect("an amount")),
        arguments: Asked::With(Some(&arguments)),
        budgets: vec![BudgetFacts {
            scope: "tenant:acme/run:1".into(),
            budget_scope: "tenant:acme/run:*".into(),
            unit: Unit::RiskPoints,
            period: "TOTAL",
            remaining: Some(40),
            used: BasisPoints::new(6_000).expect("a share"),
        }],
        recent: Counts {
            actions: 3,
            denials: 1,
        },
    };
    rule(&[Arc::new(policy)], &facts)
}

fn holds(when: &str, arguments: serde_json::Value) -> bool {
    let ruling = ruled(vec![deny("r", when)], arguments);
    let error = ruling
        .matched
        .first()
        .and_then(|matched| matched.error.clone());
    assert_eq!(error, None, "{when}");
    !ruling.denying.is_empty()
}

#[test]
fn every_variable_can_be_read() {
    for when in [
        "action.name == 'send_email' && action.kind == 'tool.email'",
        "action.level == 'EXECUTE' && action.tier >= 3 && action.toolset == ''",
        "args.to.endsWith('@acme.com') && args.amount > 99 && args.amount < 100.5",
        "subject.tenant == 'acme' && subject.agent == 'resolver' && subject.app == ''",
        "dimensions.customer == 'c-1' && 'customer' in dimensions",
        "actor == 'jo' && environment == 'production' && reason.size() == 0",
        "amounts.RISK_POINTS == 20 && amounts.TOKENS == 0",
        "remaining.RISK_POINTS == 40 && remaining.TOKENS > 1000000",
        "utilization.RISK_POINTS == 6000",
        "budgets.exists(b, b.unit == 'RISK_POINTS' && b.remaining < 50)",
        "recent.actions == 3 && recent.denials == 1",
        "args.tags.all(t, t in ['a', 'b']) && has(args.to) && !has(args.cc)",
        "args.tags.filter(t, t == 'a').size() == 1 && args.tags.map(t, size(t)) == [1, 1]",
        "args.to.matches('^[a-z]+@acme[.]com$')",
        "args.nothing == null && args['amount'] == 100 && args.tags[1] == 'b'",
    ] {
        let arguments =
            json!({"to": "jo@acme.com", "amount": 100, "tags": ["a", "b"], "nothing": null});
        assert!(holds(when, arguments), "{when}");
    }
}

#[test]
fn a_mistake_is_found_when_it_is_provisioned_and_says_where() {
    for (when, wanted) in [
        (
            "amount > 3",
            "Some((1, 1)) unknown variable `amount`: there are action, args",
        ),
        (
            "true &&\n  acton.tier > 1",
            "Some((2, 3)) unknown variable `acton`",
        ),
        (
            "action.teir > 1",
            "unknown field `teir`: there are name, kind, level, tier, toolset",
        ),
        (
            "action.tier > 'x'",
            "`>` wants two numbers or two strings, not int and string",
        ),
        (
            "action.name == 3",
            "`==` wants the same type on both sides, not string and int",
        ),
        ("action.tier", "must be true or false; this is a int"),
        ("action.name + 3 == 'x'", "`+` wants two ints"),
        (
            "environment.lower() == 'x'",
            "unknown function `lower` with 0 arguments",
        ),
        (
            "args.x.matches(args.y)",
            "matches wants its pattern in quotes",
        ),
        ("args.x.matches('(')", "the pattern `(` is refused"),
        ("args.x.matches('a{1000}{1000}')", "is refused"),
        ("action.tier >", "Some((1, "),
        (
            "args.l.exists(a, args.l.exists(b, args.l.exists(c, a == c)))",
            "loops may be nested 2 deep",
        ),
        ("args.l.exists(a, a + a == '')", "+ is not supported within"),
        (
            "remaining['TOKENS'] > 1",
            "wants a field's name after a dot",
        ),
    ] {
        let found = mistake(when);
        assert!(found.contains(wanted), "{when}: {found}");
    }
    assert!(mistake(&format!("args.x == '{}'", "x".repeat(1_024))).contains("at most 1024"));
}

#[test]
fn rules_that_can_have_no_effect_are_refused() {
    let shadow = |rule: Rule| Rule {
        mode: Mode::Shadow,
        ..rule
    };
    let approve = |rule: Rule| Rule {
        effect: Effect::RequireApproval,
        ..rule
    };
    let mails = |rule: Rule| Rule {
        matches: Match {
            tools: vec![Pattern::parse("send_*").expect("a glob")],
            ..Match::default()
        },
        ..rule
    };
    assert_eq!(
        faults(vec![deny("a", ""), deny("a", "action.tier > 3")]),
        [
            "1.id \"a\" names another rule already",
            "1.match can't be reached: rule \"a\" denies all that it matches"
        ]
    );
    assert_eq!(
        faults(vec![deny("a", "1 > 2")]),
        ["0.when is never true: the rule can't be reached"]
    );
    let all = mails(deny("all-mail", ""));
    let one = mails(approve(deny("big-mail", "args.n > 3")));
    assert_eq!(
        faults(vec![one.clone(), all.clone()]),
        ["0.match can't be reached: rule \"all-mail\" denies all that it matches"]
    );
    let other = approve(deny("b", "actor == 'x'"));
    assert_eq!(
        faults(vec![deny("a", "actor == 'x'"), other.clone()]),
        ["1.effect REQUIRE_APPROVAL contradicts rule \"a\", which says DENY of the same actions"]
    );
    // Trying out a stricter rule beside the one that counts is what SHADOW is for.
    assert!(compile(vec![deny("a", "actor == 'x'"), shadow(other)]).is_ok());
    assert!(compile(vec![one, shadow(all)]).is_ok());
}

#[test]
fn what_can_not_be_evaluated_counts_as_true_and_says_why() {
    let rules = || {
        let mut caps = deny("caps", "args.amount > 1");
        caps.effect = Effect::AllowWithCaps;
        caps.caps.max_tokens = Amount::new(5).ok();
        let mut escalate = deny("escalate", "args.amount > 1");
        escalate.effect = Effect::Escalate;
        vec![deny("deny", "args.amount > 100"), caps, escalate]
    };
    let ruling = ruled(rules(), json!({}));
    let error = ruling.matched[0].error.as_deref();
    assert_eq!(error, Some("there is no `amount`: ask has(...) first"));
    assert!(ruling.denying[0].failed);
    assert_eq!(ruling.caps.max_tokens, Amount::new(5).ok());
    assert_eq!(
        ruling.escalating.len(),
        0,
        "nobody is stopped over an error"
    );

    let ruling = ruled(rules(), json!({"amount": "many"}));
    assert!(ruling.denying[0].failed);
    let ruling = ruled(rules(), json!({"amount": 7}));
    assert_eq!((ruling.denying.len(), ruling.escalating.len()), (0, 1));
}

#[test]
fn a_rule_in_shadow_is_told_and_does_nothing() {
    let rule = Rule {
        mode: Mode::Shadow,
        ..deny("try", "")
    };
    let ruling = ruled(vec![rule], json!({}));
    assert_eq!(ruling.matched.len(), 1);
    assert_eq!(ruling.denying.len(), 0);
}

#[test]
fn arguments_that_would_cost_too_much_are_not_looked_at() {
    let loops = "args.a.exists(x, args.a.exists(y, x > y))";
    let small: Vec<i64> = (0..60).collect();
    assert!(holds(loops, json!({ "a": small })));
    let large: Vec<i64> = (0..400).collect();
    let ruling = ruled(vec![deny("r", loops)], json!({ "a": large }));
    assert!(ruling.denying[0].failed);
    let one = "args.a.exists(x, x == 399)";
    assert!(holds(one, json!({ "a": large })));
}

#[test]
fn deep_and_long_expressions_do_not_reach_the_stack() {
    let deep = [
        format!("{}true{}", "(".repeat(500), ")".repeat(500)),
        format!("{}true", "!".repeat(1_000)),
        format!("{}1 == 1", "-".repeat(1_000)),
        format!("1{} > 0", "+1".repeat(500)),
        format!("args{} == 1", ".a".repeat(500)),
        format!("args{} == 1", "[0]".repeat(330)),
        format!("true{}", "?true:true".repeat(100)),
        "[".repeat(1_000),
        "a.".repeat(500),
        "\u{0}\u{1F600}'\"".repeat(100),
    ];
    for text in deep {
        assert!(Condition::compile(&text).is_err(), "{text}");
    }
    let wide = format!("actor == 'a'{}", "||actor == 'b'".repeat(70));
    assert!(
        Condition::compile(&wide).is_ok(),
        "many alternatives are no depth"
    );
}
