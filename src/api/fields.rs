//! Gathers every mistake of a message, so that a caller mends them all at once.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use pbjson_types as wkt;
use tonic::Status;

use super::status;
use crate::domain::amount::{Amount, Amounts, Unit};
use crate::domain::id::{IdempotencyKey, Malformed, Name, ReservationId, TenantId};
use crate::domain::request::Metadata;
use crate::domain::time::Timestamp;
use crate::proto;

/// Most entries of a map that a caller fills.
pub const MAP_MAX: usize = 64;
/// Most bytes of it in all.
pub const MAP_BYTES_MAX: usize = 16_384;
/// Most bytes of one of its keys.
pub const MAP_KEY_MAX: usize = 128;
/// Most bytes of one of its values.
pub const VALUE_MAX: usize = 4_096;

/// The mistakes found so far: a field's path and a sentence without it.
#[derive(Debug, Default)]
pub struct Fields(Vec<(String, String)>);

impl Fields {
    /// Notes a mistake; `wants` completes "must be …".
    pub fn bad(&mut self, field: impl Into<String>, wants: impl Into<String>) {
        self.0
            .push((field.into(), format!("must be {}", wants.into())));
    }

    /// Notes a mistake in words of its own.
    pub fn fault(&mut self, field: impl Into<String>, text: impl Into<String>) {
        self.0.push((field.into(), text.into()));
    }

    /// The value, or a note of what was wanted.
    pub fn take<T>(&mut self, field: &str, parsed: Result<T, Malformed>) -> Option<T> {
        match parsed {
            Ok(value) => Some(value),
            Err(Malformed(wants)) => {
                self.bad(field, wants);
                None
            }
        }
    }

    /// Ends the gathering. `made` is nothing only where a mistake was noted.
    pub fn finish<T>(self, made: Option<T>) -> Result<T, Status> {
        match made {
            Some(made) if self.0.is_empty() => Ok(made),
            _ => Err(status::invalid(&self.0)),
        }
    }

    /// The tenant that a message names, else the key's own. Whether the caller may
    /// see it is another question: [`super::auth::Caller::may_see`].
    pub fn tenant(&mut self, field: &str, named: &str, own: Option<&TenantId>) -> Option<TenantId> {
        if !named.is_empty() {
            return self.take(field, TenantId::parse(named));
        }
        if own.is_none() {
            self.bad(field, "named: the API key belongs to no tenant");
        }
        own.cloned()
    }

    /// A required idempotency key.
    pub fn key(&mut self, text: &str) -> Option<IdempotencyKey> {
        self.take("idempotency_key", IdempotencyKey::parse(text))
    }

    /// A required reservation id.
    pub fn reservation(&mut self, text: &str) -> Option<ReservationId> {
        self.take("reservation_id", ReservationId::parse(text))
    }

    /// A name that may be left empty.
    pub fn name(&mut self, field: &str, text: &str) -> Option<Name> {
        if text.is_empty() {
            return None;
        }
        self.take(field, Name::parse(text))
    }

    /// Text of bounded length, without the character that PostgreSQL can't store.
    pub fn text(&mut self, field: &str, text: String, most: usize) -> Box<str> {
        if text.len() > most {
            self.bad(field, format!("at most {most} bytes"));
        }
        if text.contains('\0') {
            self.bad(field, "free of the character U+0000");
        }
        text.into()
    }

    /// What people call something: at most 256 characters, whatever their alphabet.
    pub fn title(&mut self, field: &str, text: String) -> Box<str> {
        if text.chars().count() > 256 {
            self.bad(field, "at most 256 characters");
        }
        // As bytes it is bounded by that.
        self.text(field, text, usize::MAX)
    }

    /// A unit, not CALLS where a caller may not name it.
    pub fn unit(&mut self, field: &str, value: i32, calls: bool) -> Option<Unit> {
        let unit = match proto::Unit::try_from(value) {
            Ok(proto::Unit::RiskPoints) => Unit::RiskPoints,
            Ok(proto::Unit::UsdMicrocents) => Unit::UsdMicrocents,
            Ok(proto::Unit::Tokens) => Unit::Tokens,
            Ok(proto::Unit::Credits) => Unit::Credits,
            Ok(proto::Unit::Calls) if calls => Unit::Calls,
            Ok(proto::Unit::Calls) => {
                self.bad(field, "another unit: the server counts UNIT_CALLS itself");
                return None;
            }
            Ok(proto::Unit::Unspecified) | Err(_) => {
                let and_calls = if calls { ", UNIT_CALLS" } else { "" };
                self.bad(
                    field,
                    format!(
                        "one of UNIT_RISK_POINTS, UNIT_USD_MICROCENTS, UNIT_TOKENS, UNIT_CREDITS{and_calls}"
                    ),
                );
                return None;
            }
        };
        Some(unit)
    }

    /// Amounts, at most one for each unit.
    pub fn amounts(&mut self, field: &str, amounts: Vec<proto::Amount>) -> Amounts {
        let mut parsed = Amounts::NONE;
        for (at, proto::Amount { unit, value }) in amounts.into_iter().enumerate() {
            let unit = self.unit(&format!("{field}[{at}].unit"), unit, false);
            let amount = self.take(&format!("{field}[{at}].value"), Amount::new(value));
            let (Some(unit), Some(amount)) = (unit, amount) else {
                continue;
            };
            if parsed.get(unit).is_some() {
                self.bad(
                    format!("{field}[{at}].unit"),
                    "a unit that no other amount has",
                );
            }
            parsed.set(unit, amount);
        }
        parsed
    }

    /// A duration that may be absent.
    pub fn duration(&mut self, field: &str, duration: Option<wkt::Duration>) -> Option<Duration> {
        let wkt::Duration { seconds, nanos } = duration?;
        match (u64::try_from(seconds), u32::try_from(nanos)) {
            (Ok(seconds), Ok(nanos)) if nanos < 1_000_000_000 => {
                Some(Duration::new(seconds, nanos))
            }
            _ => {
                self.bad(field, "a duration that is not negative");
                None
            }
        }
    }

    /// A time that may be absent.
    pub fn time(&mut self, field: &str, time: Option<wkt::Timestamp>) -> Option<Timestamp> {
        let wkt::Timestamp { seconds, nanos } = time?;
        // From the year 1 to the year 9999, as the message is defined.
        let in_range = (-62_135_596_800..=253_402_300_799).contains(&seconds);
        if !in_range || !(0..1_000_000_000).contains(&nanos) {
            self.bad(field, "a time between the years 1 and 9999");
            return None;
        }
        Some(Timestamp::from_micros(
            seconds * 1_000_000 + i64::from(nanos) / 1_000,
        ))
    }

    /// Free text by free keys.
    pub fn metadata(&mut self, field: &str, map: HashMap<String, String>) -> Metadata {
        if map.len() > MAP_MAX {
            self.bad(field, format!("at most {MAP_MAX} entries"));
            return Metadata::new();
        }
        let bytes: usize = map.iter().map(|(key, value)| key.len() + value.len()).sum();
        if bytes > MAP_BYTES_MAX {
            self.bad(field, format!("at most {MAP_BYTES_MAX} bytes in all"));
        }
        let mut metadata = BTreeMap::new();
        // By key, so that the same message is always answered the same.
        for (key, value) in map.into_iter().collect::<BTreeMap<_, _>>() {
            if key.is_empty() || key.len() > MAP_KEY_MAX || key.contains('\0') {
                self.bad(field, "made of keys of 1 to 128 bytes without U+0000");
                continue;
            }
            let value = self.text(&format!("{field}[{key}]"), value, VALUE_MAX);
            metadata.insert(key.into(), value);
        }
        metadata
    }
}
