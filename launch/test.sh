#!/usr/bin/env bash
# Everything the tests need, then all tests; needs Python >= 3.11 and nothing else.
#   ./launch/test.sh                 all: ruff, mypy, pytest
#   ./launch/test.sh --soak          also what takes minutes each: the marker soak, then tests/soak/soak_*.py, few kills
#   ./launch/test.sh -k data -x      further arguments go to pytest; after --soak the scripts are left out then
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SECONDS=0
source launch/environment.sh

make_environment .venv-test train,beam,av,dev
bin=$PWD/.venv-test/bin
export PYTHONUNBUFFERED=1
unset PYTHONDONTWRITEBYTECODE  # with it, each process that a test starts parses all of JAX again: 3 to 5 s

# Programs that XLA compiled once are kept beside the environment.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR-$PWD/.venv-test/$(compilation_cache)}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.1

soak=
if [ "${1:-}" = --soak ]; then
  soak=yes
  shift
fi

failed=()
run() {
  local name=$1 start=$SECONDS
  shift
  "$@" </dev/null || failed+=("$name")
  say "-- $name: $((SECONDS - start)) s"
}
lint() { run ruff "$bin/python" -m ruff check .; run mypy "$bin/python" -m mypy; [ ${#failed[@]} = 0 ]; }
lint >.venv-test/lint.log 2>&1 &  # beside the tests, which wait for one thing or another; told at the end
lint=$!
options=()
# Two processes, each with whole files: compiling keeps one core busy, and shared compiled functions stay shared;
# in the order of tests/conftest.py, not files of many tests first.
[ $# -gt 0 ] || options+=(--numprocesses=2 --dist=loadfile --no-loadscope-reorder)
without='not gpu and not tpu and not torch and not visqol'
command -v chromium >/dev/null || without+=' and not chromium'
[ -z "$soak" ] || options+=(-m "$without")
run pytest "$bin/python" -m pytest tests ${options[@]+"${options[@]}"} "$@"
wait $lint || failed+=('ruff or mypy')
cat .venv-test/lint.log
if [ -n "$soak" ] && [ $# -eq 0 ]; then
  run soak_resume "$bin/python" tests/soak/soak_resume.py --kills=5
  run soak_prepare "$bin/python" tests/soak/soak_prepare.py kills --kills=3
  run soak_encode "$bin/python" tests/soak/soak_encode.py --kills=3
  run soak_faults "$bin/python" tests/soak/soak_faults.py --moments=4
fi

if [ ${#failed[@]} -gt 0 ]; then
  say "FAILED after $SECONDS s: ${failed[*]}"
  exit 1
fi
say "all passed in $SECONDS s"
