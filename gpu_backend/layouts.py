"""What a blob looks like, as far as kernels care: tiered's ExpertLayout, or anything like it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch


class TensorLayout(Protocol):
    """One matrix in a blob: tiered's TensorLayout, or anything like it."""

    @property
    def format(self) -> str: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def offset(self) -> int: ...


class Layout(Protocol):
    """Where gate, up and down lie in a blob."""

    @property
    def gate(self) -> TensorLayout: ...

    @property
    def up(self) -> TensorLayout: ...

    @property
    def down(self) -> TensorLayout: ...

    @property
    def nbytes(self) -> int: ...


class Layouts(Protocol):
    """Of a layer's experts: tiered's LayerLayouts, or anything like it."""

    @property
    def distinct(self) -> tuple[Any, ...]:
        """Each layout once."""

    def layout(self, expert: int) -> Any:
        """A Layout."""


class ExpertWeights(NamedTuple):
    """What experts of a layer that have one layout are computed with, beside the bytes in their
    slots."""

    layout: Layout
    activation: str  # of gpu_backend.gating
    limit: float
    biases: torch.Tensor | None  # float32 [num_experts, 2 * expert_size + hidden_size]
