//! One tenant as a decision sees it: configuration, the end of its chain, and
//! those balances, reservations and keys that were loaded.
//!
//! A batch is a fold: [`TenantState::apply`] takes one command after the other,
//! each seeing those before it, and gathers what must be written. The state is
//! only as good as the head that it was read at: whoever writes the changes must
//! see to it that the head has not moved since, else throw the state away.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use super::activity::{Activity, ActivityKey};
use super::amount::Amount;
use super::answer::{Answer, BalanceView, Lease, Verdict};
use super::approve::{Approval, ApprovalRecord, Resolution};
use super::budget::{Balance, Budget};
use super::id::{BalanceNo, BudgetNo, KeyHash, ReservationId, Sequence};
use super::ledger::{Body, Entry, EntryKind, Movement, Tip, Versioned};
use super::refusal::Refusal;
use super::request::{Action, Command, Origin, RecordOf};
use super::reservation::Reservation;
use super::scope::Subject;
use super::tenant::{Freeze, TenantConfig};
use super::time::Timestamp;

/// What is known about a budget's account for one scope.
pub type Account = (BudgetNo, Arc<str>);

/// The answer that a key is pinned to.
#[derive(Debug, Clone)]
pub struct Pin {
    /// The entry that recorded it.
    pub seq: Sequence,
    /// That entry, once it was read.
    pub body: Option<Arc<Body>>,
    /// The entry is not in the ledger any more.
    pub archived: bool,
}

impl Pin {
    /// A pin whose entry was not read yet.
    fn to(seq: Sequence) -> Self {
        Self {
            seq,
            body: None,
            archived: false,
        }
    }

    fn with(body: Arc<Body>) -> Self {
        Self {
            seq: body.seq,
            body: Some(body),
            archived: false,
        }
    }
}

/// What a command needs that is not loaded yet.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Keys that may be pinned.
    pub keys: BTreeSet<KeyHash>,
    /// Entries of pinned keys.
    pub entries: BTreeSet<(KeyHash, Sequence)>,
    /// Reservations by id.
    pub reservations: BTreeSet<ReservationId>,
    /// Balances by number.
    pub balances: BTreeSet<BalanceNo>,
    /// The last balances of accounts.
    pub accounts: BTreeSet<Account>,
    /// What agents did of late.
    pub activity: BTreeSet<ActivityKey>,
    /// How approvals ended.
    pub approvals: BTreeSet<ReservationId>,
}

impl Needs {
    /// Whether everything is there.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What was read for some needs: all of it that exists.
#[derive(Debug, Default)]
pub struct Loaded {
    /// Pinned keys.
    pub keys: Vec<(KeyHash, Sequence)>,
    /// Entries of pinned keys.
    pub bodies: Vec<(KeyHash, Body)>,
    /// Reservations.
    pub reservations: Vec<Reservation>,
    /// Balances.
    pub balances: Vec<Balance>,
    /// What agents did of late.
    pub activity: Vec<(ActivityKey, Activity)>,
    /// How approvals ended.
    pub approvals: Vec<ApprovalRecord>,
}

/// What became of a command.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "lives only between a command and its answer"
)]
pub enum Applied {
    /// It was answered or refused.
    Done(Result<Answer, Refusal>),
    /// Nothing: it is no success, and its key has not been looked up. A first
    /// answer may be pinned to it, which comes before any other answer.
    KeyNeeded,
}

/// What a fold wants written, in one transaction with the head.
#[derive(Debug, Default)]
pub struct Changes {
    /// To append, in order.
    pub entries: Vec<Entry>,
    /// To insert or update.
    pub balances: Vec<Balance>,
    /// To insert (version 1) or update (from the version before).
    pub reservations: Vec<Reservation>,
    /// Keys of requests other than Reserve, whose key is its reservation's id.
    pub keys: Vec<(KeyHash, Sequence)>,
    /// To insert or update.
    pub activity: Vec<(ActivityKey, Activity)>,
    /// To store in place of those before, where a rule froze an agent.
    pub freezes: Option<Versioned<Vec<Freeze>>>,
    /// To insert or update.
    pub approvals: Vec<ApprovalRecord>,
}

/// One tenant as a decision sees it.
#[derive(Debug)]
pub struct TenantState {
    /// What operators provisioned.
    pub config: Arc<TenantConfig>,
    /// The end of the chain, with what was appended since.
    pub tip: Tip,
    /// The number that the next opened balance gets.
    pub next_balance: BalanceNo,
    balances: HashMap<BalanceNo, Balance>,
    /// The last balance of each account; nothing where there is none yet.
    accounts: HashMap<Account, Option<BalanceNo>>,
    reservations: HashMap<ReservationId, Option<Reservation>>,
    /// Keys that were looked up; nothing where they are free.
    pins: HashMap<KeyHash, Option<Pin>>,
    /// Keys whose entries are there too.
    pinned_bodies: Vec<KeyHash>,
    activity: HashMap<ActivityKey, Activity>,
    /// Approvals that were looked up, or changed.
    approvals: HashMap<ReservationId, Option<ApprovalRecord>>,
    dirty_approvals: BTreeSet<ReservationId>,
    /// Scopes that are stopped, with those of this fold.
    pub(super) freezes: Versioned<Vec<Freeze>>,
    changes: Changes,
    dirty_activity: BTreeSet<ActivityKey>,
    dirty_balances: BTreeSet<BalanceNo>,
    dirty_reservations: BTreeSet<ReservationId>,
}

impl TenantState {
    /// A state of which nothing but the head is known.
    pub fn new(config: Arc<TenantConfig>, tip: Tip, next_balance: BalanceNo) -> Self {
        let freezes = config.rules.freezes.clone();
        Self {
            config,
            tip,
            next_balance,
            activity: HashMap::new(),
            approvals: HashMap::new(),
            dirty_approvals: BTreeSet::new(),
            freezes,
            dirty_activity: BTreeSet::new(),
            balances: HashMap::new(),
            accounts: HashMap::new(),
            reservations: HashMap::new(),
            pins: HashMap::new(),
            pinned_bodies: Vec::new(),
            changes: Changes::default(),
            dirty_balances: BTreeSet::new(),
            dirty_reservations: BTreeSet::new(),
        }
    }

    /// What a command needs that is not loaded yet. To be asked again after a
    /// load: a reservation names balances, a pinned key an entry.
    ///
    /// A key that was never looked up counts as free: the database refuses it
    /// if it is not. With `look_up_keys` it is looked up first.
    pub fn needs(&self, command: &Command, look_up_keys: bool, needs: &mut Needs) {
        let mut look_up = look_up_keys;
        if let Some(id) = command.reservation() {
            match self.reservations.get(&id) {
                None => {
                    needs.reservations.insert(id);
                }
                Some(Some(reservation)) => {
                    // What is settled already was perhaps settled by this key.
                    look_up |= !reservation.is_open();
                    self.need_balances(reservation.holds().map(|hold| hold.0), needs);
                    if let (Command::Resolve(_), Some(approval)) = (command, &reservation.approval)
                    {
                        self.need_balances(approval.short.iter().map(|hold| hold.0), needs);
                        if !reservation.is_pending() && !self.approvals.contains_key(&id) {
                            needs.approvals.insert(id);
                        }
                    }
                    if let Command::Extend(_) | Command::Resolve(_) = command {
                        self.need_accounts(&reservation.subject, &reservation.action, needs);
                    }
                    if let Command::Commit(_) | Command::Record(_) = command {
                        self.need_later_balances(reservation, needs);
                    }
                }
                Some(None) => {}
            }
        }
        if let Some(key) = command.key_hash(&self.config.tenant.id) {
            match self.pins.get(&key) {
                None if look_up => {
                    needs.keys.insert(key);
                }
                Some(Some(pin)) => match &pin.body {
                    Some(body) => {
                        self.need_balances(body.movements.iter().map(|m| m.balance), needs);
                        // A lease that has ended since has nothing left.
                        let made = body.reservation.filter(|_| body.expires_at.is_some());
                        if let Some(id) = made
                            && !self.reservations.contains_key(&id)
                        {
                            needs.reservations.insert(id);
                        }
                    }
                    None if !pin.archived => {
                        needs.entries.insert((key, pin.seq));
                    }
                    None => {}
                },
                None | Some(None) => {}
            }
        }
        match command {
            Command::Decide(request) => {
                self.need_accounts(&request.ask.subject, &request.ask.action, needs);
            }
            Command::Reserve(request) => {
                self.need_accounts(&request.ask.subject, &request.ask.action, needs);
            }
            Command::Record(request) => {
                if let RecordOf::Action(of) = &request.of {
                    self.need_accounts(&of.0, &of.1, needs);
                }
            }
            Command::Fund(request) => {
                let funding = &request.funding;
                let budget = self
                    .config
                    .budget_for(&funding.scope, funding.unit, funding.period);
                if let Some(budget) = budget {
                    self.need_account((budget.no, funding.scope.text().clone()), needs);
                }
            }
            Command::Commit(_)
            | Command::Release(_)
            | Command::Extend(_)
            | Command::Resolve(_)
            | Command::Expire(_) => {}
        }
    }

    fn need_balances(&self, numbers: impl Iterator<Item = BalanceNo>, needs: &mut Needs) {
        needs
            .balances
            .extend(numbers.filter(|no| !self.balances.contains_key(no)));
    }

    /// The last balances of accounts on which a settlement can make debt.
    fn need_later_balances(&self, reservation: &Reservation, needs: &mut Needs) {
        for hold in reservation.holds() {
            let Some(balance) = self.balances.get(&hold.0) else {
                continue;
            };
            let budget = self.budget_of(balance);
            if balance.window.end.is_some()
                && let Some(budget) = budget.filter(|of| of.terms.overdraft_limit > Amount::ZERO)
            {
                self.need_account((budget.no, balance.scope.clone()), needs);
            }
        }
    }

    /// What [`TenantState::outlook`] needs.
    pub fn need_accounts(&self, subject: &Subject, action: &Action, needs: &mut Needs) {
        let subject = self.config.placed(subject, action);
        for (budget, scope) in self.config.applicable(&subject) {
            self.need_account((budget.no, scope), needs);
        }
        if self.config.reads_activity() {
            let key = ActivityKey::of(&subject, &action.name);
            if !self.activity.contains_key(&key) {
                needs.activity.insert(key);
            }
        }
    }

    fn need_account(&self, account: Account, needs: &mut Needs) {
        match self.accounts.get(&account) {
            None => {
                needs.accounts.insert(account);
            }
            Some(Some(no)) => self.need_balances(std::iter::once(*no), needs),
            Some(None) => {}
        }
    }

    /// Takes what was read for some needs. What was needed and is not among it
    /// does not exist.
    pub fn load(&mut self, needs: &Needs, loaded: Loaded) {
        let Loaded {
            keys,
            bodies,
            reservations,
            balances,
            activity,
            approvals,
        } = loaded;
        for id in &needs.approvals {
            self.approvals.insert(*id, None);
        }
        for record in approvals {
            self.approvals.insert(record.reservation, Some(record));
        }
        for key in &needs.activity {
            self.activity.insert(*key, Activity::default());
        }
        self.activity.extend(activity);
        for key in &needs.keys {
            self.pins.insert(*key, None);
        }
        for (key, seq) in keys {
            self.pins.insert(key, Some(Pin::to(seq)));
        }
        for (key, seq) in &needs.entries {
            let gone = Pin {
                archived: true,
                ..Pin::to(*seq)
            };
            self.pins.insert(*key, Some(gone));
        }
        for (key, body) in bodies {
            self.pins.insert(key, Some(Pin::with(Arc::new(body))));
            self.pinned_bodies.push(key);
        }
        for id in &needs.reservations {
            self.reservations.insert(*id, None);
        }
        for reservation in reservations {
            self.reservations.insert(reservation.id, Some(reservation));
        }
        for account in &needs.accounts {
            self.accounts.insert(account.clone(), None);
        }
        for balance in balances {
            let account = (balance.budget, balance.scope.clone());
            if needs.accounts.contains(&account) {
                let last = self.accounts.entry(account).or_default();
                *last = Some(last.map_or(balance.no, |no| no.max(balance.no)));
            }
            self.balances.insert(balance.no, balance);
        }
    }

    /// Takes one command. What it changed is visible to the next one, and
    /// gathered for [`TenantState::take_changes`]. A refusal moves nothing.
    ///
    /// A success needs no look-up of its key: writing it fails where the key is
    /// taken. An answer that writes no key does.
    pub fn apply(&mut self, command: &Command, origin: &Origin, now: Timestamp) -> Applied {
        let now = now.max(self.tip.time);
        let result = match command {
            Command::Decide(request) => self.decide(request, origin, now),
            Command::Reserve(request) => self.reserve(request, origin, now),
            Command::Commit(request) => self.commit(request, origin, now),
            Command::Release(request) => self.release(request, origin, now),
            Command::Extend(request) => self.extend(request, origin, now),
            Command::Record(request) => self.record(request, origin, now),
            Command::Resolve(request) => self.resolve(request, origin, now),
            Command::Fund(request) => self.fund(request, origin, now),
            Command::Expire(id) => self.expire(*id, now),
        };
        let key = command.key_hash(&self.config.tenant.id);
        match result {
            Err(_) if self.must_know(key).is_err() => Applied::KeyNeeded,
            done => Applied::Done(done),
        }
    }

    /// Refuses to go on where a key was not looked up.
    pub(super) fn must_know(&self, key: Option<KeyHash>) -> Result<(), Refusal> {
        match key {
            Some(key) if !self.pins.contains_key(&key) => Err(Refusal::KeyUnknown),
            _ => Ok(()),
        }
    }

    /// Hands over what must be written.
    pub fn take_changes(&mut self) -> Changes {
        let mut changes = std::mem::take(&mut self.changes);
        let balances = std::mem::take(&mut self.dirty_balances);
        changes.balances = balances
            .into_iter()
            .filter_map(|no| self.balances.get(&no).cloned())
            .collect();
        let activity = std::mem::take(&mut self.dirty_activity);
        changes.activity = activity
            .into_iter()
            .filter_map(|key| Some((key, self.activity.get(&key)?.clone())))
            .collect();
        let approvals = std::mem::take(&mut self.dirty_approvals);
        changes.approvals = approvals
            .into_iter()
            .filter_map(|id| self.approvals.get(&id)?.clone())
            .collect();
        let reservations = std::mem::take(&mut self.dirty_reservations);
        changes.reservations = reservations
            .into_iter()
            .filter_map(|id| self.reservations.get(&id).cloned().flatten())
            .collect();
        changes
    }

    /// Forgets what is not likely to be needed again, and more where too much is
    /// kept. Only between batches.
    pub fn trim(&mut self, settled: &[ReservationId], most: usize) {
        for id in settled {
            self.reservations.remove(id);
        }
        self.approvals.clear();
        if self.reservations.len() > most {
            self.reservations.clear();
        }
        for key in self.pinned_bodies.drain(..) {
            if let Some(Some(pin)) = self.pins.get_mut(&key) {
                pin.body = None;
            }
        }
        if self.pins.len() > most {
            self.pins.clear();
        }
        if self.activity.len() > most {
            self.activity.clear();
        }
        if self.balances.len() > most || self.accounts.len() > most {
            self.balances.clear();
            self.accounts.clear();
        }
    }

    /// How much is kept, in rows.
    pub fn rows(&self) -> usize {
        self.balances.len()
            + self.accounts.len()
            + self.reservations.len()
            + self.pins.len()
            + self.activity.len()
    }

    /// Forgets which keys were used. Only between batches.
    pub fn forget_keys(&mut self) {
        self.pins = HashMap::new();
        self.pinned_bodies.clear();
    }

    pub(super) fn balance(&self, no: BalanceNo) -> Option<&Balance> {
        self.balances.get(&no)
    }

    pub(super) fn last_balance(&self, account: &Account) -> Option<&Balance> {
        let no = (*self.accounts.get(account)?)?;
        self.balances.get(&no)
    }

    pub(super) fn activity(&self, key: ActivityKey) -> Option<&Activity> {
        self.activity.get(&key)
    }

    /// What an agent did of late, to be changed.
    pub(super) fn activity_mut(&mut self, key: ActivityKey) -> &mut Activity {
        self.dirty_activity.insert(key);
        self.activity.entry(key).or_default()
    }

    pub(super) fn approval(&self, id: ReservationId) -> Option<&ApprovalRecord> {
        self.approvals.get(&id)?.as_ref()
    }

    /// Writes an approval down where people find it; `resolution` is nothing while it
    /// waits. The reservation is there already.
    pub(super) fn put_approval(
        &mut self,
        id: ReservationId,
        approval: &Arc<Approval>,
        resolution: Option<Resolution>,
    ) {
        if let Some(Some(reservation)) = self.reservations.get(&id) {
            let record = ApprovalRecord::of(reservation, approval, resolution);
            self.approvals.insert(id, Some(record));
            self.dirty_approvals.insert(id);
        }
    }

    /// Stops a scope, from the next command on.
    pub(super) fn freeze(&mut self, freeze: Freeze) -> Versioned<Vec<Freeze>> {
        let mut all = (*self.freezes.document).clone();
        all.push(freeze);
        self.freezes = Versioned {
            version: self.freezes.version + 1,
            document: Arc::new(all),
        };
        self.changes.freezes = Some(self.freezes.clone());
        self.freezes.clone()
    }

    pub(super) fn put_balance(&mut self, balance: Balance) {
        self.dirty_balances.insert(balance.no);
        self.balances.insert(balance.no, balance);
    }

    /// A new account becomes the last one of its budget and scope.
    pub(super) fn put_opened(&mut self, balance: Balance) {
        self.next_balance = BalanceNo(self.next_balance.0.max(balance.no.0 + 1));
        let account = (balance.budget, balance.scope.clone());
        self.accounts.insert(account, Some(balance.no));
        self.put_balance(balance);
    }

    pub(super) fn put_reservation(&mut self, mut reservation: Reservation) {
        // Several changes in one batch are one change of the row.
        if !self.dirty_reservations.contains(&reservation.id) {
            reservation.version += 1;
        }
        self.dirty_reservations.insert(reservation.id);
        self.reservations.insert(reservation.id, Some(reservation));
    }

    /// The reservation, if it exists and the caller may see it.
    pub(super) fn reservation(
        &self,
        id: ReservationId,
        origin: &Origin,
    ) -> Result<&Reservation, Refusal> {
        let visible = |reservation: &&Reservation| {
            origin
                .confinement
                .as_ref()
                .is_none_or(|prefix| prefix.matches(&reservation.subject))
        };
        self.reservations
            .get(&id)
            .and_then(Option::as_ref)
            .filter(visible)
            .ok_or(Refusal::ReservationNotFound(id))
    }

    /// Appends an entry.
    pub(super) fn append(&mut self, body: Body, now: Timestamp) -> Sequence {
        let entry = self.tip.append(body, now);
        let seq = entry.body.seq;
        self.changes.entries.push(entry);
        seq
    }

    /// Pins a key to the entry that was appended last.
    pub(super) fn pin(&mut self, command_key: Option<KeyHash>) {
        let Some((key, entry)) = command_key.zip(self.changes.entries.last()) else {
            return;
        };
        let seq = entry.body.seq;
        let pin = Pin::with(entry.body.clone());
        if entry.body.kind != EntryKind::Reserve {
            self.changes.keys.push((key, seq));
        }
        self.pins.insert(key, Some(pin));
        self.pinned_bodies.push(key);
    }

    /// The first answer again, if the key was used for the same request.
    /// `probe` is the request as its entry would record it.
    pub(super) fn replay(
        &self,
        key: Option<KeyHash>,
        probe: &Body,
        now: Timestamp,
    ) -> Option<Result<Answer, Refusal>> {
        let pin = self.pins.get(&key?)?.as_ref()?;
        if pin.archived {
            return Some(Err(Refusal::AnswerArchived));
        }
        let body = pin.body.as_ref()?;
        if let Some(field) = body.first_difference(probe) {
            return Some(Err(Refusal::IdempotencyMismatch { field }));
        }
        Some(Ok(self.answer_of(body, now)))
    }

    /// The approval that was asked for under a key.
    pub(super) fn approval_under(&self, key: Option<KeyHash>) -> Option<ReservationId> {
        let pin = self.pins.get(&key?)?.as_ref()?;
        let body = pin.body.as_ref()?;
        body.approval.as_ref().and(body.reservation)
    }

    /// The answer that an entry recorded.
    fn answer_of(&self, body: &Body, now: Timestamp) -> Answer {
        let lease = body
            .reservation
            .zip(body.expires_at)
            .map(|(id, expires_at)| {
                let found = self.reservations.get(&id).and_then(Option::as_ref);
                let ended = found.is_some_and(|reservation| !reservation.is_open());
                Lease {
                    reservation: id,
                    reserved: body.reserved,
                    expires_at,
                    remaining: if ended {
                        Duration::ZERO
                    } else {
                        expires_at.since(now)
                    },
                }
            });
        Answer {
            lease,
            waits: body.reservation.zip(body.approval.clone()),
            charged: body.charged,
            released: body.released,
            uncovered: body.uncovered,
            balances: self.views(&body.movements),
            funded_from: self.funded_from(body.kind, &body.movements),
            seq: Some(body.seq),
            replayed: true,
            explanation: body.explanation.clone(),
            ..Answer::new(Verdict::recorded(body))
        }
    }

    /// Balances as some movements left them.
    pub(super) fn views(&self, movements: &[Movement]) -> Vec<BalanceView> {
        movements
            .iter()
            .filter_map(|movement| {
                let balance = self.balances.get(&movement.balance)?;
                let budget = self.config.budget(balance.budget)?;
                Some(BalanceView::at(balance, budget, movement.after))
            })
            .collect()
    }

    /// A funded balance as it was before.
    pub(super) fn funded_from(
        &self,
        kind: EntryKind,
        movements: &[Movement],
    ) -> Option<Box<BalanceView>> {
        let movement = movements.first().filter(|_| kind == EntryKind::Fund)?;
        let balance = self.balances.get(&movement.balance)?;
        let budget = self.config.budget(balance.budget)?;
        Some(Box::new(BalanceView::at(
            balance,
            budget,
            movement.before(),
        )))
    }

    /// The budget of a balance. Budgets are never deleted, so that it is always
    /// there.
    pub(super) fn budget_of(&self, balance: &Balance) -> Option<&Arc<Budget>> {
        self.config.budget(balance.budget)
    }
}
