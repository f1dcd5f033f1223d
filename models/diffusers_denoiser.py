"""Denoisers of Hugging Face diffusers as they are, behind the call eps = model(x, t, **named).

    denoiser = build("UNet2DConditionModel", config)  # of a config.json, without weights
    denoiser = read(folder / "unet")

diffusers is optional and is imported where it is needed. Only these classes of it are built, and
nothing that a folder names is run.

Shapes: B batch, C x H x W what the denoiser sees, h heads.
"""

import functools
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .checkpoint_files import CheckpointError, failure, printable
from .ops import MatMul, after_softmax
from .roles import LayerRoles

# class -> (its name of x, layers that see x, layers that give the output)
DENOISERS = {
    "UNet2DModel": ("sample", ("conv_in",), ("conv_out",)),
    "UNet2DConditionModel": ("sample", ("conv_in",), ("conv_out",)),
    "DiTTransformer2DModel": ("hidden_states", ("pos_embed.proj",), ("proj_out_2",)),
    "PixArtTransformer2DModel": ("hidden_states", ("pos_embed.proj",), ("proj_out",)),
}
PLAIN_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")
LARGE = 1 << 28  # parameters, above which gradients are made of few kept values
# Of a sample's attention (64 MB): where there are more, gradients are made of so many at a time.
MANY_SCORES = 1 << 24
NESTED = "."  # added_cond_kwargs.text_embeds: a tensor of a dict that is an argument
FLOATS = ("F64", "F32", "F16", "BF16")  # of safetensors
FULL_PRECISION = "give the weights in full or half precision"
NO_DIFFUSERS = "this folder needs diffusers: pip install diffusers accelerate transformers"


def library() -> Any:
    """The module diffusers. Raises CheckpointError where it is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise CheckpointError(f"{NO_DIFFUSERS} ({printable(error)})") from error
    # What it cannot go on from it raises; what it only logs, as a file that it then looks for under
    # another name, would stand before the one line of a refusal.
    diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)
    diffusers.utils.logging.disable_progress_bar()
    return diffusers


class ProductAttention(nn.Module):
    """Attention of diffusers with its two products as modules: what AttnProcessor computes.

    Its place is that of an `Attention`'s processor, which gets the Attention itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.values = MatMul(), MatMul()

    def forward(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states (B, N, D) or (B, D, H, W); encoder_hidden_states (B, K, E)."""
        x = hidden_states if hidden_states.ndim == 3 else hidden_states.flatten(2).mT  # (B, N, D)
        if attn.group_norm is not None:
            x = attn.group_norm(x.mT).mT
        context = x if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        mask = attn.prepare_attention_mask(attention_mask, context.shape[1], len(context))
        query, key, value = (  # (B h, N or K, D / h)
            attn.head_to_batch_dim(layer(v))
            for layer, v in ((attn.to_q, x), (attn.to_k, context), (attn.to_v, context))
        )
        operands = query, key, value
        parts = -(-len(query) * query.shape[1] * key.shape[1] // MANY_SCORES)
        # Of one sample alone: each call of the products then sees whole samples, or heads of one.
        if parts > 1 and len(x) == 1 and mask is None and _learns(self, *operands):
            heads = zip(*(v.chunk(parts) for v in operands), strict=True)
            out = torch.cat([_again(self._attend, *part, attn.scale) for part in heads])
        else:
            out = self._attend(*operands, attn.scale, mask)
        out = attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(out)))
        if hidden_states.ndim == 4:
            out = out.mT.reshape(hidden_states.shape)
        out = out + hidden_states if attn.residual_connection else out
        return out / attn.rescale_output_factor

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query (B h, N, d), key and value (B h, K, d) -> (B h, N, d)."""
        scores = self.scores(query, key.mT)
        if mask is None:
            return after_softmax(self.values, scores, value, scale)
        return after_softmax(self.values, scores * scale + mask, value)


def _expose_products(model: nn.Module) -> None:
    """Gives attention that is computed in the common way its products as modules."""
    module: Any  # diffusers' own, which it may lack
    for module in model.modules():
        if type(module).__name__ != "Attention" or not hasattr(module, "set_processor"):
            continue
        special = (
            module.spatial_norm,
            module.norm_q,
            module.norm_k,
            module.to_k,
            module.add_k_proj,
        )
        plain = [s is None for s in special] == [True, True, True, False, True]
        if plain and type(module.processor).__name__ in PLAIN_PROCESSORS:
            module.set_processor(ProductAttention())


def _learns(module: nn.Module, *args: Any) -> bool:
    """Whether gradients are wanted of module(*args)."""
    seen = (*module.parameters(), *args)
    wanted = any(isinstance(v, torch.Tensor) and v.requires_grad for v in seen)
    return wanted and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _again(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), which keeps nothing for its gradients but the arguments and computes the
    rest again. Nothing is drawn at random in it."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _recomputed(module: Any, *args: Any) -> Any:
    return _again(module, *args) if _learns(module, *args) else module(*args)


class DiffusersDenoiser(nn.Module):
    """A denoiser of diffusers, `model`, called as all others are here.

    Its arguments besides x and t go by their names; a tensor within a dict, as in
    added_cond_kwargs, goes by the names of both with a dot between them.
    """

    model: Any  # of a class of diffusers, which is not imported here
    is_original_dit = False  # whose timestep has other frequencies than diffusers', dit_original.py

    def __init__(self, model: nn.Module):
        super().__init__()
        _expose_products(model)
        self.model = model
        if sum(p.numel() for p in model.parameters()) > LARGE:
            self.model.enable_gradient_checkpointing(_recomputed)

    def forward(self, x: torch.Tensor, t: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        seen = {DENOISERS[self.class_name][0]: x, "timestep": t.to(x.device, non_blocking=True)}
        return self.model(**seen, return_dict=False, **nested(named))[0]

    @property
    def class_name(self) -> str:
        """Class of the network in diffusers."""
        return type(self.model).__name__

    def layer_roles(self) -> LayerRoles:
        """First and last layers, those of the timestep alone, products, concatenated skips and
        residual units, where the architecture leaves no doubt."""
        model, modules = self.model, dict(self.model.named_modules())
        _, inputs, outputs = DENOISERS[self.class_name]
        matmuls = {
            f"model.{name}.{part}": part
            for name, module in modules.items()
            if isinstance(module, ProductAttention)
            for part in ("scores", "values")
        }
        units = [n for n, m in modules.items() if type(m).__name__ == "ResnetBlock2D"]
        return LayerRoles(
            inputs=tuple(f"model.{name}" for name in inputs if name in modules),
            outputs=tuple(f"model.{name}" for name in outputs if name in modules),
            timestep_only=tuple(f"model.{name}" for name in _of_timestep_alone(model, modules)),
            concat_split={f"model.{n}": c for n, c in _concatenated(model).items()},
            matmuls=matmuls,
            units=tuple(f"model.{name}" for name in units),
        )


def _of_timestep_alone(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """The layers of the timestep's embedding; in UNets also each block's projection of it, where
    neither a class nor anything else is added to it."""
    first = ("linear_1", "linear_2")
    if hasattr(model, "transformer_blocks"):
        parts = [name for name in modules if name.endswith(".timestep_embedder")]
    else:
        parts = (
            ["time_embedding"] if getattr(model.config, "time_cond_proj_dim", None) is None else []
        )
    found = [f"{part}.{layer}" for part in parts for layer in first]
    config = model.config
    alone = not any(
        getattr(config, key, None) is not None
        for key in ("class_embed_type", "num_class_embeds", "addition_embed_type")
    )
    if alone and parts == ["time_embedding"]:
        found += [name for name in modules if name.endswith(".time_emb_proj")]
    return [name for name in found if isinstance(modules.get(name), nn.Linear)]


def _concatenated(model: Any) -> dict[str, int]:
    """Layers that see a concatenation with a skip connection -> channels of its first part, what
    the block before gave."""
    found: dict[str, int] = {}
    blocks = getattr(model, "up_blocks", ())
    before = model.mid_block.resnets[-1].out_channels if len(blocks) and model.mid_block else 0
    for i, block in enumerate(blocks):
        resnets = getattr(block, "resnets", ())
        if type(block).__name__ not in ("UpBlock2D", "AttnUpBlock2D", "CrossAttnUpBlock2D"):
            return {}
        for j, resnet in enumerate(resnets):
            if 0 < before < resnet.in_channels:
                layers = ("conv1", "conv_shortcut")
                found |= {
                    f"up_blocks.{i}.resnets.{j}.{layer}": before
                    for layer in layers
                    if getattr(resnet, layer, None) is not None
                }
            before = resnet.out_channels
    return found


# ---- arguments ----


def flat(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The arguments of a call of diffusers' model by name: x, t and the tensors of the others.

    Raises CheckpointError for arguments that are neither tensors nor absent.
    """
    bound = _signature(type(model).forward).bind(model, *args, **kwargs).arguments
    named = {n: v for n, v in bound.items() if n not in ("self", "return_dict") and v is not None}
    found = {"x": named.pop(DENOISERS[type(model).__name__][0]), "t": named.pop("timestep")}
    for name, value in named.items():
        inner = value if isinstance(value, Mapping) else {"": value}
        for key, tensor in inner.items():
            if tensor is None:  # as PixArt's resolution, where there is none
                continue
            if not isinstance(tensor, torch.Tensor):
                what = f"{type(model).__name__} is called with {name}, which is no tensor"
                raise CheckpointError(f"{what}; this kind of pipeline is not supported")
            found[f"{name}{NESTED}{key}" if key else name] = tensor
    return found


@functools.cache  # found once, not at each call
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def nested(named: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The inverse: added_cond_kwargs.text_embeds -> within a dict added_cond_kwargs."""
    arguments: dict[str, Any] = {}
    for name, tensor in named.items():
        outer, dot, inner = name.partition(NESTED)
        if dot:
            arguments.setdefault(outer, {})[inner] = tensor
        else:
            arguments[name] = tensor
    return arguments


def _keep_attention(model: nn.Module) -> None:
    """Attention with products of its own takes no other processor, which would leave them out."""
    module: Any
    for module in model.modules():
        if isinstance(getattr(module, "processor", None), ProductAttention):
            module.set_processor = _no_processor


def _no_processor(*args: Any, **kwargs: Any) -> None:
    raise ValueError(
        "quantized attention takes no other processor: leave out attention slicing and the like"
    )


class LikeDiffusers(nn.Module):
    """A denoiser that is called as diffusers calls `original`, and has all else that this has.

    denoiser: called with (x, t (B,), **named), given later where it is None; its attention then
    stays as it is. device: None for that of its parameters. timestep: a number, 0-d or (B,).
    Returns what has the output as `.sample`, or a tuple with it, in the type of x; everything is
    computed in float32.
    """

    def __init__(self, original: nn.Module, denoiser: nn.Module | None, device: Any = None):
        super().__init__()
        self.__dict__["original"], self.__dict__["place"] = original, device
        self.call: Callable[..., torch.Tensor] | None = denoiser
        if denoiser is not None:
            _keep_attention(original)

    def __getattr__(self, name: str) -> Any:
        if name in ("original", "place"):  # not there yet, while a copy is made
            raise AttributeError(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.original, name)

    @property
    def dtype(self) -> torch.dtype:
        """Type in which it computes."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Device on which it runs: the one it was given, or that of its tensors."""
        if self.place is not None:
            return self.place
        return next(value.device for value in (*self.parameters(), *self.buffers()))

    def to(self, *args: Any, **kwargs: Any) -> "LikeDiffusers":
        """As of any module, but for the type, which pipelines give to all their parts."""
        device, _, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        super().to(device=device, non_blocking=non_blocking)
        return self if memory_format is None else super().to(memory_format=memory_format)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Not that of the original, whose weights are not here. Raises ValueError."""
        raise ValueError("a quantized denoiser is no folder of diffusers: keep the quantized file")

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        named = flat(self.original, args, kwargs)
        x, t = named.pop("x"), torch.as_tensor(named.pop("t"))
        named = {n: v.float() if v.is_floating_point() else v for n, v in named.items()}
        rows = x.shape[0]  # not len(x), which torch.export takes for a constant
        if t.ndim > 1 or (t.ndim == 1 and t.shape[0] not in (1, rows)):
            raise ValueError(
                f"timestep {tuple(t.shape)}: give one, or one for each of {rows} samples"
            )
        t = t.expand(rows) if t.ndim == 0 or t.shape[0] != rows else t
        assert self.call is not None  # given before the pipeline runs
        out = self.call(x.float(), t, **named).to(x.dtype)
        return _output_type()(sample=out) if return_dict else (out,)


@functools.cache
def _output_type() -> Any:
    """A type of diffusers with `.sample` and [0], which torch.export knows."""
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput


# ---- folders ----


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a folder. Raises CheckpointError."""
    if path.exists() and not path.is_file():  # a pipe would wait for a writer
        raise failure(path, "is no file", "download the whole folder")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise failure(path, "no such file", "download the whole folder") from error
    except (OSError, ValueError, RecursionError) as error:
        raise failure(
            path, f"not readable JSON ({printable(error)})", "download it again"
        ) from error
    if not isinstance(value, dict):
        raise failure(path, "holds no JSON object", "download it again")
    return value


def class_of(name: object, place: object) -> Any:
    """The class of a denoiser. Raises CheckpointError for one that is not supported."""
    known = {"Transformer2DModel": "DiTTransformer2DModel"}  # as DiT was called at first
    name = known.get(str(name), str(name))
    if name not in DENOISERS:
        what = f"describes a {printable(name, 60)}"
        raise failure(place, what, f"supported are {', '.join(DENOISERS)}")
    return getattr(library(), name)


def build(name: str, config: Mapping[str, Any], place: object = "config.json") -> DiffusersDenoiser:
    """A denoiser by the name of its class and its configuration, its weights on the meta device."""
    kind = class_of(name, place)
    from accelerate import init_empty_weights
    from diffusers.models.modeling_utils import no_init_weights

    try:
        with no_init_weights(), init_empty_weights():
            model = kind.from_config(dict(config))
    except (ValueError, TypeError, ArithmeticError, RuntimeError, LookupError) as error:
        raise failure(place, f"builds no {name}: {error}", "use another folder") from error
    return DiffusersDenoiser(model.eval().requires_grad_(False))


def variant_of(folder: Path) -> str | None:
    """None for weights under their plain name, else the variant that there is (fp16)."""
    names = {p.name for p in folder.glob("*") if p.suffix in (".safetensors", ".bin")}
    return "fp16" if names and all(".fp16" in name for name in names) else None


def read(folder: Path) -> DiffusersDenoiser:
    """The denoiser of a folder with config.json and weights, in float32. Raises CheckpointError."""
    config = read_json(folder / "config.json")
    kind = class_of(config.get("_class_name"), folder / "config.json")
    try:
        model, told = kind.from_pretrained(
            folder,
            variant=variant_of(folder),
            torch_dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
        )
        types = dict(_types(folder))
    except Exception as error:  # whatever the libraries raise for files that are not whole
        raise failure(
            folder, f"holds no whole {kind.__name__}: {error}", "download it again"
        ) from error
    for name, value in model.named_parameters():
        if value.is_meta or not torch.isfinite(value).all():
            what = f"tensor {name} is missing, NaN or infinite"
            raise failure(folder, what, "download it again")
    # Both are signs of weights that are quantized already, which diffusers would take as they are.
    for name in sorted(told["unexpected_keys"]):
        raise failure(folder, f"tensor {name} has no place in {kind.__name__}", FULL_PRECISION)
    for name, of in types.items():
        if of not in FLOATS:
            raise failure(folder, f"tensor {name} is of type {printable(of, 20)}", FULL_PRECISION)
    return DiffusersDenoiser(model.eval().requires_grad_(False))


def _types(folder: Path) -> Iterator[tuple[str, str]]:
    """(name, type) of each tensor in the files of safetensors that diffusers reads."""
    stem = "diffusion_pytorch_model"
    names = ("[.-]fp16*",) if variant_of(folder) else ("", "-*")
    for file in (f for name in names for f in folder.glob(f"{stem}{name}.safetensors")):
        with safetensors.safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, it is no mapping
                yield name, tensors.get_slice(name).get_dtype()
