"""A pass key trial hides one key, asks for it after the context is compressed, and believes only the exact answer."""

import copy
import random

import pytest
import torch

from kvtool.errors import InputError
from kvtool.evaluate.passkey import DEPTHS, Outcome, Prompt, answer, make_prompts, parse_question, recall
from kvtool.runtime import exact_prefill

HAY = "The cat sat on the mat. It was warm there! Was it late? No one knew, and no one asked. "


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return tiny_model.tokenizer


@pytest.fixture(scope="module")
def haystack(tokenizer):
    return tokenizer(HAY * 40)["input_ids"]


@pytest.mark.parametrize("multikey", [False, True])
@pytest.mark.parametrize("context", [700, 1024, 1999])
def test_a_prompt_has_the_length_it_says(tokenizer, haystack, context, multikey):
    for prompt in make_prompts(tokenizer, haystack, context=context, trials=11, seed=0, multikey=multikey):
        assert len(prompt.context) + len(prompt.question) + len(prompt.answer) == context


def test_the_wording(tokenizer, haystack):
    prompt = make_prompts(tokenizer, haystack, context=1024, trials=1, seed=0)[0]
    text = tokenizer.decode(prompt.context)
    assert text.startswith(
        "A secret pass key is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about it afterwards.\n\n"
    )
    key = prompt.key
    assert f"\n\nThe secret pass key is: {key}. Remember it. The secret pass key is: {key}.\n\n" in text
    assert tokenizer.decode(prompt.question) == (
        "\n\nWhat is the secret pass key mentioned in the provided text?\nThe secret pass key is:"
    )
    assert tokenizer.decode(prompt.answer) == f" {key}"


def test_the_needle_stands_at_its_depth_after_a_sentence(tokenizer, haystack):
    prompts = make_prompts(tokenizer, haystack, context=1500, trials=22, seed=3)
    assert sorted({prompt.depth for prompt in prompts}) == list(DEPTHS)
    for prompt in prompts:
        text = tokenizer.decode(prompt.context)
        body = text[text.index("afterwards.\n\n") + len("afterwards.\n\n") :]
        before, _, after = body.partition(f"\n\nThe secret pass key is: {prompt.key}.")
        share = len(before) / (len(before) + len(after))
        # it moves back by at most one sentence of the haystack, and the needle's own rest counts as after
        assert prompt.depth - 0.15 < share <= prompt.depth + 0.01
        if prompt.depth not in (0, 1):
            assert before.endswith((".", "!", "?"))


def test_four_labelled_keys_and_one_asked_for(tokenizer, haystack):
    for prompt in make_prompts(tokenizer, haystack, context=1400, trials=5, seed=1, multikey=True):
        text, question = tokenizer.decode(prompt.context), tokenizer.decode(prompt.question)
        assert text.count("The secret pass key for ") == 4
        label = question.partition("secret pass key for ")[2].partition(" mentioned")[0]
        assert f"The secret pass key for {label} is: {prompt.key}." in text
        assert question.endswith(f"The secret pass key for {label} is:")


@pytest.mark.parametrize("question", ["end", "start"])
def test_a_question_that_is_compressed_with_the_context(tokenizer, haystack, question):
    """The same words in another order, in a prompt of the same length; only the answer's beginning is read later."""
    (after,) = make_prompts(tokenizer, haystack, context=900, trials=1, seed=0)
    (prompt,) = make_prompts(tokenizer, haystack, context=900, trials=1, seed=0, question=question)
    asked = "What is the secret pass key mentioned in the provided text?"
    text = tokenizer.decode(prompt.context)
    assert tokenizer.decode(prompt.question) == "The secret pass key is:"
    assert (prompt.key, prompt.answer) == (after.key, after.answer)
    assert len(prompt.context) + len(prompt.question) + len(prompt.answer) == 900
    assert text.count(asked) == 1
    assert text.strip().endswith(asked) if question == "end" else text.strip().startswith(asked)


def test_a_second_question_comes_after_a_first_one_and_its_answer(tokenizer, haystack):
    (after,) = make_prompts(tokenizer, haystack, context=900, trials=1, seed=0)
    (prompt,) = make_prompts(tokenizer, haystack, context=900, trials=1, seed=0, question="second")
    assert (prompt.key, prompt.answer) == (after.key, after.answer)
    assert len(prompt.context) + len(prompt.question) + len(prompt.answer) == 900
    first = "\n\nIn which language is the provided text written?\nThe provided text is written in English.\n\n"
    assert tokenizer.decode(prompt.context).endswith(first)
    assert tokenizer.decode(prompt.question) == (
        "What is the secret pass key mentioned in the provided text?\nThe secret pass key is:"
    )


def test_turns_are_those_of_the_chat_template(tokenizer, haystack):
    chat = copy.copy(tokenizer)
    chat.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (prompt,) = make_prompts(chat, haystack, context=900, trials=1, seed=0, question="second")
    text = tokenizer.decode(prompt.context + prompt.question)
    assert text.startswith("<user>A secret pass key")
    assert text.endswith(
        "\n\nIn which language is the provided text written?</s><assistant>The provided text is written in English."
        "</s><user>What is the secret pass key mentioned in the provided text?</s><assistant>The secret pass key is:"
    )


def test_an_unknown_place_of_the_question_is_refused():
    with pytest.raises(InputError, match="--passkey-question before: expected after, end, start or second"):
        parse_question("before")


def test_prompts_depend_on_the_seed_alone(tokenizer, haystack):
    make = lambda seed: make_prompts(tokenizer, haystack, context=900, trials=4, seed=seed)  # noqa: E731
    random.seed(0)
    first = make(1)
    random.seed(1)
    assert make(1) == first
    assert make(2) != first


def test_few_trials_still_reach_both_ends(tokenizer, haystack):
    prompts = make_prompts(tokenizer, haystack, context=900, trials=3, seed=0)
    assert [prompt.depth for prompt in prompts] == [0.0, 0.5, 1.0]


def test_what_does_not_fit_is_refused(tokenizer, haystack):
    with pytest.raises(InputError, match=r"--passkey-context 100: the question alone takes \d+ tokens"):
        make_prompts(tokenizer, haystack, context=100, trials=1, seed=0)
    with pytest.raises(InputError, match=r"the haystack has only \d+ tokens; name a longer --haystack"):
        make_prompts(tokenizer, haystack, context=10000, trials=1, seed=0)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_hit_is_what_greedy_generation_gives(tiny_model, tokenizer, chunk):
    model, ids = tiny_model.model, tokenizer(HAY * 2)["input_ids"]
    whole = torch.tensor([ids])
    # a mask of its own: generate() would take the space, token 0, for padding
    mask = torch.ones_like(whole)
    said = model.generate(whole, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    context, question, words = ids[:100], ids[100:], said[0, len(ids) :].tolist()

    def asked(answer_words):
        with torch.inference_mode():
            prompt = Prompt(context, question, answer_words, 0.5, "")
            return answer(model, exact_prefill(model, torch.tensor([context])).cache, prompt, chunk=chunk)

    right = asked(words)
    assert right.hit
    assert right.margin > 0
    for wrong in range(6):
        changed = list(words)
        changed[wrong] = (changed[wrong] + 1) % 97
        missed = asked(changed)
        assert not missed.hit
        assert missed.margin < 0


def test_the_margin_is_the_least_over_the_key(tiny_model):
    model, ids = tiny_model.model, list(range(40))
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, 34:39].double()
        found = answer(
            model,
            exact_prefill(model, torch.tensor([ids[:20]])).cache,
            Prompt([], ids[20:35], ids[35:], 0, ""),
            chunk=4,
        )
    expected = torch.tensor(ids[35:])
    own = logits.gather(1, expected[:, None])
    others = logits.scatter(1, expected[:, None], -torch.inf).amax(1, keepdim=True)
    # two orders of summation of the same float32 forward pass
    assert found.margin == pytest.approx((own - others).min().item(), abs=1e-4)


def test_recall_by_depth():
    prompts = [Prompt([], [], [], depth, "1") for depth in (0.0, 0.0, 0.5, 1.0)]
    outcomes = [Outcome(True, 3.0), Outcome(False, -1.0), Outcome(True, 5.0), Outcome(True, 2.0)]
    found = recall(prompts, outcomes)
    assert (found.hits, found.trials) == (3, 4)
    assert found.by_depth == {0.0: (1, 2), 0.5: (1, 1), 1.0: (1, 1)}
    assert found.low < 0.75 < found.high
