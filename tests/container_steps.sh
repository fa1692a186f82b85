#!/usr/bin/env bash
# The steps of the Dockerfile's cpu target, without Docker: what it copies and runs, in a new folder
# that is then made read-only, and two commands in it. Steps that need root are passed over.
#
#   tests/container_steps.sh              with .ci/install, which takes minutes and a network
#   PYTHON=... tests/container_steps.sh   with what this interpreter has installed, in seconds
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT
mkdir "$work/app" "$work/runs" "$work/tmp"
cd "$work/app"

# Continued lines joined; the stages base and cpu; without comments.
sed -e ':a' -e '/\\$/N; s/\\\n//; ta' "$root/Dockerfile" | grep -v '^#' |
    awk '/^FROM/ {on = ($4 == "base" || $4 == "cpu")} on' >"$work/steps"
while read -r word rest; do
    case "$word $rest" in
    COPY*)
        # shellcheck disable=SC2086 # words of the Dockerfile
        set -- $rest
        for source in "${@:1:$#-1}"; do
            if [ -d "$root/$source" ]; then
                mkdir -p "${!#}" && cp -r "$root/$source/." "${!#}/"
            else
                cp "$root/$source" .
            fi
        done
        ;;
    *apt-get* | *useradd*) echo "needs root, passed over: $word ${rest:0:60}" ;;
    RUN*.ci/install*) [ -n "${PYTHON:-}" ] || bash -c "$rest" ;;
    RUN*) bash -c "$rest" ;;
    esac
done <"$work/steps"

python=${PYTHON:-$work/app/.venv/bin/python}
chmod -R a-w "$work/app"
cd "$work/runs"
export PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=$work/app TMPDIR=$work/tmp HOME=$work/tmp
"$python" -m fgaif --version
"$python" -m fgaif demo --dry-run "dir=$work/runs" | tail -n 3
"$python" -m fgaif scenes "$work/runs/drawn" --count 2
echo "the container's steps are fine"
