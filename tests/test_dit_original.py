"""The release of DiT against its equations, written out here, and against guided diffusion's steps.

Shapes: B batch, N patches, D width, h heads.
"""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

diffusers = pytest.importorskip("diffusers")

import tinydm  # noqa: E402
from tests.helpers.pipelines import decoder  # noqa: E402
from tinydm.models.architecture import built, describe  # noqa: E402
from tinydm.models.checkpoint_files import CheckpointError  # noqa: E402
from tinydm.models.diffusers_denoiser import build  # noqa: E402
from tinydm.models.diffusers_pipeline import DiffusersPipeline  # noqa: E402
from tinydm.models.dit_original import CLASS, OriginalDiT, configuration  # noqa: E402
from tinydm.models.guided_samplers import guided_ddpm, space_timesteps  # noqa: E402
from tinydm.models.pipeline import image_generator  # noqa: E402
from tinydm.models.schedule import alphas_cumprod, make_betas  # noqa: E402
from tinydm.scripts.common.errors import ConfigError  # noqa: E402
from tinydm.scripts.common.paths import ROOT  # noqa: E402
from tinydm.scripts.experiment.assembly import assemble  # noqa: E402
from tinydm.scripts.experiment.config import load_config, parse_config  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH, HEADS, DEPTH, PATCH, SIDE, CLASSES = 128, 2, 2, 2, 8, 1000
State = dict[str, torch.Tensor]


def sines(positions: torch.Tensor, width: int) -> torch.Tensor:
    """(N,) -> (N, width): sines of falling frequencies, then cosines."""
    frequencies = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angles = positions.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


def positions() -> torch.Tensor:
    """Of the patches, (1, N, D): the first half tells the column, the second the row."""
    line = torch.arange(SIDE // PATCH)
    rows, columns = torch.meshgrid(line, line, indexing="ij")
    halves = [sines(axis.flatten(), WIDTH // 2) for axis in (columns, rows)]
    return torch.cat(halves, 1).float()[None]


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the release, of a small network."""
    layers = {"t_embedder.mlp.0": (WIDTH, 256), "t_embedder.mlp.2": (WIDTH, WIDTH)}
    for i in range(DEPTH):
        layers |= {
            f"blocks.{i}.attn.qkv": (3 * WIDTH, WIDTH),
            f"blocks.{i}.attn.proj": (WIDTH, WIDTH),
            f"blocks.{i}.mlp.fc1": (4 * WIDTH, WIDTH),
            f"blocks.{i}.mlp.fc2": (WIDTH, 4 * WIDTH),
            f"blocks.{i}.adaLN_modulation.1": (6 * WIDTH, WIDTH),
        }
    layers |= {
        "x_embedder.proj": (WIDTH, 4, PATCH, PATCH),
        "final_layer.linear": (PATCH * PATCH * 8, WIDTH),
        "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
    }
    found = {f"{name}.weight": shape for name, shape in layers.items()}
    found |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    return found | {"y_embedder.embedding_table.weight": (CLASSES + 1, WIDTH)}


def reference(state: State, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """eps and v of (B, 4, H, W), in float64."""
    w = {name: value.double() for name, value in state.items()}

    def linear(name: str, v: torch.Tensor) -> torch.Tensor:
        return F.linear(v, w[f"{name}.weight"], w[f"{name}.bias"])

    def modulated(v: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(v, (WIDTH,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def attention(name: str, v: torch.Tensor) -> torch.Tensor:
        split = linear(f"{name}.qkv", v).unflatten(2, (3, HEADS, WIDTH // HEADS))
        q, k, value = split.permute(2, 0, 3, 1, 4)  # (B, h, N, D / h) each
        weights = (q @ k.mT / math.sqrt(WIDTH // HEADS)).softmax(-1)
        return linear(f"{name}.proj", (weights @ value).transpose(1, 2).flatten(2))

    embedded = sines(t, 256).roll(128, 1)  # cosines first
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", embedded)))
    c = F.silu(c + w["y_embedder.embedding_table.weight"][y])
    patches = F.conv2d(x.double(), w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], PATCH)
    h = patches.flatten(2).mT + w["pos_embed"]
    for i in range(DEPTH):
        block = f"blocks.{i}"
        found = linear(f"{block}.adaLN_modulation.1", c).chunk(6, 1)
        h = h + found[2][:, None] * attention(f"{block}.attn", modulated(h, found[0], found[1]))
        inner = F.gelu(
            linear(f"{block}.mlp.fc1", modulated(h, found[3], found[4])), approximate="tanh"
        )
        h = h + found[5][:, None] * linear(f"{block}.mlp.fc2", inner)
    shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2, 1)
    out = linear("final_layer.linear", modulated(h, shift, scale))  # (B, N, P P 8)
    side = SIDE // PATCH
    out = out.unflatten(2, (PATCH, PATCH, 8)).unflatten(1, (side, side))  # (B, h, w, p, q, c)
    return out.permute(0, 5, 1, 3, 2, 4).reshape(len(x), 8, SIDE, SIDE).float()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[State, Path, Path]:
    """The tensors, their file and a folder with a decoder."""
    folder = tmp_path_factory.mktemp("dit")
    made = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes().items():
        scale = 0.5 * math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1
        state[name] = scale * torch.randn(shape, generator=made)
    state["pos_embed"] = positions()
    torch.save(state, folder / "dit.pt")
    torch.manual_seed(0)
    decoder().save_pretrained(folder / "vae")
    return state, folder / "dit.pt", folder


def test_it_computes_the_equations(files: tuple[State, Path, Path]) -> None:
    state, path, vae = files
    denoiser = OriginalDiT.open(path, vae=vae).full_precision()
    assert denoiser.model.config.num_attention_heads == HEADS
    x = torch.randn(3, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    t, y = torch.tensor([0, 371, 999]), torch.tensor([3, 999, 1000])
    with torch.no_grad():
        ours = denoiser(x, t, class_labels=y)
        other = denoiser(x, t, class_labels=y.flip(0))
    assert torch.allclose(ours, reference(state, x, t, y), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(ours, other, atol=1e-2)
    again = built(describe("diffusers", {}, denoiser)).to_empty(device="cpu")
    again.load_state_dict(denoiser.state_dict())
    again.model.pos_embed.pos_embed = denoiser.model.pos_embed.pos_embed
    with torch.no_grad():
        assert torch.equal(again(x, t, class_labels=y), ours)


def test_steps_use_the_learned_variance(files: tuple[State, Path, Path]) -> None:
    """As guided diffusion's sampler, which is another implementation of them."""
    state, path, vae = files
    source = OriginalDiT.open(path, vae=vae)
    denoiser = source.full_precision()
    pipeline = DiffusersPipeline(source, denoiser, 5, guidance_scale=1.0, micro_batch=2)
    found = pipeline.latents(denoiser, [4, 7], 9, classes=[3, 5])
    bars = alphas_cumprod(make_betas("linear", 1e-4, 0.02, 1000), "float64")
    generators = [image_generator(9, index) for index in (4, 7)]
    y = pipeline.labels([4, 7], 9, [3, 5])

    def noise(_: int = 0) -> torch.Tensor:
        return torch.stack([torch.randn(4, SIDE, SIDE, generator=g) for g in generators])

    steps = space_timesteps("5")
    assert pipeline.timesteps == steps

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return reference(state, x, t, y)

    expected = guided_ddpm(model, noise(), steps, bars, noise=noise, clip_denoised=False)
    error = (found - expected).square().mean() / expected.square().mean()
    assert float(error) < 1e-8


def test_the_configuration_and_what_it_needs(files: tuple[State, Path, Path]) -> None:
    _, path, vae = files
    config = load_config(ROOT / "configs/dit_xl2.yaml")
    assert (config.sampler.steps, config.sampler.guidance_scale) == (250, 1.5)
    with pytest.raises(CheckpointError, match=r"download it from https://dl\.fbaipublicfiles"):
        assemble(config)
    text = f"name: x\nmodel: {{arch: diffusers, checkpoint: {path}}}\n"
    with pytest.raises(CheckpointError, match="holds no decoder"):
        assemble(parse_config(text, "x.yaml"))
    stage = "model.first_stage={target: VQModelInterface, params: {}, checkpoint: x}"
    with pytest.raises(ConfigError, match="target: AutoencoderKL"):
        parse_config(text, "x.yaml", [stage])
    stage = f"model.first_stage={{target: AutoencoderKL, params: {{}}, checkpoint: {vae}}}"
    assembly = assemble(parse_config(text, "x.yaml", [stage, "sampler.steps=2"]))
    assert assembly.pipeline.guidance_scale == 4.0  # diffusers' default, as in the release
    images = assembly.pipeline.sample(assembly.denoiser, [0], 1)
    assert images.shape == (1, 3, SIDE, SIDE)


def test_files_of_other_networks_are_refused(
    files: tuple[State, Path, Path], tmp_path: Path
) -> None:
    state, _, vae = files
    for change, what in (
        ({"blocks.0.mlp.fc1.bias": torch.zeros(3)}, "mlp|net.0.proj.bias is missing"),
        ({"blocks.1.attn.proj.bias": torch.full((WIDTH,), math.nan)}, "NaN or infinite"),
        ({"pos_embed": None}, "holds no DiT"),
    ):
        changed = {n: v for n, v in (state | change).items() if v is not None}
        torch.save(changed, tmp_path / "odd.pt")
        with pytest.raises(CheckpointError, match=what) as caught:
            OriginalDiT.open(tmp_path / "odd.pt", vae=vae).full_precision()
        assert "\n" not in str(caught.value)


def test_xl_2_has_its_published_size() -> None:
    """675 million parameters; diffusers copies the embeddings into each block."""
    width, depth = 1152, 28
    sizes = {"x_embedder.proj.weight": (width, 4, 2, 2), "final_layer.linear.bias": (32,)}
    sizes |= {"pos_embed": (1, 256, width), "y_embedder.embedding_table.weight": (1001, width)}
    sizes |= {f"blocks.{i}.attn.qkv.weight": (3 * width, width) for i in range(depth)}
    config = configuration({name: torch.empty(s, device="meta") for name, s in sizes.items()})
    assert (config["num_attention_heads"], config["sample_size"]) == (16, 32)
    model = build(CLASS, config).model
    total = sum(p.numel() for p in model.parameters())
    copies = sum(p.numel() for p in model.transformer_blocks[0].norm1.emb.parameters())
    assert round((total - (depth - 1) * copies + 256 * width) / 1e6) == 675


@pytest.mark.slow
def test_it_is_quantized_and_loaded(files: tuple[State, Path, Path], tmp_path: Path) -> None:
    """The file knows that the frequencies are the release's."""
    from tests.test_api import FEW, SETTINGS

    _, path, vae = files
    source = OriginalDiT.open(path, vae=vae)
    denoiser = source.full_precision()
    pipeline = DiffusersPipeline(source, denoiser, 3, micro_batch=2)

    def sample(model: torch.nn.Module, numbers: range) -> None:
        pipeline.latents(model, list(numbers), 3)

    more = {"settings": SETTINGS, "calibration": FEW, "weight_bits": 8}
    file = tmp_path / "q.safetensors"
    tinydm.calibrate(denoiser, file, sample=sample, **more)
    loaded = tinydm.load(file)
    assert len(loaded.original.transformer_blocks) == DEPTH
    x, t, y = torch.randn(1, 4, SIDE, SIDE), torch.tensor([400]), torch.tensor([7])
    with torch.no_grad():
        full, ours = denoiser(x, t, class_labels=y), loaded(x, t, class_labels=y).sample
    error = (full - ours).square().mean() / full.square().mean()
    assert 0 < float(error) < 1e-3
