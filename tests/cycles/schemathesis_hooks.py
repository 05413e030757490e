"""Makes most of the generated requests that are well formed agree with what is there, and with
themselves. What is spoiled stays so."""

import itertools
import os
import re

import schemathesis

TENANT = os.environ["CYCLES_TENANT"]
OPERATOR = os.environ["CYCLES_OPERATOR"]
NAME = re.compile(r"[A-Za-z0-9_.\-]{1,128}")
SCOPE = re.compile(r"tenant:[^/]+(/.*)?")
UNITS = ["USD_MICROCENTS", "TOKENS", "CREDITS", "RISK_POINTS"]

numbers = itertools.count()
reservations = []


def text(fields, name):
    value = fields.get(name)
    return value if isinstance(value, str) else ""


def at_home(fields):
    """The tenant that there is, for any other."""
    for name in ["tenant", "tenant_id"]:
        if NAME.fullmatch(text(fields, name)):
            fields[name] = TENANT
    scope = SCOPE.fullmatch(text(fields, "scope"))
    if scope:
        fields["scope"] = f"tenant:{TENANT}{scope[1] or ''}"


def in_unit(body, unit):
    for amount in body.values():
        if isinstance(amount, dict) and amount.get("unit") in UNITS:
            amount["unit"] = unit


@schemathesis.hook
def before_call(context, case, kwargs):
    number = next(numbers)
    body = case.body if isinstance(case.body, dict) else {}
    query, path = case.query or {}, case.path_parameters or {}
    # Else the first test that closes the tenant ends all others.
    if body.get("status") != "CLOSED":
        at_home(path)
    if case.operation.label != "POST /v1/admin/tenants":
        at_home(body)
    at_home(query)
    # A list has told it, and without it every later test would be a 401.
    if path.get("key_id") == OPERATOR:
        path["key_id"] = "0" * len(OPERATOR)
    if isinstance(body.get("subject"), dict):
        at_home(body["subject"])
    if number % 4:
        # Else nearly every call has the key of the one before, and other content.
        key = text(body, "idempotency_key")
        if 0 < len(key) < 200:
            key = body["idempotency_key"] = f"{key}-{number}"
        if case.headers and key.isascii() and key.isprintable():
            case.headers.pop("X-Idempotency-Key", None)
        unit = body.get("unit") or query.get("unit")
        if unit in UNITS:
            in_unit(body, unit)
    if reservations and NAME.fullmatch(text(path, "reservation_id")):
        path["reservation_id"] = reservations[number % len(reservations)]


@schemathesis.hook
def after_call(context, case, response):
    if response.status_code == 200 and case.operation.path == "/v1/reservations":
        answer = response.json()
        for made in answer.get("reservations", [answer]):
            # The latest ones: most of them are not settled yet.
            if made.get("status", "ACTIVE") == "ACTIVE" and "reservation_id" in made:
                reservations[:] = [*reservations, made["reservation_id"]][-20:]
