"""The published package runcycles, unmodified, against Remit."""

import asyncio
import json
import os
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from runcycles import (
    Action,
    Amount,
    AsyncCyclesClient,
    BalanceResponse,
    BudgetExceededError,
    CommitRequest,
    CommitResponse,
    CyclesClient,
    CyclesProtocolError,
    DebtOutstandingError,
    Decision,
    DecisionRequest,
    DecisionResponse,
    DryRunResult,
    EventCreateRequest,
    EventCreateResponse,
    OverdraftLimitExceededError,
    ReleaseRequest,
    ReleaseResponse,
    ReservationCreateRequest,
    ReservationCreateResponse,
    ReservationDetail,
    ReservationExpiredError,
    ReservationExtendRequest,
    ReservationExtendResponse,
    ReservationFinalizedError,
    ReservationListResponse,
    Subject,
    TenantClosedError,
    Unit,
    cycles,
    get_cycles_context,
)
from support import (
    ADMIN_URL,
    BASE_URL,
    admin,
    eventually,
    native_tenant,
    new_key,
    new_tenant,
    provision,
    remit,
    request,
    settlement,
    unique,
)

CALL = Action(kind="llm.completion", name="gpt")


def cents(amount):
    return Amount(unit=Unit.USD_MICROCENTS, amount=amount)


def stream(client, amount, **more):
    return client.stream_reservation(action=CALL, estimate=cents(amount), **more)


def reserve(client, tenant, amount, **more):
    """A reservation of the plain client; answers its id."""
    answer = client.create_reservation(request(tenant, amount, **more))
    assert answer.status == 200, answer.body
    return answer.body["reservation_id"]


class Act:
    """A function that the decorator can guard. Counts how often its body ran."""

    def __init__(self, wait=0.0, fail=None):
        self.runs = 0
        self.wait = wait
        self.fail = fail
        self.context = None

    def __call__(self, *_):
        self.runs += 1
        self.context = get_cycles_context()
        time.sleep(self.wait)
        if self.fail:
            raise self.fail
        return "done"

    def guarded(self, client, estimate, **more):
        # functools.wraps needs a function's attributes, which an instance lacks.
        def act(*arguments):
            return self(*arguments)

        return cycles(estimate, client=client, action_name="act", **more)(act)


# The decorator.


def test_a_guarded_function_runs_and_is_charged_what_it_used(tenant, client):
    tenant.budget(1000)
    act = Act()
    result = act.guarded(client, 300, actual=lambda result: len(result))("hello")

    assert (result, act.runs) == ("done", 1)
    assert tenant.balance() == (996, 0, 4)
    assert act.context.decision is Decision.ALLOW
    assert act.context.reserved == cents(300)
    assert act.context.affected_scopes == [tenant.scope(), tenant.scope("agent:bot")]
    assert act.context.scope_path == tenant.scope("agent:bot")
    assert [balance.scope_path for balance in act.context.balances] == [tenant.scope()]
    row = client.get_reservation(act.context.reservation_id).body
    assert (row["status"], row["committed"]["amount"]) == ("COMMITTED", 4)


def test_without_an_actual_the_estimate_is_charged_and_marked_as_such(tenant, client):
    tenant.budget(1000)
    act = Act()
    act.guarded(client, 300)()
    assert tenant.balance() == (700, 0, 300)
    [entry] = tenant.ledger("COMMIT")
    assert entry["request"]["metadata"]["actual_source"] == "estimate"


def test_a_denied_function_never_runs(tenant, client):
    tenant.budget(1000)
    tenant.budget(0, "agent:bot/toolset:send-email")
    act = Act()
    with pytest.raises(BudgetExceededError) as denied:
        act.guarded(client, 1, toolset="send-email")()

    assert act.runs == 0
    assert (denied.value.status, denied.value.error_code) == (409, "BUDGET_EXCEEDED")
    assert tenant.balance() == (1000, 0, 0)
    # A toolset without a budget is left to the levels above, as the protocol has it.
    act.guarded(client, 1, toolset="notes")()
    assert act.runs == 1


def test_a_function_that_raises_is_released(tenant, client):
    tenant.budget(1000)
    act = Act(fail=LookupError("no such case"))
    with pytest.raises(LookupError):
        act.guarded(client, 300)()

    assert act.runs == 1
    assert tenant.balance() == (1000, 0, 0)
    assert [row["status"] for row in tenant.reservations()] == ["RELEASED"]
    [entry] = tenant.ledger("RELEASE")
    assert entry["request"]["reason"] == "guarded_method_failed"


def test_a_dry_run_tells_and_holds_nothing(tenant, client):
    tenant.budget(1000)
    act = Act()
    told = act.guarded(client, 300, dry_run=True)()
    assert isinstance(told, DryRunResult)
    assert (told.decision, told.reserved, act.runs) == (Decision.ALLOW, cents(300), 0)
    assert tenant.balance() == (1000, 0, 0)

    with pytest.raises(CyclesProtocolError) as denied:
        act.guarded(client, 1001, dry_run=True)()
    assert denied.value.reason_code == "BUDGET_EXCEEDED"
    assert (act.runs, tenant.reservations()) == (0, [])


def test_subject_and_action_may_come_from_the_arguments(tenant, client):
    tenant.budget(1000, "workspace:east")
    tenant.budget(10, "workspace:west")
    ran = []

    @cycles(
        lambda place, cost: cost,
        client=client,
        workspace=lambda place, cost: place,
        action_kind="tool.test",
        action_name=lambda place, cost: f"go-{place}",
        action_tags=["billing"],
        dimensions=lambda place, cost: {"run": f"r-{cost}"},
    )
    def act(place, cost):
        ran.append(place)

    act("East", 11)
    with pytest.raises(BudgetExceededError):
        act("west", 11)
    assert ran == ["East"]
    assert tenant.balance("workspace:east") == (989, 0, 11)
    [row] = tenant.reservations()
    assert row["subject"] == {
        "tenant": tenant.name, "workspace": "East", "agent": "bot", "dimensions": {"run": "r-11"}
    }
    assert row["action"] == {"kind": "tool.test", "name": "go-East", "tags": ["billing"]}


# The plain client. Its answers must also fit the SDK's own models, which refuse what they
# do not know.


def test_one_reservation_from_decide_to_commit(tenant, client):
    tenant.budget(1000)
    tenant.budget(400, "agent:bot")
    subject = Subject(tenant=tenant.name, agent="bot")

    told = DecisionResponse.model_validate(client.decide(DecisionRequest(
        idempotency_key="k", subject=subject, action=CALL, estimate=cents(100),
    )).body)
    assert told.is_allowed()
    assert told.affected_scopes == [tenant.scope(), tenant.scope("agent:bot")]
    assert tenant.balance() == (1000, 0, 0)

    answer = client.create_reservation(ReservationCreateRequest(
        idempotency_key="k", subject=subject, action=CALL, estimate=cents(100), ttl_ms=10_000,
        metadata={"case": "4782"},
    ))
    held = ReservationCreateResponse.model_validate(answer.body)
    assert held.reserved == cents(100)
    assert held.remaining_ttl_ms == 10_000
    assert [(b.scope, b.remaining.amount, b.reserved.amount) for b in held.balances] == [
        (f"tenant:{tenant.name}", 900, 100), ("agent:bot", 300, 100),
    ]
    assert uuid.UUID(answer.request_id)
    assert (answer.rate_limit_remaining, answer.rate_limit_reset) == (-1, 0)
    assert answer.cycles_tenant == tenant.name
    reservation = held.reservation_id

    extended = ReservationExtendResponse.model_validate(client.extend_reservation(
        reservation, ReservationExtendRequest(idempotency_key="e", extend_by_ms=5_000)
    ).body)
    assert extended.expires_at_ms == held.expires_at_ms + 5_000

    [row] = ReservationListResponse.model_validate(
        client.list_reservations(tenant=tenant.name, status="ACTIVE").body
    ).reservations
    assert (row.reservation_id, row.idempotency_key) == (reservation, "k")

    charged = CommitResponse.model_validate(client.commit_reservation(
        reservation, CommitRequest(idempotency_key="c", actual=cents(70))
    ).body)
    assert (charged.charged, charged.released) == (cents(70), cents(30))

    detail = ReservationDetail.model_validate(client.get_reservation(reservation).body)
    assert detail.is_committed()
    assert (detail.committed, detail.metadata) == (cents(70), {"case": "4782"})
    assert (detail.subject, detail.action, detail.reserved) == (subject, CALL, cents(100))

    balances = BalanceResponse.model_validate(client.get_balances(tenant=tenant.name).body)
    assert {b.scope_path: (b.allocated.amount, b.remaining.amount, b.spent.amount)
            for b in balances.balances} == {
        tenant.scope(): (1000, 930, 70), tenant.scope("agent:bot"): (400, 330, 70),
    }


def test_what_is_released_is_there_again(tenant, client):
    tenant.budget(100)
    first = reserve(client, tenant, 100)
    assert client.create_reservation(request(tenant, 1)).status == 409
    released = ReleaseResponse.model_validate(client.release_reservation(
        first, ReleaseRequest(idempotency_key="r", reason="changed my mind")
    ).body)
    assert released.released == cents(100)
    assert client.create_reservation(request(tenant, 1)).status == 200


def test_an_event_charges_what_was_not_reserved(tenant, client):
    tenant.budget(100)
    event = EventCreateRequest(
        idempotency_key="e", subject=Subject(tenant=tenant.name), action=CALL, actual=cents(70),
    )
    answer = client.create_event(event)
    applied = EventCreateResponse.model_validate(answer.body)
    assert (answer.status, applied.charged) == (201, None)
    # A retry is answered as the first time; what does not remain is not charged.
    again = client.create_event(event)
    assert (again.status, again.body["event_id"]) == (201, applied.event_id)
    capped = EventCreateResponse.model_validate(
        client.create_event(event.model_copy(update={"idempotency_key": "f"})).body
    )
    assert capped.charged == cents(30)
    assert tenant.balance() == (0, 0, 100)


def test_lists_are_filtered_and_paged(tenant, client):
    tenant.budget(1000)
    made = [reserve(client, tenant, 1, agent=f"a-{n % 2}", key=f"k-{n}") for n in range(5)]
    client.release_reservation(made[0], {"idempotency_key": "r"})

    def ids(**filters):
        body = client.list_reservations(tenant=tenant.name, **filters).body
        return [row["reservation_id"] for row in body["reservations"]]

    assert ids() == made[::-1]
    assert ids(agent="A-1") == [made[3], made[1]]
    assert ids(status="RELEASED") == [made[0]]
    assert ids(idempotency_key="k-2") == [made[2]]
    pages, cursor = [], {}
    while True:
        body = client.list_reservations(tenant=tenant.name, limit="2", **cursor).body
        pages.append([row["reservation_id"] for row in body["reservations"]])
        if not body["has_more"]:
            break
        cursor = {"cursor": body["next_cursor"]}
    assert pages == [made[:2:-1], made[2:0:-1], made[:1]]


def test_balances_are_found_by_any_level(tenant, client):
    tenant.budget(1)
    tenant.budget(2, "workspace:east/agent:bot")
    tenant.budget(3, "agent:bot", unit="TOKENS")

    def amounts(**levels):
        rows = client.get_balances(**levels).body["balances"]
        return sorted(row["allocated"]["amount"] for row in rows)

    assert amounts(tenant=tenant.name) == [1, 2, 3]
    assert amounts(agent="BOT") == [2, 3]
    assert amounts(workspace="east") == [2]
    assert client.get_balances(tenant="somebody-else").status == 403


def test_each_mutation_answers_a_retry_as_the_first_time(tenant, client):
    tenant.budget(1000)
    body = request(tenant, 100)
    first, again = client.create_reservation(body), client.create_reservation(body)
    reservation = first.body["reservation_id"]
    assert again.body["remaining_ttl_ms"] <= first.body["remaining_ttl_ms"]
    again.body["remaining_ttl_ms"] = first.body["remaining_ttl_ms"]
    assert again.body == first.body

    for call, body in [
        (client.extend_reservation, {"idempotency_key": "e", "extend_by_ms": 1000}),
        (client.commit_reservation, settlement(60)),
    ]:
        first, again = call(reservation, body), call(reservation, body)
        first.body.pop("remaining_ttl_ms", None)
        again.body.pop("remaining_ttl_ms", None)
        assert (again.status, again.body) == (200, first.body)
    assert tenant.balance() == (940, 0, 60)


def test_a_lease_is_as_long_as_the_tenant_allows(journal):
    tenant = new_tenant(journal, default_reservation_ttl_ms=3000, max_reservation_ttl_ms=5000)
    tenant.budget(1000)
    with CyclesClient(tenant.config()) as client:
        body = request(tenant, 1)
        assert client.create_reservation(body).body["remaining_ttl_ms"] == 3000
        body = request(tenant, 1) | {"ttl_ms": 60_000}
        assert client.create_reservation(body).body["remaining_ttl_ms"] == 5000


def test_dimensions_are_free_text(tenant, client):
    tenant.budget(1000)
    dimensions = {"user": "Jane Doe <jane@acme.example>", "costCenter": "4711", "note": "ü" * 256}
    reservation = reserve(client, tenant, 1, dimensions=dimensions)
    assert client.get_reservation(reservation).body["subject"]["dimensions"] == dimensions


def test_what_only_goes_into_the_record_never_stops_a_commit(tenant, client):
    # The SDK takes a 400 as final: the charge would be lost.
    tenant.budget(1000)
    metadata = {"case": {"id": 4782, "tags": ["billing", None]}, "note": "ü\n" * 500}
    metadata |= {f"k{n}": n for n in range(50)}
    metrics = {"model_version": "ü" * 128, "custom": {"cache": {"hits": 3}}}
    reservation = reserve(client, tenant, 1)
    answer = client.commit_reservation(
        reservation, settlement(1, metrics=metrics, metadata=metadata)
    )
    assert answer.status == 200, answer.body
    assert tenant.balance() == (999, 0, 1)
    [entry] = tenant.ledger("COMMIT")
    kept = entry["request"]["metadata"]
    # Remit's metadata is flat: what was nested is kept as JSON, what is far too much is named.
    assert json.loads(kept["case"]) == metadata["case"]
    assert kept["note"] == metadata["note"]


def test_an_actions_name_is_free_text(tenant, client):
    # The guardrail of runcycles-openai-agents sends an agent's name here.
    tenant.budget(1000)
    assert client.decide(request(tenant, 1, name="Support Agent")).body["decision"] == "ALLOW"
    reservation = reserve(client, tenant, 1, name="Antwort schreiben (für Kunden) ✉")
    row = client.get_reservation(reservation).body
    assert row["action"]["name"] == "Antwort schreiben (für Kunden) ✉"


# Asynchronous.


def test_the_async_client_and_decorator(tenant):
    tenant.budget(1000)
    runs = []

    async def main():
        async with AsyncCyclesClient(tenant.config()) as client:
            @cycles(lambda cost, **_: cost, actual=lambda result: result, client=client)
            async def act(cost, fail=False):
                runs.append(cost)
                if fail:
                    raise LookupError
                return cost // 2

            await asyncio.gather(*(act(100) for _ in range(5)))
            with pytest.raises(BudgetExceededError):
                await act(751)
            with pytest.raises(LookupError):
                await act(300, fail=True)

            assert (await client.decide(request(tenant, 750))).body["decision"] == "ALLOW"
            answer = await client.create_reservation(request(tenant, 100))
            reservation = answer.body["reservation_id"]
            await client.extend_reservation(
                reservation, {"idempotency_key": "e", "extend_by_ms": 1000}
            )
            assert (await client.get_reservation(reservation)).body["status"] == "ACTIVE"
            answer = await client.commit_reservation(reservation, settlement(40))
            assert answer.body["charged"]["amount"] == 40
            released = (await client.create_reservation(request(tenant, 1))).body["reservation_id"]
            assert (await client.release_reservation(released, {"idempotency_key": "r"})).is_success
            event = request(tenant, 10)
            event["actual"] = event.pop("estimate")
            assert (await client.create_event(event)).status == 201
            rows = (await client.list_reservations(tenant=tenant.name)).body["reservations"]
            assert len(rows) == 8
            return (await client.get_balances(tenant=tenant.name)).body["balances"]

    [balance] = asyncio.run(main())
    assert runs == [100] * 5 + [300]
    assert (balance["remaining"]["amount"], balance["spent"]["amount"]) == (700, 300)


# Streams.


def test_a_stream_is_charged_when_it_ends(tenant, client):
    tenant.budget(1000)
    with stream(client, 500, cost_fn=lambda usage: usage.tokens_output * 2) as held:
        assert tenant.balance() == (500, 500, 0)
        for _ in range(7):
            held.usage.add_output_tokens(10)
        held.usage.model_version = "gpt-9"
    assert tenant.balance() == (860, 0, 140)
    [entry] = tenant.ledger("COMMIT")
    assert entry["request"]["metrics"]["tokens_output"] == 70


def test_a_stream_that_breaks_is_released(tenant, client):
    tenant.budget(1000)
    with pytest.raises(ConnectionError), stream(client, 500):
        raise ConnectionError("the model went away")
    assert tenant.balance() == (1000, 0, 0)
    assert tenant.ledger("RELEASE")[0]["request"]["reason"] == "stream_failed"


def test_a_denied_stream_is_never_entered(tenant, client):
    tenant.budget(499)
    with pytest.raises(BudgetExceededError), stream(client, 500):
        pytest.fail("the body ran")


def test_an_async_stream_with_a_key_of_its_own(tenant):
    tenant.budget(1000)

    async def main():
        async with AsyncCyclesClient(tenant.config()) as client:
            async with stream(client, 500, idempotency_key="chat-1") as held:
                held.usage.set_actual_cost(123)

    asyncio.run(main())
    assert tenant.balance() == (877, 0, 123)
    [row] = tenant.reservations()
    assert row["idempotency_key"] == "chat-1"


# What gets lost on the way is counted once.


@pytest.mark.parametrize("lost", ["/v1/reservations", "/commit"])
def test_a_lost_answer_is_asked_for_again_and_counted_once(tenant, proxy, lost):
    tenant.budget(1000)
    proxy.lose(lost)
    act = Act()
    with CyclesClient(tenant.config(proxy.url)) as client:
        act.guarded(client, 300)()
        eventually(lambda: len(proxy.calls(lost)) == 2)

    first, second = proxy.calls(lost)
    assert act.runs == 1
    assert first.sent == second.sent
    assert [(call.status, call.replayed) for call in (first, second)] == [(200, False), (200, True)]
    eventually(lambda: tenant.balance() == (700, 0, 300))
    assert len(tenant.reservations()) == 1
    eventually(lambda: not list(tenant.journal.glob("*/*.json")))


def test_the_async_decorator_and_a_stream_recover_too(tenant, proxy):
    tenant.budget(1000)
    proxy.lose("/commit")

    async def main():
        async with AsyncCyclesClient(tenant.config(proxy.url)) as client:
            @cycles(100, client=client)
            async def act():
                return None

            await act()
            while len(proxy.calls("/commit")) < 2:
                await asyncio.sleep(0.02)

    asyncio.run(main())
    proxy.lose("/commit")
    with CyclesClient(tenant.config(proxy.url)) as client:
        with stream(client, 100) as held:
            pass
        assert held.settlement_error.status == -1
        eventually(lambda: len(proxy.calls("/commit")) == 4)
    assert [call.replayed for call in proxy.calls("/commit")] == [False, True, False, True]
    assert tenant.balance() == (800, 0, 200)


CRASHES = """
import os
from runcycles import CyclesClient, CyclesConfig, cycles
config = CyclesConfig.from_env()
cycles(300, client=CyclesClient(config))(lambda: None)()
os._exit(1)
"""


def test_a_commit_survives_the_end_of_the_process(tenant, proxy):
    tenant.budget(1000)
    proxy.lose("/commit")
    subprocess.run(
        [sys.executable, "-c", CRASHES],
        env=os.environ | {
            "CYCLES_BASE_URL": proxy.url, "CYCLES_API_KEY": tenant.key,
            "CYCLES_TENANT": tenant.name, "CYCLES_JOURNAL_DIR": str(tenant.journal),
            "CYCLES_RETRY_ENABLED": "false",
        },
        check=False,
        capture_output=True,
    )
    assert len(proxy.calls("/commit")) == 1
    assert len(list(tenant.journal.glob("*/*.json"))) == 1

    # The next process finds it in the journal as soon as it guards something.
    with CyclesClient(tenant.config(proxy.url)) as client:
        Act().guarded(client, 1)()
        eventually(lambda: len(proxy.calls("/commit")) == 3)
    assert sum(call.replayed for call in proxy.calls("/commit")) == 1
    assert tenant.balance() == (699, 0, 301)


@pytest.fixture
def short(journal):
    """A tenant whose leases can't be extended, so that they really end."""
    tenant = new_tenant(journal, max_reservation_extensions=0)
    tenant.budget(1000)
    return tenant


def test_a_commit_that_comes_too_late_is_charged_as_an_event(short, proxy):
    with CyclesClient(short.config(proxy.url)) as client:
        act = Act(wait=1.1)
        act.guarded(client, 300, ttl_ms=1000, grace_period_ms=0)()
        eventually(lambda: proxy.calls("/v1/events"))

    [commit] = proxy.calls("/commit")
    [event] = proxy.calls("/v1/events")
    assert (commit.status, commit.answer["error"]) == (410, "RESERVATION_EXPIRED")
    assert (event.status, event.answer["status"]) == (201, "APPLIED")
    assert event.key == commit.key
    assert event.sent["metadata"]["recovered_reservation_id"] == act.context.reservation_id
    # What was held comes back when the sweep has seen it.
    eventually(lambda: short.balance() == (700, 0, 300), timeout=10)
    [row] = short.reservations(status="EXPIRED")
    assert row["reservation_id"] == act.context.reservation_id


def test_an_event_whose_answer_is_lost_too_is_counted_once(short, proxy):
    proxy.lose("/v1/events")
    with CyclesClient(short.config(proxy.url)) as client:
        with stream(client, 300, ttl_ms=1000, grace_period_ms=0) as held:
            time.sleep(1.1)
        assert isinstance(held.settlement_error, ReservationExpiredError)
        eventually(lambda: len(proxy.calls("/v1/events")) == 2)
    assert [call.replayed for call in proxy.calls("/v1/events")] == [False, True]
    assert short.balance()[2] == 300


def test_the_grace_period_still_takes_a_commit(short):
    with CyclesClient(short.config()) as client:
        answer = client.create_reservation(
            request(short, 300) | {"ttl_ms": 1000, "grace_period_ms": 5000}
        )
        time.sleep(1.1)
        late = client.extend_reservation(
            answer.body["reservation_id"], {"idempotency_key": "e", "extend_by_ms": 1000}
        )
        assert (late.status, late.body["error"]) == (410, "RESERVATION_EXPIRED")
        assert client.commit_reservation(answer.body["reservation_id"], settlement(300)).is_success


def test_without_remit_nothing_runs(down):
    act = Act()
    with CyclesClient(down) as client, pytest.raises(CyclesProtocolError) as unreachable:
        act.guarded(client, 1)()
    assert (unreachable.value.status, act.runs) == (-1, 0)


# The heartbeat.


def test_no_extend_follows_a_reserve_whose_lease_is_long_enough(tenant, proxy):
    tenant.budget(1000)
    with CyclesClient(tenant.config(proxy.url)) as client:
        act = Act(wait=0.3)
        for _ in range(2):
            act.guarded(client, 1)()
        with stream(client, 1):
            time.sleep(0.3)
    assert [exchange.path.rpartition("/")[2] for exchange in proxy.exchanges] == [
        "reservations", "commit",
    ] * 3
    assert all(call.answer["remaining_ttl_ms"] > 0 for call in proxy.calls("/v1/reservations"))


def test_the_heartbeat_extends_once_when_the_lease_gets_short(tenant, proxy):
    tenant.budget(1000)
    # With these timeouts the SDK wants 13 s in reserve: its first beat is due after 0.4 s.
    config = tenant.config(proxy.url, connect_timeout=0.5, read_timeout=0.5)
    with CyclesClient(config) as client:
        act = Act(wait=0.8)
        act.guarded(client, 1, ttl_ms=13_400)()
    [extend] = proxy.calls("/extend")
    [held] = proxy.calls("/v1/reservations")
    assert extend.status == 200
    assert extend.answer["expires_at_ms"] == held.answer["expires_at_ms"] + 13_400
    assert act.context.expires_at_ms == extend.answer["expires_at_ms"]


def test_the_heartbeat_gives_up_where_no_extension_is_left(short, proxy):
    with CyclesClient(short.config(proxy.url)) as client:
        Act(wait=0.3).guarded(client, 1, ttl_ms=5000)()
    [extend] = proxy.calls("/extend")
    assert (extend.status, extend.answer["error"]) == (409, "MAX_EXTENSIONS_EXCEEDED")
    assert short.balance() == (999, 0, 1)


# Each exception of the SDK.


def test_a_scope_that_was_charged_to_its_end_takes_nothing_new(tenant, client):
    tenant.budget(100)
    event = request(tenant, 150)
    event["actual"] = event.pop("estimate")
    assert client.create_event(event).body["charged"]["amount"] == 100
    act = Act()
    with pytest.raises(OverdraftLimitExceededError):
        act.guarded(client, 0)()
    tenant.fund("CREDIT", 100)
    act.guarded(client, 100)()
    assert act.runs == 1


def test_an_overdraft_has_a_limit(tenant, client):
    tenant.budget(100, overdraft_limit={"amount": 40, "unit": "USD_MICROCENTS"})
    with pytest.raises(OverdraftLimitExceededError) as over, stream(
        client, 30, overage_policy="ALLOW_WITH_OVERDRAFT", raise_on_commit_failure=True
    ) as held:
        held.usage.set_actual_cost(150)
    assert over.value.status == 409
    # Nothing changed; a smaller amount is taken.
    assert tenant.balance() == (70, 30, 0)
    assert client.commit_reservation(held.reservation_id, settlement(140)).is_success
    [row] = client.get_balances(tenant=tenant.name).body["balances"]
    assert (row["remaining"]["amount"], row["debt"]["amount"]) == (-40, 40)


def test_a_reservation_may_refuse_to_cost_more_than_it_holds(tenant, client):
    tenant.budget(1000)
    with pytest.raises(BudgetExceededError) as over, stream(
        client, 100, overage_policy="REJECT", raise_on_commit_failure=True
    ) as held:
        held.usage.set_actual_cost(101)
    assert over.value.status == 409
    assert tenant.balance() == (900, 100, 0)
    assert client.commit_reservation(held.reservation_id, settlement(100)).is_success


def test_debt_stops_new_actions_once_no_overdraft_is_allowed(tenant, client):
    tenant.budget(100, overdraft_limit={"amount": 40, "unit": "USD_MICROCENTS"})
    event = request(tenant, 120) | {"overage_policy": "ALLOW_WITH_OVERDRAFT"}
    event["actual"] = event.pop("estimate")
    assert client.create_event(event).status == 201
    # On the admin plane lowering the limit marks the scope as over its limit as well; in
    # an operator's document it does not.
    provision(
        f"budgets: [{{scope: '{tenant.scope()}', unit: UNIT_USD_MICROCENTS, allocation: 100}}]"
    )
    act = Act()
    with pytest.raises(DebtOutstandingError):
        act.guarded(client, 0)()
    tenant.fund("REPAY_DEBT", 120)
    act.guarded(client, 100)()
    assert act.runs == 1


def test_an_expired_reservation_raises(short):
    with CyclesClient(short.config(retry_enabled=False)) as client:
        with pytest.raises(ReservationExpiredError) as late, stream(
            client, 1, ttl_ms=1000, grace_period_ms=0, raise_on_commit_failure=True
        ):
            time.sleep(1.1)
    assert late.value.status == 410


def test_a_reservation_settles_once(tenant, client):
    tenant.budget(1000)
    with pytest.raises(ReservationFinalizedError) as twice, stream(
        client, 100, raise_on_commit_failure=True
    ) as held:
        client.commit_reservation(held.reservation_id, settlement(40))
    assert twice.value.status == 409
    answer = client.release_reservation(held.reservation_id, {"idempotency_key": "r"})
    assert answer.body["error"] == "RESERVATION_FINALIZED"
    assert tenant.balance() == (960, 0, 40)


def test_a_closed_tenant_takes_nothing(tenant, client):
    tenant.budget(1000)
    open_one = reserve(client, tenant, 100)
    admin("PATCH", f"/v1/admin/tenants/{tenant.name}", {"status": "CLOSED"})
    act = Act()
    with pytest.raises(TenantClosedError) as closed:
        act.guarded(client, 1)()
    assert (closed.value.status, act.runs) == (409, 0)
    assert client.commit_reservation(open_one, settlement(1)).body["error"] == "TENANT_CLOSED"
    told = client.decide(request(tenant, 1))
    assert (told.status, told.body["decision"]) == (200, "DENY")
    assert told.body["reason_code"] == "TENANT_CLOSED"


def test_a_suspended_tenant_settles_what_is_open(tenant, client):
    tenant.budget(1000)
    act = Act()
    open_one = reserve(client, tenant, 100)
    admin("PATCH", f"/v1/admin/tenants/{tenant.name}", {"status": "SUSPENDED"})
    with pytest.raises(CyclesProtocolError) as suspended:
        act.guarded(client, 1)()
    assert (suspended.value.status, suspended.value.error_code) == (401, "UNAUTHORIZED")
    assert "TENANT_SUSPENDED" in str(suspended.value)
    assert client.commit_reservation(open_one, settlement(60)).is_success
    assert (act.runs, tenant.balance()) == (0, (940, 0, 60))


def test_other_refusals_are_protocol_errors_with_their_code(tenant, client):
    tenant.budget(1000)
    tenant.budget(1000, "agent:frozen")
    admin("POST", "/v1/admin/budgets/freeze", {}, scope=tenant.scope("agent:frozen"),
          unit="USD_MICROCENTS")
    act = Act()

    def refused(client=client, **more):
        with pytest.raises(CyclesProtocolError) as error:
            act.guarded(client, 1, **more)()
        assert type(error.value) is CyclesProtocolError
        return error.value.status, error.value.error_code

    assert refused(unit="TOKENS") == (400, "UNIT_MISMATCH")
    assert refused(agent="frozen") == (409, "BUDGET_FROZEN")
    assert refused(agent="no spaces") == (400, "INVALID_REQUEST")
    assert refused(tenant="somebody-else") == (403, "FORBIDDEN")
    with CyclesClient(tenant.config(api_key="rmt_nobody_nothing")) as stranger:
        assert refused(stranger) == (401, "UNAUTHORIZED")
    bare = new_tenant(tenant.journal)
    with CyclesClient(bare.config()) as poor:
        assert refused(poor) == (404, "NOT_FOUND")
        told = poor.decide(request(bare, 1))
        assert (told.status, told.body["reason_code"]) == (200, "BUDGET_NOT_FOUND")
    assert act.runs == 0

    unknown = client.get_reservation(str(uuid.uuid4()))
    assert (unknown.status, unknown.body["error"]) == (404, "NOT_FOUND")
    mismatch = client.create_reservation(request(tenant, 1, unit="TOKENS"))
    assert mismatch.body["details"].items() >= {
        "scope": tenant.scope(), "requested_unit": "TOKENS", "expected_units": ["USD_MICROCENTS"],
    }.items()


def test_a_key_belongs_to_one_request(tenant, client):
    tenant.budget(1000)
    with stream(client, 100, idempotency_key="chat-1"):
        pass
    with pytest.raises(CyclesProtocolError) as other, stream(
        client, 101, idempotency_key="chat-1"
    ):
        pytest.fail("the body ran")
    assert other.value.is_idempotency_mismatch()
    assert tenant.balance() == (900, 0, 100)


def test_a_denial_says_what_is_short_and_where(tenant, client):
    tenant.budget(1000)
    tenant.budget(10, "agent:bot")
    answer = client.create_reservation(request(tenant, 12, agent="bot"))
    details = answer.body["details"]
    assert (answer.status, answer.body["error"]) == (409, "BUDGET_EXCEEDED")
    assert details["reason_code"] == "BUDGET_EXCEEDED"
    assert details["deny_detail"]["blocked_by_scope"] == tenant.scope("agent:bot")
    assert details["deny_detail"]["budget_remaining"] == 10
    assert details["short_scopes"] == [{
        "scope": tenant.scope("agent:bot"), "unit": "USD_MICROCENTS", "asked": 12, "remaining": 10,
    }]
    # The key is free again: what was denied is decided anew.
    body = request(tenant, 12, agent="bot")
    assert client.create_reservation(body).status == 409
    tenant.fund("CREDIT", 100, "agent:bot")
    assert client.create_reservation(body).status == 200


# What Remit decides by beside budgets, told in the words of the SDK.

NATIVE = """
tenants: [{tenant: TENANT}]
budgets:
  - {scope: 'tenant:TENANT', unit: UNIT_USD_MICROCENTS, allocation: 1000}
  - {scope: 'tenant:TENANT/toolset:notes', unit: UNIT_CALLS, allocation: 2}
policies:
  - tenant: TENANT
    rules:
      - id: short-answers
        match: {tools: [answer]}
        effect: RULE_EFFECT_ALLOW_WITH_CAPS
        caps: {max_tokens: 500, tool_denylist: [send_email]}
      - {id: no-refunds, match: {tools: [refund]}, effect: RULE_EFFECT_DENY, reason: ask finance}
      - {id: ask-first, match: {tools: [deploy]}, effect: RULE_EFFECT_REQUIRE_APPROVAL}
"""


@pytest.fixture
def native(journal):
    return native_tenant(journal, NATIVE)


@pytest.fixture
def native_client(native):
    with CyclesClient(native.config()) as client:
        yield client


def test_caps_reach_the_guarded_function(native, native_client):
    caps = []

    @cycles(1, client=native_client, action_kind="llm.completion", action_name="answer")
    def answer():
        context = get_cycles_context()
        caps.append((context.decision, context.caps))

    answer()
    [(decision, told)] = caps
    assert decision is Decision.ALLOW_WITH_CAPS
    assert (told.max_tokens, told.is_tool_allowed("send_email")) == (500, False)
    with native_client.stream_reservation(
        action=Action(kind="llm.completion", name="answer"), estimate=cents(1)
    ) as held:
        assert (held.decision, held.caps.max_tokens) == (Decision.ALLOW_WITH_CAPS, 500)
    told = native_client.decide(request(native, 1, name="answer")).body
    assert (told["decision"], told["caps"]["max_tokens"]) == ("ALLOW_WITH_CAPS", 500)


@pytest.mark.parametrize(
    ("action", "toolset", "reason"),
    [
        ("refund", None, "POLICY_DENIED"),
        ("deploy", None, "APPROVAL_REQUIRED"),
        ("write", "send-email", "BUDGET_NOT_PROVISIONED"),
    ],
)
def test_any_denial_arrives_as_budget_exceeded(native, native_client, action, toolset, reason):
    runs = []

    @cycles(1, client=native_client, action_name=action, toolset=toolset)
    def act():
        runs.append(action)

    with pytest.raises(BudgetExceededError) as denied:
        act()
    assert (runs, denied.value.status) == ([], 409)

    levels = {"toolset": toolset} if toolset else {}
    answer = native_client.create_reservation(request(native, 1, name=action, **levels))
    assert (answer.status, answer.body["error"]) == (409, "BUDGET_EXCEEDED")
    assert answer.body["details"]["reason_code"] == reason
    assert ("approval_id" in answer.body["details"]) == (action == "deploy")
    told = native_client.decide(request(native, 1, name=action, **levels))
    assert (told.status, told.body["decision"]) == (200, "DENY")


def test_an_approved_action_is_settled_by_the_id_of_its_approval(native, native_client):
    asked = native_client.create_reservation(request(native, 100, name="deploy"))
    waiting = asked.body["details"]["approval_id"]
    assert native.balance() == (900, 100, 0)
    pending = native_client.get_reservation(waiting)
    assert (pending.status, pending.body["details"]["reason_code"]) == (409, "APPROVAL_REQUIRED")
    assert native_client.commit_reservation(waiting, settlement(80)).status == 409

    remit("approvals", "approve", waiting, "--tenant", native.name, "--approver", "sam", "-m", "ok")
    assert native_client.get_reservation(waiting).body["status"] == "ACTIVE"
    assert native_client.commit_reservation(waiting, settlement(80)).is_success
    assert native.balance() == (920, 0, 80)


def test_a_native_tenants_toolset_needs_a_budget(native, native_client):
    act = Act()
    guarded = act.guarded(native_client, 1, toolset="notes")
    guarded()
    guarded()
    with pytest.raises(BudgetExceededError):
        guarded()
    assert act.runs == 2


# Keys.


def test_a_revoked_key_is_refused(tenant):
    tenant.budget(1000)
    made = admin("POST", "/v1/admin/api-keys", {"tenant_id": tenant.name, "name": unique("k")})
    with CyclesClient(tenant.config(api_key=made["key_secret"])) as client:
        assert client.create_reservation(request(tenant, 1)).status == 200
        admin("DELETE", f"/v1/admin/api-keys/{made['key_id']}")
        eventually(lambda: client.create_reservation(request(tenant, 1)).status == 401)


def test_one_tenants_key_sees_nothing_of_another(tenant, client, journal):
    tenant.budget(1000)
    other = new_tenant(journal)
    other.budget(1000)
    with CyclesClient(other.config()) as stranger:
        reservation = reserve(client, tenant, 100)
        for answer in [
            stranger.get_reservation(reservation),
            stranger.commit_reservation(reservation, settlement(1)),
            stranger.release_reservation(reservation, {"idempotency_key": "r"}),
            stranger.extend_reservation(reservation, {"idempotency_key": "e", "extend_by_ms": 1}),
        ]:
            assert (answer.status, answer.body["error"]) == (404, "NOT_FOUND")
        assert stranger.list_reservations(tenant=other.name).body["reservations"] == []
    assert tenant.balance() == (900, 100, 0)


def test_a_tenants_key_with_admin_write_provisions_itself(journal):
    tenant = new_tenant(journal)
    key = new_key(tenant.name, permissions=["reservations:create", "admin:write"])
    answer = httpx.post(
        f"{ADMIN_URL}/v1/admin/budgets",
        headers={"X-Cycles-API-Key": key},
        json={"scope": tenant.scope(), "unit": "USD_MICROCENTS",
              "allocated": {"amount": 7, "unit": "USD_MICROCENTS"}},
    )
    assert answer.status_code == 201, answer.text
    assert tenant.balance() == (7, 0, 0)


def test_both_ports_are_healthy():
    for url in (BASE_URL, ADMIN_URL):
        answer = httpx.get(f"{url}/actuator/health")
        assert (answer.status_code, answer.json()) == (200, {"status": "UP"})


def test_threads_share_one_client(tenant, client):
    tenant.budget(1000)
    act = Act()
    guarded = act.guarded(client, 10)
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda _: guarded(), range(60)))
    assert tenant.balance() == (400, 0, 600)
