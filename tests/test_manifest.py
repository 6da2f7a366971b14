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
    assert manifest["folder"] == os.getcwd()
    changed = build_manifest({**recipe, "seed": 2}, model_path("tiny_base"), None, data)
    assert changed["recipe_sha256"] != manifest["recipe_sha256"]
    json.dumps(manifest)


def test_weights_of_the_hub_have_no_local_hash():
    assert weights_hash("owner/model") is None
