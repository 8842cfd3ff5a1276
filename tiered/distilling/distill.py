"""Distillation from the first sample to the new checkpoint, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tiered.backend import default_threads, open_backend
from tiered.checkpoints.checkpoint import Checkpoint
from tiered.config import EngineConfig
from tiered.distilling.beginnings import concatenated, pools
from tiered.distilling.decoder import Decoder, check_decoder
from tiered.distilling.logits import (
    TEACHER,
    LogitsTraining,
    Texts,
    choose_texts,
    listen,
    logits_bytes,
)
from tiered.distilling.pool import Pool, load_pool, load_shared
from tiered.distilling.samples import MIN_TOKENS, read_samples, record, sample_bytes
from tiered.distilling.stored import (
    kind_of,
    layer_tensors,
    read_pool,
    read_report,
    student_files,
    write_layer,
)
from tiered.distilling.target import Target
from tiered.distilling.training import Recipe, split, train
from tiered.distilling.work import WorkFolder, work_path
from tiered.engine import DEFAULT_CONTEXT, Engine
from tiered.formats import open_checkpoint
from tiered.formats import safetensors as hugging_face
from tiered.quality.importance import Scores
from tiered.quality.layer_tap import WINDOW
from tiered.quality.windows import cut
from tiered.weights.convert import check_space
from tiered.weights.pieces import write_checkpoint
from tiered.weights.resume import stamps, token_digest

HEARD = "quantize", "context", "kv_dtype"  # choices that change what a teacher says
Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much


class Order(NamedTuple):
    """What is to be done."""

    source: Path
    destination: Path
    target: Target
    ids: Sequence[int]  # tokens of the calibration text
    recipe: Recipe
    choices: Mapping[str, Any]  # EngineConfig's, for the teacher


def distill(order: Order, progress: Progress) -> dict[str, Any]:
    """Write the student to the order's destination; returns the report.

    Raises ValueError if the text is too short, OSError if the disk is. After what was interrupted,
    the same call goes on from the last layer that was done.
    """
    target, source = order.target, order.source
    ids = windowed(order)
    if order.recipe.logits_steps:
        check_decoder(target.teacher)
        _texts(order, len(ids))
    settings = {
        "source": stamps(hugging_face.weight_files(source)),
        "target": target.config_json,
        "text": token_digest(ids),
        "recipe": order.recipe._asdict(),
        "teacher": {name: order.choices.get(name) for name in HEARD},
    }
    with open_checkpoint(source) as checkpoint:
        if not work_path(order.destination).exists():
            _check_space(order, checkpoint, len(ids))
        work = WorkFolder(order.destination, settings)
        scores = work.scores
        if scores is None:
            scores = _record(order, ids, work, progress)
        layers = _train_layers(order, checkpoint, scores, work, progress)
        files = {layer: work.layer_file(layer) for layer in target.layers}
        logits = None
        if order.recipe.logits_steps:
            logits, files = _train_logits(order, checkpoint, ids, files, work, progress)
        write_checkpoint(
            source, order.destination, student_files(checkpoint, target, files),
            target.config_json, lambda done, total: progress("writing", done, total),
        )  # fmt: skip
    work.remove()
    return {"tokens": len(ids), "layers": layers, "logits": logits}


def windowed(order: Order) -> Sequence[int]:
    """Tokens that lie in windows: all but perhaps the last. ValueError if they are too few."""
    ids = order.ids
    if len(ids) < MIN_TOKENS:
        raise ValueError(
            f"the text has {len(ids)} tokens, and at least {MIN_TOKENS} are needed, of which an "
            "eighth is held out: give a longer --text"
        )
    context = order.choices.get("context") or DEFAULT_CONTEXT
    size = min(WINDOW, context, order.target.teacher.context_length)
    return ids[: cut(len(ids), size, size)[-1].end]


def _check_space(order: Order, checkpoint: Checkpoint, num_tokens: int) -> None:
    """Samples, the trained layers, and the new checkpoint."""
    target, student = order.target, order.target.student
    kept = sum(
        piece.nbytes
        for pieces in student_files(checkpoint, target, {}).values()
        for piece in pieces
    )
    width = student.num_experts * student.expert_size if student.num_experts else student.ffn_size
    values = len(target.layers) * (3 * width + student.num_experts) * student.hidden_size
    trained = values * kind_of(checkpoint, target.layers[0]).itemsize
    needed = sample_bytes(target.teacher, num_tokens) + kept + 2 * trained
    if order.recipe.logits_steps:
        # The teacher's words, trained layers once more, and weights, best ones and two moments.
        texts = _texts(order, num_tokens)
        needed += logits_bytes(texts, student.vocab_size) + trained + 4 * 4 * values
    check_space(order.destination, needed)


def _record(
    order: Order, ids: Sequence[int], work: WorkFolder, progress: Progress
) -> Mapping[str, Scores]:
    def open_engine(backend: Any) -> Engine:
        return Engine(order.source, backend=backend, **order.choices)

    scores = record(
        open_engine, open_backend(EngineConfig(**order.choices)), order.target.teacher, ids,
        work.samples, order.target.is_dense,
        lambda done, total: progress("listening to the teacher", done, total),
    )  # fmt: skip
    work.keep_scores(scores)
    return scores


def _train_layers(
    order: Order,
    checkpoint: Checkpoint,
    scores: Mapping[str, Scores],
    work: WorkFolder,
    progress: Progress,
) -> dict[int, Any]:
    """Reports by layer. What an earlier run has done already is not done again."""
    torch.set_num_threads(order.choices.get("threads") or default_threads())
    epochs, layers = order.recipe.epochs, order.target.layers
    for number, layer in enumerate(layers):

        def show(epoch: int, done: int = number * epochs) -> None:
            progress("training", done + epoch, len(layers) * epochs)

        show(0)
        if not work.layer_file(layer).exists():
            _train_layer(order, checkpoint, scores, work, layer, show)
    progress("training", len(layers) * epochs, len(layers) * epochs)
    return {layer: read_report(work.layer_file(layer)) for layer in layers}


def _train_layer(
    order: Order,
    checkpoint: Checkpoint,
    scores: Mapping[str, Scores],
    work: WorkFolder,
    layer: int,
    progress: Callable[[int], None],
) -> None:
    kind = kind_of(checkpoint, layer)
    parts = split(read_samples(work.samples, layer), order.recipe.device)
    beginnings = _beginnings(order.target, checkpoint, scores, layer, parts[0].inputs.cpu())
    trained = train(beginnings, parts, order.target.student, order.recipe, kind, progress)
    report = {
        "beginning": trained.beginning,
        "beginnings": trained.beginnings,
        "epochs": [epoch._asdict() for epoch in trained.epochs],
        "error": trained.error,
    }
    tensors = layer_tensors(checkpoint, order.target, layer, trained.pool)
    write_layer(work.layer_file(layer), tensors, report)


def _texts(order: Order, num_tokens: int) -> Texts:
    context = order.choices.get("context") or DEFAULT_CONTEXT
    context = min(context, order.target.teacher.context_length)
    return choose_texts(num_tokens, context, order.recipe.logits_steps, order.recipe.seed)


def _train_logits(
    order: Order,
    checkpoint: Checkpoint,
    ids: Sequence[int],
    files: Mapping[int, Path],
    work: WorkFolder,
    progress: Progress,
) -> tuple[dict[str, Any], dict[int, Path]]:
    """The report, and the files of the layers as they are after it."""
    target, recipe = order.target, order.recipe
    texts = _texts(order, len(ids))
    if not (work.logits / TEACHER).exists():
        with Engine(order.source, **order.choices) as engine:
            listen(engine, ids, texts, work.logits,
                   lambda done, total: progress("hearing what it says", done, total))  # fmt: skip
    pools = {layer: read_pool(checkpoint, target, layer, file) for layer, file in files.items()}
    training = LogitsTraining(
        Decoder(checkpoint, target.is_dense, recipe.device), target.student, pools,
        {layer: kind_of(checkpoint, layer) for layer in pools},
        ids, texts, work.logits, recipe.device,
    )  # fmt: skip
    said = training.run(
        recipe.logits_steps, recipe.logits_learning_rate,
        lambda done, total: progress("training by logits", done, total),
    )  # fmt: skip
    new = {layer: work.logits / file.name for layer, file in files.items()}
    for layer, file in new.items():
        tensors = layer_tensors(checkpoint, target, layer, said.pools[layer])
        write_layer(file, tensors, {})
    report = {
        "before": said.before,
        "after": said.after,
        "steps": [at for at, _ in said.evaluations],
        "held_out": [divergence for _, divergence in said.evaluations],
    }
    return report, new


def _beginnings(
    target: Target,
    checkpoint: Checkpoint,
    scores: Mapping[str, Scores],
    layer: int,
    inputs: torch.Tensor,
) -> Iterator[tuple[str, Pool]]:
    teacher, config = load_pool(checkpoint, layer), target.teacher
    if target.is_dense:
        shared = load_shared(checkpoint, layer)
        pool = concatenated(teacher, shared, inputs, config, target.student.ffn_size)
        return iter([("concatenated", pool)])
    return pools(teacher, inputs, config, scores, layer, target.student.num_experts)
