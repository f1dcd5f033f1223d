#!/bin/sh
# Makes the environment if need be and runs every check. Arguments go to pytest.
set -eu
cd "$(dirname "$0")/.."
NEEDS=test
. scripts/environment.sh
# One thread: the tests are many small calls, which two threads only slow down.
export OMP_NUM_THREADS=1
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m pytest -q tests "$@"
