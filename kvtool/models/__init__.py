"""Models: the built-in ones, a local directory, a GGUF file or a Hugging Face hub id, behind one function."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kvtool.errors import InputError, ModelError
from kvtool.models.demo import BUILT_IN, DEFAULT, built_in
from kvtool.shapes import CacheShape

__all__ = ["BUILT_IN", "DEFAULT", "LoadedModel", "load_model"]

DTYPES = ("auto", "bfloat16", "float16", "float32")
_SAMPLED = 64  # places at which a large weight file is read for the fingerprint
_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class LoadedModel:
    """A transformers causal language model in evaluation mode, its tokenizer, and what identifies it.

    fingerprint: sha256 over the config and the weights; two loads of the same files agree, whatever the dtype.
    """

    model: Any
    tokenizer: Any
    name: str
    fingerprint: str
    revision: str | None = None

    @cached_property
    def shape(self) -> CacheShape:
        """The model's cache, layer by layer; the first use runs eight tokens through the model."""
        from kvtool.models.geometry import cache_shape

        return cache_shape(self.model)


def load_model(
    name: str | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "auto",
    device: str = "auto",
) -> LoadedModel:
    """Load ``smollm2`` (the default), ``smollm2-32k``, a directory, a ``.gguf`` file or a hub id.

    dtype: ``auto`` is bfloat16 on cuda and the config's own elsewhere.
    device: ``auto`` is cuda if there is one.

    Raises:
        ModelError: the model is not there, cannot be read, or is no causal language model.
        InputError: an unknown dtype or device.
    """
    name = name or DEFAULT
    where = _device(device)
    if dtype not in DTYPES:
        raise InputError(f"dtype '{dtype}': expected one of {', '.join(DTYPES)}")
    path = _locate(name, revision)
    with _quiet():
        model, tokenizer = _load(path, name, dtype, where, trust_remote_code)
    return LoadedModel(model, tokenizer, _short(name, path), fingerprint(path), revision)


def fingerprint(path: Path) -> str:
    """sha256 over config.json, and over size, start, end and 64 places between of every weight file."""
    digest = hashlib.sha256()
    config = json.loads((path / "config.json").read_text())
    # where it was loaded from and by which version says nothing about the model
    config = {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps(config, sort_keys=True).encode())
    for file in sorted(path.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as weights:
            for i in range(_SAMPLED + 1):
                weights.seek(max(0, size - _SAMPLE_BYTES) * i // _SAMPLED)
                digest.update(weights.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _device(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device '{device}': not usable here ({reason}); use cpu, cuda or auto") from error
    return device


def _locate(name: str, revision: str | None) -> Path:
    """The local directory that holds the model."""
    if name in BUILT_IN:
        return built_in(name)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{name}: no such GGUF file")
        return _converted(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name}: not a model directory: it holds no config.json")
        return path
    if path.exists():
        raise ModelError(f"{name}: expected a model directory or a .gguf file")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelError(f"{name}: no such directory, no built-in model ({', '.join(BUILT_IN)}) and no hub id")
    return _download(name, revision)


def _converted(path: Path) -> Path:
    """A GGUF file's model directory under ``$KVTOOL_HOME``, made on first use."""
    from kvtool.home import home
    from kvtool.models.demo import once
    from kvtool.models.gguf import convert

    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    return once(home() / "models" / f"{path.stem}-{key}", lambda into: convert(path, into))


def _download(name: str, revision: str | None) -> Path:
    """Fetch from the hub, or find it in the hub's own cache when there is no network."""
    import huggingface_hub
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.py", "*.txt", "*.model"]
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    except RepositoryNotFoundError as error:
        raise ModelError(f"{name}: no such directory, and no such model on the hub (or it needs a login)") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{name}: the hub has no revision '{revision}' of it") from error
    except HFValidationError as error:
        raise ModelError(f"{name}: no such directory, and not a valid hub id") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"{name}: no such directory, and the hub cannot be reached; download it first or use {DEFAULT}"
        ) from error


def _load(path: Path, name: str, dtype: str, device: str, trust_remote_code: bool) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    chosen: Any = "auto" if dtype == "auto" else getattr(torch, dtype)
    if dtype == "auto" and device.startswith("cuda"):
        chosen = torch.bfloat16
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=chosen, use_safetensors=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{name}: transformers cannot load it: {reason}") from error
    return model.eval().requires_grad_(False).to(device), tokenizer


def _short(name: str, path: Path) -> str:
    """The hub id or built-in name as given; of a path the last part."""
    return path.resolve().name if Path(name).expanduser().exists() and name not in BUILT_IN else name


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and advice off stderr; ``$TRANSFORMERS_VERBOSITY`` still has its say."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
