"""Differentiable search of the timestep groups, with active timestep selection.

See docs/method.md, sections 3 and 4; after APQ-DM (arXiv 2305.18723).

Every activation quantizer holds a softmax sigma over its G groups for every timestep; its output is
the mixture of the two likeliest groups. Minimised are the eps error against full precision,
relative to its start, and lambda times the mean entropy of sigma, while the temperature falls, so
that the assignment ends hard and taking the arg max changes little (the gap is reported).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from ..core.settings import MOST_BITS, SearchSettings
from ..runtime.denoiser import QuantDenoiser
from .finite import finite_loss
from .quantizer import LearnedQuantizer, scale_groups
from .sharing import Alone, Team, Tensors, add_gradients
from .states import CalibrationStates
from .timesteps import ActiveSelector, normalised_entropy, tuples_of_steps
from .wrapping import activation_quantizers

LOGITS_PER_EXCESS, LOWEST_LOGIT = 10.0, 4.0
BARRED = -1e4  # logit of groups of other bits than the timestep's
SMALLEST_ERROR, SMALLEST_SHARE = 1e-20, 1e-6


@dataclass
class SearchResult:
    """tuples (n, 2): the samples that were used; selector: its final scores; decided: share of
    (quantizer, timestep) with max sigma > 0.95 before the arg max; moved: share whose group
    changed; error_start, error_end: eps error at the first and last tenth of the rounds."""

    tuples: torch.Tensor
    selector: ActiveSelector
    decided: float
    moved: float
    error_start: float
    error_end: float


def start(quantizers: list[LearnedQuantizer]) -> list[nn.Parameter]:
    """Gives each quantizer its logits (S, G), from its error table.

    A group whose range costs a timestep a tenth more than its best one starts one unit of logit
    lower, so that sigma is undecided just where groups are nearly as good. Without a table the
    assigned group starts at LOWEST_LOGIT above the others. A timestep keeps its bits, so that their
    mean stays: groups of others are barred.
    """
    logits = []
    for q in quantizers:
        barred = q.group_bits[q.group_of_timestep][:, None] != q.group_bits  # (S, G)
        if q.group_error is None:
            value = torch.full(
                (len(q.group_of_timestep), q.groups), -LOWEST_LOGIT, device=q.log_scale.device
            )
            value.scatter_(1, q.group_of_timestep[:, None], 0.0)
        else:
            # Exact values have no error: the softmax over the one token of a class is always 1.
            error = q.group_error.clamp(min=SMALLEST_ERROR)
            best = error.masked_fill(barred, math.inf).amin(1, keepdim=True)
            value = (LOGITS_PER_EXCESS * (1 - error / best)).clamp(min=-LOWEST_LOGIT)
        q.logits = nn.Parameter(value.masked_fill(barred, BARRED))
        logits.append(q.logits)
    return logits


def take_most_likely(quantizers: list[LearnedQuantizer]) -> tuple[float, float]:
    """Takes the arg max of every sigma; returns (share decided, share moved), see SearchResult."""
    decided = moved = total = 0
    for q in quantizers:
        assert q.logits is not None  # of start
        sigma = torch.softmax(q.logits.detach() / q.temperature, dim=-1)
        best, group = sigma.max(dim=-1)
        decided += int((best > 0.95).sum())
        moved += int((group != q.group_of_timestep).sum())
        total += len(group)
        q.group_of_timestep, q.group_error, q.logits, q.temperature = group, None, None, 1.0
    return decided / max(total, 1), moved / max(total, 1)


@dataclass(frozen=True)
class Search:
    """The search of a model's groups and activation scales, in place; weights stay as they are.

    Only quantizers with more than one group are searched; with one group everywhere the scales
    learn alone. importance (K,): how much an eps error at a sampling step matters;
    first_errors (K,): eps errors there before the search. team: processes that run it together,
    with the same arguments and equal models, and share the parts of a round.
    """

    model: QuantDenoiser
    states: CalibrationStates
    settings: SearchSettings
    importance: torch.Tensor
    first_errors: torch.Tensor
    team: Team = field(default_factory=Alone)

    def run(
        self,
        generator: torch.Generator,
        on_round: Callable[[int, float], None] = lambda i, loss: None,
    ) -> SearchResult:
        """on_round(i, loss) is for progress. Raises DivergenceError."""
        settings, states = self.settings, self.states
        # The inputs of the first and last layers have more bits: their ranges have room to spare.
        of_groups = [q for _, q in activation_quantizers(self.model) if q.bits <= MOST_BITS]
        quantizers = [q for q in of_groups if q.groups > 1]
        learned = quantizers or of_groups  # with one group everywhere: the scales alone
        selector = ActiveSelector(self.importance, settings.exploration, settings.error_weight)
        selector.error = self.first_errors.clone()
        if not learned:
            return SearchResult(torch.zeros(0, 2, dtype=torch.long), selector, 1.0, 0.0, 0.0, 0.0)
        logits = start(quantizers)
        optimizer = self._optimizer(logits, learned)
        rates = [group["lr"] for group in optimizer.param_groups]
        # A round has no more samples than there are.
        batch_size = min(settings.batch_size, len(states.timesteps) * states.trajectories)
        nearest_of_step = self.model.context.nearest(torch.tensor(states.timesteps))
        tuples: list[torch.Tensor] = []
        means: list[float] = []
        normaliser = None
        for i in range(settings.rounds):
            progress = i / settings.rounds
            for q in quantizers:
                q.temperature = settings.temperature**progress
            weight = self._weight(selector)
            index = tuples_of_steps(selector.pick(batch_size), states.trajectories, generator)
            optimizer.zero_grad(set_to_none=True)
            if normaliser is None:
                normaliser = self._first_loss(index, weight)
            errors, loss = self._backward(index, weight, normaliser, optimizer)
            value = finite_loss(loss, i, settings.rounds)
            if logits:
                entropy = _entropies(quantizers)
                loss = settings.entropy * entropy.mean()
                value += finite_loss(loss, i, settings.rounds)
                loss.backward()
                selector.entropy = entropy.detach().mean(0).cpu()[nearest_of_step]
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * progress))
            optimizer.step()
            selector.observe_error(index[:, 0], errors.cpu())
            tuples.append(index)
            means.append(float(errors.mean()))
            on_round(i, value)
        decided, moved = take_most_likely(quantizers) if quantizers else (1.0, 0.0)
        tenth = max(1, len(means) // 10)
        start_error, end_error = sum(means[:tenth]) / tenth, sum(means[-tenth:]) / tenth
        return SearchResult(torch.cat(tuples), selector, decided, moved, start_error, end_error)

    def _optimizer(
        self, logits: list[nn.Parameter], learned: list[LearnedQuantizer]
    ) -> torch.optim.Adam:
        """Of the logits and the scales; nothing else of the model gets gradients."""
        settings = self.settings
        groups: list[dict] = [{"params": logits, "lr": settings.lr_logits}] if logits else []
        groups += scale_groups(learned, settings.lr_scale)
        for p in self.model.parameters():
            p.requires_grad_(False)
        for p in _parameters(groups):
            p.requires_grad_(True)
        return torch.optim.Adam(groups, fused=True)

    def _weight(self, selector: ActiveSelector) -> torch.Tensor:
        """Weight of an error at each step, (K,). What is drawn more often counts less, so that the
        loss stays that of the importance."""
        shares = selector.shares().clamp(min=SMALLEST_SHARE)
        return self.importance / self.importance.mean() * shares.mean() / shares

    def _errors(self, index: torch.Tensor) -> torch.Tensor:
        """Mean squared eps error of each sample (n, 2); (n,)."""
        x, t, eps, conditioning = self.states.gather(index)
        return (self.model(x, t, **conditioning) - eps).square().flatten(1).mean(1)

    @torch.no_grad()
    def _first_loss(self, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The weighted error of the first samples (n, 2), to which the losses are relative."""
        parts = index.chunk(self.settings.accumulate)
        shared = self.team.share(len(parts), lambda i: {"errors": self._errors(parts[i])})
        first = torch.cat([values["errors"].to(self.states.device) for values in shared])
        return (first * weight[index[:, 0]].to(first.device)).mean().clamp(min=1e-12)

    def _backward(
        self,
        index: torch.Tensor,
        weight: torch.Tensor,
        normaliser: torch.Tensor,
        optimizer: torch.optim.Adam,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Leaves the gradients of the samples (n, 2); returns their errors (n,) and the loss."""
        parts = index.chunk(self.settings.accumulate)

        def backward(number: int) -> Tensors:
            part = parts[number]
            errors = self._errors(part)
            loss = (errors * weight[part[:, 0]].to(errors.device)).sum()
            loss = loss / len(index) / normaliser
            loss.backward()
            return {"errors": errors.detach(), "loss": loss.detach()}

        parameters = _parameters(optimizer.param_groups)
        found = add_gradients(self.team, len(parts), backward, parameters)
        loss = torch.stack([values["loss"].to(self.states.device) for values in found]).sum()
        errors = torch.cat([values["errors"].to(self.states.device) for values in found])
        return errors, loss


def _parameters(groups: list[dict]) -> list[nn.Parameter]:
    """Those of an optimizer's groups."""
    return [p for group in groups for p in group["params"]]


def _entropies(quantizers: list[LearnedQuantizer]) -> torch.Tensor:
    """Entropy of each quantizer's assignment at each timestep, (L, S)."""
    found = []
    for q in quantizers:
        assert q.logits is not None  # of start
        found.append(normalised_entropy(torch.softmax(q.logits / q.temperature, dim=-1)))
    return torch.stack(found)
