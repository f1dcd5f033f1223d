"""Names of models of the Hugging Face hub, and texts that name neither these nor a path."""

import re

from .checkpoint_files import CheckpointError, failure

PART = r"[A-Za-z0-9][\w.-]{0,95}"
HUB_ID = re.compile(f"{PART}/{PART}", re.ASCII)
OF_FILES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors", ".zip", ".gguf", ".yaml", ".npz")
# As people copy it from an address, or as a shell completes it.
OTHER_SPELLING = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://|\./)?"
    rf"(?P<id>{PART}/{PART})(?:(?:@|/tree/)(?P<revision>[\w.-]+))?/*",
    re.ASCII,
)


def is_hub_id(text: str) -> bool:
    """OWNER/NAME, as the hub names its models; a path of a file of weights is none."""
    return HUB_ID.fullmatch(text) is not None and not text.lower().endswith(OF_FILES)


def no_path(text: str) -> CheckpointError | None:
    """The error of a text that cannot be meant as a path: a model of the hub in another spelling,
    or an address. None for a path."""
    found = OTHER_SPELLING.fullmatch(text.strip())
    if found is not None and is_hub_id(found["id"]):
        advice = f"a model of the Hugging Face hub is named OWNER/NAME: --ckpt {found['id']}"
        if found["revision"]:
            options = f"--revision {found['revision']} --local-dir FOLDER"
            advice = f"get it with hf download {found['id']} {options}, and name that folder"
        return failure(text, "no such file or folder", advice)
    if "://" in text:
        return failure(text, "is an address", "download it and name the file or folder")
    return None
