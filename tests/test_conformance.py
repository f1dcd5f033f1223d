"""Our models, samplers, schedules and checkpoint loading against the conformance kit.

    python -m pytest tests/test_conformance.py                           # the committed subset
    TINYDM_KIT=path/to/kit python -m pytest -rP tests/test_conformance.py    # any kit, with numbers

One test per entry of the kit's index and registered check. Nothing here knows the sizes of a kit's
models: all is read from its config.json files. Latent diffusion registers its checks in
`tests/conformance_ldm.py`; entries without a check are skipped, and say so.
"""

import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import kit as kits
from tinydm.models.checkpoint import load_into, load_state_dict, select
from tinydm.models.ddim_unet import DDIMUNet
from tinydm.models.samplers import ddim, ddpm
from tinydm.models.schedule import alphas_cumprod, make_betas, sampling_timesteps

pytestmark = pytest.mark.usefixtures("one_thread")

KIT = kits.kit_folder()

# ---- ddim ----


def build_ddim(config: dict) -> DDIMUNet:
    """The network of an upstream configuration (its YAML as JSON)."""
    data, model = config["data"], config["model"]
    return DDIMUNet(
        ch=model["ch"],
        ch_mult=model["ch_mult"],
        num_res_blocks=model["num_res_blocks"],
        attn_resolutions=model["attn_resolutions"],
        in_channels=model["in_channels"],
        out_ch=model["out_ch"],
        image_size=data["image_size"],
        resamp_with_conv=model["resamp_with_conv"],
        dropout=model["dropout"],
    )


def loaded_ddim(entry: dict, kit: Path, weights: str = "ema") -> DDIMUNet:
    model = build_ddim(kits.config_of(entry, kit)["config"])
    path = kits.checkpoint_of(entry, kit)
    load_into(model, load_state_dict(path, weights=weights), path.name)
    return model.eval()


def ddim_config(entry: dict, kit: Path) -> None:
    """A network can be built from the configuration, without memory."""
    with torch.device("meta"):
        build_ddim(kits.config_of(entry, kit)["config"])


def ddim_checkpoint(entry: dict, kit: Path) -> None:
    """Both copies load strictly and differ; a file with one copy gives it for either."""
    averaged, raw = (load_state_dict(kit / entry["file"], weights=w) for w in ("ema", "raw"))
    assert list(averaged) == list(raw)
    differ = any(not torch.equal(averaged[name], raw[name]) for name in raw)
    forwards = kits.entries_beside(entry, kit, "forward")
    assert differ == any("out_raw" in forward["tensors"] for forward in forwards)
    loaded_ddim(entry, kit, "raw")


def ddim_digest(entry: dict, kit: Path) -> None:
    digest = json.loads((kit / entry["file"]).read_text(encoding="utf-8"))
    state = dict(loaded_ddim(entry, kit).state_dict())
    assert set(state) == set(digest)
    kits.assert_digest(state, digest)


@torch.no_grad()
def ddim_forward(entry: dict, kit: Path) -> None:
    golden = kits.goldens_of(entry, kit)
    for name, weights in (("out", "ema"), ("out_raw", "raw")):
        if name in golden:
            out = loaded_ddim(entry, kit, weights)(golden["x"], golden["t"])
            kits.assert_close(name, out, golden[name], entry["rtol"])


@torch.no_grad()
def ddim_sampler(entry: dict, kit: Path) -> None:
    golden, meta = kits.goldens_of(entry, kit), entry["meta"]
    diffusion = kits.config_of(entry, kit)["config"]["diffusion"]
    total = diffusion["num_diffusion_timesteps"]
    betas = make_betas(
        diffusion["beta_schedule"], diffusion["beta_start"], diffusion["beta_end"], total
    )
    timesteps = sampling_timesteps(meta["timesteps"], meta["skip_type"], total)
    assert timesteps == golden["timesteps"].tolist()

    states, x0 = [golden["x_T"]], []

    def keep(*, x_prev: torch.Tensor, pred_x0: torch.Tensor, **_: object) -> None:
        states.append(x_prev)
        x0.append(pred_x0)

    model = loaded_ddim(entry, kit, "raw" if meta["weights"] == "raw" else "ema")
    inputs = (model, golden["x_T"], timesteps, alphas_cumprod(betas))
    noise = golden["noise"].float() if "noise" in golden else None  # (steps, B, C, H, W)
    draw = None if noise is None else noise.__getitem__
    if meta["sampler"] == "generalized":
        final = ddim(*inputs, eta=meta["eta"], noise=draw, on_step=keep)
    else:
        assert meta["sampler"] == "ddpm_noisy"
        final = ddpm(*inputs, noise=draw, on_step=keep)
    kept = torch.stack([states[k] for k in golden["steps"].tolist()])
    kits.assert_close("x_steps", kept, golden["x_steps"], entry["rtol"])
    kits.assert_close("x_final", final, golden["x_final"], entry["rtol"])
    kits.assert_close("pred_x0_final", x0[-1], golden["pred_x0_final"], entry["rtol"])


def ddim_full_size(entry: dict, kit: Path) -> None:
    """Names, shapes and the number of parameters of the public checkpoint."""
    listed = json.loads((kit / entry["file"]).read_text(encoding="utf-8"))
    with torch.device("meta"):
        model = build_ddim(listed["config"])
    kits.assert_same_names(model, listed["tensors"])
    assert len(listed["tensors"]) == listed["n_tensors"]
    count = sum(p.numel() for p in model.parameters())
    assert count == listed["n_elements"]
    if entry["family"] == "ddim_cifar10":
        assert count == 35_746_307


# ---- containers of the other families: no network is needed ----

PARTS = {
    "unet": "model.diffusion_model",
    "first_stage": "first_stage_model",
    "cond_stage": "cond_stage_model",
}


def container(entry: dict, kit: Path) -> None:
    """The file loads, averaged and raw, into tensors that own their memory."""
    for weights in ("ema", "raw"):
        state = load_state_dict(kit / entry["file"], weights=weights)
        assert not [n for n in state if n.startswith(("module.", "model_ema.", "loss."))]
        for name, tensor in state.items():
            stored = tensor.untyped_storage().nbytes()
            assert tensor.is_contiguous() and not tensor.requires_grad, name
            assert stored == tensor.numel() * tensor.element_size(), name


def container_digest(entry: dict, kit: Path) -> None:
    """The averaged weights, part by part; only integers (position_ids) are not in the digest."""
    digest = json.loads((kit / entry["file"]).read_text(encoding="utf-8"))
    path = kits.checkpoint_of(entry, kit)
    state = load_state_dict(path)
    whole = "unet" not in digest
    parts = {"": digest} if whole else digest
    for part, listed in parts.items():
        tensors = state if whole else select(state, PARTS[part], path)
        kits.assert_digest(tensors, listed)
        assert {n for n, t in tensors.items() if t.is_floating_point()} == set(listed)


# ---- schedules ----

# Made with ddim's own numbers; ldm's "sqrt" and its cosine have no counterpart here.
DDIM_NAMES = ("linear", "quad", "sigmoid", "const", "jsd")


def betas_of(name: str) -> np.ndarray | None:
    """The betas (T,) that a table's family and schedule name, None where we have no such one."""
    family, schedule = name.split("/")[:2]
    kind, *numbers = schedule.split("_")
    if family == "ddim" and kind in DDIM_NAMES:
        return make_betas(kind, 1e-4, 0.02)
    if family == "gd":  # kind_T; the linear one keeps its total noise whatever T is
        total = int(numbers[0])
        scale = 1000 / total
        return make_betas(kind, scale * 1e-4, scale * 0.02, total)
    if family == "ldm" and schedule.startswith("sqrt_linear_"):
        return make_betas("linear", *map(float, numbers[1:]))
    if family == "ldm" and kind == "linear":
        return make_betas("scaled_linear", *map(float, numbers))
    return None


def schedule_tables(entry: dict, kit: Path) -> None:
    """Betas at 1e-12 and stored float32 products at 1e-6, for every schedule that we offer."""
    compared = 0
    for name, golden in kits.goldens_of(entry, kit).items():
        table, betas = name.split("/")[-1], betas_of(name)
        if betas is None or name.count("/") > 2:
            continue
        if table == "betas":
            assert golden.dtype == torch.float64
            kits.assert_close(name, torch.from_numpy(betas), golden, 1e-12)
        elif table == "alphas_cumprod_f32":
            single = name.startswith("ddim/")  # ddim multiplies in float32, the others in float64
            product = alphas_cumprod(betas, np.float32 if single else np.float64)
            kits.assert_close(name, torch.from_numpy(product).float(), golden, 1e-6)
        compared += 1
    assert compared >= 6


def ddim_timestep_lists(entry: dict, kit: Path) -> None:
    lists = json.loads((kit / entry["file"]).read_text(encoding="utf-8"))["ddim_seq_ascending"]
    for skip, by_steps in lists.items():
        for steps, ascending in by_steps.items():
            assert sampling_timesteps(int(steps), skip)[::-1] == ascending, (skip, steps)


def schedules(entry: dict, kit: Path) -> None:
    """The parts of the shared schedule files that are ours: tables, and ddim's timesteps."""
    check = schedule_tables if entry["file"].endswith(".safetensors") else ddim_timestep_lists
    check(entry, kit)


kits.register("ddim", "config", ddim_config)
kits.register("ddim", "checkpoint", ddim_checkpoint)
kits.register("ddim", "weights_digest", ddim_digest)
kits.register("ddim", "forward", ddim_forward)
kits.register("ddim", "sampler", ddim_sampler)
kits.register("dd[ip]m_*", "full_size_keys", ddim_full_size)
for other in ("ldm", "guided-diffusion", "first_stage"):
    kits.register(other, "checkpoint", container)
    kits.register(other, "weights_digest", container_digest)
kits.register("all", "schedule", schedules)

if importlib.util.find_spec("tests.helpers.conformance_ldm"):
    importlib.import_module("tests.helpers.conformance_ldm")


# ---- the tests ----


def cases() -> list:
    found = []
    for entry in kits.entries(KIT):
        for check in kits.checks_for(entry) or [None]:
            label = f"{entry['file']}-{check.__name__ if check else 'unchecked'}"
            found.append(pytest.param(entry, check, id=label))
    return found


@pytest.mark.parametrize(("entry", "check"), cases())
def test_entry(entry: dict, check: kits.Check | None) -> None:
    if check is None:
        pytest.skip(f"no check is registered for {entry['family']}, {entry['role']}")
    check(entry, KIT)


def test_files_are_those_of_the_index() -> None:
    for entry in kits.entries(KIT):
        content = (KIT / entry["file"]).read_bytes()
        assert len(content) == entry["bytes"], entry["file"]
        assert hashlib.sha256(content).hexdigest() == entry["sha256"], entry["file"]
