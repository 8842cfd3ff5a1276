"""What a blob looks like, as far as kernels care: tiered's ExpertLayout, or anything like it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

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


class ExpertWeights(NamedTuple):
    """What a layer's experts are computed with, beside the bytes in their slots."""

    layout: Layout
    activation: str  # of gpu_backend.gating
    limit: float
    biases: torch.Tensor | None  # float32 [num_experts, 2 * expert_size + hidden_size]
