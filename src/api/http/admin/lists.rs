//! Budgets and balances by page, and what they are searched by.

use axum::extract::State;
use serde::{Deserialize, Serialize};

use super::super::call::{Answer, Asker, Call};
use super::super::problem::Fault;
use super::super::{Gateway, wire};
use super::budgets::{BudgetLedger, unit_named, worded};
use super::{Done, Params, Question, limit, must_be_absent, params};
use crate::domain::permission::Permission;
use crate::proto;
use crate::proto::authority_server::Authority as _;

/// The longest text that is searched for.
const SEARCH_CHARS_MAX: usize = 128;

#[derive(Debug, Serialize)]
struct Ledgers {
    ledgers: Vec<BudgetLedger>,
    #[serde(flatten)]
    next: wire::Next,
}

#[derive(Debug, Serialize)]
struct Balances {
    balances: Vec<BudgetLedger>,
    #[serde(flatten)]
    next: wire::Next,
}

#[derive(Debug, Deserialize)]
pub(super) struct Filters {
    tenant_id: Option<String>,
    scope_prefix: Option<String>,
    unit: Option<String>,
    status: Option<String>,
    over_limit: Option<String>,
    has_debt: Option<String>,
    utilization_min: Option<String>,
    utilization_max: Option<String>,
    search: Option<String>,
    sort_by: Option<String>,
    sort_dir: Option<String>,
    limit: Option<String>,
    cursor: Option<String>,
}

pub(super) async fn list(
    State(gateway): State<Gateway>,
    call: Call,
    filters: Params<Filters>,
) -> Done {
    let asker = gateway.either(&call, Permission::Read).await?;
    let (ledgers, next) = page(&gateway, &asker, "budgets", params(filters)?).await?;
    Answer::new(&Ledgers { ledgers, next })
}

/// Balances as the admin plane shows them: budgets that are active.
pub(super) async fn balances(
    State(gateway): State<Gateway>,
    call: Call,
    filters: Params<Filters>,
) -> Done {
    let asker = gateway.either(&call, Permission::Read).await?;
    let filters = Filters {
        status: Some("ACTIVE".into()),
        ..params(filters)?
    };
    let (balances, next) = page(&gateway, &asker, "balances", filters).await?;
    Answer::new(&Balances { balances, next })
}

/// A part of a whole, in billionths.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Share(i128);

impl Share {
    const WHOLE: i128 = 1_000_000_000;

    fn parse(text: &str) -> Option<Self> {
        let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
        let number = |digits: &str| -> Option<i128> {
            let known = (1..=9).contains(&digits.len());
            let known = known && digits.bytes().all(|b| b.is_ascii_digit());
            digits.parse().ok().filter(|_| known)
        };
        let (whole, _) = (number(whole)?, number(part)?);
        Some(Self(whole * Self::WHOLE + number(&format!("{part:0<9}"))?))
    }

    /// Against what an amount is of another.
    fn compared(self, (of, all): (i64, i64)) -> std::cmp::Ordering {
        (self.0 * i128::from(all)).cmp(&(i128::from(of) * Self::WHOLE))
    }
}

/// What is looked for in the budgets of a page.
#[derive(Debug)]
struct Wanted {
    prefix: String,
    unit: Option<wire::Unit>,
    status: Option<String>,
    over_limit: Option<bool>,
    has_debt: Option<bool>,
    /// Least and most of what is allocated that is spent.
    utilization: [Option<Share>; 2],
    /// In lower case.
    search: Option<String>,
}

impl Wanted {
    fn read(filters: &Filters) -> Result<Self, Fault> {
        let unit = filters.unit.as_deref().map(|name| {
            let wants = "one of USD_MICROCENTS, TOKENS, CREDITS, RISK_POINTS";
            unit_named(name).ok_or_else(|| Fault::field("unit", wants))
        });
        let status = filters.status.clone();
        if let Some(status) = &status
            && !["ACTIVE", "FROZEN", "CLOSED"].contains(&status.as_str())
        {
            return Err(Fault::field("status", "one of ACTIVE, FROZEN, CLOSED"));
        }
        let flag = |name, text: &Option<String>| {
            let flag = text.as_deref().map(str::parse).transpose();
            flag.map_err(|_| Fault::field(name, "true or false"))
        };
        let part = |name, text: &Option<String>| {
            let part = text.as_deref().map(Share::parse);
            match part {
                Some(None) => Err(Fault::field(name, "a number such as 0.8")),
                part => Ok(part.flatten()),
            }
        };
        let utilization = [
            part("utilization_min", &filters.utilization_min)?,
            part("utilization_max", &filters.utilization_max)?,
        ];
        if matches!(utilization, [Some(least), Some(most)] if least > most) {
            return Err(Fault::field(
                "utilization_min",
                "not more than utilization_max",
            ));
        }
        let search = filters.search.as_deref();
        if search.is_some_and(|search| search.chars().count() > SEARCH_CHARS_MAX) {
            let wants = format!("at most {SEARCH_CHARS_MAX} characters");
            return Err(Fault::field("search", &wants));
        }
        Ok(Self {
            prefix: filters
                .scope_prefix
                .as_deref()
                .unwrap_or_default()
                .to_ascii_lowercase(),
            unit: unit.transpose()?,
            status,
            over_limit: flag("over_limit", &filters.over_limit)?,
            has_debt: flag("has_debt", &filters.has_debt)?,
            utilization,
            search: search.map(str::to_ascii_lowercase),
        })
    }

    fn fits(&self, ledger: &BudgetLedger) -> bool {
        let [least, most] = self.utilization;
        // Nothing of nothing is none of it.
        let used = match (ledger.spent.amount, ledger.allocated.amount) {
            (_, 0) => (0, 1),
            used => used,
        };
        // A scope begins with its tenant.
        let search = self.search.as_ref();
        ledger.scope.starts_with(&self.prefix)
            && self.unit.is_none_or(|unit| ledger.unit == unit)
            && self
                .status
                .as_ref()
                .is_none_or(|status| ledger.status == status)
            && self
                .over_limit
                .is_none_or(|over| ledger.is_over_limit == over)
            && self
                .has_debt
                .is_none_or(|owes| (ledger.debt.amount > 0) == owes)
            && least.is_none_or(|least| least.compared(used).is_le())
            && most.is_none_or(|most| most.compared(used).is_ge())
            && search.is_none_or(|text| ledger.scope.contains(text))
    }
}

async fn page(
    gateway: &Gateway,
    asker: &Asker,
    list: &str,
    filters: Filters,
) -> Result<(Vec<BudgetLedger>, wire::Next), Fault> {
    must_be_absent(&[
        ("sort_by", &filters.sort_by),
        ("sort_dir", &filters.sort_dir),
    ])?;
    let wanted = Wanted::read(&filters)?;
    let of_prefix = wanted
        .prefix
        .strip_prefix("tenant:")
        .and_then(|rest| rest.split('/').next());
    let tenant = filters.tenant_id.or_else(|| of_prefix.map(str::to_owned));
    if tenant.is_none() && asker.tenant().is_empty() {
        return Err(Fault::field("tenant_id", "given with an operator's key"));
    }
    let question = Question::new(&format!("{list}\0{wanted:?}"));
    let message = proto::ListBalancesRequest {
        tenant: tenant.unwrap_or_default(),
        page_size: limit(filters.limit.as_ref())?,
        page_token: question.token(filters.cursor)?,
        include_unopened: true,
        ..proto::ListBalancesRequest::default()
    };
    let page = gateway
        .services
        .list_balances(asker.request(message))
        .await?;
    let page = page.into_inner();
    let ledgers = page
        .balances
        .iter()
        .filter(|balance| balance.period() == proto::Period::Total)
        .filter_map(worded)
        .filter(|ledger| wanted.fits(ledger))
        .collect();
    Ok((ledgers, question.next(&page.next_page_token)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_compared_exactly() {
        let share = |text| Share::parse(text).expect("a share");
        assert_eq!(share("0.8"), Share(800_000_000));
        assert_eq!(share("1"), share("1.000"));
        let most = i64::MAX;
        assert!(share("1").compared((most, most)).is_eq());
        assert!(share("1").compared((most - 1, most)).is_gt());
        assert!(share("0.333333333").compared((1, 3)).is_lt());
        for text in [
            "",
            ".5",
            "5.",
            "-1",
            "+1",
            "1e3",
            "NaN",
            "0.0000000001",
            "0,5",
            "1.2.3",
        ] {
            assert_eq!(Share::parse(text), None, "{text}");
        }
    }
}
