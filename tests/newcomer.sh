#!/usr/bin/env bash
# What a newcomer does, from a fresh clone and from the wheel: the commands of README and docs in their
# CPU forms, with the exit code and a word that each must give. Stops at the first that does otherwise.
#
#   PYTHON=.venv/bin/python tests/newcomer.sh          some minutes; starts no engine
#   PYTHON=.venv/bin/python tests/newcomer.sh whole    also `fgaif demo` and docs/your-model.md
#
# That every other command of the pages exists, with its options, keys and files, is checked by
# tests/test_docs_commands.py, which runs here too.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$(realpath -s "${PYTHON:-$root/.venv/bin/python}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONDONTWRITEBYTECODE=1 COLUMNS=120
ran=0

# expect CODE WORD COMMAND...: WORD is looked for in what it prints; - for none.
expect() {
    local code=$1 word=$2 got=0 said
    shift 2
    said=$("$@" 2>&1) || got=$?
    if [ "$got" -ne "$code" ] || { [ "$word" != - ] && ! grep -qF -- "$word" <<<"$said"; }; then
        printf 'newcomer: %s\n  exit %s, not %s, or without "%s":\n%s\n' \
            "$*" "$got" "$code" "$word" "$(tail -n 15 <<<"$said")" >&2
        exit 1
    fi
    ran=$((ran + 1))
}
fgaif() { "$python" -m fgaif "$@"; }

echo "== a fresh clone"
git clone -q "$root" "$work/clone"
cd "$work/clone"
export PYTHONPATH=$work/clone
expect 0 "0.1.0" fgaif --version
expect 0 "annotate" fgaif --help
for file in README.md docs/*.md CONTRIBUTING.md; do
    # shellcheck disable=SC2013 # words, not lines
    for path in $(grep -oE '\]\((\.\./)?[A-Za-z][A-Za-z0-9_./-]*\.(md|yaml|py|svg|png)' "$file" | cut -c3-); do
        [ -e "$(dirname "$file")/$path" ] || { echo "newcomer: $file: no $path" >&2; exit 1; }
    done
done
expect 0 "passed" "$python" -m pytest -q -p no:cacheprovider tests/test_docs_commands.py

echo "== the demo, dry"
expect 0 "train" fgaif demo --dry-run dir="$work/runs"
expect 0 "ppo" fgaif demo --dry-run --full dir="$work/runs"
expect 2 "did you mean ppo.steps" fgaif run ppo.setps=3
expect 2 "nowhere.yaml" fgaif run --config nowhere.yaml
expect 2 "nowhere" fgaif run --dry-run policy.model=nowhere dir="$work/runs"
expect 2 "no-such.jsonl" fgaif run --dry-run data.train=no-such.jsonl dir="$work/runs"
for config in configs/*.yaml configs/paper/*.yaml; do
    case $config in
    configs/scenes*) expect 0 - fgaif run --config "$config" --dry-run dir="$work/runs" ;;
    # Their data and checkpoints are the reader's: each missing one is named with its key.
    *) expect 2 "policy.model" fgaif run --config "$config" --dry-run --assume 8x80 dir="$work/runs" ;;
    esac
done

echo "== without a run"
expect 0 "wrote" fgaif scenes "$work/drawn" --count 12
expect 0 "wrote" fgaif prompts "$work/drawn/images" --out "$work/mine" --held-out 0.25
expect 2 "exists" fgaif prompts "$work/drawn/images" --out "$work/mine"
expect 0 "pope" fgaif eval --list
expect 0 - fgaif eval build-pope --scenes test --help
expect 2 "no such run folder" fgaif report name=never dir="$work/runs"
expect 2 "never" fgaif status never
expect 2 "no such run folder" fgaif logs never
expect 2 "never" fgaif list "$work/never"
expect 2 "train-reward" fgaif serve --rewards "$work/never" --dry-run
for command in annotate export replay scale submit study doctor push convert openai-server labels jobs; do
    expect 0 "Usage" fgaif "$command" --help
done

echo "== the wheel"
"$python" -m pip wheel -q --no-deps --no-build-isolation -w "$work/dist" . 2>/dev/null
"$python" -m pip install -q --no-deps --target "$work/site" "$work"/dist/fgaif-*.whl
mkdir "$work/elsewhere"
cd "$work/elsewhere"
export PYTHONPATH=$work/site
expect 0 "$work/site" "$python" -c 'import fgaif; print(fgaif.__file__)'
expect 0 "0.1.0" fgaif --version
expect 0 "my_images.yaml" "$python" -c 'import configs, os; print(os.listdir([*configs.__path__][0]))'
expect 0 "train" fgaif demo --dry-run dir="$work/runs"
expect 0 "wrote" fgaif scenes "$work/drawn2" --count 2

if [ "${1:-}" = whole ]; then
    echo "== everything that starts engines"
    cd "$work/clone"
    export PYTHONPATH=$work/clone
    expect 0 "report.html" fgaif demo dir="$work/runs"
    expect 0 "up to date" fgaif demo dir="$work/runs"
    expect 0 "ended" fgaif status "$work/runs/scenes"
    expect 0 "step 18/18" fgaif logs "$work/runs/scenes" driver
    expect 0 "survive" fgaif export "$work/export" dir="$work/runs"
    expect 0 "/v1" fgaif serve --rewards "$work/runs/scenes/rewards" --dry-run
    expect 0 "passed" "$python" -m pytest -q -m long -p no:cacheprovider tests/test_your_model.py
fi
echo "newcomer: $ran commands did what is written"
