"""Sizes that depend on the device: for a CPU, for 24 and for 80 GB, without a card.

python -m pytest tests/test_device_defaults.py
"""

import types
from pathlib import Path

import pytest
import torch

from tests.helpers.commands import ROOT
from tinydm.quant.core.settings import preset
from tinydm.scripts.common.errors import ConfigError
from tinydm.scripts.common.schema import read_yaml
from tinydm.scripts.experiment import device_defaults
from tinydm.scripts.experiment.assembly import assemble
from tinydm.scripts.experiment.config import Config, load_config, parse_config, resolved_yaml
from tinydm.scripts.experiment.device_defaults import KEYS, fitting_rows, for_calibration
from tinydm.scripts.experiment.sampling_run import SamplingRun

A5000, A100 = 23.7, 79.2  # GiB, as their drivers report them


def sizes(config: Config) -> tuple[int, ...]:
    """Of the search, of the end-to-end steps, of a call that calibrates, and of images."""
    search, learned, sampling = config.quant.search, config.quant.reconstruct, config.sampling
    return (
        *(search.batch_size, search.accumulate),
        *(learned.finetune_batch_size, learned.accumulate, config.calibration.batch_size),
        *(sampling.batch_size, sampling.micro_batch, sampling.decode_batch),
    )


@pytest.mark.parametrize(
    ("name", "memory", "expected"),
    [
        ("cifar10", None, (16, 2, 8, 2, 32, 64, 16, 1)),
        ("cifar10", A5000, (16, 1, 8, 1, 64, 256, 256, 1)),
        ("cifar10", A100, (16, 1, 8, 1, 64, 256, 256, 1)),
        ("lsun_bedroom", None, (4, 4, 4, 4, 4, 4, 4, 1)),
        ("lsun_bedroom", A5000, (16, 4, 8, 2, 32, 32, 32, 16)),
        ("lsun_bedroom", A100, (16, 1, 8, 1, 64, 128, 128, 16)),
        ("imagenet256", None, (4, 4, 4, 4, 4, 4, 4, 1)),
        ("imagenet256", A5000, (16, 1, 8, 1, 64, 128, 128, 16)),
        ("imagenet256", A100, (16, 1, 8, 1, 64, 256, 256, 16)),
        ("sd_v1", None, (2, 2, 2, 2, 2, 2, 2, 1)),
        ("sd_v1", A5000, (16, 16, 8, 8, 8, 8, 8, 8)),
        ("sd_v1", A100, (16, 8, 8, 4, 16, 16, 16, 16)),
        ("emoji64", None, (16, 2, 8, 2, 16, 18, 8, 1)),
        ("dit_xl2", None, (4, 4, 2, 4, 4, 4, 4, 1)),
        ("dit_xl2", A100, (16, 8, 8, 4, 16, 16, 16, 16)),
    ],
)
def test_configurations_of_the_papers(
    name: str, memory: float | None, expected: tuple[int, ...]
) -> None:
    assert sizes(load_config(ROOT / f"configs/{name}.yaml", memory=memory)) == expected


@pytest.mark.parametrize(
    ("memory", "size"), [(3.0, 4), (11.9, 8), (14.7, 16), (44.5, 40), (139.0, 80)]
)
def test_cards_of_nearly_the_same_memory_are_one(memory: float, size: int) -> None:
    assert fitting_rows(memory, 2**30, 256) == fitting_rows(size, 2**30, 256)
    assert fitting_rows(memory, 2**30, 256) <= 0.6 * size


PLAIN = """
name: x
model: {arch: ddim_unet, checkpoint: x.pt, params: {image_size: 32}}
"""


def test_what_is_written_holds_on_every_device() -> None:
    text = PLAIN + "sampling: {micro_batch: 3}\nquant: {search: {batch_size: 6}}\n"
    for memory in (None, A5000):
        config = parse_config(text, "x.yaml", ["sampling.batch_size=5"], memory=memory)
        found = config.sampling.micro_batch, config.sampling.batch_size
        assert found == (3, 5) and config.quant.search.batch_size == 6


def test_auto_is_what_nothing_written_is() -> None:
    keys = [f"{'.'.join(key)}=auto" for key in KEYS]
    for memory in (None, A5000):
        expected = parse_config(PLAIN, "x.yaml", memory=memory)
        assert parse_config(PLAIN, "x.yaml", keys, memory=memory) == expected
    text = PLAIN + "sampling: {micro_batch: 3}"
    again = parse_config(text, "x.yaml", ["sampling.micro_batch=auto"], memory=A5000)
    assert again.sampling.micro_batch == 256


def test_the_section_of_the_cpu() -> None:
    text = PLAIN + "cpu: {sampling: {micro_batch: 7, batch_size: auto}}\n"
    config = parse_config(text, "x.yaml")
    assert (config.sampling.micro_batch, config.sampling.batch_size) == (7, 64)
    assert parse_config(text, "x.yaml", ["sampling.micro_batch=9"]).sampling.micro_batch == 9
    assert parse_config(text, "x.yaml", memory=A5000).sampling.micro_batch == 256
    with pytest.raises(ConfigError, match=r"x.yaml:5: cpu.sampling.seed is not one of the sizes"):
        parse_config(PLAIN + "cpu:\n  sampling: {seed: 7}\n", "x.yaml")
    for value in ("-1", "[1]", "x", "true", "null"):
        written = PLAIN + "sampling: {batch_size: 2}\ncpu:\n  sampling:\n    batch_size: "
        told = "x.yaml:7: cpu.sampling.batch_size must be auto or a whole number"
        for memory in (None, A5000):  # it counts nowhere here
            with pytest.raises(ConfigError, match=told):
                parse_config(f"{written}{value}\n", "x.yaml", memory=memory)
    with pytest.raises(ConfigError, match=r"x.yaml:4: cpu is not one of the sizes"):
        parse_config(PLAIN + "cpu: 3\n", "x.yaml", memory=A5000)
    with pytest.raises(ConfigError, match="x.yaml:4: cpu.sampling.micro_batch must be auto or"):
        parse_config(PLAIN + "cpu: {sampling: {micro_batch: many}}\n", "x.yaml")


def test_baselines_keep_their_batches() -> None:
    """The parts follow from the method's own batch."""
    quant, _ = preset("qdiffusion")
    text = (ROOT / "configs/lsun_bedroom.yaml").read_text()
    config = parse_config(text, "x.yaml", ["quant.method=qdiffusion"], memory=A5000)
    learned = config.quant.reconstruct
    assert learned.finetune_batch_size == quant.reconstruct.finetune_batch_size == 16
    assert (learned.batch_size, learned.accumulate) == (16, 4)
    given = ["quant.reconstruct.finetune_batch_size=20"]
    assert parse_config(text, "x.yaml", given, memory=A5000).quant.reconstruct.accumulate == 5


@pytest.mark.parametrize(
    "model",
    [
        "{arch: diffusers, checkpoint: x}",
        "{arch: ldm_unet, params: {image_size: 64, model_channels: wide}}",
        "{arch: ldm_unet, params: {image_size: 8, channel_mult: 3, model_channels: 8}}",
        "{arch: ddim_unet, params: [1]}",
        "[]",
        "{arch: ldm_unet, first_stage: 3, params: {}}",
    ],
)
def test_a_model_of_unknown_size_is_taken_for_a_large_one(model: str) -> None:
    """What is wrong in it is told later, where the configuration is checked."""
    tree = read_yaml(f"model: {model}", "x.yaml")
    device_defaults.resolve(tree, A5000, preset("tinydm")[0])
    assert tree.values["sampling"]["micro_batch"] == 4


def test_calibration_makes_no_more_trajectories_than_asked_for() -> None:
    path = ROOT / "configs/imagenet256.yaml"
    assert for_calibration(load_config(path)) == load_config(path)
    config = load_config(path, memory=A100)
    found = for_calibration(config)
    assert found.sampling.micro_batch == config.calibration.trajectories == 32
    assert found.calibration == config.calibration
    config = load_config(ROOT / "configs/lsun_bedroom.yaml", memory=A100)
    assert config.calibration.trajectories is None  # as many as 512 samples need: 26
    assert for_calibration(config).sampling.micro_batch == 16
    few = load_config(ROOT / "configs/emoji32.yaml", ["calibration.trajectories=5"])
    assert few.sampling.micro_batch == 16 and for_calibration(few).sampling.micro_batch == 4


def test_the_run_has_what_was_resolved(room: Path, tmp_path: Path) -> None:
    keys = ["sampling.micro_batch=auto"]
    configs = [load_config(room / "tiny.yaml", keys, memory=memory) for memory in (None, A5000)]
    assert "micro_batch: 256" in resolved_yaml(configs[1])
    runs = [SamplingRun(c, assemble(c), tmp_path, torch.device("cpu")) for c in configs]
    assert [run.identity["micro_batch"] for run in runs] == [16, 256]
    written = tmp_path / "resolved.yaml"
    written.write_text(resolved_yaml(configs[1]))
    assert load_config(written) == configs[1]


def test_memory_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_defaults.device_memory(torch.device("cpu")) is None
    card = types.SimpleNamespace(total_memory=int(23.7 * 2**30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert device_defaults.device_memory(torch.device("cuda", 1)) == pytest.approx(A5000)


def test_the_table_of_the_documentation() -> None:
    """docs/gpu.md has the rows, the memory and the parts that are resolved."""
    text = (ROOT / "docs/gpu.md").read_text(encoding="utf-8")
    for name in ("cifar10", "lsun_bedroom", "imagenet256", "sd_v1"):
        path = ROOT / f"configs/{name}.yaml"
        row = device_defaults.row_bytes(vars(load_config(path).model)) / 2**30
        found = [load_config(path, memory=memory) for memory in (A5000, A100)]
        rows = [config.sampling.micro_batch for config in found]
        cells = [f"`{name}`", *rows, *(f"{row * n:.1f} GB" for n in rows)]
        cells += [config.quant.search.accumulate for config in found]
        assert f"| {' | '.join(map(str, cells))} |" in text
