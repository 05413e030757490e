#!/usr/bin/env bash
# Starts Remit with a database of its own and lets an agent of the published Cycles SDK work
# unguarded and guarded, approves e-mail while everything runs, and takes it away again.
# Fails when a run does not end as it should.
#
#   REMIT_BIN   the remit to use   (target/release/remit)
#   PYTHON      a Python that has the packages of requirements.txt (python3)
set -euo pipefail
cd "$(dirname "$0")/../.."

. examples/lib.sh
here=examples/cycles-support-agent

start_remit
CYCLES_BASE_URL="http://$cycles"
CYCLES_ADMIN_URL="http://$cycles_admin"
CYCLES_TENANT=demo-tenant
# What the SDK has not settled yet: not in anybody's home.
CYCLES_JOURNAL_DIR="$work/journal"
export CYCLES_BASE_URL CYCLES_ADMIN_URL CYCLES_TENANT CYCLES_JOURNAL_DIR

run() { # run TITLE EXPECTED_LAST_LINE ARGUMENT
    printf '\n== %s\n' "$1"
    CYCLES_API_KEY=$key "$python" "$here/agent.py" "$3" | tee "$work/out"
    if [ "$(tail -n 1 "$work/out")" != "$2" ]; then
        echo "expected: $2" >&2
        exit 1
    fi
}
fund_email() { # fund_email OPERATION AMOUNT
    local scope=tenant:demo-tenant/workspace:default/app:default/workflow:default
    scope=$scope/agent:support-bot/toolset:send-email
    printf '\n== POST /v1/admin/budgets/fund %s %s\n' "$1" "$2"
    printf 'header = "X-Admin-API-Key: %s"\n' "$(cat "$REMIT_KEY_FILE")" | curl -fsS --config - \
        -H 'Content-Type: application/json' -w '\n' \
        -d '{"operation":"'"$1"'","amount":{"amount":'"$2"',"unit":"USD_MICROCENTS"}}' \
        "$CYCLES_ADMIN_URL/v1/admin/budgets/fund?scope=$scope&unit=USD_MICROCENTS"
}

printf '\n== provision.sh\n'
key=$("$here/provision.sh")
# Once more: what is already so stays as it is.
key=$("$here/provision.sh")

run "unguarded" "4 actions approved · 0 actions blocked" --unguarded
run "guarded" "3 actions approved · 1 action blocked" --guarded
fund_email CREDIT 100000000
run "guarded, e-mail approved" "4 actions approved · 0 actions blocked" --guarded
fund_email RESET 0
run "guarded, approval taken away" "3 actions approved · 1 action blocked" --guarded

printf '\n== remit verify\n'
"$remit" verify --data-dir "$work/data"
