"""The page of a run: what it says of the model, and how it looks in a browser."""

import html.parser
import json
import pathlib
import re
import shutil
import subprocess
from typing import Any

import jax
import numpy as np
import pytest

from t5x_lite import cli, model, parameters, probe, report, report_page, step, train
from t5x_lite import config as config_lib
from t5x_lite.visibility import Cells, visible
from tests.test_commands import untrained
from tests.test_structures import WORDS, built, streams
from tests.tiny import tiny_config

STRUCTURES = ("encoder", "decoder", "encoder_decoder", "prefix_lm", "permuted")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)


def net_of(structure: str):
    cfg, _ = built(structure)
    net = model.build(cfg)
    return cfg, net, parameters.init_params(net, jax.random.key(0))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_probabilities_add_up_to_the_loss(structure):
    """The evaluation step's nll is the sum of -log p of the truths that are shown."""
    model_cfg, net, params = net_of(structure)
    batch = streams(structure)
    cfg = tiny_config(loss=dict(z_loss=0.0))
    cfg = config_lib.freeze(
        config_lib.to_json(cfg) | {"model": config_lib.to_json(model_cfg)}
    )
    sums = step.make_eval_step(net, cfg, WORDS.size)(params, batch)
    probed = probe.predictions(net, params, batch, WORDS)
    shown = [piece for one in probed for piece in one.predicted if piece.guess]
    assert len(shown) == int(sums["tokens"].weight)
    nll = -sum(np.log(piece.p) for piece in shown)
    np.testing.assert_allclose(nll, float(sums["tokens"].nll), rtol=1e-4)
    right = sum(piece.guess == piece.text for piece in shown)
    assert right == int(sums["tokens"].correct)
    assert all(piece.p <= piece.p_guess + 1e-6 for piece in shown)


@pytest.mark.parametrize("structure", ["encoder", "decoder", "prefix_lm"])
def test_what_is_shown_is_the_text(structure):
    """Read and predicted pieces of a row together spell its tokens."""
    _, net, params = net_of(structure)
    batch = streams(structure)
    main = batch["main"]
    for b, one in enumerate(probe.predictions(net, params, batch, WORDS)):
        tokens = main["tokens"][b].copy()
        if "places" in main:
            counted = main["weights"][b] > 0
            tokens[main["places"][b][counted]] = main["targets"][b][counted]
        else:  # each predicts the next, and the last token is only a target
            tokens = np.append(tokens[:1], main["targets"][b])
        kept = [WORDS.label(int(i)) for i in tokens if i != WORDS.pad_id]
        assert [piece.text for piece in one.predicted] == kept


@pytest.mark.parametrize("structure", ["encoder", "decoder", "prefix_lm"])
def test_attention_maps_show_who_sees_whom(structure):
    cfg, net, params = net_of(structure)
    batch = streams(structure)
    (weights_LNTS,) = probe.attention_maps(net, params, batch).values()
    assert weights_LNTS.shape[:2] == (cfg.depth, cfg.heads)
    np.testing.assert_allclose(weights_LNTS.sum(axis=-1), 1.0, rtol=1e-5)
    cells = Cells.of(probe.rows_of(batch, 1)["main"])
    seen_TS = np.asarray(visible(cells, cells)[0])
    read_T = batch["main"]["segments"][0] > 0
    looks_TS = np.all(weights_LNTS > 0, axis=(0, 1))[read_T]
    np.testing.assert_array_equal(looks_TS, seen_TS[read_T])


def test_attention_maps_of_an_encoder_decoder():
    cfg, net, params = net_of("encoder_decoder")
    batch = probe.of_text("a text to look at", cfg, WORDS)
    maps = probe.attention_maps(net, params, batch)
    T = batch["decoder"]["tokens"].shape[1]
    assert {k: v.shape for k, v in maps.items()} == {
        "encoder": (2, 2, T, T),
        "decoder": (2, 2, T, T),
        "decoder to encoder": (2, 2, T, T),
    }
    assert (np.triu(maps["decoder"], 1) == 0).all() and (maps["encoder"] > 0).all()
    names = probe.names(batch, maps, WORDS)
    assert "".join(names["encoder"][0]).startswith("a")
    assert len(names["decoder to encoder"][1]) == T


def test_attention_maps_of_electra_are_its_discriminators():
    cfg, net, params, words = untrained("electra")
    batch = probe.of_text("a text to look at", cfg.model, words)
    (weights_LNTS,) = probe.attention_maps(net, params, batch).values()
    T = batch["main"]["tokens"].shape[1]
    assert weights_LNTS.shape == (cfg.model.depth, cfg.model.heads, T, T)


def test_attention_maps_reach_into_the_memory():
    cfg, _ = built("permuted", positions="transformer_xl", memory_length=6)
    net = model.build(cfg)
    params = parameters.init_params(net, jax.random.key(0))
    batch = probe.beginning(streams("permuted"))
    batch["memory"] = {k: v[:, :6] for k, v in batch["main"].items()}
    (weights_LNTS,) = probe.attention_maps(net, params, batch).values()
    T = batch["main"]["tokens"].shape[1]
    assert weights_LNTS.shape == (cfg.depth, cfg.heads, T, 6 + T)
    assert (weights_LNTS[..., :6] > 0).all()


def test_a_part_that_cannot_be_shown_is_told():
    def fails(error: Exception):
        raise error

    assert "&lt;refused&gt;" in report_page._or_why(
        lambda: fails(ValueError("<refused>"))
    )
    with pytest.raises(KeyError):  # a defect of ours is no refusal
        report_page._or_why(lambda: fails(KeyError("places")))


class Page(html.parser.HTMLParser):
    """Sections, words, pictures and what is fetched from elsewhere."""

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.words, self.images, self.fetched = [], [], 0, []
        self.marks = 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids += [given["id"]] if "id" in given else []
        self.marks += tag == "mark"
        for key in ("src", "href"):
            if not str(given.get(key, "#")).startswith(("#", "data:")):
                self.fetched.append(given[key])
        self.images += str(given.get("src")).startswith("data:image/png")

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> pathlib.Path:
    """A run of two steps on the demo's text, and an evaluation of it."""
    workdir = tmp_path_factory.mktemp("report") / "run"
    raw: Any = cli.load_config("configs/demo.py:smoke")
    raw.data.cache_dir = str(workdir.parent / "stores")
    raw.compile_cache = ""
    train.train(config_lib.freeze(raw), workdir)
    (workdir / "evaluation-2.json").write_text(
        json.dumps({"step": 2, "polarity": {"accuracy": 0.75, "note": "<b>bold</b>"}})
    )
    report.main([f"--workdir={workdir}", "--text=the house <of> the Lord"])
    return workdir


def test_page_of_a_run(finished):
    text = (finished / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    sections = ("curves", "metrics", "examples", "samples", "attention", "config")
    assert [i for i in page.ids if i in sections] == list(sections)
    assert not page.fetched  # self-contained
    assert page.images >= 8 and page.marks > 20
    words = "".join(page.words)
    assert "polarity / accuracy" in words and "0.75" in words
    assert "<b>bold</b>" in words  # text, not HTML
    assert 'config.model.structure = "encoder_decoder"' in words
    assert "step 2" in words.lower()
    colours = set(re.findall(r'<mark style="background:(rgb\([\d,]+\))"', text))
    assert len(colours) > 1


def test_page_without_checkpoint_and_data(finished, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(finished / "config.json", bare)
    report.main([f"--workdir={bare}", f"--output={tmp_path / 'page.html'}"])
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "no checkpoint" in "".join(page.words)
    assert "config" in page.ids and "examples" not in page.ids


def test_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        report.main([f"--workdir={tmp_path}"])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="--output"):
        report.main([f"--workdir={tmp_path}", f"--output={tmp_path}/no/page.html"])
    with pytest.raises(ValueError, match="--examples=0"):
        report.main([f"--workdir={tmp_path}", "--examples=0"])


def opened(*command: str) -> str:
    run = subprocess.run(command, check=True, capture_output=True, timeout=120)
    return run.stdout.decode()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the page with")
def test_page_in_a_browser(finished, tmp_path):
    """Chromium draws it: the picture is not blank, and every image has loaded."""
    from matplotlib import image

    browser = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu"]
    browser += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1100,3000"]
    url = (finished / "report.html").absolute().as_uri()
    shot = tmp_path / "page.png"
    opened(*browser, f"--screenshot={shot}", url)
    drawn = image.imread(shot)[..., :3]
    assert drawn.shape == (3000, 1100, 3)
    inked = np.any(drawn < 0.95, axis=-1)
    assert inked[:1500].mean() > 0.01 and inked[1500:].mean() > 0.01
    counting = (
        "<script>document.title = [...document.images].map("
        "i => i.complete && i.naturalWidth > 0).join()</script>"
    )
    counted = tmp_path / "counted.html"
    page = (finished / "report.html").read_text(encoding="utf-8")
    counted.write_text(page.replace("</html>", counting + "</html>"), encoding="utf-8")
    dom = opened(*browser, "--dump-dom", counted.as_uri())
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title and set(title[1].split(",")) == {"true"}
