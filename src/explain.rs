//! `remit explain`: one decision, and what came of it, for a person.

use std::fmt::Write as _;
use std::process::ExitCode;

use anyhow::Context as _;

use crate::client::{self, Bearer, failed};
use crate::config::ClientConfig;
use crate::domain::amount::{Amounts, Unit};
use crate::domain::ledger::{Body, Explanation, Movement};
use crate::domain::policy::Mode;
use crate::proto;
use crate::proto::ledger_client::LedgerClient;

/// Prints a decision by its id, `<tenant>/<ledger sequence>`.
pub(crate) async fn explain(decision_id: &str, client: ClientConfig) -> anyhow::Result<ExitCode> {
    let (tenant, sequence) = decision_id
        .rsplit_once('/')
        .and_then(|(tenant, sequence)| Some((tenant, sequence.parse::<i64>().ok()?)))
        .context("a decision id looks like acme/1234: tenant and ledger sequence")?;
    let key = client.api_key.as_ref();
    let key = key.context("an auditor's key is needed: --key-file, or REMIT_API_KEY")?;
    let channel = client::connect(&client).await?;
    let mut ledger = LedgerClient::with_interceptor(channel, Bearer::new(key)?);
    let request = proto::GetEntryRequest {
        tenant: tenant.to_owned(),
        sequence,
    };
    let entry = ledger
        .get_entry(request)
        .await
        .map_err(failed)?
        .into_inner();
    let entry = entry.entry.context("the server sent no entry")?;
    let body: Body = serde_json::from_str(&entry.body).context("the entry's body")?;
    print!("{}", told(&body));
    let Some(reservation) = body.reservation else {
        return Ok(ExitCode::SUCCESS);
    };
    let request = proto::ListEntriesRequest {
        tenant: tenant.to_owned(),
        reservation_id: reservation.to_string(),
        page_size: 100,
        ..proto::ListEntriesRequest::default()
    };
    let entries = ledger
        .list_entries(request)
        .await
        .map_err(failed)?
        .into_inner();
    let later = entries
        .entries
        .iter()
        .filter(|entry| entry.sequence > sequence);
    for entry in later {
        let body: Body = serde_json::from_str(&entry.body).context("an entry's body")?;
        println!(
            "then        {} {} ({tenant}/{})",
            body.time, body.kind, body.seq
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// One entry in words.
fn told(body: &Body) -> String {
    let mut text = String::new();
    let mut line = |label: &str, value: &str| {
        if !value.is_empty() {
            // Writing to a String can't fail.
            let _ = writeln!(text, "{label:<11} {value}");
        }
    };
    let decision = body
        .decision
        .map_or_else(String::new, |decision| format!(" {decision}"));
    line(
        "decision",
        &format!("{}/{} {}{decision}", body.tenant, body.seq, body.kind),
    );
    line("at", &body.time.to_string());
    if let Some(subject) = &body.subject {
        line("subject", &subject.scope_text());
    }
    if let Some(action) = &body.action {
        let kind = action
            .kind
            .as_deref()
            .map_or_else(String::new, |kind| format!(" ({kind})"));
        line("action", &format!("{}{kind}", action.name));
        if let Some(digest) = &action.arguments_sha256 {
            line("arguments", &format!("SHA-256 {digest}"));
        }
    }
    if let Some(kept) = &body.arguments {
        let note = if kept.complete {
            ""
        } else {
            " (not all was kept)"
        };
        line("", &format!("{}{note}", kept.value));
    }
    let context = &body.context;
    line("for", &context.actor);
    line("where", &context.environment);
    line("why", &context.reason);
    if let Some(request) = &body.request {
        line("asked", &amounts(&request.amounts));
    }
    if let Some(explanation) = &body.explanation {
        by_what(explanation, &mut line);
    }
    for reason in &body.reasons {
        line("because", &format!("{}: {reason}", reason.code));
        line("to pass", &reason.remedy());
    }
    if let Some(wait) = body.retry_after_us {
        line(
            "",
            &format!("or wait, no less than {} s", wait.div_ceil(1_000_000)),
        );
    }
    if let Some(caps) = &body.caps {
        line("caps", &serde_json::to_string(caps).unwrap_or_default());
    }
    if let Some(reservation) = &body.reservation {
        line("reservation", &reservation.to_string());
    }
    line("held", &amounts(&body.reserved));
    line("charged", &amounts(&body.charged));
    for movement in &body.movements {
        line("balance", &balance(movement));
    }
    if let Some(incident) = &body.incident {
        let frozen = if incident.frozen { ", frozen" } else { "" };
        line(
            "incident",
            &format!(
                "rule {:?} over {}/{}: {} with {} actions and {} denials of late{frozen}",
                incident.rule.id,
                body.tenant,
                incident.decision,
                incident.agent,
                incident.recent.actions,
                incident.recent.denials
            ),
        );
        line("", &incident.rule.text);
    }
    if let Some(key) = &body.key {
        line("asked by", &format!("API key {key}"));
    }
    if let Some(trace) = &body.trace_id {
        line("trace", trace);
    }
    text
}

fn by_what(explanation: &Explanation, line: &mut impl FnMut(&str, &str)) {
    match &explanation.resolved {
        Some(resolved) => {
            let listed = resolved.listed_as.as_ref();
            let listed = listed.map_or("not listed".to_owned(), |name| format!("listed as {name}"));
            let toolset = resolved.toolset.as_ref();
            let toolset =
                toolset.map_or_else(String::new, |set| format!(", toolset {}", set.canonical()));
            line(
                "taken for",
                &format!(
                    "{} of tier {}, {listed}{toolset}",
                    resolved.level, resolved.tier
                ),
            );
            line("costs", &amounts(&resolved.costs));
        }
        None => line("taken for", "an unknown action"),
    }
    if let Some(recent) = &explanation.recent {
        line(
            "of late",
            &format!(
                "{} actions, {} denials before this one",
                recent.actions, recent.denials
            ),
        );
    }
    let versions = &explanation.versions;
    for matched in &explanation.matched {
        let (whose, version) = if matched.all_tenants {
            (" for all tenants", versions.all_tenants)
        } else {
            ("", versions.policy)
        };
        let shadow = if matched.mode == Mode::Shadow {
            ", in shadow"
        } else {
            ""
        };
        let error = matched.error.as_deref();
        let error = error.map_or_else(String::new, |error| format!(" (not evaluated: {error})"));
        line(
            "rule",
            &format!(
                "{:?}{whose}, version {version}: {}{shadow}{error}",
                matched.rule, matched.effect
            ),
        );
    }
    if let Some(binding) = &explanation.binding {
        let leaves = binding
            .highest
            .map_or("all tools".to_owned(), |highest| highest.to_string());
        line(
            "narrowed",
            &format!(
                "{} {} {} used, from {} on it leaves {leaves}",
                binding.scope, binding.unit, binding.used, binding.from
            ),
        );
    }
}

fn amounts(amounts: &Amounts) -> String {
    let shown = amounts
        .iter()
        .map(|(unit, amount): (Unit, _)| format!("{amount} {unit}"));
    shown.collect::<Vec<_>>().join(", ")
}

fn balance(movement: &Movement) -> String {
    let after = movement.after;
    let allocated = after
        .0
        .map_or("unlimited".to_owned(), |amount| amount.to_string());
    format!(
        "{}: allocated {allocated}, reserved {}, spent {}, debt {}",
        movement.balance, after.1, after.2, after.3
    )
}
