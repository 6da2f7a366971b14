import json
import os

from mini_r1.manifest import build_manifest, weights_hash
from mini_r1.model import model_path


def test_manifest_names_what_produced_a_run():
    recipe, data = {"model_name_or_path": "tiny_base", "seed": 1}, {"sha256": "x"}
    manifest = build_manifest(recipe, model_path("tiny_base"), None, data)
    assert manifest["versions"]["torch"].startswith("2.13.0")
    assert manifest["hardware"]["world_size"] == 1
    assert manifest["model"]["sha256"] == weights_hash(model_path("tiny_base"))
    assert manifest["data"] == data
    assert os.path.expanduser(manifest["folder"]) == os.getcwd()
    changed = build_manifest({**recipe, "seed": 2}, model_path("tiny_base"), None, data)
    assert changed["recipe_sha256"] != manifest["recipe_sha256"]
    json.dumps(manifest)


def test_weights_of_the_hub_have_no_local_hash():
    assert weights_hash("owner/model") is None


def adapter(folder, base, weights):
    folder.mkdir(exist_ok=True)
    config = {"base_model_name_or_path": base, "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


def test_the_hash_of_an_adapter_is_of_its_base_too(tmp_path):
    folder = tmp_path / "adapter"
    small, hard = (weights_hash(adapter(folder, b, b"1")) for b in ("tiny_base", "tiny_base_hard"))
    other = weights_hash(adapter(folder, "tiny_base", b"2"))
    hub = weights_hash(adapter(folder, "owner/model", b"1"))
    assert len({small, hard, other, hub}) == 4
    recipe, data = {"model_name_or_path": str(folder)}, {"sha256": "x"}
    adapter(folder, "tiny_base", b"1")
    model = build_manifest(recipe, str(folder), None, data)["model"]
    assert model == {"name": str(folder), "sha256": small, "revision": None, "base": "tiny_base"}


def test_the_home_folder_is_not_named(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setattr(os, "getcwd", lambda: "/home/ada/work")
    command = [
        "/home/ada/.venv/bin/mini-r1",
        "--output_dir=/home/ada/x",
        "/home/adam",
        "/x/home/ada",
    ]
    monkeypatch.setattr("sys.argv", command)
    recipe = {"model_name_or_path": "tiny_base"}
    manifest = build_manifest(recipe, model_path("tiny_base"), None, {"sha256": "x"})
    assert manifest["folder"] == "~/work"
    assert manifest["command"][:2] == ["~/.venv/bin/mini-r1", "--output_dir=~/x"]
    assert manifest["command"][2:] == ["/home/adam", "/x/home/ada"]
