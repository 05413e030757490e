#!/usr/bin/env bash
# Starts the server on 127.0.0.1:50051 with its data in ./.remit.
set -euo pipefail
cd "$(dirname "$0")/.."

data=$PWD/.remit
cat <<TEXT
operator key: $data/operator.key (made at the first start)

Once it is ready, in another terminal:

  grpcurl -plaintext 127.0.0.1:50051 list
  grpcurl -plaintext -H "authorization: Bearer \$(cat .remit/operator.key)" 127.0.0.1:50051 remit.v1.Provisioning/ListTenants
  grpcurl -plaintext -H "authorization: Bearer \$(cat .remit/operator.key)" -d '{"idempotency_key":"try-1","subject":{"tenant":"acme","workspace":"prod","toolset":"internal-notes"},"action":{"name":"append_internal_note"}}' 127.0.0.1:50051 remit.v1.Authority/Reserve

(the last one is allowed after: target/release/remit provision -f examples/acme.yaml --key-file .remit/operator.key)

TEXT
exec target/release/remit serve --data-dir "$data"
