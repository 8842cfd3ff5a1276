"""Models of the hub that are on this machine: found, listed and removed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from tiered.hub.download import PART, Name, cache_folder, repo_folder

QUANT = re.compile(r"[-._](I?Q\d\w*|BF16|F16|F32|FP16|MXFP4\w*)$", re.IGNORECASE)


class Pulled(NamedTuple):
    """A model: `path` is what an engine opens."""

    name: Name
    path: Path
    files: list[Path]  # links into the repository's blobs

    @property
    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def find_model(text: str) -> Path:
    """The path of a model given as a file or folder, or by its name on the hub.

    Raises FileNotFoundError if there is neither; nothing is downloaded.
    """
    path = Path(text).expanduser()
    if path.exists():
        return path
    try:
        name = Name.parse(text)
    except ValueError:
        raise FileNotFoundError(f"no file or folder {text!r}, and no model of that name") from None
    found = [model for model in pulled() if matches(model, name)]
    if len(found) == 1:
        return found[0].path
    if found:
        names = ", ".join(str(model.name) for model in found)
        raise FileNotFoundError(f"{text} could be one of {names}")
    raise FileNotFoundError(f"{text} is not on this machine: tiered pull {text} downloads it")


def matches(model: Pulled, name: Name) -> bool:
    same = model.name.repo == name.repo
    return same and name.quant.lower() in ("", model.name.quant.lower())


def pulled() -> list[Pulled]:
    """Complete models in the cache, by name. Others than ours put theirs there, too."""
    models = []
    for place in sorted(cache_folder().glob("models--*--*")):
        repo = place.name.removeprefix("models--").replace("--", "/", 1)
        commit = place / "refs" / "main"
        if not commit.is_file():
            continue
        snapshot = place / "snapshots" / commit.read_text(encoding="utf-8").strip()
        models += in_snapshot(repo, snapshot)
    return models


def in_snapshot(repo: str, snapshot: Path) -> list[Pulled]:
    files = sorted(file for file in snapshot.rglob("*") if file.is_file())
    ggufs: dict[str, list[Path]] = {}
    for file in files:
        if file.suffix == ".gguf":
            stem = PART.sub("", file.relative_to(snapshot).as_posix().removesuffix(".gguf"))
            ggufs.setdefault(stem, []).append(file)
    models = []
    for stem, parts in ggufs.items():
        quant = QUANT.search(stem)
        name = Name(repo, quant[1] if quant else stem.rsplit("/")[-1])
        models.append(Pulled(name, parts[0], parts))
    if any(file.suffix == ".safetensors" for file in files) and (snapshot / "config.json").exists():
        models.append(Pulled(Name(repo), snapshot, [f for f in files if f.suffix != ".gguf"]))
    return models


def remove(model: Pulled) -> int:
    """Delete a model's files; returns how many bytes became free."""
    place = repo_folder(model.name)
    freed = 0
    for file in model.files:
        blob = file.resolve()
        file.unlink()
        if place in blob.parents and not _is_linked(place, blob):
            freed += blob.stat().st_size
            blob.unlink()
    if not any(link.is_symlink() for link in place.rglob("*")):
        _remove_tree(place)
    return freed


def _is_linked(place: Path, blob: Path) -> bool:
    links = (place / "snapshots").rglob("*")
    return any(link.is_symlink() and link.resolve() == blob for link in links)


def _remove_tree(place: Path) -> None:
    """A repository's folder in which no file of a model is left."""
    for item in sorted(place.rglob("*"), reverse=True):
        if item.is_dir() and not item.is_symlink():
            item.rmdir()
        else:
            item.unlink()
    place.rmdir()
