"""Which code attends over a compressed part: the method's own reference, or a kernel of the same signature."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor

from kvtool import attention
from kvtool.attention import Attended
from kvtool.errors import BackendError
from kvtool.methods.base import Carry, LayerCalibration, Method, mapped
from kvtool.packing import PAGE
from kvtool.shapes import LayerShape

BACKENDS = ("auto", "reference", "triton", "gluon")
HEAD_DIMS = (64, 80, 96, 128, 256)  # that the kernels serve
MAX_GROUP = 8  # query heads per KV head
OLDEST = (8, 0)  # compute capability: integer tensor cores of mma.m16n8k32, cp.async
MAX_STEP = 8  # query tokens that decode kernels take at once; a longer prompt over a compressed past is the reference's


class Kernel(Protocol):
    """``kernels/<method>.py`` offers ``attend`` with the reference's signature and ``method`` for ``self``.

    It may offer ``compress(method, keys, values, layer, *, positions)`` as well, for a method without carry.
    """

    def refuses(self, method: Method, *, gluon: bool = False) -> str | None:
        """Why these options of the method have no kernel, or none in Gluon; None if they have one."""

    def attend(
        self,
        method: Method,
        queries: Tensor,
        kv: Any,
        layer: LayerCalibration,
        *,
        positions: Tensor,
        scale: float,
        softcap: float | None = None,
        gluon: bool = False,
    ) -> Attended:
        """Attention of ``queries`` [B, HQ, S, D] over one compressed part; ``gluon`` asks for the faster dialect.

        With a parameter ``pages``, int32 [B] on the device, the kernel reads so many pages of a part with room to grow;
        with ``page_table``, int32 [B, N] on the device, page n of sequence b at [0, h, page_table[b, n]].
        Its module may say ``FIRST_IS_WHOLE``: given ``pages``, its first launch is not a dependent one, so that the
        queries are complete when anything begins.
        """


@dataclass(frozen=True)
class Backend:
    """A back end chosen for one method: its name is printed with every result."""

    name: str
    kernel: Kernel | None = None

    def attend(
        self,
        method: Method,
        queries: Tensor,
        kv: Any,
        layer: LayerCalibration,
        *,
        positions: Tensor,
        scale: float,
        softcap: float | None = None,
        pages: Tensor | None = None,
        page_table: Tensor | None = None,
    ) -> Attended:
        """Attention of ``queries`` [B, HQ, S, D] over one compressed part.

        pages: int32 [B] on the device, what is in use of a part with room to grow; see :meth:`counts_pages`.
        page_table: int32 [B, N] on the device, where the pages are in fields [1, H, ...]; see :meth:`reads_tables`.
        """
        if self.kernel is None or queries.shape[2] > MAX_STEP:
            if page_table is not None:
                kv = mapped(kv, lambda x: x[0][:, page_table].transpose(0, 1))
            if pages is not None:
                return _attend_used(method, queries, kv, layer, positions, scale, softcap, pages)
            return method.attend(queries, kv, layer, positions=positions, scale=scale, softcap=softcap)
        counted = {name: x for name, x in (("pages", pages), ("page_table", page_table)) if x is not None}
        return self.kernel.attend(
            method,
            queries,
            kv,
            layer,
            positions=positions,
            scale=scale,
            softcap=softcap,
            gluon=self.name == "gluon",
            **counted,
        )

    def counts_pages(self, method: Method) -> bool:
        """Whether :meth:`attend` can read as many pages as a number on the device says."""
        if self.kernel is None:
            return type(method).attend is Method.attend
        return "pages" in signature(self.kernel.attend).parameters

    def reads_tables(self, method: Method) -> bool:
        """Whether :meth:`attend` can find pages through a table on the device."""
        if self.kernel is None:
            return method.block is not None and not method.moves and type(method).attend is Method.attend
        return "page_table" in signature(self.kernel.attend).parameters

    def attend_blocks(
        self,
        method: Method,
        queries: Tensor,
        kv: Any,
        layer: LayerCalibration,
        *,
        positions: Tensor,
        scale: float,
        softcap: float | None = None,
    ) -> tuple[Attended, Tensor]:
        """As :meth:`attend`, by the kernel of a method that moves; and the lse of every block of 64, [B, HQ, S, N]."""
        kernel: Any = self.kernel
        found: tuple[Attended, Tensor] = kernel.attend_blocks(
            method, queries, kv, layer, positions=positions, scale=scale, softcap=softcap
        )
        return found

    def resident(self, kv: Any) -> int:
        """Bytes that the kernel keeps beside a compressed part: what says where its pages are."""
        beside = getattr(self.kernel, "resident", None)
        return 0 if beside is None else beside(kv)

    def compress(
        self,
        method: Method,
        keys: Tensor,
        values: Tensor,
        layer: LayerCalibration,
        *,
        positions: Tensor,
        queries: Tensor | None = None,
        carry: Carry = None,
    ) -> tuple[Any, Carry]:
        """As ``method.compress``, by the kernel where it has one: what is stored may differ by a rounding."""
        by_kernel = getattr(self.kernel, "compress", None)
        if by_kernel is None:
            return method.compress(keys, values, layer, positions=positions, queries=queries, carry=carry)
        return by_kernel(method, keys, values, layer, positions=positions), None


def _attend_used(
    method: Method,
    queries: Tensor,
    kv: Any,
    layer: LayerCalibration,
    positions: Tensor,
    scale: float,
    softcap: float | None,
    pages: Tensor,
) -> Attended:
    keys, values, bias = method.decompress(kv, layer, positions=positions)
    beyond = torch.arange(keys.shape[2], device=keys.device) >= PAGE * pages[:, None, None]  # [B, 1, T]
    seen = keys.new_zeros(keys.shape[:-1]) if bias is None else bias
    return attention.attend(queries, keys, values, seen.masked_fill(beyond, -torch.inf), scale=scale, softcap=softcap)


def has_kernel(method: str) -> bool:
    """Whether ``kernels/<method>.py`` exists; importing it needs Triton, this does not."""
    return find_spec(f"kvtool.kernels.{method}") is not None


def choose_backend(name: str, method: Method, device: torch.device, shapes: Iterable[LayerShape] = ()) -> Backend:
    """The back end ``name`` for ``method`` on ``device``; auto takes kernels on a GPU that can run them.

    shapes: of the layers it is for. Layers that kernels do not serve are the reference's with auto.

    Raises:
        BackendError: unknown name, no kernel for the method or the shapes, or no GPU that runs it.
    """
    if name not in BACKENDS:
        raise BackendError(f"--backend {name}: expected one of {', '.join(BACKENDS)}")
    if name == "reference" or (name == "auto" and (device.type != "cuda" or not has_kernel(method.name))):
        return Backend("reference")
    if not has_kernel(method.name):
        raise BackendError(f"--backend {name}: {method.name} has no kernel yet; use --backend reference")
    if device.type != "cuda":
        raise BackendError(f"--backend {name}: kernels need a GPU, found {device.type}; use --backend reference")
    reason = _unable(device) or next(filter(None, map(_unserved, shapes)), None)
    kernel: Any = None
    if reason is None:
        try:
            kernel = import_module(f"kvtool.kernels.{method.name}")
        except ImportError as error:
            reason = f"kernels need Triton 3.6 or newer, which cannot be imported ({error})"
        else:
            reason = kernel.refuses(method)
    if reason and name == "auto":
        return Backend("reference")
    if reason:
        raise BackendError(f"--backend {name}: {reason}; use --backend reference")
    if name == "auto":
        # measured on Hopper; elsewhere the portable kernel is the safe choice
        hopper = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
        name = "gluon" if hopper and not kernel.refuses(method, gluon=True) else "triton"
    if name == "gluon" and (reason := kernel.refuses(method, gluon=True)):
        raise BackendError(f"--backend gluon: {reason}; use --backend triton")
    return Backend(name, kernel)


def _unable(device: torch.device) -> str | None:
    """Why no kernel runs on this GPU; None if they do."""
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST:
        return None
    needed, found = (".".join(map(str, version)) for version in (OLDEST, capability))
    return f"kernels need compute capability {needed} or newer, found {found}"


def _unserved(shape: LayerShape) -> str | None:
    """Why a layer has no kernel; None if it has one."""
    if shape.head_dim not in HEAD_DIMS:
        return f"head_dim: expected one of {', '.join(map(str, HEAD_DIMS))}, found {shape.head_dim}"
    if shape.group > MAX_GROUP:
        return f"query heads: expected 1 to {MAX_GROUP} per KV head, found {shape.group}"
    return None
