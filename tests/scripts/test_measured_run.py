"""Where the seconds and the memory of a training are said to have gone."""

import json
import time

import pytest

from mini_r1.scripts.measured_run import Clock


class Gpu:
    """Its memory, as a test wants it to be taken."""

    taken = None

    def used(self):
        return self.taken


@pytest.fixture
def gpu():
    return Gpu()


@pytest.fixture
def clock(tmp_path, gpu):
    return Clock(tmp_path / "figures.json", gpu.used)


def figures(tmp_path):
    return json.loads((tmp_path / "figures.json").read_text())


def test_a_sample_of_the_memory_counts_for_the_phase_that_is_going_on(tmp_path, gpu, clock):
    def take(gib):
        gpu.taken = gib
        clock.sample()

    take(90.0)  # while the engine starts
    with clock.during("_evaluate"):
        take(10.0)
        with clock.during("wake_up"):  # an evaluation through vLLM
            take(12.0)
    with clock.during("training_step"):
        take(20.0)
        with clock.during("_prepare_inputs"):
            take(91.0)  # neither
            with clock.during("vLLM.generate"):
                take(30.0)
            with clock.during("_get_per_token_logps_and_entropies"):
                take(25.0)
        with clock.during("compute_loss"):
            take(21.0)
    with clock.during("step"):
        take(24.0)
    assert figures(tmp_path)["memory"] == {"evaluation": 12.0, "training": 25.0, "generation": 30.0}


def test_the_memory_at_the_end_of_a_part_counts_even_between_two_samples(tmp_path, gpu, clock):
    with clock.during("_evaluate"):
        gpu.taken = 5.0
    assert figures(tmp_path)["memory"] == {"evaluation": 5.0}


def test_the_parts_of_a_step_add_up_to_its_seconds(tmp_path, clock):
    with clock.during("sleep"):  # the engine's first, before any step
        time.sleep(0.02)
    began = time.perf_counter()
    with clock.during("training_step"):
        with clock.during("_prepare_inputs"):
            with clock.during("sync_weights"), clock.during("wake_up"):
                time.sleep(0.02)
            with clock.during("_calculate_rewards"), clock.during("equation_reward"):
                time.sleep(0.02)
        with clock.during("compute_loss"), clock.during("_get_per_token_logps_and_entropies"):
            time.sleep(0.02)
    time.sleep(0.02)  # as gradients are clipped
    with clock.during("step"):
        pass
    seconds = time.perf_counter() - began
    with clock.during("_evaluate"), clock.during("sleep"):
        time.sleep(0.02)
    found = figures(tmp_path)
    (step,) = found["steps"]
    names = ["wake and sync", "rewards", "forward and backward", "optimizer", "rest"]
    assert [*step] == names
    assert 0.08 <= sum(step.values()) <= seconds
    assert min(step[name] for name in names if name != "optimizer") >= 0.02
    (evaluation,) = found["evaluations"]
    assert evaluation >= 0.02


def test_a_step_that_is_cut_off_leaves_the_figures_of_those_before(tmp_path, clock):
    for _ in range(2):
        with clock.during("training_step"):
            pass
        with clock.during("step"):
            pass
    with pytest.raises(KeyboardInterrupt), clock.during("training_step"):
        raise KeyboardInterrupt
    assert len(figures(tmp_path)["steps"]) == 2
