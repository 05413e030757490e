//! Periods: which window an instant falls into, by the calendar of a time zone.

use std::fmt;

use jiff::Zoned;
use jiff::civil::Weekday;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};

use super::id::Malformed;
use super::time::Timestamp;

/// How often an allocation is renewed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Period {
    /// Never.
    Total,
    /// At each full hour.
    Hourly,
    /// At each midnight.
    Daily,
    /// At each Monday's midnight.
    Weekly,
    /// At the first midnight of each month.
    Monthly,
}

impl Period {
    /// Every period.
    pub const ALL: [Self; 5] = [
        Self::Total,
        Self::Hourly,
        Self::Daily,
        Self::Weekly,
        Self::Monthly,
    ];

    /// Its name in the protocol, the ledger and the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Total => "TOTAL",
            Self::Hourly => "HOURLY",
            Self::Daily => "DAILY",
            Self::Weekly => "WEEKLY",
            Self::Monthly => "MONTHLY",
        }
    }

    /// The period of that name.
    pub fn parse(text: &str) -> Result<Self, Malformed> {
        Self::ALL
            .into_iter()
            .find(|period| period.as_str() == text)
            .ok_or_else(|| Malformed::new("a period"))
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// From `start` on and before `end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Window {
    /// The first instant; the beginning of time for a window without an end.
    pub start: Timestamp,
    /// The first instant after it; nothing for `TOTAL`.
    pub end: Option<Timestamp>,
}

impl Window {
    /// The window of `TOTAL`.
    pub const ALWAYS: Self = Self {
        start: Timestamp::from_micros(0),
        end: None,
    };

    /// Whether the window is over.
    pub fn is_over(&self, now: Timestamp) -> bool {
        self.end.is_some_and(|end| end <= now)
    }
}

/// A period in a time zone.
#[derive(Debug, Clone)]
pub struct Calendar {
    period: Period,
    zone_name: Box<str>,
    zone: TimeZone,
}

impl Calendar {
    /// The calendar of `TOTAL`.
    pub fn total() -> Self {
        Self {
            period: Period::Total,
            zone_name: "UTC".into(),
            zone: TimeZone::UTC,
        }
    }

    /// Takes an IANA zone name; the empty one is UTC. Zones come from the
    /// database within this program, not from the machine's.
    pub fn new(period: Period, zone_name: &str) -> Result<Self, Malformed> {
        if zone_name.is_empty() || zone_name == "UTC" {
            return Ok(Self {
                period,
                ..Self::total()
            });
        }
        if period == Period::Total {
            return Err(Malformed::new("empty for a budget without a period"));
        }
        let zone = jiff::tz::db()
            .get(zone_name)
            .map_err(|_| Malformed::new("an IANA time zone, for example Europe/Berlin"))?;
        Ok(Self {
            period,
            zone_name: zone_name.into(),
            zone,
        })
    }

    /// How often.
    pub fn period(&self) -> Period {
        self.period
    }

    /// The zone as it was given, `UTC` by default.
    pub fn zone_name(&self) -> &str {
        &self.zone_name
    }

    /// The window that `now` falls into.
    pub fn window(&self, now: Timestamp) -> Window {
        let local = now.to_jiff().to_zoned(self.zone.clone());
        let today = local.date();
        let days = match self.period {
            Period::Total => return Window::ALWAYS,
            Period::Hourly => return self.hour(&local),
            Period::Daily => today.tomorrow().ok().map(|next| (today, next)),
            Period::Weekly => {
                let since_monday = i64::from(today.weekday().since(Weekday::Monday));
                today
                    .checked_sub(jiff::Span::new().days(since_monday))
                    .and_then(|first| Ok((first, first.checked_add(jiff::Span::new().days(7))?)))
                    .ok()
            }
            Period::Monthly => {
                let first = today.first_of_month();
                first
                    .checked_add(jiff::Span::new().months(1))
                    .ok()
                    .map(|next| (first, next))
            }
        };
        let bounds = days.and_then(|(first, next)| {
            let midnight = |date: jiff::civil::Date| date.to_zoned(self.zone.clone()).ok();
            Some((midnight(first)?, midnight(next)?))
        });
        // Only the last year of the calendar has no next day: then the window
        // stays open, which renews nothing.
        bounds.map_or(
            Window {
                start: now,
                end: None,
            },
            |(start, end)| Window {
                start: from_zoned(&start),
                end: Some(from_zoned(&end)),
            },
        )
    }

    /// Hours are counted on the zone's own clock, so that zones with offsets of
    /// half an hour renew at their full hour.
    fn hour(&self, local: &Zoned) -> Window {
        const HOUR: i64 = 3_600;
        let offset = i64::from(local.offset().seconds());
        let second = local.timestamp().as_second();
        let start = second - (second + offset).rem_euclid(HOUR);
        let micros = |second: i64| Timestamp::from_micros(second.saturating_mul(1_000_000));
        Window {
            start: micros(start),
            end: Some(micros(start + HOUR)),
        }
    }

    /// How many whole windows lie between two windows, `from` the earlier one.
    pub fn windows_between(&self, from: Window, to: Window) -> i64 {
        let civil = |at: Timestamp| at.to_jiff().to_zoned(self.zone.clone()).date();
        let (first, last) = (civil(from.start), civil(to.start));
        let days = || {
            last.since((jiff::Unit::Day, first))
                .map_or(0, |span| i64::from(span.get_days()))
        };
        let distance = match self.period {
            Period::Total => 0,
            Period::Hourly => {
                let micros = to.start.as_micros().saturating_sub(from.start.as_micros());
                micros / 3_600_000_000
            }
            Period::Daily => days(),
            Period::Weekly => days() / 7,
            Period::Monthly => {
                let months = |d: jiff::civil::Date| i64::from(d.year()) * 12 + i64::from(d.month());
                months(last) - months(first)
            }
        };
        (distance - 1).max(0)
    }
}

impl PartialEq for Calendar {
    fn eq(&self, other: &Self) -> bool {
        self.period == other.period && self.zone_name == other.zone_name
    }
}

impl Eq for Calendar {}

fn from_zoned(at: &Zoned) -> Timestamp {
    Timestamp::from_micros(at.timestamp().as_microsecond())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        Timestamp::parse(text).expect("a time")
    }

    fn window(period: Period, zone: &str, now: &str) -> (String, String) {
        let window = Calendar::new(period, zone)
            .expect("a calendar")
            .window(at(now));
        let end = window.end.expect("an end");
        (window.start.to_string(), end.to_string())
    }

    #[test]
    fn windows_follow_the_calendar_of_their_zone() {
        for (period, zone, now, start, end) in [
            (
                Period::Hourly,
                "UTC",
                "2026-03-01T10:20:30Z",
                "2026-03-01T10:00:00",
                "2026-03-01T11:00:00",
            ),
            (
                Period::Hourly,
                "Asia/Kolkata",
                "2026-03-01T10:20:30Z",
                "2026-03-01T09:30:00",
                "2026-03-01T10:30:00",
            ),
            (
                Period::Daily,
                "Europe/Berlin",
                "2026-07-01T22:30:00Z",
                "2026-07-01T22:00:00",
                "2026-07-02T22:00:00",
            ),
            // Clocks go forward: this day has 23 hours.
            (
                Period::Daily,
                "Europe/Berlin",
                "2026-03-29T12:00:00Z",
                "2026-03-28T23:00:00",
                "2026-03-29T22:00:00",
            ),
            // And this one 25.
            (
                Period::Daily,
                "Europe/Berlin",
                "2026-10-25T12:00:00Z",
                "2026-10-24T22:00:00",
                "2026-10-25T23:00:00",
            ),
            (
                Period::Weekly,
                "UTC",
                "2026-11-20T12:00:00Z",
                "2026-11-16T00:00:00",
                "2026-11-23T00:00:00",
            ),
            (
                Period::Monthly,
                "UTC",
                "2026-02-28T23:59:59Z",
                "2026-02-01T00:00:00",
                "2026-03-01T00:00:00",
            ),
        ] {
            let (from, to) = window(period, zone, now);
            assert_eq!(from, format!("{start}.000000Z"), "{period} {zone} {now}");
            assert_eq!(to, format!("{end}.000000Z"), "{period} {zone} {now}");
        }
    }

    #[test]
    fn a_window_ends_where_the_next_begins() {
        for period in [
            Period::Hourly,
            Period::Daily,
            Period::Weekly,
            Period::Monthly,
        ] {
            let calendar = Calendar::new(period, "America/New_York").expect("a calendar");
            let mut window = calendar.window(at("2026-10-20T00:00:00Z"));
            for _ in 0..40 {
                let end = window.end.expect("an end");
                let next = calendar.window(end);
                assert_eq!(next.start, end, "{period}");
                assert_eq!(calendar.windows_between(window, next), 0, "{period}");
                window = next;
            }
        }
    }

    #[test]
    fn skipped_windows_are_counted() {
        for (period, from, to, between) in [
            (
                Period::Hourly,
                "2026-01-01T00:10:00Z",
                "2026-01-01T05:10:00Z",
                4,
            ),
            (
                Period::Daily,
                "2026-01-01T00:00:00Z",
                "2026-01-04T00:00:00Z",
                2,
            ),
            (
                Period::Weekly,
                "2026-01-01T00:00:00Z",
                "2026-01-29T00:00:00Z",
                3,
            ),
            (
                Period::Monthly,
                "2025-11-01T00:00:00Z",
                "2026-02-01T00:00:00Z",
                2,
            ),
        ] {
            let calendar = Calendar::new(period, "UTC").expect("a calendar");
            let counted =
                calendar.windows_between(calendar.window(at(from)), calendar.window(at(to)));
            assert_eq!(counted, between, "{period}");
        }
    }

    #[test]
    fn unknown_zones_are_refused() {
        assert!(Calendar::new(Period::Daily, "Mars/Olympus").is_err());
        assert!(Calendar::new(Period::Total, "Europe/Berlin").is_err());
    }
}
