#!/bin/sh
# Makes the environment if need be and runs every check.
#   sh scripts/test.sh                 all tests
#   sh scripts/test.sh --quick         without those marked as slow: longer than about a second
# Further arguments go to pytest.
set -eu
cd "$(dirname "$0")/.."
NEEDS=test
. scripts/environment.sh
# One thread: the tests are many small calls, which two threads only slow down.
export OMP_NUM_THREADS=1
# Some environments keep Python from storing what it compiles, and about a hundred processes of the
# tests would compile everything anew.
unset PYTHONDONTWRITEBYTECODE
if [ "${1:-}" = --quick ]; then
    shift
    set -- -m "not slow" "$@"
fi
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
# Types are checked beside the tests, and what is found is told at the end.
types=$(mktemp)
"$PYTHON" -m mypy >"$types" 2>&1 &
checking=$!
trap 'kill "$checking" 2>/dev/null || :; rm -f "$types"' EXIT
trap 'exit 130' INT
code=0
# Two processes: each begins with a half of the tests and takes over what the other has left.
# Folders of passed tests go at once: they are 0.7 GB, and pytest would keep those of three runs.
"$PYTHON" -m pytest -q -n 2 --dist worksteal -o tmp_path_retention_policy=failed tests "$@" ||
    code=$?
wait "$checking" || code=1
cat "$types"
exit "$code"
