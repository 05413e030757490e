//! Approval: a person decides, while the hold waits.
//!
//! An approval is a reservation that waits. It is bound to its subject, action and the
//! hash of its arguments, is decided once, and at its deadline is denied, never granted.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::amount::Amount;
use super::answer::{Answer, Verdict};
use super::budget::{BudgetState, named};
use super::decide::lease;
use super::id::{KeyHash, KeyId, Malformed, Method, ReservationId, Sequence};
use super::ladder::stopped;
use super::ledger::{Body, EntryKind, Movement, Request};
use super::refusal::{Reason, ReasonCode, Refusal};
use super::request::{Origin, Resolve};
use super::reservation::{Hold, Reservation, SettlementKind, Status};
use super::state::TenantState;
use super::tenant::TenantState as State;
use super::time::Timestamp;

/// How long an approval can be decided: 1 s to 30 days, in whole seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ApprovalTimeout(u32);

impl ApprovalTimeout {
    /// Takes 1 s to 30 days.
    pub fn new(duration: Duration) -> Result<Self, Malformed> {
        match u32::try_from(duration.as_secs()) {
            Ok(seconds) if (1..=2_592_000).contains(&seconds) && duration.subsec_nanos() == 0 => {
                Ok(Self(seconds))
            }
            _ => Err(Malformed::new("1s to 2592000s (30 days), in whole seconds")),
        }
    }

    /// As a duration.
    pub fn get(self) -> Duration {
        Duration::from_secs(self.0.into())
    }
}

impl Default for ApprovalTimeout {
    /// Ten minutes.
    fn default() -> Self {
        Self(600)
    }
}

/// Most groups of one approver or rule.
pub const GROUPS_MAX: usize = 16;

/// Groups of which an approver must be in one, for each that asks: one set for each rule
/// or budget. None: anybody who may approve.
pub type Approvers = Vec<Vec<Box<str>>>;

/// What a waiting reservation waits for. Never changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Approval {
    /// Who may decide.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub approvers: Approvers,
    /// Until when; then it is denied.
    pub deadline: Timestamp,
    /// Of the lease that begins when it is approved.
    pub ttl_us: u64,
    /// The key that asked, which can't decide.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requested_by: Option<KeyId>,
    /// Balances that were short and hold nothing: what they lack is granted with the
    /// approval, once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub short: Vec<Hold>,
}

impl Approval {
    /// Whether somebody in these groups may decide.
    pub fn admits(&self, groups: &[Box<str>]) -> bool {
        let in_one = |set: &Vec<Box<str>>| set.iter().any(|group| groups.contains(group));
        self.approvers.iter().all(in_one)
    }
}

named! {
    /// Where an approval stands.
    ApprovalState {
        /// Nobody has decided.
        Pending = "PENDING",
        /// A person let it pass.
        Approved = "APPROVED",
        /// A person refused.
        Rejected = "REJECTED",
        /// Nobody decided in time.
        Expired = "EXPIRED",
        /// The agent gave it up.
        Withdrawn = "WITHDRAWN",
    }
}

/// How an approval ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolution {
    /// How.
    pub state: ApprovalState,
    /// When.
    pub at: Timestamp,
    /// The key that decided; nothing where nobody did.
    pub by: Option<KeyId>,
    /// The person, as the approver's side names them.
    pub approver: Box<str>,
    /// Why.
    pub note: Box<str>,
    /// By which entry.
    pub seq: Sequence,
}

/// An approval as it is kept for people to find.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApprovalRecord {
    /// The reservation that waits.
    pub reservation: ReservationId,
    /// What it waits for.
    pub approval: Arc<Approval>,
    /// When it was asked for.
    pub requested_at: Timestamp,
    /// The entry that asked.
    pub reserve_seq: Sequence,
    /// How it ended; nothing while it waits.
    pub resolution: Option<Resolution>,
}

impl ApprovalRecord {
    /// Of a reservation.
    pub fn of(
        reservation: &Reservation,
        approval: &Arc<Approval>,
        resolution: Option<Resolution>,
    ) -> Self {
        Self {
            reservation: reservation.id,
            approval: approval.clone(),
            requested_at: reservation.created_at,
            reserve_seq: reservation.reserve_seq,
            resolution,
        }
    }

    /// The word for where it stands at `now`: expired as soon as its time is over.
    pub fn state(&self, now: Timestamp) -> ApprovalState {
        match &self.resolution {
            Some(resolution) => resolution.state,
            None if now > self.approval.deadline => ApprovalState::Expired,
            None => ApprovalState::Pending,
        }
    }
}

impl TenantState {
    pub(super) fn resolve(
        &mut self,
        request: &Resolve,
        origin: &Origin,
        now: Timestamp,
    ) -> Result<Answer, Refusal> {
        let reservation = self.reservation(request.reservation, origin)?.clone();
        let key = KeyHash::of(
            &self.config.tenant.id,
            Method::ResolveApproval,
            &request.key,
        );
        let mut body = self.body_of_settlement(EntryKind::Resolve, &reservation, Some(origin));
        body.idempotency_key = Some(request.key.clone());
        body.request = Some(Request {
            approve: Some(request.approve),
            approver: request.approver.clone(),
            reason: request.note.clone(),
            ..Request::default()
        });
        if let Some(answer) = self.replay(Some(key), &body, now) {
            return answer;
        }
        let Some(approval) = reservation.approval.clone() else {
            return Err(Refusal::ReservationNotFound(request.reservation));
        };
        if !reservation.is_pending() {
            return Err(self.resolved_already(&reservation));
        }
        if now > approval.deadline {
            return Err(Refusal::ApprovalExpired {
                at: approval.deadline,
            });
        }
        if origin.key.is_some() && origin.key == approval.requested_by {
            return Err(Refusal::OwnApproval);
        }
        if !approval.admits(&request.groups) {
            return Err(Refusal::NotAnApprover {
                groups: approval.approvers.concat(),
            });
        }
        let answer = if request.approve {
            self.approve(reservation, &approval, body, key, now)?
        } else {
            self.give_back(&reservation, &mut body, now)?;
            self.settled(reservation, SettlementKind::Rejected, body, key, now)
        };
        let state = if request.approve {
            ApprovalState::Approved
        } else {
            ApprovalState::Rejected
        };
        let resolution = Resolution {
            state,
            at: now,
            by: origin.key.clone(),
            approver: request.approver.clone(),
            note: request.note.clone(),
            seq: self.tip.seq,
        };
        self.put_approval(request.reservation, &approval, Some(resolution));
        Ok(answer)
    }

    /// The one who comes second is told who was first.
    fn resolved_already(&self, reservation: &Reservation) -> Refusal {
        let record = self.approval(reservation.id);
        let resolution = record.and_then(|record| record.resolution.clone());
        Refusal::ApprovalResolved {
            state: resolution
                .as_ref()
                .map_or("resolved", |resolution| resolution.state.as_str()),
            by: resolution.map_or_else(String::new, |resolution| {
                let by = resolution.by.map(|key| key.to_string());
                match &*resolution.approver {
                    "" => by.unwrap_or_default(),
                    approver => approver.to_owned(),
                }
            }),
        }
    }

    /// Steps 1 and 5 again, then what was short is granted, and the lease begins.
    fn approve(
        &mut self,
        mut reservation: Reservation,
        approval: &Approval,
        mut body: Body,
        key: KeyHash,
        now: Timestamp,
    ) -> Result<Answer, Refusal> {
        let refused = |code| Refusal::ApprovalStopped {
            reason: Box::new(Reason::of_tenant(code)),
        };
        match self.config.tenant.settings.state {
            State::Active => {}
            State::Suspended => return Err(refused(ReasonCode::TenantSuspended)),
            State::Closed => return Err(refused(ReasonCode::TenantClosed)),
        }
        let subject = self
            .config
            .placed(&reservation.subject, &reservation.action);
        let mut freezes = self.freezes.document.iter();
        if freezes.any(|freeze| freeze.scope.applied_to(&subject).is_some()) {
            return Err(refused(ReasonCode::ScopeFrozen));
        }
        let expires_at = now.saturating_add(Duration::from_micros(approval.ttl_us));
        let lapses_at = expires_at.saturating_add(reservation.grace);
        let numbers = reservation.holds().chain(approval.short.iter().copied());
        let mut accounts = self.accounts(numbers.map(|hold| hold.0), now);
        let cycles = self.config.tenant.settings.cycles.is_some();
        let reserved = reservation.reserved();
        let lines = self.lines(&subject, now);
        let counted = lines
            .iter()
            .filter(|line| !cycles || reserved.get(line.budget.unit).is_some());
        // Those that hold it need not apply any more.
        let holding = accounts.iter().filter_map(|account| {
            let code = match account.budget.terms.state {
                BudgetState::Active => return None,
                BudgetState::Frozen => ReasonCode::BudgetFrozen,
                BudgetState::Closed => ReasonCode::BudgetClosed,
            };
            Some(Reason {
                scope: Some(account.before.scope.clone()),
                unit: Some(account.budget.unit),
                ..Reason::of_tenant(code)
            })
        });
        if let Some(reason) = stopped(counted).into_iter().chain(holding).next() {
            let reason = Box::new(reason);
            return Err(Refusal::ApprovalStopped { reason });
        }
        let Some(tranche) = reservation.tranches.first_mut() else {
            return Err(Refusal::ReservationNotFound(reservation.id));
        };
        for hold in &approval.short {
            let amount = tranche.amounts.get(hold.1).unwrap_or_default();
            let Some(account) = accounts.iter_mut().find(|a| a.before.no == hold.0) else {
                continue;
            };
            let missing = account.after.missing(account.budget.terms.limit, amount);
            // Never more than the action asks for: what was cut below what others hold
            // stays cut.
            let granted = Amount::clamp(missing.unwrap_or(0)).min(amount);
            account.after.grant(granted.get())?;
            account.after.hold(amount, lapses_at)?;
            tranche.holds.push(*hold);
        }
        for account in &mut accounts {
            account.after.lapses_by(lapses_at);
        }
        // From here on nothing can fail.
        reservation.expires_at = expires_at;
        reservation.status = Status::Active;
        for account in accounts {
            let limit = account.budget.terms.limit;
            body.movements
                .push(Movement::between(&account.before, &account.after, limit));
            self.put_balance(account.after);
        }
        body.reserved = reservation.reserved();
        body.expires_at = Some(expires_at);
        let movements = body.movements.clone();
        let seq = self.append(body, now);
        self.pin(Some(key));
        let answer = Answer {
            lease: Some(lease(&reservation, now)),
            balances: self.views(&movements),
            seq: Some(seq),
            ..Answer::new(Verdict::Allow)
        };
        self.put_reservation(reservation);
        Ok(answer)
    }
}
