"""Bars that move with the calls of a network and count images."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


class Bar(tqdm):
    """A bar whose line ends, whatever it is interrupted in."""

    def __init__(self, *args: Any, **options: Any):
        with self._whole_line():
            super().__init__(*args, **options)

    def close(self) -> None:
        with self._whole_line():
            super().close()

    @contextmanager
    def _whole_line(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            sys.stderr.write("\n")
            raise


class ImageBar(Bar):
    """A bar over network rows, of which each image takes `rows_per_image`.

        with ImageBar(64, rows_per_image=100) as bar:
            ...
            bar.update(16)  # after a call with 16 rows

    Shows whole images, images per second and the time that is left, from the first call on.
    """

    def __init__(self, images: int, rows_per_image: int, title: str = "", **options: Any):
        self.images, self.rows_per_image = images, rows_per_image
        super().__init__(
            total=images * rows_per_image,
            desc=title,
            mininterval=0.5,
            bar_format="{l_bar}{bar}| {images} [{elapsed}<{remaining}, {pace}]",
            **options,
        )

    def update(self, n: float | None = 1) -> bool | None:
        """Rows of padding do not move it beyond its end."""
        return super().update(min(n or 0, self.total - self.n))

    @property
    def format_dict(self) -> dict[str, Any]:
        values = super().format_dict
        elapsed = values["elapsed"]
        rows = values["rate"] or (values["n"] / elapsed if elapsed > 0 else 0.0)
        return values | {
            "images": f"{int(values['n'] / self.rows_per_image)}/{self.images}",
            "pace": f"{rows / self.rows_per_image:.3g} image/s",
        }
