#!/usr/bin/env bash
# Starts Remit with a database of its own, lets the support agent work unguarded
# and guarded, approves e-mail while everything runs, and takes it away again.
# Fails when a run does not end as it should.
#
#   REMIT_BIN   the remit to use   (target/release/remit)
#   PYTHON      a Python that has the packages of requirements.txt (python3)
set -euo pipefail
cd "$(dirname "$0")/../.."

remit=${REMIT_BIN:-target/release/remit}
python=${PYTHON:-python3}
here=examples/support-agent

# Settings of another server, or a key for it, must not reach this one.
for name in $(compgen -e | grep '^REMIT_' | grep -vx REMIT_POSTGRES_BIN || true); do
    unset "$name"
done

# Not $TMPDIR, which may be private or too long for a socket's path: started by
# root, PostgreSQL runs as another user, who has to pass.
work=$(mktemp -d /tmp/remit-demo.XXXXXX)
chmod 711 "$work"
server=
stop() {
    if [ -n "$server" ]; then
        kill -TERM "$server" 2>/dev/null || true
        wait "$server" || true
    fi
    rm -rf "$work"
}
trap stop EXIT

mkdir -p "$here/generated"
"$python" -m grpc_tools.protoc -Iproto --python_out="$here/generated" \
    --grpc_python_out="$here/generated" proto/remit/v1/*.proto

"$remit" serve --data-dir "$work/data" --listen 127.0.0.1:0 --port-file "$work/address" \
    2>"$work/log" &
server=$!
for _ in $(seq 300); do
    [ -s "$work/address" ] && break
    kill -0 "$server" 2>/dev/null || { cat "$work/log" >&2; exit 1; }
    sleep 0.1
done
[ -s "$work/address" ] || { echo "not ready after 30 s:" >&2; cat "$work/log" >&2; exit 1; }
address=$(cat "$work/address")
export REMIT_TARGET="http://$address" REMIT_KEY_FILE="$work/data/operator.key"

run() { # run TITLE EXPECTED_LAST_LINE ARGUMENTS...
    printf '\n== %s\n' "$1"
    REMIT_API_KEY=$key "$python" "$here/agent.py" "${@:3}" | tee "$work/out"
    if [ "$(tail -n 1 "$work/out")" != "$2" ]; then
        echo "expected: $2" >&2
        exit 1
    fi
}
provision() {
    printf '\n== remit provision -f %s\n' "$1"
    "$remit" provision -f "$1"
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
