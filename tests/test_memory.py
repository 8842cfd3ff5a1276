import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiered import memory
from tiered.memory import available_bytes, container_room, format_bytes, parse_bytes

MiB = 1 << 20


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("8G", 8 << 30),
        ("8g", 8 << 30),
        ("1.5GiB", 3 << 29),
        ("3000M", 3000 * MiB),
        ("512 MB", 512 * MiB),
        ("2T", 2 << 40),
        ("16k", 1 << 14),
        ("100", 100),
        ("7B", 7),
        (12345, 12345),
    ],
)
def test_sizes_in_words(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "G", "8X", "-1G", "1,5G", "8 G B", "0x10", "nan", "1e9"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match=r"is no size"):
        parse_bytes(text)


def test_negative_numbers_are_refused():
    with pytest.raises(ValueError, match="negative"):
        parse_bytes(-5)


@given(st.integers(0, 1 << 50))
def test_printed_sizes_can_be_read_back_approximately(nbytes):
    assert parse_bytes(format_bytes(nbytes)) == pytest.approx(nbytes, rel=0.06)


class Machine:
    """A made-up /proc and cgroup tree."""

    def __init__(self, folder):
        self.proc = folder / "proc"
        self.mount = folder / "sys fs"  # mountinfo writes the blank as \\040
        (self.proc / "self").mkdir(parents=True)

    def belongs(self, membership, kind, options="rw", root="/"):
        (self.proc / "self/cgroup").write_text(f"5:cpu,cpuacct:/elsewhere\n{membership}\n")
        mount = str(self.mount).replace(" ", "\\040")
        (self.proc / "self/mountinfo").write_text(
            "22 1 0:20 / /proc rw - proc proc rw\n"
            f"31 23 0:28 {root} {mount} rw,relatime shared:9 - {kind} {kind} {options}\n"
        )

    def group(self, path, **files):
        folder = self.mount / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name.replace("__", ".")).write_text(f"{text}\n")

    def room(self):
        return min(container_room(self.proc), default=None)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_version_2_takes_the_tightest_ancestor(machine):
    machine.belongs("0::/pod/app/worker", "cgroup2")
    machine.group("", memory__current=1)  # the root group has no limit file
    machine.group("pod", memory__max=1000 * MiB, memory__current=300 * MiB)
    machine.group("pod/app", memory__max=900 * MiB, memory__current=100 * MiB)
    machine.group("pod/app/worker", memory__max="max", memory__current=50 * MiB)
    assert machine.room() == 700 * MiB


def test_page_cache_is_room(machine):
    machine.belongs("0::/app", "cgroup2")
    stat = f"anon 5\ninactive_file {80 * MiB}\nactive_file 9"
    machine.group("app", memory__max=200 * MiB, memory__current=100 * MiB, memory__stat=stat)
    assert machine.room() == 180 * MiB


def test_version_1(machine):
    machine.belongs("4:memory:/docker/0123", "cgroup", "rw,memory")
    machine.group("", memory__limit_in_bytes=(1 << 63) - 4096, memory__usage_in_bytes=5)
    machine.group(
        "docker/0123",
        memory__limit_in_bytes=512 * MiB,
        memory__usage_in_bytes=112 * MiB,
        memory__stat=f"inactive_file 1\ntotal_inactive_file {12 * MiB}",
    )
    assert machine.room() == 412 * MiB


def test_a_mount_that_shows_only_the_containers_own_part(machine):
    machine.belongs("4:memory:/docker/0123", "cgroup", "rw,memory", root="/docker/0123")
    machine.group("", memory__limit_in_bytes=64 * MiB, memory__usage_in_bytes=0)
    assert machine.room() == 64 * MiB


def test_a_namespace_hides_the_path(machine):
    machine.belongs("0::/not/visible/here", "cgroup2")
    machine.group("", memory__max=32 * MiB, memory__current=2 * MiB)
    assert machine.room() == 30 * MiB


def test_other_controllers_do_not_count(machine):
    machine.belongs("4:memory:/x", "cgroup", "rw,cpu")
    machine.group("x", memory__limit_in_bytes=5, memory__usage_in_bytes=0)
    assert machine.room() is None


def test_no_cgroups_at_all(tmp_path):
    assert list(container_room(tmp_path)) == []
    assert available_bytes(tmp_path) > 0


def test_available_is_the_containers_room_if_that_is_less(machine):
    machine.belongs("0::/app", "cgroup2")
    machine.group("app", memory__max=3 * MiB, memory__current=1 * MiB)
    assert available_bytes(machine.proc) == 2 * MiB
    machine.group("app", memory__current=4 * MiB)
    assert available_bytes(machine.proc) == 0


def test_the_default_leaves_a_margin(monkeypatch, machine):
    machine.belongs("0::/app", "cgroup2")
    machine.group("app", memory__max=1000 * MiB, memory__current=0)
    held = psutil.Process().memory_info()
    monkeypatch.setattr(memory.psutil.Process, "memory_info", lambda self: held)
    assert memory.default_limit(machine.proc) == held.rss + 1000 * MiB - 250 * MiB
