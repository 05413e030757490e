//! The action catalogue: what a tool is and what it costs, whatever a caller says of it.
//!
//! A tool is looked up by its exact name, then by the longest glob that matches. One that
//! is not listed is denied, or taken for what the tenant says of unknown ones: no tool is
//! ungoverned because nobody listed it.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use wildmatch::WildMatch;

use super::amount::Amounts;
use super::budget::named;
use super::id::{Malformed, Name};
use super::request::Action;

named! {
    /// What an action does to the world.
    #[derive(PartialOrd, Ord)]
    ActionLevel {
        /// Looks.
        Read = "READ",
        /// Changes what can be changed back.
        Write = "WRITE",
        /// Makes something happen outside.
        Execute = "EXECUTE",
        /// Destroys.
        Delete = "DELETE",
    }
}

/// How far an action reaches and how hard it is to undo: 1 read, 2 write local, 3 write
/// external, 4 mutation, 5 execution.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Tier(u8);

impl Tier {
    /// The widest reach: what an unknown tool counts as where nothing else is said.
    pub const HIGHEST: Self = Self(5);
    /// Every tier.
    pub const ALL: [Self; 5] = [Self(1), Self(2), Self(3), Self(4), Self(5)];

    /// Takes 1 to 5.
    pub fn new(value: i32) -> Result<Self, Malformed> {
        match u8::try_from(value) {
            Ok(tier) if (1..=5).contains(&tier) => Ok(Self(tier)),
            _ => Err(Malformed::new("1 to 5")),
        }
    }

    /// As a number.
    pub fn get(self) -> u8 {
        self.0
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<'de> Deserialize<'de> for Tier {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(i32::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// A name, or a glob in which `*` stands for any characters, also none.
#[derive(Clone)]
pub struct Pattern {
    text: Box<str>,
    glob: Option<WildMatch>,
}

impl Pattern {
    /// Parses a name in which `*` may stand too.
    pub fn parse(text: &str) -> Result<Self, Malformed> {
        let fits = (1..=256).contains(&text.chars().count())
            && !text.chars().any(|c| c.is_control() || c == '?')
            && text.trim() == text;
        if !fits {
            return Err(Malformed::new(
                "1 to 256 characters without control characters, '?' and spaces around it, '*' for any",
            ));
        }
        Ok(Self {
            text: text.into(),
            glob: text.contains('*').then(|| WildMatch::new(text)),
        })
    }

    /// Which of two globs is looked at first: the longer one; of equally long ones by their
    /// text, so that every server finds the same.
    pub fn precedence(&self, other: &Self) -> Ordering {
        let longer = other.text.len().cmp(&self.text.len());
        longer.then_with(|| self.text.cmp(&other.text))
    }

    /// As given.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether it stands for more than one name.
    pub fn is_glob(&self) -> bool {
        self.glob.is_some()
    }

    /// Whether some name is one of those that either stands for. Of two globs that is so
    /// where one's beginning begins with the other's, and one's end ends with the other's:
    /// whatever stands between fits between the stars.
    pub fn overlaps(&self, other: &Self) -> bool {
        match (self.around_stars(), other.around_stars()) {
            (Some((head, tail)), Some((other_head, other_tail))) => {
                (head.starts_with(other_head) || other_head.starts_with(head))
                    && (tail.ends_with(other_tail) || other_tail.ends_with(tail))
            }
            (None, _) => other.matches(&self.text),
            (_, None) => self.matches(&other.text),
        }
    }

    /// What stands before the first `*` of a glob, and after the last one.
    fn around_stars(&self) -> Option<(&str, &str)> {
        let (head, _) = self.text.split_once('*')?;
        let (_, tail) = self.text.rsplit_once('*')?;
        Some((head, tail))
    }

    /// Whether a name is it, or is one of those that it stands for.
    pub fn matches(&self, name: &str) -> bool {
        match &self.glob {
            Some(glob) => glob.matches(name),
            None => &*self.text == name,
        }
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Pattern {}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.text.fmt(f)
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Serialize for Pattern {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for Pattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

/// What a tool is, and the least that it costs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tool {
    /// Which: a name or a glob.
    pub name: Pattern,
    /// What it does.
    pub level: ActionLevel,
    /// How far it reaches.
    pub tier: Tier,
    /// What kind of thing it is; nothing leaves that to the caller.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<Box<str>>,
    /// The toolset that its budgets hang on; nothing leaves that to the caller.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub toolset: Option<Name>,
    /// The least that one action costs, by unit, without CALLS.
    #[serde(default, skip_serializing_if = "Amounts::is_empty")]
    pub costs: Amounts,
}

impl Tool {
    /// What an action is that is listed as this.
    pub fn resolved(&self, action: &Action) -> Resolved {
        Resolved {
            listed_as: Some(self.name.clone()),
            level: self.level,
            tier: self.tier,
            kind: self.kind.clone().or_else(|| action.kind.clone()),
            toolset: self.toolset.clone(),
            costs: self.costs,
        }
    }
}

/// What a tool is taken for that the catalogue does not list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UnknownAction {
    /// Nothing: it is denied.
    Deny,
    /// A tool of this level, tier and cost.
    As {
        /// What it does.
        level: ActionLevel,
        /// How far it reaches.
        tier: Tier,
        /// The least that it costs.
        #[serde(default, skip_serializing_if = "Amounts::is_empty")]
        costs: Amounts,
    },
}

/// What an action is, for every step that decides on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolved {
    /// The catalogue's entry; nothing for an unknown tool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listed_as: Option<Pattern>,
    /// What it does.
    pub level: ActionLevel,
    /// How far it reaches.
    pub tier: Tier,
    /// The catalogue's word for its kind, else the caller's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<Box<str>>,
    /// The catalogue's toolset; nothing where it names none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub toolset: Option<Name>,
    /// The least that it costs.
    #[serde(default, skip_serializing_if = "Amounts::is_empty")]
    pub costs: Amounts,
}

/// Tools that stay allowed, and those that do not, under a highest tier.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ToolLists {
    /// Names and globs of tools within the tier.
    pub allowed: Arc<[Box<str>]>,
    /// Names and globs of tools above it.
    pub denied: Arc<[Box<str>]>,
}

/// A tenant's tools, indexed for decisions.
#[derive(Debug, Default)]
pub struct Catalogue {
    exact: HashMap<Box<str>, Arc<Tool>>,
    /// The longest first.
    globs: Vec<Arc<Tool>>,
    unknown: Option<UnknownAction>,
    /// For the highest tiers 0 (none) to 5.
    lists: [ToolLists; 6],
}

impl Catalogue {
    /// Indexes tools. `unknown` is what the tenant says of others.
    pub fn new(tools: &[Tool], unknown: Option<UnknownAction>) -> Self {
        let mut catalogue = Self {
            unknown,
            ..Self::default()
        };
        for tool in tools {
            let tool = Arc::new(tool.clone());
            if tool.name.is_glob() {
                catalogue.globs.push(tool);
            } else {
                catalogue.exact.insert(tool.name.as_str().into(), tool);
            }
        }
        catalogue.globs.sort_by(|a, b| a.name.precedence(&b.name));
        for (highest, lists) in (0_u8..).zip(&mut catalogue.lists) {
            let within = |tool: &&Tool| tool.tier.get() <= highest;
            let names = |tools: Vec<&Tool>| tools.iter().map(|t| t.name.text.clone()).collect();
            let (allowed, denied) = tools.iter().partition::<Vec<_>, _>(within);
            lists.allowed = names(allowed);
            lists.denied = names(denied);
        }
        catalogue
    }

    /// The globs in the order in which they are looked at.
    pub fn globs(&self) -> impl Iterator<Item = &Tool> {
        self.globs.iter().map(|tool| &**tool)
    }

    /// Whether it lists nothing.
    pub fn is_empty(&self) -> bool {
        self.exact.is_empty() && self.globs.is_empty()
    }

    /// The tool that a name stands for.
    pub fn tool(&self, name: &str) -> Option<&Arc<Tool>> {
        let glob = || self.globs.iter().find(|tool| tool.name.matches(name));
        self.exact.get(name).or_else(glob)
    }

    /// What an action is; nothing where it is unknown and so denied.
    ///
    /// A tenant that lists no tool and says nothing of unknown ones leaves decisions to
    /// its budgets: everything is an EXECUTE of the highest tier.
    pub fn resolve(&self, action: &Action) -> Option<Resolved> {
        if let Some(tool) = self.tool(&action.name) {
            return Some(tool.resolved(action));
        }
        let (level, tier, costs) = match &self.unknown {
            Some(UnknownAction::Deny) => return None,
            Some(UnknownAction::As { level, tier, costs }) => (*level, *tier, *costs),
            None if self.is_empty() => (ActionLevel::Execute, Tier::HIGHEST, Amounts::NONE),
            None => return None,
        };
        Some(Resolved {
            listed_as: None,
            level,
            tier,
            kind: action.kind.clone(),
            toolset: None,
            costs,
        })
    }

    /// Which tools a highest tier leaves; nothing for 0.
    pub fn lists(&self, highest: Option<Tier>) -> &ToolLists {
        &self.lists[usize::from(highest.map_or(0, Tier::get))]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tool(name: &str, tier: i32) -> Tool {
        Tool {
            name: Pattern::parse(name).expect("a pattern"),
            level: ActionLevel::Write,
            tier: Tier::new(tier).expect("a tier"),
            kind: None,
            toolset: None,
            costs: Amounts::NONE,
        }
    }

    fn action(name: &str) -> Action {
        Action {
            name: name.into(),
            kind: None,
            arguments_sha256: None,
        }
    }

    #[test]
    fn the_exact_name_comes_before_the_longest_glob() {
        let tools = [
            tool("db.*", 3),
            tool("db.users.*", 4),
            tool("db.users.read", 1),
            tool("*", 5),
        ];
        let catalogue = Catalogue::new(&tools, None);
        let tier = |name| {
            catalogue
                .resolve(&action(name))
                .map(|found| found.tier.get())
        };
        assert_eq!(tier("db.users.read"), Some(1));
        assert_eq!(tier("db.users.drop"), Some(4));
        assert_eq!(tier("db.orders.read"), Some(3));
        assert_eq!(tier("mail"), Some(5));
    }

    #[test]
    fn an_unlisted_tool_is_denied_as_soon_as_anything_is_listed() {
        let listed = Catalogue::new(&[tool("read_user", 1)], None);
        assert_eq!(listed.resolve(&action("drop_table")), None);
        assert_eq!(
            listed.resolve(&action("Read_User")),
            None,
            "names have a case"
        );

        let empty = Catalogue::new(&[], None);
        let anything = empty
            .resolve(&action("drop_table"))
            .expect("left to budgets");
        assert_eq!(anything.tier, Tier::HIGHEST);
        let denied = Catalogue::new(&[], Some(UnknownAction::Deny));
        assert_eq!(denied.resolve(&action("drop_table")), None);
    }

    #[test]
    fn lists_follow_the_tiers() {
        let tools = [tool("read_user", 1), tool("send_*", 3), tool("deploy", 5)];
        let catalogue = Catalogue::new(&tools, None);
        let lists = |highest| catalogue.lists(Tier::new(highest).ok());
        assert_eq!(&*lists(0).allowed, [] as [Box<str>; 0]);
        assert_eq!(&*lists(1).allowed, ["read_user".into()]);
        assert_eq!(&*lists(3).denied, ["deploy".into()]);
        assert_eq!(lists(5).denied.len(), 0);
    }

    #[test]
    fn globs_overlap_where_some_name_is_of_both() {
        let pattern = |text| Pattern::parse(text).expect("a pattern");
        for (one, other, overlap) in [
            ("deploy_*", "*_prod", true),
            ("deploy_*", "deploy_prod_*", true),
            ("a*b*c", "a*c", true),
            ("deploy_*", "send_*", false),
            ("*_prod", "*_test", false),
            ("deploy_*", "deploy_prod", true),
            ("deploy_*", "send", false),
            ("send", "send", true),
            ("send", "read", false),
        ] {
            let (one, other) = (pattern(one), pattern(other));
            assert_eq!(one.overlaps(&other), overlap, "{one} {other}");
            assert_eq!(other.overlaps(&one), overlap, "{other} {one}");
        }
    }

    #[test]
    fn many_stars_take_no_time() {
        let pattern = Pattern::parse(&"*a".repeat(128)).expect("a pattern");
        assert!(!pattern.matches(&"a".repeat(127)));
        assert!(pattern.matches(&"a".repeat(256)));
    }
}
