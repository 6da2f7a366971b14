import pytest
import torch

from mini_r1 import InputError
from mini_r1.bases import gguf
from mini_r1.bases.cold_start import CHAT_TEMPLATE
from mini_r1.bases.gguf import convert
from mini_r1.model import load_model, load_tokenizer
from mini_r1.prompts import PROMPT_TEMPLATES
from tests.bases.gguf_file import write_gguf


def test_the_folder_is_the_model_that_was_in_the_file(tmp_path, capsys):
    original = write_gguf(tmp_path / "m.gguf", CHAT_TEMPLATE)
    convert(tmp_path / "m.gguf", tmp_path / "new" / "folder")
    model = load_model(str(tmp_path / "new" / "folder"))
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    ids = torch.tensor([[1, 20, 30, 40, 2]])
    torch.testing.assert_close(model(ids).logits, original(ids).logits)
    printed = capsys.readouterr().out
    assert f"{model.num_parameters():,} parameters in float32" in printed
    assert "chat template" not in printed

    tokenizer = load_tokenizer(str(tmp_path / "new" / "folder"))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    prompt = PROMPT_TEMPLATES["compact"].render([4, 5, 12], 68, tokenizer)
    assert prompt.startswith("<|im_start|>user\nMake 68 using each of 4, 5, 12 once.<|im_end|>")
    text = "\nHällo , ½ .\n 1234</think>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_without_a_padding_token_the_end_pads_and_a_missing_template_is_told(tmp_path, capsys):
    write_gguf(tmp_path / "m.gguf", padding=False)
    convert(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = load_tokenizer(str(tmp_path / "out"))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert "no chat template: ask it with prompt_template: tinyzero" in capsys.readouterr().out


def torn(path):
    write_gguf(path)
    path.write_bytes(path.read_bytes()[:-20_000])


UNUSABLE = {
    "absent": (lambda path: None, "cannot be read: No such file"),
    "a folder": (lambda path: path.mkdir(), "cannot be read: Is a directory"),
    "empty": (lambda path: path.touch(), "no GGUF file: it begins with b''"),
    "an LFS pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "no GGUF file: it begins with b'vers'",
    ),
    "a header only": (lambda path: path.write_bytes(b"GGUF\x03\0\0\0"), "cannot be converted"),
    "torn": (torn, "cannot be converted"),
    "a model of another kind": (
        lambda path: write_gguf(path, architecture="clip"),
        "cannot be converted",
    ),
    "a part": (
        lambda path: write_gguf(path, leave_out=["blk.0.ffn_up.weight", "output_norm.weight"]),
        "2 tensors are missing, model.layers.0.mlp.up_proj.weight first",
    ),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_cannot_be_converted_is_told_in_one_line_and_leaves_nothing(tmp_path, kind):
    make, message = UNUSABLE[kind]
    make(tmp_path / "m.gguf")
    with pytest.raises(InputError) as refused:
        convert(tmp_path / "m.gguf", tmp_path / "out")
    assert str(refused.value).startswith(f"{tmp_path / 'm.gguf'}: ")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"m.gguf"}


def test_an_existing_folder_and_a_missing_package_are_told_at_once(tmp_path, monkeypatch):
    write_gguf(tmp_path / "m.gguf")
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"out exists; choose a new folder"):
        convert(tmp_path / "m.gguf", tmp_path / "out")
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"run pip install -c constraints.txt -e '.\[convert\]'"):
        convert(tmp_path / "m.gguf", tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"m.gguf", "out"}
