"""The published package runcycles-openai-agents with openai-agents, unmodified, against Remit.

A scripted model stands in for the network: it answers from a list.
"""

import asyncio

import pytest
from agents import (
    Agent,
    InputGuardrailTripwireTriggered,
    Model,
    ModelResponse,
    Usage,
    UserError,
    function_tool,
    set_tracing_disabled,
)
from openai.types.responses import (
    Response,
    ResponseCompletedEvent,
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseOutputText,
)
from runcycles import AsyncCyclesClient, BudgetExceededError, Unit
from runcycles_openai_agents import (
    CyclesRunHooks,
    ToolEstimateConfig,
    ToolEstimateMap,
    cycles_budget_guardrail,
)

set_tracing_disabled(True)

MODEL_CALL = 500_000  # what the hooks hold for one call of the model, in microcents


class Script(Model):
    """A model whose answers are written down: texts, or (tool, arguments)."""

    def __init__(self, *turns):
        self.turns = list(turns)
        self.calls = 0

    async def get_response(self, *_, **__):
        turn = self.turns[self.calls]
        self.calls += 1
        if isinstance(turn, str):
            text = ResponseOutputText(type="output_text", text=turn, annotations=[])
            output = ResponseOutputMessage(
                id=f"m-{self.calls}", type="message", role="assistant", status="completed",
                content=[text],
            )
        else:
            tool, arguments = turn
            output = ResponseFunctionToolCall(
                type="function_call", call_id=f"{tool}-{self.calls}", name=tool,
                arguments=arguments,
            )
        usage = Usage(requests=1, input_tokens=100, output_tokens=20, total_tokens=120)
        return ModelResponse(output=[output], usage=usage, response_id=None)

    async def stream_response(self, *arguments, **named):
        answer = await self.get_response(*arguments, **named)
        response = Response(
            id="r", object="response", created_at=0, model="script", output=answer.output,
            parallel_tool_calls=False, tool_choice="auto", tools=[],
        )
        yield ResponseCompletedEvent(
            type="response.completed", response=response, sequence_number=0
        )


class Tools:
    """Three tools; each notes that its body ran."""

    def __init__(self):
        self.ran = []

        @function_tool
        def search(query: str) -> str:
            self.ran.append("search")
            return "found"

        @function_tool
        def update_crm(status: str) -> str:
            self.ran.append("update_crm")
            return "updated"

        @function_tool
        def send_email(text: str) -> str:
            self.ran.append("send_email")
            return "sent"

        self.all = [search, update_crm, send_email]


@pytest.fixture
def tools():
    return Tools()


ESTIMATES = ToolEstimateMap(
    {
        "search": 0,
        "send_email": ToolEstimateConfig(estimate=20, action_kind="tool.email"),
    },
    default_estimate=2,
)


def run(tenant, agent, text="case 4782", config=None, run_id=None, **hooks):
    """One run of an agent under the package's hooks; answers its final output."""

    async def main():
        async with AsyncCyclesClient(config or tenant.config(agent=None)) as client:
            governed = CyclesRunHooks(
                client=client, tenant=tenant.name, tool_estimates=ESTIMATES, **hooks
            )
            result = await governed.run(agent, text, run_id=run_id)
            return result.final_output

    return asyncio.run(main())


def funded(tenant, dollars=1, points=100):
    tenant.budget(dollars * 100_000_000)
    tenant.budget(points, unit="RISK_POINTS")
    return tenant


def told(tenant):
    """What the ledger says that the agents did, in order."""
    return [
        (entry["kind"], entry["action"]["name"])
        for entry in tenant.ledger("DECIDE", "RESERVE", "COMMIT", "RELEASE", "RECORD", "EXPIRE")
    ]


def test_model_calls_tools_and_a_handoff_are_in_the_ledger_in_order(tenant, tools):
    funded(tenant)
    writer = Agent(
        name="writer", tools=tools.all,
        model=Script(("send_email", '{"text": "sorry"}'), "e-mail sent"),
    )
    guardrail = cycles_budget_guardrail(
        config=tenant.config(), tenant=tenant.name, estimate=MODEL_CALL
    )
    # Before the run, not beside it: see below.
    guardrail.run_in_parallel = False
    triage = Agent(
        name="triage", tools=tools.all, handoffs=[writer], input_guardrails=[guardrail],
        model=Script(
            ("search", '{"query": "4782"}'), ("update_crm", '{"status": "open"}'),
            ("transfer_to_writer", "{}"),
        ),
    )

    assert run(tenant, triage) == "e-mail sent"
    assert tools.ran == ["search", "update_crm", "send_email"]
    model = [("RESERVE", "triage"), ("COMMIT", "triage")]
    assert told(tenant) == [
        ("DECIDE", "triage"),  # the guardrail
        *model,  # which asks for search: it costs nothing, so that nobody is asked
        *model,
        ("RESERVE", "update_crm"), ("COMMIT", "update_crm"),
        *model,
        ("RECORD", "writer"),  # the handoff
        ("RESERVE", "writer"), ("COMMIT", "writer"),
        ("RESERVE", "send_email"), ("COMMIT", "send_email"),
        ("RESERVE", "writer"), ("COMMIT", "writer"),
    ]
    assert tenant.balance() == (100_000_000 - 5 * MODEL_CALL, 0, 5 * MODEL_CALL)
    assert tenant.balance(unit="RISK_POINTS") == (78, 0, 22)


def test_the_ledger_says_who_did_what_for_how_much(tenant, tools):
    funded(tenant)
    agent = Agent(
        name="writer", tools=tools.all, model=Script(("send_email", '{"text": "x"}'), "done")
    )
    run(tenant, agent)
    model, model_end, tool, *_ = tenant.ledger("RESERVE", "COMMIT")
    assert model["subject"]["agent"] == "writer" and "toolset" not in model["subject"]
    assert (model["action"]["kind"], model["reserved"]) == (
        "llm.completion", {"USD_MICROCENTS": MODEL_CALL},
    )
    assert model_end["request"]["metrics"]["tokens_input"] == 100
    assert (tool["subject"]["toolset"], tool["action"]["kind"]) == ("send_email", "tool.email")


def test_a_run_by_tokens_is_charged_what_the_model_used(tenant, tools):
    tenant.budget(1000, unit="TOKENS")
    agent = Agent(name="writer", model=Script("done"))
    run(tenant, agent, llm_unit=Unit.TOKENS, llm_estimate=400)
    assert tenant.balance(unit="TOKENS") == (880, 0, 120)


def test_an_unprovisioned_unit_stops_the_tools(tenant, tools):
    tenant.budget(100_000_000)
    agent = Agent(
        name="writer", tools=tools.all, model=Script(("send_email", '{"text": "x"}'), "done")
    )
    # openai-agents wraps what is raised around a tool.
    with pytest.raises(UserError) as ended:
        run(tenant, agent)
    denied = ended.value.__cause__
    assert isinstance(denied, BudgetExceededError)
    assert (denied.status, denied.error_code) == (400, "UNIT_MISMATCH")
    assert tools.ran == []


def test_a_tool_that_is_not_affordable_never_runs(tenant, tools):
    funded(tenant)
    # The hooks ask for each tool as a toolset of the agent.
    tenant.budget(0, "agent:writer/toolset:send_email", unit="RISK_POINTS")
    agent = Agent(
        name="writer", tools=tools.all,
        model=Script(
            ("update_crm", '{"status": "open"}'), ("send_email", '{"text": "sorry"}'), "done"
        ),
    )
    with pytest.raises(UserError) as ended:
        run(tenant, agent)
    assert ended.value.__cause__.error_code == "BUDGET_EXCEEDED"
    assert tools.ran == ["update_crm"]
    assert agent.model.calls == 2
    # The run ended: nothing of it is still held.
    assert tenant.reservations(status="ACTIVE") == []
    assert tenant.balance(unit="RISK_POINTS") == (98, 0, 2)


def test_an_exhausted_budget_stops_the_run_before_the_model(tenant):
    tenant.budget(MODEL_CALL - 1)
    guardrail = cycles_budget_guardrail(
        config=tenant.config(), tenant=tenant.name, estimate=MODEL_CALL
    )
    # openai-agents runs a guardrail beside the first call of the model unless told so.
    guardrail.run_in_parallel = False
    agent = Agent(name="writer", input_guardrails=[guardrail], model=Script("done"))
    with pytest.raises(InputGuardrailTripwireTriggered) as tripped:
        run(tenant, agent)
    output = tripped.value.guardrail_result.output.output_info
    assert output == {"decision": "DENY", "reason": "BUDGET_EXCEEDED"}
    assert agent.model.calls == 0
    assert told(tenant) == [("DECIDE", "writer")]


def test_beside_the_guardrail_the_hooks_stop_the_model_too(tenant):
    tenant.budget(MODEL_CALL - 1)
    guardrail = cycles_budget_guardrail(
        config=tenant.config(), tenant=tenant.name, estimate=MODEL_CALL
    )
    agent = Agent(name="writer", input_guardrails=[guardrail], model=Script("done"))
    with pytest.raises((InputGuardrailTripwireTriggered, BudgetExceededError)):
        run(tenant, agent)
    assert agent.model.calls == 0
    assert tenant.balance() == (MODEL_CALL - 1, 0, 0)


def test_two_agents_share_one_budget(tenant):
    tenant.budget(5 * MODEL_CALL)

    def agent(name):
        return Agent(name=name, model=Script(*["done"] * 5))

    agents = [agent("east"), agent("west")]
    denied = 0
    for _ in range(5):
        for each in agents:
            try:
                run(tenant, each)
            except BudgetExceededError:
                denied += 1
    assert ([each.model.calls for each in agents], denied) == ([3, 2], 5)
    assert tenant.balance() == (0, 0, 5 * MODEL_CALL)


def test_two_agents_at_the_same_time_share_it_too(tenant):
    tenant.budget(5 * MODEL_CALL)
    agents = [Agent(name=f"a-{n % 2}", model=Script("done")) for n in range(10)]

    async def main():
        async with AsyncCyclesClient(tenant.config(agent=None)) as client:
            hooks = CyclesRunHooks(client=client, tenant=tenant.name)
            return await asyncio.gather(
                *(hooks.run(agent, "go") for agent in agents), return_exceptions=True
            )

    results = asyncio.run(main())
    denied = [result for result in results if isinstance(result, BudgetExceededError)]
    assert (len(denied), sum(agent.model.calls for agent in agents)) == (5, 5)
    assert tenant.balance() == (0, 0, 5 * MODEL_CALL)


def test_a_streamed_run_is_settled_when_it_ends(tenant, tools):
    funded(tenant)
    agent = Agent(
        name="writer", tools=tools.all, model=Script(("send_email", '{"text": "x"}'), "done")
    )

    async def main():
        async with AsyncCyclesClient(tenant.config(agent=None)) as client:
            hooks = CyclesRunHooks(client=client, tenant=tenant.name, tool_estimates=ESTIMATES)
            result = hooks.run_streamed(agent, "go")
            async for _ in result.stream_events():
                pass
            return result.final_output

    assert asyncio.run(main()) == "done"
    assert [kind for kind, _ in told(tenant)] == ["RESERVE", "COMMIT"] * 3
    assert tenant.balance() == (100_000_000 - 2 * MODEL_CALL, 0, 2 * MODEL_CALL)


def test_a_lost_answer_to_a_commit_is_counted_once(tenant, tools, proxy):
    funded(tenant)
    proxy.lose("/commit")
    agent = Agent(
        name="writer", tools=tools.all, model=Script(("send_email", '{"text": "x"}'), "done")
    )
    run(tenant, agent, config=tenant.config(proxy.url, agent=None))
    assert [call.replayed for call in proxy.calls("/commit")] == [False, True, False, False]
    assert tenant.balance(unit="RISK_POINTS") == (80, 0, 20)
    assert tenant.balance() == (100_000_000 - 2 * MODEL_CALL, 0, 2 * MODEL_CALL)
    assert proxy.calls("/extend") == []


def test_a_run_that_is_repeated_under_its_id_is_not_charged_twice(tenant):
    tenant.budget(10 * MODEL_CALL)
    for _ in range(2):
        # No trace and no span: the keys follow from the run's id and a count.
        run(tenant, Agent(name="writer", model=Script("done")), run_id="run-1")
    assert tenant.balance() == (9 * MODEL_CALL, 0, MODEL_CALL)


def test_without_remit_nothing_runs(tenant, tools, down):
    agent = Agent(
        name="writer", tools=tools.all, model=Script(("send_email", '{"text": "x"}'), "done")
    )
    with pytest.raises(BudgetExceededError) as unavailable:
        run(tenant, agent, config=down)
    assert unavailable.value.error_code == "TRANSPORT_ERROR"
    assert (agent.model.calls, tools.ran) == (0, [])


def test_without_remit_everything_runs_where_that_was_chosen(tenant, tools, down):
    agent = Agent(
        name="writer", tools=tools.all, model=Script(("send_email", '{"text": "x"}'), "done")
    )
    assert run(tenant, agent, config=down, fail_open=True) == "done"
    assert tools.ran == ["send_email"]


@pytest.mark.parametrize("fail_open", [True, False])
def test_the_guardrail_without_remit(tenant, down, fail_open):
    guardrail = cycles_budget_guardrail(config=down, tenant=tenant.name, fail_open=fail_open)
    guardrail.run_in_parallel = False
    agent = Agent(name="writer", input_guardrails=[guardrail], model=Script("done"))
    tenant.budget(MODEL_CALL)
    if fail_open:
        assert run(tenant, agent) == "done"
    else:
        with pytest.raises(InputGuardrailTripwireTriggered):
            run(tenant, agent)
    assert agent.model.calls == int(fail_open)
