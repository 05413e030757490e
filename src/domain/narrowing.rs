//! Narrowing: what a budget leaves to its agents the more of it is used.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize};

use super::budget::{Balance, Limit};
use super::caps::Caps;
use super::catalogue::Tier;
use super::id::Malformed;

/// A share in basis points: 10,000 is all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize)]
#[serde(transparent)]
pub struct BasisPoints(u32);

impl BasisPoints {
    /// All of it.
    pub const ALL: Self = Self(10_000);

    /// Takes 0 to 10,000.
    pub fn new(value: i32) -> Result<Self, Malformed> {
        match u32::try_from(value) {
            Ok(value) if value <= 10_000 => Ok(Self(value)),
            _ => Err(Malformed::new("0 to 10000 basis points")),
        }
    }

    /// As a number. A utilisation can be more than 10,000.
    pub fn get(self) -> u32 {
        self.0
    }

    /// How much of a balance is reserved, spent or owed. All of it where nothing is
    /// allocated, none of it where there is no limit.
    pub fn used(balance: &Balance, limit: Limit) -> Self {
        let Some(allocated) = balance.allocated(limit) else {
            return Self(0);
        };
        Self::share(balance.used(), allocated.get().into())
    }

    /// One amount as a share of another; all of it where there is nothing to share.
    pub fn share(used: i128, allocated: i128) -> Self {
        if allocated <= 0 {
            return Self::ALL;
        }
        let share = used.saturating_mul(10_000) / allocated;
        Self(u32::try_from(share.max(0)).unwrap_or(u32::MAX))
    }
}

impl fmt::Display for BasisPoints {
    /// In percent.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, rest) = (self.0 / 100, self.0 % 100);
        if rest == 0 {
            write!(f, "{whole}%")
        } else {
            write!(f, "{whole}.{rest:02}%")
        }
    }
}

impl<'de> Deserialize<'de> for BasisPoints {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        u32::deserialize(deserializer).map(Self)
    }
}

/// The highest tier that a threshold leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Highest {
    /// None: nothing is left.
    Nothing,
    /// This one and those below.
    Tier(Tier),
}

impl Highest {
    /// As a tier; nothing for nothing.
    pub fn tier(self) -> Option<Tier> {
        match self {
            Self::Nothing => None,
            Self::Tier(tier) => Some(tier),
        }
    }
}

impl fmt::Display for Highest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.write_str("nothing"),
            Self::Tier(tier) => write!(f, "tier {tier}"),
        }
    }
}

/// What holds from a utilisation on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Threshold {
    /// From here on.
    pub from: BasisPoints,
    /// The highest tier that is left; nothing for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub highest: Option<Highest>,
    /// What the rest must keep.
    #[serde(default, skip_serializing_if = "Caps::is_empty")]
    pub caps: Caps,
}

/// Most thresholds of one budget.
pub const THRESHOLDS_MAX: usize = 16;

/// Checks that thresholds rise.
pub fn rising(thresholds: Vec<Threshold>) -> Result<Vec<Threshold>, Malformed> {
    if thresholds.len() > THRESHOLDS_MAX {
        return Err(Malformed::new(format!("at most {THRESHOLDS_MAX}")));
    }
    if thresholds
        .windows(2)
        .any(|pair| pair[0].from >= pair[1].from)
    {
        return Err(Malformed::new("in rising order of `from_basis_points`"));
    }
    Ok(thresholds)
}

/// The threshold that holds at a utilisation.
pub fn reached(thresholds: &[Threshold], used: BasisPoints) -> Option<&Threshold> {
    thresholds.iter().rfind(|threshold| threshold.from <= used)
}

/// Whether some thresholds leave more than others did: at any utilisation a higher tier
/// or looser caps, as far as that can be told from the thresholds alone.
pub fn loosens(before: &[Threshold], after: &[Threshold]) -> bool {
    let rank = |threshold: Option<&Threshold>| match threshold.and_then(|t| t.highest) {
        None => u8::MAX,
        Some(Highest::Tier(tier)) => tier.get(),
        Some(Highest::Nothing) => 0,
    };
    let points = before.iter().chain(after).map(|threshold| threshold.from);
    points.into_iter().any(|at| {
        let (old, new) = (reached(before, at), reached(after, at));
        let kept = old.is_none_or(|old| old.caps.is_empty())
            || new.is_some_and(|new| {
                let mut tightened = new.caps.clone();
                let old = old.map(|old| old.caps.clone()).unwrap_or_default();
                tightened.tighten(&old);
                tightened == new.caps
            });
        rank(new) > rank(old) || !kept
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn threshold(from: i32, highest: Option<i32>) -> Threshold {
        Threshold {
            from: BasisPoints::new(from).expect("basis points"),
            highest: highest.map(|tier| Tier::new(tier).map_or(Highest::Nothing, Highest::Tier)),
            caps: Caps::default(),
        }
    }

    fn profile() -> Vec<Threshold> {
        vec![
            threshold(5_000, Some(2)),
            threshold(8_000, Some(1)),
            threshold(10_000, Some(0)),
        ]
    }

    #[test]
    fn the_last_threshold_that_was_reached_holds() {
        let profile = profile();
        let highest = |used| {
            let used = BasisPoints::new(used).expect("basis points");
            reached(&profile, used).and_then(|threshold| threshold.highest)
        };
        assert_eq!(highest(4_999), None);
        assert_eq!(highest(5_000), Tier::new(2).ok().map(Highest::Tier));
        assert_eq!(highest(9_999), Tier::new(1).ok().map(Highest::Tier));
        assert_eq!(highest(10_000), Some(Highest::Nothing));
    }

    #[test]
    fn leaving_more_anywhere_is_loosening() {
        let profile = profile();
        let mut later = profile.clone();
        later[0].from = BasisPoints::new(6_000).expect("basis points");
        assert!(loosens(&profile, &later));
        assert!(!loosens(&later, &profile));
        assert!(loosens(&profile, &[]));
        assert!(!loosens(&[], &profile));
        assert!(!loosens(&profile, &profile));
    }
}
