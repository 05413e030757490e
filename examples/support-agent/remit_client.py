"""A thin client for Remit: ask before acting, settle afterwards, fail closed."""

import json
import sys
import uuid
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import grpc

# The stubs import each other as `remit.v1...`, from the folder they are made in.
sys.path.insert(0, str(Path(__file__).parent / "generated"))

from remit.v1 import authority_pb2, authority_pb2_grpc, types_pb2  # noqa: E402

# UNAVAILABLE is safe to retry with the same idempotency key.
RETRIES = json.dumps({
    "methodConfig": [{
        "name": [{"service": "remit.v1.Authority"}],
        "retryPolicy": {
            "maxAttempts": 4,
            "initialBackoff": "0.1s",
            "maxBackoff": "2s",
            "backoffMultiplier": 2,
            "retryableStatusCodes": ["UNAVAILABLE"],
        },
    }]
})


def connect(target):
    """Opens a channel to `host:port` or `unix:/path`."""
    options = [("grpc.service_config", RETRIES)]
    if target.startswith("unix:"):
        # Otherwise gRPC sends the path as authority, which HTTP/2 refuses.
        options.append(("grpc.default_authority", "localhost"))
    return grpc.insecure_channel(target, options=options)


@dataclass
class Verdict:
    """What Remit said about one action."""

    decision: str
    code: str = ""
    scope: str = ""
    # With ALLOW_WITH_CAPS: the limits that the action must keep (types_pb2.Caps).
    caps: Optional[types_pb2.Caps] = None


class ActionDenied(Exception):
    """The action may not happen; its body was never entered."""

    def __init__(self, verdict):
        super().__init__(f"{verdict.code} {verdict.scope}".strip())
        self.verdict = verdict


@dataclass
class Guard:
    """Asks for one agent."""

    target: str
    key: str
    subject: dict
    channel: grpc.Channel = field(init=False)

    def __post_init__(self):
        self.channel = connect(self.target)
        self.authority = authority_pb2_grpc.AuthorityStub(self.channel)
        self.metadata = [("authorization", f"Bearer {self.key}")]

    @contextmanager
    def action(self, name, kind, toolset, arguments, risk_points):
        """Holds the budget around an action: `with guard.action(...): act()`.

        Raises ActionDenied before the body is entered. Any other failure to get
        an answer is an exception too, so that the action never runs unasked.
        """
        subject = types_pb2.Subject(toolset=toolset, **self.subject)
        request = authority_pb2.ReserveRequest(
            idempotency_key=str(uuid.uuid4()),
            subject=subject,
            action=types_pb2.Action(name=name, kind=kind),
            estimates=[types_pb2.Amount(unit=types_pb2.UNIT_RISK_POINTS, value=risk_points)],
        )
        request.action.arguments.update(arguments)
        answer = self.authority.Reserve(request, metadata=self.metadata, timeout=5)
        allowed = (types_pb2.DECISION_ALLOW, types_pb2.DECISION_ALLOW_WITH_CAPS)
        # A newer server may send a decision that these stubs do not know: no clear yes.
        known = answer.decision in types_pb2.Decision.values()
        decision = types_pb2.Decision.Name(answer.decision) if known else "DECISION_UNKNOWN"
        decision = decision[len("DECISION_"):]
        if answer.decision not in allowed:
            reason = answer.reasons[0] if answer.reasons else types_pb2.Reason()
            raise ActionDenied(Verdict(decision, reason.code, reason.scope))
        reservation = answer.reservation_id
        try:
            caps = answer.caps if answer.HasField("caps") else None
            yield Verdict(decision, scope=f"toolset:{toolset}", caps=caps)
        except BaseException:
            # Best effort: the hold lapses by itself, and what the action raised
            # is what the caller must see.
            with suppress(grpc.RpcError):
                self.authority.Release(
                    authority_pb2.ReleaseRequest(
                        idempotency_key=f"release-{reservation}",
                        reservation_id=reservation,
                        reason="the action failed",
                    ),
                    metadata=self.metadata,
                    timeout=5,
                )
            raise
        self.authority.Commit(
            authority_pb2.CommitRequest(
                idempotency_key=f"commit-{reservation}", reservation_id=reservation
            ),
            metadata=self.metadata,
            timeout=5,
        )
