"""A support agent on case #4782: Acme Corp was invoiced $847 against a contract of $720.

It takes the same four steps with and without Remit in front of its tools.
"""

import argparse
import os
import sys
import uuid
from contextlib import contextmanager

import tools


def unguarded(name, kind, toolset, arguments, risk_points):
    """Nobody is asked."""
    from remit_client import Verdict

    @contextmanager
    def action():
        yield Verdict("UNGUARDED")

    return action()


@contextmanager
def local(*_):
    """Reads what is here already: nothing leaves the process, nobody is asked."""
    from remit_client import Verdict

    yield Verdict("LOCAL")


def steps(case):
    """The agent's plan: tool, kind, toolset, risk points, arguments."""
    facts = f"invoiced ${case['invoiced']}, contract ${case['contract']}"
    yield tools.append_internal_note, "tool.note", "internal-notes", 1, {
        "case": "4782", "text": f"Overcharge confirmed: {facts}"}
    yield tools.update_crm_status, "tool.crm", "crm-updates", 2, {
        "case": "4782", "status": "billing-dispute"}
    yield tools.send_customer_email, "tool.email", "send-email", 20, {
        "case": "4782", "to": "billing@acme.example",
        "text": f"We overcharged you by ${case['invoiced'] - case['contract']}."}


def run(guard):
    """Works through the case; returns what was approved and what was blocked."""
    from remit_client import ActionDenied

    approved, blocked = [], []

    def step(around, tool, kind, toolset, risk_points, arguments):
        name = tool.__name__
        where = f"[{toolset}]" if toolset else "[local]"
        try:
            with around(name, kind, toolset, arguments, risk_points) as verdict:
                result = tool(**arguments)
        except ActionDenied as denied:
            verdict = denied.verdict
            blocked.append(name)
            result = None
        else:
            approved.append(name)
        print(f"{name:<22} {where:<17} {verdict.decision:<10} {verdict.code:<24} {verdict.scope}".rstrip())
        return result

    case = step(local, tools.read_case, "tool.read", "", 0, {"case": "4782"})
    for tool, kind, toolset, risk_points, arguments in steps(case):
        step(guard, tool, kind, toolset, risk_points, arguments)
    return approved, blocked


def counted(number, what):
    return f"{number} action{'' if number == 1 else 's'} {what}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--unguarded", action="store_true", help="act without asking")
    mode.add_argument("--guarded", action="store_true", help="ask Remit before each action")
    parser.add_argument("--target", default="127.0.0.1:50051", help="host:port or unix:/path")
    options = parser.parse_args()
    # Not an option: other users can read a command line.
    key = os.environ.get("REMIT_API_KEY", "")
    if options.guarded and not key:
        parser.error("--guarded needs the agent's API key in the variable REMIT_API_KEY")

    guard = unguarded
    if options.guarded:
        from remit_client import Guard

        guard = Guard(
            options.target,
            key,
            {"tenant": "acme", "workspace": "prod", "agent": "support-agent",
             "dimensions": {"run": uuid.uuid4().hex}},
        ).action

    approved, blocked = run(guard)

    # The tools' own counters say whether a blocked body stayed untouched.
    for name in approved + blocked:
        wanted = 1 if name in approved else 0
        print(f"body of {name} ran {tools.runs[name]} time{'' if tools.runs[name] == 1 else 's'}")
        if tools.runs[name] != wanted:
            sys.exit(f"{name} ran {tools.runs[name]} times instead of {wanted}")
    print(f"{counted(len(approved), 'approved')} · {counted(len(blocked), 'blocked')}")


if __name__ == "__main__":
    main()
