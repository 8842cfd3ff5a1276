"""Who may import whom: control knows no arithmetic library, arithmetic knows nothing of ours."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "tiered": {"numba", "llvmlite", "torch", "transformers", "triton", "gpu_backend"},
    "cpu_kernels": {"tiered", "gpu_backend", "torch", "transformers", "triton"},
    "gpu_backend": {"tiered", "transformers"},
}
ALLOWED = {
    ("tiered/backend.py", "gpu_backend"),  # the one place that opens a GPU
    ("tiered/transformers.py", "torch"),  # another library's decoder, whose experts we compute:
    ("tiered/transformers.py", "transformers"),  # nothing of ours imports this file
    ("tiered/commands/distill.py", "torch"),  # says what to install where it is missing
}
TRAINING = "tiered/distilling/"  # needs gradients, so torch; nothing that runs a model imports it


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_arrows(package):
    for file in (ROOT / package).rglob("*.py"):
        name = file.relative_to(ROOT).as_posix()
        wrong = {m for m in imported(file) if m in FORBIDDEN[package] and (name, m) not in ALLOWED}
        if name.startswith(TRAINING):
            wrong -= {"torch"}
        assert not wrong, f"{name} must not import {', '.join(sorted(wrong))}"


def test_describing_a_model_loads_no_arithmetic_library():
    code = (
        "import sys, tiered.formats, tiered.cli, tiered.commands.info; "
        "print(sorted({'numba', 'torch', 'transformers'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stderr


def test_nothing_of_ours_imports_the_hook_into_transformers():
    for file in (ROOT / "tiered").rglob("*.py"):
        names = {
            f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assert not [name for name in names if name.startswith("tiered.transformers")], file


def test_only_its_command_imports_the_training():
    for file in (ROOT / "tiered").rglob("*.py"):
        name = file.relative_to(ROOT).as_posix()
        if not name.startswith((TRAINING, "tiered/commands/distill.py")):
            assert "tiered.distilling" not in file.read_text(), file
