#!/bin/sh
# Makes the environment if need be and runs every check.
#   sh scripts/test.sh                 all tests
#   sh scripts/test.sh --quick         without those that take longer than a second or two
# Further arguments go to pytest.
set -eu
cd "$(dirname "$0")/.."
NEEDS=test
. scripts/environment.sh
# One thread: the tests are many small calls, which two threads only slow down.
export OMP_NUM_THREADS=1
if [ "${1:-}" = --quick ]; then
    shift
    set -- -m "not slow" "$@"
fi
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
# A file of tests a process, two at a time: each has its own temporary folders.
# Folders of passed tests go at once: they are 0.7 GB, and pytest would keep those of three runs.
"$PYTHON" -m pytest -q -n 2 --dist loadfile -o tmp_path_retention_policy=failed tests "$@"
