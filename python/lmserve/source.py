"""Where a model is: what MODEL on the command line means, as a path here and the names it is served under."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lmserve.assets import ASSETS, MINILM, SMOLLM2, AssetError, Progress, fetch
from lmserve.model import gguf_source
from lmserve.model.generation_defaults import NONE, GenerationDefaults

# The name in the examples of LMDeploy's API: its clients reach the default model without a change.
LMDEPLOY_NAME: Final = "internlm-chat-7b"
ALIASES: Final[Mapping[str, tuple[str, ...]]] = {SMOLLM2.name: (LMDEPLOY_NAME,), MINILM.name: ()}
# SmolLM2's model card, whose GGUF file says nothing of it; the length of a reply is that of LMDeploy's server.
PUBLISHED: Final[Mapping[str, GenerationDefaults]] = {
    SMOLLM2.name: GenerationDefaults("its model card", temperature=0.2, top_p=0.9, max_tokens=512)
}
HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES: Final = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt")


class SourceError(Exception):
    """There is no model where the command line says."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A GGUF file or a Hugging Face folder, and the names it is served under, the reported one first."""

    path: Path
    names: tuple[str, ...]
    published: GenerationDefaults = NONE  # what the publisher of a bundled model samples with


def find_model(model: str | None, progress: Progress | None = None) -> ModelSource:
    """What `model` names, in this order: nothing (the default model), a path, a bundled model's name, a hub id.

    Raises SourceError if it is none of these or cannot be fetched.
    """
    if model is None:
        return _bundled(SMOLLM2.name, progress)
    path = Path(model).expanduser()
    if path.exists():
        return ModelSource(path, (_name_of(path),))
    if model in ASSETS:
        return _bundled(model, progress)
    if HUB_ID.fullmatch(model):
        return ModelSource(_from_hub(model), (model,))
    known = ", ".join(ASSETS)
    raise SourceError(
        f"{model!r} is not a file or folder here, not a hub id (owner/name), and not one of the models {known}"
    )


def _bundled(name: str, progress: Progress | None) -> ModelSource:
    try:
        return ModelSource(fetch(ASSETS[name], progress), (name, *ALIASES[name]), PUBLISHED.get(name, NONE))
    except AssetError as error:
        raise SourceError(str(error)) from error


def _name_of(path: Path) -> str:
    path = path.resolve()
    if path.is_dir():
        return path.name
    if path.suffix != ".gguf":
        raise SourceError(f"{path} is neither a GGUF file (*.gguf) nor a folder with config.json")
    return gguf_source.name_of(path)


def _from_hub(model: str) -> Path:
    """The model's folder in huggingface_hub's own cache, downloaded first where it is not there."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=list(HUB_FILES)))
    except (errors.RepositoryNotFoundError, errors.GatedRepoError) as error:
        reason = f"the hub has no model {model}, or it needs a login (hf auth login): {_first_line(error)}"
        raise SourceError(reason) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        reason = f"{model} is not in the hub's cache here, and the hub cannot be reached: {_first_line(error)}"
        raise SourceError(f"{reason}. Give a GGUF file or a Hugging Face folder instead") from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")
