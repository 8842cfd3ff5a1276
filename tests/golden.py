"""What transformers says about the tiny checkpoints of tiny.py: writes tests/data/golden.npz.

    python tests/golden.py

Run where torch and transformers are installed, after tiny.py's checkpoints changed. The tests
compare with the file, so that they need neither.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tiny

FILE = Path(__file__).parent / "data" / "golden.npz"
PROMPT = list(range(3, 43))
NUM_ROWS = 8  # of logits that are kept: those of the last tokens
NUM_TOKENS = 32


# What transformers wants in config.json besides; it calls Kimi K2 DeepSeek-V3.
BESIDES: dict[str, dict[str, Any]] = {
    "kimi_k2": dict(model_type="deepseek_v3"),
    "qwen3_vl_moe": dict(vision_config=dict(
        depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64,
        deepstack_visual_indexes=[0],
    )),
}  # fmt: skip


# It transposes Qwen3-VL's experts if that fits: they must not be square.
SIZES = {"qwen3_vl_moe": dict(expert_size=96)}


def checkpoint(folder: Path, model_type: str) -> Path:
    """Always the same one."""
    return tiny.hf_checkpoint(folder, model_type, "f32", seed=7, **SIZES.get(model_type, {}))


def digest(folder: Path) -> str:
    """Of the checkpoint's bytes: another NumPy might draw other random numbers."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def reference(path: Path) -> Any:
    """What transformers makes of a checkpoint, whose config.json is changed for it."""
    import torch
    import transformers

    values = json.loads((path / "config.json").read_text())
    values |= BESIDES.get(values["model_type"], {})
    (path / "config.json").write_text(json.dumps(values))
    sees = "vision_config" in values
    kind = "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"
    return getattr(transformers, kind).from_pretrained(path, dtype=torch.float32).eval()


def main() -> None:
    import torch

    golden = {}
    for model_type in tiny.ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            path = checkpoint(Path(folder) / model_type, model_type)
            model = reference(path)
            with torch.no_grad():
                ids = torch.tensor([PROMPT])
                logits = model(ids).logits[0, -NUM_ROWS:].numpy()
                options = dict(max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None)
                tokens = model.generate(ids, **options)[0, len(PROMPT) :].numpy()
            golden[f"{model_type}.digest"] = np.array(digest(path))
        golden[f"{model_type}.logits"] = logits.astype(np.float32)
        golden[f"{model_type}.tokens"] = tokens.astype(np.int32)
    np.savez_compressed(FILE, **golden)


if __name__ == "__main__":
    main()
