"""The page of a study: complete, self-contained, and no bolder than its numbers."""

import base64
import html.parser
import io
import re

import numpy as np
import pytest
from matplotlib import image
from scipy import stats

from t5x_lite.studies import analysis, commands_fit, compare, records, summary
from tests import synthetic_study as made

FEW = analysis.Settings(replicates=40)


class Page(html.parser.HTMLParser):
    """What a page refers to, and its text."""

    VOID = {"meta", "img", "br"}

    def __init__(self, text: str):
        super().__init__()
        self.sources, self.links, self.ids, self.open = [], [], set(), []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        known = dict(attrs)
        self.sources += [known[k] for k in ("src", "data") if k in known]
        self.links += [known["href"]] if "href" in known else []
        self.ids |= {known["id"]} if "id" in known else set()
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def report(tmp_path, lines, *flags) -> tuple[Page, set[str]]:
    path = made.write(tmp_path / "results.jsonl", lines)
    commands_fit.report([f"--results={path}", "--replicates=40", *flags])
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    page = Page(text)
    for link in page.links:
        assert link.startswith("#") and link[1:] in page.ids, link
    for source in page.sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        pixels = image.imread(io.BytesIO(base64.b64decode(data)), format="png")
        assert min(pixels.shape[:2]) > 150 and np.ptp(pixels[..., 0]) > 0.5
    return page, {p.stem for p in (tmp_path / "figures").iterdir()}


def test_page_of_a_whole_study(tmp_path):
    page, drawn = report(tmp_path, made.rows())
    assert drawn == {"cells", "curves", "depth_width", "isoflop", "frontier"}
    assert len(page.sources) == 5
    words = "".join(page.words)
    cells = list(dict.fromkeys(row["cell"] for row in made.rows()))
    for k, cell in enumerate(cells):
        assert f"config-{k}" in page.ids and cell in words
    assert "config.model.d_model = 96" in words
    assert "config.optim.learning_rate = 0.004" in words
    assert "(root mean square" in words and "irreducible loss E" in words


@pytest.mark.parametrize("seeds", [1, 2])
def test_page_of_one_cell(tmp_path, seeds):
    rows = made.rows(budgets=(1e10,), shapes=((1, 32),), seeds=seeds)
    page, drawn = report(tmp_path, rows)
    assert drawn == {"curves"}
    words = "".join(page.words)
    assert words.count("No figure: ") == 4
    assert "No scaling law" in words
    assert ("No cell has two seeds" in words) == (seeds == 1)


def test_page_of_one_axis_without_curves(tmp_path):
    shapes = ((1, 32), (2, 32), (4, 32), (6, 32))
    rows = made.rows(budgets=(1e11,), shapes=shapes)
    page, drawn = report(tmp_path, [row | {"curve": []} for row in rows])
    assert drawn == {"cells", "depth_width", "isoflop"}
    words = "".join(page.words)
    assert "No run has noted its training loss" in words
    assert "needs 3 budgets; there is 1" in words


def test_old_figures_go(tmp_path):
    report(tmp_path, made.rows())
    _, drawn = report(tmp_path, made.rows()[:1])
    assert drawn == {"curves"}


def test_names_from_the_study_are_text_not_markup(tmp_path):
    rows = made.rows(budgets=(1e11,), shapes=((1, 32), (2, 32)), seeds=2)
    rows = [row | {"cell": "<b>" + row["cell"] + "&"} for row in rows]
    page, _ = report(tmp_path, rows)
    assert any("<b>decoder_l1" in w for w in page.words)


def told(tmp_path, losses: dict[str, list[float]], **settings):
    """Sentences on cells of one shape with these losses, one for each seed."""
    (row,) = made.rows(budgets=(1e10,), shapes=((1, 32),), seeds=1)
    lines = [
        row | {"cell": name, "seed": seed, "heldout_loss": loss}
        for name, group in losses.items()
        for seed, loss in enumerate(group)
    ]
    path = made.write(tmp_path / "results.jsonl", lines)
    return summary.summarise(analysis.analyse(records.read(path), FEW))


def test_differences_count_beyond_noise_only(tmp_path):
    clear = told(tmp_path, {"a": [2.0, 2.01], "b": [2.5, 2.51], "c": [2.0, 2.02]})
    better = [s.text for s in clear if s.kind == "is"]
    assert len(better) == 1 and "a has the lowest loss" in better[0]
    assert ": b (by 0.5" in better[0]
    assert any("cannot be told from c (by" in s.text for s in clear if s.kind == "not")
    noisy = told(tmp_path, {"a": [2.0, 2.4], "b": [2.1, 2.5]})
    assert not [s for s in noisy if s.kind == "is"]
    single = told(tmp_path, {"a": [2.0], "b": [9.0]})
    assert not [s for s in single if s.kind == "is"]
    assert any("may be noise" in s.text for s in single)


def test_a_difference_counts_where_games_and_howell_say_so(tmp_path):
    """Against scipy.stats.tukey_hsd, on cells of other spreads and numbers of seeds."""
    rng = np.random.default_rng(0)
    spreads = dict(a=(2.0, 0.01, 3), b=(2.02, 0.02, 4), c=(2.2, 0.002, 3))
    for _ in range(2):
        groups = {k: list(rng.normal(m, s, n)) for k, (m, s, n) in spreads.items()}
        want = stats.tukey_hsd(*groups.values(), equal_var=False).pvalue
        got = compare.games_howell([np.array(g) for g in groups.values()])
        for i, j in ((0, 1), (0, 2), (1, 2)):
            assert got[i, j] == got[j, i] == pytest.approx(want[i, j], abs=1e-6)
        best = min(groups, key=lambda k: np.mean(groups[k]))
        p = want["abc".index(best)]
        worse = {k for k, value in zip("abc", p, strict=True) if value < 0.05}
        text = " ".join(s.text for s in told(tmp_path, groups) if s.kind == "not")
        same = set(re.findall(r"([a-c]) \(by", text))
        assert same == set("abc") - worse - {best}


def test_a_noisy_cell_does_not_hide_what_quiet_ones_show(tmp_path):
    """Two quiet cells far apart, beside one whose seeds differ by 0.5."""
    groups = {
        "a": [2.000, 2.001, 2.002],
        "b": [2.030, 2.031, 2.032],
        "wild": [2.2, 2.7, 2.4],
    }
    better = [s.text for s in told(tmp_path, groups) if s.kind == "is"]
    assert len(better) == 1 and "better than 1 of the others" in better[0]
    assert ": b (by 0.0300" in better[0]


def test_cells_without_a_verdict_say_why(tmp_path):
    groups = {"a": [2.0, 2.01], "b": [2.5], "c": [3.0, 3.0], "d": [3.0, 3.0]}
    text = " ".join(s.text for s in told(tmp_path, groups))
    assert "b (by 0.4950, one seed)" in text
    found = compare.games_howell([np.array(g) for g in groups.values()])
    assert np.isnan(found[2, 3]) and np.isnan(found[1]).all()


def test_intervals_of_cells_are_those_of_their_own_seeds():
    own = np.array([2.0, 2.1, 2.5])
    low, high = stats.ttest_1samp(own, 0).confidence_interval(0.9)
    assert compare.reach(own, 0.9) == pytest.approx((high - low) / 2)
    assert compare.reach(own[:1], 0.9) == 0


def test_runs_without_a_finite_loss_are_named(tmp_path):
    lost = told(tmp_path, {"a": [2.0, np.nan, 2.1], "b": [2.0, 2.2, np.inf]})
    (text,) = [s.text for s in lost if "no finite loss" in s.text]
    assert "2 runs have" in text and "a seed 1, b seed 2" in text


def test_irreducible_loss_at_its_bound_is_not_determined(tmp_path):
    none = (1e-9, 30.0, 120.0, 0.32, 0.36)
    path = made.write(tmp_path / "results.jsonl", made.rows(law=none, noise=0.0))
    found = summary.summarise(analysis.analyse(records.read(path), FEW))
    (said,) = [s for s in found if "irreducible loss E" in s.text]
    assert said.kind == "not" and "at its bound" in said.text


def test_extrapolation_is_named_as_such(tmp_path):
    path = made.write(tmp_path / "results.jsonl", made.rows())
    settings = analysis.Settings(replicates=40, budgets=(1e13, 1e17))
    found = summary.summarise(analysis.analyse(records.read(path), settings))
    near = [s for s in found if "for 1e+13 FLOPs" in s.text]
    far = [s for s in found if "for 1e+17 FLOPs" in s.text]
    assert [s.kind for s in near] == ["is"] and "extrapolation" not in near[0].text
    assert [s.kind for s in far] == ["not"]
    assert "8e+03 times the largest run: an extrapolation" in far[0].text


def test_common_scores_compare_across_objectives(tmp_path):
    rows = [
        row | {"score": "continuation_loss"}
        for structure in ("decoder", "prefix_lm")
        for row in made.rows((1e10,), ((1, 32),), 2, structure=structure)
    ]
    path = made.write(tmp_path / "results.jsonl", rows)
    found = analysis.analyse(records.read(path), FEW)
    assert [len(g) for g in found.comparable().values()] == [2]
    rows[0]["training_flops"] *= 100  # a score of the study's own crosses budgets too
    rows[1]["training_flops"] *= 100
    made.write(path, rows)
    found = analysis.analyse(records.read(path), FEW)
    assert [len(g) for g in found.comparable().values()] == [2]
    own = analysis.analyse(
        records.read(path), analysis.Settings(loss="train", replicates=40)
    )
    assert own.comparable() == {}
