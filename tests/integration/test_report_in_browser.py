"""The report of a real run in a real, headless Chromium.

It renders, its filters work, and a completion cannot touch it.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mini_r1.metrics import CHARTS, METRICS
from mini_r1.report.page import write_report

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: run make test-all"),
]
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = (
        "--max_steps 4 --save_steps 2 --per_device_train_batch_size 16 --num_generations 4 "
        "--max_completion_length 40 "
        "--num_puzzles 500 --num_eval_puzzles 20 --num_eval_samples 2"
    )
    command = [
        sys.executable,
        "-m",
        "mini_r1",
        "train",
        str(ROOT / "recipes" / "tiny-cpu.yaml"),
        "--output_dir",
        str(folder),
    ]
    subprocess.run([*command, *options.split()], check=True, capture_output=True, timeout=300)
    assert (folder / "report.html").stat().st_size < 3_000_000
    return folder


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """A function: file -> (page, everything it complained of, everything it asked for)."""
    pages = []

    def open_page(file, width=1280, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        pages.append(page)
        complaints, requests = [], []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.as_uri())
        return page, complaints, requests

    yield open_page
    for page in pages:
        page.close()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_renders_without_errors_or_requests(run_dir, opened, width, scheme):
    page, complaints, requests = opened(run_dir / "report.html", width, scheme)
    assert complaints == []
    assert requests == [(run_dir / "report.html").as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
    assert page.locator("svg").count() >= 10
    assert all(chart.bounding_box()["width"] > 250 for chart in page.locator("svg").all())
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")


def test_its_numbers_are_those_of_eval_and_tensorboard(run_dir, opened):
    page, _, _ = opened(run_dir / "report.html")
    before, after = (
        json.loads((run_dir / "eval" / f"{name}.json").read_text()) for name in ("before", "after")
    )
    headline = " ".join(page.locator(".big").inner_text().split())
    assert headline.startswith(f"{before['success']:.1%} →")
    assert headline.endswith(f"{after['success']:.1%}")
    scalars = EventAccumulator(str(run_dir / "tensorboard"), {"scalars": 0}).Reload()
    for metric in (METRICS[name] for name in CHARTS):
        label = page.locator(f'svg[aria-label^="{metric.title}."]').get_attribute("aria-label")
        shown = re.search(r"from (\S+) to (\S+), between (\S+) and ([\d.e-]*\d)", label).groups()
        values = [event.value for event in scalars.Scalars(f"train/{metric.key}")]
        expected = [values[0], values[-1], min(values), max(values)]
        assert [float(value) for value in shown] == pytest.approx(expected, rel=0.01, abs=1e-9), (
            metric.title
        )
    held_out = {event.step: event.value for event in scalars.Scalars("eval/success")}
    assert held_out == pytest.approx({0: before["success"], 4: after["success"]})
    label = page.locator('svg[aria-label^="Success"]').get_attribute("aria-label")
    assert re.findall(r"held-out at step (\d+): ([\d.]*\d)", label) == [
        (str(step), f"{v:.3g}") for step, v in held_out.items()
    ]


def test_its_table_is_that_of_eval(run_dir, opened):
    page, _, _ = opened(run_dir / "report.html")
    before, after = (
        json.loads((run_dir / "eval" / f"{name}.json").read_text()) for name in ("before", "after")
    )
    expected = {f"pass@{k}": [before["pass_at"][k], after["pass_at"][k]] for k in after["pass_at"]}
    for measure, groups in after["by_difficulty"].items():
        for value in groups:
            both = [one["by_difficulty"][measure][value] for one in (before, after)]
            expected[f"{measure.replace('_', ' ')}: {value}"] = [
                x for one in both for x in (one["success"], *one["ci95"])
            ]
    found = {}
    for row in page.locator("tbody tr").all():
        cells = " ".join(row.locator("td").all_inner_texts())
        found[row.locator("th").inner_text()] = re.findall(r"[\d.]+(?=%)", cells)
    assert found == {
        name: [f"{100 * value:.1f}" for value in values] for name, values in expected.items()
    }


def test_samples_can_be_filtered(run_dir, opened):
    page, _, _ = opened(run_dir / "report.html")
    everything = page.locator(".sample:visible").count()
    shown = {}
    for name in ("solved", "failed", "the longest", "the first solved"):
        page.get_by_role("button", name=name, exact=True).click()
        shown[name] = page.locator(".sample:visible").count()
        assert page.locator(".filter [role=status]").inner_text() == f"{shown[name]} shown"
        assert page.locator("button[aria-pressed=true]").inner_text() == name
    assert shown["solved"] + shown["failed"] == everything
    assert shown["the longest"] == shown["the first solved"] == 1
    assert shown["solved"] == page.locator('.sample[data-tags~="solved"]').count() > 0


def test_hostile_completions_stay_inert(run_dir, opened, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    samples = copy / "samples" / "completion_samples.txt"
    samples.write_text(samples.read_text().replace("<think>", f"<think>{HOSTILE}"))
    after = json.loads((copy / "eval" / "after.json").read_text())
    for example in after["examples"]:
        example["completion"] = HOSTILE
    (copy / "eval" / "after.json").write_text(json.dumps(after))
    write_report([copy], copy / "report.html")
    page, complaints, requests = opened(copy / "report.html")
    page.wait_for_timeout(300)
    assert page.title() == "Mini-R1: copy"
    assert complaints == []
    assert len(requests) == 1
    assert page.locator("img").count() == 0
    assert "onerror" in page.locator(".sample pre").first.inner_text()
