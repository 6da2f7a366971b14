"""Each quirk is still needed: a test here that fails says that its function can go."""

import importlib.util
import inspect
import logging
import re
import subprocess
import sys
import threading
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer
from trl.generation import vllm_client
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration

from mini_r1 import quirks
from mini_r1.health import StaleWeights
from mini_r1.model import load_tokenizer, model_path
from mini_r1.rewards import equation_reward
from tests.bases.gguf_file import write_gguf

ROOT = Path(__file__).parents[1]
FUNCTIONS = [
    each
    for _, each in inspect.getmembers(quirks, inspect.isfunction)
    if each.__module__ == quirks.__name__
]
ALL_LIBRARIES = re.compile(
    r"(accelerate|bitsandbytes|DeepSpeed|PEFT|torch|transformers|TRL|vLLM) (\d+\.\d+(?:\.\d+)?)"
)


@pytest.fixture
def trainer(tmp_path):
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=600,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
    )
    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    data = Dataset.from_list([{"prompt": "x"}])
    tokenizer = load_tokenizer("tiny_base")
    return GRPOTrainer(model, equation_reward, args, train_dataset=data, processing_class=tokenizer)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda each: each.__name__)
def test_it_was_looked_at_with_the_versions_of_today(function):
    """With a newer version: look whether the library still needs it, then write the new version."""
    pinned = dict(re.findall(r"^(\S+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M))
    for library, version in ALL_LIBRARIES.findall(inspect.getdoc(function)):
        assert f"{pinned[library.lower()]}.".startswith(f"{version}."), library


def test_every_quirk_has_a_test_here():
    tests = Path(__file__).read_text(encoding="utf-8")
    tests += (ROOT / "tests" / "integration" / "vllm_on_cpu.py").read_text(encoding="utf-8")
    assert [each.__name__ for each in FUNCTIONS if f"quirks.{each.__name__}" not in tests] == []


@pytest.mark.parametrize("exactly", [False, True])
def test_a_base_drifts_unless_its_adapter_is_unmerged_exactly(trainer, exactly):
    lora = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(trainer.model.bfloat16(), lora)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    before = layer.get_base_layer().weight.detach().clone()
    if exactly:
        quirks.unmerge_exactly(model)
    for _ in range(2):
        model.merge_adapter()
        assert not layer.get_base_layer().weight.equal(before)
        model.unmerge_adapter()
    assert layer.get_base_layer().weight.equal(before) is exactly


@pytest.mark.slow
@pytest.mark.parametrize("library", ["deepspeed", "bitsandbytes"])
def test_the_libraries_complain_at_import_unless_quieted(library, monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    for before, quiet in (("", False), ("quirks.quiet_cpu_imports(); ", True)):
        code = f"from mini_r1 import quirks; {before}import {library}"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        complaints = re.findall("Setting accelerator to CPU|Failed to load CPU", str(done))
        assert (complaints == []) is quiet


@pytest.mark.parametrize("library", ["huggingface_hub.constants", "datasets.config"])
def test_libraries_read_whether_they_are_offline_at_import_only(library, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    module = importlib.import_module(library)
    monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert module.HF_HUB_OFFLINE is False
    quirks.go_offline()
    assert module.HF_HUB_OFFLINE is True


def test_a_numbered_cpu_cannot_be_loaded_to(tmp_path):
    torch.save(torch.zeros(1), tmp_path / "tensor")
    with pytest.raises(RuntimeError, match="don't know how to restore"):
        torch.load(tmp_path / "tensor", map_location=torch.device("cpu:1"))
    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    args._setup_devices = torch.device("cpu:1")  # as accelerate says in the second process
    quirks.unnumber_cpu(args)
    assert args.device == torch.device("cpu")


def test_4_bit_layers_still_choose_a_layout_for_evaluation():
    layer = Linear4bit(8, 8)
    assert hasattr(layer, "support_avx512bf16_for_cpu")
    layer.support_avx512bf16_for_cpu = True
    quirks.keep_4bit_trainable(torch.nn.Sequential(layer))
    assert layer.support_avx512bf16_for_cpu is False


def test_trl_rounds_the_adapters_of_quantized_weights(tmp_path):
    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    trainer = GRPOTrainer(
        model_path("tiny_base"),
        equation_reward,
        args,
        train_dataset=Dataset.from_list([{"prompt": "x"}]),
        processing_class=load_tokenizer("tiny_base"),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )
    for dtype in (torch.bfloat16, torch.float32):
        trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
        assert {weight.dtype for weight in trained} == {dtype}
        quirks.keep_adapters_wide(trainer.model)


def test_a_trainer_uploads_all_it_finds_in_two_ways(trainer, tmp_path, monkeypatch):
    uploads = []

    def upload_folder(_, folder_path, ignore_patterns, allow_patterns=None, **__):
        names = [path.name for path in Path(folder_path).iterdir()]
        patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        uploads.append({*filter_repo_objects(names, **patterns)})
        done = Future()
        done.set_result(None)
        return done

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # a new one, for this test
    trainer.hub_model_id, trainer.push_in_progress = "me/run", None
    (tmp_path / "private.log").touch()
    for everything in (True, False):
        trainer.push_to_hub()
        trainer._push_from_checkpoint(tmp_path / "checkpoint-1")
        trainer._finish_current_push()
        (at_the_end, at_a_save), uploads[:] = uploads[:], []
        for files in (at_the_end, at_a_save):
            assert {"config.json", "model.safetensors"} <= files
            assert ({"private.log", "training_args.bin"} <= files) is everything
        quirks.upload_only(["config.json", "model.safetensors"])


def test_each_engine_of_vllm_has_a_seed_of_its_own():
    """What it is for is shown in tests/integration/test_vllm.py."""
    colocated = {"use_vllm": True, "vllm_mode": "colocate", "seed": 7}
    seeds = []
    with torch.random.fork_rng():
        for ranks in (1, 2):  # that share an engine
            for process in range(4):
                args = {"process_index": process, "vllm_tensor_parallel_size": ranks}
                quirks.seed_colocated_vllm(SimpleNamespace(**colocated, **args))
                seeds.append(torch.initial_seed())
        quirks.seed_colocated_vllm(SimpleNamespace(use_vllm=False))
        assert [*seeds, torch.initial_seed()] == [7, 8, 9, 10, 7, 7, 8, 8, 8]


def test_trls_client_cannot_be_told_of_a_key(monkeypatch):
    known = {"self", "base_url", "host", "server_port", "group_port", "connection_timeout"}
    assert inspect.signature(VLLMClient.__init__).parameters.keys() == known
    monkeypatch.setattr("requests.adapters.HTTPAdapter.add_headers", None)
    quirks.show_key("http://here:1", {"Authorization": "x"})  # and see tests/launch/test_guard.py
    for url, brought in (("http://here:1/v1", {"Authorization": "x"}), ("http://there:1/v1", {})):
        request = requests.Request("GET", url).prepare()
        requests.adapters.HTTPAdapter().add_headers(request, timeout=1)
        assert request.headers == brought


def test_trl_looks_at_the_answer_of_a_worker_once_all_is_sent(monkeypatch):
    class Refused(Exception):
        pass

    def post(client, url, **options):
        if url.endswith("/update_weights"):
            raise Refused("500")

    told = threading.Event()
    sent = []

    def broadcast(**options):  # in NCCL's place, which needs a GPU: waits for the worker
        sent.append(told.wait(0.3))

    monkeypatch.setattr(VLLMClient, "_post", post)
    monkeypatch.setattr(vllm_client, "_HAS_STATEFUL_TRAINER_ENGINE", True)
    monkeypatch.setattr(vllm_client, "packed_nccl_broadcast_producer", broadcast, raising=False)
    client = VLLMClient.__new__(VLLMClient)
    client.base_url, client.communicator, client._updating_weights = "http://x", None, False
    for watched in (False, True):
        if watched:
            quirks.watch_transfer(lambda error: told.set())
        with pytest.raises(Refused):
            client.update_named_params([("weight", "float32", [1])], iter([]))
    assert sent == [False, True]


def test_trl_shows_all_of_a_completion_that_nothing_scored_in_every_step(trainer, caplog):
    log = logging.getLogger(GRPOTrainer.__module__)
    trainer.reward_funcs = [lambda **columns: [None]]
    score = partial(trainer._calculate_rewards, [{"prompt": "x"}], ["x"], ["y"], [[1]])
    before = [*log.filters]
    for told in (2, 0):
        caplog.clear()
        score()
        score()
        assert len(caplog.messages) == told
        assert all(message.count("\n") == 2 for message in caplog.messages)
        quirks.quiet_unscored_completions()
    log.warning("anything else")
    assert caplog.messages == ["anything else"]
    log.filters[:] = before


def test_logged_completions_reach_the_terminal_as_they_are(monkeypatch, capsys):
    from trl.trainer import grpo_trainer

    def printed():
        texts = ["a\x1b[2J"], ["b\x1b[2J"]
        grpo_trainer.print_prompt_completions_sample(
            *texts, {"r": [1.0]}, [0.5], 1, None, extra={"x": ["c\x1b[2J"]}
        )
        return capsys.readouterr().out

    monkeypatch.setattr(
        grpo_trainer,
        "print_prompt_completions_sample",
        grpo_trainer.print_prompt_completions_sample,
    )
    assert printed().count("\x1b[2J") == 3
    quirks.make_logged_completions_visible()
    assert "\x1b" not in printed()


def test_the_commit_of_a_hub_model_has_no_public_name():
    config = Qwen2Config()
    config._commit_hash = "abc"
    model = torch.nn.Module()
    model.config = config
    assert quirks.hub_commit(model) == "abc"
    assert "commit_hash" not in dir(config)


def test_a_model_from_a_gguf_file_cannot_be_saved_and_its_tokenizer_begins_where_it_ends(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    source = {"pretrained_model_name_or_path": tmp_path, "gguf_file": "m.gguf"}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "saved")
    quirks.forget_gguf(model)
    model.save_pretrained(tmp_path / "saved")

    tokenizer = AutoTokenizer.from_pretrained(**source)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", None)
    quirks.end_as_config_says(tokenizer, model.config)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_hyper_parameters_open_a_second_run_unless_added_by_hand(tmp_path):
    for name, add in (("by hand", quirks.add_hparams), ("theirs", SummaryWriter.add_hparams)):
        with SummaryWriter(str(tmp_path / name)) as writer:
            add(writer, {"beta": 0.1}, {"eval/success": 0.5})
        files = list((tmp_path / name).rglob("events*"))
        assert len(files) == (1 if name == "by hand" else 2)
    events = EventAccumulator(str(tmp_path / "by hand")).Reload()
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_trl_sends_its_running_means_along_with_whatever_is_logged(trainer):
    for log, forgets in ((partial(quirks.log_plainly, trainer), False), (trainer.log, True)):
        trainer._metrics["train"]["reward"] = [1.0, 0.0]
        log({"eval_success": 0.5})
        assert ("reward" in trainer.state.log_history[-1]) is forgets
        assert (trainer._metrics["train"] == {}) is forgets


def test_callbacks_get_neither_loss_nor_batch_nor_the_norm_of_the_gradient(trainer):
    class Callback(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.update(kwargs)

    seen, losses, norms = {}, [], []
    trainer.args.max_steps, trainer.args.save_strategy = 1, "no"
    trainer.generation_config.max_new_tokens = 4
    trainer.reward_funcs = [lambda completions, **columns: [0.0] * len(completions)]
    trainer.add_callback(Callback())
    quirks.watch_step(trainer, lambda loss, inputs: losses.append((loss, inputs)), norms.append)
    trainer.train()
    ((loss, inputs),), (norm,) = losses, norms
    assert loss.shape == norm.shape == ()
    assert len(inputs["advantages"]) == 8
    assert seen
    given = [value for value in seen.values() if isinstance(value, float | dict | torch.Tensor)]
    assert given == []


def test_trl_sends_weights_amid_its_own_sampling_only():
    class Engine:
        def wake_up(self, tags):
            done.append(f"wake {tags[0]}")

        def sleep(self, level):
            done.append(f"sleep {level}")

    def sync():
        done.append("sync")
        vllm._llm_weights_sleeping = False

    assert "_last_loaded_step" in inspect.getsource(GRPOTrainer._generate_single_turn)
    assert "_llm_weights_sleeping" in inspect.getsource(VLLMGeneration.generate)
    vllm = SimpleNamespace(mode="colocate", enable_sleep_mode=True, llm=Engine(), sync_weights=sync)
    vllm._llm_weights_sleeping, done = True, []
    trainer = SimpleNamespace(vllm_generation=vllm, _last_loaded_step=3)
    trainer.state = SimpleNamespace(global_step=3)
    with suppress(KeyError), quirks.vllm_with_current_weights(trainer) as given:
        assert given is vllm
        raise KeyError
    assert done == ["sync", "wake kv_cache", "sleep 2"]
    assert vllm._llm_weights_sleeping
    # One that never sleeps is sent the weights of a new step, once.
    vllm.enable_sleep_mode, trainer.state.global_step = False, 4
    for _ in range(2):
        with quirks.vllm_with_current_weights(trainer):
            done.append("sampled")
    assert done[3:] == ["sync", "sampled", "sampled"]
    assert trainer._last_loaded_step == 4


def test_no_generator_on_a_cpu_can_be_put_back():
    with pytest.raises(RuntimeError, match="CPU Generator does not use offset"):
        torch.Generator().set_offset(0)
    if not torch.cuda.is_available():
        assert quirks.vllm_batch(512, 32) == 128


def test_trl_compares_log_probabilities_for_its_correction_only():
    assert "sampling_logp_difference" not in inspect.getsource(GRPOTrainer._compute_loss)
    assert "quirks.watch_fresh_log_probabilities" in inspect.getsource(StaleWeights)  # in use


def test_a_figure_of_a_reward_waits_for_the_next_sampling(trainer):
    trainer._log_metric("figure", 1.0)
    trainer.log({"loss": 0.0})
    assert "figure" not in trainer.state.log_history[-1]
    quirks.log_with_step(trainer, "figure", 2.0)
    trainer.log({"loss": 0.0})
    assert trainer.state.log_history[-1]["figure"] == 2.0


def test_zero_3_keeps_a_weight_elsewhere():
    folder = Path(importlib.util.find_spec("deepspeed").origin).parent
    source = (folder / "runtime" / "zero" / "partition_parameters.py").read_text(encoding="utf-8")
    assert "param.ds_tensor = " in source
    weight = torch.nn.Parameter(torch.ones(2))
    assert quirks.own_part(weight).tolist() == [1.0, 1.0]
    weight.ds_tensor = torch.zeros(1)
    assert quirks.own_part(weight).tolist() == [0.0]


def test_handlers_without_a_name_are_found_through_their_loggers_only():
    handler = logging.StreamHandler()
    logging.getLogger("a library").addHandler(handler)
    try:
        assert handler in list(quirks.stream_handlers())
        assert handler.get_name() is None  # so that logging.getHandlerByName cannot find it
    finally:
        logging.getLogger("a library").removeHandler(handler)
