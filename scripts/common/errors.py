"""Errors that are the user's to mend: each is one line that says what, where and what to do."""


class ConfigError(ValueError):
    """A configuration or command line: where, which key, what is wrong."""


class RunError(ValueError):
    """A folder or file of a run that cannot be continued or read."""


class ImageError(ValueError):
    """An image or image set that cannot be read; the message names it."""


class MetricError(ValueError):
    """Input that cannot be scored."""
