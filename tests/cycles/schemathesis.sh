#!/usr/bin/env bash
# Sends what docs/cycles-openapi.yaml allows, and much that it does not, to both planes of a
# server of its own, and checks every answer against the description.
#
#   REMIT_BIN   the remit to use   (target/release/remit)
#   PYTHON      a Python that has the packages of requirements.txt (python3)
#   SEED        which requests (1)
set -euo pipefail
cd "$(dirname "$0")/../.."
. examples/lib.sh

schema=docs/cycles-openapi.yaml
checks=not_a_server_error,status_code_conformance,content_type_conformance
checks+=,response_schema_conformance,response_headers_conformance

start_remit
runtime="http://$cycles"
admin="http://$cycles_admin"
operator=$(cat "$work/data/operator.key")

# A tenant with a budget in every unit, and a key for its agents.
export CYCLES_TENANT=fuzzed
CYCLES_OPERATOR=$(cut -d_ -f2 "$work/data/operator.key")
export CYCLES_OPERATOR
post() {
    curl -sS --fail-with-body --noproxy '*' -H "X-Admin-API-Key: $operator" \
        -H 'Content-Type: application/json' -d "$2" "$admin$1"
}
post /v1/admin/tenants "{\"tenant_id\":\"$CYCLES_TENANT\",\"name\":\"Fuzzed\"}" >"$work/tenant"
key=$(post /v1/admin/api-keys "{\"tenant_id\":\"$CYCLES_TENANT\",\"name\":\"agents\"}" \
    | sed 's/.*"key_secret":"\([^"]*\)".*/\1/')
for unit in USD_MICROCENTS TOKENS CREDITS RISK_POINTS; do
    post /v1/admin/budgets "{\"tenant_id\":\"$CYCLES_TENANT\",\"scope\":\"tenant:$CYCLES_TENANT\",
        \"unit\":\"$unit\",\"allocated\":{\"unit\":\"$unit\",\"amount\":1000000000000000}}" \
        >>"$work/budgets"
done

failed=
# fuzz NAME URL ARGUMENT...
fuzz() {
    printf '\n== %s\n' "$1"
    SCHEMATHESIS_HOOKS=tests.cycles.schemathesis_hooks PYTHONDONTWRITEBYTECODE=1 \
        HYPOTHESIS_STORAGE_DIRECTORY="$work/hypothesis" \
        "$python" -m schemathesis.cli --config-file tests/cycles/schemathesis.toml \
        run "$schema" --url "$2" "${@:3}" --checks "$checks" --seed "${SEED:-1}" --no-color \
        || failed="$failed $1"
}
fuzz runtime "$runtime" --include-tag runtime --include-tag health -H "X-Cycles-API-Key: $key"
fuzz operator "$runtime" --include-operation-id listReservations \
    --include-operation-id getReservation --include-operation-id releaseReservation \
    -H "X-Admin-API-Key: $operator"
fuzz admin "$admin" --include-tag admin --include-tag health --exclude-path /balances \
    -H "X-Admin-API-Key: $operator"
fuzz balances "$admin/v1" --include-path /balances -H "X-Admin-API-Key: $operator"

if grep -n panicked "$work/log"; then
    failed="$failed panic"
fi
printf '\n== remit verify\n'
"$remit" verify --data-dir "$work/data"
if [ -n "$failed" ]; then
    printf '\n== the end of the log\n' >&2
    tail -n 40 "$work/log" >&2
    echo "failed:$failed" >&2
    exit 1
fi
