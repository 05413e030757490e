//! The ledger's months. Each is a table of its own (`ledger_y2026m11`), so that it can
//! be detached and archived whole. Migrations make them ahead of time; what falls into
//! none lands in `ledger_default`, so that no decision is ever refused for want of one.

use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan as _};
use sqlx::{AssertSqlSafe, PgConnection};

use super::{Store, StoreError, sort};
use crate::domain::time::Timestamp as Instant;

/// Months that are made ahead.
const AHEAD: i32 = 12;

/// A calendar month in UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Month(Date);

impl Month {
    /// The month of an instant, in microseconds since 1970.
    pub fn of(micros: i64) -> Result<Self, StoreError> {
        let out_of_range = |_| StoreError::Corrupt("a time beyond the calendar".into());
        let at = Timestamp::from_microsecond(micros).map_err(out_of_range)?;
        Ok(Self(at.to_zoned(TimeZone::UTC).date().first_of_month()))
    }

    fn plus(self, months: i32) -> Result<Self, StoreError> {
        let out_of_range = |_| StoreError::Corrupt("a time beyond the calendar".into());
        let date = self.0.checked_add(months.months()).map_err(out_of_range)?;
        Ok(Self(date))
    }

    /// Its table.
    pub fn table(self) -> String {
        format!("ledger_y{:04}m{:02}", self.0.year(), self.0.month())
    }

    /// The month of a table; nothing where it is not one of ours.
    pub(super) fn of_table(table: &str) -> Option<Self> {
        let (year, month) = table.strip_prefix("ledger_y")?.split_once('m')?;
        Self::from_numbers(year, month)
    }

    /// Parses `2026-11`.
    pub fn parse(text: &str) -> Option<Self> {
        let (year, month) = text.split_once('-')?;
        Self::from_numbers(year, month)
    }

    fn from_numbers(year: &str, month: &str) -> Option<Self> {
        let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
        if (year.len(), month.len()) != (4, 2) || !digits(year) || !digits(month) {
            return None;
        }
        let (year, month) = (year.parse().ok()?, month.parse().ok()?);
        Date::new(year, month, 1).ok().map(Self)
    }

    /// Its first microsecond.
    pub fn start(self) -> Result<i64, StoreError> {
        let start = self.0.to_zoned(TimeZone::UTC);
        let start = start.map_err(|_| StoreError::Corrupt("a time beyond the calendar".into()))?;
        Ok(start.timestamp().as_microsecond())
    }
}

impl Store {
    /// Whether the ledger has a month for an instant.
    pub async fn has_month(&self, at: Instant) -> Result<bool, StoreError> {
        let month = Month::of(at.as_micros())?;
        let mut conn = self.acquire().await?;
        exists(&mut conn, &month.table()).await
    }
}

/// Makes the months from the first entry, or from now, to a year ahead, as far as they
/// are missing. Answers how many were made. Needs the owner of the schema.
///
/// A month of which entries are in `ledger_default` already can't be made any more and
/// is left out; those entries stay where they are.
pub(super) async fn ensure(conn: &mut PgConnection, now_us: i64) -> Result<u32, StoreError> {
    // Only there between two migrations.
    let first_us: Option<i64> = match exists(conn, "ledger_unpartitioned").await? {
        true => {
            sqlx::query_scalar("/* first_entry */ SELECT min(time_us) FROM ledger_unpartitioned")
                .fetch_one(&mut *conn)
                .await
                .map_err(sort)?
        }
        false => None,
    };
    let now = Month::of(now_us)?;
    let first = match first_us {
        Some(first) => Month::of(first)?.min(now),
        None => now,
    };
    make(conn, first, now.plus(AHEAD)?).await
}

/// Makes the months from one to another, both included, as [`ensure`] does.
pub(super) async fn make(
    conn: &mut PgConnection,
    mut month: Month,
    last: Month,
) -> Result<u32, StoreError> {
    let mut made = 0;
    while month <= last {
        let next = month.plus(1)?;
        if !exists(conn, &month.table()).await? && !has_strays(conn, month, next).await? {
            let make = format!(
                "CREATE TABLE {} PARTITION OF ledger FOR VALUES FROM ({}) TO ({})",
                month.table(),
                month.start()?,
                next.start()?
            );
            sqlx::raw_sql(AssertSqlSafe(make))
                .execute(&mut *conn)
                .await
                .map_err(sort)?;
            made += 1;
        }
        month = next;
    }
    Ok(made)
}

async fn exists(conn: &mut PgConnection, table: &str) -> Result<bool, StoreError> {
    sqlx::query_scalar("/* exists */ SELECT to_regclass($1) IS NOT NULL")
        .bind(table)
        .fetch_one(conn)
        .await
        .map_err(sort)
}

/// Whether entries of a month went into the default partition.
async fn has_strays(
    conn: &mut PgConnection,
    month: Month,
    next: Month,
) -> Result<bool, StoreError> {
    sqlx::query_scalar(
        "/* strays */ SELECT EXISTS (SELECT 1 FROM ledger_default WHERE time_us >= $1 AND time_us < $2)",
    )
    .bind(month.start()?)
    .bind(next.start()?)
    .fetch_one(conn)
    .await
    .map_err(sort)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_month_begins_at_midnight_utc_and_ends_with_the_next() {
        let month = Month::of(1_796_083_199_999_999).expect("a month");
        assert_eq!(month.table(), "ledger_y2026m11");
        let next = month.plus(1).expect("a month");
        assert_eq!(next.table(), "ledger_y2026m12");
        assert_eq!(next.start().expect("a time"), 1_796_083_200_000_000);
        assert_eq!(Month::of(1_796_083_200_000_000).expect("a month"), next);
        assert_eq!(Month::of_table("ledger_y2026m12"), Some(next));
        assert_eq!(Month::parse("2026-12"), Some(next));
        for wrong in ["2026-13", "2026-1", "26-12", "+026-12", "2026-12-01", ""] {
            assert_eq!(Month::parse(wrong), None, "{wrong}");
        }
    }
}
