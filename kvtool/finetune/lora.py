"""Trainable low-rank factors on some projections of a model, through peft; gone again when the block ends."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvtool.errors import InputError

_INSTALL = "pip install 'kvtool[finetune]'"
_ALPHA = 2  # alpha / rank


@dataclass(frozen=True)
class Lora:
    """The factors while they are in place."""

    peft: Any
    targets: Sequence[str]

    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return [p for p in self.peft.parameters() if p.requires_grad]

    def disabled(self) -> AbstractContextManager[None]:
        """The model without them."""
        context: AbstractContextManager[None] = self.peft.disable_adapter()
        return context

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(A, B) of every target, with alpha / rank folded into B."""
        found = {}
        for name in self.targets:
            module = self.peft.base_model.model.get_submodule(name)
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            found[name] = (a.detach().clone(), b.detach() * module.scaling["default"])
        return found


@contextmanager
def lora(model: Any, targets: Sequence[str], *, rank: int, seed: int) -> Iterator[Lora]:
    """Put factors of ``rank`` on the modules named ``targets`` of ``model``; B is zero, so nothing changes at first.

    Raises:
        InputError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise InputError(f"-o finetune_steps: fine-tuning needs the package peft; {_INSTALL}") from None
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    # get_peft_model draws A from torch's own generator
    with torch.random.fork_rng(), warnings.catch_warnings():
        # peft asks transformers for what transformers has renamed
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=_ALPHA * rank, lora_dropout=0.0, target_modules=list(targets))
        wrapped = get_peft_model(model, config)
    wrapped.eval()
    try:
        yield Lora(wrapped, targets)
    finally:
        wrapped.unload()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
