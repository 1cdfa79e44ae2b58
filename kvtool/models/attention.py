"""Stand in for a model's attention function for a while, through transformers' own AttentionInterface.

No modeling file is copied and nothing is patched: the function is registered under a name, the model is switched to it,
and switched back when the block ends, however it ends.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from kvtool.errors import ModelError

# (module, query [B, HQ, S, D], key [B, H, T, D], value [B, H, T, Dv], mask, **kwargs) -> ([B, S, HQ, Dv], weights)
AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


@contextmanager
def attention_replaced(model: nn.Module, name: str, function: AttentionFunction, *, masks: bool) -> Iterator[None]:
    """Let ``function`` be the attention of every layer of ``model`` inside the block.

    masks: build the masks that sdpa would get; otherwise the function gets None.

    Raises:
        ModelError: the model does not go through the attention interface.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask if masks else _no_mask)
    configs = {id(config): config for module in model.modules() if (config := _config(module)) is not None}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        switch: Any = model
        try:
            switch.set_attn_implementation(name)
        except (ValueError, AttributeError) as error:
            raise _refusal(model) from error
        if all(config._attn_implementation != name for config in configs.values()):
            raise _refusal(model)
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
        # the registry lives as long as the process: let go of what the function holds
        AttentionInterface.register(name, sdpa_attention_forward)


def _refusal(model: nn.Module) -> ModelError:
    return ModelError(f"{type(model).__name__} does not call attention through transformers' attention interface")


def _config(module: nn.Module) -> Any:
    from transformers import PreTrainedModel

    return module.config if isinstance(module, PreTrainedModel) else None


def _no_mask(*_: Any, **__: Any) -> None:
    return None
