"""Approvals in a chat: receiver.py PORT. Posts what waits into the chat (here: prints it),
and decides when somebody clicks.

    POST /remit                     Remit's events; only with a valid signature
    POST /click?id=..&by=..&yes=1   what the chat sends; guard it as your chat says

REMIT_WEBHOOK_SECRET is what `remit webhooks create` printed, REMIT_API_KEY an approver's.
"""

import hashlib, hmac, json, os, sys, time  # noqa: E401
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support-agent"))
from remit_client import connect  # noqa: E402  (puts the stubs on the path)
from remit.v1 import approvals_pb2 as pb, approvals_pb2_grpc  # noqa: E402

SECRET = os.environ["REMIT_WEBHOOK_SECRET"].encode()
KEY = [("authorization", f"Bearer {os.environ['REMIT_API_KEY']}")]
approvals = approvals_pb2_grpc.ApprovalsStub(connect(os.environ["REMIT_TARGET"].split("//")[-1]))
seen = set()  # at least once: the same id may come again; keep these in a database


def is_from_remit(header, body):
    at, tag = (part.split("=", 1)[1] for part in header.split(","))
    wanted = hmac.new(SECRET, at.encode() + b"." + body, hashlib.sha256).hexdigest()
    return abs(time.time() - int(at)) < 300 and hmac.compare_digest(tag, wanted)


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self):
        url, body = urlsplit(self.path), self.rfile.read(int(self.headers["content-length"] or 0))
        status = 200 if (self.event(body) if url.path == "/remit" else self.click(url)) else 403
        self.send_response(status)
        self.end_headers()

    def event(self, body):
        if not is_from_remit(self.headers["remit-signature"] or "=,=", body):
            return False
        event = json.loads(body)
        if "approval.requested" in event["types"] and event["id"] not in seen:
            entry = event["entry"]
            print(f"chat: {entry['action']['name']}? {entry['reservation']}", flush=True)
        seen.add(event["id"])
        return True

    def click(self, url):
        asked = dict(parse_qsl(url.query))
        request = pb.ResolveApprovalRequest(
            idempotency_key=f"click-{asked['id']}", approval_id=asked["id"], approver=asked["by"]
        )
        setattr(request, "approve" if asked.get("yes") else "reject", True)
        approval = approvals.ResolveApproval(request, metadata=KEY, timeout=10).approval
        print(f"chat: {pb.ApprovalState.Name(approval.state)} by {approval.approver}", flush=True)
        return True


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Receiver)
    print(f"chat: listening on {server.server_port}", flush=True)
    server.serve_forever()
