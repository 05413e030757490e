//! What a rule can read: everything that a decision knows, as CEL values.

use std::collections::HashMap;
use std::sync::Arc;

use cel::Value;
use serde_json::Value as Json;

use super::condition::Size;
use crate::domain::activity::Counts;
use crate::domain::amount::{Amounts, Unit};
use crate::domain::catalogue::Resolved;
use crate::domain::id::Name;
use crate::domain::narrowing::BasisPoints;
use crate::domain::request::{Action, Arguments, Context};
use crate::domain::scope::Subject;

/// A budget that applies, as it is before the action.
#[derive(Debug, Clone)]
pub struct BudgetFacts {
    /// Of the balance.
    pub scope: Arc<str>,
    /// With its wildcards.
    pub budget_scope: Arc<str>,
    /// What it counts.
    pub unit: Unit,
    /// When it is renewed.
    pub period: &'static str,
    /// What is left; nothing without a limit.
    pub remaining: Option<i64>,
    /// How much is used.
    pub used: BasisPoints,
}

/// What the arguments are.
#[derive(Debug, Clone, Copy)]
pub enum Asked<'a> {
    /// As the caller gave them, none being an empty map.
    With(Option<&'a Arguments>),
    /// Those of an action that was let in before, and which are not known any more: what
    /// reads them can't be evaluated.
    Unknown,
    /// Those of a recorded decision, of which not all was kept: rules that read them can't
    /// be told.
    Incomplete,
}

/// Everything that a rule can read.
#[derive(Debug)]
pub struct Facts<'a> {
    /// What the caller is about to do.
    pub action: &'a Action,
    /// What the catalogue says of it; nothing for an unknown one that is denied.
    pub resolved: Option<&'a Resolved>,
    /// Who acts, in the catalogue's toolset.
    pub subject: &'a Subject,
    /// Circumstances.
    pub context: &'a Context,
    /// What it may use, with what the catalogue adds.
    pub amounts: Amounts,
    /// Its arguments.
    pub arguments: Asked<'a>,
    /// Budgets that apply, from the root down.
    pub budgets: Vec<BudgetFacts>,
    /// What the agent did with this tool of late.
    pub recent: Counts,
}

impl Facts<'_> {
    /// What a loop can cost at the most.
    pub(super) fn size(&self) -> Size {
        let arguments = match self.arguments {
            Asked::With(Some(arguments)) => (arguments.bytes, arguments.widest),
            _ => (0, 0),
        };
        Size {
            bytes: arguments.0,
            // The most dimensions that a subject has are fewer than 16.
            widest: arguments.1.max(self.budgets.len()).max(16),
        }
    }

    /// One variable.
    pub(super) fn value(&self, variable: &str) -> Value {
        match variable {
            "action" => self.action(),
            "args" => match self.arguments {
                Asked::With(Some(arguments)) => json(&arguments.value),
                _ => json(&Json::Object(serde_json::Map::new())),
            },
            "subject" => self.subject(),
            "dimensions" => {
                let dimensions = self.subject.dimensions().iter();
                let values = dimensions.map(|(key, value)| (&**key, text(value.canonical())));
                map(values)
            }
            "actor" => text(&self.context.actor),
            "environment" => text(&self.context.environment),
            "reason" => text(&self.context.reason),
            "amounts" => by_unit(|unit| self.amounts.get(unit).map_or(0, |amount| amount.get())),
            "remaining" => by_unit(|unit| {
                let of_unit = self.budgets.iter().filter(|budget| budget.unit == unit);
                of_unit
                    .filter_map(|budget| budget.remaining)
                    .min()
                    .unwrap_or(i64::MAX)
            }),
            "utilization" => by_unit(|unit| {
                let of_unit = self.budgets.iter().filter(|budget| budget.unit == unit);
                of_unit
                    .map(|budget| i64::from(budget.used.get()))
                    .max()
                    .unwrap_or(0)
            }),
            "budgets" => Value::List(Arc::new(self.budgets.iter().map(budget).collect())),
            "recent" => map([
                ("actions", Value::Int(i64::from(self.recent.actions))),
                ("denials", Value::Int(i64::from(self.recent.denials))),
            ]),
            // The check has let no other name pass.
            _ => Value::Null,
        }
    }

    fn action(&self) -> Value {
        let resolved = self.resolved;
        map([
            ("name", text(&self.action.name)),
            (
                "kind",
                text(
                    resolved
                        .map_or(self.action.kind.as_deref(), |r| r.kind.as_deref())
                        .unwrap_or_default(),
                ),
            ),
            ("level", text(resolved.map_or("", |r| r.level.as_str()))),
            (
                "tier",
                Value::Int(resolved.map_or(0, |r| i64::from(r.tier.get()))),
            ),
            ("toolset", text(self.subject.toolset().unwrap_or_default())),
        ])
    }

    fn subject(&self) -> Value {
        let levels = self.subject.levels();
        let name = |name: &Option<Name>| text(name.as_ref().map_or("", Name::canonical));
        map([
            ("tenant", text(self.subject.tenant.as_str())),
            ("workspace", name(&levels.workspace)),
            ("app", name(&levels.app)),
            ("workflow", name(&levels.workflow)),
            ("agent", name(&levels.agent)),
            ("toolset", name(&levels.toolset)),
        ])
    }
}

fn text(text: &str) -> Value {
    Value::String(Arc::new(text.to_owned()))
}

fn map<'a>(fields: impl IntoIterator<Item = (&'a str, Value)>) -> Value {
    let fields = fields
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value));
    Value::from(fields.collect::<HashMap<String, Value>>())
}

fn by_unit(value: impl Fn(Unit) -> i64) -> Value {
    map(Unit::ALL
        .into_iter()
        .map(|unit| (unit.as_str(), Value::Int(value(unit)))))
}

fn budget(budget: &BudgetFacts) -> Value {
    map([
        ("scope", text(&budget.scope)),
        ("budget_scope", text(&budget.budget_scope)),
        ("unit", text(budget.unit.as_str())),
        ("period", text(budget.period)),
        (
            "remaining",
            Value::Int(budget.remaining.unwrap_or(i64::MAX)),
        ),
        ("utilization", Value::Int(i64::from(budget.used.get()))),
    ])
}

/// Arguments as CEL values. Whole numbers are ints, so that they compare with the ints
/// that rules are written with. The depth is bounded where arguments are parsed.
fn json(value: &Json) -> Value {
    match value {
        Json::Null => Value::Null,
        Json::Bool(value) => Value::Bool(*value),
        Json::Number(number) => match number.as_i64() {
            Some(whole) => Value::Int(whole),
            None => Value::Float(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(value) => text(value),
        Json::Array(values) => Value::List(Arc::new(values.iter().map(json).collect())),
        Json::Object(fields) => map(fields
            .iter()
            .map(|(key, value)| (key.as_str(), json(value)))),
    }
}
