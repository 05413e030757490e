#!/usr/bin/env bash
# The proto files against buf's STANDARD rules (exceptions with reasons: buf.yaml).
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v npx >/dev/null; then
    if [ "${CI:-}" = true ]; then
        echo "buf lint needs npx" >&2
        exit 1
    fi
    echo "buf lint skipped: npx is not installed"
    exit 0
fi
npx --yes @bufbuild/buf@1.75.0 lint proto
