"""The agent's four tools. Each counts how often its body really ran."""

from collections import Counter

runs = Counter()


def read_case(case):
    runs["read_case"] += 1
    return {"case": case, "customer": "Acme Corp", "invoiced": 847, "contract": 720}


def append_internal_note(case, text):
    runs["append_internal_note"] += 1


def update_crm_status(case, status):
    runs["update_crm_status"] += 1


def send_customer_email(case, to, text):
    runs["send_customer_email"] += 1
