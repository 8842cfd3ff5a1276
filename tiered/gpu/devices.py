"""Names of devices, as users give them."""

from __future__ import annotations

import re

from tiered.planning import hardware
from tiered.planning.hardware import Hardware

KNOWN = (
    "auto, cpu, cuda, cuda:N, cuda:all, sim, sim:COUNT, sim:CARD (as rtx4090: see `tiered plan "
    "--help`), or several cards as cuda:0,cuda:1 or sim:CARD,sim:CARD"
)


def device_names(text: str) -> list[str]:
    """One name for each device: "cuda:0,cuda:1" is two cards, "sim:2" two simulated ones, which are
    called sim:0 and sim:1, and "sim:rtx4090" one of a described kind. ValueError says what there
    is."""
    if text in ("auto", "cpu", "cuda", "cuda:all", "sim"):
        return [text]
    parts = [part.strip() for part in text.split(",")]
    if (match := re.fullmatch(r"sim:(\d{1,2})", text)) is not None:
        parts = ["sim"] * int(match[1])
    if parts and all(part == "sim" for part in parts):
        return [f"sim:{number}" for number in range(len(parts))]
    if parts and all(re.fullmatch(r"sim:\D.*", part) for part in parts):
        for part in parts:
            described(part)
        return parts
    if not parts or not all(re.fullmatch(r"cuda(:\d+)?", part) for part in parts):
        raise ValueError(f"device must be {KNOWN}; not {text!r}")
    names = ["cuda:0" if part == "cuda" else part for part in parts]
    if len(set(names)) < len(names):
        raise ValueError(f"device {text!r} has a card twice: name each once")
    return names


def described(name: str) -> Hardware | None:
    """The machine that "sim:CARD" is; None for what is not described. ValueError names the cards
    that are."""
    match = re.fullmatch(r"sim:(\D.*)", name)
    if match is None:
        return None
    machine = hardware.find(match[1])
    if machine.gpu is None:
        raise ValueError(f"device {name!r}: {machine.label} has no GPU to be simulated")
    return machine
