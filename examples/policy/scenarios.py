"""Six small agents under policy, each with a real server and real gRPC.

Each scenario provisions its file, acts through `Gate`, and fails when a decision, or what
its tools did, is not what it should be. A tool's function only runs after a clear yes.
"""

import os
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support-agent"))

from remit_client import connect  # noqa: E402  (puts the stubs on the path)

from remit.v1 import authority_pb2, authority_pb2_grpc  # noqa: E402
from remit.v1 import ledger_pb2, ledger_pb2_grpc, types_pb2  # noqa: E402

HERE = Path(__file__).resolve().parent
REMIT = os.environ["REMIT_BIN"]
TARGET = os.environ["REMIT_TARGET"].removeprefix("http://")
KEY = [("authorization", f"Bearer {Path(os.environ['REMIT_KEY_FILE']).read_text().strip()}")]


def provision(name):
    """Applies a file as an operator does."""
    print(f"  remit provision -f examples/policy/{name}")
    subprocess.run(
        [REMIT, "provision", "-f", str(HERE / name)], check=True, stdout=subprocess.DEVNULL
    )


@dataclass
class Told:
    """What Remit said of one action, and whether its function ran."""

    decision: str
    code: str
    message: str
    answer: object
    ran: bool = False


class Gate:
    """Asks for one agent, and runs its tools only after a clear yes."""

    def __init__(self, tenant, **subject):
        channel = connect(TARGET)
        self.authority = authority_pb2_grpc.AuthorityStub(channel)
        self.ledger = ledger_pb2_grpc.LedgerStub(channel)
        self.tenant = tenant
        self.subject = subject

    def __call__(self, name, arguments=None, dry_run=False, tool=None, **context):
        dimensions = {"run": self.subject["run"]} if "run" in self.subject else {}
        levels = {key: value for key, value in self.subject.items() if key != "run"}
        request = authority_pb2.ReserveRequest(
            idempotency_key=str(uuid.uuid4()),
            subject=types_pb2.Subject(tenant=self.tenant, dimensions=dimensions, **levels),
            action=types_pb2.Action(name=name),
            context=types_pb2.Context(**context),
            dry_run=dry_run,
            explain=True,
        )
        if arguments is not None:
            request.action.arguments.update(arguments)
        answer = self.authority.Reserve(request, metadata=KEY, timeout=10)
        told = self.told(answer)
        if answer.reservation_id and told.decision in ("ALLOW", "ALLOW_WITH_CAPS"):
            if tool is not None:
                tool()
            told.ran = True
            self.authority.Commit(
                authority_pb2.CommitRequest(
                    idempotency_key=str(uuid.uuid4()),
                    reservation_id=answer.reservation_id,
                    tenant=self.tenant,
                ),
                metadata=KEY,
                timeout=10,
            )
        return told

    def look(self, name, **context):
        """A decision without a hold, which leaves a record."""
        request = authority_pb2.DecideRequest(
            idempotency_key=str(uuid.uuid4()),
            subject=types_pb2.Subject(tenant=self.tenant, **self.subject),
            action=types_pb2.Action(name=name),
            context=types_pb2.Context(**context),
            record=True,
        )
        return self.told(self.authority.Decide(request, metadata=KEY, timeout=10))

    @staticmethod
    def told(answer):
        decision = types_pb2.Decision.Name(answer.decision)[len("DECISION_"):]
        reason = answer.reasons[0] if answer.reasons else types_pb2.Reason()
        return Told(decision, reason.code, reason.message, answer)

    def entries(self, kind=None):
        kinds = [kind] if kind is not None else []
        request = ledger_pb2.ListEntriesRequest(tenant=self.tenant, kinds=kinds, page_size=1000)
        return self.ledger.ListEntries(request, metadata=KEY, timeout=10).entries


def expect(told, decision, code=""):
    """Prints what was said, and fails where it is something else."""
    line = f"    {told.decision:16} {told.code} {told.message}".rstrip()
    print(line)
    if (told.decision, told.code) != (decision, code):
        sys.exit(f"expected {decision} {code}")
    return told


def least_privilege():
    """Four model calls at a gateway that allows READ and WRITE."""
    provision("least-privilege.yaml")
    gate = Gate("gateway", agent="model")
    calls = ["read_user", "send_webhook", "update_user_status", "delete_user"]
    wanted = [("ALLOW", ""), ("DENY", "POLICY_DENIED"), ("ALLOW", ""), ("DENY", "POLICY_DENIED")]
    before = len(gate.entries())
    for call, want in zip(calls, wanted):
        expect(gate(call, dry_run=True), *want)
    if len(gate.entries()) != before:
        sys.exit("a dry run left something behind")
    for call, want in zip(calls, wanted):
        expect(gate(call), *want)
    expect(gate("export_users"), "DENY", "UNKNOWN_ACTION")
    provision("least-privilege-allowlist.yaml")
    expect(gate("read_user"), "ALLOW")
    expect(gate("update_user_status"), "DENY", "POLICY_DENIED")
    expect(gate("delete_user"), "DENY", "POLICY_DENIED")
    provision("least-privilege-read-only.yaml")
    expect(gate("read_user"), "ALLOW")
    expect(gate("update_user_status"), "DENY", "POLICY_DENIED")


def risk_points():
    """100 points a run: five e-mails, then read-only."""
    provision("risk-points.yaml")
    sent = []
    for run in ["r-1", "r-2"]:
        gate = Gate("outreach", agent="outreach", run=run)
        for number in range(5):
            expect(gate("send_email", tool=lambda: sent.append(number)), "ALLOW")
        expect(gate("send_email", tool=lambda: sent.append(6)), "DENY", "BUDGET_EXCEEDED")
        expect(gate("read_contact"), "ALLOW")
        expect(gate("search_orders"), "ALLOW")
    if len(sent) != 10 or 6 in sent:
        sys.exit(f"{len(sent)} e-mails went out")


def narrowing():
    """One agent from 0 to 100% of its points."""
    provision("narrowing.yaml")
    gate = Gate("narrowing", agent="resolver")
    steps = [
        ("send_email", "ALLOW", "", []),
        ("send_email", "ALLOW", "", []),
        # 50% used.
        ("deploy", "DENY", "CAPABILITY_NARROWED", []),
        ("send_email", "DENY", "CAPABILITY_NARROWED", []),
        ("append_note", "ALLOW_WITH_CAPS", "", ["read_case", "append_note"]),
        ("append_note", "ALLOW_WITH_CAPS", "", ["read_case", "append_note"]),
        ("append_note", "ALLOW_WITH_CAPS", "", ["read_case", "append_note"]),
        # 80% used.
        ("append_note", "DENY", "CAPABILITY_NARROWED", []),
        ("read_case", "ALLOW_WITH_CAPS", "", ["read_case"]),
        ("read_case", "ALLOW_WITH_CAPS", "", ["read_case"]),
        ("read_case", "ALLOW_WITH_CAPS", "", ["read_case"]),
        ("read_case", "ALLOW_WITH_CAPS", "", ["read_case"]),
        # All of it used.
        ("read_case", "DENY", "CAPABILITY_NARROWED", []),
    ]
    for name, decision, code, tools in steps:
        told = expect(gate(name), decision, code)
        if list(told.answer.caps.tool_allowlist) != tools:
            sys.exit(f"expected the tools {tools}, got {told.answer.caps}")
        if tools:
            denied = list(told.answer.caps.tool_denylist)
            print(f"                     tools left: {', '.join(tools)}; not: {', '.join(denied)}")


def surfaces():
    """The same agent code for two customers, and in two workflows of one."""
    provision("surfaces.yaml")
    for tenant, deploys in [("enterprise", ("ALLOW", "")), ("starter", ("DENY", "BUDGET_EXCEEDED"))]:
        gate = Gate(tenant, workflow="shipping-update", agent="support")
        print(f"  {tenant}")
        expect(gate("send_email"), "ALLOW")
        expect(gate("deploy"), *deploys)
    print("  starter, until its e-mail is used up")
    expect(gate("send_email"), "ALLOW")
    expect(gate("send_email"), "DENY", "BUDGET_EXCEEDED")
    print("  enterprise, in a billing dispute")
    gate = Gate("enterprise", workflow="billing-dispute", agent="support")
    expect(gate("send_email"), "DENY", "BUDGET_EXCEEDED")


def email_playbook():
    """Rules on arguments, circumstances and what happened before."""
    cases = HERE / "email-playbook.cases.yaml"
    print("  remit policy test examples/policy/email-playbook.cases.yaml")
    subprocess.run([REMIT, "policy", "test", str(cases)], check=True)
    provision("email-playbook.yaml")
    gate = Gate("mail", agent="mailer")
    why = {"environment": "production", "reason": "answers case 7"}
    looked = expect(gate.look("read_inbox"), "ALLOW")
    if not looked.answer.ledger_sequence or looked.answer.balances[0].reserved:
        sys.exit("a look shall leave a record and no hold")
    expect(gate("send_email", {"to": "jo@acme.example", "value": 20}, **why), "ALLOW")
    waits = ("REQUIRE_APPROVAL", "APPROVAL_REQUIRED")
    if expect(gate("send_email", {"to": "jo@acme.example", "value": 900}, **why), *waits).ran:
        sys.exit("an e-mail went out that waits for its owner")
    denied = ("DENY", "POLICY_DENIED")
    other = {"to": "jo@acme.example", "customer_of": "other"}
    expect(gate("send_email", other, **why), *denied)
    expect(gate("send_email", {"to": "jo@acme.example"}), *denied)
    told = expect(gate("send_email", {"to": "x@mailinator.com"}, **why), *denied)
    incidents = gate.entries(ledger_pb2.ENTRY_KIND_INCIDENT)
    print(f"    {len(incidents)} incident")
    if len(incidents) != 1:
        sys.exit("expected one incident")
    print(f"  remit explain {told.answer.decision_id}")
    subprocess.run([REMIT, "explain", told.answer.decision_id], check=True)


def runaway():
    """200 e-mails and a deploy: five go, the rest does not, and one incident."""
    provision("runaway.yaml")
    gate = Gate("runaway", agent="looper", run="r-1")
    told = [gate("send_email") for _ in range(200)]
    told.append(gate("deploy"))
    codes = {}
    for answer in told:
        word = answer.code or answer.decision
        codes[word] = codes.get(word, 0) + 1
    print(f"    {codes}")
    # Ten denials by the budget; at the next attempt the agent is frozen.
    if codes != {"ALLOW": 5, "BUDGET_EXCEEDED": 10, "SCOPE_FROZEN": 186} or told[-1].ran:
        sys.exit("expected five e-mails, ten denials, and a stop")
    incidents = gate.entries(ledger_pb2.ENTRY_KIND_INCIDENT)
    if len(incidents) != 1:
        sys.exit(f"expected one incident, got {len(incidents)}")
    expect(told[-1], "DENY", "SCOPE_FROZEN")


SCENARIOS = [least_privilege, risk_points, narrowing, surfaces, email_playbook, runaway]


def main():
    wanted = sys.argv[1:]
    for scenario in SCENARIOS:
        if not wanted or scenario.__name__ in wanted:
            print(f"\n== {scenario.__name__}: {scenario.__doc__}")
            scenario()
    print("\nevery scenario went as it should")


if __name__ == "__main__":
    main()
