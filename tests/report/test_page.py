"""The page of a bundle: what it says, that it needs nothing but itself, and that it is the same every time."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flashu_compile.recipe.token_plan import Span, TokenPlan
from flashu_compile.report.page import render
from flashu_compile.report.pictures import data_uri, keep_map
from tests.report import small_report


def lossy_page() -> str:
    recipe = small_report.recipe()
    return render(
        small_report.manifest(recipe),
        small_report.report(recipe, lossy=True),
        recipe,
        small_report.plan(recipe),
        small_report.comparisons(),
    )


@pytest.fixture(scope="module")
def page() -> str:
    return lossy_page()


class _Tags(HTMLParser):
    """Tags that are open, those that were closed out of turn, and every attribute."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def test_it_is_well_formed(page: str) -> None:
    tags = _Tags()
    tags.feed(page)
    assert (tags.open, tags.wrong) == ([], [])


def test_it_needs_no_network_and_runs_no_script(page: str) -> None:
    tags = _Tags()
    tags.feed(page)
    for name, value in tags.attributes:
        if name in ("src", "href", "xlink:href"):
            assert (value or "").startswith(("data:image/png;base64,", "#"))
    assert "<script" not in page
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_texts_are_escaped(page: str) -> None:
    assert "a red &lt;circle&gt;" in page
    assert "<circle>" not in page


def test_it_says_what_the_recipe_costs_and_saves(page: str) -> None:
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    assert "20 % relative L2 change of the final latents" in text
    assert (
        "1 of 2 next tokens stay the same, on samples that calibration has seen; logits change by 40 %"
        in text
    )
    assert "not timed flashu-compile benchmark times it" in text
    # 24 evaluations of 1 G and half of 0.1 G against 12 of 0.1 G, as many of schedules, three prologues and that half.
    assert "One picture: FLOPs −89 %, bytes moved" in text
    assert "FLOPs, as captured 24.1 G FLOPs, this bundle 2.75 G" in text
    for technique in ("FFN pruning", "layer skipping", "head cache", "token pruning", "everything together"):
        assert technique in text
    assert "stack llm, block 0: 64 → 48 neurons" in text
    assert "calibration has seen the questions" in text
    assert "calibration has seen the prompts" not in text


def test_what_was_measured_beside_the_exact_bundle_comes_first() -> None:
    recipe = small_report.recipe()
    report = small_report.report(recipe, lossy=True) | {"beside_exact": small_report.beside_exact()}
    seen = small_report.seen()
    told = render(
        small_report.manifest(recipe),
        report,
        recipe,
        small_report.plan(recipe),
        small_report.comparisons(),
        [seen],
    )
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", told))
    tiles = text[: text.index("Beside the exact bundle")]
    assert "3.10× faster one picture: 310 ms, the exact bundle 961 ms (95%: 2.90× to 3.30×)" in tiles
    assert (
        "0.988 SSIM of pictures, held against the exact bundle's (1: the same): the mean of 40 prompts, "
        in tiles
    )
    assert "lowest 0.879" in tiles
    # What is kept of a score takes hundreds of samples: the page does not tell it of forty.
    assert "evaluate DIR judges that" in text
    assert not re.search(r"at least \d|\d % kept", text)
    assert "FLOPs" not in tiles
    assert "evaluations of a picture 15 49" in text
    assert "a red &lt;circle&gt; (seed 3): SSIM 0.910" in text
    pictures = re.findall(r'alt="[^"]*, ([^",]+)" src="data:image/png;base64,([^"]+)"', told)
    assert [title for title, _ in pictures] == ["exact", "this bundle", "difference × 4"]
    difference = np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures[2][1]))).convert("RGB"))
    assert difference[0, 0].tolist() == [4 * 5, 4 * 5, 255]


def test_pictures_drawn_by_codes_are_shown_without_a_score() -> None:
    """After one other code all are others, so that a difference says nothing."""
    recipe = small_report.recipe()
    seen = dataclasses.replace(small_report.seen(), ssim=None)
    measured = {"beside_exact": small_report.beside_exact(), "calibration": {}, "cost": {}}
    report = small_report.report(recipe, lossy=True) | measured
    plan = TokenPlan((Span(4, "draw", 5.0),))
    told = render(small_report.manifest(recipe), report, recipe, plan, small_report.comparisons(), [seen])
    pictures = re.findall(r'alt="a red &lt;circle&gt; \(seed 3\), ([^",]+)"', told)
    assert pictures == ["exact", "this bundle"]
    assert "pictures may differ and be as good" in told


def test_rows_of_wide_tables_name_their_columns_where_they_are_stacked(page: str) -> None:
    tables = re.findall(r'<table class="stacked">(.*?)</table>', page, re.DOTALL)
    assert len(tables) >= 3
    for table in tables:
        titles = re.findall(r"<th[^>]*>([^<]*)</th>", table)
        rows = re.findall(r"<tr[^>]*>(<td.*?)</tr>", table, re.DOTALL)
        assert rows
        for row in rows:
            assert re.findall(r'data-label="([^"]*)"', row) == titles[1:]


def test_what_was_not_measured_is_said_with_the_reason() -> None:
    recipe = small_report.recipe()
    left_out = {"left_out": "9 rounds would take 300 seconds here."}
    report = small_report.report(recipe, lossy=True) | {"beside_exact": left_out}
    told = render(small_report.manifest(recipe), report, recipe, small_report.plan(recipe), {})
    assert "<b>not timed</b><span>9 rounds would take 300 seconds here.</span>" in told
    assert "Left out of the build: 9 rounds would take 300 seconds here." in told


def test_phases_that_the_plan_never_runs_are_not_listed() -> None:
    recipe = small_report.recipe()
    whole = dataclasses.replace(recipe, t2i=dataclasses.replace(recipe.t2i, full_ffn=0.5))
    for shown, of in (("1; 3 from 50.0%", recipe), ("1", whole)):
        page = render(
            small_report.manifest(of), small_report.report(of, lossy=True), of, small_report.plan(of), {}
        )
        assert f"<td>20% of llm: {shown}</td>" in page


def test_it_shows_every_plot_in_the_colours_of_the_page(page: str) -> None:
    plots = re.findall(r'<svg role="img" aria-label="([^"]+)"', page)
    assert len(plots) == 6
    assert not re.search(r"#0[1-6]0[1-6]0[1-6]", page)
    assert page.count("var(--first)") > 6


def test_pictures_are_there_side_by_side(page: str) -> None:
    sources = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    pictures = [Image.open(io.BytesIO(base64.b64decode(source))) for source in sources]
    assert len(pictures) == 2 * 2 + 2
    shown = np.asarray(small_report.comparisons()["t2i"][0].pictures[1])
    assert np.array_equal(np.asarray(pictures[1].convert("RGB")), shown)


def test_the_same_build_gives_the_same_page(page: str) -> None:
    """Here, and in another process with another hash seed and somebody's own plotting style."""
    code = "from tests.report.test_page import lossy_page; import sys; sys.stdout.buffer.write(lossy_page().encode())"
    again = subprocess.run(
        [sys.executable, "-c", f"import matplotlib; matplotlib.rcParams['font.size'] = 30; {code}"],
        check=True,
        capture_output=True,
        cwd=Path(__file__).parents[2],
        env={"PYTHONHASHSEED": "77", "PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert again.stdout.decode() == page


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "drops the rows with the largest norms from the picture after the layer"),
        ({"token_scorer": "duplication"}, "drops the rows most like others from the picture"),
        ({"token_pruning": 0.0}, "Mean over rows of the picture and of the text.<"),
    ],
)
def test_it_says_which_tokens_are_dropped(changes: dict[str, Any], said: str) -> None:
    recipe = small_report.recipe()
    recipe = dataclasses.replace(recipe, mmu=dataclasses.replace(recipe.mmu, **changes))
    report = small_report.report(recipe, lossy=True)
    assert said in render(
        small_report.manifest(recipe), report, recipe, small_report.plan(recipe), small_report.comparisons()
    )


def test_a_copy_that_was_proved_in_place_of_the_model_is_told(page: str) -> None:
    recipe = small_report.recipe()
    report = small_report.report(recipe, lossy=True)
    for told in report["engines"].values():
        told.pop("errors", None)
    proof = {
        "layers": {"llm": [0, 5]},
        "of_layers": {"llm": 28},
        "engines": {"denoise": {"velocity": 3.14e-7}},
        "passes": [],
    }
    told_page = render(
        small_report.manifest(recipe), {**report, "proof": proof}, recipe, small_report.plan(recipe), {}
    )
    assert "llm 0, 5 of 28" in told_page
    assert "Every engine of the copy was run before it was shipped" in told_page
    assert "3.1e-07" in told_page
    assert "proved on a copy" not in page


def test_engines_that_hold_their_weights_are_not_called_graphs(page: str) -> None:
    recipe = small_report.recipe()
    report = small_report.report(recipe, lossy=False)
    report |= {"sizes": {"engines_bytes": 6_000_000, "references_bytes": 1, "checkpoint_bytes": 5_000_000}}
    told = render(small_report.manifest(recipe), report, recipe, small_report.plan(recipe), {})
    assert "engines with their weights in them, of a checkpoint of 5.00 MB" in told
    assert "graphs" not in told.partition('class="tiles"')[2].partition("<h2>")[0]
    assert "weights, of a checkpoint of 5.00 MB; graphs" in page


def test_an_exact_recipe_has_a_short_page_without_plots() -> None:
    """And does not even import the plotting library."""
    code = """
import sys
from flashu_compile.report.page import render
from tests.report import small_report as s
page = render(s.manifest(s.exact()), s.report(s.exact(), lossy=False), s.exact(), s.plan(s.exact()), {})
assert "matplotlib" not in sys.modules
assert "torch" not in sys.modules
assert "no pass changes an output" in page
assert "What it costs" not in page
assert "<svg" not in page
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env={"PYTHONPATH": str(root)})


def test_dropped_tokens_are_dimmed_where_they_were() -> None:
    picture = Image.fromarray(np.full((4, 4, 3), 200, np.uint8))
    # A row for the time before the grid of two by two.
    shown = keep_map(picture, np.array([True, True, False, False, True]))
    assert shown is not None
    bright = np.asarray(shown)[..., 0] == 200
    assert bright.tolist() == [[True, True, False, False]] * 2 + [[False, False, True, True]] * 2
    assert keep_map(picture, np.ones(6, bool)) is None


def test_large_pictures_are_scaled_down() -> None:
    source = data_uri(Image.new("RGB", (1000, 500), "red")).partition(",")[2]
    assert Image.open(io.BytesIO(base64.b64decode(source))).size == (320, 160)


def test_what_layers_lose_in_int8_is_told_where_they_are_int8(page: str) -> None:
    title = "What layers lose in few bits"
    assert title not in page
    recipe = small_report.recipe()
    losses = {"layers": 14, "sensitive": 3, "mean": 0.021, "worst": 0.0909}
    told = {"limit": 0.05, "tasks": {"t2i": {"samples": 3, "parts": {"llm": losses}, "layers": []}}}
    report = {**small_report.report(recipe, lossy=True), "int8": told}
    shown = render(
        small_report.manifest(recipe), report, recipe, small_report.plan(recipe), small_report.comparisons()
    )
    section = shown[shown.index(title) : shown.index("What was cut, and why")]
    assert [cell for cell in ("14", "3", "2.1\u00a0%", "9.09\u00a0%") if f">{cell}</td>" not in section] == []


def test_what_was_declined_is_apart_from_what_was_done() -> None:
    recipe = small_report.recipe()
    report = small_report.report(recipe, lossy=True)
    rows = {
        "GatherTokens": ("lossy", "token pruning", "less than one <token>"),
        "ShareBatch": ("exact", None, "no input has the size s0"),
    }
    for name, (kind, technique, why) in rows.items():
        report["passes"].append(
            {
                "program": "understand",
                "name": name,
                "kind": kind,
                "changes": [],
                "error": None,
                "declined": [why],
                "technique": technique,
            }
        )
    page = render(
        small_report.manifest(recipe), report, recipe, small_report.plan(recipe), small_report.comparisons()
    )
    undone, left = (
        page[start : page.index("</table>", start)]
        for start in (page.index("Asked, not done"), page.index("What passes left as it is"))
    )
    assert "token pruning" in undone
    assert "less than one &lt;token&gt;" in undone
    assert "ShareBatch" not in undone
    assert "no input has the size s0" in left
    assert "GatherTokens" not in left
    for caption in ("What each lossy pass changes", "Passes that changed something"):
        start = page.index(caption)
        assert "GatherTokens" not in page[start : page.index("</table>", start)]
    assert "Asked, not done" not in lossy_page()
