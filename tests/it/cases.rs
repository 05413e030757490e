//! One table of cases for both doors: every case of `tests/cases` is played by gRPC and by
//! HTTP, each on a tenant of its own, and must end in the same books.
//!
//! What holds of every answer is not left to the cases: that the balances which it tells are
//! those of the books, that a replay is the first answer again, that an extension counts from
//! the lease's own end, and by HTTP that its body has the protocol's fields and no others.

mod grpc;
mod http;
mod table;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use remit::proto::budget::Limit;
use remit::proto::resolve_approval_request::Resolution;
use remit::proto::{ListBalancesRequest, ListBudgetsRequest, Permission, ResolveApprovalRequest};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use self::table::{By, Caps, Case, Door, Expect, Request, Resolve, Row, Step, Unit};
use crate::policy::provision;
use crate::support::*;

/// The codes of the protocol. Left out are LIMIT_EXCEEDED and INTERNAL_ERROR, which take a
/// server in trouble.
const CODES: [&str; 15] = [
    "BUDGET_CLOSED",
    "BUDGET_EXCEEDED",
    "BUDGET_FROZEN",
    "DEBT_OUTSTANDING",
    "FORBIDDEN",
    "IDEMPOTENCY_MISMATCH",
    "INVALID_REQUEST",
    "MAX_EXTENSIONS_EXCEEDED",
    "NOT_FOUND",
    "OVERDRAFT_LIMIT_EXCEEDED",
    "RESERVATION_EXPIRED",
    "RESERVATION_FINALIZED",
    "TENANT_CLOSED",
    "UNAUTHORIZED",
    "UNIT_MISMATCH",
];

/// How long the sweeper may take to give back what has expired.
const SWEPT_WITHIN: Duration = Duration::from_secs(15);

/// How many cases are played at once.
const AT_ONCE: usize = 12;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_case_holds_by_grpc_and_by_http() {
    let cases = table::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases"));
    let world = Arc::new(World::start().await);
    let turns = Arc::new(Semaphore::new(AT_ONCE));
    let mut wanted = BTreeMap::from(Door::ALL.map(|door| (door, 0)));
    let mut played = wanted.clone();
    let mut running = JoinSet::new();
    for (file, case) in cases {
        let case = Arc::new(case);
        for door in Door::ALL {
            if case.only.is_some_and(|only| only != door) {
                continue;
            }
            *wanted.entry(door).or_default() += 1;
            let (world, turns, case) = (world.clone(), turns.clone(), case.clone());
            let name = format!("{file}, by {door:?}: {}", case.name);
            running.spawn(async move {
                let _turn = turns.acquire_owned().await.expect("a turn");
                let mut play = Play::new(world, door);
                let end = play.case(&case).await;
                // As the file says it.
                let failure = end.err().map(|text| play.unnamed(&text));
                (
                    door,
                    failure.map(|text| format!("{name}\n{text}")),
                    play.codes,
                )
            });
        }
    }
    let mut codes = BTreeSet::new();
    let mut failures = Vec::new();
    while let Some(ended) = running.join_next().await {
        let (door, failure, seen) = ended.expect("no case panics");
        *played.entry(door).or_default() += 1;
        failures.extend(failure);
        codes.extend(seen);
    }
    failures.sort();
    println!("{played:?} cases played");
    let all = failures.join("\n\n");
    assert!(failures.is_empty(), "{} failed:\n\n{all}", failures.len());
    assert_eq!(played, wanted, "no case is skipped");
    let never: Vec<_> = CODES
        .iter()
        .filter(|code| !codes.contains(**code))
        .collect();
    assert!(never.is_empty(), "never seen: {never:?}");
    world.database.assert_intact();
}

/// An answer, whichever door it came through.
#[derive(Clone, Default, PartialEq)]
struct Seen {
    /// In one line, in the words of `Expect::wanted`.
    said: String,
    /// The first reason, as the details of an error by HTTP have it.
    reason_code: Option<String>,
    scope: Option<String>,
    reservation: Option<String>,
    reserved: Option<i64>,
    charged: Option<i64>,
    uncovered: Option<i64>,
    released: Option<i64>,
    ttl_ms: Option<i64>,
    expires_at_ms: Option<i64>,
    allocated: Option<i64>,
    remaining: Option<i64>,
    caps: Option<Caps>,
    affected_scopes: Option<Vec<String>>,
    message: Option<String>,
    details: Option<serde_json::Value>,
    balances: Vec<Row>,
    replayed: bool,
    /// The protocol's code of an error.
    code: Option<String>,
}

impl fmt::Debug for Seen {
    /// What was said, without what was not.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct(&self.said);
        let numbers = [
            ("reserved", self.reserved),
            ("charged", self.charged),
            ("uncovered", self.uncovered),
            ("released", self.released),
            ("ttl_ms", self.ttl_ms),
            ("expires_at_ms", self.expires_at_ms),
            ("allocated", self.allocated),
            ("remaining", self.remaining),
        ];
        for (name, number) in numbers {
            if let Some(number) = number {
                shown.field(name, &number);
            }
        }
        let texts = [
            ("reason_code", &self.reason_code),
            ("scope", &self.scope),
            ("reservation", &self.reservation),
            ("message", &self.message),
        ];
        for (name, text) in texts {
            if let Some(text) = text {
                shown.field(name, text);
            }
        }
        if let Some(caps) = &self.caps {
            shown.field("caps", caps);
        }
        if let Some(scopes) = &self.affected_scopes {
            shown.field("affected_scopes", scopes);
        }
        if let Some(details) = &self.details {
            shown.field("details", &format_args!("{details}"));
        }
        if self.replayed {
            shown.field("replayed", &true);
        }
        shown.field("balances", &self.balances).finish()
    }
}

impl Seen {
    /// Whether it is kept under its idempotency key.
    fn is_kept(&self) -> bool {
        let no = ["DENY ", "refused ", "200 "];
        let yes = self.code.is_none() && !no.iter().any(|no| self.said.starts_with(no));
        // Also what waits for a person.
        yes || self.reservation.is_some()
    }
}

/// One case through one door.
struct Play {
    world: Arc<World>,
    door: Door,
    /// What `acme` stands for.
    tenant: String,
    keys: BTreeMap<By, String>,
    /// Reservations by the name that the case gives them.
    reservations: HashMap<String, Held>,
    /// The first answers to idempotency keys, by request and key.
    first: HashMap<(&'static str, String), Seen>,
    codes: BTreeSet<String>,
    waited: bool,
}

/// A reservation as its holder knows it.
#[derive(Clone)]
struct Held {
    id: String,
    expires_at_ms: Option<i64>,
}

impl Play {
    fn new(world: Arc<World>, door: Door) -> Self {
        Self {
            world,
            door,
            tenant: unique("acme"),
            keys: BTreeMap::new(),
            reservations: HashMap::new(),
            first: HashMap::new(),
            codes: BTreeSet::new(),
            waited: false,
        }
    }

    /// The case's tenants in place of those that the file names.
    fn named(&self, text: &str) -> String {
        text.replace("acme", &self.tenant)
            .replace("ACME", &self.tenant.to_ascii_uppercase())
    }

    fn unnamed(&self, text: &str) -> String {
        text.replace(&self.tenant, "acme")
    }

    async fn case(&mut self, case: &Case) -> Result<(), String> {
        self.provision(&case.document).await?;
        self.find_key(By::default()).await;
        for by in case.steps.iter().map(|step| step.by) {
            self.find_key(by).await;
        }
        for (at, step) in case.steps.iter().enumerate() {
            if step.only.is_some_and(|only| only != self.door) {
                continue;
            }
            let request = step.request()?;
            let at = format!("step {} ({})", at + 1, request.name());
            let done = self.step(step, &request).await;
            done.map_err(|error| format!("  {at}: {error}"))?;
        }
        let books = self.compare(&case.balances).await;
        books.map_err(|error| format!("  at the end: {error}"))
    }

    async fn provision(&self, document: &str) -> Result<(), String> {
        let text = self.named(document);
        let done = provision(&self.world.operator, &text).await;
        done.map(drop)
            .map_err(|status| format!("no plan: {status}"))
    }

    async fn resolve(&self, resolve: &Resolve) -> Result<(), String> {
        let resolution = if resolve.approve {
            Resolution::Approve(true)
        } else {
            Resolution::Reject(true)
        };
        let request = ResolveApprovalRequest {
            idempotency_key: unique("resolve"),
            approval_id: self.reservation(&resolve.of)?,
            resolution: Some(resolution),
            tenant: self.tenant.clone(),
            ..ResolveApprovalRequest::default()
        };
        let mut approvals = self.world.operator.clone().approvals;
        let done = approvals.resolve_approval(request).await;
        done.map(drop)
            .map_err(|status| format!("not resolved: {status}"))
    }

    async fn find_key(&mut self, by: By) {
        if self.keys.contains_key(&by) {
            return;
        }
        let all = [Permission::Authority, Permission::Read, Permission::Fund];
        let other = format!("{}-other", self.tenant);
        let key = match by {
            By::Agent => self.world.key(&self.tenant, &all, "").await,
            By::Reader => {
                let read = [Permission::Read];
                self.world.key(&self.tenant, &read, "").await
            }
            By::Other => self.world.key(&other, &all, "").await,
            By::Operator => self.world.server.key.clone(),
            // Formed like a key.
            By::Stranger => {
                let known = self.world.key(&self.tenant, &all, "").await;
                let (id, secret) = known.rsplit_once('_').expect("a key");
                format!("{id}_{}", secret.chars().rev().collect::<String>())
            }
            By::Nobody => String::new(),
        };
        self.keys.insert(by, key);
    }

    fn api_key(&self, by: By) -> &str {
        self.keys.get(&by).map_or("", String::as_str)
    }

    async fn step(&mut self, step: &Step, request: &Request<'_>) -> Result<(), String> {
        match request {
            Request::Provision(document) => return self.provision(document).await,
            Request::Resolve(resolve) => return self.resolve(resolve).await,
            Request::Wait(wait) => {
                self.waited = true;
                tokio::time::sleep(Duration::from_millis(wait.ms)).await;
                return Ok(());
            }
            Request::Balances(rows) => return self.compare(rows).await,
            _ => {}
        }
        let key = key_of(request).map_or_else(|| unique("case"), |key| self.named(key));
        let seen = match self.door {
            Door::Grpc => grpc::ask(self, step.by, request, &key).await?,
            Door::Http => http::ask(self, step.by, request, &key).await?,
        };
        self.codes.extend(seen.code.clone());
        let expect = step.expect.as_ref().ok_or("nothing is expected")?;
        self.check(request, expect, &seen)?;
        self.check_replay(request, &key, &seen)?;
        self.check_lease(request, expect, &seen)?;
        if step.by != By::Other {
            self.check_told_balances(request, &seen).await?;
        }
        if let (Request::Reserve(reserve), Some(id)) = (request, &seen.reservation)
            && let Some(name) = &reserve.name
        {
            let held = Held {
                id: id.clone(),
                expires_at_ms: seen.expires_at_ms,
            };
            self.reservations.insert(name.clone(), held);
        }
        Ok(())
    }

    /// A reservation by its name, or by an id that the case spells out.
    fn reservation(&self, of: &str) -> Result<String, String> {
        match self.reservations.get(of) {
            Some(held) => Ok(held.id.clone()),
            None if of.len() == 36 => Ok(of.to_owned()),
            None => Err(format!("no reservation is called {of:?}")),
        }
    }

    /// Compares an answer with what is expected of it, field by field.
    fn check(&self, request: &Request, expect: &Expect, seen: &Seen) -> Result<(), String> {
        let wanted = expect.wanted(request, self.door);
        let mut wrong = Vec::new();
        let mut must = |name: &str, wanted: String, is: String| {
            if wanted != is {
                wrong.push(format!("{name} is {is}, not {wanted}"));
            }
        };
        must("the answer", wanted.clone(), seen.said.clone());
        let by_http = self.door == Door::Http;
        let error = by_http && seen.code.is_some();
        if let (true, Some(code)) = (error, expect.reason_code()) {
            let wanted = Some(code.to_owned());
            must(
                "details.reason_code",
                format!("{wanted:?}"),
                format!("{:?}", seen.reason_code),
            );
        }
        // By HTTP a denial that is no error has no room for its scope.
        if let Some(scope) = &expect.scope
            && (!by_http || error)
        {
            let wanted = Some(self.named(scope));
            must("scope", format!("{wanted:?}"), format!("{:?}", seen.scope));
        }
        let amounts = [
            ("charged", expect.charged, seen.charged),
            ("reserved", expect.reserved, seen.reserved),
            ("allocated", expect.allocated, seen.allocated),
            ("remaining", expect.remaining, seen.remaining),
        ];
        for (name, wanted, is) in amounts {
            if wanted.is_some() && !error {
                must(name, format!("{wanted:?}"), format!("{is:?}"));
            }
        }
        if matches!(request, Request::Commit(_) | Request::Release(_)) && !error {
            let (wanted, is) = (expect.released, seen.released);
            must("released", format!("{wanted:?}"), format!("{is:?}"));
        }
        if let Some(caps) = &expect.caps {
            must(
                "caps",
                format!("{:?}", Some(caps)),
                format!("{:?}", seen.caps),
            );
        }
        must(
            "replayed",
            expect.replayed.unwrap_or(false).to_string(),
            seen.replayed.to_string(),
        );
        if by_http {
            if let Some(scopes) = &expect.affected_scopes {
                let scopes: Vec<_> = scopes.iter().map(|scope| self.named(scope)).collect();
                must(
                    "affected_scopes",
                    format!("{:?}", Some(scopes)),
                    format!("{:?}", seen.affected_scopes),
                );
            }
            if let Some(message) = &expect.message {
                let wanted = Some(self.named(message));
                must(
                    "message",
                    format!("{wanted:?}"),
                    format!("{:?}", seen.message),
                );
            }
            for (field, value) in expect.details.iter().flatten() {
                let is = seen.details.as_ref().and_then(|details| details.get(field));
                let is = is.map_or_else(|| "absent".into(), ToString::to_string);
                must(
                    &format!("details.{field}"),
                    self.named(&value.to_string()),
                    is,
                );
            }
        }
        if wrong.is_empty() {
            return Ok(());
        }
        Err(format!("{}\n    in {seen:?}", wrong.join("; ")))
    }

    /// The same answer again, but for what is left of the lease.
    fn check_replay(&mut self, request: &Request, key: &str, seen: &Seen) -> Result<(), String> {
        let name = match request {
            // The same request in other words.
            Request::Post(post) if post.path == "/v1/reservations" => "reserve",
            request => request.name(),
        };
        let at = (name, key.to_owned());
        let again = Seen {
            replayed: false,
            ttl_ms: None,
            ..seen.clone()
        };
        if !seen.replayed {
            if seen.is_kept() {
                self.first.insert(at, again);
            }
            return Ok(());
        }
        if let Request::Post(_) = request {
            return Ok(());
        }
        match self.first.get(&at) {
            Some(first) if *first == again => Ok(()),
            Some(first) => Err(format!("a replay of {first:?}\n    is {again:?}")),
            None => Err("a replay of nothing".into()),
        }
    }

    /// A lease lasts as long as was granted, and is lengthened from its own end on.
    fn check_lease(
        &mut self,
        request: &Request,
        expect: &Expect,
        seen: &Seen,
    ) -> Result<(), String> {
        if let Some(wanted) = expect.ttl_ms
            && seen.ttl_ms != Some(wanted)
        {
            return Err(format!("a lease of {:?} ms, not {wanted}", seen.ttl_ms));
        }
        let Request::Extend(extend) = request else {
            return Ok(());
        };
        let Some(held) = self.reservations.get_mut(&extend.of) else {
            return Ok(());
        };
        if seen.replayed || seen.expires_at_ms.is_none() {
            return Ok(());
        }
        let by = i64::try_from(extend.by_ms).expect("milliseconds");
        let wanted = held.expires_at_ms.map(|end| end + by);
        held.expires_at_ms = seen.expires_at_ms;
        if wanted == seen.expires_at_ms {
            return Ok(());
        }
        Err(format!(
            "it ends at {:?}, not {wanted:?}",
            seen.expires_at_ms
        ))
    }

    /// What an answer tells of balances is what they are.
    async fn check_told_balances(&self, request: &Request<'_>, seen: &Seen) -> Result<(), String> {
        let moves = matches!(
            request,
            Request::Reserve(_)
                | Request::Commit(_)
                | Request::Release(_)
                | Request::Extend(_)
                | Request::Event(_)
                | Request::Fund(_)
        );
        if !moves || seen.replayed || seen.balances.is_empty() {
            return Ok(());
        }
        let books = self.books().await?;
        // What has lapsed while the case waited can be given back in between.
        let given_back = |told: &Row, now: &Row| {
            let still = Row {
                remaining: now.remaining - (told.reserved - now.reserved),
                reserved: told.reserved,
                ..now.clone()
            };
            self.waited && now.reserved < told.reserved && still == *told
        };
        let agrees =
            |row: &&Row| books.contains(row) || books.iter().any(|now| given_back(row, now));
        let other = seen.balances.iter().find(|row| !agrees(row));
        match other {
            None => Ok(()),
            Some(row) => Err(format!("it tells {row:?}, the books say {books:?}")),
        }
    }

    /// Every balance of the tenant. A budget that nothing has happened on counts as a
    /// balance too.
    async fn books(&self) -> Result<Vec<Row>, String> {
        let failed = |status: tonic::Status| format!("no list: {status}");
        let mut client = self.world.operator.clone();
        let request = ListBudgetsRequest {
            tenant: self.tenant.clone(),
            page_size: 1_000,
            ..ListBudgetsRequest::default()
        };
        let budgets = client.provisioning.list_budgets(request).await;
        let mut books: BTreeMap<(String, Unit), Row> = BTreeMap::new();
        for budget in budgets.map_err(failed)?.into_inner().budgets {
            let Some(Limit::Allocation(remaining)) = budget.limit else {
                return Err("a budget without a limit".into());
            };
            let unit = Unit::of_proto(budget.unit()).ok_or("a unit")?;
            let row = Row {
                scope: budget.scope.clone(),
                unit,
                remaining,
                reserved: 0,
                spent: 0,
                debt: 0,
                over_limit: false,
            };
            books.insert((budget.scope, unit), row);
        }
        let request = ListBalancesRequest {
            tenant: self.tenant.clone(),
            page_size: 1_000,
            ..ListBalancesRequest::default()
        };
        let balances = client.authority.list_balances(request).await;
        for balance in balances.map_err(failed)?.into_inner().balances {
            let row = grpc::row(&balance).ok_or("a balance without a limit")?;
            books.insert((row.scope.clone(), row.unit), row);
        }
        Ok(books.into_values().collect())
    }

    /// Compares all the books; where time has passed, once the sweeper has come by.
    async fn compare(&self, rows: &[Row]) -> Result<(), String> {
        let mut wanted: Vec<Row> = rows
            .iter()
            .map(|row| Row {
                scope: self.named(&row.scope),
                ..row.clone()
            })
            .collect();
        wanted.sort();
        let begun = tokio::time::Instant::now();
        loop {
            let books = self.books().await?;
            if books == wanted {
                return self.compare_listed(&books).await;
            }
            if !self.waited || begun.elapsed() > SWEPT_WITHIN {
                return Err(format!("the books are {books:#?}, not {wanted:#?}"));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// By HTTP the caller itself can read the same, but for the unit that the protocol does
    /// not know.
    async fn compare_listed(&self, books: &[Row]) -> Result<(), String> {
        if self.door == Door::Grpc {
            return Ok(());
        }
        let mut listed = http::balances(self).await?;
        listed.sort();
        let books: Vec<_> = books
            .iter()
            .filter(|row| row.unit != Unit::Calls)
            .cloned()
            .collect();
        if listed == books {
            return Ok(());
        }
        Err(format!(
            "/v1/balances lists {listed:#?}, the books say {books:#?}"
        ))
    }
}

/// The idempotency key that the case itself names.
fn key_of<'a>(request: &Request<'a>) -> Option<&'a str> {
    match request {
        Request::Reserve(reserve) => reserve.key.as_deref(),
        Request::Decide(decide) => decide.key.as_deref(),
        Request::Commit(commit) => commit.key.as_deref(),
        Request::Release(release) => release.key.as_deref(),
        Request::Extend(extend) => extend.key.as_deref(),
        Request::Event(event) => event.key.as_deref(),
        Request::Fund(fund) => fund.key.as_deref(),
        Request::Get(_)
        | Request::Post(_)
        | Request::Provision(_)
        | Request::Resolve(_)
        | Request::Wait(_)
        | Request::Balances(_) => None,
    }
}
