"""What the tests share: tenants made over the admin plane, and a proxy that loses answers."""

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from runcycles import Action, Amount, CyclesConfig, Subject

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "support-agent"))

from remit_client import connect  # noqa: E402  (puts the stubs on the path)

from remit.v1 import ledger_pb2, ledger_pb2_grpc  # noqa: E402

BASE_URL = os.environ["CYCLES_BASE_URL"]
ADMIN_URL = os.environ["REMIT_CYCLES_ADMIN_URL"]
TARGET = os.environ["REMIT_TARGET"].removeprefix("http://")
OPERATOR_KEY = Path(os.environ["REMIT_KEY_FILE"]).read_text().strip()


def unique(prefix):
    return f"{prefix}-{uuid.uuid4().hex[:12]}"


def admin(method, path, body=None, **params):
    """One call on the admin plane with the operator's key."""
    answer = httpx.request(
        method,
        ADMIN_URL + path,
        json=body,
        params=params,
        headers={"X-Admin-API-Key": OPERATOR_KEY},
        timeout=10,
    )
    assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
    return answer.json()


def remit(*arguments, given=None):
    """One of remit's own commands, as an operator gives it."""
    done = subprocess.run(
        [os.environ["REMIT_BIN"], *arguments], cwd=ROOT, input=given, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr


def provision(document):
    remit("provision", "-f", "/dev/stdin", given=document)


@dataclass
class Tenant:
    """A tenant, a key of it, and where its SDK clients keep their journal."""

    name: str
    key: str
    journal: Path

    def scope(self, path=""):
        return f"tenant:{self.name}/{path}".rstrip("/")

    def budget(self, allocated, path="", unit="USD_MICROCENTS", **more):
        """Gives a scope below the tenant, or the tenant itself, a budget."""
        return admin("POST", "/v1/admin/budgets", {
            "tenant_id": self.name, "scope": self.scope(path), "unit": unit,
            "allocated": {"amount": allocated, "unit": unit}, **more,
        })

    def fund(self, operation, amount, path="", unit="USD_MICROCENTS"):
        body = {"operation": operation, "amount": {"amount": amount, "unit": unit}}
        return admin("POST", "/v1/admin/budgets/fund", body, scope=self.scope(path), unit=unit)

    def config(self, base_url=BASE_URL, **more):
        """How a client of the SDK is set up to act for the tenant."""
        settings = {
            "base_url": base_url, "api_key": self.key, "tenant": self.name, "agent": "bot",
            "journal_dir": str(self.journal), "retry_initial_delay": 0.05,
        }
        return CyclesConfig(**settings | more)

    def balances(self):
        """(remaining, reserved, spent) by scope below the tenant and unit."""
        answer = httpx.get(
            f"{BASE_URL}/v1/balances",
            params={"tenant": self.name},
            headers={"X-Cycles-API-Key": self.key},
        )
        assert answer.status_code == 200, answer.text
        return {
            (row["scope_path"].partition("/")[2], row["remaining"]["unit"]): (
                row["remaining"]["amount"], row["reserved"]["amount"], row["spent"]["amount"],
            )
            for row in answer.json()["balances"]
        }

    def balance(self, path="", unit="USD_MICROCENTS"):
        return self.balances()[path, unit]

    def reservations(self, **filters):
        answer = httpx.get(
            f"{BASE_URL}/v1/reservations",
            params={"tenant": self.name, **filters},
            headers={"X-Cycles-API-Key": self.key},
        )
        assert answer.status_code == 200, answer.text
        return answer.json()["reservations"]

    def ledger(self, *kinds):
        """The bodies of the tenant's ledger entries of some kinds, in order."""
        wanted = [ledger_pb2.EntryKind.Value(f"ENTRY_KIND_{kind}") for kind in kinds]
        answer = ledger_pb2_grpc.LedgerStub(connect(TARGET)).ListEntries(
            ledger_pb2.ListEntriesRequest(tenant=self.name, kinds=wanted, page_size=1000),
            metadata=[("authorization", f"Bearer {OPERATOR_KEY}")],
            timeout=10,
        )
        return [json.loads(entry.body) for entry in answer.entries]


def new_key(tenant, **more):
    body = {"tenant_id": tenant, "name": "agents", **more}
    return admin("POST", "/v1/admin/api-keys", body)["key_secret"]


def new_tenant(journal, **settings):
    """A tenant by the rules of the protocol, made as its own tools make one."""
    name = unique("t")
    admin("POST", "/v1/admin/tenants", {"tenant_id": name, "name": name, **settings})
    return Tenant(name, new_key(name), journal)


def native_tenant(journal, document):
    """A tenant by Remit's own rules: default-deny. `TENANT` in the document is its name."""
    name = unique("n")
    provision(document.replace("TENANT", name))
    return Tenant(name, new_key(name), journal)


def request(tenant, amount, name="act", unit="USD_MICROCENTS", key=None, **subject):
    """What reserve and decide take."""
    return {
        "idempotency_key": key or uuid.uuid4().hex,
        "subject": Subject(tenant=tenant.name, **subject).model_dump(exclude_none=True),
        "action": Action(kind="tool.test", name=name).model_dump(exclude_none=True),
        "estimate": Amount(unit=unit, amount=amount).model_dump(mode="json"),
    }


def settlement(amount, unit="USD_MICROCENTS", key=None, **more):
    """What commit takes."""
    return {
        "idempotency_key": key or uuid.uuid4().hex,
        "actual": {"unit": unit, "amount": amount},
        **more,
    }


def eventually(condition, timeout=5.0):
    """Waits for what happens in the SDK's background."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.02)


@dataclass
class Exchange:
    """One request that went through the proxy, and what the gateway said to it."""

    method: str
    path: str
    sent: dict
    status: int
    answer: dict
    replayed: bool

    @property
    def key(self):
        return self.sent["idempotency_key"]


@dataclass
class Proxy:
    """Forwards to the gateway, keeps what was said, and can lose answers on their way back."""

    exchanges: list = field(default_factory=list)
    losses: dict = field(default_factory=dict)

    def __post_init__(self):
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do(self):
                proxy.forward(self)

            do_GET = do_POST = do

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = "http://127.0.0.1:%d" % self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def lose(self, ending, times=1):
        """The next answers to calls whose path ends so never arrive; the calls do."""
        self.losses[ending] = times

    def calls(self, ending):
        """What went to paths that end so, in the order of the answers."""
        return [exchange for exchange in self.exchanges if exchange.path.endswith(ending)]

    def forward(self, handler):
        sent = handler.rfile.read(int(handler.headers.get("content-length", 0)))
        headers = {
            name: value
            for name, value in handler.headers.items()
            if name.lower() not in ("host", "connection", "accept-encoding")
        }
        upstream = HTTPConnection(urlsplit(BASE_URL).netloc, timeout=10)
        upstream.request(handler.command, handler.path, sent or None, headers)
        answer = upstream.getresponse()
        body = answer.read()
        upstream.close()
        self.exchanges.append(Exchange(
            handler.command,
            handler.path,
            json.loads(sent or "{}"),
            answer.status,
            json.loads(body or "{}"),
            answer.getheader("x-remit-replayed") == "true",
        ))
        for ending, times in self.losses.items():
            if times and handler.path.endswith(ending):
                self.losses[ending] = times - 1
                handler.close_connection = True
                return
        handler.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date"):
                handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)
