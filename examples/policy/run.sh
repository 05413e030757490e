#!/usr/bin/env bash
# Starts Remit with a database of its own and lets the agents of scenarios.py act under
# policy. Fails when one of them gets another decision than it should, or a tool runs that
# must not. Scenarios can be named: examples/policy/run.sh narrowing runaway
set -euo pipefail
cd "$(dirname "$0")/../.."
. examples/lib.sh

make_stubs
start_remit
REMIT_BIN=$remit "$python" examples/policy/scenarios.py "$@"

printf '\n== remit verify\n'
"$remit" verify --data-dir "$work/data"
