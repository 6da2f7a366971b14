import contextlib
import json

from mini_r1.manifest import build_manifest, weights_hash, write_json
from mini_r1.model import model_path


def test_manifest_names_what_produced_a_run():
    recipe = {"model_name_or_path": "tiny_base", "seed": 1}
    manifest = build_manifest(recipe, model_path("tiny_base"), None, data={"sha256": "x"})
    assert manifest["versions"]["torch"].startswith("2.13.0")
    assert manifest["hardware"]["world_size"] == 1
    assert manifest["model"]["sha256"] == weights_hash(model_path("tiny_base"))
    assert manifest["data"] == {"sha256": "x"}
    changed = build_manifest({**recipe, "seed": 2}, model_path("tiny_base"), None)
    assert changed["recipe_sha256"] != manifest["recipe_sha256"]
    json.dumps(manifest)


def test_weights_of_the_hub_have_no_local_hash():
    assert weights_hash("owner/model") is None


def test_records_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "eval" / "after.json"
    write_json(path, {"success": 0.5})
    with contextlib.suppress(TypeError):
        write_json(path, {"success": object()})
    assert json.loads(path.read_text()) == {"success": 0.5}
    assert [file.name for file in path.parent.iterdir()] == ["after.json"]
