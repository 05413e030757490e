"""The support agent on case #4782, guarded by the published package runcycles.

It takes the same four steps with and without a server in front of its tools. The server is
named by the SDK's own variables: CYCLES_BASE_URL and CYCLES_API_KEY.
"""

import argparse
from collections import Counter

from runcycles import BudgetExceededError, CyclesClient, CyclesConfig, cycles

COST = 1_000_000  # USD_MICROCENTS: one cent for each action
runs = Counter()  # how often the body of each tool really ran


def read_case(case):
    runs["read-case"] += 1
    return {"case": case, "customer": "Acme Corp", "invoiced": 847, "contract": 720}


def append_note(case, text):
    runs["append-note"] += 1


def update_status(case, status):
    runs["update-status"] += 1


def send_reply(case, to, text):
    runs["send-reply"] += 1


def unguarded(tool, name, kind, toolset):
    """Nobody is asked."""
    return tool


def guard():
    """Answers what puts a tool behind the server: reserve, run, commit."""
    config = CyclesConfig.from_env()
    config.tenant = config.tenant or "demo-tenant"
    config.workspace = config.app = config.workflow = "default"
    config.agent = "support-bot"
    client = CyclesClient(config)

    def guarded(tool, name, kind, toolset):
        around = cycles(COST, client=client, action_name=name, action_kind=kind, toolset=toolset)
        return around(tool)

    return guarded


def work(around):
    """Works through the case; answers what was approved and what was blocked."""
    approved, blocked = [], []

    def step(name, kind, toolset, tool, **arguments):
        # What is read is here already: nothing leaves the process, nobody is asked.
        act = around(tool, name, kind, toolset) if toolset else tool
        try:
            result, said = act(**arguments), "approved"
            approved.append(name)
        except BudgetExceededError as denied:
            result, said = None, f"POST /v1/reservations → {denied.status} {denied.error_code}"
            blocked.append(name)
        print(f"{name:<14} {'[' + (toolset or 'local') + ']':<17} {said}")
        return result

    case = step("read-case", "", "", read_case, case="4782")
    facts = f"invoiced ${case['invoiced']}, contract ${case['contract']}"
    step("append-note", "tool.notes", "internal-notes", append_note,
         case="4782", text=f"Overcharge confirmed: {facts}")
    step("update-status", "tool.crm", "crm-updates", update_status,
         case="4782", status="billing-dispute")
    step("send-reply", "tool.email", "send-email", send_reply,
         case="4782", to="billing@acme.example",
         text=f"We overcharged you by ${case['invoiced'] - case['contract']}.")
    return approved, blocked


def counted(number, what):
    return f"{number} action{'' if number == 1 else 's'} {what}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--unguarded", action="store_true", help="act without asking")
    mode.add_argument("--guarded", action="store_true", help="ask before each action")
    options = parser.parse_args()

    approved, blocked = work(guard() if options.guarded else unguarded)

    # The tools' own counters say whether a blocked body stayed untouched.
    if runs != Counter(approved):
        raise SystemExit(f"ran {dict(runs)}, approved were {approved}")
    print(f"{counted(len(approved), 'approved')} · {counted(len(blocked), 'blocked')}")


if __name__ == "__main__":
    main()
