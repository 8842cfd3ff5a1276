"""Torch's CPU as several cards: what CUDA does not allow raises.

A tensor that is made on, or brought to, `torch.device("cpu", N)` lies on card N, and so does what
is computed from it; others lie in RAM. (For torch itself all of that is one device.)
"""

import torch
from torch.overrides import TorchFunctionMode

# What may be given tensors of two devices: copies, and indices that come from RAM.
CROSSING = {"copy_", "__getitem__", "__setitem__"}
DEVICE = torch.Tensor.device.__get__


class TensorPlaces(TorchFunctionMode):
    """Within its block, in its thread. `cards` are those that computed something."""

    def __init__(self):
        super().__init__()
        self.cards = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        given = [*args, *kwargs.values()]
        inputs = [value for value in flat(given) if isinstance(value, torch.Tensor)]
        if function == DEVICE:
            place = place_of(args[0])
            return torch.device("cpu") if place is None else torch.device("cpu", place)
        inputs = [tensor for tensor in inputs if tensor.dim()] or inputs  # numbers go anywhere
        places = {place_of(tensor) for tensor in inputs}
        assert name in CROSSING or len(places) < 2, f"{name} of tensors on {places}"
        result = function(*args, **kwargs)
        place = place_of(inputs[0]) if inputs else None
        for device in given:
            if isinstance(device, torch.device):
                place = device.index
        if name in ("cpu", "numpy"):
            place = None
        for tensor in flat([result]):
            if isinstance(tensor, torch.Tensor):
                tensor.place = place
        self.cards.add(place)
        return result


def place_of(tensor):
    return getattr(tensor, "place", None)


def flat(values):
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from flat(value)
        else:
            yield value
