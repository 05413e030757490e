//! A reservation: a hold with a lease, settled exactly once.
//!
//! `PENDING_APPROVAL → ACTIVE → COMMITTED | RELEASED | EXPIRED`, most of them ACTIVE from
//! the start; a pending one can also end as REJECTED, RELEASED or EXPIRED. What it holds stands in tranches:
//! the first from Reserve, further ones from an Extend that fell on other
//! balances (a budget was added, a period began). Each tranche settles on the
//! balances that it was made on.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::amount::{Amounts, Unit};
use super::approve::Approval;
use super::budget::named;
use super::id::{BalanceNo, ReservationId, Sequence};
use super::request::{Action, Context, Grace, Metadata, OveragePolicy};
use super::scope::Subject;
use super::time::Timestamp;

/// One hold on one balance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold(pub BalanceNo, pub Unit);

/// What was held at once: every balance holds its unit's amount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tranche {
    /// By unit.
    pub amounts: Amounts,
    /// On which balances.
    pub holds: Vec<Hold>,
    /// How often the lease was extended since.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub extensions: u32,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands a reference")]
fn is_zero(count: &u32) -> bool {
    *count == 0
}

impl Tranche {
    /// Whether it holds on a balance.
    pub fn is_on(&self, balance: BalanceNo) -> bool {
        self.holds.iter().any(|hold| hold.0 == balance)
    }
}

/// Most tranches of one reservation.
pub const TRANCHES_MAX: usize = 16;

named! {
    /// How a reservation ended.
    SettlementKind {
        /// With the actual use.
        Committed = "COMMITTED",
        /// Unused.
        Released = "RELEASED",
        /// Not in time.
        Expired = "EXPIRED",
        /// By a person's refusal.
        Rejected = "REJECTED",
    }
}

/// How, when and with what a reservation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settlement {
    /// How.
    pub kind: SettlementKind,
    /// When.
    pub at: Timestamp,
    /// By which entry.
    pub seq: Sequence,
    /// With what; nothing but for a commit.
    pub charged: Amounts,
}

/// Where a reservation stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Held until a person decides.
    Pending,
    /// Held.
    Active,
    /// Ended.
    Settled(Settlement),
}

/// A hold on every balance that an action touches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reservation {
    /// Its name.
    pub id: ReservationId,
    /// Counts its changes, from 1: the database takes a change only onto the
    /// version before.
    pub version: i32,
    /// Who reserved.
    pub subject: Arc<Subject>,
    /// What for.
    pub action: Arc<Action>,
    /// Circumstances in which it was let in.
    pub context: Context,
    /// What a larger use than reserved does.
    pub overage_policy: OveragePolicy,
    /// Given by the caller.
    pub metadata: Metadata,
    /// When it was made.
    pub created_at: Timestamp,
    /// The entry that made it.
    pub reserve_seq: Sequence,
    /// When its lease ends; of a pending one, when it can't be approved any more.
    pub expires_at: Timestamp,
    /// How long after that it can still be settled.
    pub grace: Duration,
    /// What it holds, or held.
    pub tranches: Vec<Tranche>,
    /// Where it stands.
    pub status: Status,
    /// What it waited for, if it ever did.
    pub approval: Option<Arc<Approval>>,
}

impl Reservation {
    /// The last instant at which it can be settled; of a pending one, approved.
    pub fn settles_until(&self) -> Timestamp {
        match self.status {
            Status::Pending => self.expires_at,
            _ => self.expires_at.saturating_add(self.grace),
        }
    }

    /// Whether its time, with grace, is over.
    pub fn is_overdue(&self, now: Timestamp) -> bool {
        now > self.settles_until()
    }

    /// Whether it holds anything.
    pub fn is_open(&self) -> bool {
        !matches!(self.status, Status::Settled(_))
    }

    /// Whether it waits for a person.
    pub fn is_pending(&self) -> bool {
        matches!(self.status, Status::Pending)
    }

    /// All that was reserved, by unit.
    pub fn reserved(&self) -> Amounts {
        self.tranches.iter().fold(Amounts::NONE, |sum, tranche| {
            // Extend has checked that the sum fits.
            sum.checked_add(&tranche.amounts).unwrap_or(sum)
        })
    }

    /// The word for where it stands at `now`: expired as soon as its time is
    /// over, whether or not the sweeper has come by.
    pub fn state(&self, now: Timestamp) -> &'static str {
        match self.status {
            Status::Settled(settlement) => settlement.kind.as_str(),
            _ if self.is_overdue(now) => SettlementKind::Expired.as_str(),
            Status::Pending => "PENDING_APPROVAL",
            Status::Active => "ACTIVE",
        }
    }

    /// Every hold of every tranche.
    pub fn holds(&self) -> impl Iterator<Item = Hold> + '_ {
        self.tranches.iter().flat_map(|t| t.holds.iter().copied())
    }

    /// The grace that a request without one gets.
    pub fn default_grace() -> Duration {
        Grace::DEFAULT.get()
    }
}
