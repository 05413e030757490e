//! Extend: more time for a hold, and perhaps more of a unit.

use super::amount::Amounts;
use super::answer::{Answer, Verdict};
use super::decide::{extended, lease, micros, said};
use super::id::{BalanceNo, KeyHash, Method};
use super::ledger::{EntryKind, Request};
use super::line::Line;
use super::refusal::Refusal;
use super::request::{Extend, Origin};
use super::reservation::{Reservation, TRANCHES_MAX, Tranche};
use super::settle::must_settle;
use super::state::TenantState;
use super::time::Timestamp;

impl TenantState {
    pub(super) fn extend(
        &mut self,
        request: &Extend,
        origin: &Origin,
        now: Timestamp,
    ) -> Result<Answer, Refusal> {
        let mut reservation = self.reservation(request.reservation, origin)?.clone();
        let key = KeyHash::of(&self.config.tenant.id, Method::Extend, &request.key);
        let mut body = self.body_of_settlement(EntryKind::Extend, &reservation, Some(origin));
        body.idempotency_key = Some(request.key.clone());
        body.request = Some(Request {
            amounts: request.additional,
            extend_by_us: Some(micros(request.by.get())),
            ..Request::default()
        });
        if let Some(answer) = self.replay(Some(key), &body, now) {
            return answer;
        }
        self.may_still_settle()?;
        must_settle(&reservation, now)?;
        if now > reservation.expires_at {
            return Err(Refusal::ReservationExpired {
                at: reservation.expires_at,
            });
        }
        let extensions: u32 = reservation
            .tranches
            .iter()
            .map(|held| held.extensions)
            .sum();
        let cycles = &self.config.tenant.settings.cycles;
        if cycles.is_some_and(|rules| extensions >= rules.max_extensions) {
            return Err(Refusal::TooManyExtensions);
        }
        // There the count is the bound.
        let bounded = cycles.is_none();
        let expires_at = extended(&reservation, request.by, bounded, now)?;
        let lapses_at = expires_at.saturating_add(reservation.grace);

        let (mut verdict, mut more) = (Verdict::Allow, None);
        if !request.additional.is_empty() {
            let (decided, held) =
                self.decide_more(&reservation, &request.additional, lapses_at, now)?;
            body.explanation = decided.explanation.clone();
            if !decided.verdict.permits() {
                self.must_know(Some(key))?;
                body = said(body, &decided.verdict);
                body.movements = self.looked_at(&decided.lines);
                let movements = body.movements.clone();
                let seq = self.append(body, now);
                let (subject, action) = (&reservation.subject, &reservation.action);
                self.escalate(subject, action, &decided, origin, now);
                return Ok(Answer {
                    lease: Some(lease(&reservation, now)),
                    balances: self.views(&movements),
                    seq: Some(seq),
                    ..Answer::new(decided.verdict)
                });
            }
            verdict = decided.verdict.clone();
            more = Some(decided);
            check_tranches(&reservation, &request.additional, &held)?;
            // From here on nothing can fail.
            let tranche = self.keep_holds(&held, &mut body, now);
            add_tranche(&mut reservation, tranche);
        } else {
            let accounts = self.accounts(reservation.holds().map(|hold| hold.0), now);
            self.keep_accounts(accounts, &mut body);
        }
        reservation.expires_at = expires_at;
        if let Some(last) = reservation.tranches.last_mut() {
            last.extensions = last.extensions.saturating_add(1);
        }
        body = said(body, &verdict);
        body.reserved = reservation.reserved();
        body.expires_at = Some(expires_at);
        let movements = body.movements.clone();
        let seq = self.append(body, now);
        self.pin(Some(key));
        if let Some(decided) = &more {
            let (subject, action) = (&reservation.subject, &reservation.action);
            self.escalate(subject, action, decided, origin, now);
        }
        let answer = Answer {
            lease: Some(lease(&reservation, now)),
            balances: self.views(&movements),
            seq: Some(seq),
            ..Answer::new(verdict)
        };
        self.put_reservation(reservation);
        Ok(answer)
    }
}

/// Refuses an extension that would make more tranches than a reservation may
/// have, or more of a unit than fits.
fn check_tranches(
    reservation: &Reservation,
    additional: &Amounts,
    held: &[Line],
) -> Result<(), Refusal> {
    reservation
        .reserved()
        .checked_add(additional)
        .ok_or(Refusal::AmountOverflow)?;
    let merges = reservation
        .tranches
        .last()
        .is_some_and(|last| merges(last, held.iter().map(|line| line.balance.no)));
    if !merges && reservation.tranches.len() >= TRANCHES_MAX {
        return Err(Refusal::TooManyExtensions);
    }
    Ok(())
}

/// Whether a further hold on these balances can be added to a tranche.
fn merges(tranche: &Tranche, further: impl Iterator<Item = BalanceNo>) -> bool {
    let further: Vec<_> = further.collect();
    // Every balance of the units that are added, and no other one.
    let units: Vec<_> = tranche
        .holds
        .iter()
        .filter(|hold| further.contains(&hold.0))
        .map(|hold| hold.1)
        .collect();
    let of_units = tranche
        .holds
        .iter()
        .filter(|hold| units.contains(&hold.1))
        .count();
    of_units == further.len() && units.len() == further.len()
}

fn add_tranche(reservation: &mut Reservation, tranche: Tranche) {
    if let Some(last) = reservation.tranches.last_mut()
        && merges(last, tranche.holds.iter().map(|hold| hold.0))
        && let Some(amounts) = last.amounts.checked_add(&tranche.amounts)
    {
        last.amounts = amounts;
        return;
    }
    reservation.tranches.push(tranche);
}
