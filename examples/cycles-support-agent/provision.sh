#!/usr/bin/env bash
# Makes the tenant, its key and its budgets with the calls of Cycles' admin plane. The key
# is all that it prints.
#
#   CYCLES_ADMIN_URL   the admin plane       (http://127.0.0.1:7979)
#   REMIT_KEY_FILE     the operator's key    (.remit/operator.key)
set -euo pipefail
admin=${CYCLES_ADMIN_URL:-http://127.0.0.1:7979}
operator=$(cat "${REMIT_KEY_FILE:-.remit/operator.key}")

call() { # call HEADER PATH BODY: fails on anything but 2xx and, made before, 409
    local answer status
    # By --config, since other users can read a command line.
    answer=$(printf 'header = "%s"\n' "$1" | curl -sS --config - -w '\n%{http_code}' \
        -X POST "$admin$2" -H 'Content-Type: application/json' -d "$3")
    status=${answer##*$'\n'}
    case $status in
    2?? | 409) printf '%s' "${answer%$'\n'*}" ;;
    *) echo "POST $2: $answer" >&2 && return 1 ;;
    esac
}

call "X-Admin-API-Key: $operator" /v1/admin/tenants \
    '{"tenant_id":"demo-tenant","name":"Demo Tenant"}' >/dev/null

made=$(call "X-Admin-API-Key: $operator" /v1/admin/api-keys '{
    "tenant_id": "demo-tenant", "name": "demo-key",
    "permissions": ["reservations:create", "reservations:commit", "reservations:release",
                    "reservations:extend", "balances:read", "admin:write"]}')
key=$(grep -o '"key_secret":"[^"]*"' <<<"$made" | cut -d'"' -f4)

budget() { # budget SCOPE AMOUNT
    call "X-Cycles-API-Key: $key" /v1/admin/budgets '{
        "scope": "'"$1"'", "unit": "USD_MICROCENTS",
        "allocated": {"amount": '"$2"', "unit": "USD_MICROCENTS"}}' >/dev/null
}
dollar=100000000
scope=tenant:demo-tenant
budget "$scope" "$dollar"
for level in workspace:default app:default workflow:default agent:support-bot; do
    scope=$scope/$level
    budget "$scope" "$dollar"
done
budget "$scope/toolset:internal-notes" "$dollar"
budget "$scope/toolset:crm-updates" "$dollar"
# Nobody has approved e-mail: a budget of nothing.
budget "$scope/toolset:send-email" 0

echo "$key"
