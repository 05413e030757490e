#!/usr/bin/env bash
# Runs the published Cycles packages against Remit: tests/cycles/run.sh [PYTEST_ARGUMENT...]
#
#   REMIT_BIN   the remit to use   (target/release/remit)
#   PYTHON      a Python that has the packages of requirements.txt (python3)
set -euo pipefail
cd "$(dirname "$0")/../.."
. examples/lib.sh

# Another server's settings must not reach the SDK.
for name in $(compgen -e | grep '^CYCLES_' || true); do
    unset "$name"
done

make_stubs
start_remit
CYCLES_BASE_URL="http://$cycles"
REMIT_CYCLES_ADMIN_URL="http://$cycles_admin"
export CYCLES_BASE_URL REMIT_CYCLES_ADMIN_URL REMIT_BIN="$remit"

failed=0
"$python" -m pytest -q -p no:cacheprovider tests/cycles "$@" || failed=$?

printf '\n== remit verify\n'
"$remit" verify --data-dir "$work/data" >"$work/verify" || failed=$?
grep -v ': intact' "$work/verify" || echo "$(grep -c ': intact' "$work/verify") ledgers, all intact"
exit "$failed"
