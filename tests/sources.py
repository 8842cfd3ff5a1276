"""Checkpoints that the tests of pruning and distillation make smaller, and some to be refused."""

import tiny

from tiered.weights.convert import convert

NO_GROUPS = {"n_group": 1, "topk_group": 1}  # of experts: they could not be cut


def source(folder, model_type="mixtral", **options):
    config = NO_GROUPS if "n_group" in tiny.hf_config(model_type) else {}
    return tiny.hf_checkpoint(
        folder / "source", model_type, tokenizer=True, config=config, **options
    )


def source_of_kind(folder, kind):
    """`kind` is an architecture; or "gguf", "store" or "nothing"."""
    if kind == "gguf":
        return tiny.gguf_checkpoint(folder / "tiny.gguf")
    if kind == "store":
        return convert(source(folder), folder / "store")
    return folder / "nothing" if kind == "nothing" else source(folder, kind)
