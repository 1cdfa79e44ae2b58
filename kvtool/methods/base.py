"""The single extension point: a Method is a way to compress a KV cache.

A method is its hyper-parameters, chosen by a person: a frozen dataclass whose fields become ``-o name value``. What
data makes of it, the fitted tensors, is a Calibration. No object is both.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

from torch import Tensor

from kvtool import attention, packing
from kvtool.attention import Attended
from kvtool.shapes import CacheShape, LayerShape, Rope, TensorSpec

if TYPE_CHECKING:
    from kvtool.bounds.measures import Measure
    from kvtool.calibration import Calibration
    from kvtool.capture import Capture, LayerSample
    from kvtool.finetune.training import Tuned
    from kvtool.models import LoadedModel
    from kvtool.policy import CachePolicy
    from kvtool.race import Raced

Progress = Callable[[int, int], None]  # done, total
Carry = Any  # what a method hands from one block to the next; None for most
LOOKS_BACK = 64  # queries
WHOLE_PROMPT = 1 << 30  # more queries than there are

FITTED_MARGIN = 1.25  # of a claim over what was measured when fitted: texts differ


class Decompressed(NamedTuple):
    """What the reference attends to.

    keys, values: [B, H, T, D] float32.
    bias: [B, H, T] added to the scaled logits, or None: ``-inf`` evicts a token, ``-sigma^2/2`` removes noise bias.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Claim:
    """Something a method says of itself that ``verify-bound`` measures.

    quantity: a name in ``bounds.MEASURES``, e.g. ``key_nmse``, or in the method's own ``measures``.
    limit: what the quantity must not exceed.
    kind: ``always`` (every token), ``expected`` (the mean) or ``probability`` (a share of cases).
    source: a theorem, e.g. ``arXiv 2504.19874, theorem 1``, or ``calibration`` for what was measured when fitted.
    layer: the layer it speaks of; None for all.
    """

    quantity: str
    limit: float
    kind: Literal["always", "expected", "probability"]
    source: str
    layer: int | None = None


@dataclass(frozen=True)
class LayerCalibration:
    """One layer's share of a Calibration: all that compress and attend may read."""

    index: int
    shape: LayerShape
    rope: Rope | None
    tensors: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


@dataclass(frozen=True)
class Method(ABC):
    """A way to compress a KV cache. The fields of a subclass are its hyper-parameters.

    A subclass is a ``pydantic.dataclasses.dataclass(frozen=True)``; every field has a default and a description.
    The compressed form is a NamedTuple of tensors. With an integer ``block`` every field is [B, H, T/block, ...]
    (or [B, H, T, ...]) and grows by appending along dimension 2; with ``block = None`` it is one part, made once from
    the whole prefill. Bits are counted from its bytes, never declared.
    """

    name: ClassVar[str]  # registry key, file name and documentation page
    paper: ClassVar[str]  # URL of the source
    summary: ClassVar[str]  # one sentence for tables
    block: ClassVar[int | None] = packing.PAGE  # tokens compressed together
    sees_sinks: ClassVar[bool] = False  # fit is shown the sinks as well: attention cannot be weighed without them
    moves: ClassVar[bool] = False  # what is compressed changes between passes, see :meth:`observe`

    @property
    def looks_back(self) -> int:
        """How many of a prompt's last queries :meth:`compress` looks at; serving may hand over more."""
        return LOOKS_BACK

    @property
    def judged_by(self) -> int:
        """How many of the last queries of a held-out text judge a fit; fewer for a method whose reading is slow."""
        return 512

    def schema(self, shape: CacheShape) -> dict[str, TensorSpec]:
        """The tensors of an artifact: ``layers.<i>.<field>``, or ``<field>`` when layers share it."""
        return {
            f"layers.{i}.{field}": spec
            for i in shape.compressible
            for field, spec in self.layer_schema(shape.layers[i]).items()
        }

    def layer_schema(self, shape: LayerShape) -> dict[str, TensorSpec]:
        """The tensors of one layer; empty for a method that stores nothing."""
        return {}

    def fit(self, capture: "Capture", *, progress: Progress | None = None) -> dict[str, Tensor]:
        """The tensors of :meth:`schema`, from a capture. Layer by layer unless overridden."""
        tensors: dict[str, Tensor] = {}
        layers = capture.layers
        for done, i in enumerate(layers):
            fitted = self.fit_layer(capture.shape.layers[i], capture.shape.rope(i), _Samples(capture, i), layer=i)
            tensors |= {f"layers.{i}.{field}": tensor for field, tensor in fitted.items()}
            if progress:
                progress(done + 1, len(layers))
        return tensors

    def fit_layer(
        self, shape: LayerShape, rope: Rope | None, samples: "Iterable[LayerSample]", *, layer: int
    ) -> dict[str, Tensor]:
        """The tensors of :meth:`layer_schema`, from the samples of one layer. ``samples`` may be read several times."""
        return {}

    def race(
        self,
        capture: "Capture",
        tensors: dict[str, Tensor],
        *,
        policy: "CachePolicy",
        start: int,
        report: Callable[[int], None] | None = None,
    ) -> "Raced | None":
        """Choose between what was fitted and its rivals on tokens from ``start`` on; None: there is no choice."""
        return None

    def tune(
        self,
        calibration: "Calibration",
        capture: "Capture",
        *,
        model: "Callable[[], LoadedModel]",
        stop: int,
        progress: Progress | None = None,
    ) -> "Tuned | None":
        """Adapt the model, which ``model`` loads, to what was fitted, on tokens before ``stop``. None: it stays."""
        return None

    def data_free(self) -> "Self | None":
        """The same method without anything learnt from data, at the same rate; None if that is itself or impossible."""
        return None

    def begin(
        self,
        queries: Tensor | None,
        keys: Tensor,
        values: Tensor,
        layer: LayerCalibration,
        *,
        sinks: int,
        carry: Carry = None,
    ) -> Carry:
        """Look at what stays exact before a run is compressed; what it returns is that call's ``carry``.

        keys, values: [B, H, N, D], the first ``sinks`` tokens and the newest ones; queries: as in :meth:`compress`.
        Most methods compress a token without regard to the others and need nothing of this.
        """
        return carry

    @abstractmethod
    def compress(
        self,
        keys: Tensor,
        values: Tensor,
        layer: LayerCalibration,
        *,
        positions: Tensor,
        queries: Tensor | None = None,
        carry: Carry = None,
    ) -> tuple[Any, Carry]:
        """Compress ``keys`` and ``values`` [B, H, T, D] at ``positions`` [T]; T is a multiple of ``block``.

        queries: the last queries of the prompt, [B, HQ, W, D], for methods that look at attention.
        carry: what the previous call returned. Compressing in two calls equals compressing in one.
        Returns the compressed NamedTuple and the carry. A method that ``moves`` returns all that is compressed so far,
        not the new tokens alone, and is called after every pass, with T = 0 if nothing has left the window.
        """

    def observe(self, shares: Tensor, carry: Carry) -> Carry:
        """What the queries of a pass saw, before compress: for methods that move tokens by their attention.

        shares: [B, HQ, S, N], the share of each query's softmax that falls on each block of 64 tokens, from the first
        token after the sinks on: compressed blocks, then those still in the window.
        """
        return carry

    def notes(self, kv: Any) -> dict[str, float]:
        """Shares that whoever judges a compressed part should see, such as of pages that a guard caught; by name."""
        return {}

    def host_bytes(self, carry: Carry) -> int:
        """Bytes held outside the cache, in host memory: reported apart, never part of the rate."""
        return 0

    def disk_bytes(self, carry: Carry) -> int:
        """Bytes held outside the cache, in a file: likewise."""
        return 0

    @abstractmethod
    def decompress(self, kv: Any, layer: LayerCalibration, *, positions: Tensor) -> Decompressed:
        """Keys, values and bias as attention sees them. ``positions`` [T] are those given to :meth:`compress`."""

    def attend(
        self,
        queries: Tensor,
        kv: Any,
        layer: LayerCalibration,
        *,
        positions: Tensor,
        scale: float,
        softcap: float | None = None,
    ) -> Attended:
        """The reference: attention of ``queries`` [B, HQ, S, D] over the compressed part. Estimators override it."""
        keys, values, bias = self.decompress(kv, layer, positions=positions)
        return attention.attend(queries, keys, values, bias, scale=scale, softcap=softcap)

    def claims(self, shape: CacheShape, tensors: Mapping[str, Tensor]) -> Sequence[Claim]:
        """What ``verify-bound`` measures, given the artifact's ``tensors``: what a source proves or the fit found."""
        return ()

    def measures(self) -> "Mapping[str, Measure]":
        """Quantities that only this method's claims speak of, by name."""
        return {}


@dataclass(frozen=True)
class _Samples:
    """The samples of one layer, read from disk anew in every pass: a long context does not fit in memory."""

    capture: "Capture"
    layer: int

    def __iter__(self) -> "Iterator[LayerSample]":
        return iter(self.capture.samples(self.layer))


def nbytes(kv: Any) -> int:
    """Bytes of a compressed NamedTuple: every tensor, those of nested tuples and padding included."""
    if isinstance(kv, tuple):
        return sum(nbytes(field) for field in kv)
    return kv.numel() * kv.element_size() if isinstance(kv, Tensor) else 0


def mapped(kv: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same NamedTuple, nested ones included, with ``function`` applied to every tensor."""
    if isinstance(kv, tuple):
        fields = (mapped(field, function) for field in kv)
        return type(kv)(*fields) if hasattr(kv, "_fields") else tuple(fields)
    return function(kv) if isinstance(kv, Tensor) else kv
