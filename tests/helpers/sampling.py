"""Sampling through the command, in this process."""

import pytest

import sample_diffusion
from tinydm.scripts.experiment import cli


def sample(*arguments: object) -> int:
    """Exit code of the command, run in this process."""
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: sample_diffusion.main([str(a) for a in arguments]))
    return int(caught.value.code or 0)
