"""scripts/report.py as a command line on a small run: a page that needs nothing but itself, that
shows what was measured and says what is missing.

python -m pytest tests/test_report.py
"""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

import calibrate
import sample_diffusion
from tests.helpers import forks
from tests.helpers.commands import CONFIG, command, done
from tests.helpers.commands import QUICK as QUICK_CALIBRATION
from tests.helpers.forks import refusal
from tests.helpers.strange import changed
from tinydm.models.ddim_unet import DDIMUNet
from tinydm.quant.runtime.packed_file import load_quantized
from tinydm.scripts import compare, report
from tinydm.scripts.common.errors import RunError
from tinydm.scripts.common.units import duration, mebibytes
from tinydm.scripts.experiment.cli import explain
from tinydm.scripts.experiment.runs import png_name
from tinydm.scripts.metrics import paired_psnr
from tinydm.scripts.reporting import figures
from tinydm.scripts.reporting.contents import bytes_by_kind, read_quantizers
from tinydm.scripts.reporting.measurements import FILE, Networks

SECTIONS = {"summary", "images", "psnr", "eps", "groups", "ranges", "timesteps", "layers"}
SECTIONS |= {"size", "speed", "config", "versions"}
PARAMS = {"ch": 8, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [8]}
PARAMS |= {"image_size": 16, "norm_groups": 4}
QUICK = ["--trajectories", "2", "--states", "3"]
READ = ["report.json", "comparison.json", FILE]
READ += [f"images-{kind}.{what}.json" for kind in ("fp", "w4a8") for what in ("report", "identity")]
VOID = {"meta", "img", "br", "wbr"}


class Page(HTMLParser):
    """Sections with their text and what they say is missing, every attribute, every style."""

    def __init__(self, path: Path):
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.text: dict[str, str] = {}
        self.lacks: dict[str, list[str]] = {}
        self.notes: list[str] = []
        self.style = self.section = self.kind = ""
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        values = dict(attrs)
        if tag == "section":
            self.section = values["id"]
            self.text[self.section], self.lacks[self.section] = "", []
        self.kind = values.get("class") if tag == "p" else ("style" if tag == "style" else "")
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag  # well formed
        self.kind = ""
        if tag == "section":
            self.section = ""

    def handle_data(self, data: str) -> None:
        if self.kind == "style":
            self.style += data
        elif self.kind == "missing":
            self.lacks[self.section].append(data)
        elif self.kind == "note":
            self.notes.append(data)
        if self.section:
            self.text[self.section] += data

    @property
    def pictures(self) -> list[bytes]:
        uris = [value for tag, name, value in self.attributes if (tag, name) == ("img", "src")]
        return [base64.b64decode(uri.partition(";base64,")[2], validate=True) for uri in uris]

    def missing(self) -> dict[str, str]:
        return {name: " ".join(said) for name, said in self.lacks.items() if said}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """narrow.yaml, its checkpoint, and `run`: calibrated, sampled, compared."""
    folder = tmp_path_factory.mktemp("report")
    torch.manual_seed(0)
    torch.save(DDIMUNet(**PARAMS).state_dict(), folder / "narrow.pt")
    (folder / "narrow.yaml").write_text(CONFIG)
    config, run = str(folder / "narrow.yaml"), folder / "run"
    brief = (*QUICK_CALIBRATION, "quant.reconstruct.iterations=0")
    brief += ("quant.reconstruct.finetune_iterations=4", "quant.search.rounds=2")
    brief += ("calibration.samples=24",)
    calibrate.main(["--config", config, "--out", str(run), "--set", *brief])
    sample_diffusion.main(["--config", config, "--out", str(run / "images-fp")])
    quantized = ["--config", config, "--quantized", str(run / "quantized.safetensors")]
    sample_diffusion.main([*quantized, "--out", str(run / "images-w4a8")])
    compare.main(["--run", str(run), "--full", "images-fp", "--quantized", "images-w4a8"])
    done(command("scripts/report.py", folder, "run", *QUICK, "--figures", "figures"))
    return folder


@pytest.fixture(scope="module")
def page(home: Path) -> Page:
    return Page(home / "run" / "report.html")


@pytest.fixture
def copy(home: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(home / "run", tmp_path / "copy"))


@pytest.fixture(scope="module")
def worn(home: Path) -> Path:
    """A copy whose files are changed, and put back, again and again."""
    return Path(shutil.copytree(home / "run", home / "worn"))


def write_plainly(run: Path, *arguments: str) -> None:
    """A page whose figures are drawn, but neither laid out nor their letters outlined: faster."""
    subplots = figures.plt.subplots
    with pytest.MonkeyPatch.context() as patch, matplotlib.rc_context({"svg.fonttype": "none"}):
        patch.setattr(figures.plt, "subplots", lambda **given: subplots(figsize=given["figsize"]))
        report.main([str(run), *(arguments or QUICK)])


def reported(run: Path, *arguments: str) -> Page:
    write_plainly(run, *arguments)
    return Page(run / "report.html")


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
@pytest.mark.parametrize(
    ("gone", "sections"),
    [
        (["images-fp", "images-w4a8"], {"images", "psnr", "speed"}),
        (["images-fp"], {"images", "psnr", "speed"}),
        (["comparison.json"], {"summary"}),
        (["report.json"], {"summary", "timesteps", "layers", "speed"}),
        (["quantized.safetensors"], {"eps", "groups", "ranges", "layers", "size"}),
    ],
)
def test_what_is_missing_is_said(gone: list[str], sections: set[str], copy: Path) -> None:
    for name in gone:
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = reported(copy)
    assert set(page.text) == SECTIONS
    assert set(page.missing()) == sections
    assert all(said.startswith("Not in this run: ") for said in page.missing().values())


@pytest.mark.slow
def test_without_its_checkpoint_only_ranges_are_measured(copy: Path) -> None:
    """And another checkpoint is no substitute."""
    text = (copy / "config.yaml").read_text()
    found = re.search(r"checkpoint: (\S+)", text).group(1)
    (copy / "config.yaml").write_text(text.replace(found, "elsewhere.pt"))
    page = reported(copy)
    assert set(page.missing()) == {"eps", "layers"} and "elsewhere.pt" in page.missing()["eps"]
    assert "eps-MSE alone" not in page.text["layers"]
    torch.manual_seed(1)
    torch.save(DDIMUNet(**PARAMS).state_dict(), copy / "elsewhere.pt")
    page = reported(copy)
    assert "not the checkpoint that was calibrated" in page.missing()["eps"]
    page = reported(copy, "--trajectories", "0", "--states", "0")
    assert {"eps", "ranges", "layers"} == set(page.missing())


@pytest.mark.slow
def test_images_that_do_not_belong_together_are_not_compared(copy: Path, home: Path) -> None:
    identity = json.loads((copy / "images-fp.identity.json").read_text())
    (copy / "images-fp.identity.json").write_text(json.dumps(identity | {"seed": 7}))
    page = reported(copy)
    assert {"images", "psnr"} <= set(page.missing()) and "differ in seed" in page.notes[0]
    page = reported(copy, *QUICK, "--full", str(home / "run" / "images-fp"))
    assert page.missing() == {}
    identity = json.loads((copy / "images-w4a8.identity.json").read_text())
    identity["files_sha256"]["quantized"] = "0" * 64
    (copy / "images-w4a8.identity.json").write_text(json.dumps(identity))
    page = reported(copy, *QUICK, "--full", str(home / "run" / "images-fp"))
    assert "another file" in page.notes[0]


@pytest.mark.slow
def test_folders_of_different_counts_have_no_common_fid(copy: Path) -> None:
    (copy / "images-w4a8" / png_name(0)).unlink()
    arguments = ["--run", str(copy), "--full", "images-fp", "--quantized", "images-w4a8"]
    with pytest.raises(RunError, match="1 images are in one of them alone"):
        compare.main(arguments)


@pytest.mark.slow
def test_an_older_configuration_is_told_not_guessed(copy: Path) -> None:
    path = copy / "config.yaml"
    path.write_text(path.read_text() + "novelty: 1\n")
    page = reported(copy)
    assert "novelty" in page.notes[0] and "novelty: 1" in page.text["config"]
    assert set(page.missing()) == {"eps", "ranges", "layers"}


@pytest.mark.slow
def test_text_of_the_run_is_not_markup(copy: Path) -> None:
    told = json.loads((copy / "report.json").read_text())
    (copy / "report.json").write_text(json.dumps(told | {"name": "<script>alert(1)</script>"}))
    page = reported(copy)
    assert "script" not in {tag for tag, _, _ in page.attributes} | set(page.open)
    assert "<script>" not in (copy / "report.html").read_text()


@pytest.mark.slow
@given(data=st.data())
@settings(
    max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)
@seed(1)
def test_a_changed_file_gives_a_page_or_one_line(worn: Path, data: st.DataObject) -> None:
    """Every JSON that the page is made of, with one value of another kind, or without it."""
    path = worn / data.draw(st.sampled_from(READ))
    before = {name: (worn / name).read_bytes() for name in READ}
    try:
        path.write_text(json.dumps(changed(json.loads(path.read_text()), data)))
        try:
            write_plainly(worn)
        except Exception as error:
            line = explain(error)
            assert line is not None and len(line.splitlines()) == 1, path.read_text()
            assert path.name in line
        else:
            assert set(Page(worn / "report.html").text) == SECTIONS
    finally:
        for name, content in before.items():
            (worn / name).write_bytes(content)


@pytest.mark.slow
@given(data=st.data())
@settings(
    max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)
@seed(2)
def test_compare_with_a_changed_report(worn: Path, data: st.DataObject) -> None:
    names = ["report.json", "images-fp.report.json", "images-w4a8.report.json"]
    path = worn / data.draw(st.sampled_from(names))
    before = path.read_bytes()
    try:
        path.write_text(json.dumps(changed(json.loads(before), data)))
        compare.main(["--run", str(worn), "--full", "images-fp", "--quantized", "images-w4a8"])
    except Exception as error:
        line = explain(error)
        assert line is not None and path.name in line, path.read_text()
    finally:
        path.write_bytes(before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "key", "value", "said"),
    [
        ("report.json", "size_mb", "1.3", 'size_mb is "1.3", not a number'),
        ("report.json", "layers", [{}], "layers[0].name is missing"),
        ("report.json", "seconds", float("nan"), "no JSON: NaN is not a number"),
        ("report.json", "activation_bits", None, "activation_bits is null, not a whole number"),
        ("comparison.json", "rows", {"a": 1}, "rows is an object, not a list"),
        (
            "images-fp.report.json",
            "images_per_second",
            "1",
            'images_per_second is "1", not a number',
        ),
        (FILE, "states", {"settings": {}}, "states.values is missing"),
    ],
)
def test_a_wrong_kind_is_named(copy: Path, name: str, key: str, value: object, said: str) -> None:
    told = json.loads((copy / name).read_text())
    (copy / name).write_text(json.dumps(told | {key: value}))
    page = copy / "report.html"
    page.unlink()
    line = refusal(forks.run(report.main, copy, *QUICK))
    assert f"{copy / name}: damaged ({said}" in line and not page.exists()


@pytest.mark.slow
def test_the_map_of_the_groups_as_a_file(home: Path) -> None:
    with Image.open(home / "figures" / "run-groups.png") as image:
        assert image.width > 300 and len(np.unique(np.asarray(image)[..., 0])) > 3


@pytest.mark.slow
def test_bad_input_is_refused_in_one_line(home: Path, tmp_path: Path, capsys) -> None:
    empty, damaged = tmp_path / "empty", tmp_path / "damaged"
    empty.mkdir()
    shutil.copytree(home / "run", damaged)
    with pytest.raises(report.RunError, match="give a run of calibrate.py"):
        report.main([str(empty)])
    data = bytearray((damaged / "quantized.safetensors").read_bytes())
    data[-100] ^= 1
    (damaged / "quantized.safetensors").write_bytes(data)
    assert "checksum" in refusal(forks.run(report.main, damaged, "--trajectories", 1))
    (damaged / "report.json").write_text("{")
    with pytest.raises(report.RunError, match="damaged"):
        report.main([str(damaged)])
    with pytest.raises(report.RunError, match="no such folder"):
        report.main([str(home / "run"), "--full", "nowhere"])
    with pytest.raises(SystemExit):
        report.main([str(home / "run"), "--trajectories", "-1"])
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (empty / "report.html").exists()


def test_sizes_and_times_are_told_as_people_read_them() -> None:
    told = [duration(seconds) for seconds in (0.04, 9.96, 42.4, 440, 4000, 9000, None)]
    assert told == ["0.04 s", "10 s", "42 s", "7.3 min", "66.7 min", "2.5 h", "unknown"]
    assert mebibytes(0.0549, 3) == "0.055 MiB" and mebibytes(None) == "unknown"
