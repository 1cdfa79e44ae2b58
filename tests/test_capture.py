"""A capture holds what attention was given, and is whole or not there."""

import torch


def test_capture_holds_what_attention_was_given(tiny_model, tiny_capture):
    sample = list(tiny_capture.samples(1))
    assert len(sample) == 2
    assert sample[0].keys.shape == (2, 192, 32)
    assert sample[0].queries.shape == (4, 192, 32)
    assert sample[0].output_gram.shape == (4, 32, 32)
    assert torch.equal(sample[0].positions, torch.arange(192))
