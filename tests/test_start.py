import json
from pathlib import Path

import pytest

from mini_r1 import InputError
from mini_r1.model import model_path
from mini_r1.recipe import load_recipe
from mini_r1.run import MERGED_FOLDER
from mini_r1.start import Start
from tests.test_model import adapt, damaged

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny-cpu.yaml"


def start_from(name, run_dir):
    options = {"model_name_or_path": name, "output_dir": run_dir}
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    return Start(load_recipe(RECIPE, arguments))


def test_a_whole_model_is_trained_where_it_lies(tmp_path, capsys):
    start = start_from("tiny_base", tmp_path / "run")
    assert (start.weights, start.folder) == ("tiny_base", model_path("tiny_base"))
    assert not start.is_adapter
    start.ended()
    assert Path(start.folder).is_dir()
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "run").exists()


def test_an_adapter_is_merged_and_nothing_is_written_yet(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")  # as containers export it, without a launch
    adapter = adapt("tiny_base", tmp_path / "adapter")
    start = start_from(adapter, tmp_path / "run")
    assert start.folder == str(tmp_path / "run" / MERGED_FOLDER)
    assert capsys.readouterr().out == f"training starts from {adapter}, merged into tiny_base\n"
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_used_is_refused_before_anything_is_written(tmp_path):
    model = damaged(tmp_path / "model", **{"model.norm.weight": None})
    with pytest.raises(InputError, match="1 of its weights are missing"):
        start_from(model, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_saved_adapter_names_its_base_as_the_recipe_does(tmp_path):
    start = start_from("tiny_base", tmp_path / "run")
    start.sign(tmp_path)  # a whole model has nothing to be signed
    assert list(tmp_path.iterdir()) == []
    config = {"base_model_name_or_path": start.folder, "revision": None, "r": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "README.md").write_text(f"base_model: {start.folder}\n")
    start.sign(tmp_path)
    signed = json.loads((tmp_path / "adapter_config.json").read_text())
    assert signed == config | {"base_model_name_or_path": "tiny_base"}
    assert (tmp_path / "README.md").read_text() == "base_model: tiny_base\n"
