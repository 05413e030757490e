//! Amounts: non-negative 64-bit integers, each in one unit, checked on every
//! operation.

use std::fmt;

use serde::de::{MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::id::Malformed;

/// What an amount counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Unit {
    /// Points for how much harm an action can do.
    RiskPoints,
    /// 10⁻⁸ US dollar.
    UsdMicrocents,
    /// Model tokens.
    Tokens,
    /// The operator's own currency.
    Credits,
    /// Actions, counted by the server.
    Calls,
}

impl Unit {
    /// Every unit, in the order in which amounts are listed.
    pub const ALL: [Self; 5] = [
        Self::RiskPoints,
        Self::UsdMicrocents,
        Self::Tokens,
        Self::Credits,
        Self::Calls,
    ];

    /// The unit's name in the protocol, the ledger and the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::RiskPoints => "RISK_POINTS",
            Self::UsdMicrocents => "USD_MICROCENTS",
            Self::Tokens => "TOKENS",
            Self::Credits => "CREDITS",
            Self::Calls => "CALLS",
        }
    }

    /// The unit of that name.
    pub fn parse(text: &str) -> Result<Self, Malformed> {
        Self::ALL
            .into_iter()
            .find(|unit| unit.as_str() == text)
            .ok_or_else(|| Malformed::new("a unit"))
    }
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for Unit {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for Unit {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

/// A non-negative amount.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize)]
#[serde(transparent)]
pub struct Amount(i64);

impl Amount {
    /// Nothing.
    pub const ZERO: Self = Self(0);
    /// One: what an action counts in `CALLS`.
    pub const ONE: Self = Self(1);

    /// Takes 0 to 2⁶³−1.
    pub fn new(value: i64) -> Result<Self, Malformed> {
        if value < 0 {
            return Err(Malformed::new("0 or more"));
        }
        Ok(Self(value))
    }

    /// As an integer.
    pub fn get(self) -> i64 {
        self.0
    }

    /// The sum, unless it does not fit.
    pub fn checked_add(self, other: Self) -> Option<Self> {
        self.0.checked_add(other.0).map(Self)
    }

    /// The difference, unless it is negative.
    pub fn checked_sub(self, other: Self) -> Option<Self> {
        (self.0 >= other.0).then(|| Self(self.0 - other.0))
    }

    /// The difference, or nothing where it would be negative.
    pub fn saturating_sub(self, other: Self) -> Self {
        self.checked_sub(other).unwrap_or(Self::ZERO)
    }

    /// `value` cut to the range of amounts.
    pub fn clamp(value: i128) -> Self {
        Self(i64::try_from(value.max(0)).unwrap_or(i64::MAX))
    }
}

impl fmt::Debug for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<'de> Deserialize<'de> for Amount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(i64::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// At most one amount for each unit.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Amounts([Option<Amount>; Unit::ALL.len()]);

impl Amounts {
    /// No amount at all.
    pub const NONE: Self = Self([None; Unit::ALL.len()]);

    /// The amount in `unit`, if there is one.
    pub fn get(&self, unit: Unit) -> Option<Amount> {
        self.0[unit as usize]
    }

    /// Sets the amount in `unit`.
    pub fn set(&mut self, unit: Unit, amount: Amount) {
        self.0[unit as usize] = Some(amount);
    }

    /// The same with one amount set.
    pub fn with(mut self, unit: Unit, amount: Amount) -> Self {
        self.set(unit, amount);
        self
    }

    /// Units and amounts in the order of [`Unit::ALL`].
    pub fn iter(&self) -> impl Iterator<Item = (Unit, Amount)> + '_ {
        Unit::ALL
            .into_iter()
            .filter_map(|unit| self.get(unit).map(|amount| (unit, amount)))
    }

    /// Whether there is no amount at all. An amount of zero is one.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(Option::is_none)
    }

    /// Unit by unit sum, unless one does not fit.
    pub fn checked_add(&self, other: &Self) -> Option<Self> {
        let mut sum = *self;
        for (unit, amount) in other.iter() {
            let total = sum.get(unit).unwrap_or_default().checked_add(amount)?;
            sum.set(unit, total);
        }
        Some(sum)
    }

    /// The same without amounts of zero.
    pub fn positive(&self) -> Self {
        let mut kept = Self::NONE;
        for (unit, amount) in self.iter().filter(|(_, amount)| *amount > Amount::ZERO) {
            kept.set(unit, amount);
        }
        kept
    }
}

impl fmt::Debug for Amounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl FromIterator<(Unit, Amount)> for Amounts {
    fn from_iter<I: IntoIterator<Item = (Unit, Amount)>>(iter: I) -> Self {
        let mut amounts = Self::NONE;
        for (unit, amount) in iter {
            amounts.set(unit, amount);
        }
        amounts
    }
}

impl Serialize for Amounts {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (unit, amount) in self.iter() {
            map.serialize_entry(unit.as_str(), &amount)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Amounts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AmountsVisitor;
        impl<'de> Visitor<'de> for AmountsVisitor {
            type Value = Amounts;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from unit to amount")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Amounts, A::Error> {
                let mut amounts = Amounts::NONE;
                while let Some((unit, amount)) = map.next_entry()? {
                    amounts.set(unit, amount);
                }
                Ok(amounts)
            }
        }
        deserializer.deserialize_map(AmountsVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn amount(value: i64) -> Amount {
        Amount::new(value).expect("not negative")
    }

    #[test]
    fn arithmetic_never_wraps() {
        assert_eq!(amount(i64::MAX).checked_add(Amount::ONE), None);
        assert_eq!(amount(1).checked_sub(amount(2)), None);
        assert_eq!(amount(1).saturating_sub(amount(2)), Amount::ZERO);
        assert!(Amount::new(-1).is_err());
    }

    #[test]
    fn amounts_are_listed_in_the_order_of_units() {
        let amounts = Amounts::NONE
            .with(Unit::Calls, Amount::ONE)
            .with(Unit::RiskPoints, amount(20));
        let text = serde_json::to_string(&amounts).expect("serialisable");
        assert_eq!(text, r#"{"RISK_POINTS":20,"CALLS":1}"#);
        let back: Amounts = serde_json::from_str(&text).expect("its own text");
        assert_eq!(back, amounts);
    }
}
