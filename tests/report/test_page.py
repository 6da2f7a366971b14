import csv
import json
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean

import pytest
import yaml
from hypothesis import given

from mini_r1 import InputError, visible
from mini_r1.cli import main
from mini_r1.metrics import CHARTS, METRICS
from mini_r1.report.chart import TEMPLATES
from mini_r1.report.page import (
    MAX_SAMPLES,
    ORIGINAL_MILESTONES,
    ORIGINAL_NAME,
    render,
    write_report,
)
from mini_r1.rollouts import Rollout
from mini_r1.run import load_run
from tests.hostile import HOSTILE as ANY_TEXT
from tests.hostile import TEXTS, fuzz, is_inert

ROOT = Path(__file__).parents[2]
HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)>\n"
    "1+1=3, 2+2=4\n</think>\n<answer>\"'&</answer>"
)


def evaluation(step, success, completion="1+1=2\n</think>\n<answer>1+1</answer>"):
    group = {"success": success, "ci95": [success - 0.1, success + 0.1], "num_puzzles": 7}
    return {
        "step": step,
        "success": success,
        "ci95": [success - 0.05, success + 0.05],
        "pass_at": {"1": success},
        "by_difficulty": {"plus_minus_only": {"true": group}},
        "plus_minus_only_share": 0.34,
        "mean_completion_tokens": 20 + step,
        "num_puzzles": 1000,
        "num_samples": 2,
        "temperature": 1.0,
        "split": "held-out, split_seed 42, test_share 0.1",
        "rule": "every given number used exactly once, exact arithmetic",
        "examples": [{"nums": [1, 1], "target": 2, "completion": completion, "solved": step > 0}],
    }


def write_samples(run_dir, samples):
    entry = '==== step {} nums [1, 1] target 2 rewards {{"equation_reward": {}}}\n<think>\n{}\n\n'
    (run_dir / "samples").mkdir(exist_ok=True)
    (run_dir / "samples" / "completion_samples.txt").write_text(
        "".join(entry.format(*sample) for sample in samples)
    )


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "my <run>"
    for name, content in (
        ("before", evaluation(0, 0.238)),
        ("after", evaluation(4, 0.933, HOSTILE)),
    ):
        (folder / "eval").mkdir(parents=True, exist_ok=True)
        (folder / "eval" / f"{name}.json").write_text(json.dumps(content))
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump({"model_name_or_path": "tiny_base", "max_steps": 4})
    )
    (folder / "manifest.json").write_text(json.dumps({"versions": {"trl": "1.16.0"}}))
    keys = [METRICS[name].key for name in CHARTS]
    history = [
        {"step": step, **{key: step * (index + 1) / 100 for index, key in enumerate(keys)}}
        for step in range(1, 5)
    ]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    write_samples(folder, [(step, float(step == 3), HOSTILE) for step in range(1, 5)])
    return folder


def text_of(page):
    return unescape(re.sub(r"<[^>]+>", "", page))


def test_the_numbers_are_those_of_the_records(run_dir):
    page = render([load_run(run_dir)], {})
    text = text_of(page)
    assert "23.8% →" in text
    assert "93.3%" in text
    assert "18.8% to 28.8% → 88.3% to 98.3%" in text
    assert "1000 puzzles × 2, temperature 1.0" in text
    assert "34% of them need only + and −" in text
    labels = [unescape(label) for label in re.findall(r'role="img" aria-label="([^"]+)"', page)]
    assert len(labels) == len(CHARTS)
    assert labels[0].startswith(
        "Success: sampled completions that are right. "
        "my <run>: from 0.01 to 0.04, between 0.01 and 0.04;"
    )
    assert "held-out at step 0: 0.238" in labels[0]
    assert "held-out at step 4: 0.933" in labels[0]


def test_why_nothing_was_learned_is_told(run_dir):
    assert load_run(run_dir).diagnosis is None
    state = json.loads((run_dir / "trainer_state.json").read_text())
    state["log_history"][2]["diagnosis"] = "step 3: <nothing> was learned"
    (run_dir / "trainer_state.json").write_text(json.dumps(state))
    assert render([load_run(run_dir)], {}).count("<p>step 3: &lt;nothing&gt; was learned</p>") == 1


def test_what_a_model_writes_stays_text(run_dir):
    page = render([load_run(run_dir)], {})
    assert "<script>alert" not in page
    assert "<img" not in page
    assert "my <run>" not in page
    assert page.count("<script>") == 1
    assert '<mark class="false">1+1=3</mark>' in page
    assert '<mark class="true">2+2=4</mark>' in page


class Elements(HTMLParser):
    """The elements of a page with the names of their attributes, and its text."""

    def __init__(self, page):
        super().__init__()
        self.found, self.text = set(), ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.add((tag, *(name for name, _ in attrs)))

    def handle_data(self, data):
        self.text += data


def test_no_text_of_the_corpus_acts_in_the_page(run_dir):
    def page_with(texts):
        samples = [Rollout(1, {"question": text}, {}, text, None) for text in texts]
        examples = [{"row": {text: text}, "completion": text, "solved": False} for text in texts]
        (first, name, content), *others = run.evaluations
        return render(
            [
                replace(
                    run,
                    folder=Path("".join(texts).replace("\0", "")),
                    recipe={**run.recipe, "columns": {text: text for text in texts}},
                    manifest={**run.manifest, "command": texts},
                    samples=samples,
                    evaluations=[(first, name, {**content, "examples": examples}), *others],
                )
            ],
            {},
        )

    run = load_run(run_dir)
    page = page_with(TEXTS)
    assert is_inert(page)
    hostile = Elements(page)
    assert hostile.found == Elements(page_with(["1+1=2, 1+1=3"])).found
    for text in TEXTS:
        assert visible(text.strip()) in hostile.text.replace(" (false)", "")


@given(ANY_TEXT)
@fuzz
def test_no_text_makes_an_element(text):
    page = TEMPLATES.from_string('<p title="{{ text }}">{{ text }}</p>').render(text=text)
    assert is_inert(page)
    elements = Elements(page)
    assert elements.found == {("p", "title")}
    assert elements.text == visible(text)


def test_nothing_is_loaded_from_anywhere(run_dir):
    page = render([load_run(run_dir)], {})
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "default-src 'none'" in page


def test_what_a_model_writes_is_shown_as_it_is(run_dir):
    page = render([load_run(run_dir)], {})
    shown = [text_of(each) for each in re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)]
    assert shown.count(HOSTILE.replace("1+1=3", "1+1=3 (false)")) == 5  # four samples, one example


def test_samples_are_few_but_hold_the_first_solved_and_the_longest(run_dir):
    write_samples(
        run_dir,
        [(step, float(step == 501), "x" * (9 if step == 777 else 5)) for step in range(1, 1001)],
    )
    page = render([load_run(run_dir)], {})
    assert page.count('class="sample"') <= MAX_SAMPLES + 2
    assert 'data-tags="solved first"' in page
    assert 'data-tags="failed longest"' in page


def test_runs_side_by_side_and_a_published_curve(run_dir, tmp_path):
    reference = tmp_path / "published.csv"
    reference.write_text("run,step,equation_reward,unknown\nmain,0,0.1,9\nmain,8,0.5,9\n")
    output = tmp_path / "both.html"
    options = ["--output", str(output), "--reference", str(reference)]
    assert main(["report", str(run_dir), str(run_dir), *options]) == 0
    page = output.read_text()
    assert page.count("<article><h2>") == 2
    assert "published: main: from 0.1 to 0.5" in page
    assert 'polyline class="ref"' in page
    assert "By difficulty of my &lt;run&gt;" in page


def test_a_value_that_is_no_number_is_left_out_of_its_chart(run_dir):
    file = run_dir / "trainer_state.json"
    state = json.loads(file.read_text())
    state["log_history"][1]["kl"], state["log_history"][2]["kl"] = float("nan"), float("inf")
    file.write_text(json.dumps(state))
    page = render([load_run(run_dir)], {})
    assert not re.search(r"\b(nan|inf)\b", page.partition("<svg")[2])


def test_the_rows_of_another_task_are_shown_as_they_are(run_dir):
    for name in ("before", "after"):
        file = run_dir / "eval" / f"{name}.json"
        result = json.loads(file.read_text())
        del result["by_difficulty"], result["plus_minus_only_share"]
        (example,) = result["examples"]
        result["examples"] = [{**example, "row": {"words": "<b> a"}, "solved": False}]
        file.write_text(json.dumps(result))
    page = render([load_run(run_dir)], {})
    assert "<h3>words &lt;b&gt; a</h3>" in page
    assert "need only" not in page


def test_an_unfinished_run_is_shown_as_such(run_dir):
    (run_dir / "eval" / "after.json").unlink()
    (run_dir / "trainer_state.json").unlink()
    assert "Held-out success (still training)" in render([load_run(run_dir)], {})


def test_the_originals_milestones_stand_beside_runs_of_its_model(run_dir):
    assert ORIGINAL_NAME not in render([load_run(run_dir)], {})
    (run_dir / "recipe.yaml").write_text(
        yaml.safe_dump({"model_name_or_path": "Qwen/Qwen2.5-3B-Instruct", "max_steps": 450})
    )
    page = render([load_run(run_dir)], {})
    marks = {key: sum(step <= 450 for step in marks) for key, marks in ORIGINAL_MILESTONES.items()}
    assert page.count('circle class="ref"') == sum(marks.values())
    assert f"{ORIGINAL_NAME} at step 450: 0.5" in page
    assert "at step 600" not in page  # the axis ends where the run does
    assert f"</span>{ORIGINAL_NAME}</li>" in page


def test_the_milestones_are_the_published_curve():
    with (ROOT / "docs" / "records" / "original-3b-runs.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["run"] == "main"]
    columns = {
        "success": "equation_reward",
        "format": "format_reward",
        "tokens": "completion_tokens",
    }
    for key, marks in ORIGINAL_MILESTONES.items():
        for step, value in marks.items():
            near = [float(row[columns[key]]) for row in rows if abs(int(row["step"]) - step) <= 10]
            assert fmean(near) == pytest.approx(value, abs=0.5 if key == "tokens" else 0.005), (
                key,
                step,
            )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("a,b\n1,2\n", "has no column step"),
        ("step,b\n1,2\n", "has none of the columns"),
        ("step,kl\n1,x\n", "cannot be read"),
    ],
)
def test_a_bad_reference(run_dir, tmp_path, content, message):
    path = tmp_path / "reference.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        write_report([run_dir], tmp_path / "out.html", path)
    assert not (tmp_path / "out.html").exists()


def test_what_is_no_run(tmp_path, run_dir):
    with pytest.raises(InputError, match="no run; want a folder such as"):
        load_run(tmp_path)
    for path in (run_dir / "eval").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="nothing recorded yet"):
        load_run(run_dir)
