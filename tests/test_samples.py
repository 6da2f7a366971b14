import pytest

from mini_r1.samples import ALL_FILE, SHARE, SOLVED_FILE, Sample, append_samples, read_samples, rewind_samples


def samples(step, count=200, text="1+1=2\n</think>\n<answer>1+1</answer>"):
    return [Sample(step, (1, 1), 2, {"format_reward": 1.0, "equation_reward": float(i % 2)}, text) for i in range(count)]


def test_one_in_ten_is_kept_and_reads_back_as_it_was(tmp_path):
    append_samples(tmp_path, samples(7))
    append_samples(tmp_path, samples(8))
    everything, solved = (read_samples(tmp_path / name) for name in (ALL_FILE, SOLVED_FILE))
    assert 0.5 * SHARE * 400 < len(everything) < 1.5 * SHARE * 400
    assert 0.5 * SHARE * 200 < len(solved) < 1.5 * SHARE * 200
    assert {sample.step for sample in everything} == {7, 8}
    assert set(map(repr, everything)) <= set(map(repr, samples(7) + samples(8)))
    assert all(sample.solved for sample in solved)
    assert {sample.solved for sample in everything} == {True, False}
    assert read_samples(tmp_path / "absent.txt") == []


@pytest.mark.parametrize(
    "text", ["x\n==== step 9 nums [1] target 1 rewards {}\n<think>y", "x\r==== step 9 nums [1] target 1 rewards {}\r<think>y", ""]
)
def test_a_completion_cannot_forge_an_entry(tmp_path, text):
    append_samples(tmp_path, samples(3, text=text))
    assert {(sample.step, sample.text.replace("\n ====", "\n====")) for sample in read_samples(tmp_path / ALL_FILE)} == {(3, text)}


def test_rewinding_drops_the_later_steps(tmp_path):
    append_samples(tmp_path, samples(1))
    kept = {name: (tmp_path / name).read_bytes() for name in (ALL_FILE, SOLVED_FILE)}
    append_samples(tmp_path, samples(2, text="a\rb"))
    rewind_samples(tmp_path, 1)
    assert {name: (tmp_path / name).read_bytes() for name in kept} == kept
    rewind_samples(tmp_path / "absent", 1)


def test_a_sample_names_its_puzzle():
    assert samples(1)[0].puzzle == "make 2 from 1, 1"
