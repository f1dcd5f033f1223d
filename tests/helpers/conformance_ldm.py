"""Checks of latent diffusion, Stable Diffusion and guided diffusion against the conformance kit.

Importing this module registers them; `tests/test_conformance.py` runs them. All sizes come from
the kit's config.json files.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import kit as kits
from tinydm.models.autoencoder import (
    KLAutoencoder,
    VQAutoencoder,
    decode_first_stage,
    first_stage_from_upstream,
)
from tinydm.models.checkpoint import load_into, load_state_dict, select
from tinydm.models.conditioning import ClassEmbedder, CLIPTextTower, GuidedDenoiser
from tinydm.models.guided_samplers import guided_ddim, guided_ddpm, posterior, space_timesteps
from tinydm.models.ldm_samplers import ldm_ddim, ldm_tables, ldm_timesteps, plms
from tinydm.models.ldm_unet import LDMUNet
from tinydm.models.schedule import alphas_cumprod, make_betas

PREFIXES = {
    "unet": "model.diffusion_model",
    "first_stage": "first_stage_model",
    "cond_stage": "cond_stage_model",
}
UNCONDITIONAL = "__is_unconditional__"

# Parameters of the denoisers as published.
PARAMETERS = {
    "ldm_cin256_v2": 400_920_579,
    "ldm_lsun_beds256": 274_056_163,
    "ldm_lsun_churches256": 294_966_916,
    "sd_v1": 859_520_964,
    "adm_in256": 553_838_086,
    "adm_in64": 295_904_454,
}

# Channel multipliers that guided diffusion chooses by the size of the image.
ADM_WIDTHS = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
}


# ---- building and loading ----


def build_conditioner(stage: Any, clip_config: Mapping[str, Any] | None) -> nn.Module | None:
    """The conditioner of an upstream `cond_stage_config`, None for an unconditional model."""
    if stage == UNCONDITIONAL:
        return None
    if stage["target"].endswith("ClassEmbedder"):
        return ClassEmbedder(stage["params"]["n_classes"], stage["params"]["embed_dim"])
    pytest.importorskip("transformers")
    return CLIPTextTower(clip_config) if clip_config else CLIPTextTower()


def build(part: str, config: dict) -> nn.Module | None:
    """One part ("unet", "first_stage", "cond_stage") of a kit's config.json."""
    if "unet" in config:
        return LDMUNet.from_upstream(config["unet"])
    model = config["config"]["model"]
    if "unet_config" not in model["params"]:  # a first stage alone
        return first_stage_from_upstream(model)
    if part == "unet":
        return LDMUNet.from_upstream(model["params"]["unet_config"]["params"])
    if part == "first_stage":
        return first_stage_from_upstream(model["params"]["first_stage_config"])
    return build_conditioner(model["params"]["cond_stage_config"], config.get("clip_text_config"))


def loaded(part: str, entry: dict, kit: Path, weights: str = "ema") -> nn.Module:
    """One part with the weights of the checkpoint beside `entry`, in eval mode."""
    config, path = kits.config_of(entry, kit), kits.checkpoint_of(entry, kit)
    module = build(part, config)
    assert module is not None, f"the configuration has no {part}"
    state = load_state_dict(path, weights=weights)
    if config["family"] == "ldm":
        state = select(state, PREFIXES[part], path)
    load_into(module, state, path.name)
    return module.eval()


def parts_of(config: dict) -> list[str]:
    """The parts that a checkpoint of this configuration holds."""
    if config["family"] != "ldm":
        return ["unet" if "unet" in config else "first_stage"]
    unconditional = config["config"]["model"]["params"]["cond_stage_config"] == UNCONDITIONAL
    return ["unet", "first_stage"] + ([] if unconditional else ["cond_stage"])


def ldm_alphas_cumprod(config: dict) -> np.ndarray:
    """The table (T,) float32 of an upstream configuration, as its checkpoints store it."""
    params = config["config"]["model"]["params"]
    kind = {"linear": "scaled_linear", "sqrt_linear": "linear"}
    schedule = kind[params.get("beta_schedule", "linear")]
    start, end = params.get("linear_start", 1e-4), params.get("linear_end", 2e-2)
    betas = make_betas(schedule, start, end, params.get("timesteps", 1000))
    return alphas_cumprod(betas, np.float64).astype(np.float32)


def scale_factor_of(entry: dict, kit: Path) -> float:
    """The tensor of the checkpoint, else the number of the configuration, else 1."""
    config = kits.config_of(entry, kit)
    if config["family"] != "ldm":
        return 1.0
    state = load_state_dict(kits.checkpoint_of(entry, kit))
    default = config["config"]["model"]["params"].get("scale_factor", 1.0)
    return float(state["scale_factor"]) if "scale_factor" in state else default


# ---- weights ----


def config_builds(entry: dict, kit: Path) -> None:
    """Every part can be built from the configuration, without memory."""
    config = kits.config_of(entry, kit)
    with torch.device("meta"):
        for part in parts_of(config):
            assert build(part, config) is not None


def checkpoint_loads(entry: dict, kit: Path) -> None:
    """All parts load strictly, averaged and raw; stored schedules are those of the config."""
    config = kits.config_of(entry, kit)
    for weights in ("ema", "raw"):
        for part in parts_of(config):
            loaded(part, entry, kit, weights)
    if config["family"] == "ldm":
        stored = load_state_dict(kit / entry["file"])["alphas_cumprod"]
        table = torch.from_numpy(ldm_alphas_cumprod(config))
        kits.assert_close("alphas_cumprod", table, stored, 1e-6)


def digest(entry: dict, kit: Path) -> None:
    """What the modules hold after loading, part by part."""
    config = kits.config_of(entry, kit)
    listed = json.loads((kit / entry["file"]).read_text(encoding="utf-8"))
    parts = parts_of(config)
    listed = listed if config["family"] == "ldm" else {parts[0]: listed}
    assert set(parts) == set(listed)
    for part in parts:
        state = dict(loaded(part, entry, kit).state_dict())
        kits.assert_digest(state, listed[part])
        assert {n for n, v in state.items() if v.is_floating_point()} == set(listed[part])


# ---- forwards ----


@torch.no_grad()
def forward(entry: dict, kit: Path) -> None:
    golden = kits.goldens_of(entry, kit)
    given = {name: golden[name] for name in ("context", "y") if name in golden}
    if "class_label" in golden:
        context = loaded("cond_stage", entry, kit)(golden["class_label"])
        kits.assert_close("context", context, golden["context"], entry["rtol"])
    for name, weights in (("out", "ema"), ("out_raw", "raw")):
        if name in golden:
            out = loaded("unet", entry, kit, weights)(golden["x"], golden["t"], **given)
            kits.assert_close(name, out, golden[name], entry["rtol"])


@torch.no_grad()
def text_encoder(entry: dict, kit: Path) -> None:
    golden = kits.goldens_of(entry, kit)
    tower = loaded("cond_stage", entry, kit)
    for start in ("", "uncond_"):
        hidden = tower(golden[start + "input_ids"])
        name = start + "last_hidden_state"
        kits.assert_close(name, hidden, golden[name], entry["rtol"])


def vq_outputs(model: VQAutoencoder, golden: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    quantized = model.quantize(golden["z"])
    assert torch.equal(quantized.indices, golden["indices"])
    return {
        "encode": model.encode(golden["image"]),
        "quantized": quantized.values,
        "commit_loss": quantized.commit_loss[None],
        "decode": model.decode(golden["z"]),
        "decode_noquant": model.decode(golden["z"], force_not_quantize=True),
    }


def kl_outputs(model: KLAutoencoder, golden: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    posterior = model.encode(golden["image"])
    return {
        "moments": model.quant_conv(model.encoder(golden["image"])),
        "mean": posterior.mean,
        "logvar": posterior.logvar,
        "mode": posterior.mode(),
        "sample": posterior.sample(golden["sample_noise"]),
        "decode": model.decode(golden["z"]),
    }


@torch.no_grad()
def first_stage(entry: dict, kit: Path) -> None:
    golden = kits.goldens_of(entry, kit)
    model = loaded("first_stage", entry, kit)
    outputs = {"vq": vq_outputs, "kl": kl_outputs}[entry["meta"]["kind"]](model, golden)
    if "scale_factor" in entry["meta"]:
        scale = scale_factor_of(entry, kit)
        assert scale == pytest.approx(entry["meta"]["scale_factor"], rel=1e-6)
        outputs["decode_first_stage"] = decode_first_stage(model, golden["z"], scale)
        outputs["first_stage_encoding_mode"] = scale * model.latent(golden["image"])
    assert set(golden) - set(outputs) <= {"image", "z", "indices", "sample_noise"}
    for name, value in outputs.items():
        kits.assert_close(name, value, golden[name], entry["rtol"])


# ---- samplers ----


class Recorder:
    """A sampler's hook that keeps the states and the last predicted x0."""

    def __init__(self, start: torch.Tensor):
        self.states = [start]
        self.pred_x0 = start

    def __call__(self, *, x_prev: torch.Tensor, pred_x0: torch.Tensor, **_: object) -> None:
        self.states.append(x_prev)
        self.pred_x0 = pred_x0


def recording(model: Callable[..., torch.Tensor], seen: list[int]) -> Callable[..., torch.Tensor]:
    """`model`, which also writes the timestep of each call to `seen`."""

    def call(x: torch.Tensor, t: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        seen.append(int(t[0]))
        return model(x, t, *rest, **named)

    return call


def compare_trajectory(
    entry: dict, golden: dict[str, torch.Tensor], hook: Recorder, final: torch.Tensor
) -> None:
    kept = torch.stack([hook.states[k] for k in golden["steps"].tolist()])
    kits.assert_close("x_steps", kept, golden["x_steps"], entry["rtol"])
    kits.assert_close("x_final", final, golden["x_final"], entry["rtol"])
    kits.assert_close("pred_x0_final", hook.pred_x0, golden["pred_x0_final"], entry["rtol"])


def compare_tables(
    golden: dict[str, torch.Tensor], timesteps: list[int], table: np.ndarray, eta: float
) -> None:
    """The upstream's are ascending; the first is stored in float32, the others in float64."""
    names = ("ddim_alphas", "ddim_alphas_prev", "ddim_sigmas")
    for name, values in zip(names, ldm_tables(timesteps, table, eta), strict=True):
        rtol = 1e-6 if golden[name].dtype == torch.float32 else 1e-12
        kits.assert_close(name, torch.from_numpy(values[::-1].copy()), golden[name], rtol)


@torch.no_grad()
def ldm_sampler(entry: dict, kit: Path) -> None:
    golden, meta = kits.goldens_of(entry, kit), entry["meta"]
    table = ldm_alphas_cumprod(kits.config_of(entry, kit))
    timesteps = ldm_timesteps(meta["S"], train_timesteps=len(table))
    assert timesteps == golden["timesteps"].tolist()
    compare_tables(golden, timesteps, table, meta["eta"])

    seen: list[int] = []
    denoiser = recording(loaded("unet", entry, kit), seen)
    if "context" in golden:
        contexts = golden["context"], golden["uncond_context"]
        denoiser = GuidedDenoiser(denoiser, *contexts, meta["guidance_scale"])
    hook = Recorder(golden["x_T"])
    if meta["sampler"] == "plms":
        final = plms(denoiser, golden["x_T"], timesteps, table, on_step=hook)
    else:
        assert meta["sampler"] == "ddim"
        noise = golden["noise"].float().__getitem__ if "noise" in golden else None
        given = {"eta": meta["eta"], "noise": noise, "on_step": hook}
        final = ldm_ddim(denoiser, golden["x_T"], timesteps, table, **given)
    assert seen == golden["model_timesteps"].tolist()
    compare_trajectory(entry, golden, hook, final)
    if "image" in golden:
        stage, scale = loaded("first_stage", entry, kit), scale_factor_of(entry, kit)
        image = decode_first_stage(stage, final, scale)
        kits.assert_close("image", image, golden["image"], entry["rtol"])


@torch.no_grad()
def adm_sampler(entry: dict, kit: Path) -> None:
    golden, meta, config = kits.goldens_of(entry, kit), entry["meta"], kits.config_of(entry, kit)
    total = config["diffusion_steps"]
    table = alphas_cumprod(adm_betas(config["noise_schedule"], total), np.float64)
    timesteps = space_timesteps(meta["timestep_respacing"], total)
    assert timesteps == golden["timesteps"].tolist()
    chain = posterior(timesteps, table)
    kits.assert_close("betas", torch.from_numpy(chain.betas), golden["betas"], 1e-12)
    name = "posterior_log_variance_clipped"
    kits.assert_close(name, torch.from_numpy(chain.log_variance), golden[name], 1e-12)

    model = loaded("unet", entry, kit)
    denoiser = partial(model, y=golden["y"]) if "y" in golden else model
    hook = Recorder(golden["x_T"])
    given = {"clip_denoised": meta["clip_denoised"], "on_step": hook}
    given["noise"] = golden["noise"].float().__getitem__ if "noise" in golden else None
    if meta["sampler"] == "ddim":
        final = guided_ddim(denoiser, golden["x_T"], timesteps, table, eta=meta["eta"], **given)
    else:
        assert meta["sampler"] == "p_sample"
        final = guided_ddpm(denoiser, golden["x_T"], timesteps, table, **given)
    compare_trajectory(entry, golden, hook, final)


# ---- schedules ----


def adm_betas(schedule: str, total: int) -> np.ndarray:
    """betas (T,) of guided diffusion, whose linear ones keep their sum whatever T is."""
    return make_betas(schedule, 0.1 / total, 20 / total, total)


def schedule_files(entry: dict, kit: Path) -> None:
    """The respaced and DDIM tables, and the timestep lists, of these families."""
    if entry["file"].endswith(".json"):
        return timestep_lists(json.loads((kit / entry["file"]).read_text(encoding="utf-8")))
    golden = kits.goldens_of(entry, kit)
    for name, values in golden.items():
        family, schedule, *rest = name.split("/")
        if family == "gd" and len(rest) == 2:
            kind, total = schedule.split("_")
            table = alphas_cumprod(adm_betas(kind, int(total)), np.float64)
            spacing = rest[0].removeprefix("respaced_")
            chain = posterior(space_timesteps(spacing, int(total)), table)
            ours = {"betas": chain.betas, "posterior_log_variance_clipped": chain.log_variance}
            kits.assert_close(name, torch.from_numpy(ours[rest[1]]), values, 1e-12)
        elif family == "ldm" and schedule.startswith("ddim_"):
            compare_ldm_table(name, values)


def compare_ldm_table(name: str, golden: torch.Tensor) -> None:
    """ldm/ddim_S_etaE/table: float64, made from the stored float32 table of the first schedule."""
    _, schedule, kind = name.split("/")
    _, steps, eta = schedule.split("_")
    betas = make_betas("scaled_linear", 0.0015, 0.0195)
    table = alphas_cumprod(betas, np.float64).astype(np.float32)
    tables = ldm_tables(ldm_timesteps(int(steps)), table, float(eta.removeprefix("eta")))
    ours = dict(zip(("alphas", "alphas_prev", "sigmas"), tables, strict=True))[kind]
    kits.assert_close(name, torch.from_numpy(ours[::-1].copy()), golden, 1e-12)


def timestep_lists(lists: dict) -> None:
    for spacing, ascending in lists["guided_diffusion_space_timesteps"].items():
        assert space_timesteps(spacing)[::-1] == ascending, spacing
    for skip, by_steps in lists["ldm_ddim_timesteps_ascending"].items():
        for steps, listed in by_steps.items():
            if listed["fits_1000_step_tables"]:
                assert ldm_timesteps(int(steps), skip)[::-1] == listed["timesteps"], (skip, steps)
            else:
                with pytest.raises(ValueError, match="outside the training timesteps"):
                    ldm_timesteps(int(steps), skip)


# ---- full size ----


def adm_params(flags: dict) -> dict[str, Any]:
    """Arguments of the UNet from the command-line flags of guided diffusion."""
    size, words = flags["image_size"], flags["channel_mult"]
    widths = tuple(float(w) for w in words.split(",")) if words else ADM_WIDTHS[size]
    copied = ("num_res_blocks", "dropout", "num_heads", "num_head_channels", "num_heads_upsample")
    copied += ("use_scale_shift_norm", "resblock_updown", "use_new_attention_order")
    return {name: flags[name] for name in copied} | {
        "in_channels": 3,
        "model_channels": flags["num_channels"],
        "out_channels": 6 if flags["learn_sigma"] else 3,
        "attention_resolutions": [
            size // int(r) for r in flags["attention_resolutions"].split(",")
        ],
        "channel_mult": widths,
        "num_classes": 1000 if flags["class_cond"] else None,
    }


def full_size(entry: dict, kit: Path) -> None:
    """Names, shapes and numbers of parameters of a public checkpoint."""
    listed = json.loads((kit / entry["file"]).read_text(encoding="utf-8"))
    tensors = listed["tensors"]
    assert len(tensors) == listed["n_tensors"]
    if "flags" in listed:
        config, prefixes = {"family": "guided-diffusion", "unet": adm_params(listed["flags"])}, {}
    else:
        config, prefixes = {"family": "ldm", "config": listed["config"]}, PREFIXES
    parts = {}
    with torch.device("meta"):
        for part in parts_of(config):
            parts[part] = build(part, config)
    for part, module in parts.items():
        kits.assert_same_names(module, tensors, f"{prefixes[part]}." if prefixes else "")
    count = sum(p.numel() for p in parts["unet"].parameters())
    assert count == PARAMETERS.get(entry["family"], count)
    if prefixes:  # nothing is left but schedules, the scale factor and averaged copies
        known = (*(f"{prefix}." for prefix in prefixes.values()), "model_ema.")
        assert all("." not in name for name in tensors if not name.startswith(known))


for name in ("ldm", "guided-diffusion", "first_stage"):
    kits.register(name, "config", config_builds)
    kits.register(name, "checkpoint", checkpoint_loads)
    kits.register(name, "weights_digest", digest)
    kits.register(name, "forward", forward)
    kits.register(name, "first_stage", first_stage)
    kits.register(name, "text_encoder", text_encoder)
kits.register("ldm", "sampler", ldm_sampler)
kits.register("guided-diffusion", "sampler", adm_sampler)
kits.register("all", "schedule", schedule_files)
for name in ("ldm_*", "sd_*", "adm_*"):
    kits.register(name, "full_size_keys", full_size)
