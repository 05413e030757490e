//! `remit policy`: a policy's own cases, decided offline by the same core as a server's,
//! and what a policy would have decided of what a server has recorded.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use serde::Deserialize;
use tonic::Status;

use crate::api::convert::{answers, authority, budgets, provisioning};
use crate::client::{self, Bearer, failed, violations};
use crate::config::ClientConfig;
use crate::domain::activity::Activity;
use crate::domain::answer::Answer;
use crate::domain::id::{BalanceNo, Sequence, TenantId};
use crate::domain::ledger::{Decision, Tip, Versioned};
use crate::domain::policy::{Policy, PolicyDocument};
use crate::domain::provision::Plan;
use crate::domain::request::{Command, Fund, Origin};
use crate::domain::state::{Applied, Loaded, Needs, TenantState};
use crate::domain::tenant::{Rules, TenantConfig};
use crate::domain::time::Timestamp;
use crate::proto;
use crate::proto::ledger_client::LedgerClient;

/// A file of cases.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Cases {
    /// The document that they are decided under, beside this file.
    document: PathBuf,
    cases: Vec<Case>,
}

/// A request, what stands when it comes, and what is wanted of it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    request: proto::DecideRequest,
    /// What was spent before.
    #[serde(default)]
    used: Vec<Used>,
    /// What the agent did with the tool of late.
    #[serde(default)]
    recent: Recent,
    want: Want,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Used {
    scope: String,
    unit: proto::Unit,
    #[serde(default)]
    period: Option<proto::Period>,
    amount: i64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Recent {
    #[serde(default)]
    actions: u32,
    #[serde(default)]
    denials: u32,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Want {
    decision: proto::Decision,
    /// Codes of the reasons, in order; nothing for any.
    #[serde(default)]
    reasons: Option<Vec<String>>,
    /// Rules that match, in any order; nothing for any.
    #[serde(default)]
    rules: Option<Vec<String>>,
}

/// Reads a provisioning document.
pub(crate) fn read_document(file: &Path) -> anyhow::Result<proto::ProvisionRequest> {
    let text =
        std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    serde_saphyr::from_str(&text).map_err(|error| anyhow::anyhow!("{}: {error}", file.display()))
}

/// Every mistake of a message on a line of its own.
fn mistakes(status: &Status) -> anyhow::Error {
    match violations(status) {
        Some(violations) => anyhow::anyhow!("\n{violations}"),
        None => anyhow::anyhow!("{}", status.message()),
    }
}

/// Runs a file of cases. Fails when one is decided otherwise than wanted.
pub(crate) fn test(file: &Path) -> anyhow::Result<ExitCode> {
    let text =
        std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    let cases: Cases = serde_saphyr::from_str(&text)
        .map_err(|error| anyhow::anyhow!("{}: {error}", file.display()))?;
    let document = file.parent().unwrap_or(Path::new("")).join(&cases.document);
    let configs = configs(read_document(&document)?)
        .with_context(|| format!("{} has mistakes", document.display()))?;
    let mut wrong = 0;
    for case in &cases.cases {
        let answer = decide(case, &configs).with_context(|| format!("case {:?}", case.name))?;
        let differences = differences(&case.want, &answer);
        if differences.is_empty() {
            println!("ok    {}", case.name);
            continue;
        }
        wrong += 1;
        println!("WRONG {}", case.name);
        for difference in differences {
            println!("      {difference}");
        }
        for reason in answer.verdict.reasons() {
            println!("      {}: {reason}", reason.code);
        }
    }
    println!(
        "{} cases, {wrong} decided otherwise than wanted",
        cases.cases.len()
    );
    Ok(if wrong == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn now() -> Timestamp {
    Timestamp::from_micros(jiff::Timestamp::now().as_microsecond())
}

/// Tenants as a document makes them out of nothing.
fn configs(
    mut message: proto::ProvisionRequest,
) -> anyhow::Result<BTreeMap<TenantId, Arc<TenantConfig>>> {
    message.validate_only = true;
    let asked = provisioning::provision(message).map_err(|status| mistakes(&status))?;
    let mut plan = Plan::new(&asked.document, &BTreeMap::new(), true, now(), |_| {
        Sequence(1)
    })?;
    let compile = |of: Option<Versioned<PolicyDocument>>, all_tenants| {
        let of = of?;
        // It was checked with the message.
        Policy::compile(of.document, of.version, all_tenants)
            .ok()
            .map(Arc::new)
    };
    let system = plan.tenants.remove(&TenantId::system());
    let for_all = compile(system.and_then(|system| system.policy), true);
    let mut configs = BTreeMap::new();
    for (id, own) in plan.tenants {
        let Some(tenant) = own.tenant else {
            continue;
        };
        let own_policy = compile(own.policy, false);
        let rules = Rules {
            tools: own.tools.unwrap_or_default(),
            policies: for_all.iter().cloned().chain(own_policy).collect(),
            freezes: own.freezes.unwrap_or_default(),
        };
        let config = TenantConfig::new(tenant, own.budgets).with_rules(rules);
        configs.insert(id, Arc::new(config));
    }
    Ok(configs)
}

fn decide(case: &Case, configs: &BTreeMap<TenantId, Arc<TenantConfig>>) -> anyhow::Result<Answer> {
    let mut message = case.request.clone();
    message.explain = true;
    // The only tenant of a document need not be named.
    let only = configs.keys().next().filter(|_| configs.len() == 1);
    let request = authority::decide(message, only).map_err(|status| mistakes(&status))?;
    let tenant = &request.ask.subject.tenant;
    let config = configs.get(tenant);
    let config = config.with_context(|| format!("the document has no tenant {tenant}"))?;
    let now = now();
    let mut state = TenantState::new(config.clone(), Tip::EMPTY, BalanceNo(1));
    for (at, used) in case.used.iter().enumerate() {
        let funded = fund(used, at)?;
        apply(
            &mut state,
            &Command::Fund(Box::new(funded)),
            &case.recent,
            now,
        )?;
    }
    apply(
        &mut state,
        &Command::Decide(Box::new(request)),
        &case.recent,
        now,
    )
}

/// Sets what was spent before.
fn fund(used: &Used, at: usize) -> anyhow::Result<Fund> {
    let message = proto::FundBudgetRequest {
        idempotency_key: format!("used-{at}"),
        scope: used.scope.clone(),
        unit: used.unit.into(),
        period: used.period.unwrap_or(proto::Period::Total).into(),
        operation: proto::FundOperation::ResetSpent.into(),
        amount: used.amount,
        ..proto::FundBudgetRequest::default()
    };
    budgets::fund(message)
        .map_err(|status| mistakes(&status))
        .with_context(|| format!("used[{at}]"))
}

/// Applies a command to a state of which nothing is stored.
fn apply(
    state: &mut TenantState,
    command: &Command,
    recent: &Recent,
    now: Timestamp,
) -> anyhow::Result<Answer> {
    // A key, then an account: the third time nothing is missing.
    for _ in 0..3 {
        let mut needs = Needs::default();
        state.needs(command, true, &mut needs);
        let window = state.config.tenant.settings.activity_window.get();
        let mut activity = Activity::default();
        (0..recent.actions).for_each(|_| activity.note(Decision::Allow, now, window));
        (0..recent.denials).for_each(|_| activity.note(Decision::Deny, now, window));
        let activity = needs.activity.iter().map(|key| (*key, activity.clone()));
        let loaded = Loaded {
            activity: activity.collect(),
            ..Loaded::default()
        };
        state.load(&needs, loaded);
    }
    let nobody = Origin {
        key: None,
        confinement: None,
        request_id: "".into(),
        trace_id: "".into(),
    };
    match state.apply(command, &nobody, now) {
        Applied::Done(done) => Ok(done?),
        Applied::KeyNeeded => anyhow::bail!("a key was looked up and is not known"),
    }
}

fn differences(want: &Want, answer: &Answer) -> Vec<String> {
    let mut differences = Vec::new();
    let decision = answers::decision(answer.verdict.decision());
    if decision != want.decision {
        differences.push(format!(
            "wanted {}, got {}",
            want.decision.as_str_name(),
            decision.as_str_name()
        ));
    }
    let codes: Vec<&str> = answer
        .verdict
        .reasons()
        .iter()
        .map(|r| r.code.as_str())
        .collect();
    if want.reasons.as_ref().is_some_and(|wanted| *wanted != codes) {
        differences.push(format!("wanted reasons {:?}, got {codes:?}", want.reasons));
    }
    let matched = answer
        .explanation
        .iter()
        .flat_map(|explanation| &explanation.matched);
    let mut matched: Vec<&str> = matched.map(|matched| &*matched.rule).collect();
    matched.sort_unstable();
    if let Some(wanted) = &want.rules {
        let mut wanted: Vec<&str> = wanted.iter().map(String::as_str).collect();
        wanted.sort_unstable();
        if wanted != matched {
            differences.push(format!("wanted rules {wanted:?}, got {matched:?}"));
        }
    }
    differences
}

/// What of a server's record is decided again.
#[derive(Debug)]
pub(crate) struct Since {
    /// Whose decisions; nothing for the policy's tenant.
    pub(crate) tenant: Option<String>,
    /// From this time on.
    pub(crate) since: String,
    /// Before this time.
    pub(crate) until: Option<String>,
}

/// A time, or how long ago: `24h`, `7d`.
fn time(text: &str) -> anyhow::Result<pbjson_types::Timestamp> {
    let at = match text.parse::<jiff::Timestamp>() {
        Ok(at) => at,
        Err(_) => {
            let span: jiff::Span = text.parse().with_context(|| {
                format!(
                    "{text:?} must be a time such as 2026-08-01T00:00:00Z, or how long ago: 24h, 7d"
                )
            })?;
            let now = jiff::Zoned::now();
            now.checked_sub(span.abs())?.timestamp()
        }
    };
    Ok(pbjson_types::Timestamp {
        seconds: at.as_second(),
        nanos: at.subsec_nanosecond(),
    })
}

/// Lists which recorded decisions the policies of a document would change. Nothing is
/// written.
pub(crate) async fn replay(
    file: &Path,
    what: Since,
    client: ClientConfig,
) -> anyhow::Result<ExitCode> {
    let document = read_document(file)?;
    anyhow::ensure!(
        !document.policies.is_empty(),
        "{} has no policies",
        file.display()
    );
    let key = client.api_key.as_ref();
    let key = key.context("an auditor's key is needed: --key-file, or REMIT_API_KEY")?;
    let (since, until) = (
        time(&what.since)?,
        what.until.as_deref().map(time).transpose()?,
    );
    let channel = client::connect(&client).await?;
    let mut ledger = LedgerClient::with_interceptor(channel, Bearer::new(key)?);
    for policy in document.policies {
        let whose = match policy.all_tenants {
            true => "the policy for all tenants".to_owned(),
            false => format!("the policy of tenant:{}", policy.tenant),
        };
        let mut request = proto::ReplayPolicyRequest {
            policy: Some(policy),
            tenant: what.tenant.clone().unwrap_or_default(),
            start_time: Some(since),
            end_time: until,
            page_size: 1_000,
            page_token: String::new(),
        };
        let (mut decisions, mut changed, mut unknown) = (0, 0, 0);
        loop {
            let answer = ledger
                .replay_policy(request.clone())
                .await
                .map_err(failed)?;
            let answer = answer.into_inner();
            decisions += answer.decisions;
            unknown += answer.unknown;
            changed += answer.changed.len();
            answer.changed.iter().for_each(print_changed);
            if answer.next_page_token.is_empty() {
                break;
            }
            request.page_token = answer.next_page_token;
        }
        println!("{whose}: {decisions} decisions, {changed} would be others");
        if unknown > 0 {
            println!(
                "of {unknown} it can't be told: a rule reads arguments that the ledger does not keep (Tenant.keep_arguments)"
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn print_changed(changed: &proto::ChangedDecision) {
    let word = |decision: proto::Decision| {
        let name = decision.as_str_name();
        name.strip_prefix("DECISION_").unwrap_or(name)
    };
    let caps = if changed.caps_differ {
        " (other caps)"
    } else {
        ""
    };
    println!(
        "{} {} {}: {} -> {}{caps}",
        changed.sequence,
        changed.scope,
        changed.action,
        word(changed.was()),
        word(changed.becomes()),
    );
    for reason in &changed.was_reasons {
        println!("    was: {}", reason.message);
    }
    for reason in &changed.becomes_reasons {
        println!("    becomes: {}", reason.message);
    }
}
