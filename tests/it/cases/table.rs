//! How the cases under `tests/cases` are written.
//!
//! A file is a list of cases. A case brings its own document, in the form of
//! `remit provision -f`; `acme` in it, and in every scope, stands for a tenant that no
//! other case has. Each step is one request, by gRPC and by HTTP in turn:
//!
//! | step | its fields; those with `?` have a default |
//! |---|---|
//! | `reserve` | `as?`, `key?`, `subject?`, `action?`, `amount`, `unit?`, `overage_policy?`, `ttl_ms?`, `grace_period_ms?`, `dry_run?` |
//! | `decide` | `key?`, `subject?`, `action?`, `amount`, `unit?` |
//! | `commit` | `of`, `key?`, `amount`, `unit?` |
//! | `release` | `of`, `key?`, `reason?` |
//! | `extend` | `of`, `key?`, `by_ms` |
//! | `event` | `key?`, `subject?`, `action?`, `amount`, `unit?`, `overage_policy?` |
//! | `get` | `of` |
//! | `fund` | `scope`, `unit?`, `operation`, `amount`, `spent?`, `key?` |
//! | `post` | `path`, `body`, `headers?`: a request in its own words, by HTTP; `{r}` stands for the reservation `r` |
//! | `provision` | a further document, by an operator |
//! | `resolve` | `of`, `approve`: a person decides what waits |
//! | `wait` | `ms` |
//! | `balances` | as at the end of a case |
//!
//! `of` is the reservation that a step before has called so with `as`, or an id. Without a
//! `unit` it is TOKENS, without a `subject` `{agent: bot}`, without a `key` one
//! that nobody else has. `by` says whose API key is used; `only`, of a step or of a whole
//! case, that one door alone is asked.
//!
//! `expect` is said in Remit's words for gRPC: `decision`, `status`, `denied` and `waits`
//! with the first reason, `refused` with the reason of the error. `http` is the status and
//! the protocol's code where these are other words; `200` and a code is an answer with
//! `decision: DENY`.
//!
//! `balances` names every balance of the tenant, in each column; a column that is left out
//! is 0.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use remit::proto;
use serde::Deserialize;
use serde_json::Value;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Door {
    Grpc,
    Http,
}

impl Door {
    pub(super) const ALL: [Self; 2] = [Self::Grpc, Self::Http];
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Case {
    pub(super) name: String,
    pub(super) document: String,
    pub(super) steps: Vec<Step>,
    pub(super) balances: Vec<Row>,
    pub(super) only: Option<Door>,
}

/// Exactly one of the requests is given.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Step {
    reserve: Option<Reserve>,
    decide: Option<Decide>,
    commit: Option<Commit>,
    release: Option<Release>,
    extend: Option<Extend>,
    event: Option<Event>,
    get: Option<Get>,
    fund: Option<Fund>,
    post: Option<Post>,
    provision: Option<String>,
    resolve: Option<Resolve>,
    wait: Option<Wait>,
    balances: Option<Vec<Row>>,
    pub(super) expect: Option<Expect>,
    #[serde(default)]
    pub(super) by: By,
    pub(super) only: Option<Door>,
}

#[derive(Debug)]
pub(super) enum Request<'a> {
    Reserve(&'a Reserve),
    Decide(&'a Decide),
    Commit(&'a Commit),
    Release(&'a Release),
    Extend(&'a Extend),
    Event(&'a Event),
    Get(&'a Get),
    Fund(&'a Fund),
    Post(&'a Post),
    Provision(&'a str),
    Resolve(&'a Resolve),
    Wait(&'a Wait),
    Balances(&'a [Row]),
}

impl Request<'_> {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Reserve(_) => "reserve",
            Self::Decide(_) => "decide",
            Self::Commit(_) => "commit",
            Self::Release(_) => "release",
            Self::Extend(_) => "extend",
            Self::Event(_) => "event",
            Self::Get(_) => "get",
            Self::Fund(_) => "fund",
            Self::Post(_) => "post",
            Self::Provision(_) => "provision",
            Self::Resolve(_) => "resolve",
            Self::Wait(_) => "wait",
            Self::Balances(_) => "balances",
        }
    }

    fn is_asked(&self) -> bool {
        !matches!(
            self,
            Self::Provision(_) | Self::Resolve(_) | Self::Wait(_) | Self::Balances(_)
        )
    }

    /// What a success is called, and what has to be said of it; nothing where `decision`
    /// or `status` says it.
    fn success(&self) -> (Option<&'static str>, &'static [&'static str]) {
        match self {
            Self::Reserve(_) | Self::Decide(_) => (None, &["decision"]),
            Self::Get(_) | Self::Extend(_) => (None, &["status"]),
            Self::Commit(_) => (Some("COMMITTED"), &["charged"]),
            Self::Release(_) => (Some("RELEASED"), &["released"]),
            Self::Event(_) => (Some("APPLIED"), &["charged"]),
            Self::Fund(_) => (Some("FUNDED"), &["allocated", "remaining"]),
            Self::Post(_)
            | Self::Provision(_)
            | Self::Resolve(_)
            | Self::Wait(_)
            | Self::Balances(_) => (None, &[]),
        }
    }

    /// What can be said of an answer. The rest would not be looked at.
    fn can_be_said(&self) -> &'static [&'static str] {
        match self {
            Self::Reserve(_) => &[
                "decision",
                "denied",
                "waits",
                "refused",
                "http",
                "scope",
                "reserved",
                "ttl_ms",
                "replayed",
                "caps",
                "affected_scopes",
                "message",
                "details",
            ],
            Self::Decide(_) => &[
                "decision",
                "denied",
                "waits",
                "refused",
                "http",
                "scope",
                "caps",
                "affected_scopes",
                "message",
                "details",
            ],
            Self::Commit(_) => &[
                "charged", "released", "replayed", "refused", "http", "scope", "message", "details",
            ],
            Self::Release(_) => &[
                "released", "replayed", "refused", "http", "message", "details",
            ],
            Self::Extend(_) => &[
                "status", "replayed", "refused", "http", "message", "details",
            ],
            Self::Event(_) => &[
                "charged", "replayed", "refused", "http", "scope", "message", "details",
            ],
            Self::Get(_) => &["status", "charged", "refused", "http", "message", "details"],
            Self::Fund(_) => &[
                "allocated",
                "remaining",
                "replayed",
                "refused",
                "http",
                "message",
                "details",
            ],
            Self::Post(_) => &["http", "replayed", "message", "details"],
            Self::Provision(_) | Self::Resolve(_) | Self::Wait(_) | Self::Balances(_) => &[],
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Expect {
    decision: Option<String>,
    status: Option<String>,
    denied: Option<String>,
    waits: Option<String>,
    refused: Option<String>,
    http: Option<String>,
    /// Of the reason, where one is given.
    pub(super) scope: Option<String>,
    pub(super) charged: Option<i64>,
    /// Left out: nothing was given back.
    pub(super) released: Option<i64>,
    pub(super) reserved: Option<i64>,
    pub(super) ttl_ms: Option<i64>,
    pub(super) replayed: Option<bool>,
    pub(super) caps: Option<Caps>,
    pub(super) allocated: Option<i64>,
    pub(super) remaining: Option<i64>,
    /// By HTTP.
    pub(super) affected_scopes: Option<Vec<String>>,
    /// By HTTP.
    pub(super) message: Option<String>,
    /// By HTTP: these fields, whatever else there is.
    pub(super) details: Option<BTreeMap<String, Value>>,
}

impl Expect {
    fn said(&self) -> Vec<&'static str> {
        [
            ("decision", self.decision.is_some()),
            ("status", self.status.is_some()),
            ("denied", self.denied.is_some()),
            ("waits", self.waits.is_some()),
            ("refused", self.refused.is_some()),
            ("http", self.http.is_some()),
            ("scope", self.scope.is_some()),
            ("charged", self.charged.is_some()),
            ("released", self.released.is_some()),
            ("reserved", self.reserved.is_some()),
            ("ttl_ms", self.ttl_ms.is_some()),
            ("replayed", self.replayed.is_some()),
            ("caps", self.caps.is_some()),
            ("allocated", self.allocated.is_some()),
            ("remaining", self.remaining.is_some()),
            ("affected_scopes", self.affected_scopes.is_some()),
            ("message", self.message.is_some()),
            ("details", self.details.is_some()),
        ]
        .into_iter()
        .filter_map(|(name, given)| given.then_some(name))
        .collect()
    }

    fn is_no(&self) -> bool {
        self.denied.is_some() || self.waits.is_some() || self.refused.is_some()
    }

    /// The answer in one line, as the door words it.
    pub(super) fn wanted(&self, request: &Request, door: Door) -> String {
        if let (Door::Http, Some(http)) = (door, &self.http) {
            return http.clone();
        }
        match (&self.denied, &self.waits, &self.refused) {
            (Some(code), _, _) => format!("DENY {code}"),
            (_, Some(code), _) => format!("REQUIRE_APPROVAL {code}"),
            (_, _, Some(code)) => format!("refused {code}"),
            _ => {
                let word = self.decision.as_deref().or(self.status.as_deref());
                let word = word.or(request.success().0);
                word.unwrap_or_default().to_owned()
            }
        }
    }

    /// Remit's own code, which stands in the details of an error by HTTP too.
    pub(super) fn reason_code(&self) -> Option<&str> {
        self.denied.as_deref().or(self.waits.as_deref())
    }
}

/// Whose API key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum By {
    /// One of the tenant's that may do everything.
    #[default]
    Agent,
    /// One of the tenant's that may only read.
    Reader,
    /// One of the tenant `acme-other`.
    Other,
    /// One of an operator.
    Operator,
    /// One that does not exist.
    Stranger,
    /// None.
    Nobody,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub(super) enum Unit {
    RiskPoints,
    UsdMicrocents,
    Tokens,
    Credits,
    Calls,
}

impl Unit {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::RiskPoints => "RISK_POINTS",
            Self::UsdMicrocents => "USD_MICROCENTS",
            Self::Tokens => "TOKENS",
            Self::Credits => "CREDITS",
            Self::Calls => "CALLS",
        }
    }

    pub(super) fn of_word(word: &str) -> Option<Self> {
        let all = [
            Self::RiskPoints,
            Self::UsdMicrocents,
            Self::Tokens,
            Self::Credits,
            Self::Calls,
        ];
        all.into_iter().find(|unit| unit.word() == word)
    }

    pub(super) fn proto(self) -> proto::Unit {
        match self {
            Self::RiskPoints => proto::Unit::RiskPoints,
            Self::UsdMicrocents => proto::Unit::UsdMicrocents,
            Self::Tokens => proto::Unit::Tokens,
            Self::Credits => proto::Unit::Credits,
            Self::Calls => proto::Unit::Calls,
        }
    }

    pub(super) fn of_proto(unit: proto::Unit) -> Option<Self> {
        Self::of_word(unit.as_str_name().strip_prefix("UNIT_")?)
    }
}

fn tokens() -> Unit {
    Unit::Tokens
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub(super) enum OveragePolicy {
    Reject,
    AllowIfAvailable,
    AllowWithOverdraft,
}

impl OveragePolicy {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Reject => "REJECT",
            Self::AllowIfAvailable => "ALLOW_IF_AVAILABLE",
            Self::AllowWithOverdraft => "ALLOW_WITH_OVERDRAFT",
        }
    }

    pub(super) fn proto(self) -> proto::OveragePolicy {
        match self {
            Self::Reject => proto::OveragePolicy::Reject,
            Self::AllowIfAvailable => proto::OveragePolicy::AllowIfAvailable,
            Self::AllowWithOverdraft => proto::OveragePolicy::AllowWithOverdraft,
        }
    }
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Subject {
    pub(super) tenant: Option<String>,
    pub(super) workspace: Option<String>,
    pub(super) app: Option<String>,
    pub(super) workflow: Option<String>,
    pub(super) agent: Option<String>,
    pub(super) toolset: Option<String>,
    #[serde(default)]
    pub(super) dimensions: BTreeMap<String, String>,
}

fn bot() -> Subject {
    Subject {
        agent: Some("bot".into()),
        ..Subject::default()
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Action {
    #[serde(default = "a_kind")]
    pub(super) kind: String,
    pub(super) name: String,
}

fn a_kind() -> String {
    "tool.invoke".into()
}

fn act() -> Action {
    Action {
        kind: a_kind(),
        name: "act".into(),
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Reserve {
    #[serde(rename = "as")]
    pub(super) name: Option<String>,
    pub(super) key: Option<String>,
    #[serde(default = "bot")]
    pub(super) subject: Subject,
    #[serde(default = "act")]
    pub(super) action: Action,
    pub(super) amount: i64,
    #[serde(default = "tokens")]
    pub(super) unit: Unit,
    pub(super) overage_policy: Option<OveragePolicy>,
    pub(super) ttl_ms: Option<u64>,
    pub(super) grace_period_ms: Option<u64>,
    #[serde(default)]
    pub(super) dry_run: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Decide {
    pub(super) key: Option<String>,
    #[serde(default = "bot")]
    pub(super) subject: Subject,
    #[serde(default = "act")]
    pub(super) action: Action,
    pub(super) amount: i64,
    #[serde(default = "tokens")]
    pub(super) unit: Unit,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Commit {
    pub(super) of: String,
    pub(super) key: Option<String>,
    pub(super) amount: i64,
    #[serde(default = "tokens")]
    pub(super) unit: Unit,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Release {
    pub(super) of: String,
    pub(super) key: Option<String>,
    pub(super) reason: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Extend {
    pub(super) of: String,
    pub(super) key: Option<String>,
    pub(super) by_ms: u64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Event {
    pub(super) key: Option<String>,
    #[serde(default = "bot")]
    pub(super) subject: Subject,
    #[serde(default = "act")]
    pub(super) action: Action,
    pub(super) amount: i64,
    #[serde(default = "tokens")]
    pub(super) unit: Unit,
    pub(super) overage_policy: Option<OveragePolicy>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Get {
    pub(super) of: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Fund {
    pub(super) key: Option<String>,
    pub(super) scope: String,
    #[serde(default = "tokens")]
    pub(super) unit: Unit,
    pub(super) operation: String,
    pub(super) amount: i64,
    /// Of RESET_SPENT, whose `amount` is what is allocated.
    pub(super) spent: Option<i64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Post {
    pub(super) path: String,
    pub(super) body: String,
    #[serde(default)]
    pub(super) headers: BTreeMap<String, String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Resolve {
    pub(super) of: String,
    pub(super) approve: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Wait {
    pub(super) ms: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Row {
    pub(super) scope: String,
    #[serde(default = "tokens")]
    pub(super) unit: Unit,
    pub(super) remaining: i64,
    #[serde(default)]
    pub(super) reserved: i64,
    #[serde(default)]
    pub(super) spent: i64,
    #[serde(default)]
    pub(super) debt: i64,
    #[serde(default)]
    pub(super) over_limit: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Caps {
    pub(super) max_tokens: Option<i64>,
    pub(super) max_steps_remaining: Option<i64>,
    pub(super) tool_allowlist: Option<Vec<String>>,
    pub(super) tool_denylist: Option<Vec<String>>,
    pub(super) cooldown_ms: Option<i64>,
}

impl Step {
    pub(super) fn request(&self) -> Result<Request<'_>, String> {
        let all = [
            self.reserve.as_ref().map(Request::Reserve),
            self.decide.as_ref().map(Request::Decide),
            self.commit.as_ref().map(Request::Commit),
            self.release.as_ref().map(Request::Release),
            self.extend.as_ref().map(Request::Extend),
            self.event.as_ref().map(Request::Event),
            self.get.as_ref().map(Request::Get),
            self.fund.as_ref().map(Request::Fund),
            self.post.as_ref().map(Request::Post),
            self.provision.as_deref().map(Request::Provision),
            self.resolve.as_ref().map(Request::Resolve),
            self.wait.as_ref().map(Request::Wait),
            self.balances.as_deref().map(Request::Balances),
        ];
        let mut given = all.into_iter().flatten();
        match (given.next(), given.next()) {
            (Some(request), None) => Ok(request),
            (None, _) => Err("it asks nothing".into()),
            (Some(_), Some(_)) => Err("it asks two things".into()),
        }
    }

    fn check(&self, case: &Case) -> Result<(), String> {
        let request = self.request()?;
        let Some(expect) = &self.expect else {
            return if request.is_asked() {
                Err("nothing is expected".into())
            } else {
                Ok(())
            };
        };
        let said = expect.said();
        if let Some(idle) = said
            .iter()
            .find(|name| !request.can_be_said().contains(name))
        {
            return Err(format!("`{idle}` is not looked at here"));
        }
        let words = ["decision", "status", "denied", "waits", "refused"];
        if words.iter().filter(|word| said.contains(word)).count() > 1 {
            return Err("it is answered in two ways".into());
        }
        let only = self.only.or(case.only);
        let by_http_alone = only == Some(Door::Http);
        if expect.http.is_some() && only == Some(Door::Grpc) {
            return Err("`http` is not looked at by gRPC".into());
        }
        if expect.is_no() && expect.http.is_none() && only != Some(Door::Grpc) {
            return Err("`http` must say how it is put by HTTP".into());
        }
        // By HTTP alone its own words are enough.
        let worded = expect.is_no() || (by_http_alone && expect.http.is_some());
        let lacks = request.success().1.iter().find(|name| !said.contains(name));
        if let (false, Some(lacks)) = (worded, lacks) {
            return Err(format!("`{lacks}` must be said of a success"));
        }
        if let Request::Post(_) = request
            && !by_http_alone
        {
            return Err("`post` is `only: http`".into());
        }
        Ok(())
    }
}

/// The cases of one file, each of them looked through.
fn parse(text: &str) -> Result<Vec<Case>, String> {
    let cases: Vec<Case> = serde_saphyr::from_str(text).map_err(|error| error.to_string())?;
    for case in &cases {
        for (at, step) in case.steps.iter().enumerate() {
            let checked = step.check(case);
            checked.map_err(|error| format!("{:?}, step {}: {error}", case.name, at + 1))?;
        }
    }
    Ok(cases)
}

/// Every case of a folder, with the name of its file.
pub(super) fn read(folder: &Path) -> Vec<(String, Case)> {
    let files = std::fs::read_dir(folder).expect("a folder of cases");
    let mut files: Vec<_> = files
        .map(|file| file.expect("a file of cases").path())
        .collect();
    files.sort();
    let mut cases = Vec::new();
    let mut names = BTreeSet::new();
    for file in files {
        let name = file.file_name().expect("a name").to_string_lossy();
        assert!(name.ends_with(".yaml"), "{name} is no file of cases");
        let text = std::fs::read_to_string(&file).expect("a file of cases");
        let read = parse(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(!read.is_empty(), "{name} is empty");
        for case in read {
            let fresh = names.insert(case.name.clone());
            assert!(fresh, "{name}: {:?} stands twice", case.name);
            cases.push((name.clone().into_owned(), case));
        }
    }
    cases
}

#[test]
fn what_would_not_be_looked_at_is_a_mistake() {
    let case =
        |step: &str| format!("[{{name: a case, document: '', steps: [{step}], balances: []}}]");
    for step in [
        "{reserve: {amount: 1}, expect: {decision: ALLOW}}",
        "{reserve: {amount: 1}, only: grpc, expect: {denied: BUDGET_EXCEEDED}}",
        "{commit: {of: r, amount: 1}, expect: {charged: 1}}",
        "{post: {path: /v1/events, body: ''}, only: http, expect: {http: 400 INVALID_REQUEST}}",
    ] {
        let read = parse(&case(step));
        assert!(read.is_ok(), "{step}: {read:?}");
    }
    for step in [
        "{}",
        "{reserve: {amount: 1}}",
        "{reserve: {amount: 1}, expect: {}}",
        "{reserve: {amount: 1}, decide: {amount: 1}, expect: {decision: ALLOW}}",
        "{reserve: {amount: 1}, expect: {decision: ALLOW}, otherwise: 1}",
        "{reserve: {amount: 1, colour: red}, expect: {decision: ALLOW}}",
        "{reserve: {amount: 1}, expect: {decision: ALLOW, colour: red}}",
        "{reserve: {amount: 1}, expect: {decision: ALLOW, charged: 1}}",
        "{reserve: {amount: 1, subject: {colour: red}}, expect: {decision: ALLOW}}",
        "{reserve: {amount: 1}, expect: {denied: BUDGET_EXCEEDED}}",
        "{reserve: {amount: 1}, expect: {http: 409 BUDGET_EXCEEDED}}",
        "{reserve: {amount: 1}, only: grpc, expect: {http: 409 BUDGET_EXCEEDED}}",
        "{reserve: {amount: 1}, only: grpc, expect: {denied: BUDGET_EXCEEDED, refused: UNIT_MISMATCH}}",
        "{commit: {of: r, amount: 1}, expect: {released: 1}}",
        "{post: {path: /v1/events, body: ''}, expect: {http: 400 INVALID_REQUEST}}",
        "{wait: {ms: 1}, expect: {status: ACTIVE}}",
        "{balances: [{scope: a, remaining: 1, colour: red}]}",
    ] {
        assert!(parse(&case(step)).is_err(), "{step}");
    }
    let more = case("{wait: {ms: 1}}").replace("balances", "colour: red, balances");
    assert!(parse(&more).is_err());
}
