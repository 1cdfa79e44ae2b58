"""Pass keys: can the model still find a number that was hidden in its context?

Wording and protocol are those for which the full cache of small models recalls every key: a 5-digit key in prose, a
chat question, an answer begun by us. The context is compressed before the question is seen; greedy generation must
give the key token for token. ``multikey`` hides four labelled keys and asks for one.

The question may be compressed with the context as well: at its end, where the last queries know what is asked for, or
as its start, where a method that looks at the last queries must do without. Or it is the second one: a first question,
about something else, is compressed with its answer, so that the last queries know of another matter.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvtool.errors import InputError
from kvtool.evaluate.intervals import clopper_pearson
from kvtool.evaluate.measure import begin_of_text

Question = Literal["after", "end", "start", "second"]
DEPTHS = tuple(i / 10 for i in range(11))
_SNAP = 80  # tokens that a needle moves back to stand after a sentence

_INTRO = (
    "A secret pass key is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about it afterwards.\n\n"
)
_NEEDLE = "\n\nThe secret pass key is: {key}. Remember it. The secret pass key is: {key}.\n\n"
_QUESTION = "\n\nWhat is the secret pass key mentioned in the provided text?"
_ANSWER = "The secret pass key is:"
_FIRST = "\n\nIn which language is the provided text written?"
_FIRST_ANSWER = "The provided text is written in English."

_MULTI_INTRO = (
    "Several secret pass keys are hidden within the following text. Make sure to memorize them. "
    "I will quiz you about one of them afterwards.\n\n"
)
_MULTI_NEEDLE = "\n\nThe secret pass key for {label} is: {key}.\n\n"
_MULTI_QUESTION = "\n\nWhat is the secret pass key for {label} mentioned in the provided text?"
_MULTI_ANSWER = "The secret pass key for {label} is:"
_LABELS = (
    "Lisbon", "Warsaw", "Kyoto", "Geneva", "Montreal", "Budapest", "Sophie", "Gregory", "Norman", "Beatrice",
    "wolf", "salmon", "penguin", "turquoise", "maroon", "ladder", "piano", "wagon", "lagoon", "orchard",
)  # fmt: skip
_KEYS = 4


@dataclass(frozen=True)
class Prompt:
    """One trial as token ids: ``context`` is compressed, then ``question`` is read, then ``answer`` is expected."""

    context: list[int]
    question: list[int]
    answer: list[int]
    depth: float
    key: str


class Outcome(NamedTuple):
    """Whether the key came out, and by how much: the least margin of an answer token over the best other, in logits."""

    hit: bool
    margin: float


class Recall(NamedTuple):
    """Outcomes of all trials. low, high: Clopper-Pearson, 95 %. by_depth: depth to (hits, trials)."""

    hits: int
    trials: int
    low: float
    high: float
    by_depth: dict[float, tuple[int, int]]
    median_margin: float


def parse_question(text: str) -> Question:
    """Where the question stands.

    Raises:
        InputError: anything but after, end, start or second.
    """
    for name in get_args(Question):
        if text == name:
            return name
    raise InputError(f"--passkey-question {text}: expected after, end, start or second")


def make_prompts(
    tokenizer: Any,
    haystack: Sequence[int],
    *,
    context: int,
    trials: int,
    seed: int,
    multikey: bool = False,
    question: Question = "after",
) -> list[Prompt]:
    """``trials`` prompts of exactly ``context`` tokens, answer included, at depths from 0 to 1.

    Raises:
        InputError: the context is too short for the question, or the haystack for the context.
    """
    rng = random.Random(f"{seed} {context} {multikey}")
    depths = [DEPTHS[i % 11] for i in range(trials)] if trials >= 11 else _spread(trials)
    return [_prompt(tokenizer, haystack, context, depth, rng, multikey, question) for depth in depths]


def answer(model: PreTrainedModel, cache: Cache, prompt: Prompt, *, chunk: int) -> Outcome:
    """Read the question, then see whether greedy generation gives the key, ``chunk`` tokens a pass.

    The key is generated as a draft that is verified: it comes out exactly if each of its tokens is the most likely one
    after the question and those before it. ``chunk=1`` takes the steps one by one, as serving does.
    """
    read, expected = prompt.question + prompt.answer[:-1], torch.tensor(prompt.answer, device=model.device)
    kept = []
    for ids in torch.tensor([read], device=model.device).split(chunk, 1):
        kept.append(model(ids, past_key_values=cache, use_cache=True, logits_to_keep=len(expected)).logits[0])
    logits = torch.cat(kept)[-len(expected) :].float()
    wanted = logits.gather(-1, expected[:, None])[:, 0]
    margin = (wanted - logits.scatter(-1, expected[:, None], -torch.inf).amax(-1)).min().item()
    return Outcome(margin > 0, margin)


def recall(prompts: Sequence[Prompt], outcomes: Sequence[Outcome]) -> Recall:
    """The summary of all trials."""
    by_depth: dict[float, tuple[int, int]] = {}
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        hits, trials = by_depth.get(prompt.depth, (0, 0))
        by_depth[prompt.depth] = (hits + outcome.hit, trials + 1)
    hits = sum(outcome.hit for outcome in outcomes)
    low, high = clopper_pearson(hits, len(outcomes))
    margins = sorted(outcome.margin for outcome in outcomes)
    return Recall(hits, len(outcomes), low, high, dict(sorted(by_depth.items())), margins[len(margins) // 2])


def _spread(trials: int) -> list[float]:
    return [0.5] if trials == 1 else [DEPTHS[round(10 * i / (trials - 1))] for i in range(trials)]


def _prompt(
    tokenizer: Any,
    haystack: Sequence[int],
    context: int,
    depth: float,
    rng: random.Random,
    multikey: bool,
    asked: Question,
) -> Prompt:
    before, between = _chat(tokenizer)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    key = str(rng.randint(10000, 99999))
    needles = [(depth, _NEEDLE.format(key=key))]
    intro, question, begun = _INTRO, _QUESTION, _ANSWER
    if multikey:
        labels = rng.sample(_LABELS, _KEYS)
        others = [(rng.random(), label, str(rng.randint(10000, 99999))) for label in labels[1:]]
        needles = [(d, _MULTI_NEEDLE.format(label=n, key=k)) for d, n, k in [(depth, labels[0], key), *others]]
        intro, question, begun = _MULTI_INTRO, _MULTI_QUESTION, _MULTI_ANSWER
        question, begun = question.format(label=labels[0]), begun.format(label=labels[0])
    # a chat template spells out its first token itself
    first = question.strip() + "\n\n" if asked == "start" else ""
    head = ([] if before else begin_of_text(tokenizer)) + encode(before + first + intro)
    turn = _next_turn(tokenizer) if asked == "second" else ""
    # what is compressed after the haystack, and what is read once it is
    last, tail = {
        "after": ([], encode(question + between + begun)),
        "end": (encode(question + between), encode(begun)),
        "start": (encode(between), encode(begun)),
        "second": (encode(_FIRST + between + _FIRST_ANSWER + turn), encode(question.strip() + between + begun)),
    }[asked]
    expected = encode(begun + " " + key)[len(encode(begun)) :]
    hidden = [(d, encode(text)) for d, text in needles]
    room = context - len(head) - len(last) - len(tail) - len(expected) - sum(len(ids) for _, ids in hidden)
    if room < 1:
        raise InputError(f"--passkey-context {context}: the question alone takes {context - room} tokens; use more")
    if room > len(haystack):
        raise InputError(
            f"--passkey-context {context}: the haystack has only {len(haystack)} tokens; name a longer --haystack"
        )
    start = rng.randrange(len(haystack) - room + 1)
    hay = list(haystack[start : start + room])
    return Prompt(head + _hide(tokenizer, hay, hidden) + last, tail, expected, depth, key)


def _chat(tokenizer: Any) -> tuple[str, str]:
    """What stands before the user's words and between them and the answer."""
    if not getattr(tokenizer, "chat_template", None):
        return "", "\n"
    mark = "@kvtool@"
    messages = [{"role": "user", "content": mark}]
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    before, _, between = whole.partition(mark)
    return before, between


def _next_turn(tokenizer: Any) -> str:
    """What stands between an answer and the user's next words."""
    if not getattr(tokenizer, "chat_template", None):
        return "\n\n"
    marks = ("@kvtool0@", "@kvtool1@", "@kvtool2@")
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    whole: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return whole.partition(marks[1])[2].partition(marks[2])[0]


def _hide(tokenizer: Any, hay: list[int], hidden: Sequence[tuple[float, list[int]]]) -> list[int]:
    """The haystack with the needles at their depths, each moved back to the end of a sentence if one is near."""
    placed = sorted((_after_sentence(tokenizer, hay, round(depth * len(hay))), ids) for depth, ids in hidden)
    ids, position = [], 0
    for cut, needle in placed:
        ids += hay[position:cut] + needle
        position = cut
    return ids + hay[position:]


def _after_sentence(tokenizer: Any, hay: list[int], cut: int) -> int:
    if cut in (0, len(hay)):
        return cut
    for j in range(cut, max(0, cut - _SNAP), -1):
        if tokenizer.decode([hay[j - 1]]).rstrip().endswith((".", "!", "?")):
            return j
    return cut
