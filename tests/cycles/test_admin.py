"""Who may do what on the admin plane, and that it does what it says: nothing by halves."""

import uuid
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlencode

import pytest
from support import OPERATOR_KEY, TARGET, connect, new_key, new_tenant, provision, unique
from test_bad_input import ADMIN, RUNTIME, is_error, send

from remit.v1 import provisioning_pb2, provisioning_pb2_grpc

UNIT = "TOKENS"
EVERYTHING = ["reservations:create", "balances:read", "budgets:write", "admin:write", "admin:read",
              "admin:tenants:write", "admin:budgets:write", "admin:apikeys:write",
              "admin:audit:read"]


def call(method, path, body=None, key=OPERATOR_KEY, header="X-Admin-API-Key", **params):
    """One call on the admin plane, with the operator's key where nothing is said."""
    question = f"?{urlencode(params)}" if params else ""
    return send(method, path + question, body, {header: key}, ADMIN)


def done(answer):
    assert answer.status in (200, 201), answer
    return answer.json()


def amount(of):
    return {"unit": UNIT, "amount": of}


@pytest.fixture
def tenant(journal):
    tenant = new_tenant(journal)
    tenant.budget(1_000, unit=UNIT)
    return tenant


def budget_of(tenant, path=""):
    return {"scope": tenant.scope(path), "unit": UNIT}


def operator_of(*permissions):
    """The key of an operator who may do only so much."""
    wanted = [provisioning_pb2.Permission.Value(f"PERMISSION_{name}") for name in permissions]
    made = provisioning_pb2_grpc.ProvisioningStub(connect(TARGET)).CreateApiKey(
        provisioning_pb2.CreateApiKeyRequest(
            idempotency_key=uuid.uuid4().hex,
            api_key=provisioning_pb2.ApiKey(display_name="some operator", permissions=wanted),
        ),
        metadata=[("authorization", f"Bearer {OPERATOR_KEY}")],
        timeout=10,
    )
    return made.secret


# Who may do it.

def operators_calls(tenant):
    """Calls that no tenant's key makes."""
    own = f"/v1/admin/tenants/{tenant.name}"
    budget = urlencode(budget_of(tenant))
    return [
        ("PATCH", own, {"status": "CLOSED"}), ("PATCH", own, {"status": "SUSPENDED"}),
        ("PATCH", own, {"status": "ACTIVE"}), ("PATCH", own, {"name": "Mine"}),
        ("PATCH", own, {"default_commit_overage_policy": "ALLOW_WITH_OVERDRAFT"}),
        ("PATCH", own, {"max_reservation_ttl_ms": 86_400_000}), ("GET", own, None),
        ("POST", "/v1/admin/tenants", {"tenant_id": unique("t"), "name": "Another"}),
        ("GET", "/v1/admin/tenants", None),
        ("POST", "/v1/admin/api-keys", {"tenant_id": tenant.name, "name": "another"}),
        ("GET", f"/v1/admin/api-keys?tenant_id={tenant.name}", None),
        ("DELETE", "/v1/admin/api-keys/00000000000000000000", None),
        ("PATCH", f"/v1/admin/budgets?{budget}", {"overdraft_limit": amount(10**9)}),
        ("POST", f"/v1/admin/budgets/freeze?{budget}", None),
        ("POST", f"/v1/admin/budgets/unfreeze?{budget}", None),
        ("GET", f"/v1/admin/audit/logs?tenant_id={tenant.name}", None),
    ]


def test_a_tenants_key_changes_nothing_of_what_operators_set(tenant):
    key = new_key(tenant.name, permissions=EVERYTHING)
    before = done(call("GET", f"/v1/admin/tenants/{tenant.name}"))
    for state in ["ACTIVE", "SUSPENDED"]:
        done(call("PATCH", f"/v1/admin/tenants/{tenant.name}", {"status": state}))
        for method, path, body in operators_calls(tenant):
            for header in ["X-Cycles-API-Key", "X-Admin-API-Key"]:
                answer = call(method, path, body, key, header)
                is_error(answer, 401, "UNAUTHORIZED")
            is_error(answer, 401, "UNAUTHORIZED", about="Invalid admin API key")
        after = done(call("GET", f"/v1/admin/tenants/{tenant.name}"))
        assert after == before | {"status": state}


def test_a_tenants_key_is_no_admin_key_for_anything(tenant):
    key = new_key(tenant.name, permissions=EVERYTHING)
    budget = urlencode(budget_of(tenant))
    fund = {"operation": "CREDIT", "amount": amount(1)}
    for method, path, body in [
        ("GET", f"/v1/admin/budgets?tenant_id={tenant.name}", None),
        ("GET", f"/v1/admin/budgets/lookup?{budget}", None),
        ("POST", "/v1/admin/budgets", {**budget_of(tenant, "agent:a"), "allocated": amount(1)}),
        ("POST", f"/v1/admin/budgets/fund?{budget}", fund),
        ("GET", f"/v1/balances?tenant_id={tenant.name}", None),
        ("GET", "/v1/auth/introspect", None),
    ]:
        is_error(call(method, path, body, key), 401, "UNAUTHORIZED", about="Invalid admin API key")
        # Nor beside a good one.
        both = {"X-Admin-API-Key": key, "X-Cycles-API-Key": key}
        is_error(send(method, path, body, both, ADMIN), 401, "UNAUTHORIZED")
        assert call(method, path, body, key, "X-Cycles-API-Key").status in (200, 201)


def test_an_operators_calls_take_no_operators_key_in_the_agents_header(tenant):
    for method, path, body in operators_calls(tenant):
        answer = call(method, path, body, header="X-Cycles-API-Key")
        is_error(answer, 401, "UNAUTHORIZED", about="Missing X-Admin-API-Key")


def test_what_can_not_be_told_is_not_done(tenant):
    key = operator_of("PROVISION", "LOOSEN")
    name = unique("t")
    for method, path, body in [
        ("POST", "/v1/admin/tenants", {"tenant_id": name, "name": name}),
        ("PATCH", f"/v1/admin/tenants/{tenant.name}", {"name": "Other"}),
        ("POST", "/v1/admin/budgets", {**budget_of(tenant, "agent:a"), "allocated": amount(1)}),
        ("PATCH", f"/v1/admin/budgets?{urlencode(budget_of(tenant))}",
         {"overdraft_limit": amount(7)}),
        ("POST", f"/v1/admin/budgets/freeze?{urlencode(budget_of(tenant))}", None),
    ]:
        refused = call(method, path, body, key)
        is_error(refused, 403, "INSUFFICIENT_PERMISSIONS", about="PERMISSION_READ")
    is_error(call("GET", f"/v1/admin/tenants/{name}"), 404, "TENANT_NOT_FOUND")
    assert done(call("GET", f"/v1/admin/tenants/{tenant.name}"))["name"] == tenant.name
    [budget] = done(call("GET", "/v1/admin/budgets", tenant_id=tenant.name))["ledgers"]
    assert (budget["status"], budget["overdraft_limit"]["amount"]) == ("ACTIVE", 0)


def test_lifting_a_stop_needs_a_permission_and_says_so(tenant):
    key = operator_of("PROVISION", "READ")
    path = f"/v1/admin/tenants/{tenant.name}"
    done(call("PATCH", path, {"status": "SUSPENDED"}, key))
    refused = call("PATCH", path, {"status": "ACTIVE"}, key)
    is_error(refused, 403, "INSUFFICIENT_PERMISSIONS")
    done(call("PATCH", path, {"status": "ACTIVE"}))


def test_any_key_may_look_at_itself(tenant):
    for permissions in [["reservations:create"], ["admin:apikeys:write"], ["balances:read"]]:
        key = new_key(tenant.name, permissions=permissions)
        told = done(call("GET", "/v1/auth/introspect", key=key, header="X-Cycles-API-Key"))
        assert (told["auth_type"], told["tenant_id"]) == ("tenant", tenant.name)
        assert set(permissions) <= set(told["permissions"])
        able = {name for name, can in told["capabilities"].items() if can}
        assert able == {
            "reservations:create": {"manage_reservations"},
            "admin:apikeys:write": set(),
            "balances:read": {"view_budgets", "view_reservations"},
        }[permissions[0]]
        assert len(told["capabilities"]) == 15
    told = done(call("GET", "/v1/auth/introspect"))
    assert (told["auth_type"], told["permissions"]) == ("admin", ["*"])


def test_an_operator_is_told_no_more_than_it_may_do(tenant):
    key = operator_of("READ")
    told = done(call("GET", "/v1/auth/introspect", key=key))
    assert told["auth_type"] == "admin" and "*" not in told["permissions"]
    assert "admin:tenants:read" in told["permissions"]
    assert all(name.endswith((":read", ":list")) for name in told["permissions"])
    able = {name for name, can in told["capabilities"].items() if can}
    assert able == {"view_tenants", "view_budgets", "view_reservations"}


# What changes at the same time.

def at_once(*calls):
    with ThreadPoolExecutor(len(calls)) as pool:
        return [made.result() for made in [pool.submit(one) for one in calls]]


def test_two_changes_of_a_tenant_at_once_are_both_made(tenant):
    path = f"/v1/admin/tenants/{tenant.name}"
    for n in range(20):
        extensions, ttl = {"max_reservation_extensions": n}, {"max_reservation_ttl_ms": 60_000 + n}
        default = {"default_reservation_ttl_ms": 30_000 + n}
        answers = at_once(*(lambda body=body: call("PATCH", path, body)
                            for body in [extensions, ttl, default]))
        assert [answer.status for answer in answers] == [200, 200, 200]
        stands = done(call("GET", path))
        assert extensions | ttl | default == {
            name: stands[name] for name in extensions | ttl | default
        }


def test_of_many_who_freeze_at_once_one_has_done_it(tenant):
    for turn in ["freeze", "unfreeze"]:
        path = f"/v1/admin/budgets/{turn}?{urlencode(budget_of(tenant))}"
        answers = at_once(*[lambda: call("POST", path)] * 16)
        assert sorted(answer.status for answer in answers) == [200] + [409] * 15
        for answer in answers:
            if answer.status == 409:
                is_error(answer, 409, "INVALID_REQUEST", about="already")


def test_a_closed_budget_stays_closed(tenant):
    provision(f"""
budgets:
  - {{scope: 'tenant:{tenant.name}', unit: UNIT_TOKENS, allocation: 1000, state: BUDGET_STATE_CLOSED}}
""")
    budget = urlencode(budget_of(tenant))
    for turn in ["freeze", "unfreeze"]:
        refused = call("POST", f"/v1/admin/budgets/{turn}?{budget}")
        is_error(refused, 409, "BUDGET_CLOSED")
    change = {"overdraft_limit": amount(1)}
    is_error(call("PATCH", f"/v1/admin/budgets?{budget}", change), 409, "BUDGET_CLOSED")
    assert done(call("GET", f"/v1/admin/budgets/lookup?{budget}"))["status"] == "CLOSED"


# Lists.

def listed(tenant, **filters):
    rows = done(call("GET", "/v1/admin/budgets", tenant_id=tenant.name, **filters))["ledgers"]
    return {row["scope"].partition("/")[2] for row in rows}


def test_budgets_are_listed_by_what_is_used_of_them(tenant):
    for path, allocated, spent in [("agent:none", 0, 0), ("agent:half", 100, 50),
                                   ("agent:full", 100, 100)]:
        tenant.budget(allocated, path, UNIT, overdraft_limit=amount(1_000))
        if spent:
            body = {"operation": "RESET_SPENT", "amount": amount(allocated), "spent": amount(spent)}
            path = f"/v1/admin/budgets/fund?{urlencode(budget_of(tenant, path))}"
            done(call("POST", path, body))
    event = {
        "idempotency_key": uuid.uuid4().hex, "subject": {"tenant": tenant.name, "agent": "full"},
        "action": {"kind": "tool.call", "name": "act"}, "actual": amount(20),
        "overage_policy": "ALLOW_WITH_OVERDRAFT",
    }
    key = {"X-Cycles-API-Key": tenant.key}
    answer = send("POST", "/v1/events", event, key, RUNTIME)
    assert answer.status == 201, answer
    everything = {"", "agent:none", "agent:half", "agent:full"}
    assert listed(tenant) == everything
    assert listed(tenant, has_debt="true") == {"agent:full"}
    assert listed(tenant, has_debt="false") == everything - {"agent:full"}
    assert listed(tenant, over_limit="true") == set()
    assert listed(tenant, over_limit="false") == everything
    assert listed(tenant, utilization_min="0.5") == {"agent:half", "agent:full"}
    assert listed(tenant, utilization_max="0.5") == everything - {"agent:full"}
    assert listed(tenant, utilization_min="0.5", utilization_max="0.5") == {"agent:half"}
    assert listed(tenant, search="AGENT:H") == {"agent:half"}
    assert listed(tenant, search=tenant.name) == everything
    for wrong in [{"has_debt": "yes"}, {"over_limit": "1"}, {"utilization_min": "NaN"},
                  {"utilization_max": "-1"}, {"search": "x" * 129},
                  {"utilization_min": "1", "utilization_max": "0.5"}]:
        answer = call("GET", "/v1/admin/budgets", tenant_id=tenant.name, **wrong)
        is_error(answer, 400, "INVALID_REQUEST", about=[*wrong][0])


def test_the_audit_log_is_searched_by_key_and_request(tenant):
    asked = send("POST", "/v1/decide", {
        "idempotency_key": uuid.uuid4().hex, "subject": {"tenant": tenant.name},
        "action": {"kind": "tool.call", "name": "act"}, "estimate": amount(10**9),
    }, {"X-Cycles-API-Key": tenant.key}, RUNTIME)
    assert asked.status == 200, asked
    key, operator = (text.split("_")[1] for text in [tenant.key, OPERATOR_KEY])

    def logs(**filters):
        found = done(call("GET", "/v1/admin/audit/logs", tenant_id=tenant.name, **filters))
        return [row["operation"] for row in found["logs"]]

    assert logs(key_id=key) == ["DECIDE"]
    assert set(logs(key_id=operator)) == {"PROVISION", "API_KEY_CREATED"}
    assert logs(request_id=asked.headers["x-request-id"]) == ["DECIDE"]
    assert logs(trace_id=asked.headers["x-cycles-trace-id"]) == ["DECIDE"]
    assert logs(error_code="BUDGET_FROZEN,BUDGET_EXCEEDED") == ["DECIDE"]
    assert logs(error_code="BUDGET_FROZEN") == logs(key_id="nobody") == []
    assert logs(to="9999-12-31T23:59:59Z") == logs()
    rows = done(call("GET", "/v1/admin/audit/logs", tenant_id=tenant.name))["logs"]
    at = rows[0]["timestamp"]
    assert logs(to=at, **{"from": at})[0] == "DECIDE", "both ends are within"
    assert logs(trace_id=asked.headers["x-cycles-trace-id"].upper()) == ["DECIDE"]
    for left_out in [{"status": "200"}, {"status_min": "400"}, {"resource_type": "budget"},
                     {"search": "x"}, {"sort_by": "timestamp"}, {"sort_dir": "asc"}]:
        answer = call("GET", "/v1/admin/audit/logs", tenant_id=tenant.name, **left_out)
        is_error(answer, 501, "NOT_IMPLEMENTED", about=[*left_out][0])


LISTS = {
    "/v1/admin/budgets": ["unit", "status", "scope_prefix", "search", "over_limit", "has_debt",
                          "utilization_min", "utilization_max", "sort_by", "sort_dir", "cursor",
                          "limit"],
    "/v1/balances": ["unit", "scope_prefix", "cursor", "limit"],
    "/v1/admin/tenants": ["status", "search", "parent_tenant_id", "sort_by", "cursor", "limit"],
    "/v1/admin/api-keys": ["status", "search", "sort_dir", "cursor", "limit"],
    "/v1/admin/audit/logs": ["operation", "key_id", "status", "status_min", "from", "to",
                             "search", "cursor", "limit"],
}


@pytest.mark.parametrize("path", LISTS)
def test_a_blank_filter_is_none(tenant, path):
    whole = done(call("GET", path, tenant_id=tenant.name))
    for name in LISTS[path]:
        for blank in ["", "%20", "+"]:
            answer = call("GET", f"{path}?tenant_id={tenant.name}&{name}={blank}")
            assert done(answer) == whole, name


def test_a_cursor_is_of_its_question(tenant):
    for n in range(3):
        tenant.budget(1, f"agent:a{n}", UNIT)
        new_key(tenant.name)
    for path, others in {
        "/v1/admin/budgets": [{"unit": UNIT}, {"status": "ACTIVE"}, {"search": "a"},
                              {"scope_prefix": tenant.scope()}, {"has_debt": "false"}],
        "/v1/balances": [{"unit": UNIT}],
        "/v1/admin/api-keys": [{"status": "ACTIVE"}],
        "/v1/admin/tenants": [{"status": "ACTIVE"}],
        "/v1/admin/audit/logs": [{"operation": "PROVISION"}, {"key_id": "x"}],
    }.items():
        page = done(call("GET", path, tenant_id=tenant.name, limit=1))
        cursor = page["next_cursor"]
        assert page["has_more"] and cursor, path
        more = {"tenant_id": tenant.name, "limit": 1, "cursor": cursor}
        assert done(call("GET", path, **more)) != page
        for other in others:
            is_error(call("GET", path, **more, **other), 400, "INVALID_REQUEST", about="cursor")
    page = done(call("GET", "/v1/admin/budgets", tenant_id=tenant.name, limit=1))
    elsewhere = call("GET", "/v1/balances", tenant_id=tenant.name, cursor=page["next_cursor"])
    is_error(elsewhere, 400, "INVALID_REQUEST", about="cursor")


# Keys.

def key_of(tenant, **more):
    return call("POST", "/v1/admin/api-keys", {"tenant_id": tenant.name, "name": "a key", **more})


@pytest.mark.parametrize("filters", [[""], [" "], ["agent:a", ""], ["\t"]], ids=ascii)
def test_a_filter_that_is_blank_confines_to_nothing_and_is_refused(tenant, filters):
    is_error(key_of(tenant, scope_filter=filters), 400, "INVALID_REQUEST", about="scope_filter")


def test_filters_of_which_each_would_match_are_refused(tenant):
    for filters in [["agent:a", "agent:b"], ["workspace:prod", "agent:a"]]:
        refused = key_of(tenant, scope_filter=filters)
        is_error(refused, 400, "INVALID_REQUEST", about="scope_filter")
    path = "workspace:prod/agent:a"
    made = done(key_of(tenant, scope_filter=[path]))
    rows = done(call("GET", "/v1/admin/api-keys", tenant_id=tenant.name))["keys"]
    [row] = [row for row in rows if row["key_id"] == made["key_id"]]
    assert row["scope_filter"] == [path]


@pytest.mark.parametrize("name", ["budgets:write", "admin:write", "admin:apikeys:write"])
def test_a_confined_key_provisions_nothing(tenant, name):
    refused = key_of(tenant, scope_filter=["agent:a"], permissions=["balances:read", name])
    is_error(refused, 400, "INVALID_REQUEST", about="scope_filter")
    assert "PERMISSION_" not in refused.json()["message"], refused


def test_a_key_that_could_do_nothing_is_not_made(tenant):
    for names in [["policies:read"], ["webhooks:write", "events:read"], ["admin:tenants:write"]]:
        refused = key_of(tenant, permissions=names)
        is_error(refused, 400, "INVALID_REQUEST", about=names[0])
    done(key_of(tenant, permissions=["policies:read", "balances:read"]))


def test_a_closed_tenant_gets_no_keys(tenant):
    done(call("PATCH", f"/v1/admin/tenants/{tenant.name}", {"status": "CLOSED"}))
    is_error(key_of(tenant), 409, "TENANT_CLOSED")


def test_a_key_may_last_for_ever(tenant):
    for never in ["9999-12-31T23:59:59Z", "9999-12-31T23:59:59.999999Z",
                  "9999-12-31T20:00:00-08:00"]:
        made = done(key_of(tenant, expires_at=never))
        assert made["expires_at"] == "9999-12-30T22:00:00.999Z"
        key = {"X-Cycles-API-Key": made["key_secret"]}
        answer = send("GET", f"/v1/balances?tenant={tenant.name}", None, key, RUNTIME)
        assert answer.status == 200, answer
    for wrong in ["9999-12-31", "9999-12-32T00:00:00Z", "10000-01-01T00:00:00Z", "never"]:
        is_error(key_of(tenant, expires_at=wrong), 400, "INVALID_REQUEST", about="expires_at")


@pytest.mark.parametrize("letter", ["é", "名", "🦀"])
def test_names_are_counted_in_characters(tenant, letter):
    path = f"/v1/admin/tenants/{tenant.name}"
    assert done(call("PATCH", path, {"name": letter * 256}))["name"] == letter * 256
    is_error(call("PATCH", path, {"name": letter * 257}), 400, "INVALID_REQUEST", about="name")
    done(key_of(tenant, name=letter * 256))
    is_error(key_of(tenant, name=letter * 257), 400, "INVALID_REQUEST", about="name")


# Budgets and tenants.

def test_a_funding_under_a_key_that_is_unclear_is_not_done(tenant):
    path = f"/v1/admin/budgets/fund?{urlencode(budget_of(tenant))}"
    body = {"operation": "CREDIT", "amount": amount(5)}
    for key in ["schlüssel".encode(), [b"one", b"two"], [b"one", b"one"], b"", b"x" * 257]:
        headers = {"X-Admin-API-Key": OPERATOR_KEY, "X-Idempotency-Key": key}
        refused = send("POST", path, body, headers, ADMIN)
        is_error(refused, 400, "INVALID_REQUEST", about="X-Idempotency-Key")
    headers = {"X-Admin-API-Key": OPERATOR_KEY, "X-Idempotency-Key": "one"}
    answers = [send("POST", path, body, headers, ADMIN) for _ in range(2)]
    assert [answer.status for answer in answers] == [200, 200]
    assert answers[1].headers["x-remit-replayed"] == "true"
    other = send("POST", path, body | {"idempotency_key": "two"}, headers, ADMIN)
    is_error(other, 400, "INVALID_REQUEST", about="X-Idempotency-Key")
    assert tenant.balance(unit=UNIT)[0] == 1_005


def test_a_reason_is_of_512_characters(tenant):
    path = f"/v1/admin/budgets/fund?{urlencode(budget_of(tenant))}"
    body = {"operation": "CREDIT", "amount": amount(0)}
    done(call("POST", path, body | {"reason": "é" * 512}))
    long = call("POST", path, body | {"reason": "x" * 513})
    is_error(long, 400, "INVALID_REQUEST", about="reason")


def test_a_closed_tenant_is_so_for_good(tenant):
    path = f"/v1/admin/tenants/{tenant.name}"
    for _ in range(2):
        assert done(call("PATCH", path, {"status": "CLOSED"}))["status"] == "CLOSED"
    for status in ["ACTIVE", "SUSPENDED"]:
        is_error(call("PATCH", path, {"status": status}), 400, "INVALID_REQUEST", about="status")


@pytest.mark.parametrize("status", ["SUSPENDED", "CLOSED"])
def test_only_an_active_tenant_gets_budgets(tenant, status):
    done(call("PATCH", f"/v1/admin/tenants/{tenant.name}", {"status": status}))
    body = {**budget_of(tenant, "agent:a"), "allocated": amount(1)}
    is_error(call("POST", "/v1/admin/budgets", body), 400, "INVALID_REQUEST", about="ACTIVE")


@pytest.mark.parametrize("path", [
    "agent:a/workspace:w", "toolset:t/agent:a", "worksapce:prod", "run:42", "agent:-a", "agent:a.",
    "agent:_", "agent:a/toolset:.x",
])
def test_a_scope_that_no_budget_of_the_protocol_has(tenant, path):
    body = {**budget_of(tenant, path), "allocated": amount(1)}
    is_error(call("POST", "/v1/admin/budgets", body), 400, "INVALID_REQUEST", about="scope")
    assert listed(tenant) == {""}


def test_a_budget_of_a_dimension_is_made_by_a_document_and_kept_here(tenant):
    provision(f"""
budgets: [{{scope: 'tenant:{tenant.name}/agent:a/run:42', unit: UNIT_TOKENS, allocation: 7}}]
""")
    budget = budget_of(tenant, "agent:A/run:42")
    assert done(call("GET", "/v1/admin/budgets/lookup", **budget))["allocated"]["amount"] == 7
    path = f"/v1/admin/budgets/fund?{urlencode(budget)}"
    done(call("POST", path, {"operation": "CREDIT", "amount": amount(1)}))
    disorder = budget_of(tenant, "run:42/agent:a")
    is_error(call("GET", "/v1/admin/budgets/lookup", **disorder), 400, "INVALID_REQUEST", "scope")


def test_metadata_alone_is_taken_and_changes_nothing(tenant):
    budget = f"/v1/admin/budgets?{urlencode(budget_of(tenant))}"
    lookup = budget.replace("?", "/lookup?")
    path = f"/v1/admin/tenants/{tenant.name}"
    for method, read in [(path, path), (budget, lookup)]:
        before = done(call("GET", read))
        assert done(call("PATCH", method, {"metadata": {"team": "a"}})) == before
        is_error(call("PATCH", method, {}), 400, "INVALID_REQUEST")
    same = {"reservation_expiry_policy": "AUTO_RELEASE"}
    assert done(call("PATCH", path, same))["name"] == tenant.name


def test_a_budget_says_that_nothing_rolls_over(tenant):
    [row] = done(call("GET", "/v1/admin/budgets", tenant_id=tenant.name))["ledgers"]
    one = done(call("GET", "/v1/admin/budgets/lookup", **budget_of(tenant)))
    assert (row["rollover_policy"], one["rollover_policy"]) == ("NONE", "NONE")
