//! What an agent did with a tool of late: counts in a sliding window, which policy can
//! read, and the incidents that were raised over them.

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::time::Duration;

use super::id::Malformed;
use super::ledger::Decision;
use super::scope::Subject;
use super::time::Timestamp;

/// How finely the window slides: what was counted leaves it in steps of a twentieth.
const STEPS: i64 = 20;

/// Names the counts of one agent and one tool: 16 bytes of SHA-256 over both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ActivityKey([u8; 16]);

impl ActivityKey {
    /// Of an agent, with all the levels above it, and an action's name.
    pub fn of(subject: &Subject, action: &str) -> Self {
        let mut bytes = [0; 16];
        let hash = Sha256::new()
            .chain_update(subject.agent_scope())
            .chain_update([0])
            .chain_update(action)
            .finalize();
        bytes.copy_from_slice(&hash[..16]);
        Self(bytes)
    }

    /// As stored.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// Takes back what was stored.
    pub fn from_stored(bytes: &[u8]) -> Result<Self, Malformed> {
        let bytes = bytes.try_into();
        bytes.map(Self).map_err(|_| Malformed::new("16 bytes"))
    }
}

/// What policy reads of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Actions that were allowed.
    pub actions: u32,
    /// Actions that were denied.
    pub denials: u32,
}

/// One step of the window: its number, and what was counted in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Step(i64, Counts);

/// Counts of one agent and one tool.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Activity {
    /// Oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    steps: Vec<Step>,
    /// When a rule last raised an incident.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    incidents: Vec<(Box<str>, Timestamp)>,
    /// When something last happened.
    pub last: Timestamp,
}

fn step_of(at: Timestamp, window: Duration) -> i64 {
    let width = i64::try_from(window.as_micros()).unwrap_or(i64::MAX) / STEPS;
    at.as_micros().div_euclid(width.max(1))
}

impl Activity {
    /// What falls into the window that ends at `now`.
    pub fn counts(&self, now: Timestamp, window: Duration) -> Counts {
        let first = step_of(now, window) - STEPS + 1;
        let within = self.steps.iter().filter(|step| step.0 >= first);
        within.fold(Counts::default(), |sum, step| Counts {
            actions: sum.actions.saturating_add(step.1.actions),
            denials: sum.denials.saturating_add(step.1.denials),
        })
    }

    /// Counts a decision, and forgets what has left the window. One that waits for a
    /// person is neither an action nor a denial.
    pub fn note(&mut self, decision: Decision, now: Timestamp, window: Duration) {
        let at = step_of(now, window);
        self.steps
            .retain(|step| step.0 > at - STEPS && step.0 <= at);
        if self.steps.last().is_none_or(|last| last.0 != at) {
            self.steps.push(Step(at, Counts::default()));
        }
        if let Some(Step(_, counts)) = self.steps.last_mut() {
            match decision {
                Decision::Allow | Decision::AllowWithCaps => {
                    counts.actions = counts.actions.saturating_add(1);
                }
                Decision::Deny => counts.denials = counts.denials.saturating_add(1),
                Decision::RequireApproval => {}
            }
        }
        self.last = now;
    }

    /// Whether a rule raises an incident now: once for each window.
    pub fn raise(&mut self, rule: &str, now: Timestamp, window: Duration) -> bool {
        self.incidents.retain(|(_, at)| now.since(*at) < window);
        if self.incidents.iter().any(|(raised, _)| &**raised == rule) {
            return false;
        }
        self.incidents.push((rule.into(), now));
        self.last = now;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Duration = Duration::from_secs(600);

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_micros(1_700_000_000_000_000 + seconds * 1_000_000)
    }

    #[test]
    fn what_is_counted_leaves_the_window_again() {
        let mut activity = Activity::default();
        for second in 0..10 {
            let decision = [Decision::Allow, Decision::Deny][usize::from(second % 2 == 1)];
            activity.note(decision, at(second), WINDOW);
            activity.note(Decision::RequireApproval, at(second), WINDOW);
        }
        let both = Counts {
            actions: 5,
            denials: 5,
        };
        assert_eq!(activity.counts(at(9), WINDOW), both);
        assert_eq!(activity.counts(at(560), WINDOW), both);
        assert_eq!(activity.counts(at(640), WINDOW), Counts::default());
    }

    #[test]
    fn it_stays_small_however_long_it_goes_on() {
        let mut activity = Activity::default();
        for second in 0..10_000 {
            activity.note(Decision::Deny, at(second), WINDOW);
        }
        assert!(activity.steps.len() <= 20);
        let denials = activity.counts(at(9_999), WINDOW).denials;
        assert!((570..=600).contains(&denials), "{denials}");
    }

    #[test]
    fn an_incident_is_raised_once_a_window() {
        let mut activity = Activity::default();
        assert!(activity.raise("runaway", at(0), WINDOW));
        assert!(!activity.raise("runaway", at(599), WINDOW));
        assert!(activity.raise("other", at(599), WINDOW));
        assert!(activity.raise("runaway", at(600), WINDOW));
    }
}
