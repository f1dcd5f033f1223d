"""Quantize a full-precision checkpoint.

    python calibrate.py --config configs/emoji32.yaml --out runs/emoji32-w4a8
    python calibrate.py --config configs/emoji32.yaml --out runs/emoji32-w8a8 --weight_bit 8
    python calibrate.py --config configs/cifar10.yaml --out runs/cifar10-w4a8 --resume
    torchrun --nproc-per-node 8 calibrate.py --config configs/cifar10.yaml --out ...

OUT receives quantized.safetensors (everything sampling needs), config.yaml, report.json (times,
errors, layer table), layers.txt and log.txt. calibration.pt holds finished phases while it runs:
--resume goes on after the last one, and gives the same file as an uninterrupted run. So does
torchrun, which spreads the trajectories and the activation statistics over its processes; the rest
runs on the first.

Exit codes: 0 done, 2 bad input, 130 interrupted (resumable).
"""

import argparse
import copy
import dataclasses
import json
import platform
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from quant.bank import Bank
from quant.calibration import calibrate
from quant.coverage import count_macs, format_table, layer_rows, shares
from quant.finite import DivergenceError
from quant.model import roles_of
from quant.packed import load_quantized, to_bytes
from quant.phases.job import Adjust
from quant.phases.output import correct_noise
from quant.state import CalibrationState
from scripts.common.cli import add_config, add_out, make_parser, resolve_device, run
from scripts.common.config import Config, load_config, resolved_yaml
from scripts.common.files import remove_stale, write_bytes, write_json, write_text
from scripts.common.memory import return_freed_memory
from scripts.common.processes import ALONE, Team, team_of_processes
from scripts.common.runs import RunError, locked
from scripts.common.shared_statistics import collect_together, help_collect
from scripts.common.strict import ConfigError
from scripts.common.trajectories import FRESH, SEED_DOMAIN, answer, guided_rows, record_bank
from scripts.common.unfinished import STATE, advice, identity_of, load_state, save_state
from scripts.common.wiring import Assembly, assemble

RESULT, LOCK = "quantized.safetensors", ".lock"


class Bars:
    """Progress bars, one a phase."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def begin(self, phase: str, total: int) -> None:
        self.bar = tqdm(total=total, desc=f"{phase:20}", mininterval=1)

    def step(self, text: str) -> None:
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()

    def end(self) -> None:
        self.bar.close()
        return_freed_memory()  # phases want blocks of other sizes

    def close(self) -> None:
        """Of a phase that failed: what is printed next begins a line."""
        if self.bar is not None:
            self.bar.close()


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_config(parser)
    add_out(parser, "run folder")
    parser.add_argument("--resume", action="store_true", help="go on after the last phase")
    parser.add_argument("--overwrite", action="store_true", help="calibrate anew into OUT")
    return parser.parse_args(argv)


def is_done(folder: Path, identity: str) -> bool:
    """True if the folder holds this run's result. Raises RunError for another run's."""
    if not (folder / RESULT).exists():
        return False
    try:
        found = json.loads((folder / "report.json").read_text(encoding="utf-8"))["identity"]
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        found = None
    if found != identity:
        raise RunError(
            f"{folder / RESULT}: was made from another configuration or checkpoint; "
            "--overwrite calibrates anew, --out names another folder"
        )
    return True


def make_bank(
    config: Config, assembly: Assembly, device: torch.device, team: Team = ALONE
) -> Bank | None:
    """The trajectories; None on the ranks that only help to make them."""
    total = config.calibration.trajectories
    size = config.sampling.micro_batch
    title, whole = f"{'trajectories':20}", -(-total // size) * size
    with tqdm(total=whole, desc=title, unit="image", disable=team.rank != 0) as bar:
        return record_bank(
            assembly.pipeline,
            assembly.denoiser,
            total,
            config.calibration.seed,
            classes=config.sampling.classes,
            device=device,
            on_images=bar.update,
            team=team,
        )


def step_importance(assembly: Assembly, bank: Bank) -> torch.Tensor:
    """Per step of the bank, (S,) float32. PLMS calls twice in its first step."""
    values = assembly.pipeline.step_importance().tolist()
    values = values[:1] * (len(bank.timesteps) - len(values)) + values
    return torch.tensor(values)


def signal_to_noise(assembly: Assembly, bank: Bank) -> torch.Tensor:
    """Per step of the bank, abar / (1 - abar), (S,) float64."""
    abar = torch.from_numpy(assembly.pipeline.alphas_cumprod).double()[bank.timesteps]
    return abar / (1 - abar)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    config, device = load_config(args.config, args.overrides), resolve_device(args.device)
    folder = Path(args.out)
    assembly = assemble(config, device=device)
    with team_of_processes() as team:
        if team.rank != 0:
            # Rank 0 knows whether trajectories and statistics are wanted.
            bank_wanted, statistics_wanted = team.agree(False), team.agree(False)
            if bank_wanted:
                make_bank(config, assembly, device, team)
            if statistics_wanted:
                seed = config.calibration.seed
                help_collect(team, assembly.denoiser, config.quant, seed, device)
            return
        options = {"resume": args.resume, "overwrite": args.overwrite, "team": team}
        with locked(folder / LOCK):
            lines = calibrate_config(config, assembly, folder, device, **options)
    if lines is None:
        print(f"{folder / RESULT}: is there already, from the same configuration and checkpoint")
    else:
        print("\n".join(lines))


def calibrate_config(
    config: Config,
    assembly: Assembly,
    folder: Path,
    device: torch.device,
    *,
    resume: bool = False,
    overwrite: bool = False,
    bank: Bank | None = None,
    team: Team = ALONE,
) -> list[str] | None:
    """Calibrate into `folder` and return the lines of its log; None if it is done already.

    assembly: full precision, of the same configuration. bank: what make_bank gives, if it is there
    already; the reported seconds are then those after it. team: processes that help to make it.
    """
    began = time.perf_counter()
    temporal = roles_of(assembly.denoiser).timestep_only
    if config.quant.time_embedding == "reconstructed" and not temporal:
        raise ConfigError(
            f"quant.time_embedding: {config.name} has no layer that depends on the timestep alone "
            "to be reconstructed; use quantized"
        )
    identity = identity_of(config, assembly.sources)
    folder.mkdir(parents=True, exist_ok=True)
    remove_stale(folder)
    if overwrite:  # at once: killed from here on, --resume continues the new run
        for name in (RESULT, STATE):
            (folder / name).unlink(missing_ok=True)
    done = is_done(folder, identity)
    saved = None if done else load_state(folder, config, assembly.sources, resume, device)
    wanted = team.agree(not done and saved is None and bank is None)
    team.agree(not done and (saved is None or "ranges" not in saved[0].done))
    if done:
        (folder / STATE).unlink(missing_ok=True)  # of a run killed just before it did so
        return None
    write_text(folder / "config.yaml", resolved_yaml(config))
    state = CalibrationState()

    def save(state: CalibrationState) -> None:
        save_state(folder, config, assembly.sources, state, bank)

    if saved is not None:
        state, bank = saved
        print(f"resumed after: {', '.join(['trajectories', *state.done])}")
    elif wanted:
        bank = make_bank(config, assembly, device, team)
        save(state)

    def visit(model: torch.nn.Module, number: int) -> Bank:
        size = config.sampling.micro_batch
        first = config.calibration.trajectories + number * size
        seen = record_bank(
            assembly.pipeline,
            model,
            size,
            config.calibration.seed,
            first,
            config.sampling.classes,
            device,
        )
        return answer(seen, assembly.denoiser, size)

    def drive(model: torch.nn.Module, adjust: Adjust, count: int) -> None:
        assembly.pipeline.latents(
            model,
            range(FRESH, FRESH + count),
            SEED_DOMAIN + config.calibration.seed,
            config.sampling.classes,
            device=device,
            adjust=adjust,
        )

    with closing(Bars()) as bars:
        try:
            deployed, phases = calibrate(
                assembly.denoiser,
                bank,
                visit,
                drive,
                config.quant,
                config.calibration,
                config.schedule.train_timesteps,
                step_importance(assembly, bank),
                bars,
                state,
                save,
                partial(collect_together, team),
                signal_to_noise(assembly, bank),
                partial(guided_rows, assembly.pipeline),
            )
        except DivergenceError as error:
            raise RunError(advice(error, state, config)) from error
    lines = write_result(folder, config, assembly, bank, deployed, phases, began, identity)
    (folder / STATE).unlink(missing_ok=True)
    return lines


def correct_config(
    config: Config, assembly: Assembly, folder: Path, base: Path, bank: Bank
) -> list[str]:
    """What calibrate_config gives for a configuration that differs from that of the finished run
    `base` in the name of the method and in PTQD's correction alone: fits that to the model there.

    assembly: full precision. The reported seconds count those of the base.
    """
    report = json.loads((base / "report.json").read_text(encoding="utf-8"))
    began = time.perf_counter() - report["seconds"]
    phases = report["phases"]
    model = load_quantized(base / RESULT, copy.deepcopy(assembly.denoiser))
    model = model.to(bank.device).to(memory_format=torch.channels_last)
    with closing(Bars()) as bars:
        started = time.perf_counter()
        guide = partial(guided_rows, assembly.pipeline)
        fitted = correct_noise(model, bank, config.calibration.batch_size, bars, guide)
        phases["correction"] = fitted | {"seconds": round(time.perf_counter() - started, 2)}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", resolved_yaml(config))
    identity = identity_of(config, assembly.sources)
    return write_result(folder, config, assembly, bank, model, phases, began, identity)


def write_result(
    folder: Path,
    config: Config,
    assembly: Assembly,
    bank: Bank,
    deployed: torch.nn.Module,
    phases: dict[str, Any],
    began: float,
    identity: str,
) -> list[str]:
    """The reports, then the quantized file, by which the run is done; the lines of the log."""
    roles = roles_of(assembly.denoiser)
    x, t, _, conditioning = bank.gather(torch.zeros(1, 2, dtype=torch.long))
    macs = count_macs(assembly.denoiser, tuple(roles.matmuls), (x, t, conditioning))
    rows = layer_rows(assembly.denoiser, deployed, roles, macs)
    data = to_bytes(
        deployed,
        {
            "config": resolved_yaml(with_scale_factor(config, assembly)),
            "method": config.quant.method,
            "source_sha256": ",".join(assembly.sources.values()),
            "torch": torch.__version__,
        },
    )
    seconds = time.perf_counter() - began
    lines = write_report(folder, config, assembly, phases, rows, len(data), seconds, identity)
    write_bytes(folder / RESULT, data)
    return lines


def with_scale_factor(config: Config, assembly: Assembly) -> Config:
    """What was found in a checkpoint stays known where that is not read any more."""
    if config.model.first_stage is None or config.model.scale_factor is not None:
        return config
    scale_factor = assembly.pipeline.scale_factor
    return replace(config, model=replace(config.model, scale_factor=scale_factor))


def write_report(
    folder: Path,
    config: Config,
    assembly: Assembly,
    phases: dict[str, Any],
    rows: list,
    size: int,
    seconds: float,
    identity: str,
) -> list[str]:
    """report.json, layers.txt and log.txt, whose lines are returned."""
    table, share = format_table(rows), shares(rows)
    parameters = sum(p.numel() for p in assembly.denoiser.parameters())
    summary = {
        "name": config.name,
        "method": config.quant.method,
        "weight_bits": config.quant.weight.bits,
        "activation_bits": config.quant.activation.bits,
        "bytes": size,
        "size_mb": size / 2**20,
        "float32_mb": parameters * 4 / 2**20,
        "ratio_to_float32": size / (parameters * 4),
        **share,
        "seconds": round(seconds, 2),
        "seed": config.calibration.seed,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "sources": assembly.sources,
        "identity": identity,
        "phases": phases,
        "layers": [dataclasses.asdict(r) for r in rows],
    }
    write_json(folder / "report.json", summary)
    write_text(folder / "layers.txt", table + "\n")
    lines = [
        table,
        f"weights quantized: {share['weights_quantized']:.2%}; MACs in integers: "
        f"{share['macs_quantized']:.2%}, once per timestep: {share['macs_once_per_timestep']:.2%}",
        f"{folder / RESULT}: {size / 2**20:.3f} MB, {size / (parameters * 4):.4f} of float32 "
        f"({parameters * 4 / 2**20:.2f} MB), in {seconds:.0f} s",
    ]
    if "precision" in phases:
        of_step = phases["precision"]["bits_of_step"]
        counts = ", ".join(f"{of_step.count(b)} of {b} bits" for b in sorted(set(of_step)))
        average = phases["precision"]["average_bits"]
        lines.insert(2, f"activations by step: {counts}; {average:.2f} bits on average")
    write_text(folder / "log.txt", "\n".join(lines) + "\n")
    return lines


if __name__ == "__main__":
    run(main)
