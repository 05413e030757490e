#!/usr/bin/env bash
# Installs what the build, the demo and the tests need and this machine lacks.
set -euo pipefail
cd "$(dirname "$0")/.."

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        echo "this needs root or sudo: $*" >&2
        exit 1
    fi
}

install() { # install REASON PACKAGE...
    local reason=$1
    shift
    if ! command -v apt-get >/dev/null; then
        echo "$reason: install $* (or what your system calls it) and run this again" >&2
        exit 1
    fi
    echo "$reason: installing $*"
    as_root apt-get update -qq
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

if ! command -v cargo >/dev/null; then
    echo "Rust is missing: install it with rustup (https://rustup.rs) and run this again" >&2
    exit 1
fi
command -v cc >/dev/null || install "a C linker is missing" gcc libc6-dev

command -v curl >/dev/null || install "curl is missing" curl ca-certificates

have_postgres() {
    command -v postgres >/dev/null && command -v initdb >/dev/null && return
    compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null ||
        compgen -G '/usr/pgsql-*/bin/postgres' >/dev/null
}
if ! have_postgres; then
    # Debian starts a server of its own at installation; we only want the programs.
    if [ -d /etc ] && command -v apt-get >/dev/null; then
        as_root mkdir -p /etc/postgresql-common
        [ -e /etc/postgresql-common/createcluster.conf ] ||
            echo 'create_main_cluster = false' | as_root tee /etc/postgresql-common/createcluster.conf >/dev/null
    fi
    install "PostgreSQL's programs are missing" postgresql
fi

if [ ! -x .venv/bin/python ]; then
    command -v python3 >/dev/null || install "Python is missing" python3 python3-venv
    python3 -m venv .venv 2>/dev/null || {
        rm -rf .venv
        install "Python's venv is missing" python3-venv
        python3 -m venv .venv
    }
fi
wanted="examples/support-agent/requirements.txt examples/cycles-support-agent/requirements.txt
tests/cycles/requirements.txt"
if ! cat $wanted | cmp -s - .venv/requirements.installed; then
    # Unquoted: three names.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check $(printf -- '-r %s ' $wanted)
    cat $wanted >.venv/requirements.installed
fi
