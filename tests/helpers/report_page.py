"""A small run that is reported on, and what its page holds."""

import base64
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest
import torch

import calibrate
import sample_diffusion
from tests.helpers.commands import CONFIG, command, done
from tests.helpers.commands import QUICK as QUICK_CALIBRATION
from tinydm.models.ddim_unet import DDIMUNet
from tinydm.scripts import compare, report
from tinydm.scripts.reporting import figures

SECTIONS = {"summary", "images", "psnr", "eps", "groups", "ranges", "timesteps", "layers"}
SECTIONS |= {"size", "speed", "config", "versions"}
PARAMS = {"ch": 8, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [8]}
PARAMS |= {"image_size": 16, "norm_groups": 4}
QUICK = ["--trajectories", "2", "--states", "3"]
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


def write_home(folder: Path) -> Path:
    """Writes narrow.yaml, its checkpoint, and `run`: calibrated, sampled, compared and reported."""
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


def write_plainly(run: Path, *arguments: str) -> None:
    """A page whose figures are drawn, but neither laid out nor their letters outlined: faster."""
    subplots = figures.plt.subplots
    with pytest.MonkeyPatch.context() as patch, matplotlib.rc_context({"svg.fonttype": "none"}):
        patch.setattr(figures.plt, "subplots", lambda **given: subplots(figsize=given["figsize"]))
        report.main([str(run), *(arguments or QUICK)])


def reported(run: Path, *arguments: str) -> Page:
    write_plainly(run, *arguments)
    return Page(run / "report.html")
