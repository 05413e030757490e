//! Caps: limits that an agent must keep after `ALLOW_WITH_CAPS`.

use std::collections::HashSet;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use wildmatch::WildMatch;

use super::amount::Amount;

/// Limits on what the agent does with, and after, an action. What is absent limits nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Caps {
    /// The most tokens that the action may use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<Amount>,
    /// The most further steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_steps_remaining: Option<Amount>,
    /// The only tools that may still be used; nothing for all that are not denied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_allowlist: Option<Arc<[Box<str>]>>,
    /// Tools that may not be used any more.
    #[serde(default, skip_serializing_if = "<[_]>::is_empty")]
    pub tool_denylist: Arc<[Box<str>]>,
    /// How long to wait before the next action.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cooldown_ms: Option<Amount>,
}

impl Caps {
    /// Whether nothing is limited.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Takes over what another one limits more tightly: the smaller number, the longer
    /// wait, only tools that both allow, all that either denies.
    pub fn tighten(&mut self, other: &Self) {
        fn least(own: &mut Option<Amount>, other: Option<Amount>) {
            *own = match (*own, other) {
                (Some(own), Some(other)) => Some(own.min(other)),
                (own, other) => own.or(other),
            };
        }
        least(&mut self.max_tokens, other.max_tokens);
        least(&mut self.max_steps_remaining, other.max_steps_remaining);
        self.cooldown_ms = self.cooldown_ms.max(other.cooldown_ms);
        // Where there is an allow list it alone counts, so that it must not have what the
        // other one denies.
        self.tool_allowlist = match (&self.tool_allowlist, &other.tool_allowlist) {
            (Some(own), Some(other)) if own != other => Some(common(own, other)),
            (Some(own), Some(_)) => Some(own.clone()),
            (Some(own), None) => Some(without(own, &other.tool_denylist)),
            (None, Some(allowed)) => Some(without(allowed, &self.tool_denylist)),
            (None, None) => None,
        };
        if self.tool_denylist.is_empty() {
            self.tool_denylist = other.tool_denylist.clone();
        } else if self.tool_denylist != other.tool_denylist {
            let more = other.tool_denylist.iter();
            let more = more.filter(|tool| !self.tool_denylist.contains(tool));
            let all = self.tool_denylist.iter().chain(more);
            self.tool_denylist = all.cloned().collect();
        }
    }
}

/// What of some names and globs is not denied by others. A glob of which only some names are
/// denied stays: their exact names count before it.
fn without(allowed: &Arc<[Box<str>]>, denied: &[Box<str>]) -> Arc<[Box<str>]> {
    if denied.is_empty() {
        return allowed.clone();
    }
    let is_denied = covered_by(denied);
    let left = allowed.iter().filter(|name| !is_denied(name));
    left.cloned().collect()
}

/// Whether a name, or all that a glob stands for, is among some names and globs.
fn covered_by(outer: &[Box<str>]) -> impl Fn(&str) -> bool {
    let names: HashSet<&str> = outer.iter().map(|name| &**name).collect();
    let globs: Vec<WildMatch> = outer
        .iter()
        .filter(|name| name.contains('*'))
        .map(|glob| WildMatch::new(glob))
        .collect();
    // A glob that matches another's text contains it: only a `*` takes its `*`.
    move |name| names.contains(name) || globs.iter().any(|glob| glob.matches(name))
}

/// What is in both lists of names and globs. Two globs of which neither contains the other
/// leave nothing: no glob says what they have in common.
fn common(one: &[Box<str>], other: &[Box<str>]) -> Arc<[Box<str>]> {
    let (in_one, in_other) = (covered_by(one), covered_by(other));
    let of_one = one.iter().filter(|name| in_other(name));
    let both = of_one.chain(other.iter().filter(|name| in_one(name)));
    let mut seen = HashSet::new();
    both.filter(|name| seen.insert(&***name)).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tools(names: &[&str]) -> Arc<[Box<str>]> {
        names.iter().map(|name| Box::from(*name)).collect()
    }

    #[test]
    fn the_tightest_of_each_limit_holds() {
        let amount = |value| Amount::new(value).ok();
        let mut caps = Caps {
            max_tokens: amount(100),
            tool_allowlist: Some(tools(&["read", "send"])),
            tool_denylist: tools(&["deploy"]),
            cooldown_ms: amount(5),
            ..Caps::default()
        };
        caps.tighten(&Caps {
            max_tokens: amount(50),
            max_steps_remaining: amount(3),
            tool_allowlist: Some(tools(&["read"])),
            tool_denylist: tools(&["send", "deploy"]),
            cooldown_ms: amount(2),
        });
        let tightest = Caps {
            max_tokens: amount(50),
            max_steps_remaining: amount(3),
            tool_allowlist: Some(tools(&["read"])),
            tool_denylist: tools(&["deploy", "send"]),
            cooldown_ms: amount(5),
        };
        assert_eq!(caps, tightest);
    }

    #[test]
    fn lists_have_in_common_what_both_mean() {
        let both = |one: &[&str], other: &[&str]| {
            let list = |names| Caps {
                tool_allowlist: Some(tools(names)),
                ..Caps::default()
            };
            let mut caps = list(one);
            caps.tighten(&list(other));
            caps.tool_allowlist.expect("a list")
        };
        assert_eq!(
            both(&["read_*"], &["read_user", "send"]),
            tools(&["read_user"])
        );
        assert_eq!(both(&["read_user"], &["*"]), tools(&["read_user"]));
        assert_eq!(both(&["db.*"], &["db.users.*"]), tools(&["db.users.*"]));
        assert_eq!(both(&["a", "b*"], &["b*", "a"]), tools(&["a", "b*"]));
        assert_eq!(both(&["search"], &["send"]), tools(&[]));
        assert_eq!(both(&["*_prod"], &["deploy_*"]), tools(&[]));
    }

    #[test]
    fn what_one_denies_the_other_does_not_allow() {
        let allows = |names| Caps {
            tool_allowlist: Some(tools(names)),
            ..Caps::default()
        };
        let denies = |names| Caps {
            tool_denylist: tools(names),
            ..Caps::default()
        };
        for (allowed, denied, left) in [
            (&["deploy", "look"][..], &["deploy"][..], &["look"][..]),
            (&["deploy"], &["deploy"], &[]),
            (&["db.read", "db.*"], &["db.*"], &[]),
            // Some of them: what is named counts before the glob.
            (&["db.*"], &["db.drop"], &["db.*"]),
        ] {
            let (mut one, mut other) = (allows(allowed), denies(denied));
            one.tighten(&denies(denied));
            other.tighten(&allows(allowed));
            for caps in [one, other] {
                assert_eq!(caps.tool_allowlist, Some(tools(left)));
                assert_eq!(caps.tool_denylist, tools(denied));
            }
        }
        // Lists that belong together are as they were meant.
        let mut both = Caps {
            tool_denylist: tools(&["db.*"]),
            ..allows(&["db.read"])
        };
        both.tighten(&allows(&["*"]));
        assert_eq!(both.tool_allowlist, Some(tools(&["db.read"])));
    }
}
