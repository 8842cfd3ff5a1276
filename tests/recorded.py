"""A stand-in for CUDA graphs on torch's CPU device: operations are recorded and done again.

As on a card, a replay knows nothing of the Python code that was recorded: each operation reads and
writes the memory that it did. What a card cannot record (values that come to the host) is refused.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TO_HOST = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero"}


class Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in TO_HOST:
            raise RuntimeError(f"{func} is not permitted when stream is capturing")
        results = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, results))
        return results


def record(work):
    """See gpu_backend.graphs.Graphs."""
    with Recording() as recording:
        outputs = work()

    def replay():
        for func, args, kwargs, results in recording.done:
            for old, new in zip(
                tree_leaves(results), tree_leaves(func(*args, **kwargs)), strict=True
            ):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    return outputs, replay
