"""Two agents that may not decide alone, and wait for a person.

    agent.py deploy REVISION    prepares a deploy, waits, and triggers it once
    agent.py email TEXT         sends a customer e-mail once somebody has read it

`wait_for_approval` is what to copy: it survives a broken connection, and there is no way
through it but ACTIVE.
"""

import os
import sys
import time
import uuid
from pathlib import Path

import grpc

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support-agent"))

from remit_client import connect  # noqa: E402  (puts the stubs on the path)

from remit.v1 import authority_pb2, authority_pb2_grpc, types_pb2  # noqa: E402

TARGET = os.environ["REMIT_TARGET"].removeprefix("http://")
KEY = [("authorization", f"Bearer {os.environ['REMIT_API_KEY']}")]
authority = authority_pb2_grpc.AuthorityStub(connect(TARGET))
ran = []


class NotApproved(Exception):
    """The action may not happen; its function was never called."""


def wait_for_approval(reservation_id):
    """Returns once the reservation is ACTIVE; raises on any other end."""
    while True:
        request = authority_pb2.AwaitReservationRequest(reservation_id=reservation_id)
        request.timeout.FromSeconds(25)
        try:
            answer = authority.AwaitReservation(request, metadata=KEY, timeout=30)
        except grpc.RpcError as error:
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                raise
            time.sleep(0.5)
            continue
        state = types_pb2.ReservationState.Name(answer.reservation.state)
        if state == "RESERVATION_STATE_ACTIVE":
            return
        if state != "RESERVATION_STATE_PENDING_APPROVAL":
            raise NotApproved(state.removeprefix("RESERVATION_STATE_"))


def act(name, arguments, function, environment="production"):
    """Runs a function once Remit, and whoever Remit asks, have said yes."""
    request = authority_pb2.ReserveRequest(
        idempotency_key=str(uuid.uuid4()),
        subject=types_pb2.Subject(agent="deployer", dimensions={"run": "r-1"}),
        action=types_pb2.Action(name=name),
        context=types_pb2.Context(environment=environment, reason="ticket 4711"),
    )
    request.action.arguments.update(arguments)
    answer = authority.Reserve(request, metadata=KEY, timeout=10)
    if answer.decision in (types_pb2.DECISION_ALLOW, types_pb2.DECISION_ALLOW_WITH_CAPS):
        reservation_id = answer.reservation_id
    elif answer.decision == types_pb2.DECISION_REQUIRE_APPROVAL:
        reservation_id = answer.approval.approval_id
        print(f"{name}: waits for approval {reservation_id}", flush=True)
        wait_for_approval(reservation_id)
    else:
        raise NotApproved(answer.reasons[0].message)
    function(**arguments)
    authority.Commit(
        authority_pb2.CommitRequest(
            idempotency_key=f"commit-{reservation_id}", reservation_id=reservation_id
        ),
        metadata=KEY,
        timeout=10,
    )


def main():
    what, value = sys.argv[1:3]
    try:
        if what == "deploy":
            act("prepare_deploy", {"revision": value}, lambda **_: print("prepared"))
            arguments = {"revision": value, "token": "s3cret"}
            act("trigger_deploy", arguments, lambda **_: ran.append("deploy"))
        else:
            arguments = {"to": "jo@acme.example", "text": value}
            act("send_customer_email", arguments, lambda **_: ran.append("e-mail"))
    except NotApproved as error:
        print(f"{what}: not approved: {error}")
    print(f"actions that ran: {len(ran)}")


if __name__ == "__main__":
    main()
