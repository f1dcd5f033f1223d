"""What a denoiser is told besides x and t: class tokens, text, and classifier-free guidance.

Shapes: B batch, L context tokens (1 for a class, 77 for a text), D context width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

TEXT_TOKENS = 77  # positions of CLIP's text tower, padded with its end token

# CLIP ViT-L/14 where it differs from the defaults of transformers' CLIPTextConfig.
VIT_L_14 = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}


class ClassEmbedder(nn.Module):
    """One context token per class. n_classes counts the null class, which is the last row.

    (Upstream's 1001 for ImageNet: rows 0..999 are the classes, 1000 means "no class".)
    """

    def __init__(self, n_classes: int, embed_dim: int):
        super().__init__()
        self.embedding = nn.Embedding(n_classes, embed_dim)

    @property
    def null_class(self) -> int:
        """The number of the class that stands for none: the last one."""
        return self.embedding.num_embeddings - 1

    def forward(self, labels: torch.Tensor) -> torch.Tensor:  # (B,) int64 -> (B, 1, D)
        return self.embedding(labels)[:, None]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        message = "the CLIP text tower needs transformers: pip install transformers"
        raise ImportError(message) from error
    return transformers


class CLIPTextTower(nn.Module):
    """Text tower of Stable Diffusion v1: the last hidden state of CLIP, after its final norm.

    `config` holds fields of transformers' CLIPTextConfig. Parameter names are those of the
    checkpoint (`transformer.text_model.*`) whatever the version of transformers. Raises ImportError
    without it.
    """

    def __init__(self, config: Mapping[str, Any] = VIT_L_14):
        super().__init__()
        transformers = _transformers()
        tower = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
        # Before version 5 the tower was wrapped in a model that added this level itself.
        text_model = getattr(tower, "text_model", tower)
        self.transformer = nn.ModuleDict({"text_model": text_model})
        # The checkpoints store the numbers of the positions, which newer versions do not.
        embeddings = text_model.embeddings
        embeddings.register_buffer("position_ids", embeddings.position_ids, persistent=True)

    def completed(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint with the numbers of the positions, which are constant: some
        files lack them, others hold them as floats."""
        name = "transformer.text_model.embeddings.position_ids"
        constant = self.state_dict()[name]
        found = state.get(name)
        if found is None or (found.is_floating_point() and torch.equal(found.long(), constant)):
            return dict(state) | {name: constant}
        return dict(state)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # (B, L) int64 -> (B, L, D)
        return self.transformer["text_model"](input_ids=tokens).last_hidden_state


def tokenize(texts: Sequence[str], source: str = "openai/clip-vit-large-patch14") -> torch.Tensor:
    """Texts -> tokens (B, 77) int64, cut or padded. The empty text is the unconditional one.

    source: a folder or hub name with CLIP's vocabulary. Raises ImportError without transformers.
    """
    tokenizer = _transformers().CLIPTokenizer.from_pretrained(source)
    encoded = tokenizer(
        list(texts),
        padding="max_length",
        truncation=True,
        max_length=TEXT_TOKENS,
        return_tensors="pt",
    )
    return encoded["input_ids"]


class PromptTable(nn.Module):
    """The contexts of a list of texts, asked for by number as a ClassEmbedder is by class.

    contexts: (P + 1, L, D), the last row that of the empty text, which stands for "no text".
    """

    contexts: torch.Tensor

    def __init__(self, contexts: torch.Tensor):
        super().__init__()
        self.register_buffer("contexts", contexts)

    @property
    def null_class(self) -> int:
        """The number of the empty text: the last one."""
        return len(self.contexts) - 1

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:  # (B,) int64 -> (B, L, D)
        return self.contexts[numbers]


class GuidedDenoiser:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6) as a callable eps(x, t).

    model(x, t, context) is called once on the doubled batch [uncond, cond], or on the plain one
    when scale is exactly 1. context and uncond_context: (B, L, D). Raises ValueError when a scale
    other than 1 has no unconditional context.
    """

    def __init__(
        self,
        model: Callable[..., torch.Tensor],
        context: torch.Tensor,
        uncond_context: torch.Tensor | None = None,
        scale: float = 1.0,
    ):
        self.model, self.scale, self.context = model, scale, context
        if scale != 1.0:
            if uncond_context is None:
                raise ValueError("guidance needs the unconditional context")
            self.context = torch.cat([uncond_context, context])

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if self.scale == 1.0:
            return self.model(x, t, context=self.context)
        both = self.model(torch.cat([x, x]), torch.cat([t, t]), context=self.context)
        uncond, cond = both.chunk(2)
        return uncond + self.scale * (cond - uncond)
