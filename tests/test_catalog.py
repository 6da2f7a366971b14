import re
import subprocess
import sys
from pathlib import Path

import pytest

from mini_r1 import InputError
from mini_r1.catalog import key_rows, recipe_table
from mini_r1.cli import main
from mini_r1.recipe import TRAINING_DEFAULTS, all_keys

ROOT = Path(__file__).parents[1]


def test_the_table_of_recipes_is_the_readmes():
    table = recipe_table(ROOT / "recipes")
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(table.splitlines()) == 2 + len(list((ROOT / "recipes").glob("*.yaml")))
    assert "| not known |" not in table.splitlines()[2]


def test_a_folder_without_recipes(tmp_path):
    with pytest.raises(InputError, match="no recipes here"):
        recipe_table(tmp_path)


def test_every_key_is_listed_with_type_default_range_and_choices():
    rows = {name: text for part in key_rows().values() for name, text in part}
    assert rows.keys() == {name for keys in all_keys().values() for name in keys}
    assert rows["learning_rate"].startswith("float = 1e-06: The initial learning rate")
    assert rows["learning_rate"].endswith("; more than 0")
    assert rows["loss_type"].startswith("str = dapo: Specifies the loss formulation to use; one of")
    assert rows["lr_scheduler_type"].startswith("str = linear: ")
    assert rows["reward_funcs"].startswith("tuple[str, ...] = [format, equation]: ")
    assert rows["num_iterations"].startswith("int = 1: ")
    assert rows["save_total_limit"].startswith(f"int = {TRAINING_DEFAULTS['save_total_limit']}: ")
    assert all(len(text) > 20 for text in rows.values())


@pytest.mark.parametrize("pattern", ["lora_", "save-steps", "vllm_*port", "num_p"])
def test_keys_are_found_by_a_part_of_their_name(pattern):
    names = [name for part in key_rows(pattern).values() for name, _ in part]
    assert 1 <= len(names) < 10
    assert all(name.startswith(pattern[:4].replace("-", "_")) for name in names)


def test_a_reader_may_stop_early():
    command = [sys.executable, "-m", "mini_r1", "recipes", "--keys"]
    pipe = subprocess.PIPE
    with (
        subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as writer,
        subprocess.Popen(
            ["head", "-1"], stdin=writer.stdout, stdout=pipe, stderr=pipe, text=True
        ) as reader,
    ):
        writer.stdout.close()  # head is the only one who reads
        shown, told = reader.communicate()
        told += writer.stderr.read()
    assert (shown, told) == ("## task keys\n", "")


def test_no_key_of_that_name():
    with pytest.raises(InputError, match="--keys: no key with 'learningrate' in it; did you mean"):
        key_rows("learningrate")


def test_a_pipe_gets_markdown_and_a_terminal_a_table_of_its_width(capsys, monkeypatch):
    assert main(["recipes"]) == 0
    assert capsys.readouterr().out == f"{recipe_table(ROOT / 'recipes')}\n"
    assert main(["recipes", "--keys", "lora_r"]) == 0
    assert "\n| lora_r | int = 16: LoRA R value; at least 1 |\n" in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for width in (80, 40):
        monkeypatch.setenv("COLUMNS", str(width))
        for command in (["recipes"], ["recipes", "--keys"]):
            assert main(command) == 0
            printed = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out)
            assert "|" not in printed.splitlines()[2]
            assert max(map(len, printed.splitlines())) <= width
            assert width < 80 or "\ngrpo-qwen-2.5-3b-8gpu " in printed or "\nlora_r " in printed
    assert main(["recipes", "--keys", "nosuchkey"]) == 2
