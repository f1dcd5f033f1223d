"""Options of the longer tests: sh scripts/test.sh --kills 50 --fuzz 2000"""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=5, help="processes killed in test_kills.py")
    parser.addoption("--fuzz", type=int, default=100, help="files mutated in test_fuzz.py")
