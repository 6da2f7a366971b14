import os
from pathlib import Path

import pytest

from mini_r1 import InputError
from mini_r1.cli import main
from mini_r1.launch import slurm
from mini_r1.launch.machine import Machine
from mini_r1.launch.slurm import Job, harmless, plan_job
from mini_r1.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
EIGHT = RECIPES / "grpo-qwen-2.5-3b-8gpu.yaml"
GPUS = Machine(8, 80.0)


def planned(recipe, nodes, machine, *overrides):
    return plan_job(load_recipe(recipe, overrides), nodes, machine)


def test_the_last_of_several_nodes_serves():
    job = planned(EIGHT, 3, GPUS)
    assert (job.training_nodes, job.served, job.processes) == (2, True, 16)
    assert job.launcher == "deepspeed_zero3"
    assert "1024 completions per optimizer step" in str(job)
    assert "--host LAST" in str(job)
    assert "--data-parallel-size 8" in str(job)


def test_one_node_is_planned_as_mini_r1_train_does():
    job = planned(EIGHT, 1, GPUS)
    assert (job.training_nodes, job.served, job.processes) == (1, False, 7)


@pytest.mark.parametrize("nodes", [1, 3])
def test_a_job_launches_what_was_planned_without_knowing_the_memory(nodes):
    in_the_job = planned(EIGHT, nodes, Machine(8, float("inf")))
    assert planned(EIGHT, nodes, GPUS).launcher == in_the_job.launcher == "deepspeed_zero3"


@pytest.mark.parametrize(
    "changes", [["--vllm_mode", "colocate"], ["--vllm_server_base_url", "http://elsewhere:8000"]]
)
def test_without_a_server_of_its_own_all_nodes_train(changes):
    job = planned(EIGHT, 3, GPUS, *changes)
    assert (job.training_nodes, job.served, job.processes) == (3, False, 24)


def test_adapters_are_copied_to_all_nodes():
    assert planned(RECIPES / "grpo-qwen-2.5-3b-qlora.yaml", 2, Machine(4, 24.0)).launcher == "ddp"


def test_the_rank_of_a_node_is_read_on_the_node():
    # Expanded in the batch shell it would be 0 everywhere.
    line = planned(EIGHT, 3, GPUS).train_command("10.0.0.1", 20_000, [], Path("/logs with spaces"))
    assert '--machine_rank "$SLURM_PROCID"' in line
    assert "'/logs with spaces'/node\"$SLURM_PROCID\"" in line
    assert "--main_process_ip 10.0.0.1 " in line


@pytest.mark.parametrize(
    ("recipe", "nodes", "machine", "overrides", "message"),
    [
        (EIGHT, 2, Machine(0), [], "no GPUs on the nodes"),
        (EIGHT, 1, Machine(1, 80.0), [], "server needs a GPU of its own"),
        (
            EIGHT,
            3,
            GPUS,
            ["--generation_batch_size", "100"],
            "generation_batch_size: 100 is no multiple of the 128 completions",
        ),
    ],
)
def test_what_cannot_work_is_refused(recipe, nodes, machine, overrides, message):
    with pytest.raises(InputError, match=message):
        planned(recipe, nodes, machine, *overrides)


def test_an_array_element_is_requeued_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(slurm, "_output", lambda *command: "node1\n")
    env = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "node1", "SLURM_RESTART_COUNT": "2"}
    recipe = load_recipe(RECIPES / "tiny-cpu.yaml", ["--output_dir", str(tmp_path)])
    assert Job(recipe, env).requeue_id == "12"
    job = Job(recipe, env | {"SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "3"})
    assert job.requeue_id == "10_3"
    assert job.logs.name == "12.2"


ONE_NODE = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "node1", "SLURM_GPUS_ON_NODE": "8"}


@pytest.mark.parametrize(
    ("cpus", "limits", "warnings"),
    [
        (32, {}, []),
        (32, {"SLURM_MEM_PER_NODE": str(200 * 1024)}, []),
        (
            1,
            {},
            [
                "1 CPU for 7 training processes on a node; give sbatch --cpus-per-gpu=4, or "
                "--exclusive"
            ],
        ),
        (
            32,
            {"SLURM_MEM_PER_CPU": "1000", "SLURM_CPUS_ON_NODE": "32"},
            [
                "31 GiB for 7 training processes on a node, which may take 54 while the model is "
                "loaded; give sbatch --mem=54G or more; --mem=0 is all there is"
            ],
        ),
    ],
)
def test_too_few_cpus_and_too_little_memory_are_told(monkeypatch, tmp_path, cpus, limits, warnings):
    monkeypatch.setattr(slurm, "_output", lambda *command: "node1\n")
    monkeypatch.setattr(slurm.os, "sched_getaffinity", lambda process: {*range(cpus)})
    recipe = load_recipe(EIGHT, ["--output_dir", str(tmp_path)])
    job = Job(recipe, ONE_NODE | limits)
    assert [*job.shortages(plan_job(recipe, 1, GPUS))] == warnings


# What a user's environment holds: each value has "hidden" where nobody may see it.
ENVIRONMENT = {
    "HF_TOKEN": "hidden",
    "WANDB_API_KEY": "hidden",
    "GITHUB_PAT": "hidden",
    "DATABASE_URL": "postgres://me:hidden@db/x",
    "http_proxy": "http://me:hidden@proxy:3128",
    "MYSQL_PWD": "hidden",
    "BLOB_SAS": "sv=1&sig=hidden",
    "JWT": "hidden",
    "COOKIE": "session=hidden",
    "PIP_INDEX_URL": "https://me:hidden@index.example/simple",
    "VLLM_API_KEY": "hidden",
    "NVIDIA_API_KEY": "hidden",
    "MINI_R1_VLLM_KEY": "hidden",
    "BASH_FUNC_module%%": "() { echo hidden\n}",
    "SLURM_JOB_COMMENT": "hidden",
    "SLURM_JOB_NAME": "hidden",
    "SLURM_SPANK_X": "hidden",
    "PATH_TO_MY": "hidden",
    "HF_ENDPOINT": "https://me:hidden@hub.example/x?key=hidden#hidden",
    "NCCL_DEBUG": "INFO\nexport X=hidden",
    "NCCL_SOCKET_IFNAME": "eth0",
    "HF_HOME": f"/scratch/hf_{'hidden' * 6}/hub",
    "CUDA_VISIBLE_DEVICES": "GPU-0a1b2c3d-0a1b-0a1b-0a1b-0a1b2c3d4e5f",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_JOB_ID": "12",
}
SCONTROL = (
    "JobId=12 JobName=hidden UserId=me(1000) TimeLimit=06:00:00 NumNodes=2 CPUs/Task=1 "
    "ReqTRES=cpu=2,gres/gpu=8 Command=/x/train.sbatch RECIPE --hub_token hidden "
    "Comment=and TimeLimit=hidden TresPerNode=gres/gpu:4\n"
)


def test_what_is_kept_of_a_jobs_environment_is_harmless_and_its_owners(monkeypatch, tmp_path):
    monkeypatch.setattr(slurm, "_output", lambda *command: SCONTROL)
    monkeypatch.setattr("os.environ", ENVIRONMENT)
    recipe = load_recipe(RECIPES / "tiny-cpu.yaml", ["--output_dir", str(tmp_path)])
    job = Job(recipe, ENVIRONMENT)
    job.logs.mkdir(parents=True)
    job._capture()
    file = job.logs / "env.txt"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.read_text().splitlines() == [
        "JobId=12",
        "NumNodes=2",
        "ReqTRES=cpu=2,gres/gpu=8",
        "TresPerNode=gres/gpu:4",
        "TimeLimit=06:00:00",
        "CUDA_VISIBLE_DEVICES=GPU-0a1b2c3d-0a1b-0a1b-0a1b-0a1b2c3d4e5f",
        "HF_ENDPOINT=https://***@hub.example/x?***",
        "HF_HOME=/scratch/hf_***/hub",
        "NCCL_DEBUG=INFO",
        "NCCL_SOCKET_IFNAME=eth0",
        "SLURM_JOB_ID=12",
        "SLURM_JOB_NODELIST=node[1-2]",
    ]


@pytest.mark.parametrize(
    "value", ["", "/opt/cuda/bin:/usr/bin", "expandable_segments:True", "0,1,2", "node[001-128]"]
)
def test_what_debugging_needs_is_kept_as_it_is(value):
    assert harmless(value) == value


def test_outside_of_a_job_it_says_what_to_do(capsys, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert slurm.main([str(EIGHT)]) == 2
    assert "not in a SLURM job; use sbatch" in capsys.readouterr().err


def test_a_token_goes_on_without_being_shown(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    cluster = ["--nodes", "3", "--gpus-per-node", "8", "--hub_token", "my-token", "--dry-run"]
    assert main(["slurm", str(EIGHT), *cluster]) == 0
    assert "hub_token" not in capsys.readouterr().out
    assert os.environ["HF_TOKEN"] == "my-token"


def test_a_token_given_to_a_job_goes_on_without_being_kept(monkeypatch):
    recipes = []
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(slurm.Job, "__init__", lambda job, recipe: recipes.append(recipe))
    monkeypatch.setattr(slurm.Job, "run", lambda job: 0)
    assert slurm.main([str(EIGHT), "--hub_token=my-token", "--seed", "3"]) == 0
    assert recipes[0].overrides == ("--seed", "3")
    assert os.environ["HF_TOKEN"] == "my-token"


def test_a_dry_run_shows_the_job(capsys):
    cluster = ["--nodes", "3", "--gpus-per-node", "8", "--time", "1:00:00"]
    assert main(["slurm", str(EIGHT), *cluster, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "2 to train, 8 processes on each, 1 more for vLLM, the last" in printed
    script = "scripts/slurm/train.sbatch recipes/grpo-qwen-2.5-3b-8gpu.yaml"
    sizes = "--nodes=3 --gpus-per-node=8 --cpus-per-gpu=4 --mem=62G --time=1:00:00"
    assert f"sbatch {sizes} {script}" in printed
