//! What a document says of tools, policies and freezes.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Current, Differences, Document, Plan, change};
use crate::domain::amount::Unit;
use crate::domain::catalogue::{Catalogue, Pattern, Resolved, Tool};
use crate::domain::id::TenantId;
use crate::domain::ledger::{Change, ChangeKind, Versioned};
use crate::domain::policy::{self, PolicyDocument};
use crate::domain::refusal::Refusal;
use crate::domain::request::Action;
use crate::domain::tenant::{FREEZES_MAX, Freeze, TOOLS_MAX, Tenant};
use crate::domain::time::Timestamp;

impl Plan {
    pub(super) fn plan_tools(
        &mut self,
        document: &Document,
        current: &BTreeMap<TenantId, Current>,
    ) -> Result<(), Refusal> {
        let present = document
            .tools
            .iter()
            .map(|(tenant, tool)| (tenant, &tool.name));
        let absent = document
            .absent_tools
            .iter()
            .map(|(tenant, name)| (tenant, name));
        let mut named: BTreeMap<&TenantId, Vec<&Pattern>> = BTreeMap::new();
        for (tenant, name) in present.chain(absent) {
            named.entry(tenant).or_default().push(name);
        }
        for (tenant, names) in named {
            let stands = self
                .must_be_open(tenant, current)?
                .cloned()
                .unwrap_or_default();
            let planned = self.of(tenant).tenant.clone().or(stands.tenant.clone());
            let unknown =
                |tenant: Option<&Tenant>| tenant.and_then(|t| t.settings.unknown_action.clone());
            let mut tools = (*stands.tools.document).clone();
            for (_, tool) in document.tools.iter().filter(|(of, _)| of == tenant) {
                match tools.iter_mut().find(|other| other.name == tool.name) {
                    Some(listed) => *listed = tool.clone(),
                    None => tools.push(tool.clone()),
                }
            }
            let gone = |tool: &Tool| {
                let mut absent = document.absent_tools.iter();
                absent.any(|(of, name)| of == tenant && *name == tool.name)
            };
            tools.retain(|tool| !gone(tool));
            if tools.len() > TOOLS_MAX {
                return Err(Refusal::TooManyTools);
            }
            let before = Catalogue::new(&stands.tools.document, unknown(stands.tenant.as_ref()));
            let after = Catalogue::new(&tools, unknown(planned.as_ref()));
            for name in names {
                let find = |tools: &[Tool]| tools.iter().find(|tool| tool.name == *name).cloned();
                let (old, new) = (find(&stands.tools.document), find(&tools));
                let change = tool_change(tenant, name, old.as_ref(), new.as_ref(), &before, &after);
                self.note(tenant, change);
            }
            if tools != *stands.tools.document {
                self.of(tenant).tools = Some(Versioned {
                    version: stands.tools.version + 1,
                    document: Arc::new(tools),
                });
            }
        }
        Ok(())
    }

    pub(super) fn plan_policies(
        &mut self,
        document: &Document,
        current: &BTreeMap<TenantId, Current>,
    ) -> Result<(), Refusal> {
        for (tenant, wanted) in &document.policies {
            let stands = if tenant.is_system() {
                current.get(tenant)
            } else {
                self.must_be_open(tenant, current)?
            };
            let before = stands
                .map(|stands| stands.policy.clone())
                .unwrap_or_default();
            let target = if tenant.is_system() {
                "policy for all tenants".to_owned()
            } else {
                format!("policy of tenant:{tenant}")
            };
            let kind = match (before.document.rules.is_empty(), wanted.rules.is_empty()) {
                _ if before.document == *wanted => ChangeKind::Unchanged,
                (true, _) => ChangeKind::Created,
                (false, true) => ChangeKind::Removed,
                (false, false) => ChangeKind::Changed,
            };
            let loosened = policy::loosens(&before.document, wanted);
            let details = rule_changes(&before.document, wanted);
            self.note(tenant, change(kind, target, details, loosened.is_some()));
            if kind != ChangeKind::Unchanged {
                self.of(tenant).policy = Some(Versioned {
                    version: before.version + 1,
                    document: wanted.clone(),
                });
            }
        }
        Ok(())
    }

    pub(super) fn plan_freezes(
        &mut self,
        document: &Document,
        current: &BTreeMap<TenantId, Current>,
        now: Timestamp,
    ) -> Result<(), Refusal> {
        let present = document
            .freezes
            .iter()
            .map(|spec| (&spec.scope, Some(spec)));
        let absent = document.absent_freezes.iter().map(|scope| (scope, None));
        for (scope, wanted) in present.chain(absent) {
            let tenant = scope.tenant().map_err(|_| Refusal::TenantNotFound)?;
            let stands = self.must_be_open(&tenant, current)?;
            let stored = stands
                .map(|stands| stands.freezes.clone())
                .unwrap_or_default();
            let planned = self.of(&tenant).freezes.clone();
            let mut freezes = (*planned.as_ref().unwrap_or(&stored).document).clone();
            let at = freezes.iter().position(|freeze| freeze.scope == *scope);
            let target = format!("freeze of {scope}");
            let kind = match (at, wanted) {
                (None, None) => ChangeKind::Unchanged,
                (Some(at), Some(wanted)) if freezes[at].reason == wanted.reason => {
                    ChangeKind::Unchanged
                }
                (Some(at), Some(wanted)) => {
                    freezes[at].reason = wanted.reason.clone();
                    ChangeKind::Changed
                }
                (Some(_), None) => {
                    freezes.retain(|freeze| freeze.scope != *scope);
                    ChangeKind::Removed
                }
                (None, Some(wanted)) if freezes.len() < FREEZES_MAX => {
                    freezes.push(Freeze {
                        scope: scope.clone(),
                        reason: wanted.reason.clone(),
                        rule: None,
                        since: now,
                    });
                    ChangeKind::Created
                }
                (None, Some(_)) => return Err(Refusal::TooManyFreezes),
            };
            let lifts = kind == ChangeKind::Removed;
            self.note(&tenant, change(kind, target, Vec::new(), lifts));
            if kind != ChangeKind::Unchanged {
                self.of(&tenant).freezes = Some(Versioned {
                    version: stored.version + 1,
                    document: Arc::new(freezes),
                });
            }
        }
        Ok(())
    }
}

/// What became of a tool. It loosens where the same name is taken for less afterwards.
fn tool_change(
    tenant: &TenantId,
    name: &Pattern,
    old: Option<&Tool>,
    new: Option<&Tool>,
    before: &Catalogue,
    after: &Catalogue,
) -> Change {
    let target = format!("tool {name} of tenant:{tenant}");
    let kind = match (old, new) {
        (None, None) => ChangeKind::Unchanged,
        (Some(old), Some(new)) if old == new => ChangeKind::Unchanged,
        (Some(_), Some(_)) => ChangeKind::Changed,
        (None, Some(_)) => ChangeKind::Created,
        (Some(_), None) => ChangeKind::Removed,
    };
    let sample = Action {
        name: name.as_str().into(),
        kind: None,
        arguments_sha256: None,
    };
    let taken = (before.resolve(&sample), after.resolve(&sample));
    let loosens = kind != ChangeKind::Unchanged
        && (matches!(&taken, (Some(before), Some(after)) if is_less(before, after))
            || shadows_less(old, new, &sample, before, after)
            // With the last tool goes the denial of those that are not listed.
            || (new.is_none() && denies_unlisted(before) && !denies_unlisted(after)));
    let mut differences = Differences(Vec::new());
    if let (Some(old), Some(new)) = (old, new) {
        differences.note("level", old.level, new.level);
        differences.note("tier", old.tier, new.tier);
        let text = |text: &Option<Box<str>>| text.clone().unwrap_or_default();
        differences.note("kind", text(&old.kind), text(&new.kind));
        let set = |tool: &Tool| {
            let toolset = tool.toolset.as_ref();
            toolset
                .map_or("", crate::domain::id::Name::canonical)
                .to_owned()
        };
        differences.note("toolset", set(old), set(new));
        for unit in Unit::ALL {
            let cost = |tool: &Tool| tool.costs.get(unit).unwrap_or_default();
            differences.note(&format!("costs.{unit}"), cost(old), cost(new));
        }
    }
    change(kind, target, differences.0, loosens)
}

/// Whether names that a glob has in common with another one are taken for less afterwards:
/// of two globs that match, the first one counts.
fn shadows_less(
    old: Option<&Tool>,
    new: Option<&Tool>,
    sample: &Action,
    before: &Catalogue,
    after: &Catalogue,
) -> bool {
    let Some(name) = new.or(old).map(|tool| &tool.name) else {
        return false;
    };
    if !name.is_glob() {
        return false;
    }
    fn counts<'a>(own: Option<&'a Tool>, other: &'a Tool) -> &'a Tool {
        own.filter(|own| own.name.precedence(&other.name).is_lt())
            .unwrap_or(other)
    }
    let others = before
        .globs()
        .filter(|other| other.name != *name && other.name.overlaps(name));
    others
        .filter_map(|other| {
            let stays = after.globs().find(|tool| tool.name == other.name)?;
            Some((counts(old, other), counts(new, stays)))
        })
        .any(|(was, is)| is_less(&was.resolved(sample), &is.resolved(sample)))
}

/// Whether an action that is not listed is denied for it.
fn denies_unlisted(catalogue: &Catalogue) -> bool {
    // No action has the empty name, nor is it listed: but `*` stands for it too.
    let nobody = Action {
        name: "".into(),
        kind: None,
        arguments_sha256: None,
    };
    catalogue.resolve(&nobody).is_none()
}

/// Whether an action is taken for something that less stands in the way of.
fn is_less(before: &Resolved, after: &Resolved) -> bool {
    let cheaper = |unit: &Unit| {
        let cost = |of: &Resolved| of.costs.get(*unit).unwrap_or_default();
        cost(after) < cost(before)
    };
    // Listing what was unknown is approving it: that is what the catalogue is for.
    let lower = after.level < before.level || after.tier < before.tier;
    (lower && before.listed_as.is_some())
        || Unit::ALL.iter().any(cheaper)
        || before.toolset.is_some() && after.toolset != before.toolset
        || before.kind.is_some() && after.kind != before.kind
}

/// Which rules a document changes.
fn rule_changes(before: &PolicyDocument, after: &PolicyDocument) -> Vec<Box<str>> {
    let mut details = Vec::new();
    for new in &after.rules {
        match before.rules.iter().find(|old| old.id == new.id) {
            None => details.push(format!("rule {}: added", new.id)),
            Some(old) if old == new => {}
            Some(old) if old.mode != new.mode => {
                details.push(format!("rule {}: {} -> {}", new.id, old.mode, new.mode));
            }
            Some(_) => details.push(format!("rule {}: changed", new.id)),
        }
    }
    for old in &before.rules {
        if !after.rules.iter().any(|new| new.id == old.id) {
            details.push(format!("rule {}: removed", old.id));
        }
    }
    details.into_iter().map(String::into_boxed_str).collect()
}
