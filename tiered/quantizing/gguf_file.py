"""A rewritten checkpoint as one GGUF file, for us and for llama.cpp."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from cpu_kernels.formats import FORMATS
from tiered import models
from tiered.checkpoints.checkpoint import Checkpoint, Tensor
from tiered.checkpoints.gguf_header import read_header
from tiered.checkpoints.tensor_names import drafting_layer
from tiered.config import ModelConfig, RopeConfig
from tiered.formats import gguf as gguf_format
from tiered.formats import open_checkpoint
from tiered.quantizing.rewritten import Rewritten
from tiered.store import PROJECTIONS
from tiered.text.tokenizer_to_gguf import gguf_vocabulary
from tiered.weights.dense import dense_format
from tiered.weights.dequantize import dequantize
from tiered.weights.quantize import quantize_rows

# Of Hugging Face's architectures, those of which GGUF has the same tensors: how it pairs the values
# that rotate, and the key for the width of experts.
HF_ARCHITECTURES: Mapping[str, tuple[str, str]] = {
    "mixtral": ("adjacent", "feed_forward_length"),
    "olmoe": ("half", "feed_forward_length"),
    "qwen2_moe": ("half", "expert_feed_forward_length"),
    "qwen3_moe": ("half", "expert_feed_forward_length"),
}
DROPPED = (
    "split.",
    "general.file_type",
    "general.quantization_version",
    "general.alignment",
    "GGUF.",
)
FILE_TYPE = 0x7FFFFFFF  # GGUF's number for a mixture it has no number for; llama.cpp prints it
_EXPERTS = re.compile(r"\.experts\.[*{]")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Entry(NamedTuple):
    """A tensor of the new file; `data` is uint8, or float32."""

    name: str
    shape: tuple[int, ...]  # rows first
    format: str
    data: Callable[[], np.ndarray]


def check_gguf(checkpoint: Checkpoint) -> None:
    """ValueError if the model cannot be written as GGUF."""
    model_type = checkpoint.config.model_type
    if not gguf_format.matches(checkpoint.path) and model_type not in HF_ARCHITECTURES:
        raise ValueError(
            f"{checkpoint.path}: GGUF can be made of GGUF, and of Hugging Face folders with "
            f"{', '.join(HF_ARCHITECTURES)}, not {model_type}; write a store instead (a "
            "destination without .gguf)"
        )


def write_gguf(
    checkpoint: Rewritten, destination: Path, scratch: Path, progress: Callable[[int, int], None]
) -> None:
    """Write the file in the folder `scratch` (of the same disk); it gets its name when it is
    complete and opens. ValueError if it would not be the same model."""
    source = checkpoint.path
    from_gguf = gguf_format.matches(source)
    entries = list(_gguf_entries(checkpoint) if from_gguf else _hf_entries(checkpoint))
    unfinished = scratch / "unfinished.gguf"
    architecture = models.find(checkpoint.config.model_type, source).GGUF_ARCHITECTURE
    writer = gguf.GGUFWriter(unfinished, architecture)
    try:
        (_copy_metadata if from_gguf else _write_metadata)(writer, checkpoint)
        writer.add_file_type(FILE_TYPE)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for entry in entries:
            _announce(writer, entry)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, entry in enumerate(entries):
            progress(done, len(entries))
            writer.write_tensor_data(np.ascontiguousarray(entry.data()).reshape(-1))
    finally:
        writer.close()
    progress(len(entries), len(entries))
    _check_same(checkpoint.config, unfinished)
    unfinished.rename(destination)


def _announce(writer: Any, entry: Entry) -> None:
    kind = gguf.GGMLQuantizationType[entry.format.upper()]
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    total = int(np.prod(entry.shape)) // block * nbytes
    bytes_shape = (*entry.shape[:-1], entry.shape[-1] // block * nbytes)
    writer.add_tensor_info(entry.name, bytes_shape, np.dtype(np.uint8), total, raw_dtype=kind)


# --- tensors ---


def _expert_entries(checkpoint: Rewritten) -> Iterator[Entry]:
    config = checkpoint.config
    for layer in config.sparse_layers:
        for projection in PROJECTIONS:
            first = checkpoint.tensors[f"layers.{layer}.experts.0.{projection}"]
            whole = first._replace(nbytes=first.nbytes * config.num_experts)
            yield Entry(
                f"blk.{layer}.ffn_{projection}_exps.weight",
                (config.num_experts, *first.shape),
                first.format,
                partial(checkpoint.view, whole),
            )


def _gguf_entries(checkpoint: Rewritten) -> Iterator[Entry]:
    """As the source has them, but for experts and for what else was rewritten."""
    config = checkpoint.config
    names = models.find(config.model_type, checkpoint.path).GGUF_NAMES
    yield from _expert_entries(checkpoint)
    for file in gguf_format.model_files(checkpoint.path):
        for stored in read_header(file).tensors:
            pattern = names.get(_NUMBER.sub("{}", stored.name), "")
            numbers = _NUMBER.findall(stored.name)
            is_extra = drafting_layer(pattern, numbers, config.num_layers) is not None
            if _EXPERTS.search(pattern) and not is_extra:
                continue
            name = "" if is_extra else pattern.format(*numbers)
            tensor = checkpoint.rewritten.get(name, stored)
            yield _entry(checkpoint, stored.name, tensor._replace(shape=stored.shape), name)


def _hf_entries(checkpoint: Rewritten) -> Iterator[Entry]:
    config = checkpoint.config
    # Where several stored names are one canonical, the first is that of ordinary attention.
    stored: dict[str, str] = {}
    for name, canonical in models.find(config.model_type, checkpoint.path).GGUF_NAMES.items():
        stored.setdefault(canonical, name)
    yield from _expert_entries(checkpoint)
    adjacent = HF_ARCHITECTURES[config.model_type][0] == "adjacent"
    for canonical, tensor in checkpoint.tensors.items():
        if ".experts." in canonical:
            continue
        numbers = _NUMBER.findall(canonical)
        name = stored[_NUMBER.sub("{}", canonical)].format(*numbers)
        if tensor.shape[0] == 1 or len(tensor.shape) == 1 or ".router" in canonical:
            shape = tensor.shape[1:] if canonical.endswith("shared.scale") else tensor.shape
            yield Entry(name, shape, "f32", partial(checkpoint.float32, canonical))
            continue
        entry = _entry(checkpoint, name, tensor, canonical)
        part = canonical.rpartition(".")[2]
        if adjacent and part in ("q", "k"):
            entry = _paired(entry, config.num_heads if part == "q" else config.num_kv_heads)
        yield entry


def _entry(checkpoint: Rewritten, name: str, tensor: Tensor, canonical: str) -> Entry:
    """A dense tensor, in 8 bits where a store would have it so, or where GGUF lacks its format."""
    format = dense_format(tensor._replace(name=canonical), "int4")
    stored = tensor
    if not FORMATS[format].is_ggmls:
        format, stored = "q8_0", tensor._replace(format="f32")

    def data() -> np.ndarray:
        values = checkpoint.view(tensor)
        if stored.format != tensor.format:
            values = dequantize(values, tensor.format, tensor.shape)
        return values if format == tensor.format else quantize_rows(values, stored, format)

    return Entry(name, tensor.shape, format, data)


def _paired(entry: Entry, num_heads: int) -> Entry:
    """Rows of each head in another order: the two values that rotate together, side by side."""

    def data() -> np.ndarray:
        halves = entry.data().reshape(num_heads, 2, entry.shape[0] // num_heads // 2, -1)
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(-1)

    return entry._replace(data=data)


# --- keys ---


def _copy_metadata(writer: Any, checkpoint: Rewritten) -> None:
    reader = gguf.GGUFReader(gguf_format.model_files(checkpoint.path)[0])
    for key, field in reader.fields.items():
        if key.startswith(DROPPED) or key == "general.architecture":
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, inner)


def _write_metadata(writer: Any, checkpoint: Rewritten) -> None:
    config = checkpoint.config
    writer.add_name(checkpoint.path.resolve().name)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.rope.dim or config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.top_k)
    if config.clip_qkv:
        writer.add_clamp_kqv(config.clip_qkv)
    key = HF_ARCHITECTURES[config.model_type][1]
    writer.add_uint32(f"{writer.arch}.{key}", config.expert_size)
    if key != "feed_forward_length" and config.ffn_size:
        writer.add_feed_forward_length(config.ffn_size)
    if config.shared_expert_size:
        writer.add_expert_shared_feed_forward_length(config.shared_expert_size)
    source = checkpoint.tokenizer_source
    assert isinstance(source, Path)
    _write_vocabulary(writer, gguf_vocabulary(source, config.vocab_size))


def _write_vocabulary(writer: Any, keys: Mapping[str, Any]) -> None:
    kinds = gguf.GGUFValueType
    types = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}
    for key, value in keys.items():
        if isinstance(value, list):
            inner = kinds.INT32 if isinstance(value[0], int) else types[type(value[0])]
            writer.add_key_value(key, value, kinds.ARRAY, inner)
        else:
            writer.add_key_value(key, value, types[type(value)])


# Which values rotate together differs, and so does the order of rows; and GGUF may not name all
# tokens that end a text.
_ALIKE = "model_type", "rope", "eos_ids", "ffn_size"


def _check_same(config: ModelConfig, file: Path) -> None:
    """ValueError names a fact that the GGUF file does not tell as the source does."""
    with open_checkpoint(file) as written:
        found = written.config
    wrong = [
        field.name
        for field in fields(ModelConfig)
        if field.name not in _ALIKE
        and _stored(getattr(found, field.name)) != _stored(getattr(config, field.name))
    ]
    if _rotation(found) != _rotation(config):
        wrong.append("rope")
    if wrong:
        raise ValueError(
            f"{config.model_type} in GGUF has no way to say this model's {', '.join(wrong)}; write "
            "a store instead (a destination without .gguf)"
        )


def _stored(value: Any) -> Any:
    """What GGUF makes of a value: its numbers are float32."""
    return float(np.float32(value)) if isinstance(value, float) else value


def _rotation(config: ModelConfig) -> RopeConfig:
    rope = config.rope
    theta, dim = _stored(float(rope.theta)), rope.dim or config.head_dim
    return replace(rope, pairs="", theta=theta, dim=dim)
