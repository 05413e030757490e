//! What agents and operators read of the runtime plane.

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use serde::Deserialize;
use uuid::Uuid;

use super::answered::{self, balances};
use super::call::{Answer, Asker, Call};
use super::problem::Fault;
use super::translate::{self, millis_of};
use super::{Gateway, wire};
use crate::api::convert::{answers, authority as words};
use crate::api::fields::Fields;
use crate::api::page::Page;
use crate::domain::id::{IdempotencyKey, KeyHash, Method, Name, ReservationId, TenantId};
use crate::domain::permission::Permission;
use crate::domain::query::{ReservationQuery, StateFilter};
use crate::domain::reservation::{Reservation, SettlementKind, Status as Standing};
use crate::domain::scope::ScopeFilter;
use crate::domain::tenant::TenantConfig;
use crate::domain::time::Timestamp;
use crate::proto;
use crate::proto::authority_server::Authority as _;

/// What the protocol can sort reservations by.
const ORDERS: [&str; 7] = [
    "reservation_id",
    "tenant",
    "scope_path",
    "status",
    "reserved",
    "created_at_ms",
    "expires_at_ms",
];
/// Most rows of a page.
const ROWS_MAX: i32 = 200;
/// What the protocol can ask of a state.
const STATES: [(&str, StateFilter); 4] = [
    ("ACTIVE", StateFilter::Active),
    ("COMMITTED", StateFilter::Committed),
    ("RELEASED", StateFilter::Released),
    ("EXPIRED", StateFilter::Expired),
];
/// Rows that are read at once where not all of them need fit, ...
const READ_AT_ONCE: i64 = 500;
/// ... and how many at the most for one page.
const LOOKED_AT_MAX: usize = 10_000;

/// How a call ends.
pub(super) type Done = Result<Answer, Fault>;
/// The reservation of a path.
pub(super) type Id = Result<Path<String>, PathRejection>;

/// The reservation that a path names: its id, or the text that names none. One has one
/// spelling, so that what is pinned to its id is pinned once.
pub(super) struct Named(Result<ReservationId, String>);

impl Named {
    /// Takes the form that Reserve answers, whatever the case; any other names none.
    pub(super) fn parse(id: Id) -> Result<Self, Fault> {
        // Every other form of a UUID is shorter or longer.
        const CHARS: usize = uuid::fmt::Hyphenated::LENGTH;

        let Path(id) = id.map_err(|error| Fault::invalid(error.body_text()))?;
        if id.chars().count() > 128 {
            return Err(Fault::field("reservation_id", "1 to 128 characters"));
        }
        let parsed = ReservationId::parse(&id).ok();
        let parsed = parsed.filter(|_| id.len() == CHARS);
        Ok(Self(parsed.ok_or(id)))
    }

    /// What a request to the services is made with; where there is no id, one that serves
    /// to look at the rest of the request.
    pub(super) fn text(&self) -> String {
        match &self.0 {
            Ok(id) => id.to_string(),
            Err(_) => Uuid::nil().to_string(),
        }
    }

    /// The id. Where there is none it is refused once the request is right otherwise, as
    /// ids are that nobody has.
    pub(super) fn known(
        self,
        otherwise_right: impl FnOnce() -> Result<(), tonic::Status>,
    ) -> Result<ReservationId, Fault> {
        match self.0 {
            Ok(id) => Ok(id),
            Err(text) => {
                otherwise_right()?;
                Err(Fault::not_found(text))
            }
        }
    }
}

/// Whose reservation an operator means.
#[derive(Debug, Deserialize)]
pub(super) struct OfTenant {
    tenant: Option<String>,
}

/// Whose reservation a path means: an agent's own tenant's, and an operator has to say.
pub(super) fn tenant_meant(
    asker: &Asker,
    of: Result<Query<OfTenant>, QueryRejection>,
) -> Result<TenantId, Fault> {
    let Query(of) = of.map_err(|error| Fault::invalid(error.body_text()))?;
    match asker.caller.tenant() {
        Some(own) => Ok(own.clone()),
        None => tenant_of(asker, of.tenant.as_ref()),
    }
}

pub(super) async fn get_reservation(
    State(gateway): State<Gateway>,
    call: Call,
    id: Id,
    of: Result<Query<OfTenant>, QueryRejection>,
) -> Done {
    let asker = gateway.either(&call, Permission::Read).await?;
    let named = Named::parse(id)?;
    let tenant = tenant_meant(&asker, of)?;
    let id = named.known(|| Ok(()))?;
    let found = gateway.services.seen(&asker.caller, &tenant, id).await?;
    let scopes = held_scopes(&gateway, &tenant, [&found]).await?(&found);
    let found = answers::reservation(&found, gateway.services.engine().now());
    let Some(found) = answered::reservation(found, &scopes) else {
        let mut fault = Fault::new(
            StatusCode::CONFLICT,
            "BUDGET_EXCEEDED",
            "it waits for a person: nothing may happen yet",
        );
        fault.detail("reason_code", "APPROVAL_REQUIRED");
        fault.detail("approval_id", id.to_string());
        return Err(fault);
    };
    if found.status == wire::ReservationStatus::Expired {
        let mut fault = Fault::new(
            StatusCode::GONE,
            "RESERVATION_EXPIRED",
            "the reservation expired before it was settled",
        );
        let content = serde_json::to_value(&found).unwrap_or_default();
        fault.detail("reservation", content);
        return Err(fault);
    }
    Answer::new(&found)
}

/// What a list is limited to, as `level:value` pairs.
fn scope_of<const N: usize>(levels: [(&str, &Option<String>); N]) -> Result<String, Fault> {
    let mut pairs = Vec::new();
    for (level, name) in levels {
        let name = name.as_deref().map_or("", str::trim);
        if !name.is_empty() {
            let name = Name::parse(name);
            let name = name.map_err(|error| Fault::field(level, &error.to_string()))?;
            pairs.push(format!("{level}:{}", name.canonical()));
        }
    }
    Ok(pairs.join("/"))
}

/// How many rows a page has.
fn limit(limit: Option<&String>) -> Result<i32, Fault> {
    rows(limit)?
        .filter(|limit| (1..=ROWS_MAX).contains(limit))
        .ok_or_else(|| Fault::field("limit", &format!("1 to {ROWS_MAX}")))
}

/// How many rows are asked for: 50 where nothing is said, nothing for too many to count.
pub(super) fn rows(limit: Option<&String>) -> Result<Option<i32>, Fault> {
    let Some(limit) = limit
        .map(|limit| limit.trim())
        .filter(|limit| !limit.is_empty())
    else {
        return Ok(Some(50));
    };
    let limit: Result<i64, _> = limit.parse();
    let limit = limit.map_err(|_| Fault::field("limit", "a number"))?;
    Ok(i32::try_from(limit).ok())
}

/// From and to in milliseconds, both ends inclusive.
#[derive(Debug)]
struct Times(Option<i64>, Option<i64>);

impl Times {
    fn read(
        (from, from_text): (&str, Option<&String>),
        (to, to_text): (&str, Option<&String>),
    ) -> Result<Self, Fault> {
        let read = |name, text| {
            let time = translate::time(name, text)?;
            Ok::<_, Fault>(time.as_ref().map(millis_of))
        };
        let times = Self(read(from, from_text)?, read(to, to_text)?);
        match times {
            Self(Some(first), Some(last)) if first > last => {
                Err(Fault::field(from, &format!("not later than {to}")))
            }
            times => Ok(times),
        }
    }

    fn are_open(&self) -> bool {
        matches!(self, Self(None, None))
    }

    fn have(&self, at: Option<Timestamp>) -> bool {
        let Self(_, to) = *self;
        let until = |at| to.is_none_or(|to| millis(at) <= to);
        self.are_open() || at.is_some_and(|at| !self.are_after(at) && until(at))
    }

    /// Whether they begin after a time.
    fn are_after(&self, at: Timestamp) -> bool {
        self.0.is_some_and(|from| millis(at) < from)
    }
}

fn millis(at: Timestamp) -> i64 {
    at.as_micros().div_euclid(1_000)
}

/// The tenant of a list. An operator has to name it, and an agent can name only its own.
fn tenant_of(asker: &Asker, named: Option<&String>) -> Result<TenantId, Fault> {
    let named = named.map_or("", |named| named.trim());
    let parsed = TenantId::parse(named);
    let parsed = parsed.map_err(|error| Fault::field("tenant", &error.to_string()));
    match (asker.caller.tenant(), named) {
        (None, "") => Err(Fault::field("tenant", "given with an operator's key")),
        (None, _) => parsed,
        (Some(own), "") => Ok(own.clone()),
        (Some(own), named) if own.as_str() == named => Ok(own.clone()),
        (Some(_), _) => parsed.and(Err(Fault::other_tenant("tenant"))),
    }
}

pub(super) async fn list_reservations(
    State(gateway): State<Gateway>,
    call: Call,
    filters: Result<Query<wire::ReservationFilters>, QueryRejection>,
) -> Done {
    let asker = gateway.either(&call, Permission::Read).await?;
    let Query(filters) = filters.map_err(|error| Fault::invalid(error.body_text()))?;
    let tenant = tenant_of(&asker, filters.tenant.as_ref())?;
    let known = |given: &Option<String>, names: &[&str]| {
        let given = given.as_deref().filter(|given| !given.is_empty());
        given.is_none_or(|given| names.iter().any(|name| name.eq_ignore_ascii_case(given)))
    };
    if !known(&filters.sort_by, &ORDERS) {
        let wants = format!("one of {}", ORDERS.join(", "));
        return Err(Fault::field("sort_by", &wants));
    }
    if !known(&filters.sort_dir, &["asc", "desc"]) {
        return Err(Fault::field("sort_dir", "asc or desc"));
    }
    let is = |given: &Option<String>, name| known(given, &[name]);
    if !is(&filters.sort_by, "created_at_ms") || !is(&filters.sort_dir, "desc") {
        return Err(Fault::not_implemented(
            "a list in another order than created_at_ms, newest first",
        ));
    }
    let status = filters
        .status
        .as_deref()
        .filter(|status| !status.is_empty());
    let state = match status {
        None => None,
        Some(status) => {
            let found = STATES.into_iter().find(|(name, _)| *name == status);
            let wants = "one of ACTIVE, COMMITTED, RELEASED, EXPIRED";
            Some(found.ok_or_else(|| Fault::field("status", wants))?)
        }
    };
    let made = Times::read(("from", filters.from.as_ref()), ("to", filters.to.as_ref()))?;
    let expires = Times::read(
        ("expires_from", filters.expires_from.as_ref()),
        ("expires_to", filters.expires_to.as_ref()),
    )?;
    let finalized = Times::read(
        ("finalized_from", filters.finalized_from.as_ref()),
        ("finalized_to", filters.finalized_to.as_ref()),
    )?;
    let include = filters.include.as_deref().unwrap_or("");
    let with_metadata = include.split(',').any(|name| name.trim() == "metadata");
    let levels = [
        ("workspace", &filters.workspace),
        ("app", &filters.app),
        ("workflow", &filters.workflow),
        ("agent", &filters.agent),
    ];
    let above = scope_of(levels)?;
    let toolset = scope_of([("toolset", &filters.toolset)])?;
    let limit = limit(filters.limit.as_ref())?;
    let mut wanted = Wanted {
        state,
        above: scope_filter(&above)?,
        toolset: scope_filter(&toolset)?,
        placed_by: None,
        made,
        expires,
        finalized,
    };
    if wanted.toolset.is_some() {
        let config = gateway.services.engine().config(&tenant).await;
        let config = config.map_err(tonic::Status::from)?;
        wanted.placed_by = Some(config).filter(|config| !config.catalogue.is_empty());
    }
    let key = filters.idempotency_key.filter(|key| !key.is_empty());
    let (found, next) = match &key {
        // A reservation is named by its key: no list has to be searched.
        Some(key) => {
            let found = by_key(&gateway, &asker, &tenant, key).await?;
            let found = found.filter(|found| wanted.has(found, gateway.services.engine().now()));
            (Vec::from_iter(found), String::new())
        }
        None => {
            let cursor = filters.cursor.as_deref().unwrap_or("");
            page(&gateway, &asker, &tenant, &wanted, limit, cursor).await?
        }
    };
    let now = gateway.services.engine().now();
    let scopes = held_scopes(&gateway, &tenant, &found).await?;
    let reservations = found
        .iter()
        .filter_map(|found| answered::reservation(answers::reservation(found, now), &scopes(found)))
        .map(|row| wire::Reservation {
            idempotency_key: row.idempotency_key.or_else(|| key.clone()),
            committed: None,
            finalized_at_ms: None,
            metadata: row.metadata.filter(|_| with_metadata),
            ..row
        })
        .collect();
    Answer::new(&wire::Reservations {
        reservations,
        next: next.into(),
    })
}

/// Which reservations a list is of.
struct Wanted {
    state: Option<(&'static str, StateFilter)>,
    /// The levels above the toolset.
    above: Option<ScopeFilter>,
    toolset: Option<ScopeFilter>,
    /// Has a catalogue that may place actions into the toolset, whatever one they name.
    placed_by: Option<Arc<TenantConfig>>,
    made: Times,
    expires: Times,
    finalized: Times,
}

impl Wanted {
    /// Whether a reservation is one of them. What waits for a person is none: the protocol
    /// has no word for it.
    fn has(&self, found: &Reservation, now: Timestamp) -> bool {
        let state = found.state(now);
        let settled_at = match &found.status {
            Standing::Settled(settlement) if settlement.kind != SettlementKind::Expired => {
                Some(settlement.at)
            }
            _ => None,
        };
        let (subject, action) = (&found.subject, &found.action);
        let acts_in = |toolset: &ScopeFilter| {
            let placed = self.placed_by.as_ref().map(|by| by.placed(subject, action));
            toolset.matches(subject) || placed.is_some_and(|placed| toolset.matches(&placed))
        };
        state != "PENDING_APPROVAL"
            && self.state.is_none_or(|(name, _)| name == state)
            && self
                .above
                .as_ref()
                .is_none_or(|above| above.matches(subject))
            && self.toolset.as_ref().is_none_or(acts_in)
            && self.made.have(Some(found.created_at))
            && self.expires.have(Some(found.expires_at))
            && self.finalized.have(settled_at)
    }

    /// Whether the store can look at all of it.
    fn is_plain(&self) -> bool {
        let times = [&self.made, &self.expires, &self.finalized];
        self.placed_by.is_none() && times.into_iter().all(Times::are_open)
    }

    /// Everything that was asked, so that a cursor belongs to it.
    fn question(&self, tenant: &TenantId) -> String {
        let text = |scope: &Option<ScopeFilter>| {
            let text = scope.as_ref().map_or("", ScopeFilter::as_str);
            text.to_owned()
        };
        let (above, toolset) = (text(&self.above), text(&self.toolset));
        let state = self.state.map_or("", |(name, _)| name);
        let (made, expires, finalized) = (&self.made, &self.expires, &self.finalized);
        format!("cycles\0{tenant}\0{state}\0{above}\0{toolset}\0{made:?}{expires:?}{finalized:?}")
    }
}

/// One page of a list, newest first, and where it goes on. The store looks at state and
/// scope, times are looked at here: of many rows that do not fit, a page ends early, so
/// that no call reads without end.
async fn page(
    gateway: &Gateway,
    asker: &Asker,
    tenant: &TenantId,
    wanted: &Wanted,
    limit: i32,
    cursor: &str,
) -> Result<(Vec<Reservation>, String), Fault> {
    let engine = gateway.services.engine();
    asker.caller.may_see(tenant)?;
    let mut fields = Fields::default();
    let question = wanted.question(tenant);
    let page = Page::parse(&mut fields, limit, cursor, &question);
    let place = page.after.as_deref();
    let before = place.map(|place| fields.take("page_token", ReservationId::parse(place)));
    let (page, mut before) = fields.finish(Some((page, before.flatten())))?;
    let now = engine.now();
    // Mostly all rows of the first query fit: what waits for a person does not.
    let mut at_once = match wanted.is_plain() {
        true => page.fetch(),
        false => READ_AT_ONCE,
    };
    let toolset = wanted
        .toolset
        .clone()
        .filter(|_| wanted.placed_by.is_none());
    let mut scope = asker.caller.filters(wanted.above.clone());
    scope.extend(toolset);
    let mut rows: Vec<Reservation> = Vec::new();
    let mut looked_at = 0;
    loop {
        let query = ReservationQuery {
            state: wanted.state.map(|(_, state)| state),
            scope: scope.clone(),
            before: before.map(|id| (Timestamp::default(), id)),
            limit: at_once,
            now,
        };
        let found = engine.reservations(tenant, query).await;
        let found = found.map_err(tonic::Status::from)?;
        let is_last = usize::try_from(at_once).is_ok_and(|most| found.len() < most);
        looked_at += found.len();
        for row in found {
            // A chain's time never goes back: what is older is so down to the end.
            if wanted.made.are_after(row.created_at) {
                return Ok((rows, String::new()));
            }
            if !wanted.has(&row, now) {
                before = Some(row.id);
                continue;
            }
            if rows.len() == page.limit {
                let last = rows.last().map(|last| page.token(&last.id.to_string()));
                return Ok((rows, last.unwrap_or_default()));
            }
            before = Some(row.id);
            rows.push(row);
        }
        match before {
            Some(last) if !is_last && looked_at >= LOOKED_AT_MAX => {
                return Ok((rows, page.token(&last.to_string())));
            }
            _ if is_last => return Ok((rows, String::new())),
            _ => at_once = READ_AT_ONCE,
        }
    }
}

/// A filter of pairs that are each right; nothing for none.
fn scope_filter(pairs: &str) -> Result<Option<ScopeFilter>, Fault> {
    let mut fields = Fields::default();
    let filter = words::scope_filter(&mut fields, pairs);
    Ok(fields.finish(Some(filter))?)
}

/// The scopes of what reservations hold, or held, whatever has become of the budgets and of
/// the catalogue since.
async fn held_scopes<'a>(
    gateway: &Gateway,
    tenant: &TenantId,
    found: impl IntoIterator<Item = &'a Reservation>,
) -> Result<impl Fn(&Reservation) -> Vec<String>, Fault> {
    let holds = found.into_iter().flat_map(Reservation::holds);
    let numbers: BTreeSet<_> = holds.map(|hold| hold.0).collect();
    let engine = gateway.services.engine();
    let scopes = engine.scopes(tenant, numbers).await;
    let scopes = scopes.map_err(tonic::Status::from)?;
    Ok(move |reservation: &Reservation| {
        let held = reservation.holds();
        let scopes = held.filter_map(|hold| scopes.get(&hold.0));
        scopes.map(ToString::to_string).collect()
    })
}

async fn by_key(
    gateway: &Gateway,
    asker: &Asker,
    tenant: &TenantId,
    key: &str,
) -> Result<Option<Reservation>, Fault> {
    let key = IdempotencyKey::parse(key)
        .map_err(|error| Fault::field("idempotency_key", &error.to_string()))?;
    let id = ReservationId::of(KeyHash::of(tenant, Method::Reserve, &key));
    match gateway.services.seen(&asker.caller, tenant, id).await {
        Ok(found) => Ok(Some(found)),
        Err(status) if status.code() == tonic::Code::NotFound => Ok(None),
        Err(status) => Err(status.into()),
    }
}

pub(super) async fn list_balances(
    State(gateway): State<Gateway>,
    call: Call,
    filters: Result<Query<wire::BalanceFilters>, QueryRejection>,
) -> Done {
    let asker = gateway.agent(&call, Permission::Read).await?;
    let Query(filters) = filters.map_err(|error| Fault::invalid(error.body_text()))?;
    let scope = scope_of([
        ("workspace", &filters.workspace),
        ("app", &filters.app),
        ("workflow", &filters.workflow),
        ("agent", &filters.agent),
        ("toolset", &filters.toolset),
    ])?;
    let tenant_named = filters
        .tenant
        .as_deref()
        .is_some_and(|t| !t.trim().is_empty());
    if scope.is_empty() && !tenant_named {
        return Err(Fault::invalid(
            "Validation failed: at least one of tenant, workspace, app, workflow, agent, toolset \
             must be given",
        ));
    }
    let message = proto::ListBalancesRequest {
        tenant: tenant_of(&asker, filters.tenant.as_ref())?.to_string(),
        scope,
        page_size: limit(filters.limit.as_ref())?,
        page_token: filters.cursor.unwrap_or_default(),
        include_unopened: true,
        ..proto::ListBalancesRequest::default()
    };
    let page = gateway
        .services
        .list_balances(asker.request(message))
        .await?;
    let page = page.into_inner();
    Answer::new(&wire::Balances {
        balances: balances(&page.balances, |_| true),
        next: page.next_page_token.into(),
    })
}
