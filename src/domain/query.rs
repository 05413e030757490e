//! What can be listed, and by what.

use super::approve::ApprovalState;
use super::id::{BalanceNo, ReservationId, Sequence};
use super::ledger::{ChainHash, Decision, EntryKind};
use super::scope::{Scope, ScopeFilter};
use super::time::Timestamp;

/// Where a reservation stands, as a filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StateFilter {
    /// Held, and its time not over.
    Active,
    /// Settled with the actual use.
    Committed,
    /// Given back.
    Released,
    /// Its time over, swept or not.
    Expired,
    /// Waits for a person, and its time not over.
    Pending,
    /// Refused by a person.
    Rejected,
}

/// Which reservations, newest first.
#[derive(Debug, Clone)]
pub struct ReservationQuery {
    /// Nothing for all.
    pub state: Option<StateFilter>,
    /// The subject must agree with each.
    pub scope: Vec<ScopeFilter>,
    /// Only those made before this one.
    pub before: Option<(Timestamp, ReservationId)>,
    /// At most so many.
    pub limit: i64,
    /// What "its time over" goes by.
    pub now: Timestamp,
}

/// Which balances, by number.
#[derive(Debug, Clone)]
pub struct BalanceQuery {
    /// The balance's scope must name each pair.
    pub scope: Vec<ScopeFilter>,
    /// Only those of this scope.
    pub exact: Option<Scope>,
    /// Also those of periods that are over.
    pub include_past: bool,
    /// Also those of budgets without one in this period.
    pub include_unopened: bool,
    /// Only those after this one.
    pub after: Option<BalanceNo>,
    /// At most so many.
    pub limit: i64,
    /// What "over" goes by.
    pub now: Timestamp,
}

impl BalanceQuery {
    /// Numbers from here on stand for budgets that have no balance yet.
    pub const UNOPENED: i64 = 1 << 62;
}

/// Which approvals, soonest deadline first.
#[derive(Debug, Clone)]
pub struct ApprovalQuery {
    /// Only those in this state.
    pub state: ApprovalState,
    /// Only those after this one.
    pub after: Option<(Timestamp, ReservationId)>,
    /// At most so many.
    pub limit: i64,
    /// What "its time over" goes by.
    pub now: Timestamp,
}

/// Which entries, by sequence.
#[derive(Debug, Clone)]
pub struct EntryQuery {
    /// Empty for all.
    pub kinds: Vec<EntryKind>,
    /// Nothing for all.
    pub decision: Option<Decision>,
    /// Nothing for all.
    pub reservation: Option<ReservationId>,
    /// Only from this time on.
    pub from: Option<Timestamp>,
    /// Only before this time.
    pub until: Option<Timestamp>,
    /// Newest first.
    pub descending: bool,
    /// Only those after this one, in the direction.
    pub after: Option<Sequence>,
    /// At most so many.
    pub limit: i64,
}

/// An entry as it is stored.
#[derive(Debug, Clone)]
pub struct StoredEntry {
    /// Its place.
    pub seq: Sequence,
    /// When it was decided.
    pub time: Timestamp,
    /// What it records.
    pub kind: EntryKind,
    /// What was decided, if anything was.
    pub decision: Option<Decision>,
    /// The bytes that were hashed.
    pub text: String,
    /// Of the entry before.
    pub prev_hash: ChainHash,
    /// Its own.
    pub hash: ChainHash,
}
