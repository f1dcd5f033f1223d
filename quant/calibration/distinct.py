"""Calibration samples of which none is there twice.

A sample is a pair (step k, trajectory j). One that comes up again teaches nothing new, and would
make a held-out set worthless if it were in the learning set too.
"""

from collections.abc import Callable

import torch

from ..core.settings import CalibrationSettings
from .timesteps import UNIFORM_STEPS


class TooFewTrajectoriesError(ValueError):
    """Trajectories that do not hold as many different samples as are asked for."""


def enough_trajectories(samples: int, steps: int) -> int:
    """Trajectories with which every rule has different samples, so that all methods get as many.

    steps: of a trajectory.
    """
    return -(-samples // min(UNIFORM_STEPS, steps))


def check_trajectories(
    calibration: CalibrationSettings, steps: int, trajectories: int, halves: int = 1
) -> None:
    """Raises TooFewTrajectoriesError, which says how many would do.

    trajectories: how many there will be. halves: how many of them an image brings, 2 with guidance.
    """
    rule, samples = calibration.timesteps, calibration.samples
    used = min(UNIFORM_STEPS, steps) if rule == "uniform" else steps
    if used * trajectories >= samples:
        return
    needed = -(-samples // (used * halves))
    raise TooFewTrajectoriesError(
        f"calibration.trajectories: {trajectories // halves} have {used * trajectories} different "
        f"samples at {used} timesteps ({rule}) and calibration.samples asks for {samples}; "
        f"{needed} trajectories are needed, null takes as many as that, or fewer samples"
    )


def fill(
    tuples: torch.Tensor,
    draw: Callable[[int], torch.Tensor],
    samples: int,
    steps: int,
    trajectories: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """`samples` different pairs (n, 2): of tuples (m, 2) as far as they differ, then others.

    draw(n) -> n step indices. Each step walks through its own random order of the trajectories; a
    draw at a step that has no trajectory left is drawn anew. Once nothing but such steps is drawn,
    the others take turns. Fewer where there are not so many.
    """
    pairs: dict[tuple[int, int], None] = dict.fromkeys(map(tuple, tuples.tolist()))
    free: list[list[int]] = []
    for k in range(steps):
        order = torch.randperm(trajectories, generator=generator).tolist()
        free.append([j for j in order if (k, j) not in pairs])
    samples = min(samples, steps * trajectories)
    stuck = False
    while len(pairs) < samples:
        drawn = range(steps) if stuck else draw(samples - len(pairs)).tolist()
        before = len(pairs)
        for k in drawn:
            if free[k] and len(pairs) < samples:
                pairs[k, free[k].pop()] = None
        stuck = len(pairs) == before
    return torch.tensor(list(pairs)[:samples])
