"""What no client should send: each gets a clear error, writes nothing, and harms nobody after."""

import copy
import gzip
import json
import os
import re
import socket
import uuid
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import pytest

RUNTIME = urlsplit(os.environ["CYCLES_BASE_URL"]).netloc
ADMIN = urlsplit(os.environ["REMIT_CYCLES_ADMIN_URL"]).netloc
OPERATOR = {"X-Admin-API-Key": Path(os.environ["REMIT_KEY_FILE"]).read_text().strip()}

JSON = {"Content-Type": "application/json"}
UNIT = "TOKENS"
MIB = 1024 * 1024


@dataclass
class Answer:
    status: int
    headers: dict
    body: bytes

    def json(self):
        return json.loads(self.body)

    def __str__(self):
        return f"{self.status} {self.body[:500]!r}"


def read(response):
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, headers, response.read())


def send(method, path, body=None, headers=(), host=RUNTIME):
    """One request on a connection of its own. Text and bytes are sent as they are."""
    headers = dict(headers)
    if body is not None:
        headers = JSON | headers
        if not isinstance(body, str | bytes):
            body = json.dumps(body)
        if isinstance(body, str):
            body = body.encode()
    connection = HTTPConnection(host, timeout=20)
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in headers.items():
            for one in value if isinstance(value, list) else [value]:
                connection.putheader(name, one)
        if body is not None and "Transfer-Encoding" not in headers:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders()
        try:
            if body is not None:
                connection.send(body)
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused before it was read: the answer is there all the same
        return read(connection.getresponse())
    finally:
        connection.close()


def talk(sent, answers, host=RUNTIME):
    """Bytes on one connection, and so many answers from it."""
    name, port = host.split(":")
    with socket.create_connection((name, int(port)), timeout=20) as connection:
        connection.sendall(sent)
        stream = connection.makefile("rb")
        got = []
        for _ in range(answers):
            response = HTTPResponse(Stream(stream))
            response.begin()
            got.append(read(response))
        return got


@dataclass
class Stream:
    """What HTTPResponse wants of a socket: the answers that are left on it."""

    stream: object

    def makefile(self, _):
        return Unclosed(self.stream)


@dataclass
class Unclosed:
    stream: object

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def close(self):
        pass


def is_error(answer, status, error, about=None):
    """The standard error body, with the right code, that a person can use."""
    assert answer.status == status, answer
    assert answer.headers["content-type"].split(";")[0] == "application/json", answer.headers
    body = answer.json()
    assert body["error"] == error, answer
    assert {"error", "message", "request_id", "trace_id"} <= set(body), answer
    assert set(body) <= {"error", "message", "request_id", "trace_id", "details"}, answer
    assert body["request_id"] == answer.headers["x-request-id"], answer
    assert body["trace_id"] == answer.headers["x-cycles-trace-id"], answer
    assert re.fullmatch("[0-9a-f]{32}", body["trace_id"]), answer
    assert 0 < len(body["message"]) <= 2_000, answer
    inner = ("src/", "panicked", "unwrap", "wire::", "sqlx", "SQLSTATE")
    assert not any(word in answer.body.decode() for word in inner), answer
    if about:
        assert about in answer.body.decode(), f"the error doesn't name {about}: {answer}"


def all_are_errors(answers, status, error, about=None):
    """Answers by what was sent. Names every one that is wrong, not only the first."""
    wrong = []
    for sent, answer in answers:
        try:
            is_error(answer, status, error, about)
        except AssertionError as failed:
            wrong.append(f"{str(sent)[:200]!r}: {str(failed).splitlines()[0]}")
    assert not wrong, "\n".join(wrong)


def admin(method, path, body=None):
    answer = send(method, path, body, OPERATOR, ADMIN)
    assert answer.status in (200, 201), f"{method} {path}: {answer}"
    return answer.json()


@dataclass
class Tenant:
    name: str
    key: dict
    reservation: str = ""
    sequence: int = 0

    def send(self, method, path, body=None, headers=(), host=RUNTIME):
        return send(method, path, body, self.key | dict(headers), host)

    def take(self):
        """A tenant with a budget that lasts."""
        admin("POST", "/v1/admin/tenants", {"tenant_id": self.name, "name": self.name})
        made = admin("POST", "/v1/admin/api-keys", {"tenant_id": self.name, "name": "agents"})
        self.key = {"X-Cycles-API-Key": made["key_secret"]}
        admin("POST", "/v1/admin/budgets", {
            "tenant_id": self.name, "scope": f"tenant:{self.name}", "unit": UNIT,
            "allocated": {"unit": UNIT, "amount": 1_000_000_000},
        })
        self.renew()
        return self

    def renew(self):
        """The reservation and the place in the ledger that a test starts from."""
        admin("PATCH", f"/v1/admin/tenants/{self.name}", {"status": "ACTIVE"})
        reservation = self.send("GET", f"/v1/reservations/{self.reservation or 'none'}").json()
        if reservation.get("status") != "ACTIVE":
            reserved = self.send("POST", "/v1/reservations", bodies(self)["reserve"])
            self.reservation = reserved.json()["reservation_id"]
        self.sequence = self.probe()

    def probe(self):
        """Writes one entry, and answers which: the next one, where nothing else was written."""
        event = {"actual": {"unit": UNIT, "amount": 0}}
        answer = self.send("POST", "/v1/events", bodies(self)["event"] | event)
        assert answer.status == 201, f"the server doesn't answer any more: {answer}"
        return int(answer.headers["x-remit-ledger-sequence"])

    def holdings(self):
        """Balances and reservations, as the tenant sees them."""
        balances = self.send("GET", f"/v1/balances?tenant={self.name}")
        reservations = self.send("GET", "/v1/reservations?limit=200")
        assert (balances.status, reservations.status) == (200, 200)
        return balances.json(), reservations.json()


def bodies(tenant):
    """What each call takes; the cases below spoil them."""
    acts = {
        "idempotency_key": uuid.uuid4().hex,
        "subject": {"tenant": tenant.name, "agent": "bot"},
        "action": {"kind": "tool.call", "name": "act"},
    }
    amount = {"unit": UNIT, "amount": 5}
    return {
        "decide": acts | {"estimate": amount},
        "reserve": acts | {"estimate": amount, "ttl_ms": 3_600_000},
        "commit": {"idempotency_key": uuid.uuid4().hex, "actual": amount},
        "release": {"idempotency_key": uuid.uuid4().hex},
        "extend": {"idempotency_key": uuid.uuid4().hex, "extend_by_ms": 1_000},
        "event": acts | {"actual": amount},
    }


def path_of(call, tenant):
    settles = f"/v1/reservations/{tenant.reservation}/{call}"
    return {
        "decide": "/v1/decide", "reserve": "/v1/reservations", "event": "/v1/events",
    }.get(call, settles)


CALLS = ["decide", "reserve", "commit", "release", "extend", "event"]
ACTING = ["decide", "reserve", "event"]
SETTLING = ["commit", "release", "extend"]
WITH_METADATA = ["decide", "reserve", "commit", "extend", "event"]
AMOUNT = {"decide": "estimate", "reserve": "estimate", "commit": "actual", "event": "actual"}


@pytest.fixture(scope="module")
def tenants():
    return [Tenant(f"bad-{uuid.uuid4().hex[:12]}", {}).take() for _ in range(2)]


@pytest.fixture
def tenant(tenants):
    """The tenant whose agents send nonsense. Nothing may be written of it, nor of another."""
    before = [tenant.holdings() for tenant in tenants]
    yield tenants[0]
    for tenant, held in zip(tenants, before, strict=True):
        try:
            assert tenant.holdings() == held
            sequence = tenant.probe()
            assert sequence - tenant.sequence == 1, "something was written into the ledger"
            tenant.sequence = sequence
        except AssertionError:
            tenant.renew()
            raise


@pytest.fixture
def other(tenants, tenant):
    return tenants[1]


@pytest.fixture
def busy():
    """A tenant for what may be written."""
    return Tenant(f"good-{uuid.uuid4().hex[:12]}", {}).take()


def test_the_bodies_are_good_before_they_are_spoiled(busy):
    for call in ["decide", "reserve", "extend", "commit", "event"]:
        answer = busy.send("POST", path_of(call, busy), bodies(busy)[call])
        assert answer.status == (201 if call == "event" else 200), f"{call}: {answer}"
    again = busy.send("POST", "/v1/reservations", bodies(busy)["reserve"])
    busy.reservation = again.json()["reservation_id"]
    answer = busy.send("POST", path_of("release", busy), bodies(busy)["release"])
    assert answer.status == 200, answer


# What is no JSON, or not of the shape of a body.

NO_BODY = {
    "empty": b"",
    "blank": b" \n",
    "unfinished": b'{"idempotency_key": "k"',
    "list": b"[]",
    "list of a body": b'[{"idempotency_key": "k"}]',
    "null": b"null",
    "text": b'"idempotency_key"',
    "number": b"42",
    "two bodies": b"{} {}",
    "single quotes": b"{'idempotency_key': 'k'}",
    "comment": b'{"idempotency_key": "k" /* mine */}',
    "trailing comma": b'{"idempotency_key": "k",}',
    "not UTF-8": b'{"idempotency_key": "\xff\xfe"}',
    "byte order mark": b'\xef\xbb\xbf{"idempotency_key": "k"}',
    "UTF-16": '{"idempotency_key": "k"}'.encode("utf-16"),
    "half a surrogate pair": b'{"idempotency_key": "\\ud800"}',
    "raw line break in a string": b'{"idempotency_key": "a\nb"}',
    "brackets without end": b"[" * 100_000,
    "braces without end": b'{"a":' * 100_000,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("body", NO_BODY.values(), ids=NO_BODY)
def test_what_is_no_json_object(tenant, call, body):
    is_error(tenant.send("POST", path_of(call, tenant), body), 400, "INVALID_REQUEST")


@pytest.mark.parametrize("call", CALLS)
def test_a_whole_body_with_something_behind_it(tenant, call):
    body = json.dumps(bodies(tenant)[call])
    for tail in ["x", "}", "{}", "\0"]:
        is_error(tenant.send("POST", path_of(call, tenant), body + tail), 400, "INVALID_REQUEST")


def test_a_list_in_place_of_an_object(tenant):
    """What some readers of JSON take for the object's fields, in their order."""
    key = {call: bodies(tenant)[call]["idempotency_key"] for call in CALLS}
    amount, subject, action = [UNIT, 5], [tenant.name], ["tool.call", "act"]
    objects = bodies(tenant)["reserve"]
    wholes = {
        "reserve": [key["reserve"], objects["subject"], objects["action"], objects["estimate"]],
        "event": [key["event"], objects["subject"], objects["action"], objects["estimate"]],
        "commit": [key["commit"], {"unit": UNIT, "amount": 5}],
        "release": [key["release"]], "extend": [key["extend"], 1_000],
        "decide": [key["decide"], subject, action, amount],
    }
    answers = [
        (body, tenant.send("POST", path_of(call, tenant), body)) for call, body in wholes.items()
    ]
    for call in CALLS:
        for field, value in [("subject", subject), ("action", action), (AMOUNT.get(call), amount),
                             ("metrics", []), ("metrics", [1, 1, 1, "m", {}])]:
            body = bodies(tenant)[call]
            if field in body or field == "metrics" and call in ("commit", "event"):
                body[field] = value
                answers.append((body, tenant.send("POST", path_of(call, tenant), body)))
    all_are_errors(answers, 400, "INVALID_REQUEST")


# Fields: wrong, too many, too few.

def long(count):
    return "x" * count


NOT_TEXT = [5, True, [], {}]
NOT_AN_OBJECT = [5, "text", True, [], [{}]]
NOT_AN_AMOUNT = [-1, 1.5, 1.0, 1e3, "5", "", True, [5], {}, None, 2**63, 2**64, 10**400, -(2**63)]
NOT_A_COUNT = [-1, 1.5, "5", True, [5], {}, 2**64]
NOT_AN_ENUM = [
    "", "NOPE", "allow", 5, True, [], {}, {"REJECT": None}, {"TOKENS": None}, ["TOKENS"],
]
NOT_A_KEY = ["", long(257), long(300), "a\0b", "a\nb", None, *NOT_TEXT]
NOT_A_NAME = [
    "", " ", "a b", "a/b", "a:b", "*", "a\0", "a\n", "é", "名", "a,b", "{}", long(129), long(300),
    *NOT_TEXT,
]

# By call: the path of a field and what must not stand there.
BAD_FIELDS = [
    (CALLS, "idempotency_key", NOT_A_KEY),
    (ACTING, "subject", [None, {}, {"dimensions": {"a": "b"}}, {"tenant": None}, *NOT_AN_OBJECT]),
    (ACTING, "subject.tenant", NOT_A_NAME),
    (ACTING, "subject.workspace", NOT_A_NAME),
    (ACTING, "subject.agent", NOT_A_NAME),
    (ACTING, "subject.toolset", NOT_A_NAME),
    (ACTING, "subject.dimensions", [
        {f"d{n}": "v" for n in range(17)}, {"d": long(257)}, {"d": 5}, {"d": None}, {"d": ["v"]},
        {"": "v"}, {"A": "v", "a": "w"}, *NOT_AN_OBJECT,
    ]),
    (ACTING, "action", [None, {}, *NOT_AN_OBJECT]),
    (ACTING, "action.kind", ["", long(65), "a\0b", "a*", "a?", " a", "a ", None, *NOT_TEXT]),
    (ACTING, "action.name", ["", long(257), "a\0b", None, *NOT_TEXT]),
    (ACTING, "action.tags", ["tag", 5, {}, ["t"] * 11, [long(65)], [5], [None], [["t"]]]),
    (ACTING, "action.policy_keys", [
        {"host": 5}, {"surprise": "x"}, {"custom": {"a": 5}}, {"custom": ["a"]},
        {"custom": {f"k{n}": "v" for n in range(9)}}, *NOT_AN_OBJECT,
    ]),
    (["decide", "reserve"], "estimate", [None, {}, *NOT_AN_OBJECT]),
    (["decide", "reserve"], "estimate.amount", NOT_AN_AMOUNT),
    (["decide", "reserve"], "estimate.unit", ["CALLS", "tokens", "DOLLARS", None, *NOT_AN_ENUM]),
    (["commit", "event"], "actual", [None, {}, *NOT_AN_OBJECT]),
    (["commit", "event"], "actual.amount", NOT_AN_AMOUNT),
    (["commit", "event"], "actual.unit", ["CALLS", "tokens", "DOLLARS", None, *NOT_AN_ENUM]),
    (["reserve"], "ttl_ms", [0, 999, 86_400_001, *NOT_A_COUNT]),
    (["reserve"], "grace_period_ms", [60_001, *NOT_A_COUNT]),
    (["reserve"], "dry_run", ["true", "", 0, 1, [], {}]),
    (["reserve", "event"], "overage_policy", ["reject", *NOT_AN_ENUM]),
    (["reserve"], "observe_mode", ["observe", *NOT_AN_ENUM]),
    (["extend"], "extend_by_ms", [0, 86_400_001, None, *NOT_A_COUNT]),
    (["release"], "reason", NOT_TEXT),
    (["commit", "event"], "metrics", NOT_AN_OBJECT),
    (["commit", "event"], "metrics.tokens_input", NOT_A_COUNT),
    (["commit", "event"], "metrics.tokens_output", NOT_A_COUNT),
    (["commit", "event"], "metrics.latency_ms", NOT_A_COUNT),
    (["commit", "event"], "metrics.model_version", NOT_TEXT),
    (["commit", "event"], "metrics.custom", NOT_AN_OBJECT),
    (["event"], "client_time_ms", NOT_A_COUNT),
    (WITH_METADATA, "metadata", NOT_AN_OBJECT),
]


def spoiled(body, field, value):
    """The body with one field replaced, made if need be."""
    body = copy.deepcopy(body)
    *parents, last = field.split(".")
    place = body
    for name in parents:
        place = place.setdefault(name, {})
    place[last] = value
    return body


@pytest.mark.parametrize(
    "call, field, values",
    [(call, field, values) for calls, field, values in BAD_FIELDS for call in calls],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_a_field_that_may_not_stand_so(tenant, call, field, values):
    answers = []
    for value in values:
        body = spoiled(bodies(tenant)[call], field, value)
        answers.append((value, tenant.send("POST", path_of(call, tenant), body)))
    all_are_errors(answers, 400, "INVALID_REQUEST", about=field.split(".")[-1])


@pytest.mark.parametrize("call", AMOUNT)
@pytest.mark.parametrize(
    "number", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1e-400", "05", "+5", "0x5", "5.",
               ".5", "1_000", "9223372036854775808", "1" * 5_000]
)
def test_numbers_that_are_none_or_too_large(tenant, call, number):
    body = spoiled(bodies(tenant)[call], f"{AMOUNT[call]}.amount", "HERE")
    text = json.dumps(body).replace('"HERE"', number)
    is_error(tenant.send("POST", path_of(call, tenant), text), 400, "INVALID_REQUEST")


UNKNOWN = [
    (CALLS, "surprise"), (CALLS, "Idempotency_Key"), (CALLS, "idempotencyKey"),
    (ACTING, "subject.surprise"), (ACTING, "action.surprise"),
    (["decide", "reserve"], "estimate.surprise"), (["commit", "event"], "actual.surprise"),
    (["commit", "event"], "metrics.surprise"),
    (["decide", "commit", "release", "extend", "event"], "dry_run"), (["release"], "metadata"),
]


@pytest.mark.parametrize(
    "call, field", [(call, field) for calls, field in UNKNOWN for call in calls]
)
def test_a_field_that_nobody_knows(tenant, call, field):
    for value in [1, None, {}]:
        body = spoiled(bodies(tenant)[call], field, value)
        answer = tenant.send("POST", path_of(call, tenant), body)
        is_error(answer, 400, "INVALID_REQUEST", about=field.split(".")[-1])


MISSING = [
    (CALLS, "idempotency_key"),
    (ACTING, "subject"), (ACTING, "action"), (ACTING, "action.kind"), (ACTING, "action.name"),
    (["decide", "reserve"], "estimate"), (["decide", "reserve"], "estimate.amount"),
    (["decide", "reserve"], "estimate.unit"), (["commit", "event"], "actual"),
    (["commit", "event"], "actual.amount"), (["commit", "event"], "actual.unit"),
    (["extend"], "extend_by_ms"),
]


@pytest.mark.parametrize(
    "call, field", [(call, field) for calls, field in MISSING for call in calls]
)
def test_a_field_that_is_missing(tenant, call, field):
    body = bodies(tenant)[call]
    *parents, last = field.split(".")
    place = body
    for name in parents:
        place = place[name]
    del place[last]
    answer = tenant.send("POST", path_of(call, tenant), body)
    is_error(answer, 400, "INVALID_REQUEST", about=last)


# What one reader takes for this and another for that.

def doubled(text, name, second):
    """The JSON with a field of that name twice, the second one last."""
    value = json.loads(text)[name]
    return text[:-1] + f', "{second}": {json.dumps(value)}' + "}"


@pytest.mark.parametrize("call", CALLS)
def test_a_field_twice(tenant, call):
    body = bodies(tenant)[call]
    text = json.dumps(body)
    wrong = [doubled(text, name, name) for name in body]
    # The same name in other letters of JSON.
    wrong.append(doubled(text, "idempotency_key", "\\u0069dempotency_key"))
    for field in body:
        if isinstance(body[field], dict):
            inner = json.dumps(body[field])
            for name in body[field]:
                wrong.append(text.replace(inner, doubled(inner, name, name)))
    if call in WITH_METADATA:
        for metadata in [
            '{"a": 1, "a": 1}', '{"a": 1, "a": 2}', '{"a": {"b": 1, "b": 2}}',
            '{"a": [{"b": 1, "b": 1}]}', '{"a": 1, "\\u0061": 2}', '{"": 1, "": 1}',
            '{"a": [[[[{"b": {"c": 1, "c": null}}]]]]}',
        ]:
            wrong.append(text[:-1] + f', "metadata": {metadata}' + "}")
    if call in ACTING:
        subject = '{"agent": "bot", "dimensions": {"a": "b", "a": "b"}}'
        wrong.append(text.replace(json.dumps(body["subject"]), subject))
    if call in ["commit", "event"]:
        wrong.append(text[:-1] + ', "metrics": {"tokens_input": 1, "tokens_input": 1}}')
        wrong.append(text[:-1] + ', "metrics": {"custom": {"a": 1, "a": 1}}}')
    answers = [(one, tenant.send("POST", path_of(call, tenant), one)) for one in wrong]
    all_are_errors(answers, 400, "INVALID_REQUEST")


@pytest.mark.parametrize("call", CALLS)
def test_an_idempotency_key_in_the_header_that_is_another(tenant, call):
    body = bodies(tenant)[call]
    own = body["idempotency_key"]
    answers = [
        (header, tenant.send("POST", path_of(call, tenant), body, {"X-Idempotency-Key": header}))
        for header in ["another", own.upper(), own + "x", [own, "another"], ["another", own]]
    ]
    all_are_errors(answers, 400, "INVALID_REQUEST")


@pytest.mark.parametrize("call", CALLS)
def test_an_idempotency_key_in_the_header_alone(tenant, call):
    body = bodies(tenant)[call]
    header = {"X-Idempotency-Key": body.pop("idempotency_key")}
    answer = tenant.send("POST", path_of(call, tenant), body, header)
    is_error(answer, 400, "INVALID_REQUEST", about="idempotency_key")


def test_an_equal_idempotency_key_in_the_header_is_fine(busy):
    body = bodies(busy)["reserve"]
    header = {"X-Idempotency-Key": body["idempotency_key"]}
    assert busy.send("POST", "/v1/reservations", body, header).status == 200


@pytest.mark.parametrize("call", WITH_METADATA)
def test_metadata_with_a_number_beyond_all(tenant, call):
    for number in ["1e400", "-1e400", "NaN", "Infinity", "1" * 5_000, "0x1", "1."]:
        text = json.dumps(bodies(tenant)[call])[:-1] + f', "metadata": {{"n": {number}}}' + "}"
        answer = tenant.send("POST", path_of(call, tenant), text)
        is_error(answer, 400, "INVALID_REQUEST")


@pytest.mark.parametrize("header, value", [
    ("traceparent", "nonsense"), ("traceparent", f"00-{'0' * 32}-{'0' * 16}-01"),
    ("X-Cycles-Trace-Id", "nonsense"), ("X-Cycles-Trace-Id", "0" * 32),
    ("X-Cycles-Trace-Id", b"\xff" * 32), ("X-Request-Id", "theirs"),
])
def test_a_bad_trace_is_left_aside(tenant, header, value):
    answer = tenant.send("GET", "/v1/balances?agent=bot", headers={header: value})
    assert answer.status == 200, answer
    assert re.fullmatch("(?!0{32})[0-9a-f]{32}", answer.headers["x-cycles-trace-id"])
    assert answer.headers["x-request-id"] == str(uuid.UUID(answer.headers["x-request-id"]))


# Size and depth.

def nested(levels):
    """JSON of so many objects in each other, as text: Python's own writer gives up sooner."""
    return '{"a":' * levels + "1" + "}" * levels


@pytest.mark.parametrize("call", WITH_METADATA)
def test_metadata_of_a_thousand_levels(tenant, call):
    text = json.dumps(bodies(tenant)[call])
    for deep in [nested(1_000), '{"a":' + "[" * 1_000 + "]" * 1_000 + "}"]:
        body = text[:-1] + f', "metadata": {deep}' + "}"
        is_error(tenant.send("POST", path_of(call, tenant), body), 400, "INVALID_REQUEST")


@pytest.mark.parametrize("call", CALLS)
def test_a_body_of_10_mib(tenant, call):
    body = json.dumps(bodies(tenant)[call])
    large = body + " " * (10 * MIB)
    is_error(tenant.send("POST", path_of(call, tenant), large), 413, "INVALID_REQUEST")
    large = body[:-1] + ', "metadata": {"a": "' + long(10 * MIB) + '"}}'
    is_error(tenant.send("POST", path_of(call, tenant), large), 413, "INVALID_REQUEST")


def test_a_body_of_10_mib_in_chunks(tenant):
    chunk = b"10000\r\n" + b" " * 65_536 + b"\r\n"
    body = b"".join([chunk] * 160) + b"0\r\n\r\n"
    answer = tenant.send("POST", "/v1/reservations", body, {"Transfer-Encoding": "chunked"})
    is_error(answer, 413, "INVALID_REQUEST")


def test_a_body_in_broken_chunks(tenant):
    for body in [b"zz\r\n{}\r\n0\r\n\r\n", b"2\r\n{}xx\r\n0\r\n\r\n", b"-2\r\n{}\r\n0\r\n\r\n"]:
        answer = tenant.send("POST", "/v1/reservations", body, {"Transfer-Encoding": "chunked"})
        is_error(answer, 400, "INVALID_REQUEST")


def test_a_large_body_that_is_only_announced(tenant):
    head = request_head("POST", "/v1/reservations", tenant.key, 10 * MIB)
    [answer] = talk(head + b"{", 1)
    is_error(answer, 413, "INVALID_REQUEST")
    asks_first = head.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")
    [answer] = talk(asks_first, 1)
    is_error(answer, 413, "INVALID_REQUEST")


def test_a_large_body_without_a_key(tenant):
    answer = send("POST", "/v1/reservations", " " * (10 * MIB))
    assert answer.status in (401, 413)
    is_error(answer, answer.status, "UNAUTHORIZED" if answer.status == 401 else "INVALID_REQUEST")


# Content types.

@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", [
    "text/plain", "application/xml", "application/x-www-form-urlencoded", "multipart/form-data",
    "application/jsonx", "text/json", "json", "", "application/octet-stream", "application/grpc",
])
def test_a_body_of_another_content_type(tenant, call, kind):
    body = bodies(tenant)[call]
    answer = tenant.send("POST", path_of(call, tenant), body, {"Content-Type": kind})
    is_error(answer, 415, "INVALID_REQUEST")


@pytest.mark.parametrize("call", CALLS)
def test_a_body_without_a_content_type(tenant, call):
    body = bodies(tenant)[call]
    answer = tenant.send("POST", path_of(call, tenant), body, {"Content-Type": []})
    is_error(answer, 415, "INVALID_REQUEST")


def test_a_packed_body(tenant):
    body = gzip.compress(json.dumps(bodies(tenant)["reserve"]).encode())
    answer = tenant.send("POST", "/v1/reservations", body, {"Content-Encoding": "gzip"})
    assert answer.status in (400, 415)
    is_error(answer, answer.status, "INVALID_REQUEST")


@pytest.mark.parametrize("kind", [
    "application/json; charset=utf-8", "Application/JSON", "application/json;charset=UTF-8",
])
def test_json_by_other_spellings_is_fine(busy, kind):
    body = bodies(busy)["reserve"]
    answer = busy.send("POST", "/v1/reservations", body, {"Content-Type": kind})
    assert answer.status == 200, answer


# Text of every kind.

TEXTS = [
    "naïve café", "発送する", "🦀🧾", "a\u0301", "\u202eright to left", "'; DROP TABLE budgets; --",
    "%s%n", "\\", '"', "\u2028", "\uffff", "\U0010ffff", "\x7f", "\u0000", "\u001b[31m",
]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_text_is_kept_as_it_came_or_refused(busy, text):
    for field in ["action.name", "subject.dimensions.note", "metadata.note", "idempotency_key"]:
        body = spoiled(bodies(busy)["reserve"], field, text)
        answer = busy.send("POST", "/v1/reservations", body)
        if answer.status == 400:
            is_error(answer, 400, "INVALID_REQUEST")
            assert not text.isprintable() or field == "action.name", f"{field}: {answer}"
            continue
        assert answer.status == 200, f"{field}: {answer}"
        made = answer.json()["reservation_id"]
        if field == "idempotency_key":
            asked = urlencode({"idempotency_key": text, "limit": 1})
            [row] = busy.send("GET", f"/v1/reservations?{asked}").json()["reservations"]
            assert (row["reservation_id"], row["idempotency_key"]) == (made, text)
            continue
        kept = busy.send("GET", f"/v1/reservations/{made}").json()
        for name in field.split("."):
            kept = kept[name]
        assert kept == text
    reason = {"idempotency_key": uuid.uuid4().hex, "reason": text}
    answer = busy.send("POST", path_of("release", busy), reason)
    assert answer.status in (200, 400), answer


# Keys, and whose things they are.

STRANGE_KEYS = {
    "blank": "", "spaces": "   ", "word": "secret", "of another product": "cyc_live_" + long(32),
    "unknown": "rmt_00000000000000000000_" + "0" * 64, "long": "rmt_" + long(8_000),
    "not ASCII": b"rmt_\xff\xfe", "without a secret": "rmt_00000000000000000000_",
}
READS = [("GET", "/v1/reservations"), ("GET", f"/v1/reservations/{uuid.UUID(int=1)}"),
         ("GET", "/v1/balances?agent=bot")]


def every_call(tenant):
    return READS + [("POST", path_of(call, tenant)) for call in CALLS]


@pytest.mark.parametrize("key", STRANGE_KEYS.values(), ids=STRANGE_KEYS)
def test_a_key_that_is_none(tenant, key):
    for method, path in every_call(tenant):
        body = bodies(tenant)["reserve"] if method == "POST" else None
        answer = send(method, path, body, {"X-Cycles-API-Key": key})
        is_error(answer, 401, "UNAUTHORIZED")
    for method, path in [("GET", "/v1/reservations?tenant=x"), ("GET", f"{READS[1][1]}"),
                         ("POST", path_of("release", tenant))]:
        # A bad admin key does not fall back to a good key beside it; a blank one is none.
        body = bodies(tenant)["release"] if method == "POST" else None
        if key.strip():
            answer = send(method, path, body, tenant.key | {"X-Admin-API-Key": key})
            is_error(answer, 401, "UNAUTHORIZED")


def test_no_key_at_all(tenant):
    for method, path in every_call(tenant):
        body = bodies(tenant)["reserve"] if method == "POST" else None
        is_error(send(method, path, body), 401, "UNAUTHORIZED")
        bearer = {"Authorization": "Bearer " + tenant.key["X-Cycles-API-Key"]}
        is_error(send(method, path, body, bearer), 401, "UNAUTHORIZED")


def test_a_key_with_its_last_letter_changed(tenant):
    good = tenant.key["X-Cycles-API-Key"]
    for key in [good[:-1] + ("0" if good[-1] != "0" else "1"), good + "0", good[:-1], good.upper()]:
        answer = send("GET", "/v1/balances?agent=bot", headers={"X-Cycles-API-Key": key})
        is_error(answer, 401, "UNAUTHORIZED")


def test_a_revoked_key(busy):
    made = admin("POST", "/v1/admin/api-keys", {"tenant_id": busy.name, "name": "lost"})
    admin("DELETE", f"/v1/admin/api-keys/{made['key_id']}")
    lost = {"X-Cycles-API-Key": made["key_secret"]}
    is_error(send("POST", "/v1/reservations", bodies(busy)["reserve"], lost), 401, "UNAUTHORIZED")


def test_the_key_of_another_tenant(tenant, other):
    path = f"/v1/reservations/{tenant.reservation}"
    is_error(other.send("GET", path), 404, "NOT_FOUND")
    for call in SETTLING:
        answer = other.send("POST", f"{path}/{call}", bodies(tenant)[call])
        is_error(answer, 404, "NOT_FOUND")


def test_a_subject_of_another_tenant(tenant, other):
    names = [other.name, "nobody", tenant.name.upper(), tenant.name.capitalize()]
    for call in ACTING:
        for name in names:
            body = spoiled(bodies(tenant)[call], "subject.tenant", name)
            is_error(tenant.send("POST", path_of(call, tenant), body), 403, "FORBIDDEN")
    for path in ["/v1/balances", "/v1/reservations"]:
        is_error(tenant.send("GET", f"{path}?tenant={other.name}"), 403, "FORBIDDEN")


# Routes.

def test_a_method_that_a_route_does_not_take(tenant):
    one = f"/v1/reservations/{tenant.reservation}"
    routes = {
        "/v1/decide": ["POST"], "/v1/reservations": ["GET", "POST"], one: ["GET"],
        f"{one}/commit": ["POST"], f"{one}/release": ["POST"], f"{one}/extend": ["POST"],
        "/v1/balances": ["GET"],
    }
    for path, taken in routes.items():
        for method in ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"]:
            if method not in taken:
                body = {} if method in ("POST", "PUT", "PATCH") else None
                answer = tenant.send(method, path, body)
                is_error(answer, 405, "INVALID_REQUEST")
                assert set(taken) <= set(re.split(", ?", answer.headers["allow"])), path


@pytest.mark.parametrize("host", [RUNTIME, ADMIN], ids=["runtime", "admin"])
def test_an_unknown_route(tenant, host):
    one = f"/v1/reservations/{tenant.reservation}"
    for path in ["/", "/v1", "/v1/", "/v1/nope", "/v2/decide", "/V1/DECIDE", "//v1/decide",
                 "/v1/decide/more", f"{one}/commit/more", f"{one}/cancel", "/v1//reservations",
                 "/admin", "/.env", "/v1/admin/nope", "/v1/decide%2f", "/v1/decide;x=1",
                 "/" + long(4_000)]:
        for method in ["GET", "POST"]:
            body = {} if method == "POST" else None
            answer = send(method, path, body, tenant.key | OPERATOR, host)
            is_error(answer, 404, "NOT_FOUND")


def test_the_planes_are_apart(tenant):
    answer = send("GET", "/v1/admin/tenants", headers=OPERATOR)
    is_error(answer, 404, "NOT_FOUND")
    body = bodies(tenant)["reserve"]
    is_error(tenant.send("POST", "/v1/reservations", body, host=ADMIN), 404, "NOT_FOUND")


BAD_IDS = [
    "nope", str(uuid.UUID(int=1)), "%20", "%00", "a%00b", "%FF", "%C3%28", "%", "%2", "%ZZ",
    "%u0041", "..%2f..%2fetc", "%2e%2e", "*", "'", "1;drop", "%F0%9F%A6%80", long(128), long(129),
    long(4_000),
]


@pytest.mark.parametrize("name", BAD_IDS, ids=lambda name: name[:12])
def test_a_reservation_of_no_such_name(tenant, name):
    calls = [("GET", "", None)]
    calls += [("POST", f"/{call}", bodies(tenant)[call]) for call in SETTLING]
    for method, tail, body in calls:
        answer = tenant.send(method, f"/v1/reservations/{name}{tail}", body)
        if re.fullmatch("[a-z0-9-]{1,128}", name):
            is_error(answer, 404, "NOT_FOUND")
        else:
            error = "NOT_FOUND" if answer.status == 404 else "INVALID_REQUEST"
            is_error(answer, 404 if answer.status == 404 else 400, error)


# Questions.

BAD_PAGES = ["limit=abc", "limit=0", "limit=201", "limit=-1", "limit=1.5", "limit=1e1",
             "limit=99999999999999999999", "limit=%00", "limit=5&limit=6", "cursor=nope",
             "cursor=%00", "cursor=%FF", "cursor=" + long(2_000)]
BAD_TIMES = ["yesterday", "2026", "2026-01-01", "2026-01-01T00:00:00", "2026-13-01T00:00:00Z",
             "2026-02-30T00:00:00Z", "2026-01-01T25:00:00Z", "1767225600000", "%00", "%FF",
             "99999-01-01T00:00:00Z", "2026-01-01T00:00:00+99:00"]
TIMES = ["from", "to", "expires_from", "expires_to", "finalized_from", "finalized_to"]


@pytest.mark.parametrize("path", ["/v1/reservations?", "/v1/balances?agent=bot&"])
@pytest.mark.parametrize("question", BAD_PAGES, ids=lambda question: question[:20])
def test_a_page_that_is_none(tenant, path, question):
    is_error(tenant.send("GET", path + question), 400, "INVALID_REQUEST")


@pytest.mark.parametrize("name", TIMES)
def test_a_time_that_is_none(tenant, name):
    for time in BAD_TIMES:
        answer = tenant.send("GET", f"/v1/reservations?{name}={time}")
        is_error(answer, 400, "INVALID_REQUEST", about=name)


@pytest.mark.parametrize("name", ["", "expires_", "finalized_"])
def test_a_time_that_ends_before_it_begins(tenant, name):
    span = f"{name}from=2026-02-01T00:00:00Z&{name}to=2026-01-01T00:00:00Z"
    is_error(tenant.send("GET", f"/v1/reservations?{span}"), 400, "INVALID_REQUEST")


@pytest.mark.parametrize("question", [
    "status=active", "status=NOPE", "status=5", "sort_by=nope", "sort_dir=up",
    "sort_by=created_at_ms&sort_dir=sideways",
])
def test_a_filter_that_is_none(tenant, question):
    is_error(tenant.send("GET", f"/v1/reservations?{question}"), 400, "INVALID_REQUEST")


@pytest.mark.parametrize("question", [
    "sort_by=status", "sort_by=reserved", "sort_dir=asc", "sort_by=created_at_ms&sort_dir=asc",
])
def test_an_order_that_is_not_served(tenant, question):
    is_error(tenant.send("GET", f"/v1/reservations?{question}"), 501, "NOT_IMPLEMENTED")


STRANGE_VALUES = ["%00", "a%00b", "%FF", "%ZZ", "%", "%F0%9F%A6%80", "a%20b", "*", long(300)]


@pytest.mark.parametrize(
    "name", ["agent", "workspace", "toolset", "idempotency_key", "tenant", "include"]
)
@pytest.mark.parametrize("value", STRANGE_VALUES, ids=lambda value: value[:8])
def test_a_filter_with_strange_text(tenant, name, value):
    paths = ["/v1/reservations"]
    if name not in ("idempotency_key", "include"):
        paths.append("/v1/balances")
    for path in paths:
        answer = tenant.send("GET", f"{path}?{name}={value}")
        if answer.status == 200:
            rows = answer.json()
            assert name == "include" or not (rows.get("reservations") or rows.get("balances"))
        elif answer.status == 403:
            is_error(answer, 403, "FORBIDDEN")
        else:
            is_error(answer, 400, "INVALID_REQUEST")


def test_balances_of_nothing(tenant):
    for question in ["", "?limit=5", "?include_children=true", "?tenant="]:
        is_error(tenant.send("GET", f"/v1/balances{question}"), 400, "INVALID_REQUEST")


def test_a_cursor_of_another_question(busy):
    for _ in range(3):
        busy.send("POST", "/v1/reservations", bodies(busy)["reserve"])
    page = busy.send("GET", "/v1/reservations?limit=1").json()
    assert page["has_more"] and page["next_cursor"]
    question = f"agent=other&limit=1&cursor={page['next_cursor']}"
    is_error(busy.send("GET", f"/v1/reservations?{question}"), 400, "INVALID_REQUEST")


# The admin plane.

def operator(method, path, body=None, headers=()):
    return send(method, path, body, OPERATOR | dict(headers), ADMIN)


def admin_bodies(tenant):
    """Path and body of each admin call that takes one. `tenant` has its budget already."""
    budget = f"scope=tenant:{tenant.name}&unit={UNIT}"
    amount = {"unit": UNIT, "amount": 5}
    name = f"new-{uuid.uuid4().hex[:12]}"
    return {
        "tenant": ("POST", "/v1/admin/tenants", {"tenant_id": name, "name": "New"}),
        "tenant change": ("PATCH", f"/v1/admin/tenants/{tenant.name}", {"name": "Renamed"}),
        "key": ("POST", "/v1/admin/api-keys", {"tenant_id": tenant.name, "name": "another"}),
        "budget": ("POST", "/v1/admin/budgets", {
            "tenant_id": tenant.name, "scope": f"tenant:{tenant.name}/agent:{name}", "unit": UNIT,
            "allocated": amount,
        }),
        "budget change": ("PATCH", f"/v1/admin/budgets?{budget}", {"overdraft_limit": amount}),
        "fund": ("POST", f"/v1/admin/budgets/fund?{budget}", {
            "operation": "CREDIT", "amount": amount, "idempotency_key": uuid.uuid4().hex,
        }),
    }


ADMIN_CALLS = ["tenant", "tenant change", "key", "budget", "budget change", "fund"]


def inventory(tenants):
    """What operators see of the tenants, and how many tenants there are."""
    seen = [operator("GET", "/v1/admin/tenants?limit=100").json()]
    for tenant in tenants:
        for path in ["api-keys", "budgets"]:
            seen.append(operator("GET", f"/v1/admin/{path}?tenant_id={tenant.name}").json())
    return seen


@pytest.fixture
def managed(tenants, tenant):
    """The tenant that operators mismanage. They change nothing."""
    before = inventory(tenants)
    yield tenant
    assert inventory(tenants) == before


def test_the_admin_bodies_are_good_before_they_are_spoiled(busy):
    for call, (method, path, body) in admin_bodies(busy).items():
        answer = operator(method, path, body)
        assert answer.status in (200, 201), f"{call}: {answer}"


@pytest.mark.parametrize("call", ADMIN_CALLS)
def test_an_admin_body_that_is_none(managed, call):
    method, path, body = admin_bodies(managed)[call]
    for wrong in [*NO_BODY.values(), json.dumps(body) + "x"]:
        is_error(operator(method, path, wrong), 400, "INVALID_REQUEST")
    for name in body:
        twice = doubled(json.dumps(body), name, name)
        is_error(operator(method, path, twice), 400, "INVALID_REQUEST")
    is_error(operator(method, path, body | {"surprise": 1}), 400, "INVALID_REQUEST", "surprise")
    plain = {"Content-Type": "text/plain"}
    is_error(operator(method, path, body, plain), 415, "INVALID_REQUEST")
    large = json.dumps(body) + " " * (10 * MIB)
    is_error(operator(method, path, large), 413, "INVALID_REQUEST")


NOT_A_TTL = [0, 999, 86_400_001, *NOT_A_COUNT]
NOT_A_SCOPE = [
    "", "tenant", "tenant:", ":x", "agent:bot", "x:y", "tenant:{t}/", "/tenant:{t}",
    "tenant:{t}//agent:b", "tenant:{t}/agent:", "tenant:{t}/agent:a b", "tenant:{t}/agent:é",
    "tenant:{t}/agent:a\0", "tenant:{t}/agent:a/agent:b", "tenant:{t}/agent:" + long(129),
    "tenant:{t} ", None, *NOT_TEXT,
]
BAD_ADMIN_FIELDS = [
    ("tenant", "tenant_id", ["", "ab", "A-Tenant", "a b", "a_b", "a/b", "é", "a\0b", long(65),
                             "_remit", None, *NOT_TEXT]),
    ("tenant", "name", ["", long(257), "a\0b", None, *NOT_TEXT]),
    ("tenant", "status", ["SUSPENDED", "NOPE", 5, {"ACTIVE": None}]),
    ("tenant", "metadata", NOT_AN_OBJECT),
    *((call, field, values) for call in ["tenant", "tenant change"] for field, values in [
        ("default_commit_overage_policy", NOT_AN_ENUM),
        ("default_reservation_ttl_ms", NOT_A_TTL),
        ("max_reservation_ttl_ms", NOT_A_TTL),
        ("max_reservation_extensions", NOT_A_COUNT),
    ]),
    ("tenant change", "status", ["active", {"SUSPENDED": None}, *NOT_AN_ENUM]),
    ("tenant change", "name", ["", long(257), "a\0b", *NOT_TEXT]),
    ("key", "tenant_id", ["", "a b", None, *NOT_TEXT]),
    ("key", "name", ["", "a\0b", None, *NOT_TEXT]),
    ("key", "permissions", ["balances:read", 5, {}, ["nope"], [5], [""], [None]]),
    ("key", "expires_at", ["yesterday", "2020-01-01T00:00:00Z", "", 5, "2099-13-01T00:00:00Z"]),
    ("budget", "tenant_id", ["", "a b", "nobody", *NOT_TEXT]),
    ("budget", "scope", NOT_A_SCOPE),
    ("budget", "unit", ["tokens", "CALLS", None, *NOT_AN_ENUM]),
    ("budget", "allocated", [None, {}, *NOT_AN_OBJECT]),
    ("budget", "allocated.amount", NOT_AN_AMOUNT),
    ("budget", "allocated.unit", ["tokens", None, *NOT_AN_ENUM]),
    ("budget", "overdraft_limit", NOT_AN_OBJECT),
    ("budget", "overdraft_limit", [{"unit": UNIT, "amount": -1}, {"unit": UNIT}]),
    ("budget change", "overdraft_limit", [{"unit": UNIT, "amount": -1}, *NOT_AN_OBJECT]),
    ("fund", "operation", ["credit", None, {"CREDIT": None}, *NOT_AN_ENUM]),
    ("fund", "amount", [None, {}, *NOT_AN_OBJECT]),
    ("fund", "amount.amount", NOT_AN_AMOUNT),
    ("fund", "amount.unit", ["tokens", None, *NOT_AN_ENUM]),
    ("fund", "spent", [{"unit": UNIT, "amount": 1}, *NOT_AN_OBJECT]),
    ("fund", "reason", ["a\0b", *NOT_TEXT]),
    ("fund", "idempotency_key", ["", long(257), "a\0b", *NOT_TEXT]),
]


@pytest.mark.parametrize(
    "call, field, values", BAD_ADMIN_FIELDS, ids=lambda part: part if isinstance(part, str) else ""
)
def test_an_admin_field_that_may_not_stand_so(managed, call, field, values):
    answers = []
    for value in values:
        method, path, body = admin_bodies(managed)[call]
        if isinstance(value, str) and field == "scope":
            value = value.replace("{t}", managed.name)
        answers.append((value, operator(method, path, spoiled(body, field, value))))
    all_are_errors(answers, 400, "INVALID_REQUEST", about=field.split(".")[-1])


@pytest.mark.parametrize("call, field", [
    ("tenant", "tenant_id"), ("tenant", "name"), ("key", "tenant_id"), ("key", "name"),
    ("budget", "scope"), ("budget", "unit"), ("budget", "allocated"),
    ("fund", "operation"), ("fund", "amount"),
])
def test_an_admin_field_that_is_missing(managed, call, field):
    method, path, body = admin_bodies(managed)[call]
    del body[field]
    is_error(operator(method, path, body), 400, "INVALID_REQUEST", about=field)


def test_a_setting_that_is_not_served(managed):
    for call, field in [("tenant", "parent_tenant_id"), ("tenant change", "parent_tenant_id"),
                        ("budget", "commit_overage_policy"), ("budget", "period_start"),
                        ("budget", "period_end"), ("budget change", "commit_overage_policy")]:
        method, path, body = admin_bodies(managed)[call]
        is_error(operator(method, path, body | {field: "x"}), 501, "NOT_IMPLEMENTED", field)


def test_a_funding_of_two_amounts_is_one_entry(busy):
    budget = f"/v1/admin/budgets/fund?scope=tenant:{busy.name}&unit={UNIT}"
    sequences = []
    for operation in ["RESET_SPENT", "REPAY_DEBT", "CREDIT"]:
        body = {"operation": operation, "amount": {"unit": UNIT, "amount": 500},
                "idempotency_key": operation[2] + long(255)}
        answer = operator("POST", budget, body)
        assert answer.status == 200, answer
        sequences.append(int(answer.headers["x-remit-ledger-sequence"]))
        assert operator("POST", budget, body).headers["x-remit-replayed"] == "true"
    assert sequences == list(range(sequences[0], sequences[0] + 3))


def test_a_funding_says_which_amount_is_wrong(managed):
    method, path, body = admin_bodies(managed)["fund"]
    body = body | {"operation": "RESET_SPENT", "spent": {"unit": UNIT, "amount": 1}}
    for field in ["amount", "spent"]:
        negative = spoiled(body, f"{field}.amount", -1)
        is_error(operator(method, path, negative), 400, "INVALID_REQUEST", about=f"{field}: ")
        other_unit = spoiled(body, f"{field}.unit", "CREDITS")
        is_error(operator(method, path, other_unit), 400, "UNIT_MISMATCH", about=field)


def test_a_budget_in_two_units(managed):
    method, path, body = admin_bodies(managed)["budget"]
    other_unit = spoiled(body, "allocated.unit", "CREDITS")
    is_error(operator(method, path, other_unit), 400, "UNIT_MISMATCH")
    method, path, body = admin_bodies(managed)["fund"]
    is_error(operator(method, path, spoiled(body, "amount.unit", "CREDITS")), 400, "UNIT_MISMATCH")


def test_what_is_there_already(managed):
    taken = {"tenant_id": managed.name, "name": "Somebody else"}
    is_error(operator("POST", "/v1/admin/tenants", taken), 409, "DUPLICATE_RESOURCE")
    budget = {
        "tenant_id": managed.name, "scope": f"tenant:{managed.name}", "unit": UNIT,
        "allocated": {"unit": UNIT, "amount": 1},
    }
    is_error(operator("POST", "/v1/admin/budgets", budget), 409, "DUPLICATE_RESOURCE")


def test_what_is_not_there(managed):
    for name in ["nobody", "%00", "%FF", "a%20b", "%ZZ", long(300)]:
        for method, body in [("GET", None), ("PATCH", {"name": "Renamed"})]:
            answer = operator(method, f"/v1/admin/tenants/{name}", body)
            if name == "nobody" or answer.status == 404:
                is_error(answer, 404, "TENANT_NOT_FOUND")
            else:
                is_error(answer, 400, "INVALID_REQUEST")
        answer = operator("DELETE", f"/v1/admin/api-keys/{name}")
        error = "NOT_FOUND" if answer.status == 404 else "INVALID_REQUEST"
        is_error(answer, 404 if answer.status == 404 else 400, error)
    for call in ["key", "budget"]:
        method, path, body = admin_bodies(managed)[call]
        body["tenant_id"] = "nobody"
        if "scope" in body:
            body["scope"] = "tenant:nobody"
        is_error(operator(method, path, body), 404, "TENANT_NOT_FOUND")
    nowhere = f"scope=tenant:{managed.name}/agent:nobody&unit={UNIT}"
    _, _, fund = admin_bodies(managed)["fund"]
    change = {"overdraft_limit": {"unit": UNIT, "amount": 1}}
    for method, path, body in [
        ("GET", "/lookup", None), ("POST", "/fund", fund), ("POST", "/freeze", None),
        ("POST", "/unfreeze", None), ("PATCH", "", change),
    ]:
        answer = operator(method, f"/v1/admin/budgets{path}?{nowhere}", body)
        is_error(answer, 404, "BUDGET_NOT_FOUND")


def test_a_budget_that_is_named_badly(managed):
    _, _, fund = admin_bodies(managed)["fund"]
    own = f"tenant:{managed.name}"
    for question in ["", f"?scope={own}", f"?unit={UNIT}", f"?scope={own}&unit=tokens",
                     f"?scope=&unit={UNIT}", f"?scope=%00&unit={UNIT}", f"?scope=%FF&unit={UNIT}",
                     f"?scope=agent:b&unit={UNIT}"]:
        for method, path, body in [
            ("GET", "/lookup", None), ("POST", "/fund", fund), ("POST", "/freeze", None),
            ("POST", "/unfreeze", None), ("PATCH", "", {}),
        ]:
            answer = operator(method, f"/v1/admin/budgets{path}{question}", body)
            is_error(answer, 400, "INVALID_REQUEST")


def test_a_funding_beyond_what_can_be_counted(managed):
    method, path, body = admin_bodies(managed)["fund"]
    body["amount"]["amount"] = 2**63 - 1
    answer = operator(method, path, body)
    assert answer.status in (400, 409), answer
    is_error(answer, answer.status, "INVALID_REQUEST")
    body = body | {"operation": "DEBIT", "idempotency_key": uuid.uuid4().hex}
    is_error(operator(method, path, body), 409, "BUDGET_EXCEEDED")


def test_a_freeze_of_what_is_not_so(busy):
    budget = f"scope=tenant:{busy.name}&unit={UNIT}"
    is_error(operator("POST", f"/v1/admin/budgets/unfreeze?{budget}"), 409, "INVALID_REQUEST")
    assert operator("POST", f"/v1/admin/budgets/freeze?{budget}").status == 200
    is_error(operator("POST", f"/v1/admin/budgets/freeze?{budget}"), 409, "INVALID_REQUEST")
    answer = busy.send("POST", "/v1/reservations", bodies(busy)["reserve"])
    is_error(answer, 409, "BUDGET_FROZEN")


@pytest.mark.parametrize("path", [
    "/v1/admin/tenants?", "/v1/admin/api-keys?tenant_id={t}&", "/v1/admin/budgets?tenant_id={t}&",
    "/v1/admin/audit/logs?", "/v1/balances?tenant_id={t}&",
])
def test_an_admin_page_that_is_none(managed, path):
    path = path.replace("{t}", managed.name)
    questions = ["limit=abc", "limit=1.5", "limit=99999999999999999999", "limit=%00", "cursor=nope",
                 "cursor=%00", "cursor=%FF", "limit=1&limit=2"]
    answers = [(question, operator("GET", path + question)) for question in questions]
    all_are_errors(answers, 400, "INVALID_REQUEST")


def admin_calls(tenant):
    """Every call of the admin plane: those that change something, and those that read."""
    budget = f"scope=tenant:{tenant.name}&unit={UNIT}"
    changes = list(admin_bodies(tenant).values())
    for turn in ["freeze", "unfreeze"]:
        changes.append(("POST", f"/v1/admin/budgets/{turn}?{budget}", None))
    changes.append(("DELETE", "/v1/admin/api-keys/00000000000000000000", None))
    reads = ["tenants", f"tenants/{tenant.name}", f"api-keys?tenant_id={tenant.name}",
             f"budgets?tenant_id={tenant.name}", f"budgets/lookup?{budget}",
             f"audit/logs?tenant_id={tenant.name}"]
    paths = [f"/v1/admin/{path}" for path in reads]
    paths += [f"/v1/balances?tenant_id={tenant.name}", "/v1/auth/introspect"]
    return changes, [("GET", path, None) for path in paths]


@pytest.mark.parametrize("key", [{}] + [
    {header: key} for key in ["", "wrong", "rmt_00000000000000000000_" + "0" * 64]
    for header in ["X-Admin-API-Key", "X-Cycles-API-Key"]
], ids=str)
def test_an_admin_call_without_a_key(managed, key):
    changes, reads = admin_calls(managed)
    for method, path, body in changes + reads:
        is_error(send(method, path, body, key, ADMIN), 401, "UNAUTHORIZED")


@pytest.mark.parametrize("header", ["X-Admin-API-Key", "X-Cycles-API-Key"])
def test_an_agents_key_manages_nothing_and_sees_no_other_tenant(managed, other, header):
    own, strangers = ({header: one.key["X-Cycles-API-Key"]} for one in [managed, other])
    changes, reads = admin_calls(managed)
    for method, path, body in changes:
        tenants = ("/v1/admin/budgets", "/v1/admin/budgets/fund")
        is_tenants = method == "POST" and path.partition("?")[0] in tenants
        for key in [own, strangers]:
            answer = send(method, path, body, key, ADMIN)
            if is_tenants and header == "X-Cycles-API-Key":
                is_error(answer, 403, "INSUFFICIENT_PERMISSIONS")
            else:
                is_error(answer, 401, "UNAUTHORIZED")
    for method, path, body in reads:
        answer = send(method, path, body, strangers, ADMIN)
        assert answer.status in (200, 401, 404), f"{path}: {answer}"
        seen = answer.status == 200 and managed.name in answer.body.decode()
        assert not seen, f"{path}: {answer}"


def test_an_admin_method_that_a_route_does_not_take(managed):
    for path in ["/v1/admin/tenants", f"/v1/admin/tenants/{managed.name}", "/v1/admin/api-keys",
                 "/v1/admin/budgets", "/v1/admin/budgets/fund", "/v1/admin/audit/logs",
                 "/v1/auth/introspect", "/v1/balances"]:
        for method in ["PUT", "BREW"]:
            is_error(operator(method, path, {}), 405, "INVALID_REQUEST")


def test_an_admin_call_that_is_not_served(managed):
    for method, path in [
        ("GET", "/v1/admin/policies"), ("POST", "/v1/admin/policies"),
        ("GET", "/v1/admin/webhooks"), ("POST", "/v1/admin/webhooks"), ("GET", "/v1/webhooks"),
        ("PATCH", "/v1/admin/api-keys/00000000000000000000"), ("GET", "/v1/events"),
        ("GET", "/v1/admin/events"), ("GET", "/v1/admin/overview"), ("POST", "/v1/auth/validate"),
        ("POST", "/v1/admin/tenants/bulk-action"), ("POST", "/v1/admin/budgets/bulk-action"),
        ("GET", "/v1/admin/config/webhook-security"),
    ]:
        body = None if method == "GET" else {}
        is_error(operator(method, path, body), 501, "NOT_IMPLEMENTED")


# Connections.

def request_head(method, path, headers, length=None):
    lines = [f"{method} {path} HTTP/1.1", f"Host: {RUNTIME}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if length is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {length}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def whole(tenant, call, body):
    head = request_head("POST", path_of(call, tenant), tenant.key, len(body))
    return head + body


def test_two_requests_at_once_on_one_connection(busy):
    first = request_head("GET", f"/v1/reservations/{busy.reservation}", busy.key)
    second = request_head("GET", "/v1/balances?agent=bot", busy.key)
    answers = talk(first + second, 2)
    assert [answer.status for answer in answers] == [200, 200]
    assert answers[0].json()["reservation_id"] == busy.reservation
    assert "balances" in answers[1].json()


def test_a_bad_request_before_a_good_one_on_one_connection(busy):
    good = json.dumps(bodies(busy)["reserve"]).encode()
    bad = {
        b"{": (400, "INVALID_REQUEST"),
        json.dumps(bodies(busy)["reserve"] | {"surprise": 1}).encode(): (400, "INVALID_REQUEST"),
        json.dumps(spoiled(bodies(busy)["reserve"], "subject.tenant", "nobody")).encode():
            (403, "FORBIDDEN"),
    }
    for body, expected in bad.items():
        first, second = talk(whole(busy, "reserve", body) + whole(busy, "reserve", good), 2)
        is_error(first, *expected)
        assert second.status == 200, second


def test_the_same_request_twice_on_one_connection_is_one_reservation(busy):
    body = json.dumps(bodies(busy)["reserve"]).encode()
    first, second = talk(whole(busy, "reserve", body) * 2, 2)
    assert (first.status, second.status) == (200, 200)
    assert first.json()["reservation_id"] == second.json()["reservation_id"]
    assert second.headers["x-remit-replayed"] == "true"


SMUGGLED = {
    "two lengths": "Content-Length: 5\r\nContent-Length: 6\r\n",
    "a length that is none": "Content-Length: five\r\n",
    "a negative length": "Content-Length: -5\r\n",
    "a length and chunks": "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
    "an unknown encoding": "Transfer-Encoding: sideways\r\n",
}


@pytest.mark.parametrize("lines", SMUGGLED.values(), ids=SMUGGLED)
def test_a_request_whose_end_is_unclear(tenant, lines):
    head = request_head("POST", "/v1/reservations", tenant.key | JSON)
    inner = json.dumps(bodies(tenant)["reserve"]).encode()
    sent = head[:-2] + lines.encode() + b"\r\n0\r\n\r\n" + whole(tenant, "reserve", inner)
    [answer] = talk(sent, 1)
    assert 400 <= answer.status < 500, answer


@pytest.mark.parametrize("sent", [
    b"\r\n\r\nnonsense\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 64,
    b"GET / HTTP/9.9\r\n\r\n", b"GET\r\n\r\n", b"\0" * 1_000,
    b"GET /v1/balances HTTP/1.1\r\nHost: x\r\nbroken header\r\n\r\n",
    b"GET /v1/balances HTTP/1.1\r\nX-A: " + b"a" * 1_000_000 + b"\r\n\r\n",
    b"GET /v1/balances HTTP/1.1\r\n" + b"X-A: a\r\n" * 10_000 + b"\r\n",
], ids=["words", "TLS", "version", "short", "zeros", "header", "long header", "many headers"])
def test_what_is_no_http(tenant, sent):
    name, port = RUNTIME.split(":")
    with socket.create_connection((name, int(port)), timeout=20) as connection:
        try:
            connection.sendall(sent)
            got = connection.recv(65_536)
        except (BrokenPipeError, ConnectionResetError):
            got = b""
    assert got == b"" or re.match(rb"HTTP/1\.[01] 4\d\d ", got), got[:200]


def test_a_connection_that_ends_in_the_middle(tenant):
    name, port = RUNTIME.split(":")
    body = json.dumps(bodies(tenant)["reserve"]).encode()
    sent = whole(tenant, "reserve", body)
    for end in [10, len(sent) - len(body), len(sent) - 1]:
        with socket.create_connection((name, int(port)), timeout=20) as connection:
            connection.sendall(sent[:end])
