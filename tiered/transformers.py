"""Hugging Face transformers with our experts: its attention, router and generate; our tiers.

    model = AutoModelForCausalLM.from_pretrained(
        "mixtral-8x7b/", quantization_config=TieredConfig(expert_ram="12G"))

transformers lets a quantization change the model before weights are loaded, and a function compute
all experts (https://huggingface.co/docs/transformers/experts_interface). Here the experts' own
parameters are taken out, so that their weights are never loaded, and the function asks our tiers.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

try:
    import torch
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError(
        f"tiered.transformers needs torch and transformers ({error}): "
        "pip install 'tiered[transformers]'"
    ) from error

from tiered.config import DEFAULT_POLICY, EngineConfig
from tiered.experts import Routing
from tiered.standalone import StandaloneExperts

NAME = "tiered"
_LAYER = re.compile(r"\blayers\.(\d+)\.")
# What experts are called in checkpoints: passed over, and not reported as unexpected.
_IN_FILES = r"\.experts\.(gate_up_proj|down_proj|\d+\.)"


# By the names that ModelConfig has for them.
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
}


class TieredConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How from_pretrained's experts are held and computed; the choices are EngineConfig's.

    `experts` names another checkpoint of the same model to take the experts from: a GGUF file with
    4-bit experts, or a store of `tiered convert`.
    """

    def __init__(
        self,
        expert_ram: int | str | None = None,
        ram: int | str | None = None,
        quantize: str = "int4",
        policy: str = DEFAULT_POLICY,
        threads: int | None = None,
        readers: int = 4,
        experts: str | None = None,
        quant_method: str = NAME,
    ) -> None:
        self.quant_method = quant_method
        self.expert_ram, self.ram = expert_ram, ram
        self.quantize, self.policy = quantize, policy
        self.threads, self.readers = threads, readers
        self.experts = None if experts is None else str(experts)
        self.choices()  # checked now rather than when the model is loaded

    def choices(self) -> EngineConfig:
        values = dict(vars(self))
        del values["quant_method"], values["experts"]
        return EngineConfig(look_ahead=0, **values)


class TieredQuantizer(HfQuantizer):  # type: ignore[misc]
    """Takes the experts out of a model that is about to be loaded; ours take their place."""

    requires_calibration = False
    is_trainable = False

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return False  # the model does not have its experts' weights

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        found = _taken_out(model)
        path = self.quantization_config.experts
        if path is None and checkpoint_files:
            path = Path(checkpoint_files[0]).parent
        if path is None:
            raise ValueError("there is no file to read experts from: TieredConfig(experts=...)")
        dense = sum(p.numel() * p.element_size() for p in model.parameters())
        experts = StandaloneExperts(Path(path), self.quantization_config.choices(), dense)
        # For those who do not close it: its threads end with the model.
        close = weakref.finalize(model, experts.close)
        try:
            for name, module in found.items():
                module.tiered = _place(name, module, experts)
        except BaseException:
            close()
            raise
        model.set_experts_implementation(NAME)


def _taken_out(model: Any) -> dict[str, Any]:
    """The modules of experts, by name, without their weights; nor are these missed in the files."""
    found = {name: m for name, m in model.named_modules() if _is_experts(m)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no experts that can be replaced")
    for name, module in found.items():
        _check(name, module)
        for parameter in list(module._parameters):
            delattr(module, parameter)
        module._is_hf_initialized = True  # nothing is left that could be
    ignored = model._keys_to_ignore_on_load_unexpected
    ignored = [] if ignored is None else ignored  # a list or a set, by transformers' version
    model._keys_to_ignore_on_load_unexpected = type(ignored)([*ignored, _IN_FILES])
    return found


class Place(NamedTuple):
    """Where a module's experts are."""

    experts: StandaloneExperts
    layer: int


def experts_of(model: Any) -> StandaloneExperts:
    """The experts of a model that was loaded with a TieredConfig: for `stats` and `close`."""
    for module in model.modules():
        if hasattr(module, "tiered"):
            experts: StandaloneExperts = module.tiered.experts
            return experts
    raise ValueError("this model was not loaded with quantization_config=TieredConfig(...)")


def _is_experts(module: Any) -> bool:
    """Whether transformers lets a function of ours compute this module."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_bias")


def _check(name: str, module: Any) -> None:
    """ValueError unless the module computes down(activation(gate x) * up x), as our kernels do."""
    gates_otherwise = "integrations" not in type(module)._apply_gate.__module__
    other = module.has_bias or not getattr(module, "has_gate", True)
    other = other or getattr(module, "has_post_expert_norm", False) or gates_otherwise
    if other or _activation(module) is None:
        raise ValueError(
            f"{name}: {type(module).__name__} computes its experts in another way than "
            f"down(activation(gate x) * up x) with {' or '.join(_ACTIVATIONS)}, which is what "
            "there are kernels for"
        )


def _activation(module: Any) -> str | None:
    """Which of them the module's is, by what it makes of a few numbers."""
    x = torch.linspace(-3, 3, 7, device="cpu")
    same = (name for name, f in _ACTIVATIONS.items() if torch.allclose(module.act_fn(x), f(x)))
    return next(same, None)


def _place(name: str, module: Any, experts: StandaloneExperts) -> Place:
    """The layer that a module computes; ValueError if this checkpoint is another model's."""
    match, config, path = _LAYER.search(name), experts.config, experts.checkpoint.path
    if match is None or int(match[1]) not in config.sparse_layers:
        raise ValueError(f"{path} has no experts for {name}")
    if _activation(module) != config.activation:
        raise ValueError(f"{path} has experts with {config.activation}, {name} has others")
    theirs = module.num_experts, module.hidden_dim, module.intermediate_dim
    ours = config.num_experts, config.hidden_size, config.expert_size
    if theirs != ours:
        raise ValueError(
            f"{path} has {ours[0]} experts of {ours[1]} x {ours[2]}, but {name} needs "
            f"{theirs[0]} of {theirs[1]} x {theirs[2]}: it is another model"
        )
    return Place(experts, int(match[1]))


class _Experts(torch.autograd.Function):  # type: ignore[misc]
    """Known to autograd only so that training fails, rather than to go on without a gradient."""

    @staticmethod
    def forward(_: Any, hidden_states: Any, place: Place, routing: Routing) -> Any:
        h = hidden_states.detach().to("cpu", torch.float32).contiguous().numpy()
        out = torch.from_numpy(place.experts.run(place.layer, h, routing))
        return out.to(hidden_states.device, hidden_states.dtype)

    @staticmethod
    def backward(_: Any, *__: Any) -> Any:
        raise RuntimeError("experts in tiers have no gradients: this model cannot be trained")


@torch.compiler.disable  # type: ignore[untyped-decorator]
def tiered_experts(
    self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any
) -> Any:  # [num_tokens, hidden_size], as hidden_states
    """What transformers calls for every layer: the routed experts' weighted sum."""
    place = getattr(self, "tiered", None)
    if place is None:
        raise RuntimeError(
            'experts_implementation="tiered" needs the model to be loaded with '
            "quantization_config=tiered.transformers.TieredConfig(...)"
        )
    routing = Routing(
        top_k_index.detach().to("cpu", torch.int32).contiguous().numpy(),
        top_k_weights.detach().to("cpu", torch.float32).contiguous().numpy(),
    )
    return _Experts.apply(hidden_states, place, routing)


register_quantization_config(NAME)(TieredConfig)
register_quantizer(NAME)(TieredQuantizer)
ALL_EXPERTS_FUNCTIONS.register(NAME, tiered_experts)
