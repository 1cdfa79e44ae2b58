"""Fine-tune a model to a cache format: a few LoRA steps on its attention projections, judged on held-out tokens.

The teacher is the same model with its full cache; the loss is KL(teacher || student) of the next-token distributions
after a prefix that the student reads compressed. Only the text of the capture is used: its first three quarters to
learn from, its last quarter to judge. LoRA: Hu et al., https://arxiv.org/abs/2106.09685, through peft.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvtool.adapter import Adapter
from kvtool.errors import CaptureError, InputError, ModelError
from kvtool.exact import exact_attention, logit_scale
from kvtool.finetune.gradient import Split, attend
from kvtool.finetune.lora import Lora, lora
from kvtool.methods.base import LayerCalibration, Progress
from kvtool.methods.h1b import H1B
from kvtool.models.attention import attention_replaced
from kvtool.packing import PAGE

if TYPE_CHECKING:
    from kvtool.calibration import Calibration
    from kvtool.capture import Capture
    from kvtool.models import LoadedModel

_RATE, _TAU_RATE = 2e-3, 1e-2  # Adam's step for the factors, and for the logarithm of a temperature
_WARM_UP = 0.1  # of the steps
_JUDGED = 8  # held-out segments at most
_ASKED = 256  # tokens that read the prefix, at most: their logits are the largest tensors of a step


@dataclass(frozen=True)
class Tuned:
    """What fine-tuning made.

    tensors: the artifact's, temperatures learnt with the adapter. before, after: held-out KL in nats, mean over
    segments; difference: after - before; standard_error: of it, paired over segments. losses: of every step.
    """

    adapter: Adapter
    tensors: dict[str, Tensor]
    before: float
    after: float
    difference: float
    standard_error: float
    segments: int
    losses: tuple[float, ...]
    device: str

    @property
    def improved(self) -> bool:
        """Whether it is worth keeping."""
        return self.difference < 0

    @property
    def verdict(self) -> str:
        """One line for a person."""
        figures = (
            f"KL to the full cache on held-out text {self.before:.4f} before, {self.after:.4f} after "
            f"({self.difference:+.4f} +- {self.standard_error:.4f} nats, {self.segments} segments, "
            f"{len(self.losses)} steps)"
        )
        what = "fine-tune kept" if self.improved else "the fine-tune did not improve and was kept out"
        return f"{what}: {figures}"

    def apply(self, calibration: "Calibration") -> "Calibration":
        """The artifact with the adapter and its temperatures; as without fine-tuning if it did not improve."""
        if not self.improved:
            assert isinstance(calibration.method, H1B)
            return replace(calibration, method=replace(calibration.method, finetune_steps=0))
        return replace(calibration, tensors=self.tensors, adapter=self.adapter)

    def record(self) -> dict[str, Any]:
        """For the artifact's provenance and ``--json``."""
        return {
            "kept": self.improved,
            "measure": "KL(full cache || compressed) on held-out tokens of the calibration text, nats",
            "before": self.before,
            "after": self.after,
            "difference": self.difference,
            "standard_error": self.standard_error,
            "segments": self.segments,
            "steps": len(self.losses),
            "device": self.device,
        }


def finetune(
    loaded: "LoadedModel",
    calibration: "Calibration",
    capture: "Capture",
    *,
    stop: int,
    progress: Progress | None = None,
) -> Tuned:
    """Adapt ``loaded`` to ``calibration`` of a method with ``finetune_*`` options; the model is left as it was.

    stop: tokens of each sample to learn from; the rest is held out.

    Raises:
        InputError: peft is not installed.
        CaptureError: the capture is of other weights, or too short.
        ModelError: the model has no linear attention projections.
    """
    method = calibration.method
    assert isinstance(method, H1B)
    if loaded.fingerprint != capture.manifest.fingerprint:
        raise CaptureError(
            f"{capture.path}: a capture of {capture.manifest.model}, whose weights are not those of {loaded.name}; "
            "fine-tune the model that was captured, or capture this one"
        )
    text = _Text(capture, method.finetune_tokens, stop)
    split = _split(text.length, calibration.policy.sinks, calibration.policy.window)
    student = _Student(loaded.model, calibration, split)
    generator = torch.Generator().manual_seed(method.seed)
    with lora(loaded.model, student.targets(), rank=method.finetune_rank, seed=method.seed) as factors:
        judged = [ids.to(loaded.model.device) for ids in text.held_out()]
        with torch.no_grad(), factors.disabled():
            teacher = [student.full(ids) for ids in judged]
        before = student.judge(judged, teacher)
        student.learn_temperatures()
        losses = _train(student, factors, text, generator, method.finetune_steps, progress)
        after = student.judge(judged, teacher)
        learnt = factors.factors()
    change = after - before
    return Tuned(
        Adapter.of(loaded.model, learnt),
        student.tensors(),
        float(before.mean()),
        float(after.mean()),
        float(change.mean()),
        float(change.std() / math.sqrt(len(change))) if len(change) > 1 else math.nan,
        len(judged),
        tuple(losses),
        str(loaded.model.device),
    )


def _train(
    student: "_Student", factors: Lora, text: "_Text", generator: torch.Generator, steps: int, progress: Progress | None
) -> list[float]:
    """Adam with a short warm-up and linear decay, one segment a step; the loss of every step."""
    groups: list[dict[str, Any]] = [{"params": factors.parameters(), "lr": _RATE}]
    if student.log_tau:
        groups.append({"params": list(student.log_tau.values()), "lr": _TAU_RATE})
    optimizer = torch.optim.Adam(groups)
    warm = max(1, round(_WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm + 1))
    )
    losses = []
    for step in range(steps):
        ids = text.draw(generator).to(student.model.device)
        with torch.no_grad(), factors.disabled():
            teacher = student.full(ids)
        with torch.enable_grad():
            loss = _divergence(teacher, student.compressed(ids)).mean()
            loss.backward()
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if progress:
            progress(step + 1, steps)
    return losses


class _Text:
    """Segments of the captured text, each after the tokens that begin any text of this model."""

    def __init__(self, capture: "Capture", length: int, stop: int) -> None:
        self.ids, self.stop = capture.ids, stop
        self.prefix = torch.tensor(capture.manifest.prefix, dtype=torch.int64)
        context = capture.manifest.context
        self.length = length
        self.own = own = length - len(self.prefix)
        if own > context - stop or own > stop:
            raise CaptureError(
                f"{capture.path}: expected at least {length} tokens in the last quarter of each sample to judge a "
                f"fine-tune by, found {context - stop}; lower -o finetune_tokens or capture a longer --context"
            )

    def draw(self, generator: torch.Generator) -> Tensor:
        """A segment to learn from, [1, T]."""
        sample = int(torch.randint(len(self.ids), (), generator=generator))
        start = int(torch.randint(self.stop - self.own + 1, (), generator=generator))
        return self._segment(sample, start)

    def held_out(self) -> list[Tensor]:
        """Segments to judge by that do not overlap, spread over the samples."""
        starts = range(self.stop, self.ids.shape[1] - self.own + 1, self.own)
        every = [(sample, start) for start in starts for sample in range(len(self.ids))]
        return [self._segment(*where) for where in every[:: -(-len(every) // _JUDGED)]]

    def _segment(self, sample: int, start: int) -> Tensor:
        return torch.cat([self.prefix, self.ids[sample, start : start + self.own]])[None]


def _split(length: int, sinks: int, window: int) -> Split:
    """Three quarters are prefix, or more; the window is scaled down, or little of a short text would be compressed."""
    prefix = length - min(length // 4, _ASKED)
    pages = (prefix - sinks - min(window, prefix // 8)) // PAGE
    if pages < 1:
        raise InputError(
            f"finetune_tokens {length}: expected a page of {PAGE} tokens to compress after {sinks} sinks, found "
            f"{max(0, prefix - sinks)} tokens; use more"
        )
    return Split(prefix, sinks, pages)


class _Student:
    """The model with its full cache, and with what follows the prefix reading it compressed."""

    def __init__(self, model: Any, calibration: "Calibration", split: Split) -> None:
        assert isinstance(calibration.method, H1B)
        self.model, self.method, self.split = model, calibration.method, split
        self._fitted = dict(calibration.tensors)
        compressed = set(calibration.shape.compressible) - set(calibration.policy.exact_layers)
        moved = calibration.to(model.device)
        self._layers = {i: moved.layer(i) for i in sorted(compressed)}
        self.log_tau: dict[int, Tensor] = {}

    def targets(self) -> list[str]:
        """Names of the attention projections of the layers that are compressed."""
        found = [
            f"{name}.{child}"
            for name, module in self.model.named_modules()
            if getattr(module, "layer_idx", None) in self._layers and "attention" in type(module).__name__.lower()
            for child, projection in module.named_children()
            if isinstance(projection, nn.Linear)
        ]
        if not found:
            raise ModelError(f"{type(self.model).__name__}: its attention has no linear projections to fine-tune")
        return found

    def learn_temperatures(self) -> None:
        """From here on the temperatures have a gradient, if the method has any."""
        if self.method.score == "cosine":
            self.log_tau = {i: layer["temperature"].log().requires_grad_() for i, layer in self._layers.items()}

    def tensors(self) -> dict[str, Tensor]:
        """The artifact's tensors with the temperatures learnt."""
        learnt = {f"layers.{i}.temperature": tau.detach().exp().cpu() for i, tau in self.log_tau.items()}
        return self._fitted | learnt

    def full(self, ids: Tensor) -> Tensor:
        """Log-probabilities after the prefix with the full cache, float32 [S, V]."""
        return self._logits(ids, compress=False)

    def compressed(self, ids: Tensor) -> Tensor:
        """The same with a compressed prefix."""
        return self._logits(ids, compress=True)

    def judge(self, texts: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Mean divergence of each text, [segments]."""
        with torch.no_grad():
            return torch.stack([_divergence(t, self.compressed(x)).mean() for x, t in zip(texts, teacher, strict=True)])

    def _logits(self, ids: Tensor, *, compress: bool) -> Tensor:
        def attention(
            module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
        ) -> tuple[Tensor, None]:
            scale, softcap = logit_scale(module, kwargs), kwargs.get("softcap")
            layer = self._layer(module.layer_idx) if compress else None
            if layer is None:
                out = exact_attention(query, key, value, scale=scale, softcap=softcap, mask=mask)
            else:
                out = attend(self.method, query, key, value, layer, self.split, scale=scale, softcap=softcap)
            return out.transpose(1, 2).contiguous(), None

        asked = ids.shape[1] - self.split.prefix
        with attention_replaced(self.model, "kvtool-finetune", attention, masks=True):
            logits = self.model(ids, use_cache=False, logits_to_keep=asked).logits[0]
        result: Tensor = logits.float().log_softmax(-1)
        return result

    def _layer(self, index: int) -> LayerCalibration | None:
        layer = self._layers.get(index)
        if layer is None or index not in self.log_tau:
            return layer
        return replace(layer, tensors={**layer.tensors, "temperature": self.log_tau[index].exp()})


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of log-probabilities [S, V], nats [S]."""
    return (teacher.exp() * (teacher - student)).sum(-1)
