//! Verification: recomputes a chain and its balances from the entries alone.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::amount::Amount;
use super::budget::Limit;
use super::catalogue::Tool;
use super::id::{BalanceNo, BudgetNo, Sequence, TenantId};
use super::ledger::{
    After, Body, ChainHash, EntryKind, Movement, ProvisionedBudget, Tip, Versioned,
};
use super::policy::PolicyDocument;
use super::tenant::{Freeze, Settings};
use super::time::Timestamp;

/// An entry as it is stored.
#[derive(Debug, Clone)]
pub struct RawEntry {
    /// Its key.
    pub seq: Sequence,
    /// As stored beside the body.
    pub time: Timestamp,
    /// As stored beside the body.
    pub kind: String,
    /// What else stands beside the body; nothing in an archive, which has only the body.
    pub found_by: Option<FoundBy>,
    /// The bytes that were hashed.
    pub text: String,
    /// As stored.
    pub prev_hash: Vec<u8>,
    /// As stored.
    pub hash: Vec<u8>,
}

/// What entries are found by, as stored beside the body: a list leaves out what says
/// something else here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundBy {
    /// What was decided.
    pub decision: Option<String>,
    /// The bytes of the reservation's id.
    pub reservation: Option<Vec<u8>>,
}

impl FoundBy {
    /// As an entry has to be found.
    pub fn of(body: &Body) -> Self {
        let reservation = body.reservation.as_ref();
        Self {
            decision: body.decision.map(|decision| decision.as_str().to_owned()),
            reservation: reservation.map(|id| id.as_bytes().to_vec()),
        }
    }
}

/// What is wrong, and where it shows first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The first bad entry; nothing where it is a balance or a budget.
    pub seq: Option<Sequence>,
    /// One sentence.
    pub text: String,
}

/// What a verification found.
#[derive(Debug, Clone)]
pub struct Report {
    /// How many entries the chain has, with archived ones.
    pub entries: i64,
    /// How many of them are archived and were not read.
    pub archived: i64,
    /// The last one.
    pub last: Tip,
    /// The first difference; nothing for an intact ledger.
    pub problem: Option<Problem>,
}

/// A balance as the entries make it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Computed {
    /// Whose account.
    pub budget: BudgetNo,
    /// Its scope.
    pub scope: Arc<str>,
    /// Added to the budget's allocation.
    pub granted: i64,
    /// Held.
    pub reserved: i64,
    /// Used.
    pub spent: i64,
    /// Owed.
    pub debt: i64,
    /// The mark of a capped use.
    pub over_limit: bool,
}

/// Where a chain was archived up to, and what its entries had made by then: the rest can
/// be verified from here without them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// The last archived entry.
    pub tip: Tip,
    /// What the entries had made.
    pub made: Made,
}

/// What entries make: all that is kept beside a chain.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Made {
    balances: BTreeMap<BalanceNo, Computed>,
    budgets: BTreeMap<BudgetNo, ProvisionedBudget>,
    settings: Option<Settings>,
    #[serde(default)]
    catalogue: Versioned<Vec<Tool>>,
    #[serde(default)]
    policy: Versioned<PolicyDocument>,
    #[serde(default)]
    freezes: Versioned<Vec<Freeze>>,
}

/// Reads a chain from its first entry on, or from a checkpoint.
#[derive(Debug)]
pub struct Verifier {
    tenant: TenantId,
    tip: Tip,
    made: Made,
}

impl Verifier {
    /// Nothing was read yet.
    pub fn new(tenant: TenantId) -> Self {
        Self {
            tenant,
            tip: Tip::EMPTY,
            made: Made::default(),
        }
    }

    /// Everything up to a checkpoint was read.
    pub fn resume(tenant: TenantId, checkpoint: Checkpoint) -> Self {
        Self {
            tenant,
            tip: checkpoint.tip,
            made: checkpoint.made,
        }
    }

    /// What is known after what was read.
    pub fn checkpoint(&self) -> Checkpoint {
        Checkpoint {
            tip: self.tip,
            made: self.made.clone(),
        }
    }

    /// Reads the next entry as it is stored, in the order of sequences.
    pub fn read(&mut self, entry: &RawEntry) -> Result<(), Problem> {
        let bad = |text: String| Problem {
            seq: Some(entry.seq),
            text,
        };
        let expected = Sequence(self.tip.seq.0 + 1);
        if entry.seq != expected {
            return Err(Problem {
                seq: Some(expected),
                text: format!("entry {expected} is missing: {} follows", entry.seq),
            });
        }
        if ChainHash::from_stored(&entry.prev_hash) != Some(self.tip.hash) {
            return Err(bad("prev_hash is not the hash of the entry before".into()));
        }
        let hash = self.tip.hash.next(&entry.text);
        if ChainHash::from_stored(&entry.hash) != Some(hash) {
            return Err(bad("the hash is not that of prev_hash and body".into()));
        }
        let body: Body = serde_json::from_str(&entry.text)
            .map_err(|_| bad("the body is not an entry".into()))?;
        let beside = body.tenant == self.tenant
            && body.seq == entry.seq
            && body.time == entry.time
            && body.kind.as_str() == entry.kind;
        if !beside {
            return Err(bad(
                "the body says another tenant, sequence, time or kind".into()
            ));
        }
        let found_by = entry.found_by.as_ref();
        if found_by.is_some_and(|found_by| *found_by != FoundBy::of(&body)) {
            return Err(bad(
                "the body says another decision or reservation than is stored beside it".into(),
            ));
        }
        if body.time < self.tip.time {
            return Err(bad("the entry is older than the one before".into()));
        }
        self.replay(&body).map_err(bad)?;
        self.tip = Tip {
            seq: entry.seq,
            hash,
            time: body.time,
        };
        Ok(())
    }

    fn replay(&mut self, body: &Body) -> Result<(), String> {
        if let Some(settings) = &body.settings {
            self.made.settings = Some(settings.clone());
        }
        if let Some(catalogue) = &body.catalogue {
            self.made.catalogue = catalogue.clone();
        }
        if let Some(policy) = &body.policy {
            self.made.policy = policy.clone();
        }
        if let Some(freezes) = &body.freezes {
            self.made.freezes = freezes.clone();
        }
        for budget in &body.budgets {
            self.made.budgets.insert(budget.no, budget.clone());
        }
        if let (EntryKind::BalanceOpened, Some(opened)) = (body.kind, &body.opened) {
            let computed = Computed {
                budget: opened.budget,
                scope: opened.scope.clone(),
                granted: 0,
                reserved: 0,
                spent: 0,
                debt: 0,
                over_limit: false,
            };
            if self
                .made
                .balances
                .insert(opened.balance, computed)
                .is_some()
            {
                return Err(format!("balance {} is opened twice", opened.balance));
            }
        }
        body.movements.iter().try_for_each(|m| self.movement(m))
    }

    fn movement(&mut self, movement: &Movement) -> Result<(), String> {
        let no = movement.balance;
        let balance = self
            .made
            .balances
            .get_mut(&no)
            .ok_or_else(|| format!("balance {no} was never opened"))?;
        let add = |field: &mut i64, by: i64| {
            *field = field.checked_add(by)?;
            Some(())
        };
        let added = add(&mut balance.granted, movement.granted)
            .and_then(|()| add(&mut balance.reserved, movement.reserved))
            .and_then(|()| add(&mut balance.spent, movement.spent))
            .and_then(|()| add(&mut balance.debt, movement.debt));
        if added.is_none() || balance.reserved < 0 || balance.spent < 0 || balance.debt < 0 {
            return Err(format!("balance {no} leaves its range"));
        }
        if let Some(over) = movement.over_limit {
            balance.over_limit = over;
        }
        let limit = self
            .made
            .budgets
            .get(&balance.budget)
            .map(|b| b.terms.limit);
        let allocated = match limit {
            Some(Limit::Allocation(amount)) => Some(Amount::clamp(
                i128::from(amount.get()) + i128::from(balance.granted),
            )),
            Some(Limit::Unlimited) => None,
            None => return Err(format!("budget {} was never provisioned", balance.budget)),
        };
        let amount = |value: i64| Amount::clamp(i128::from(value));
        let after = After(
            allocated,
            amount(balance.reserved),
            amount(balance.spent),
            amount(balance.debt),
        );
        if after != movement.after {
            return Err(format!(
                "balance {no} is not what the entry says it was then"
            ));
        }
        Ok(())
    }

    /// The end of what was read.
    pub fn tip(&self) -> Tip {
        self.tip
    }

    /// How many entries there are up to here, with those before a checkpoint.
    pub fn entries(&self) -> i64 {
        self.tip.seq.0
    }

    /// Balances as the entries make them.
    pub fn balances(&self) -> &BTreeMap<BalanceNo, Computed> {
        &self.made.balances
    }

    /// Budgets as the entries leave them.
    pub fn budgets(&self) -> &BTreeMap<BudgetNo, ProvisionedBudget> {
        &self.made.budgets
    }

    /// The tenant's settings as the entries leave them.
    pub fn settings(&self) -> Option<&Settings> {
        self.made.settings.as_ref()
    }

    /// Compares the end of the chain with the head that the next entry would
    /// follow: a tail that was cut off shows here.
    pub fn check_head(&self, head: Tip) -> Result<(), Problem> {
        if head.seq == self.tip.seq && head.hash == self.tip.hash {
            return Ok(());
        }
        Err(Problem {
            seq: Some(Sequence(self.tip.seq.0.min(head.seq.0) + 1)),
            text: format!(
                "the head says that the chain ends with entry {}, found is entry {}",
                head.seq, self.tip.seq
            ),
        })
    }

    /// Compares balances with those that are stored.
    pub fn check_balances(&self, stored: &BTreeMap<BalanceNo, Computed>) -> Result<(), Problem> {
        let differs = |text: String| Problem { seq: None, text };
        for (no, computed) in &self.made.balances {
            match stored.get(no) {
                Some(found) if found == computed => {}
                Some(found) => {
                    return Err(differs(format!(
                        "balance {no} ({}): the entries make granted {}, reserved {}, spent {}, debt {}, over limit {}; stored are {}, {}, {}, {}, {}",
                        computed.scope,
                        computed.granted,
                        computed.reserved,
                        computed.spent,
                        computed.debt,
                        computed.over_limit,
                        found.granted,
                        found.reserved,
                        found.spent,
                        found.debt,
                        found.over_limit,
                    )));
                }
                None => return Err(differs(format!("balance {no} is not stored"))),
            }
        }
        match stored
            .keys()
            .find(|no| !self.made.balances.contains_key(no))
        {
            Some(no) => Err(differs(format!(
                "balance {no} is stored and was never opened"
            ))),
            None => Ok(()),
        }
    }

    /// Compares tools, rules and freezes with those that are stored.
    pub fn check_documents(
        &self,
        catalogue: &Versioned<Vec<Tool>>,
        policy: &Versioned<PolicyDocument>,
        freezes: &Versioned<Vec<Freeze>>,
    ) -> Result<(), Problem> {
        let made = &self.made;
        let differing = [
            (made.catalogue != *catalogue, "catalogue"),
            (made.policy != *policy, "policy"),
            (made.freezes != *freezes, "list of freezes"),
        ];
        match differing.into_iter().find(|(differs, _)| *differs) {
            Some((_, what)) => Err(Problem {
                seq: None,
                text: format!("the {what} is not stored as it was provisioned"),
            }),
            None => Ok(()),
        }
    }

    /// Compares configuration with what is stored.
    pub fn check_configuration(
        &self,
        settings: Option<&Settings>,
        budgets: &[ProvisionedBudget],
    ) -> Result<(), Problem> {
        let differs = |text: String| Problem { seq: None, text };
        if self.made.settings.as_ref() != settings {
            return Err(differs(
                "the tenant is not stored as it was provisioned".into(),
            ));
        }
        for budget in budgets {
            if self.made.budgets.get(&budget.no) != Some(budget) {
                return Err(differs(format!(
                    "budget {} ({}) is not stored as it was provisioned",
                    budget.no, budget.scope
                )));
            }
        }
        if budgets.len() != self.made.budgets.len() {
            return Err(differs("a provisioned budget is not stored".into()));
        }
        Ok(())
    }
}
