"""The whole evaluation: every contestant on the same segments and the same prompts, one row each."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from kvtool.cache import CacheBytes
from kvtool.errors import InputError
from kvtool.evaluate import rows as row
from kvtool.evaluate.contestants import Contestant
from kvtool.evaluate.kld import drift
from kvtool.evaluate.measure import (
    Tally,
    begin_of_text,
    continue_segments,
    notes_of,
    problems,
    score_segment,
    take_segments,
)
from kvtool.evaluate.passkey import Outcome, Question, answer, make_prompts, recall
from kvtool.evaluate.reference import PREFILL_CHUNK, Store, fork, own_prefill, segments
from kvtool.evaluate.rows import Row
from kvtool.fitting import mean_notes
from kvtool.models import LoadedModel
from kvtool.runtime import exact_prefill, serve

TASKS = ("kld", "passkey", "multikey")


@dataclass(frozen=True)
class Protocol:
    """What is measured and how; part of every row.

    prefix: tokens compressed before scoring. score: tokens scored after them. segments: stretches of text.
    chunk: tokens scored in one forward pass; within it they see each other exactly, afterwards as the cache keeps them.
    generated: what is scored was sampled from the full cache after each prefix, instead of read from the text.
    passkey_question: ``after`` the context is compressed, or with it: at its ``end`` or as its ``start``;
        or ``second``, after a first one about something else was compressed with it.
    """

    tasks: tuple[str, ...] = ("kld", "passkey")
    prefix: int = 2048
    score: int = 512
    segments: int = 8
    chunk: int = 128
    generated: bool = False
    passkey_context: int = 4096
    passkey_trials: int = 22
    passkey_question: Question = "after"
    seed: int = 42
    backend: str = "auto"


class Corpus(NamedTuple):
    """A text as tokens. sha256: of the text, so that two runs can be told to be comparable."""

    name: str
    sha256: str
    ids: list[int]


class Result(NamedTuple):
    """rows: sorted by bits. problems: reasons not to believe them; any makes the run a failed check.

    stopped: the interrupt that ended it early; the rows then hold what all contestants had finished.
    """

    rows: list[Row]
    problems: list[str]
    stopped: KeyboardInterrupt | None = None


def evaluate(
    loaded: LoadedModel,
    contestants: Sequence[Contestant],
    protocol: Protocol,
    *,
    text: Corpus,
    haystack: Corpus,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    """Measure ``contestants``, the full cache among them, by ``protocol``.

    Raises:
        InputError: the text is too short, or nothing would be compressed.
        CalibrationError: an artifact does not fit the model.
    """
    if all(one.calibration is None for one in contestants):
        raise InputError("nothing to compare with the full cache; name a calibration or --baselines")
    for one in contestants:
        if one.calibration is not None:
            one.calibration.check_fits(loaded.shape, loaded.name)
    run = _Run(loaded, contestants, protocol, text, haystack, progress)
    with torch.inference_mode():
        for task in sorted(protocol.tasks, key=lambda task: task != "kld"):
            if run.stopped is None:
                run.measure(task)
    ordered = sorted(run.rows.values(), key=lambda row: (row["bits"], row["name"]))
    row.mark_pareto(ordered)
    return Result(ordered, run.problems, run.stopped)


class _Run:
    """The state of one evaluation: rows that fill up."""

    def __init__(
        self,
        loaded: LoadedModel,
        contestants: Sequence[Contestant],
        protocol: Protocol,
        text: Corpus,
        haystack: Corpus,
        progress: Callable[[int, int], None],
    ) -> None:
        self.loaded, self.model, self.contestants, self.protocol = loaded, loaded.model, contestants, protocol
        self.text, self.haystack, self.progress = text, haystack, progress
        self.compressed = [one for one in contestants if one.calibration is not None]
        tasks = {"kld": protocol.segments} | dict.fromkeys(TASKS[1:], protocol.passkey_trials)
        self.queries = max((one.calibration.method.looks_back for one in self.compressed if one.calibration), default=1)
        self.total, self.done = sum(tasks[task] for task in protocol.tasks) * (1 + len(self.compressed)), 0
        dtype, device = str(self.model.dtype).removeprefix("torch."), self.model.device
        self.setting = {"model_fingerprint": loaded.fingerprint, "dtype": dtype, "device": device.type}
        common = {"model": loaded.name, **self.setting, "text": text.name, "text_sha256": text.sha256}
        common |= {"haystack": haystack.name, "haystack_sha256": haystack.sha256}
        common |= asdict(protocol) | {"tasks": list(protocol.tasks), "versions": row.versions()}
        del common["backend"]  # asked for; the row's own says which was chosen
        self.rows: dict[str, Row] = {one.name: row.describe(one) | common for one in contestants}
        self.problems: list[str] = []
        self.finished: list[str] = []
        self.stopped: KeyboardInterrupt | None = None

    def measure(self, task: str) -> None:
        """One task. If it is interrupted, what is done of it counts; with nothing done at all, so be it."""
        done = self.drift() if task == "kld" else self.recall(task)
        if done:
            self.finished.append(task)
        if self.stopped is not None:
            if not self.finished:
                raise self.stopped
            for one in self.rows.values():
                one["tasks"] = list(self.finished)

    def step(self) -> None:
        self.done += 1
        self.progress(self.done, self.total)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """An interrupt ends what is within, and what was done of it counts."""
        try:
            yield
        except KeyboardInterrupt as stop:
            self.stopped = stop

    def drift(self) -> int:
        """The task kld; how many segments were scored."""
        protocol, model = self.protocol, self.model
        length, bos = protocol.prefix + protocol.score + 1, begin_of_text(self.loaded.tokenizer)
        ids = take_segments(self.text.ids, count=protocol.segments, length=length, bos=bos)
        if protocol.generated:
            ids = continue_segments(model, ids, prefix=protocol.prefix, seed=protocol.seed)
        what = {"task": "kld", "ids": _hash(ids.tolist()), "prefix": protocol.prefix, "chunk": protocol.chunk}
        store = Store.of(**what, **self.setting, queries=self.queries)
        tallies, done = {one.name: Tally() for one in self.compressed}, 0
        with self.interruptible():
            for segment in segments(
                model, ids.to(model.device), store, prefix=protocol.prefix, chunk=protocol.chunk, queries=self.queries
            ):
                self.step()
                for one in self.compressed:
                    tally = tallies[one.name]
                    score_segment(model, one, segment, tally, chunk=protocol.chunk, backend=protocol.backend)
                    self.step()
                done += 1
        if not done:
            return 0
        for one in self.compressed:
            tally = tallies[one.name]
            size, measured = tally.nbytes, drift(tally.scores[:done], protocol.prefix)
            assert size is not None
            self.rows[one.name] |= (
                row.drift_row(measured) | row.tally_row(tally) | row.bytes_row(size, compressed=not one.lossless)
            )
            self.problems += problems(one, tally)
        for one in self.contestants:
            if one.calibration is None:
                assert size is not None
                self.rows[one.name] |= row.full_row(measured) | row.bytes_row(size, compressed=False)
            self.rows[one.name]["segments"] = done
        return done

    def recall(self, task: str) -> int:
        """The tasks passkey and multikey; how many prompts were answered by all.

        The full cache answers each prompt first; its answers are kept by hash.
        """
        protocol, model = self.protocol, self.model
        prompts = make_prompts(
            self.loaded.tokenizer,
            self.haystack.ids,
            context=protocol.passkey_context,
            trials=protocol.passkey_trials,
            seed=protocol.seed,
            multikey=task == "multikey",
            question=protocol.passkey_question,
        )
        store = Store.of(
            task=task, prompts=_hash([asdict(prompt) for prompt in prompts]), chunk=protocol.chunk, **self.setting
        )
        outcomes: dict[str, list[Outcome]] = {one.name: [] for one in self.contestants}
        sizes: dict[str, CacheBytes] = {}
        notes: dict[str, list[dict[str, float]]] = {one.name: [] for one in self.compressed}
        full: list[Outcome] = []
        done = 0
        with self.interruptible():
            for i, prompt in enumerate(prompts):
                ids = torch.tensor([prompt.context], device=model.device)
                prefill = exact_prefill(model, ids, last_queries=self.queries, chunk=PREFILL_CHUNK)
                known = store.load(str(i))
                if known is None:
                    outcome = answer(model, fork(prefill.cache), prompt, chunk=protocol.chunk)
                    store.save(
                        str(i), {"outcome": torch.tensor([float(outcome.hit), outcome.margin], dtype=torch.float64)}
                    )
                else:
                    outcome = Outcome(bool(known["outcome"][0]), known["outcome"][1].item())
                full.append(outcome)
                self.step()
                for one in self.compressed:
                    assert one.calibration is not None
                    adopted = own_prefill(model, one.calibration, ids, prefill)
                    with serve(model, one.calibration, backend=protocol.backend) as cache:
                        cache.adopt(adopted)
                        sizes[one.name] = cache.nbytes()
                        notes[one.name] += notes_of(cache)
                        outcomes[one.name].append(answer(model, cache, prompt, chunk=protocol.chunk))
                    self.rows[one.name]["backend"] = cache.backend.name
                    self.step()
                done += 1
        if not done:
            return 0
        for one in self.contestants:
            answers = full if one.calibration is None else outcomes[one.name]
            found = recall(prompts[:done], answers[:done])
            own = None if one.lossless else sizes[one.name]
            self.rows[one.name] |= row.recall_row(task, found, own, protocol.passkey_context)
            self.rows[one.name].setdefault("notes", mean_notes(notes.get(one.name, ())))
            if "bits" not in self.rows[one.name]:
                cost = sizes.get(one.name) or next(iter(sizes.values()))
                self.rows[one.name] |= row.bytes_row(cost, compressed=not one.lossless)
        return done


def _hash(what: Any) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()
