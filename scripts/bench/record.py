"""What was measured, kept in one JSON file, section by section, so that nothing is done twice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..common.files import write_json
from ..common.json_files import read_json
from ..common.reports import RecordSection

Values = dict[str, Any]


class Record:
    """Sections of plain values, each with the settings it was made with."""

    def __init__(self, path: Path):
        self.path = path
        self._sections = read_json(path, dict[str, RecordSection]) or {}

    def find(self, name: str, settings: Values) -> Values | None:
        section = self._sections.get(name)
        return section["values"] if section and section["settings"] == settings else None

    def section(self, name: str, settings: Values, make: Callable[[], Values]) -> Values:
        """The values of a section, made and written if they are not there with these settings."""
        values = self.find(name, settings)
        if values is None:
            values = make()
            self._sections[name] = {"settings": settings, "values": values}
            write_json(self.path, self._sections)
        return values
