//! Properties of the core: whatever is asked, in whatever order, no balance leaves
//! its range, the ledger replays to the balances, and keeping state between
//! commands makes no difference to the answers.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use remit::domain::amount::{Amount, Amounts, Unit};
use remit::domain::answer::Answer;
use remit::domain::approve::ApprovalRecord;
use remit::domain::budget::{Balance, Budget, BudgetState, CarryOver, Limit, OnExceeded, Terms};
use remit::domain::id::{
    BalanceNo, BudgetNo, IdempotencyKey, KeyHash, Name, ReservationId, Sequence, TenantId,
};
use remit::domain::ledger::{Body, Entry, EntryKind, ProvisionedBudget, Tip};
use remit::domain::period::{Calendar, Period};
use remit::domain::refusal::Refusal;
use remit::domain::request::{
    Action, Ask, Command, Commit, Context, Extend, ExtendBy, Fund, FundOperation, Funding, Grace,
    Metadata, Metrics, Origin, OveragePolicy, Record, RecordOf, Release, Reserve, Resolve, Ttl,
};
use remit::domain::reservation::Reservation;
use remit::domain::scope::{Levels, Scope, Subject};
use remit::domain::state::{Applied, Loaded, Needs, TenantState};
use remit::domain::tenant::{Settings, Tenant, TenantConfig, UnprovisionedRule};
use remit::domain::time::Timestamp;
use remit::domain::verify::{Computed, FoundBy, RawEntry, Verifier};

/// One step of a random history. Reservations are named by when they were made.
#[derive(Debug, Clone)]
enum Step {
    Reserve {
        agent: u8,
        points: i64,
        tokens: Option<i64>,
        policy: Option<OveragePolicy>,
        again: bool,
    },
    Commit {
        of: usize,
        actual: Option<i64>,
        again: bool,
    },
    Release {
        of: usize,
    },
    Extend {
        of: usize,
        by: u64,
        more: Option<i64>,
    },
    Record {
        agent: u8,
        points: i64,
    },
    RecordExpired {
        of: usize,
        points: i64,
    },
    Fund {
        operation: FundOperation,
        amount: i64,
        expires: Option<u64>,
        allocated: Option<i64>,
        credit_surplus: bool,
    },
    Resolve {
        of: usize,
        approve: bool,
    },
    Expire {
        of: usize,
    },
    Reprovision {
        allocation: i64,
    },
    Wait {
        seconds: u64,
    },
}

fn policy() -> impl Strategy<Value = Option<OveragePolicy>> {
    prop_oneof![
        Just(None),
        Just(Some(OveragePolicy::Reject)),
        Just(Some(OveragePolicy::AllowIfAvailable)),
        Just(Some(OveragePolicy::AllowWithOverdraft)),
    ]
}

/// Mostly small amounts, sometimes the largest there are.
fn amount() -> impl Strategy<Value = i64> {
    prop_oneof![8 => 0..60_i64, 1 => Just(i64::MAX), 1 => Just(i64::MAX - 1)]
}

fn step() -> impl Strategy<Value = Step> {
    let operation = prop_oneof![
        Just(FundOperation::Credit),
        Just(FundOperation::Debit),
        Just(FundOperation::Reset),
        Just(FundOperation::ResetSpent),
        Just(FundOperation::RepayDebt),
    ];
    prop_oneof![
        6 => (0..3_u8, amount(), proptest::option::of(amount()), policy(), any::<bool>())
            .prop_map(|(agent, points, tokens, policy, again)| Step::Reserve { agent, points, tokens, policy, again }),
        4 => (0..8_usize, proptest::option::of(amount()), any::<bool>())
            .prop_map(|(of, actual, again)| Step::Commit { of, actual, again }),
        2 => (0..8_usize).prop_map(|of| Step::Release { of }),
        2 => (0..8_usize, 0..90_u64, proptest::option::of(amount()))
            .prop_map(|(of, by, more)| Step::Extend { of, by, more }),
        1 => (0..3_u8, amount()).prop_map(|(agent, points)| Step::Record { agent, points }),
        1 => (0..8_usize, amount()).prop_map(|(of, points)| Step::RecordExpired { of, points }),
        2 => (operation, amount(), proptest::option::of(1..7_200_u64), proptest::option::of(amount()), any::<bool>())
            .prop_map(|(operation, amount, expires, allocated, credit_surplus)| {
                Step::Fund { operation, amount, expires, allocated, credit_surplus }
            }),
        3 => (0..8_usize, any::<bool>()).prop_map(|(of, approve)| Step::Resolve { of, approve }),
        2 => (0..8_usize).prop_map(|of| Step::Expire { of }),
        1 => (0..200_i64).prop_map(|allocation| Step::Reprovision { allocation }),
        2 => (1..4_000_u64).prop_map(|seconds| Step::Wait { seconds }),
    ]
}

fn tenant() -> TenantId {
    TenantId::parse("acme").expect("a tenant")
}

fn budgets(allocation: i64) -> Vec<Budget> {
    let own = |no, scope: &str, unit, period, limit, overdraft, carry_over| Budget {
        no: BudgetNo(no),
        scope: Scope::parse(scope).expect("a scope"),
        unit,
        calendar: Calendar::new(period, "").expect("a calendar"),
        terms: Terms {
            limit,
            overdraft_limit: Amount::new(overdraft).expect("an amount"),
            carry_over,
            state: BudgetState::Active,
        },
        thresholds: Arc::default(),
        on_exceeded: OnExceeded::Deny,
        present: true,
        limit_seq: Sequence(0),
        created_at: Timestamp::default(),
    };
    let limit = |value| Limit::Allocation(Amount::new(value).expect("an amount"));
    use Unit::{Calls, RiskPoints, Tokens};
    vec![
        own(
            1,
            "tenant:acme",
            RiskPoints,
            Period::Total,
            limit(allocation),
            0,
            CarryOver::None,
        ),
        own(
            2,
            "tenant:acme/agent:*",
            RiskPoints,
            Period::Hourly,
            limit(50),
            20,
            CarryOver::Forward,
        ),
        own(
            3,
            "tenant:acme",
            Calls,
            Period::Daily,
            limit(1_000),
            0,
            CarryOver::CapAtAllocated,
        ),
        own(
            4,
            "tenant:acme",
            Tokens,
            Period::Total,
            Limit::Unlimited,
            0,
            CarryOver::None,
        ),
    ]
}

fn config(allocation: i64, limit_seq: Sequence) -> Arc<TenantConfig> {
    let own = Tenant {
        id: tenant(),
        settings: Settings {
            unprovisioned_rule: UnprovisionedRule::RequireAnyBudget,
            ..Settings::default()
        },
        created_at: Timestamp::default(),
    };
    let mut all = budgets(allocation);
    // What an agent's hour has not enough for, a person can grant.
    all[1].on_exceeded = OnExceeded::RequireApproval {
        approvers: Arc::default(),
    };
    all[0].limit_seq = limit_seq;
    Arc::new(TenantConfig::new(own, all))
}

/// What a database would keep, in maps.
#[derive(Default)]
struct Rows {
    entries: Vec<Entry>,
    balances: BTreeMap<BalanceNo, Balance>,
    reservations: HashMap<ReservationId, Reservation>,
    keys: HashMap<KeyHash, Sequence>,
    approvals: HashMap<ReservationId, ApprovalRecord>,
}

impl Rows {
    fn load(&self, state: &mut TenantState, command: &Command, look_up_keys: bool) {
        for _ in 0..8 {
            let mut needs = Needs::default();
            state.needs(command, look_up_keys, &mut needs);
            if needs.is_empty() {
                return;
            }
            let body = |seq: Sequence| {
                let at = usize::try_from(seq.0 - 1).expect("from 1");
                self.entries[at].body.clone()
            };
            let key = |key: &KeyHash| {
                let reserved = self.reservations.get(&ReservationId::of(*key));
                self.keys
                    .get(key)
                    .copied()
                    .or(reserved.map(|r| r.reserve_seq))
            };
            let last = |account: &(BudgetNo, Arc<str>)| {
                self.balances
                    .values()
                    .filter(|b| b.budget == account.0 && b.scope == account.1)
                    .max_by_key(|b| b.window.start)
                    .cloned()
            };
            let by_no = needs
                .balances
                .iter()
                .filter_map(|no| self.balances.get(no).cloned());
            let balances: Vec<_> = by_no
                .chain(needs.accounts.iter().filter_map(last))
                .collect();
            let loaded = Loaded {
                keys: needs
                    .keys
                    .iter()
                    .filter_map(|k| Some((*k, key(k)?)))
                    .collect(),
                bodies: needs
                    .entries
                    .iter()
                    .map(|(k, seq)| (*k, Body::clone(&body(*seq))))
                    .collect(),
                reservations: needs
                    .reservations
                    .iter()
                    .filter_map(|id| self.reservations.get(id).cloned())
                    .collect(),
                balances,
                approvals: needs
                    .approvals
                    .iter()
                    .filter_map(|id| self.approvals.get(id).cloned())
                    .collect(),
                ..Loaded::default()
            };
            state.load(&needs, loaded);
        }
        panic!("what is needed never gets loaded: {command:?}");
    }

    fn store(&mut self, state: &mut TenantState) {
        let changes = state.take_changes();
        self.entries.extend(changes.entries);
        for balance in changes.balances {
            self.balances.insert(balance.no, balance);
        }
        for reservation in changes.reservations {
            let before = self
                .reservations
                .get(&reservation.id)
                .map_or(0, |r| r.version);
            assert_eq!(
                reservation.version,
                before + 1,
                "from the version before it"
            );
            self.reservations.insert(reservation.id, reservation);
        }
        for record in changes.approvals {
            let reservation = self.reservations.get(&record.reservation);
            let waits = reservation.is_some_and(Reservation::is_pending);
            assert_eq!(record.resolution.is_none(), waits, "both say the same");
            self.approvals.insert(record.reservation, record);
        }
        for (key, seq) in changes.keys {
            assert_eq!(self.keys.insert(key, seq), None, "a key is pinned once");
        }
    }
}

/// A tenant whose state is kept between commands, or read anew for each.
struct Run {
    rows: Rows,
    state: TenantState,
    config: Arc<TenantConfig>,
    keeps: bool,
}

impl Run {
    fn new(keeps: bool) -> Self {
        let config = config(100, Sequence(1));
        let mut rows = Rows::default();
        let mut tip = Tip::EMPTY;
        rows.entries
            .push(tip.append(provisioned(&config), Timestamp::default()));
        let state = TenantState::new(config.clone(), tip, BalanceNo(1));
        Self {
            rows,
            state,
            config,
            keeps,
        }
    }

    fn apply(&mut self, command: &Command, now: Timestamp) -> Result<Answer, Refusal> {
        if !self.keeps {
            let (tip, next) = (self.state.tip, self.state.next_balance);
            self.state = TenantState::new(self.config.clone(), tip, next);
        }
        let origin = Origin {
            key: None,
            confinement: None,
            request_id: "r".into(),
            trace_id: "t".into(),
        };
        // Writing a success without a look-up is the database's to refuse; there
        // is none here.
        self.rows.load(&mut self.state, command, true);
        let Applied::Done(outcome) = self.state.apply(command, &origin, now) else {
            panic!("a key that was looked up is known");
        };
        self.rows.store(&mut self.state);
        outcome
    }

    fn reprovision(&mut self, allocation: i64, now: Timestamp) {
        let seq = Sequence(self.state.tip.seq.0 + 1);
        self.config = config(allocation, seq);
        let mut tip = self.state.tip;
        self.rows
            .entries
            .push(tip.append(provisioned(&self.config), now));
        self.state = TenantState::new(self.config.clone(), tip, self.state.next_balance);
    }
}

fn provisioned(config: &TenantConfig) -> Body {
    let mut body = Body::new(tenant(), EntryKind::Provision);
    body.settings = Some(config.tenant.settings.clone());
    body.budgets = config
        .budgets()
        .map(|b| ProvisionedBudget::from(&**b))
        .collect();
    body.budgets.sort_by_key(|b| b.no);
    body
}

fn key(text: String) -> IdempotencyKey {
    IdempotencyKey::parse(&text).expect("a key")
}

fn ask(agent: u8, points: i64, tokens: Option<i64>) -> Ask {
    let amount = |value| Amount::new(value).expect("an amount");
    let mut estimates = Amounts::NONE.with(Unit::RiskPoints, amount(points));
    if let Some(tokens) = tokens {
        estimates.set(Unit::Tokens, amount(tokens));
    }
    let levels = Levels {
        agent: Some(Name::parse(&format!("bot{agent}")).expect("a name")),
        ..Levels::default()
    };
    Ask {
        subject: Subject::new(tenant(), levels, BTreeMap::new())
            .expect("a subject")
            .into(),
        action: Action {
            name: "act".into(),
            kind: None,
            arguments_sha256: None,
        }
        .into(),
        estimates,
        context: Context::default(),
        arguments: None,
        explain: false,
    }
}

/// Turns a step into a command; nothing where it is about a reservation that was
/// never made.
fn command(at: usize, step: &Step, made: &[ReservationId], now: Timestamp) -> Option<Command> {
    let of = |index: &usize| made.get(index % made.len().max(1)).copied();
    let points =
        |value: &i64| Amounts::NONE.with(Unit::RiskPoints, Amount::new(*value).expect("an amount"));
    Some(match step {
        Step::Reserve {
            agent,
            points,
            tokens,
            policy,
            again,
        } => {
            let name = if *again {
                "same".to_owned()
            } else {
                format!("reserve-{at}")
            };
            Command::Reserve(Box::new(Reserve {
                ask: ask(*agent, *points, *tokens),
                key: Some(key(name)),
                ttl: Some(Ttl::new(Duration::from_secs(60)).expect("a ttl")),
                grace: Some(Grace::new(Duration::from_secs(5)).expect("a grace")),
                overage_policy: *policy,
                metadata: Metadata::new(),
            }))
        }
        Step::Commit {
            of: index,
            actual,
            again,
        } => {
            let name = if *again {
                format!("commit-{index}")
            } else {
                format!("commit-at-{at}")
            };
            Command::Commit(Box::new(Commit {
                key: key(name),
                reservation: of(index)?,
                actual: actual.as_ref().map_or(Amounts::NONE, points),
                metrics: Metrics::default(),
                metadata: Metadata::new(),
            }))
        }
        Step::Release { of: index } => Command::Release(Box::new(Release {
            key: key(format!("release-{at}")),
            reservation: of(index)?,
            reason: "".into(),
        })),
        Step::Extend {
            of: index,
            by,
            more,
        } => Command::Extend(Box::new(Extend {
            key: key(format!("extend-{at}")),
            reservation: of(index)?,
            by: ExtendBy::new(Duration::from_secs(*by)).expect("within a day"),
            additional: more.as_ref().map_or(Amounts::NONE, points),
        })),
        Step::Resolve { of: index, approve } => Command::Resolve(Box::new(Resolve {
            key: key(format!("resolve-{at}")),
            reservation: of(index)?,
            approve: *approve,
            groups: Vec::new(),
            approver: "".into(),
            note: "".into(),
        })),
        Step::Record {
            agent,
            points: value,
        } => {
            let ask = ask(*agent, *value, None);
            Command::Record(Box::new(record(
                at,
                RecordOf::Action(Box::new((
                    Subject::clone(&ask.subject),
                    Action::clone(&ask.action),
                ))),
                points(value),
            )))
        }
        Step::RecordExpired {
            of: index,
            points: value,
        } => Command::Record(Box::new(record(
            at,
            RecordOf::Expired(of(index)?),
            points(value),
        ))),
        Step::Fund {
            operation,
            amount,
            expires,
            allocated,
            credit_surplus,
        } => Command::Fund(Box::new(Fund {
            key: key(format!("fund-{at}")),
            funding: Funding {
                scope: Scope::parse("tenant:acme").expect("a scope"),
                unit: Unit::RiskPoints,
                period: Period::Total,
                operation: *operation,
                amount: Amount::new(*amount).expect("an amount"),
                expires_at: expires
                    .filter(|_| *operation == FundOperation::Credit)
                    .map(|s| now.saturating_add(Duration::from_secs(s))),
                allocated: allocated
                    .filter(|_| *operation == FundOperation::ResetSpent)
                    .map(|amount| Amount::new(amount).expect("an amount")),
                credit_surplus: *credit_surplus && *operation == FundOperation::RepayDebt,
                reason: "".into(),
            },
        })),
        Step::Expire { of: index } => Command::Expire(of(index)?),
        Step::Reprovision { .. } | Step::Wait { .. } => return None,
    })
}

fn record(at: usize, of: RecordOf, amounts: Amounts) -> Record {
    Record {
        key: key(format!("record-{at}")),
        of,
        amounts,
        overage_policy: None,
        metrics: Metrics::default(),
        context: Context::default(),
        metadata: Metadata::new(),
    }
}

/// What is owed is owed on the last balance, and periods give out no more together than
/// each of them does, with what people granted.
fn check_account(run: &Run, balances: &[&Balance]) {
    let [first, .., last] = balances else { return };
    for balance in balances.iter().filter(|balance| balance.no != last.no) {
        assert_eq!(balance.debt, Amount::ZERO, "{balance:?}");
    }
    let budget = run.config.budget(first.budget).expect("a budget");
    let (Limit::Allocation(each), CarryOver::Forward) =
        (budget.terms.limit, budget.terms.carry_over)
    else {
        return;
    };
    let between = budget.calendar.windows_between(first.window, last.window);
    let resolved = run
        .rows
        .entries
        .iter()
        .filter(|entry| entry.body.kind == EntryKind::Resolve);
    let granted: i128 = resolved
        .flat_map(|entry| &entry.body.movements)
        .filter(|moved| balances.iter().any(|balance| balance.no == moved.balance))
        .map(|moved| i128::from(moved.granted))
        .sum();
    let most = i128::from(each.get()) * i128::from(between + 2) + granted;
    let given_out: i128 = balances
        .iter()
        .map(|balance| i128::from(each.get()) + i128::from(balance.granted))
        .sum();
    assert!(given_out <= most, "{given_out} of {most}: {balances:?}");
}

/// Held is what open reservations say, and no reservation has let a balance over
/// what it is allocated; the entries alone give the same balances.
fn check(run: &Run) {
    let mut held: BTreeMap<BalanceNo, i128> = BTreeMap::new();
    for reservation in run.rows.reservations.values() {
        if reservation.is_open() {
            for tranche in &reservation.tranches {
                for hold in &tranche.holds {
                    let amount = tranche.amounts.get(hold.1).unwrap_or_default();
                    *held.entry(hold.0).or_default() += i128::from(amount.get());
                }
            }
        }
    }
    for balance in run.rows.balances.values() {
        let wanted = held.get(&balance.no).copied().unwrap_or_default();
        assert_eq!(i128::from(balance.reserved.get()), wanted, "{balance:?}");
        let budget = run.config.budget(balance.budget).expect("a budget");
        assert!(balance.used() <= i128::from(i64::MAX), "{balance:?}");
        assert!(
            balance.debt <= Amount::new(20).expect("an amount"),
            "{balance:?} {budget:?}"
        );
    }

    let mut accounts: BTreeMap<(BudgetNo, Arc<str>), Vec<&Balance>> = BTreeMap::new();
    for balance in run.rows.balances.values() {
        let account = (balance.budget, balance.scope.clone());
        accounts.entry(account).or_default().push(balance);
    }
    for balances in accounts.values() {
        check_account(run, balances);
    }

    let mut verifier = Verifier::new(tenant());
    for entry in &run.rows.entries {
        let raw = RawEntry {
            seq: entry.body.seq,
            time: entry.body.time,
            kind: entry.body.kind.as_str().into(),
            found_by: Some(FoundBy::of(&entry.body)),
            text: entry.text.to_string(),
            prev_hash: entry.prev_hash.0.to_vec(),
            hash: entry.hash.0.to_vec(),
        };
        verifier
            .read(&raw)
            .unwrap_or_else(|problem| panic!("{problem:?}: {}", entry.text));
    }
    verifier
        .check_head(run.state.tip)
        .expect("the end of the chain");
    let stored: BTreeMap<_, _> = run
        .rows
        .balances
        .values()
        .map(|b| {
            let computed = Computed {
                budget: b.budget,
                scope: b.scope.clone(),
                granted: b.granted,
                reserved: b.reserved.get(),
                spent: b.spent.get(),
                debt: b.debt.get(),
                over_limit: b.over_limit.is_some(),
            };
            (b.no, computed)
        })
        .collect();
    verifier
        .check_balances(&stored)
        .expect("the entries give the balances");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn no_history_breaks_a_balance_the_chain_or_the_equality_of_batches(
        steps in proptest::collection::vec(step(), 1..60)
    ) {
        let (mut batch, mut singly) = (Run::new(true), Run::new(false));
        let mut now = Timestamp::from_micros(1_700_000_000_000_000);
        let mut made = Vec::new();
        for (at, step) in steps.iter().enumerate() {
            match step {
                Step::Wait { seconds } => now = now.saturating_add(Duration::from_secs(*seconds)),
                Step::Reprovision { allocation } => {
                    batch.reprovision(*allocation, now);
                    singly.reprovision(*allocation, now);
                }
                step => {
                    let Some(command) = command(at, step, &made, now) else { continue };
                    let before = batch.rows.balances.clone();
                    let kept = batch.apply(&command, now);
                    let anew = singly.apply(&command, now);
                    prop_assert_eq!(&kept, &anew, "one by one, the same answers");
                    if let (Command::Reserve(_), Ok(answer)) = (&command, &kept) {
                        made.extend(answer.lease.map(|lease| lease.reservation));
                        made.extend(answer.waits.as_ref().map(|waits| waits.0));
                        // What a hold was added to has room for it.
                        for (no, after) in &batch.rows.balances {
                            let held_before = before.get(no).map_or(Amount::ZERO, |b| b.reserved);
                            let limit = batch.config.budget(after.budget).expect("a budget").terms.limit;
                            if after.reserved > held_before && !answer.replayed {
                                prop_assert!(after.remaining(limit).is_none_or(|left| left >= 0));
                            }
                        }
                    }
                    check(&batch);
                }
            }
        }
        let texts = |run: &Run| run.rows.entries.iter().map(|e| e.text.clone()).collect::<Vec<_>>();
        prop_assert_eq!(texts(&batch), texts(&singly));
    }
}

#[test]
fn the_largest_credit_is_refused_rather_than_left_to_overflow_later() {
    let mut run = Run::new(true);
    let now = Timestamp::from_micros(1_700_000_000_000_000);
    let fund = |at, operation, amount| {
        let step = Step::Fund {
            operation,
            amount,
            expires: None,
            allocated: None,
            credit_surplus: false,
        };
        command(at, &step, &[], now).expect("a command")
    };
    let credit = run.apply(&fund(0, FundOperation::Credit, i64::MAX), now);
    assert_eq!(credit, Err(Refusal::AmountOverflow));
    run.apply(&fund(1, FundOperation::Reset, 0), now)
        .expect("a balance");
    check(&run);
}

/// A Reserve whose use may become debt.
fn reserve(points: i64) -> Step {
    Step::Reserve {
        agent: 0,
        points,
        tokens: None,
        policy: Some(OveragePolicy::AllowWithOverdraft),
        again: false,
    }
}

#[test]
fn what_is_used_too_much_after_a_period_is_owed_in_the_next_one() {
    let mut run = Run::new(true);
    let hour = Timestamp::from_micros(1_700_002_800_000_000);
    let before = Timestamp::from_micros(hour.as_micros() - 30_000_000);
    let apply = |run: &mut Run, at, step: &Step, made: &[ReservationId], now| {
        let command = command(at, step, made, now).expect("a command");
        let answer = run.apply(&command, now).expect("an answer");
        check(run);
        answer
    };
    // Allocated, held, spent and owed of the agent's hours, in their order.
    let hours = |run: &Run| {
        let hours = run.rows.balances.values().filter(|b| b.budget.0 == 2);
        let amounts = hours.map(|b| {
            (
                50 + b.granted,
                b.reserved.get(),
                b.spent.get(),
                b.debt.get(),
            )
        });
        amounts.collect::<Vec<_>>()
    };
    let lease = |answer: Answer| answer.lease.expect("a hold").reservation;
    let made = [
        lease(apply(&mut run, 0, &reserve(10), &[], before)),
        lease(apply(&mut run, 1, &reserve(10), &[], before)),
    ];
    assert_eq!(hours(&run), [(50, 20, 0, 0)]);
    apply(&mut run, 2, &reserve(1), &[], hour);
    assert_eq!(hours(&run), [(20, 20, 0, 0), (80, 1, 0, 0)]);
    // The 30 that were left have moved on: 15 more than 10 are an overdraft.
    let commit = |of, actual| Step::Commit {
        of,
        actual: Some(actual),
        again: false,
    };
    apply(&mut run, 3, &commit(0, 25), &made, hour);
    assert_eq!(hours(&run), [(20, 10, 10, 0), (80, 1, 0, 15)]);
    // And counts against the limit of 20, whichever hour the next one was let in in.
    let much = command(4, &commit(1, 16), &made, hour).expect("a command");
    let refused = run.apply(&much, hour).expect_err("too much");
    let debt = Amount::new(21).expect("an amount");
    assert!(
        matches!(&refused, Refusal::OverdraftLimitExceeded { debt: of, .. } if *of == debt),
        "{refused:?}"
    );
    check(&run);
}

#[test]
fn what_is_known_late_falls_where_it_was_held_and_is_owed_once() {
    let mut run = Run::new(true);
    let seconds = |hour: i64, seconds: i64| {
        Timestamp::from_micros(1_700_002_800_000_000 + (hour * 3_600 + seconds) * 1_000_000)
    };
    let mut apply = |at, step: &Step, made: &[ReservationId], now| {
        let command = command(at, step, made, now).expect("a command");
        let outcome = run.apply(&command, now);
        check(&run);
        let hours = run.rows.balances.values().filter(|b| b.budget.0 == 2);
        let used: Vec<_> = hours.map(|b| (b.spent.get(), b.debt.get())).collect();
        (outcome, used)
    };
    // Ten of one hour and ten of the next one, not settled in time.
    let (held, _) = apply(0, &reserve(10), &[], seconds(0, -30));
    let made = [held.expect("a hold").lease.expect("a lease").reservation];
    let more = Step::Extend {
        of: 0,
        by: 60,
        more: Some(10),
    };
    apply(1, &more, &made, seconds(0, 1)).0.expect("more");
    let (opened, _) = apply(2, &reserve(0), &[], seconds(1, 1));
    opened.expect("a third hour");
    let record = |points| Step::RecordExpired { of: 0, points };
    // 41 are 21 more than was held; the limit is 20, in however many hours it was held.
    let (refused, used) = apply(3, &record(41), &made, seconds(1, 2));
    assert!(
        matches!(refused, Err(Refusal::OverdraftLimitExceeded { .. })),
        "{refused:?}"
    );
    assert_eq!(used, [(0, 0), (0, 0), (0, 0)]);
    let (recorded, used) = apply(4, &record(35), &made, seconds(1, 2));
    let charged = recorded.expect("a record").charged;
    assert_eq!(charged.get(Unit::RiskPoints), Amount::new(35).ok());
    assert_eq!(used, [(10, 0), (10, 0), (0, 15)]);
}
