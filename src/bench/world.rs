//! The tenants under load: provisioned like any others, and checked afterwards
//! against what their callers were told.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use anyhow::{Context as _, ensure};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;
use tonic::{IntoRequest, Request};

use crate::client::failed;
use crate::proto::authority_client::AuthorityClient;
use crate::proto::provisioning_client::ProvisioningClient;
use crate::proto::{
    Action, ActionLevel, Amount, ApiKey, Balance, Budget, CreateApiKeyRequest, ListBalancesRequest,
    Permission, Policy, ProvisionRequest, Rule, RuleEffect, RuleMatch, Subject, Tenant, Tool, Unit,
    budget,
};

/// What every action asks for.
pub(super) const ESTIMATE: i64 = 3;
/// What it then uses.
pub(super) const ACTUAL: i64 = 2;
/// More than any measurement can use.
pub(super) const ALLOCATION: i64 = 1_000_000_000_000_000;
/// Tenants of one document.
const DOCUMENT: usize = 100;
/// Calls at once while preparing and checking.
const AT_ONCE: usize = 16;

/// The levels of a scope, from the root down.
const LEVELS: [(&str, &str); 5] = [
    ("workspace", "prod"),
    ("app", "support"),
    ("workflow", "refunds"),
    ("agent", "resolver"),
    ("toolset", "payments"),
];

/// One tenant, and what is known of it from answers alone.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) name: String,
    pub(super) bearer: MetadataValue<Ascii>,
    pub(super) subject: Subject,
    /// Committed pairs.
    pub(super) committed: AtomicI64,
    /// Answers that leave a ledger entry.
    pub(super) entries: AtomicU64,
    /// What was there before.
    before: Option<Before>,
}

#[derive(Debug, Clone, Copy)]
struct Before {
    spent: i64,
    reserved: i64,
    balances: u64,
    entries: u64,
}

/// A request in somebody's name.
pub(super) fn request<T>(bearer: &MetadataValue<Ascii>, message: T) -> Request<T> {
    let mut request = message.into_request();
    let metadata = request.metadata_mut();
    metadata.insert("authorization", bearer.clone());
    request
}

pub(super) fn bearer(key: &str) -> anyhow::Result<MetadataValue<Ascii>> {
    let value = format!("Bearer {key}").parse();
    value.context("the API key is no header value")
}

/// What every caller is about to do.
pub(super) fn action() -> Action {
    let fields = [
        ("customer", "c-20417".to_owned().into()),
        ("amount", 1_250.0.into()),
    ];
    Action {
        name: "refund_customer".into(),
        kind: "tool.payment".into(),
        arguments: Some(
            fields
                .into_iter()
                .map(|(name, value): (&str, pbjson_types::value::Kind)| {
                    let value = pbjson_types::Value { kind: Some(value) };
                    (name.to_owned(), value)
                })
                .collect::<std::collections::HashMap<_, _>>()
                .into(),
        ),
    }
}

pub(super) fn points(value: i64) -> Vec<Amount> {
    vec![Amount {
        unit: Unit::RiskPoints.into(),
        value,
    }]
}

/// The name of one of many tenants.
pub(super) fn name(number: u32) -> String {
    format!("t{number:06}")
}

/// Who acts, in a chain of so many budgets.
pub(super) fn subject(tenant: &str, depth: u8) -> Subject {
    let mut subject = Subject {
        tenant: tenant.into(),
        ..Subject::default()
    };
    let deep = |at: usize| usize::from(depth) > at + 1;
    let value = |at: usize| {
        if deep(at) {
            LEVELS[at].1.to_owned()
        } else {
            String::new()
        }
    };
    subject.workspace = value(0);
    subject.app = value(1);
    subject.workflow = value(2);
    subject.agent = value(3);
    subject.toolset = value(4);
    subject
}

/// The scopes of a chain of so many budgets, from the root down.
pub(super) fn scopes(tenant: &str, depth: u8) -> Vec<String> {
    let mut scope = format!("tenant:{tenant}");
    let mut scopes = vec![scope.clone()];
    for (level, value) in LEVELS.iter().take(usize::from(depth) - 1) {
        scope = format!("{scope}/{level}:{value}");
        scopes.push(scope.clone());
    }
    scopes
}

fn budgets(tenant: &str, depth: u8, allocation: i64) -> Vec<Budget> {
    let budget = |scope| Budget {
        scope,
        unit: Unit::RiskPoints.into(),
        limit: Some(budget::Limit::Allocation(allocation)),
        ..Budget::default()
    };
    scopes(tenant, depth).into_iter().map(budget).collect()
}

/// Provisions tenants of these names, each with a chain of budgets and a key for
/// its agents. `denied`: budgets in which nothing has room.
pub(super) async fn prepare(
    channel: &Channel,
    operator: &MetadataValue<Ascii>,
    names: &[String],
    depth: u8,
    denied: bool,
) -> anyhow::Result<Vec<Loaded>> {
    let allocation = if denied { 0 } else { ALLOCATION };
    let mut provisioning = ProvisioningClient::new(channel.clone());
    for names in names.chunks(DOCUMENT) {
        let document = ProvisionRequest {
            idempotency_key: uuid::Uuid::now_v7().to_string(),
            tenants: names
                .iter()
                .map(|name| Tenant {
                    tenant: name.clone(),
                    ..Tenant::default()
                })
                .collect(),
            budgets: names
                .iter()
                .flat_map(|name| budgets(name, depth, allocation))
                .collect(),
            ..ProvisionRequest::default()
        };
        let provisioned = provisioning.provision(request(operator, document)).await;
        provisioned.map_err(failed).context("provisioning")?;
    }
    stream::iter(names)
        .map(|name| loaded(channel, operator, name, depth))
        .buffered(AT_ONCE)
        .try_collect()
        .await
}

/// Gives a tenant a catalogue and 20 rules: 10 are about other tools, 5 do not hold, 5 do
/// and let the action pass. With `counts` one of them reads what the agent did of late.
pub(super) async fn provision_rules(
    channel: &Channel,
    operator: &MetadataValue<Ascii>,
    tenant: &str,
    counts: bool,
) -> anyhow::Result<()> {
    let tool = |name: &str| Tool {
        tenant: tenant.to_owned(),
        name: name.to_owned(),
        level: ActionLevel::Execute.into(),
        tier: 4,
        ..Tool::default()
    };
    let rule = |id: String, when: &str, effect: RuleEffect| Rule {
        id,
        when: when.to_owned(),
        effect: effect.into(),
        ..Rule::default()
    };
    let holding = [
        "args.amount > 1000 && args.customer.startsWith('c-')",
        "action.tier >= 3 && action.level == 'EXECUTE'",
        "remaining.RISK_POINTS > 10 && utilization.RISK_POINTS < 9000",
        "subject.agent != '' && amounts.RISK_POINTS > 0",
        if counts {
            "recent.denials == 0"
        } else {
            "environment != 'production'"
        },
    ];
    let mut rules = Vec::new();
    for (at, holds) in holding.into_iter().enumerate() {
        rules.push(rule(format!("holds{at}"), holds, RuleEffect::Allow));
        let not = format!("args.amount > 5000 || args.customer == 'c-{at}'");
        rules.push(rule(format!("does-not-hold{at}"), &not, RuleEffect::Deny));
        for other in ["mail", "deploy"] {
            let elsewhere = RuleMatch {
                tools: vec![format!("{other}_*")],
                ..RuleMatch::default()
            };
            rules.push(Rule {
                r#match: Some(elsewhere),
                ..rule(
                    format!("{other}{at}"),
                    &format!("args.amount > {at}"),
                    RuleEffect::Deny,
                )
            });
        }
    }
    let document = ProvisionRequest {
        idempotency_key: uuid::Uuid::now_v7().to_string(),
        tools: vec![tool("refund_*"), tool("mail_*"), tool("deploy_*")],
        policies: vec![Policy {
            tenant: tenant.to_owned(),
            rules,
            ..Policy::default()
        }],
        ..ProvisionRequest::default()
    };
    let mut provisioning = ProvisioningClient::new(channel.clone());
    let provisioned = provisioning.provision(request(operator, document)).await;
    provisioned.map_err(failed).context("provisioning rules")?;
    Ok(())
}

async fn loaded(
    channel: &Channel,
    operator: &MetadataValue<Ascii>,
    name: &str,
    depth: u8,
) -> anyhow::Result<Loaded> {
    let permissions = [Permission::Authority, Permission::Read];
    let asked = CreateApiKeyRequest {
        idempotency_key: uuid::Uuid::now_v7().to_string(),
        api_key: Some(ApiKey {
            tenant: name.to_owned(),
            permissions: permissions.iter().map(|p| (*p).into()).collect(),
            ..ApiKey::default()
        }),
    };
    let mut provisioning = ProvisioningClient::new(channel.clone());
    let created = provisioning.create_api_key(request(operator, asked)).await;
    let created = created.map_err(failed).context("making a key")?;
    Ok(Loaded {
        name: name.to_owned(),
        bearer: bearer(&created.into_inner().secret)?,
        subject: subject(name, depth),
        committed: AtomicI64::new(0),
        entries: AtomicU64::new(0),
        before: None,
    })
}

/// Counts a chain's entries; checks it where it can.
pub(super) trait Chains {
    /// How many entries a tenant's chain has.
    async fn entries(&self, tenant: &str) -> anyhow::Result<u64>;
}

impl Loaded {
    /// The key by itself.
    pub(super) fn key(&self) -> &str {
        let bearer = self.bearer.to_str().unwrap_or_default();
        bearer.strip_prefix("Bearer ").unwrap_or_default()
    }

    /// Notes what is there before the load.
    pub(super) async fn note(
        &mut self,
        channel: &Channel,
        chains: &impl Chains,
    ) -> anyhow::Result<()> {
        let balances = self.balances(channel).await?;
        let first = balances.first();
        self.before = Some(Before {
            spent: first.map_or(0, |balance| balance.spent),
            reserved: first.map_or(0, |balance| balance.reserved),
            balances: balances.len() as u64,
            entries: chains.entries(&self.name).await?,
        });
        Ok(())
    }

    /// Compares balances and chain with what callers were told since `note`.
    pub(super) async fn check(
        &self,
        channel: &Channel,
        chains: &impl Chains,
    ) -> anyhow::Result<()> {
        let name = &self.name;
        let before = self.before.context("a load that was not noted")?;
        let committed = self.committed.load(Ordering::Relaxed);
        let balances = self.balances(channel).await?;
        for balance in &balances {
            let spent = before.spent + committed * ACTUAL;
            ensure!(
                balance.spent == spent,
                "{}: {} spent, callers were told of {spent}",
                balance.scope,
                balance.spent
            );
            ensure!(
                balance.reserved == before.reserved,
                "{}: {} still held, {} before",
                balance.scope,
                balance.reserved,
                before.reserved
            );
        }
        // The first action of all also opens the balances, each with an entry.
        let opened = balances.len() as u64 - before.balances;
        let told = before.entries + opened + self.entries.load(Ordering::Relaxed);
        let found = chains.entries(name).await?;
        ensure!(
            found == told,
            "{name}: {found} ledger entries, callers were told of {told}"
        );
        Ok(())
    }

    async fn balances(&self, channel: &Channel) -> anyhow::Result<Vec<Balance>> {
        let mut authority = AuthorityClient::new(channel.clone());
        let asked = ListBalancesRequest {
            tenant: self.name.clone(),
            ..ListBalancesRequest::default()
        };
        let listed = authority.list_balances(request(&self.bearer, asked)).await;
        Ok(listed.map_err(failed)?.into_inner().balances)
    }
}
