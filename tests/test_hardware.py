"""Hardware descriptions and shapes of known models."""

import pytest

from tiered.planning import hardware, shapes, sizes

GOOD = """
label = "a machine"
[gpu]
vram = "8G"
bandwidth = 256.0
compute = 30
link = 12.5
[host]
ram = "16G"
bandwidth = 50.0
cores = 8
compute = 300.0
[disk]
bandwidth = 3.0
"""


@pytest.mark.parametrize("name", hardware.names())
def test_shipped_descriptions(name):
    machine = hardware.find(name)
    assert machine.name == name and machine.label and machine.source
    assert machine.host.ram >= 1 << 30
    if machine.gpu:
        assert machine.gpu.bandwidth > machine.gpu.link


def test_a_file_of_the_user(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    mine = hardware.find(str(path))
    assert (mine.name, mine.label) == ("mine", "a machine")
    assert mine.gpu.vram == 8 << 30
    more = mine.with_sizes(ram=64 << 30, vram=12 << 30)
    assert (more.host.ram, more.gpu.vram) == (64 << 30, 12 << 30)
    assert more.gpu.link == mine.gpu.link


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("link = 12.5", "lnk = 12.5", "unknown key 'lnk'"),
        ("link = 12.5", "", "'link' is missing"),
        ("link = 12.5", "link = -1", "'link' is -1"),
        ("link = 12.5", 'link = "fast"', "must be a number"),
        ('vram = "8G"', 'vram = "eight"', "is no size"),
        ("cores = 8", "cores = 2.5", "whole number"),
        ("cores = 8", "cores = 8\nefficiency = 1.5", "at most 1"),
        ("link = 12.5", "link = 12.5\ncount = 1.5", "'count' is 1.5, but must be a whole number"),
        ("cores = 8", "cores = nan", "'cores' is nan"),
        ("cores = 8", "cores = true", "must be a number"),
        ("[disk]", "[disc]", "table"),
        ('label = "a machine"', 'lable = "x"', "unknown key 'lable'"),
        ("[gpu]", "[gpu", "no valid TOML"),
    ],
)
def test_nonsense_is_refused_in_one_line(tmp_path, old, new, message):
    path = tmp_path / "mine.toml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ValueError, match=message) as error:
        hardware.find(str(path))
    assert "mine.toml" in str(error.value) and "\n" not in str(error.value)


def test_unknown_names_list_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="rtx4060ti-16gb"):
        hardware.find("rtx9090")
    with pytest.raises(ValueError, match="no such"):
        hardware.find(str(tmp_path / "missing.toml"))
    with pytest.raises(ValueError, match="has no GPU"):
        hardware.find("laptop").with_sizes(vram=1 << 30)
    with pytest.raises(ValueError, match="mixtral-8x7b"):
        shapes.find("mixtral-9x9b")


PARAMETERS = {  # billions, in all and active, as their authors say
    "mixtral-8x7b": (46.7, 12.9),
    "qwen3-30b-a3b": (30.5, 3.3),
    "olmoe-1b-7b": (6.9, 1.3),
    "qwen1.5-moe-a2.7b": (14.3, 2.7),
    "qwen2-57b-a14b": (57.4, 14.2),
    "deepseek-v2-lite": (15.7, 2.4),
    "deepseek-v2": (236.0, 21.0),
    "deepseek-v3": (671.0, 37.0),
    "gpt-oss-20b": (20.9, 3.6),
    "gpt-oss-120b": (116.8, 5.1),
    "phi-3.5-moe": (41.9, 6.6),
    "lfm2-8b-a1b": (8.3, 1.5),
    "glm-4.6": (355.0, 32.0),
    "glm-4.7-flash": (30.0, 3.0),
    "llama-4-scout": (109.0, 17.0),  # with the part that sees images
    "llama-4-maverick": (400.0, 17.0),
    "granite-4.0-h-tiny": (7.0, 1.0),
    "granite-4.0-h-small": (32.0, 9.0),
    "dots.llm1": (142.0, 14.0),
    "solar-open-100b": (102.6, 12.0),
    "k-exaone-236b-a23b": (236.0, 23.0),
    "hy3": (295.0, 21.0),
    "mellum2-12b-a2.5b": (12.1, 2.5),
    "qwen3-vl-30b-a3b": (30.5, 3.3),
    "qwen3-vl-235b-a22b": (235.0, 22.0),
}


@pytest.mark.parametrize("name", shapes.names())
def test_shapes_have_the_parameters_their_authors_say(name):
    shape = shapes.find(name)
    model = sizes.of_shape(shape, "f16")
    assert model.total == model.dense + model.all_experts
    assert 0 < model.active_experts < model.all_experts
    if name in PARAMETERS:
        total, active = PARAMETERS[name]
        slack = 0.5 if total == round(total) else 0.0  # where they say it in whole billions
        assert model.total / 2e9 == pytest.approx(total, abs=0.01 * total + slack)
        embeddings = (model.embed + model.head) / 2e9  # some count both, some one, some none
        core = (model.dense + model.active_experts) / 2e9 - embeddings
        assert core - 0.1 - slack < active < core + embeddings + 0.1 + slack


def test_models_of_one_shape():
    assert shapes.find("glm-4.7") == shapes.find("glm-4.6")
    names = [name for known in shapes.names() for name in (known, *shapes.find(known).also)]
    assert len(set(names)) == len(names)


def test_a_shape_with_a_misspelt_key_is_refused():
    with pytest.raises(ValueError, match="unknown key 'num_layrs'"):
        shapes.from_dict("x", {"num_layrs": 3})
    with pytest.raises(ValueError, match="is missing"):
        shapes.from_dict("x", {"num_layers": 3})


def test_quantization_sets_the_size():
    shape = shapes.find("mixtral-8x7b")
    q4, q8 = sizes.of_shape(shape, "q4_0"), sizes.of_shape(shape, "q8_0")
    assert q4.total == pytest.approx(26.4e9, rel=0.01)  # the published file's size
    assert q8.all_experts / q4.all_experts == pytest.approx(8.5 / 4.5)
    with pytest.raises(ValueError, match="q4_k_m"):
        sizes.of_shape(shape, "q3")
