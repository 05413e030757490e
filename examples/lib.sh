# What the examples' scripts share: a server with a database of its own, taken away at the
# end. To be sourced from the repository's root.
#
#   REMIT_BIN   the remit to use   (target/release/remit)
#   PYTHON      a Python that has the packages of support-agent/requirements.txt (python3)

remit=${REMIT_BIN:-target/release/remit}
python=${PYTHON:-python3}

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
    # What a script left running when it failed would only talk over the reason.
    for job in $(jobs -p); do
        [ "$job" = "$server" ] || kill "$job" 2>/dev/null || true
    done
    if [ -n "$server" ]; then
        kill -TERM "$server" 2>/dev/null || true
        wait "$server" || true
    fi
    rm -rf "$work"
}
trap stop EXIT

# Python stubs, where the support agent's client looks for them.
make_stubs() {
    local out=examples/support-agent/generated
    mkdir -p "$out"
    "$python" -m grpc_tools.protoc -Iproto --python_out="$out" \
        --grpc_python_out="$out" proto/remit/v1/*.proto
}

# start_remit [SETTING...]: sets address, cycles and cycles_admin (where gRPC, the Cycles
# protocol and its admin plane are), and what remit's own commands need to reach it as
# operator.
start_remit() {
    "$remit" serve --data-dir "$work/data" --listen 127.0.0.1:0 --port-file "$work/address" \
        --cycles-listen 127.0.0.1:0 --cycles-port-file "$work/cycles" \
        --cycles-admin-listen 127.0.0.1:0 --cycles-admin-port-file "$work/cycles-admin" \
        "$@" 2>"$work/log" &
    server=$!
    for _ in $(seq 300); do
        [ -s "$work/address" ] && break
        kill -0 "$server" 2>/dev/null || { cat "$work/log" >&2; exit 1; }
        sleep 0.1
    done
    [ -s "$work/address" ] || { echo "not ready after 30 s:" >&2; cat "$work/log" >&2; exit 1; }
    address=$(cat "$work/address")
    cycles=$(cat "$work/cycles") cycles_admin=$(cat "$work/cycles-admin")
    export REMIT_TARGET="http://$address" REMIT_KEY_FILE="$work/data/operator.key"
}

provision() {
    printf '\n== remit provision -f %s\n' "$1"
    "$remit" provision -f "$1"
}
