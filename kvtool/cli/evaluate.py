"""``kvtool eval``: what calibrations cost in quality, beside the full cache and the usual baselines."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvtool.cli.output import emit, progress, talk
from kvtool.errors import InputError, ModelError

if TYPE_CHECKING:
    from kvtool.evaluate.contestants import Contestant
    from kvtool.evaluate.run import Corpus
    from kvtool.models import LoadedModel


def evaluate(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL|CALIBRATION",
            help="Calibrations (.safetensors), and before them a model. Without them: the newest, and its own model.",
            show_default=False,
        ),
    ] = None,
    baselines: Annotated[
        str, typer.Option(help="Rows to compare with: full, fp8, int8, kivi4, kivi2, exact; or none.")
    ] = "full,fp8,int8,kivi4,kivi2",
    tasks: Annotated[
        str, typer.Option(help="kld, passkey, multikey (four labelled keys, one asked for).")
    ] = "kld,passkey",
    prefix: Annotated[str, typer.Option(help="Tokens compressed before scoring.")] = "2k",
    score: Annotated[str, typer.Option(help="Tokens scored after the prefix.")] = "512",
    segments: Annotated[int, typer.Option(min=1, help="Stretches of text; errors are over segments.")] = 8,
    chunk: Annotated[str, typer.Option(help="Tokens scored in one pass; they see each other exactly.")] = "128",
    text: Annotated[str, typer.Option(help="Text that is scored: a shipped one, heldout, or a file.")] = "heldout",
    generated: Annotated[
        bool, typer.Option("--generated", help="Score what the full cache samples after each prefix, not the text.")
    ] = False,
    passkey_context: Annotated[str, typer.Option(help="Tokens of a pass key prompt, all in all.")] = "4k",
    passkey_trials: Annotated[int, typer.Option(min=1, help="Prompts, at depths from 0 to 100 %.")] = 22,
    passkey_question: Annotated[
        str,
        typer.Option(
            help="Asked after compression, compressed with the context, or in a second turn: after, end, start, second."
        ),
    ] = "after",
    haystack: Annotated[str, typer.Option(help="Text the pass key is hidden in.")] = "austen",
    sinks: Annotated[
        int | None,
        typer.Option(min=0, help="Exact first tokens, instead of the calibration's own.", show_default=False),
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=0, help="Exact recent tokens, likewise.", show_default=False)
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, reference, triton or gluon.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Of a hub model.", show_default=False)] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the pass keys, and of --generated.")] = 42,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(help="Exit 1 if a calibration is so: 'kld>0.05', 'passkey<0.95'. Repeatable.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Also write the rows: Markdown if it ends in .md, else JSON lines.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per row.")] = False,
) -> None:
    """Score calibrations against the full cache: drift on held-out text, and pass keys found.

    The prefix is prefilled exactly, then held compressed; what follows reads it back from the compressed cache.
    Exit 1 if a gate fails, or if a lossy cache shows no drift at all, for then it was not read.

    Example: `kvtool eval --fail-if 'kld>0.05'`
    """
    from kvtool import home, units
    from kvtool.evaluate.contestants import from_files, parse_baselines
    from kvtool.evaluate.gates import parse_gates
    from kvtool.evaluate.passkey import parse_question
    from kvtool.evaluate.run import TASKS, Protocol
    from kvtool.evaluate.run import evaluate as run
    from kvtool.evaluate.table import markdown, table
    from kvtool.methods import suggest
    from kvtool.models import load_model

    gates = parse_gates(fail_if or [])
    chosen = tuple(dict.fromkeys(task.strip() for task in tasks.lower().split(",")))
    for task in chosen:
        if task not in TASKS:
            raise InputError(f"--tasks: no task '{task}'; {suggest(task, TASKS)}")
    protocol = Protocol(
        tasks=chosen,
        prefix=units.parse_tokens(prefix),
        score=units.parse_tokens(score),
        segments=segments,
        chunk=units.parse_tokens(chunk),
        generated=generated,
        passkey_context=units.parse_tokens(passkey_context),
        passkey_trials=passkey_trials,
        passkey_question=parse_question(passkey_question),
        seed=seed,
        backend=backend,
    )
    model, paths = _split(what or [])
    if not paths:
        paths = [home.newest("calibration", "kvtool calibrate")]
        talk.print(f"calibration: {paths[0]}")
    tested = from_files(paths, sinks=sinks, window=window)
    assert tested[0].calibration is not None
    made_for, named = tested[0].calibration.provenance, model is not None
    if not named:
        model, revision = made_for.get("model"), revision or made_for.get("revision")
    try:
        loaded = load_model(model, revision=revision, trust_remote_code=trust_remote_code, device=device, dtype=dtype)
    except ModelError as error:
        # an artifact knows a local model by the last part of its path only
        raise error if named else ModelError(f"{error}; or name it: 'kvtool eval MODEL {paths[0]}'") from None
    contestants = parse_baselines(baselines, loaded.shape) + tested
    scored, hay = _corpus(loaded, text), _corpus(loaded, haystack)
    _warn_fitted(tested, loaded, scored)
    _warn_positions(loaded, protocol.prefix + protocol.score if "kld" in chosen else 0)
    _warn_positions(loaded, protocol.passkey_context if chosen != ("kld",) else 0)
    with progress("evaluating") as report:
        result = run(
            loaded,
            contestants,
            protocol,
            text=scored,
            haystack=hay,
            progress=report,
        )
    if out is not None:
        body = markdown(result.rows) if out.suffix == ".md" else "".join(f"{json.dumps(row)}\n" for row in result.rows)
        out.parent.mkdir(parents=True, exist_ok=True)
        home.write_atomically(out, body)
        talk.print(f"written: {out}")
    emit(result.rows, lambda: table(result.rows), as_json=as_json)
    if result.stopped is not None:
        raise type(result.stopped)("stopped; the rows hold the segments and prompts that all had finished") from None
    tested_rows = [row for row in result.rows if row["kind"] == "calibration"]
    failures = [failure for gate in gates for row in tested_rows if (failure := gate.failure(row))]
    for failure in result.problems + failures:
        talk.print(f"failed: {failure}")
    if result.problems or failures:
        raise typer.Exit(1)


def _split(what: list[str]) -> tuple[str | None, list[Path]]:
    """The model, if the first word is one, and the calibrations."""
    if what and not what[0].endswith(".safetensors"):
        return what[0], [Path(name) for name in what[1:]]
    return None, [Path(name) for name in what]


def _corpus(loaded: "LoadedModel", name: str) -> "Corpus":
    from hashlib import sha256

    from kvtool import texts
    from kvtool.evaluate.run import Corpus

    name = {"heldout": texts.HELDOUT, "calibration": texts.CALIBRATION}.get(name, name)
    text = texts.load(name)
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    return Corpus(name, sha256(text.encode()).hexdigest(), ids)


def _warn_fitted(tested: "list[Contestant]", loaded: "LoadedModel", scored: "Corpus") -> None:
    for one in tested:
        provenance = {} if one.calibration is None else one.calibration.provenance
        if provenance.get("text") == scored.name:
            talk.print(
                f"warning: {one.name} was fitted to {scored.name}, the text it is scored on: too good to be true"
            )
        if provenance.get("fingerprint", loaded.fingerprint) != loaded.fingerprint:
            talk.print(f"warning: {one.name} was fitted to other weights ({provenance.get('model')}) of the same shape")


def _warn_positions(loaded: "LoadedModel", tokens: int) -> None:
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if limit and tokens > limit:
        talk.print(f"warning: {tokens} tokens, but {loaded.name} was made for {limit}: its full cache fails there too")
