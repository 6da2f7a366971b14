import re
from pathlib import Path

import pytest

from mini_r1 import InputError
from mini_r1.launch import machine as machine_module
from mini_r1.launch.machine import (
    LAUNCH_VARIABLES,
    TAKEN_FOR_A_LAUNCH,
    Machine,
    is_main_process,
    leftover_variables,
    num_processes,
    this_machine,
    visible_gpus,
)
from mini_r1.launch.plan import make_plan
from mini_r1.recipe import load_recipe

CARDS = "0, 81559\n1, 81559\n2, 24564"
UUIDS = (
    "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aa11)\n"
    "GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-aa22)\n"
    "GPU 2: NVIDIA GeForce RTX 4090 (UUID: GPU-bb33)"
)
SLICED = "0, 81559, Enabled\n1, 81559, Disabled"
SLICES = (
    "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aa11)\n"
    "  MIG 1g.10gb     Device  0: (UUID: MIG-c6d4)\n"
    "  MIG 1c.3g.40gb  Device  1: (UUID: MIG-e7f5)\n"
    "GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-aa22)"
)


RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine whose nvidia-smi prints this, and what CUDA_VISIBLE_DEVICES leaves of it."""

    def visible(chosen, cards=CARDS, listed=UUIDS):
        fake = tmp_path / "nvidia-smi"
        fake.write_text(f"#!/bin/sh\ncat '{tmp_path}'/\"$1\" | grep .\n")
        fake.chmod(0o755)
        (tmp_path / "-L").write_text(listed)
        query = "--query-gpu=index,memory.total,mig.mode.current"
        (tmp_path / query).write_text(cards)
        if chosen is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        return visible_gpus(), this_machine()

    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return visible


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        (None, "0 1 2"),
        ("0,1", "0 1"),
        ("2,1", "2 1"),
        ("0,2,-1,1", "0 2"),  # CUDA's documentation has this one
        ("", ""),
        ("-1", ""),
        ("7", ""),
        ("1,7,0", "1"),
        ("0,0", ""),
        ("all", ""),
        ("0,all,1", "0"),
        ("none", ""),
        ("void", ""),
        (" 0 , 1 ", "0 1"),
        (" 0", "0"),
        ("NoDevFiles", ""),  # what PBS writes for none
        ("0,1,", "0 1"),
        (",0", ""),
        ("0,,1", "0"),
        ("0;1", "0"),
        ("01,+2", "1 2"),
        ("GPU-aa22", "GPU-aa22"),
        ("GPU-b", "GPU-bb33"),
        ("GPU-bb33,GPU-aa1", "GPU-bb33 GPU-aa11"),
        ("GPU-aa", ""),  # of two cards
        ("GPU-aa11,GPU-cc,GPU-bb", "GPU-aa11"),
        ("GPU-aa11,GPU-aa11", ""),
        ("GPU-aa11,1", "GPU-aa11"),
        ("GPU-aa11,GPU-aa1", ""),  # the same card
        ("GPU-aa11,MIG-c6d4,GPU-aa22", "GPU-aa11"),
        ("GPU-aa11,,GPU-aa22", "GPU-aa11"),
        ("GPU-", ""),
        (" GPU-aa11", ""),
        ("1,GPU-aa11", "1"),
        ("-0,0x1", ""),
    ],
)
def test_the_visible_gpus_are_those_that_cuda_counts(chosen, names, machine, monkeypatch):
    found, _ = machine(chosen)
    assert found == names.split()
    if chosen is not None:  # what the training will count, with NVML answering for these three
        import torch

        monkeypatch.setattr(torch.cuda, "_raw_device_count_nvml", lambda: 3)
        uuids = ["GPU-aa11", "GPU-aa22", "GPU-bb33"]
        monkeypatch.setattr(torch.cuda, "_raw_device_uuid_nvml", lambda: uuids)
        assert torch.cuda._device_count_nvml() == len(found)


@pytest.mark.parametrize(
    ("chosen", "gpus", "memory"), [(None, 3, 24), ("0,1", 2, 80), ("GPU-bb", 1, 24), ("7", 0, 0)]
)
def test_the_memory_is_that_of_the_smallest_visible_card(chosen, gpus, memory, machine):
    assert machine(chosen)[1] == Machine(gpus, pytest.approx(memory, abs=0.5))


@pytest.mark.parametrize(
    ("chosen", "names", "memory"),
    [
        ("MIG-e7f5", "MIG-e7f5", 40),
        ("MIG-c6", "MIG-c6d4", 10),
        ("MIG-c6d4,MIG-e7f5", "MIG-c6d4", 10),
        ("MIG-0000", "", 0),
        ("0", "MIG-c6d4", 10),
        ("1", "1", 80),
        (None, "MIG-c6d4", 10),
        ("GPU-aa11", "MIG-c6d4", 10),
        ("MIG-e7f5,GPU-aa22", "MIG-e7f5", 40),
        ("1,0", "MIG-c6d4", 10),
        ("", "", 0),
    ],
)
def test_a_slice_of_a_card_is_all_that_cuda_counts(chosen, names, memory, machine):
    found, size = machine(chosen, SLICED, SLICES)
    assert found == names.split()
    assert size == Machine(len(found), pytest.approx(memory, abs=0.5))


def test_the_memory_of_a_slice_is_what_a_plan_counts_with(machine):
    _, found = machine("MIG-e7f5", SLICED, SLICES)
    with pytest.raises(InputError, match="and this machine has 40"):
        make_plan(load_recipe(RECIPES / "grpo-qwen-2.5-3b-1gpu.yaml"), found)


def test_a_memory_that_is_not_known_stops_no_plan(machine):
    _, found = machine(None, "0, [N/A]", "GPU 0: NVIDIA GB10 (UUID: GPU-aa11)")
    assert found == Machine(1, 0.0)
    text = str(make_plan(load_recipe(RECIPES / "grpo-qwen-2.5-3b-1gpu.yaml"), found))
    assert "1 GPU of a size not known" in text


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """A driver with two GPUs, of which torch sees what CUDA_VISIBLE_DEVICES names."""

    def answers(chosen):
        if chosen is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        return visible_gpus(), this_machine()

    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(machine_module, "DRIVERS", (str(tmp_path / "nvidiactl"),))
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "cuda.py").write_text(
        "import os, types\n"
        "seen = os.environ.get('CUDA_VISIBLE_DEVICES', '0,1').partition(',-1')[0].split(',')\n"
        "device_count = lambda: len([name for name in seen if name])\n"
        "get_device_properties = lambda index: types.SimpleNamespace(total_memory=40 << 30)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    machine_module._as_torch_counts.cache_clear()
    yield answers
    machine_module._as_torch_counts.cache_clear()


@pytest.mark.parametrize(
    ("chosen", "names"),
    [(None, "0 1"), ("", ""), ("1", "1"), ("1,0,-1,0", "1 0"), ("GPU-aa,GPU-b", "GPU-aa GPU-b")],
)
def test_without_nvidia_smi_torch_is_asked(chosen, names, driver):
    found, size = driver(chosen)
    assert found == names.split()
    assert size == Machine(len(found), pytest.approx(40 if found else 0, abs=0.1))


def test_a_slice_that_nvidia_smi_does_not_list_has_its_memory(driver, machine):
    found, size = machine("MIG-c6d4", "0, 81559, Enabled", "")
    assert (found, size) == (["MIG-c6d4"], Machine(1, 40.0))


def test_without_a_driver_there_is_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(machine_module, "DRIVERS", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    for chosen in ("0", "GPU-aa11", "MIG-c6d4"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        assert visible_gpus() == []


# ---- The launch -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, None),
        ({"RANK": "1"}, None),  # as containers export it
        ({"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "localhost"}, None),
        ({"PMI_SIZE": "1", "PMI_RANK": "0", "LOCAL_RANK": "-1"}, None),  # a step of SLURM
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE: '2' is left from another launch, .*'unset WORLD_SIZE'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: 'two' is"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE: '' is"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK: '0' is"),
        ({"PMI_SIZE": "4"}, "PMI_SIZE: '4' is"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "'unset OMPI_COMM_WORLD_SIZE'"),
        ({"MV2_COMM_WORLD_SIZE": "2"}, "'unset MV2_COMM_WORLD_SIZE'"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "'unset LOCAL_RANK WORLD_SIZE'"),
    ],
)
def test_what_another_launch_left_is_named(given, told, monkeypatch):
    for variable in (*LAUNCH_VARIABLES, *TAKEN_FOR_A_LAUNCH):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    found = [str(error) for error in leftover_variables()]
    assert len(found) == (told is not None)
    assert all(re.search(told, error) for error in found)
    assert (is_main_process(), num_processes()) == (True, 1)


def test_a_launch_is_known_by_all_that_it_sets(monkeypatch):
    values = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}
    for variable, value in {**values, "MASTER_ADDR": "node1"}.items():
        monkeypatch.setenv(variable, value)
    assert list(leftover_variables()) == []
    assert (is_main_process(), num_processes()) == (False, 2)
