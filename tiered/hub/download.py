"""Models from the Hugging Face hub, in its own cache folder, so that they are held once.

Layout: hub/models--user--repo/{blobs/SHA, refs/main, snapshots/COMMIT/FILE -> ../../blobs/SHA}.
Environment: HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tiered.version import __version__

CHUNK = 1 << 20  # bytes
ALIASES = {
    "gpt-oss-20b": "openai/gpt-oss-20b",
    "gpt-oss-120b": "openai/gpt-oss-120b",
    "olmoe": "allenai/OLMoE-1B-7B-0924-Instruct-GGUF:Q4_K_M",
    "qwen3-30b": "Qwen/Qwen3-30B-A3B-GGUF:Q4_K_M",
    "qwen3-coder-30b": "unsloth/Qwen3-Coder-30B-A3B-Instruct-GGUF:Q4_K_M",
    "mixtral": "TheBloke/Mixtral-8x7B-Instruct-v0.1-GGUF:Q4_K_M",
}
# What a folder of safetensors needs to be opened; code and other formats stay where they are.
FOLDER_FILES = re.compile(
    r"[^/]+\.safetensors|[^/]+\.safetensors\.index\.json|config\.json|generation_config\.json|"
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|chat_template\.(json|jinja)"
)
PART = re.compile(r"-\d{5}-of-\d{5}$")


class Name(NamedTuple):
    """user/repo, and which of its quantizations, as in user/repo:Q4_K_M."""

    repo: str
    quant: str = ""

    @classmethod
    def parse(cls, text: str) -> Name:
        text = ALIASES.get(text.lower(), text).removeprefix("hf.co/")
        repo, _, quant = text.partition(":")
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo) or not re.fullmatch(
            r"[\w.-]*", quant
        ):
            known = ", ".join(sorted(ALIASES))
            raise ValueError(
                f"{text!r} is no model of the hub: expected user/repo or user/repo:QUANT, or one "
                f"of {known}"
            )
        return cls(repo, quant)

    def __str__(self) -> str:
        return f"{self.repo}:{self.quant}" if self.quant else self.repo


class RemoteFile(NamedTuple):
    """A file of a repository. `digest` is sha256 of large files, git's sha1 of small ones."""

    name: str
    nbytes: int
    digest: str

    @property
    def is_large(self) -> bool:
        return len(self.digest) == 64


class Listing(NamedTuple):
    commit: str
    files: list[RemoteFile]

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)


def cache_folder() -> Path:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or home.expanduser() / "hub")


def is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def repo_folder(name: Name) -> Path:
    return cache_folder() / ("models--" + name.repo.replace("/", "--"))


def list_remote(name: Name) -> Listing:
    """What of a repository is wanted, without downloading it. Raises OSError and ValueError."""
    quoted = urllib.parse.quote(name.repo)
    with _open(f"/api/models/{quoted}/revision/main?blobs=true") as response:
        answer = json.load(response)
    files = [
        RemoteFile(
            item["rfilename"],
            item.get("size") or (item.get("lfs") or {}).get("size") or 0,
            (item.get("lfs") or {}).get("sha256") or item.get("blobId") or "",
        )
        for item in answer.get("siblings", [])
    ]
    commit = str(answer.get("sha"))
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise ValueError(f"{name.repo}: the hub's answer names no commit")
    return Listing(commit, choose_files(name, files))


def choose_files(name: Name, files: list[RemoteFile]) -> list[RemoteFile]:
    """The GGUF file of the wanted quantization (all its parts), or else the folder's files."""
    safe = [file for file in files if _is_plain(file.name) and re.fullmatch(
        r"[0-9a-f]{40}|[0-9a-f]{64}", file.digest)]  # fmt: skip
    models: dict[str, list[RemoteFile]] = {}
    for file in safe:
        if file.name.endswith(".gguf") and "mmproj" not in file.name:
            stem = PART.sub("", file.name.removesuffix(".gguf"))
            models.setdefault(stem, []).append(file)
    if name.quant:
        end = re.compile(rf"(^|[-._/]){re.escape(name.quant)}$", re.IGNORECASE)
        found = [stem for stem in models if end.search(stem)]
        if len(found) != 1:
            choices = ", ".join(sorted(stem.rsplit("/")[-1] for stem in models)) or "no GGUF file"
            raise ValueError(
                f"{name.repo} has {len(found)} models {name.quant!r}; it has {choices}"
            )
        return sorted(models[found[0]])
    chosen = [file for file in safe if FOLDER_FILES.fullmatch(file.name)]
    if any(file.name.endswith(".safetensors") for file in chosen):
        return chosen
    if len(models) == 1:
        return sorted(next(iter(models.values())))
    choices = ", ".join(sorted(models)) or "neither GGUF nor safetensors files"
    raise ValueError(f"say which model of {name.repo}, as {name.repo}:Q4_K_M; it has {choices}")


def _is_plain(name: str) -> bool:
    """Whether a file's name stays inside the folder it is put into."""
    parts = name.split("/")
    return all(part not in ("", ".", "..") and "\\" not in part for part in parts)


def pull(
    name: Name, listing: Listing, progress: Callable[[int], None] = lambda count: None
) -> Path:
    """Download what is missing, and return the model's path; `progress` gets numbers of bytes.

    An interrupted download goes on where it was. A file whose checksum is wrong is removed, and
    OSError raised.
    """
    place = repo_folder(name)
    snapshot = place / "snapshots" / listing.commit
    for file in listing.files:
        blob = place / "blobs" / file.digest
        if blob.is_file():
            progress(file.nbytes)
        else:
            _download(name, listing.commit, file, blob, progress)
        link = snapshot / file.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            depth = len(Path(file.name).parts) + 1
            link.symlink_to(Path(*[".."] * depth, "blobs", file.digest))
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / "main").write_text(listing.commit, encoding="utf-8")
    first = snapshot / listing.files[0].name
    return first if first.suffix == ".gguf" else snapshot


def _download(
    name: Name, commit: str, file: RemoteFile, blob: Path, progress: Callable[[int], None]
) -> None:
    part = blob.with_name(blob.name + ".incomplete")
    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    if have > file.nbytes:
        have = 0
    free = shutil.disk_usage(part.parent).free
    if file.nbytes - have > free:
        raise OSError(f"{file.name} needs {file.nbytes - have} bytes, and the disk has {free}")
    if have < file.nbytes or not have:
        with _open(_path(name, commit, file), start=have) as response:
            if have and response.status != 206:  # it begins again
                have = 0
            progress(have)
            with part.open("r+b" if have else "wb") as out:
                out.seek(have)
                out.truncate()
                while chunk := response.read(CHUNK):
                    out.write(chunk)
                    progress(len(chunk))
    else:
        progress(have)
    size = part.stat().st_size
    if size != file.nbytes:
        raise OSError(
            f"{file.name}: the connection ended at {size} of {file.nbytes} bytes; "
            "pull again to go on"
        )
    if checksum(part, file) != file.digest:
        part.unlink()
        raise OSError(f"{file.name}: its checksum is not the hub's; removed, pull again")
    part.replace(blob)


def read_start(name: Name, commit: str, file: RemoteFile, nbytes: int) -> bytes:
    """The first bytes of a file, without the rest of it. Raises OSError if there are fewer."""
    nbytes = min(nbytes, file.nbytes)
    with _open(_path(name, commit, file), end=nbytes) as response:
        data: bytes = response.read(nbytes)  # also of a server that sends it all
    if len(data) != nbytes:
        raise OSError(f"{file.name}: the connection ended at {len(data)} of {nbytes} bytes")
    return data


def _path(name: Name, commit: str, file: RemoteFile) -> str:
    return f"/{urllib.parse.quote(name.repo)}/resolve/{commit}/{urllib.parse.quote(file.name)}"


def checksum(path: Path, file: RemoteFile) -> str:
    """The digest that the hub has for such a file: sha256, or git's of small ones."""
    digest = hashlib.sha256() if file.is_large else hashlib.sha1(b"blob %d\0" % file.nbytes)
    with path.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _open(path: str, start: int = 0, end: int | None = None) -> Any:
    """An answer of the hub; of a file from byte `start` to before `end`, if it can be asked for."""
    if is_offline():
        raise OSError("HF_HUB_OFFLINE is set: nothing is downloaded")
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    request = urllib.request.Request(endpoint + path)
    request.add_header("User-Agent", f"tiered/{__version__}")
    if start or end:
        request.add_header("Range", f"bytes={start}-{end - 1 if end else ''}")
    if token := _token():  # not for the storage that the hub redirects to
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        return urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        error.close()
        reasons = {
            401: "it needs a token: set HF_TOKEN",
            403: "your token may not read it: accept the model's terms on its page",
            404: "there is no such model",
        }
        reason = reasons.get(error.code, f"the hub answers {error.code} {error.reason}")
        raise OSError(f"{endpoint}{path}: {reason}") from None
    except urllib.error.URLError as error:
        raise OSError(f"cannot reach {endpoint}: {error.reason}") from None


def _token() -> str:
    if token := os.environ.get("HF_TOKEN"):
        return token.strip()
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    file = Path(os.environ.get("HF_TOKEN_PATH") or home.expanduser() / "token")
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""
