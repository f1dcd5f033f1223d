"""Which (step, trajectory) tuples become calibration samples (docs/method.md, section 4).

uniform: evenly spaced steps (Q-Diffusion: 20 of them). normal: steps drawn from a normal
distribution over the step index (PTQ4DM, NDTC). all: every step alike. active: the steps where the
groups are undecided or the error is large, see ActiveSelector.

Each sample keeps the state that belongs to its own timestep; states are never noised again.
"""

import math

import torch

UNIFORM_STEPS = 20  # of the rule "uniform" (Q-Diffusion)


def tuples_of_steps(
    steps: torch.Tensor, trajectories: int, generator: torch.Generator
) -> torch.Tensor:
    """steps (n,) sampling-step indices -> (n, 2) pairs (k, j), spread over the trajectories.

    Each step walks through its own random order of the trajectories, so that none repeats before
    all were used.
    """
    walks = {k: torch.randperm(trajectories, generator=generator) for k in steps.unique().tolist()}
    order = {k: walk.tolist() for k, walk in walks.items()}
    used = dict.fromkeys(order, 0)
    pairs = []
    for k in steps.tolist():
        pairs.append((k, order[k][used[k] % trajectories]))
        used[k] += 1
    return torch.tensor(pairs)


def uniform_steps(samples: int, count: int) -> torch.Tensor:
    """Step indices (samples,) over evenly spaced ones of 0..count-1 (Q-Diffusion)."""
    chosen = torch.linspace(0, count - 1, min(UNIFORM_STEPS, count, samples)).round().long()
    return chosen[torch.arange(samples) % len(chosen)]


def normal_steps(
    samples: int, count: int, generator: torch.Generator, mean: float = 0.4, std: float = 0.4
) -> torch.Tensor:
    """Normally distributed time-step calibration (PTQ4DM, eq. 15), with the mean and standard
    deviation as shares of the trajectory; 0 is the end of sampling (the clean image)."""
    position = torch.randn(samples, generator=generator) * std + mean
    ascending = (position * count).floor().clamp(0, count - 1).long()
    return count - 1 - ascending  # step index 0 is the noisiest


def all_steps(samples: int, count: int) -> torch.Tensor:
    """Every step alike, (samples,); fewer samples than steps are spread evenly."""
    if samples < count:
        return torch.linspace(0, count - 1, samples).round().long()
    return torch.arange(samples) % count


def spread(tuples: torch.Tensor, samples: int) -> torch.Tensor:
    """The first tuples (n, 2), or where that would be fewer than there are steps, some of all noise
    levels: the first ones are of the noisiest steps."""
    if samples >= len(tuples[:, 0].unique()):
        return tuples[:samples]
    in_order = tuples[tuples[:, 0].argsort(stable=True)]
    return in_order[torch.linspace(0, len(tuples) - 1, samples).round().long()]


class ActiveSelector:
    """Scores the sampling steps and picks the most informative ones.

    s(k) = mean_l H(sigma_l^k) / ln G  +  (eta + rho C_k / mean C) / (N_k + 1)

    H is the entropy of the group assignment, C_k what the eps error at step k does to the image
    (its importance times the running error), N_k how often k was chosen. rho = 0 is the rule of the
    paper. C_k is divided by the count as well: picking the best score again and again then shares
    the samples out in proportion to `shares`. Every step is eligible.
    """

    def __init__(self, importance: torch.Tensor, exploration: float, error_weight: float):
        self.importance = importance  # (count,)
        self.exploration, self.error_weight = exploration, error_weight
        self.entropy = torch.zeros(len(importance))  # normalised to 0..1
        self.error = torch.zeros(len(importance))
        self.chosen = torch.zeros(len(importance), dtype=torch.long)

    def shares(self) -> torch.Tensor:
        """What the samples are shared out in proportion to, but for the entropy, (count,)."""
        contribution = self.importance * self.error
        mean = contribution.mean().clamp(min=1e-20)
        return self.exploration + self.error_weight * contribution / mean

    def score(self) -> torch.Tensor:
        """The score of each sampling step, (count,) float32."""
        return self.entropy + self.shares() / (self.chosen + 1)

    def pick(self, n: int) -> torch.Tensor:
        """The n best steps, one after the other, each counted at once; (n,) indices."""
        picks = []
        for _ in range(n):
            k = int(self.score().argmax())
            self.chosen[k] += 1
            picks.append(k)
        return torch.tensor(picks)

    def observe_error(self, steps: torch.Tensor, error: torch.Tensor) -> None:
        """steps (n,), error (n,): eps errors just measured there. Running errors move half way."""
        for k in steps.unique().tolist():
            value = error[steps == k].mean()
            seen = self.error[k] > 0
            self.error[k] = 0.5 * self.error[k] + 0.5 * value if seen else value


def normalised_entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Entropy over the last axis divided by ln G; zero when there is one group."""
    groups = probabilities.shape[-1]
    if groups == 1:
        return torch.zeros(probabilities.shape[:-1], device=probabilities.device)
    p = probabilities.clamp(min=1e-12)
    return -(p * p.log()).sum(-1) / math.log(groups)
