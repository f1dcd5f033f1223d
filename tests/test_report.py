"""scripts/report.py as a command line on a small run: a page that needs nothing but itself, that
shows what was measured and says what is missing.

python -m pytest tests/test_report.py
"""

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.report_page import PARAMS, QUICK, SECTIONS, Page, reported
from tinydm.models.ddim_unet import DDIMUNet
from tinydm.quant.runtime.packed_file import load_quantized
from tinydm.scripts import report
from tinydm.scripts.common.units import duration, mebibytes
from tinydm.scripts.metrics import paired_psnr
from tinydm.scripts.reporting.contents import bytes_by_kind, read_quantizers
from tinydm.scripts.reporting.measurements import FILE, Networks


@pytest.fixture(scope="module")
def page(home: Path) -> Page:
    return Page(home / "run" / "report.html")


@pytest.fixture
def copy(home: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(home / "run", tmp_path / "copy"))


@pytest.mark.slow
def test_every_section_is_there_and_nothing_is_missing(page: Page) -> None:
    assert set(page.text) == SECTIONS and not page.open
    assert page.missing() == {} and page.notes == []
    links = {value for tag, name, value in page.attributes if (tag, name) == ("a", "href")}
    assert links == {f"#{name}" for name in SECTIONS}
    assert ("meta", "name", "viewport") in page.attributes
    assert "prefers-color-scheme: dark" in page.style


@pytest.mark.slow
def test_the_page_is_self_contained(page: Page) -> None:
    tags = {tag for tag, _, _ in page.attributes}
    assert not tags & {"script", "link", "iframe", "object", "embed", "video", "source"}
    for tag, name, value in page.attributes:
        assert not re.match(r"\s*(https?:|//|file:)", value), (tag, name)
        assert name not in ("srcset", "data") and not name.startswith("on")
        if name == "src":
            assert value.startswith(("data:image/png;base64,", "data:image/svg+xml;base64,"))
    assert "@import" not in page.style and "url(" not in page.style
    assert len(page.pictures) >= 8
    for data in page.pictures:
        if data.startswith(b"\x89PNG"):
            Image.open(io.BytesIO(data)).load()
            continue
        links = re.findall(r'href="([^"]*)"|url\(([^)]*)\)', data.decode())
        assert data.startswith(b"<svg") and b"mathdefault" not in data
        assert all((a or b).startswith(("#", "data:")) for a, b in links)


@pytest.mark.slow
def test_a_phone_shows_everything_or_says_that_there_is_more(home: Path, page: Page) -> None:
    """Tables of facts break their lines; the others have a shadow at the edge they go beyond."""
    source = (home / "run" / "report.html").read_text()
    summary = source[source.index('id="summary"') : source.index('id="images"')]
    assert summary.count("<table") == summary.count('<table class="facts"') == 2
    rule = page.style.replace("\n", " ")
    assert re.search(r"table\.facts t[hd][^}]*white-space: normal", rule)
    assert re.search(r"table\.facts td:last-child[^}]*overflow-wrap: anywhere", rule)  # digests
    assert re.search(r"pre \{[^}]*white-space: pre-wrap", rule)  # the configuration
    assert re.search(r"\.wide \{[^}]*overflow-x: auto;[^}]*local,[^}]*scroll;", rule)
    assert "(s)" not in page.text["summary"] and "(MB)" not in page.text["summary"]
    assert "Size (MiB)" in page.text["summary"] and "FID" not in summary  # nobody measured it


@pytest.mark.slow
def test_each_of_the_worst_pairs_has_its_psnr_below(home: Path, page: Page) -> None:
    run, source = home / "run", (home / "run" / "report.html").read_text()
    worst = source[source.index('class="worst"') : source.index('id="psnr"')]
    captions = re.findall(r"<figcaption>(\d{6}): ([\d.]+) dB</figcaption>", worst)
    assert len(captions) == worst.count("<img") == 3
    assert [float(v) for _, v in captions] == sorted(float(v) for _, v in captions)
    for number, value in captions:
        full, ours = (
            np.asarray(Image.open(run / folder / f"{number}.png"), np.float64)
            for folder in ("images-fp", "images-w4a8")
        )
        psnr = 10 * np.log10(255**2 / ((full - ours) ** 2).mean())
        assert float(value) == pytest.approx(psnr, abs=0.051)


@pytest.mark.slow
def test_numbers_are_those_of_the_run(home: Path, page: Page) -> None:
    run = home / "run"
    pairs = paired_psnr(run / "images-w4a8", run / "images-fp")
    assert (
        f"pooled {pairs['psnr']:.2f} dB, median {pairs['psnr_median']:.2f} dB"
        in (page.text["psnr"])
    )
    told = json.loads((run / "report.json").read_text())
    assert f"{told['size_mb']:.3f} MiB" in page.text["summary"]
    assert f"{sum(told['phases']['tuples_per_step'])} calibration samples" in page.text["timesteps"]
    assert all(row["name"] in page.text["layers"] for row in told["layers"])
    sizes = bytes_by_kind(run / "quantized.safetensors")
    assert sum(sizes.values()) == (run / "quantized.safetensors").stat().st_size == told["bytes"]
    assert all(f"{size:,}" in page.text["size"] for size in sizes.values())
    assert (run / "config.yaml").read_text() in page.text["config"]
    assert (
        told["identity"] in page.text["versions"]
        and told["versions"]["torch"] in (page.text["versions"])
    )


@pytest.mark.slow
def test_one_layer_alone_is_what_it_says(home: Path) -> None:
    """Against the same state and the same layer put into the network by hand."""
    kept = json.loads((home / "run" / FILE).read_text())
    layers, states = kept["layers"]["values"], kept["states"]["values"]
    assert layers["timesteps"] == [states["timesteps"][i] for i in (0, 2, 5)]
    assert set(layers["eps_mse"]) == {
        row["name"] for row in json.loads((home / "run/report.json").read_text())["layers"]
    }
    assert all(error > 0 for error in layers["eps_mse"].values())
    name = "mid.block_1.conv1"
    full, empty = DDIMUNet(**PARAMS).eval(), DDIMUNet(**PARAMS).eval()
    full.load_state_dict(torch.load(home / "narrow.pt", weights_only=True))
    model = load_quantized(home / "run" / "quantized.safetensors", empty)
    states = Networks(report.read_run(home / "run"), torch.device("cpu"), 2, True).states
    x = torch.stack([states.x[0, 0], states.x[2, 1], states.x[5, 0]])
    t = torch.tensor(layers["timesteps"])
    quantized, conv = model.denoiser.get_submodule(name), full.get_submodule(name)
    with torch.no_grad():
        exact = full(x, t)
        model.context.set(t)
        conv.register_forward_hook(lambda module, args, out: quantized(args[0]))
        error = (full(x, t) - exact).double().square().mean()
    assert layers["eps_mse"][name] == pytest.approx(float(error), rel=1e-3)


@pytest.mark.slow
def test_ranges_and_groups_fit_the_file(home: Path) -> None:
    quantizers = read_quantizers(home / "run" / "quantized.safetensors")
    states = json.loads((home / "run" / FILE).read_text())["states"]["values"]
    low, high = (np.array(states[name], dtype=float) for name in ("low", "high"))
    assert low.shape == quantizers.rank.shape == (len(quantizers.labels), 6)
    assert (low <= high).all() and len(set(quantizers.labels)) == len(quantizers.labels)
    assert (quantizers.low <= 0).all() and (quantizers.high > 0).all()
    row = next(i for i, n in enumerate(quantizers.labels) if n.endswith("attn.0.values (left)"))
    assert low[row].min() >= 0 and high[row].max() <= 1.0001  # attention's probabilities
    finest = [quantizers.high[r] - quantizers.low[r] for r in range(len(low))]
    for rank, width in zip(quantizers.rank, finest, strict=True):  # ranks are in order of scale
        assert (np.diff(width[np.argsort(rank, kind="stable")]) >= -1e-6 * width.max()).all()


@pytest.mark.slow
def test_a_second_page_measures_nothing_and_is_the_same(copy: Path) -> None:
    first = (copy / "report.html").read_bytes()
    (copy / "report.html").unlink()
    before = (copy / FILE).stat().st_mtime_ns
    report.main([str(copy), *QUICK])
    assert (copy / "report.html").read_bytes() == first
    assert (copy / FILE).stat().st_mtime_ns == before


@pytest.mark.slow
def test_text_of_the_run_is_not_markup(copy: Path) -> None:
    told = json.loads((copy / "report.json").read_text())
    (copy / "report.json").write_text(json.dumps(told | {"name": "<script>alert(1)</script>"}))
    page = reported(copy)
    assert "script" not in {tag for tag, _, _ in page.attributes} | set(page.open)
    assert "<script>" not in (copy / "report.html").read_text()


@pytest.mark.slow
def test_the_map_of_the_groups_as_a_file(home: Path) -> None:
    with Image.open(home / "figures" / "run-groups.png") as image:
        assert image.width > 300 and len(np.unique(np.asarray(image)[..., 0])) > 3


def test_sizes_and_times_are_told_as_people_read_them() -> None:
    told = [duration(seconds) for seconds in (0.04, 9.96, 42.4, 440, 4000, 9000, None)]
    assert told == ["0.04 s", "10 s", "42 s", "7.3 min", "66.7 min", "2.5 h", "unknown"]
    assert mebibytes(0.0549, 3) == "0.055 MiB" and mebibytes(None) == "unknown"
