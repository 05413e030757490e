#!/usr/bin/env bash
# Starts Remit with a database of its own, lets the support agent work unguarded
# and guarded, approves e-mail while everything runs, and takes it away again.
# Fails when a run does not end as it should.
#
#   REMIT_BIN   the remit to use   (target/release/remit)
#   PYTHON      a Python that has the packages of requirements.txt (python3)
set -euo pipefail
cd "$(dirname "$0")/../.."

. examples/lib.sh
here=examples/support-agent

make_stubs
start_remit

run() { # run TITLE EXPECTED_LAST_LINE ARGUMENTS...
    printf '\n== %s\n' "$1"
    REMIT_API_KEY=$key "$python" "$here/agent.py" "${@:3}" | tee "$work/out"
    if [ "$(tail -n 1 "$work/out")" != "$2" ]; then
        echo "expected: $2" >&2
        exit 1
    fi
}
provision examples/acme.yaml
key=$("$python" "$here/create_key.py" "$address" "$work/data/operator.key")

run "unguarded" "4 actions approved · 0 actions blocked" --unguarded
run "guarded" "3 actions approved · 1 action blocked" --guarded --target "$address"
provision "$here/send-email.yaml"
run "guarded, e-mail approved" "4 actions approved · 0 actions blocked" --guarded --target "$address"
provision "$here/send-email-absent.yaml"
run "guarded, approval taken away" "3 actions approved · 1 action blocked" --guarded --target "$address"

printf '\n== remit verify\n'
"$remit" verify --data-dir "$work/data"
