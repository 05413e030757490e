//! Who acts and where ([`Subject`]), and what a budget hangs on ([`Scope`]).
//!
//! A scope applies to a subject when every level and dimension that the scope
//! names is equal in the subject. Both are written in canonical order: levels
//! from tenant to toolset, then dimensions by key, values in lower case.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::ser::SerializeMap as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::id::{Malformed, NAME_RULE, Name, TenantId};

/// The named places of the scope tree, from the root down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// The customer: the unit of isolation.
    Tenant,
    /// For example an environment.
    Workspace,
    /// An application.
    App,
    /// A workflow of it.
    Workflow,
    /// The agent that acts.
    Agent,
    /// The tools that it acts with.
    Toolset,
}

impl Level {
    /// Every level, from the root down.
    pub const ALL: [Self; 6] = [
        Self::Tenant,
        Self::Workspace,
        Self::App,
        Self::Workflow,
        Self::Agent,
        Self::Toolset,
    ];

    /// Its name in scopes.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tenant => "tenant",
            Self::Workspace => "workspace",
            Self::App => "app",
            Self::Workflow => "workflow",
            Self::Agent => "agent",
            Self::Toolset => "toolset",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|level| level.as_str() == text)
    }
}

/// What one part of a scope names. The order of the variants is the canonical
/// order.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Coordinate {
    /// One of the six levels.
    Level(Level),
    /// A dimension, by its key.
    Dimension(Box<str>),
}

impl Coordinate {
    fn parse(text: &str) -> Result<Self, Malformed> {
        match Level::parse(text) {
            Some(level) => Ok(Self::Level(level)),
            None => dimension_key(text).map(|key| Self::Dimension(key.into())),
        }
    }

    fn as_str(&self) -> &str {
        match self {
            Self::Level(level) => level.as_str(),
            Self::Dimension(key) => key,
        }
    }
}

/// Checks the key of a dimension: an identifier in lower case, none of the
/// level names.
pub fn dimension_key(text: &str) -> Result<&str, Malformed> {
    let lower = !text.bytes().any(|b| b.is_ascii_uppercase());
    if !lower || Name::parse(text).is_err() {
        return Err(Malformed::new(
            "1 to 128 characters of a-z, 0-9, '_', '.', '-'",
        ));
    }
    if Level::parse(text).is_some() {
        return Err(Malformed::new(format!(
            "a key other than the level name {text}"
        )));
    }
    Ok(text)
}

/// Most dimensions of one subject.
pub const DIMENSIONS_MAX: usize = 16;

/// Who acts, and where.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Subject {
    /// The tenant, in lower case.
    pub tenant: TenantId,
    #[serde(flatten)]
    levels: Levels,
    #[serde(default)]
    dimensions: BTreeMap<Box<str>, Name>,
}

/// The levels below the tenant.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Levels {
    /// For example an environment.
    pub workspace: Option<Name>,
    /// An application.
    pub app: Option<Name>,
    /// A workflow of it.
    pub workflow: Option<Name>,
    /// The agent that acts.
    pub agent: Option<Name>,
    /// The tools that it acts with.
    pub toolset: Option<Name>,
}

impl Subject {
    /// Puts parsed parts together. Keys of dimensions are checked by
    /// [`dimension_key`], their number here.
    pub fn new(
        tenant: TenantId,
        levels: Levels,
        dimensions: BTreeMap<Box<str>, Name>,
    ) -> Result<Self, Malformed> {
        if dimensions.len() > DIMENSIONS_MAX {
            return Err(Malformed::new(format!("at most {DIMENSIONS_MAX} entries")));
        }
        Ok(Self {
            tenant,
            levels,
            dimensions,
        })
    }

    /// The levels below the tenant.
    pub fn levels(&self) -> &Levels {
        &self.levels
    }

    /// Free coordinates by key.
    pub fn dimensions(&self) -> &BTreeMap<Box<str>, Name> {
        &self.dimensions
    }

    /// The toolset, in lower case.
    pub fn toolset(&self) -> Option<&str> {
        self.levels.toolset.as_ref().map(Name::canonical)
    }

    /// The same subject with another toolset.
    pub fn in_toolset(&self, toolset: &Name) -> Self {
        let mut subject = self.clone();
        subject.levels.toolset = Some(toolset.clone());
        subject
    }

    /// The levels down to the agent, as a scope: who acts, whatever it does.
    pub fn agent_scope(&self) -> String {
        let levels = Level::ALL
            .into_iter()
            .filter(|level| *level != Level::Toolset);
        self.text_of(levels.map(Coordinate::Level))
    }

    /// The canonical value at a coordinate.
    fn value(&self, coordinate: &Coordinate) -> Option<&str> {
        let name = match coordinate {
            Coordinate::Level(Level::Tenant) => return Some(self.tenant.as_str()),
            Coordinate::Level(Level::Workspace) => self.levels.workspace.as_ref(),
            Coordinate::Level(Level::App) => self.levels.app.as_ref(),
            Coordinate::Level(Level::Workflow) => self.levels.workflow.as_ref(),
            Coordinate::Level(Level::Agent) => self.levels.agent.as_ref(),
            Coordinate::Level(Level::Toolset) => self.levels.toolset.as_ref(),
            Coordinate::Dimension(key) => self.dimensions.get(key),
        };
        name.map(Name::canonical)
    }

    /// All that the subject names, as a scope.
    pub fn scope_text(&self) -> String {
        let levels = Level::ALL.into_iter().map(Coordinate::Level);
        let dimensions = self.dimensions.keys().cloned().map(Coordinate::Dimension);
        self.text_of(levels.chain(dimensions))
    }

    fn text_of(&self, coordinates: impl Iterator<Item = Coordinate>) -> String {
        let mut text = String::new();
        for coordinate in coordinates {
            if let Some(value) = self.value(&coordinate) {
                push_part(&mut text, coordinate.as_str(), value);
            }
        }
        text
    }
}

impl Serialize for Subject {
    /// By hand because a flattened field is serialised through a buffer, and
    /// this stands on the path of every decision.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let levels = &self.levels;
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("tenant", &self.tenant)?;
        for (key, name) in [
            ("workspace", &levels.workspace),
            ("app", &levels.app),
            ("workflow", &levels.workflow),
            ("agent", &levels.agent),
            ("toolset", &levels.toolset),
        ] {
            if let Some(name) = name {
                map.serialize_entry(key, name)?;
            }
        }
        if !self.dimensions.is_empty() {
            map.serialize_entry("dimensions", &self.dimensions)?;
        }
        map.end()
    }
}

fn push_part(text: &mut String, key: &str, value: &str) {
    if !text.is_empty() {
        text.push('/');
    }
    text.push_str(key);
    text.push(':');
    text.push_str(value);
}

/// The value of one part of a scope.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Value {
    Exactly(Box<str>),
    /// `*`: each value has its own balance.
    Each,
}

impl Value {
    fn as_str(&self) -> &str {
        match self {
            Self::Exactly(value) => value,
            Self::Each => "*",
        }
    }
}

/// Longest scope, in bytes.
pub const SCOPE_BYTES_MAX: usize = 1_024;

/// What a budget hangs on: `tenant:acme/workflow:billing/run:*`.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Scope {
    parts: Vec<(Coordinate, Value)>,
    text: Arc<str>,
}

impl Scope {
    /// Parses the text form. Parts may come in any order and are put into the
    /// canonical one, in which wildcards must come last.
    pub fn parse(text: &str) -> Result<Self, Malformed> {
        let scope = Self::parse_parts(text)?;
        match scope.parts.first() {
            Some((Coordinate::Level(Level::Tenant), Value::Exactly(_))) => Ok(scope),
            _ => Err(Malformed::new(
                "a scope that names its tenant, for example tenant:acme/toolset:send-email",
            )),
        }
    }

    /// Parses a scope without wildcards: the scope of one balance.
    pub fn parse_concrete(text: &str) -> Result<Self, Malformed> {
        let scope = Self::parse(text)?;
        if scope.is_template() {
            return Err(Malformed::new("a scope without wildcards"));
        }
        Ok(scope)
    }

    fn parse_parts(text: &str) -> Result<Self, Malformed> {
        if text.is_empty() || text.len() > SCOPE_BYTES_MAX {
            return Err(Malformed::new(format!("1 to {SCOPE_BYTES_MAX} bytes")));
        }
        let mut parts = Vec::new();
        for part in text.split('/') {
            let (key, value) = part
                .split_once(':')
                .ok_or_else(|| Malformed::new("level:value pairs divided by '/'"))?;
            let coordinate = Coordinate::parse(key).map_err(|_| {
                Malformed::new(format!("made of levels or dimensions; {key:?} is neither"))
            })?;
            let value = if value == "*" {
                Value::Each
            } else {
                let name = Name::parse(value).map_err(|_| {
                    Malformed::new(format!(
                        "made of values of {NAME_RULE}, or *; {value:?} is none"
                    ))
                })?;
                Value::Exactly(name.canonical().into())
            };
            parts.push((coordinate, value));
        }
        parts.sort_by(|a, b| a.0.cmp(&b.0));
        if parts.windows(2).any(|pair| pair[0].0 == pair[1].0) {
            return Err(Malformed::new("a scope that names each level once"));
        }
        if parts.len() > Level::ALL.len() + DIMENSIONS_MAX {
            return Err(Malformed::new(format!(
                "a scope with at most {DIMENSIONS_MAX} dimensions"
            )));
        }
        let first_wildcard = parts.iter().position(|(_, value)| *value == Value::Each);
        if let Some(at) = first_wildcard
            && parts[at..].iter().any(|(_, value)| *value != Value::Each)
        {
            return Err(Malformed::new(
                "a scope whose wildcards come last, after tenant, workspace, app, workflow, agent, toolset and dimensions by key",
            ));
        }
        let mut canonical = String::new();
        for (coordinate, value) in &parts {
            push_part(&mut canonical, coordinate.as_str(), value.as_str());
        }
        Ok(Self {
            parts,
            text: canonical.into(),
        })
    }

    /// Canonical text.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Canonical text, shared.
    pub fn text(&self) -> &Arc<str> {
        &self.text
    }

    /// Whether it ends in wildcards.
    pub fn is_template(&self) -> bool {
        self.parts
            .last()
            .is_some_and(|(_, value)| *value == Value::Each)
    }

    /// The tenant that it begins with.
    pub fn tenant(&self) -> Result<TenantId, Malformed> {
        match self.parts.first() {
            Some((Coordinate::Level(Level::Tenant), Value::Exactly(tenant))) => {
                TenantId::parse(tenant)
            }
            _ => Err(Malformed::new("a scope that names its tenant")),
        }
    }

    /// Whether it names a toolset.
    pub fn names_toolset(&self) -> bool {
        self.parts
            .iter()
            .any(|(coordinate, _)| *coordinate == Coordinate::Level(Level::Toolset))
    }

    /// How many levels and dimensions it names.
    pub fn depth(&self) -> usize {
        self.parts.len()
    }

    /// The scope of the balance that a subject's action falls on, or nothing
    /// where the scope does not apply to it.
    pub fn applied_to(&self, subject: &Subject) -> Option<Arc<str>> {
        for (coordinate, value) in &self.parts {
            let actual = subject.value(coordinate)?;
            if let Value::Exactly(wanted) = value
                && &**wanted != actual
            {
                return None;
            }
        }
        if !self.is_template() {
            return Some(self.text.clone());
        }
        let mut text = String::new();
        for (coordinate, _) in &self.parts {
            push_part(&mut text, coordinate.as_str(), subject.value(coordinate)?);
        }
        Some(text.into())
    }

    /// Whether a concrete scope is one of this template's values, or the scope
    /// itself.
    pub fn covers(&self, concrete: &Self) -> bool {
        self.parts.len() == concrete.parts.len()
            && self
                .parts
                .iter()
                .zip(&concrete.parts)
                .all(|(own, other)| own.0 == other.0 && (own.1 == Value::Each || own.1 == other.1))
    }

    /// The coordinates that it names and where its wildcards begin: scopes of
    /// the same shape can be looked up by one text.
    pub fn shape(&self) -> Shape {
        let exact = self
            .parts
            .iter()
            .take_while(|(_, value)| *value != Value::Each)
            .count();
        Shape {
            coordinates: self.parts.iter().map(|(c, _)| c.clone()).collect(),
            exact,
        }
    }
}

impl fmt::Debug for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.text.fmt(f)
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Serialize for Scope {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for Scope {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

/// The coordinates of a scope without their values.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Shape {
    coordinates: Vec<Coordinate>,
    /// How many coordinates, from the first on, have a value of their own.
    exact: usize,
}

impl Shape {
    /// Writes the text that a scope of this shape must have to apply to the
    /// subject. False where none can.
    pub fn scope_for(&self, subject: &Subject, text: &mut String) -> bool {
        text.clear();
        for (at, coordinate) in self.coordinates.iter().enumerate() {
            let Some(value) = subject.value(coordinate) else {
                return false;
            };
            let value = if at < self.exact { value } else { "*" };
            push_part(text, coordinate.as_str(), value);
        }
        true
    }
}

impl Serialize for ScopeFilter {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for ScopeFilter {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

/// Some `level:value` pairs that a subject or a scope must agree with. The
/// tenant need not be among them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScopeFilter(Scope);

impl ScopeFilter {
    /// Parses `workspace:prod/agent:resolver`.
    pub fn parse(text: &str) -> Result<Self, Malformed> {
        let scope = Scope::parse_parts(text)?;
        if scope.is_template() {
            return Err(Malformed::new("level:value pairs without wildcards"));
        }
        Ok(Self(scope))
    }

    /// Whether a subject agrees with every pair.
    pub fn matches(&self, subject: &Subject) -> bool {
        self.0.applied_to(subject).is_some()
    }

    /// Whether a scope names every pair.
    pub fn matches_scope(&self, scope: &Scope) -> bool {
        self.0.parts.iter().all(|part| scope.parts.contains(part))
    }

    /// The tenant among the pairs, if there is one.
    pub fn tenant(&self) -> Option<TenantId> {
        self.0.tenant().ok()
    }

    /// Canonical text.
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }

    /// Each pair as `level:value`, for a filter in the database.
    pub fn pairs(&self) -> impl Iterator<Item = &str> {
        self.0.as_str().split('/')
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn subject(text: &str) -> Subject {
        let mut levels = Levels::default();
        let mut dimensions = BTreeMap::new();
        let mut tenant = TenantId::parse("acme").expect("a tenant");
        for part in text.split('/') {
            let (key, value) = part.split_once(':').expect("level:value");
            let name = Name::parse(value).expect("a name");
            match key {
                "tenant" => tenant = TenantId::parse(value).expect("a tenant"),
                "workspace" => levels.workspace = Some(name),
                "app" => levels.app = Some(name),
                "workflow" => levels.workflow = Some(name),
                "agent" => levels.agent = Some(name),
                "toolset" => levels.toolset = Some(name),
                key => {
                    dimensions.insert(key.into(), name);
                }
            }
        }
        Subject::new(tenant, levels, dimensions).expect("a subject")
    }

    #[test]
    fn a_scope_applies_when_all_that_it_names_is_equal_in_the_subject() {
        let who = subject("tenant:acme/workspace:Prod/agent:resolver/toolset:send-email/run:42");
        for (scope, applies) in [
            ("tenant:acme", true),
            ("tenant:acme/workspace:prod", true),
            ("tenant:acme/toolset:send-email", true),
            ("tenant:acme/agent:resolver/toolset:send-email", true),
            ("tenant:acme/run:42", true),
            ("tenant:acme/run:*", true),
            ("tenant:acme/customer:*", false),
            ("tenant:acme/app:chat", false),
            ("tenant:acme/workspace:dev", false),
            ("tenant:other", false),
        ] {
            let parsed = Scope::parse(scope).expect(scope);
            assert_eq!(parsed.applied_to(&who).is_some(), applies, "{scope}");
            let mut text = String::new();
            let found = parsed.shape().scope_for(&who, &mut text) && text == parsed.as_str();
            assert_eq!(found, applies, "{scope} by its shape");
        }
    }

    #[test]
    fn a_template_gives_each_value_its_own_scope() {
        let scope = Scope::parse("tenant:acme/workflow:billing/run:*").expect("a template");
        let who = subject("tenant:acme/workflow:billing/run:R-7");
        assert_eq!(
            scope.applied_to(&who).as_deref(),
            Some("tenant:acme/workflow:billing/run:r-7")
        );
    }

    #[test]
    fn parts_are_put_into_canonical_order() {
        let scope = Scope::parse("run:*/customer:*/toolset:Mail/tenant:ACME");
        assert_eq!(
            scope.expect("a scope").as_str(),
            "tenant:acme/toolset:mail/customer:*/run:*"
        );
    }

    #[test]
    fn scopes_that_can_not_be_meant_are_refused() {
        for text in [
            "",
            "acme",
            "agent:x",
            "tenant:*",
            "tenant:acme/",
            "tenant:acme/agent:x/agent:y",
            "tenant:acme/agent:*/toolset:mail",
            "tenant:acme/Run:1",
            "tenant:acme/agent:a b",
            &format!("tenant:{}", "x".repeat(1_024)),
        ] {
            assert!(Scope::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_filter_matches_subjects_and_scopes() {
        let filter = ScopeFilter::parse("agent:Bot/workspace:prod").expect("a filter");
        assert!(filter.matches(&subject("workspace:prod/agent:bot/run:1")));
        assert!(!filter.matches(&subject("workspace:prod")));
        let scope = |text| Scope::parse(text).expect("a scope");
        assert!(filter.matches_scope(&scope("tenant:acme/workspace:prod/agent:bot")));
        assert!(!filter.matches_scope(&scope("tenant:acme/workspace:prod")));
    }

    #[test]
    fn a_subject_survives_its_json() {
        let who = subject("tenant:acme/workspace:Prod/toolset:mail/run:42");
        let text = serde_json::to_string(&who).expect("serialisable");
        assert_eq!(
            text,
            r#"{"tenant":"acme","workspace":"Prod","toolset":"mail","dimensions":{"run":"42"}}"#
        );
        let back: Subject = serde_json::from_str(&text).expect("its own text");
        assert_eq!(back, who);
        assert_eq!(
            back.scope_text(),
            "tenant:acme/workspace:prod/toolset:mail/run:42"
        );
    }
}
