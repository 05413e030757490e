#!/usr/bin/env bash
# The deploy agent and the e-mail agent, with a scripted person at the terminal: a deploy is
# approved and runs once, the next one is rejected, an e-mail is approved. Fails when a run
# does not end as it should. Then the same by webhook, from a chat.
set -euo pipefail
cd "$(dirname "$0")/../.."
. examples/lib.sh
here=examples/approval-gate

make_stubs
start_remit --webhooks-allow-private
provision "$here/policy.yaml"

new_key() { # new_key GROUP: a key that may act, or with a group one that may approve
    "$python" "$here/create_key.py" "$address" "$REMIT_KEY_FILE" "$@"
}
agent_key=$(new_key)
new_key release >"$work/release.key"
new_key support >"$work/support.key"

person() { # person KEY COMMAND...: what somebody does at the terminal
    REMIT_KEY_FILE="$work/$1.key" "$remit" approvals "${@:2}"
}
waiting() { # waiting KEY: the beginning of the one id that waits
    local id
    for _ in $(seq 100); do
        id=$(person "$1" list --mine | cut -c1-8)
        [ "$id" != nothing ] && { echo "$id"; return; }
        sleep 0.1
    done
    echo "nothing waits" >&2
    exit 1
}
run() { # run KEY approve|reject EXPECTED_LAST_LINE AGENT_ARGUMENTS...
    printf '\n== agent.py %s\n' "${*:4}"
    REMIT_API_KEY=$agent_key "$python" "$here/agent.py" "${@:4}" >"$work/out" &
    local agent=$!
    id=$(waiting "$1")
    person "$1" show "$id"
    person "$1" "$2" "$id" --approver "$1@shop.example" -m "looked at it"
    wait "$agent"
    cat "$work/out"
    if [ "$(tail -n 1 "$work/out")" != "$3" ]; then
        echo "expected: $3" >&2
        exit 1
    fi
}

run release approve "actions that ran: 1" deploy rev-a1
run release reject "actions that ran: 0" deploy rev-b2
run support approve "actions that ran: 1" email "Your invoice was corrected."

printf '\n== receiver.py: a chat that is told by webhook\n'
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
secret=$("$remit" webhooks create chat --tenant shop --url "http://127.0.0.1:$port/remit" \
    --events approval.requested,approval.resolved)
in_chat() { # in_chat PATTERN: what follows it in the chat, once that is there
    local found
    for _ in $(seq 300); do
        found=$(sed -n "s/^chat: $1//p" "$work/chat")
        [ -n "$found" ] && { echo "$found"; return; }
        sleep 0.1
    done
    echo "nothing in the chat after 30 s" >&2
    exit 1
}
# A job in the background makes its files when it comes to run: later than this script reads.
: >"$work/chat"
REMIT_WEBHOOK_SECRET=$secret REMIT_API_KEY=$(cat "$work/release.key") \
    "$python" "$here/receiver.py" "$port" >"$work/chat" 2>>"$work/log" &
chat=$!
in_chat "listening on " >"$work/listening"
REMIT_API_KEY=$agent_key "$python" "$here/agent.py" deploy rev-c3 >"$work/out" &
agent=$!
id=$(in_chat "trigger_deploy? ")
curl -fsS -X POST "http://127.0.0.1:$port/click?id=$id&by=sam@shop.example&yes=1"
wait "$agent"
if curl -fsS -X POST -H 'remit-signature: t=1,v1=00' -d '{}' "http://127.0.0.1:$port/remit" \
    2>/dev/null; then
    echo "a forged event was taken" >&2
    exit 1
fi
kill "$chat"
cat "$work/chat" "$work/out"
[ "$(tail -n 1 "$work/out")" = "actions that ran: 1" ]
"$remit" webhooks list --tenant shop

printf '\n== remit approvals list --state approved\n'
person release list --state approved

printf '\n== remit verify\n'
"$remit" verify --data-dir "$work/data"
