"""Both doors at once: agents that speak gRPC and agents of the SDK, on one budget."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from runcycles import AsyncCyclesClient, BudgetExceededError, CyclesClient, cycles
from support import TARGET, native_tenant, request, settlement  # puts the stubs on the path

from remit.v1 import authority_pb2, types_pb2
from remit_client import ActionDenied, Guard

AGENTS = 8  # through each door
ATTEMPTS = 10  # by each agent


class Bodies:
    """Counts the guarded bodies that ran."""

    def __init__(self):
        self.lock = threading.Lock()
        self.ran = 0

    def run(self):
        with self.lock:
            self.ran += 1


def sdk_agent(tenant, number, bodies):
    """One agent of the SDK; answers how often it was allowed."""
    allowed = 0
    with CyclesClient(tenant.config(agent=f"sdk-{number}", toolset="shared")) as client:
        act = cycles(1, client=client, unit="RISK_POINTS", action_name="act")(bodies.run)
        for _ in range(ATTEMPTS):
            try:
                act()
                allowed += 1
            except BudgetExceededError:
                pass
    return allowed


def grpc_agent(tenant, number, bodies):
    """The same by gRPC."""
    allowed = 0
    guard = Guard(TARGET, tenant.key, {"tenant": tenant.name, "agent": f"grpc-{number}"})
    with guard.channel:
        for _ in range(ATTEMPTS):
            try:
                with guard.action("act", "tool.test", "shared", {}, 1):
                    bodies.run()
                allowed += 1
            except ActionDenied:
                pass
    return allowed


NATIVE = """
tenants: [{tenant: TENANT}]
budgets: [{scope: 'tenant:TENANT/toolset:shared', unit: UNIT_RISK_POINTS, allocation: 60}]
"""


@pytest.mark.parametrize("rules", ["compatible", "native"])
def test_agents_at_both_doors_never_spend_more_than_there_is(tenant, journal, rules):
    if rules == "native":
        tenant = native_tenant(journal, NATIVE)
        path = "toolset:shared"
    else:
        tenant.budget(60, unit="RISK_POINTS")
        path = ""
    bodies = Bodies()
    with ThreadPoolExecutor(2 * AGENTS) as pool:
        sdk = [pool.submit(sdk_agent, tenant, n, bodies) for n in range(AGENTS)]
        grpc = [pool.submit(grpc_agent, tenant, n, bodies) for n in range(AGENTS)]
        by_sdk = sum(agent.result() for agent in sdk)
        by_grpc = sum(agent.result() for agent in grpc)

    assert by_sdk + by_grpc == bodies.ran == 60
    assert by_sdk and by_grpc, "one door was shut"
    assert tenant.balance(path, "RISK_POINTS") == (0, 0, 60)


def test_of_200_concurrent_reserves_as_many_pass_as_there_is_room_for(tenant):
    tenant.budget(100)

    async def main():
        async with AsyncCyclesClient(tenant.config(read_timeout=20)) as client:
            answers = await asyncio.gather(*(
                client.create_reservation(request(tenant, 1, agent=f"a-{n}")) for n in range(200)
            ))
            held = [a.body["reservation_id"] for a in answers if a.status == 200]
            denied = [a.body["error"] for a in answers if a.status != 200]
            assert (len(held), denied) == (100, ["BUDGET_EXCEEDED"] * 100)
            assert len(set(held)) == 100
            assert await asyncio.to_thread(tenant.balance) == (0, 100, 0)
            await asyncio.gather(*(client.commit_reservation(id, settlement(1)) for id in held))

    asyncio.run(main())
    assert tenant.balance() == (0, 0, 100)


def test_200_retries_of_one_reserve_hold_it_once(tenant):
    tenant.budget(100)
    body = request(tenant, 1)

    async def main():
        async with AsyncCyclesClient(tenant.config(read_timeout=20)) as client:
            return await asyncio.gather(*(client.create_reservation(body) for _ in range(200)))

    answers = asyncio.run(main())
    assert {answer.status for answer in answers} == {200}
    assert len({answer.body["reservation_id"] for answer in answers}) == 1
    assert tenant.balance() == (99, 1, 0)


def test_what_one_door_holds_the_other_can_settle(tenant, client):
    tenant.budget(100, unit="RISK_POINTS")
    answer = client.create_reservation(request(tenant, 30, unit="RISK_POINTS"))
    guard = Guard(TARGET, tenant.key, {"tenant": tenant.name})
    with guard.channel:
        guard.authority.Commit(
            authority_pb2.CommitRequest(
                idempotency_key="c",
                reservation_id=answer.body["reservation_id"],
                actual=[types_pb2.Amount(unit=types_pb2.UNIT_RISK_POINTS, value=20)],
            ),
            metadata=guard.metadata,
            timeout=5,
        )
        with guard.action("act", "tool.test", "any", {}, 5):
            [row] = tenant.reservations(status="ACTIVE")
            assert row["reserved"] == {"unit": "RISK_POINTS", "amount": 5}
    assert tenant.balance(unit="RISK_POINTS") == (75, 0, 25)
