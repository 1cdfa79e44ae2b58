"""``kvtool generate``: a model speaking from its compressed cache."""

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtool.cli.output import emit, talk
from kvtool.units import format_bytes

if TYPE_CHECKING:
    from kvtool.generation import Generated


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue or the question; '-' reads it from stdin.")],
    calibration: Annotated[
        Path | None, typer.Option(help="An artifact. Without it: the newest one.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Without it: the model the artifact was made for.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after as many.")] = 128,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="As a turn of a chat, or as it is. Default: a chat if the model has one.",
            show_default=False,
        ),
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, reference, triton or gluon.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Of a hub model.", show_default=False)] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also generate from the full cache, and say where they part.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the text.")] = False,
) -> None:
    """Generate greedily from the compressed cache, and say what the cache cost.

    Example: `kvtool generate "Why is the sky blue?" --compare`
    """
    from kvtool import generation, home
    from kvtool.calibration import Calibration
    from kvtool.models import load_model

    path = calibration or home.newest("calibration", "kvtool calibrate")
    artifact = Calibration.load(path)
    if calibration is None:
        talk.print(f"calibration: {path}")
    text = sys.stdin.read() if prompt == "-" else prompt
    model = model or artifact.provenance.get("model")
    loaded = load_model(model, revision=revision, trust_remote_code=trust_remote_code, dtype=dtype, device=device)
    ids = generation.encode(loaded, text, chat=chat)
    _warn_positions(loaded.model, ids.shape[1] + max_new_tokens)

    def run(calibration: Calibration | None) -> "tuple[Generated, float]":
        show = None if as_json else lambda piece: print(piece, end="", flush=True)
        begin = time.perf_counter()
        made = generation.generate(
            loaded, ids, calibration, max_new_tokens=max_new_tokens, backend=backend, on_text=show
        )
        if not as_json:
            print()
        return made, time.perf_counter() - begin

    served, seconds = run(artifact)
    record: dict[str, Any] = {"calibration": str(path), "method": artifact.method.name, "model": loaded.name}
    record |= asdict(served) | {"seconds": round(seconds, 3)}
    ratio = served.full_bytes / served.stored_bytes if served.stored_bytes else 0.0
    talk.print(
        f"{served.prompt_tokens} + {len(served.ids)} tokens in {seconds:.1f} s, {artifact.method.name}, "
        f"{served.backend}: cache {format_bytes(served.stored_bytes)} instead of {format_bytes(served.full_bytes)} "
        f"({ratio:.2f}x), {served.bits_per_value:.2f} bits per value, sinks and window included"
    )
    besides = {"in host memory": served.host_bytes, "on disk": served.disk_bytes}
    if any(besides.values()):
        sizes = [f"{format_bytes(size)} {where}" for where, size in besides.items() if size]
        talk.print(f"besides, originals: {' and '.join(sizes)}")
    if served.stored_bytes >= served.full_bytes:
        talk.print(
            "note: every token still stands among the exact first and recent ones; a longer prompt is compressed"
        )
    if compare:
        talk.print("full cache:")
        full, full_seconds = run(None)
        parted = generation.first_difference(served.ids, full.ids)
        record |= {"full": asdict(full) | {"seconds": round(full_seconds, 3)}, "first_difference": parted}
        same = "the same tokens" if parted is None else f"the first {parted} tokens are the same"
        talk.print(f"{same} as from the full cache ({full_seconds:.1f} s)")
    if as_json:
        emit([record], str, as_json=True)


def _warn_positions(model: Any, tokens: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and tokens > limit:
        talk.print(f"warning: {tokens} tokens, but the model was made for {limit}: its full cache fails there too")
