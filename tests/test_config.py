"""The configuration: what is read, what is refused, and with which line."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import calibrate
import sample_diffusion
from tests.helpers.commands import ROOT
from tinydm.quant.core.settings import preset
from tinydm.scripts import configuration_reference
from tinydm.scripts.common import files, schema
from tinydm.scripts.common.errors import ConfigError
from tinydm.scripts.common.schema import read_yaml
from tinydm.scripts.experiment import cli
from tinydm.scripts.experiment.assembly import unread_note
from tinydm.scripts.experiment.config import load_config, parse_config, resolved_yaml

TEXT = """\
name: small
model:
  arch: ddim_unet
  checkpoint: small.pt
  params: {ch: 8, ch_mult: [1, 2], num_res_blocks: 1}
sampler:
  name: ddim
  steps: 10
  eta: 0
quant:
  weight: {bits: 4}
sampling: {count: 4, classes: null}
"""


def error_of(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "x.yaml", overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configurations_load_and_resolve(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert parse_config(resolved_yaml(config), "resolved") == config


def test_values_and_defaults() -> None:
    config = parse_config(TEXT, "x.yaml")
    assert config.sampler.steps == 10
    assert config.sampler.eta == 0.0 and isinstance(config.sampler.eta, float)
    assert config.schedule.train_timesteps == 1000
    assert config.sampling.micro_batch == 16
    quant, calibration = preset("tinydm")
    assert config.quant == quant and config.calibration == calibration


def test_a_method_changes_defaults_only() -> None:
    quant, calibration = preset("minmax")
    config = parse_config(TEXT, "x.yaml", ["quant.method=minmax", "quant.activation.bits=6"])
    assert config.quant == replace(quant, activation=replace(quant.activation, bits=6))
    assert config.calibration == calibration


def test_quality_changes_how_long_a_method_learns() -> None:
    for method, fast, best in (("tinydm", (0, 500), (0, 4000)), ("ptqd", (200, 0), (1600, 0))):
        keys = [f"quant.method={method}", "quant.quality=best"]
        for order, expected in ((keys[:1], fast), (keys, best), (keys[::-1], best)):
            learn = parse_config(TEXT, "x", order).quant.reconstruct
            assert (learn.iterations, learn.finetune_iterations) == expected
    config = parse_config(TEXT, "x", ["quant.quality=best", "quant.reconstruct.iterations=3"])
    assert config.quant.reconstruct.iterations == 3  # what is written stands
    with pytest.raises(ConfigError, match="quant.quality"):
        parse_config(TEXT, "x", ["quant.quality=better"])


def test_end_to_end_steps_of_a_file_are_those_of_its_method() -> None:
    """Else the baselines would be trained by the key that a file of tinyDM has."""
    learned = "  reconstruct: {finetune_iterations: 250, batch_size: 8}\n"
    text = TEXT.replace("sampling:", f"{learned}sampling:")
    assert parse_config(text, "x").quant.reconstruct.finetune_iterations == 250
    for method in ("minmax", "ptq4dm", "qdiffusion", "ptqd"):
        found = parse_config(text, "x", [f"quant.method={method}"]).quant.reconstruct
        assert (found.finetune_iterations, found.batch_size) == (0, 8)
        steps = "quant.reconstruct.finetune_iterations=7"
        for order in ([f"quant.method={method}", steps], [steps, f"quant.method={method}"]):
            assert parse_config(text, "x", order).quant.reconstruct.finetune_iterations == 7
    control = parse_config(text, "x", ["quant.method=e2e"]).quant  # has as many as tinyDM
    assert control.reconstruct == parse_config(text, "x").quant.reconstruct
    own = text.replace("quant:", "quant:\n  method: ptqd")
    assert parse_config(own, "x").quant.reconstruct.finetune_iterations == 250
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        assert load_config(path, ["quant.method=ptqd"]).quant.reconstruct.finetune_iterations == 0


def test_ptq4dm_learns_its_rounding_below_8_bits() -> None:
    for bits, expected in ((8, "nearest"), (6, "adaround"), (4, "adaround")):
        overrides = ["quant.method=ptq4dm", f"quant.weight.bits={bits}"]
        config = parse_config(TEXT, "x.yaml", overrides)
        assert config.quant.weight.rounding == expected and not config.quant.activation.learned
        assert parse_config(resolved_yaml(config), "again.yaml") == config
    given = parse_config(TEXT, "x.yaml", [*overrides, "quant.weight.rounding=nearest"])
    assert given.quant.weight.rounding == "nearest"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ch: 8", "chh: 8", "x.yaml:5: unknown key model.params.chh (did you mean ch?)"),
        ("steps: 10", "stps: 10", "x.yaml:8: unknown key sampler.stps (did you mean steps?)"),
        ("steps: 10", "steps: ten", "x.yaml:8: sampler.steps must be a whole number, is 'ten'"),
        ("steps: 10", "steps: true", "x.yaml:8: sampler.steps must be a whole number, is true"),
        ("steps: 10", "steps: 1.5", "x.yaml:8: sampler.steps must be a whole number, is 1.5"),
        ("steps: 10", "steps: 2000", "x.yaml:8: sampler.steps must be within 1..1000, is 2000"),
        ("steps: 10", "steps: 0", "x.yaml:8: sampler.steps must be within 1..100000, is 0"),
        ("eta: 0", "eta: .nan", "x.yaml:9: sampler.eta must be a number, is .nan"),
        ("eta: 0", f"eta: {'9' * 400}", "is too large a number"),
        ("eta: 0", f"eta: {'1:' * 300}1.5", "x.yaml:9: sampler.eta must be a number, is '1:1:1:"),
        ("ch: 8", f"ch: -{'9' * 400}", "x.yaml:5: -9999"),
        ("eta: 0", "eta: 1.5", "x.yaml:9: sampler.eta must be within 0.0..1.0, is 1.5"),
        ("bits: 4", "bits: 9", "x.yaml:11: quant.weight.bits must be within 2..8, is 9"),
        ("bits: 4", "bits: 1", "x.yaml:11: quant.weight.bits must be within 2..8, is 1"),
        ("[1, 2]", "[1, b]", "x.yaml:5: model.params.ch_mult[1] must be a whole number, is 'b'"),
        (
            "{ch: 8,",
            "{in_channels: 6, ch: 8,",
            "out_ch is 3; ddim takes 6 of a",
        ),
        ("{ch: 8,", "{out_ch: 6, ch: 8,", "out_ch is 6; ddim takes 3 of a"),
        ("{ch: 8,", "{image_size: 31, ch: 8,", "model.params.image_size must be a multiple of 2"),
        ("[1, 2]", "2", "x.yaml:5: model.params.ch_mult must be a list of whole numbers, is 2"),
        ("classes: null", "classes: [1]", "x.yaml:12: sampling.classes is for class-conditional"),
        ("  arch: ddim_unet\n", "", "x.yaml:2: missing key model.arch"),
        ("name: small\n", "", "x.yaml: missing key name"),
        ("ddim_unet", "ddim_unte", "model.arch is 'ddim_unte', which is unknown (did you mean"),
        ("name: ddim\n", "name: ddmi\n", "x.yaml:7: sampler.name is 'ddmi', which is unknown"),
        ("name: ddim\n", "name: guided_ddpm\n", "sampler.name guided_ddpm does not fit ddim_unet"),
        ("name: ddim\n", "name: ddpm\n", None),
        ("eta: 0", "eta: 0.5", None),
        ("  arch: ddim", "  scale_factor: 0.18\n  arch: ddim", "it needs model.first_stage"),
        ("steps: 10", "steps: 10\n  steps: 11", "x.yaml:9: key sampler.steps is there twice"),
        ("quant:", "quant: &q", None),
        ("weight: {bits: 4}", "<<: *q", "x.yaml:11: not YAML: aliases are not supported"),
        ("steps: 10", "steps: [10", "not YAML"),
        ("name: small", "name: !!python/name:os.system x", "x.yaml:1: values of type"),
    ],
)
def test_refused(old: str, new: str, message: str | None) -> None:
    text = TEXT.replace(old, new, 1)
    assert text != TEXT
    if message is None:
        parse_config(text, "x.yaml")
    else:
        assert message in error_of(text)


@pytest.mark.parametrize("text", ["", "- a", "a", "[" * 5000, "a: \0", "? [1]\n: 2", "{1: 2}"])
def test_not_a_configuration(text: str) -> None:
    error_of(text)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("sampler.steps", "--set sampler.steps: must be key.sub=value"),
        ("=3", "--set =3: must be key.sub=value"),
        ("sampler.stps=3", "--set sampler.stps: unknown key sampler.stps (did you mean steps?)"),
        ("smpler.steps=3", "--set smpler.steps: unknown key smpler (did you mean sampler?)"),
        ("quant.weight.bits=9", "--set quant.weight.bits: quant.weight.bits must be within 2..8"),
        ("quant.method=mnmax", "--set quant.method: quant.method is 'mnmax'"),
        ("quant.time_embedding=reconstructed", "needs quant.reconstruct.iterations above 0"),
        ("name.x=1", "--set name.x: name is not a section"),
        ("sampling=3", "--set sampling: sampling must be a section, is 3"),
        ("sampler={stps: 3}", "--set sampler: unknown key sampler.stps"),
        ("sampler.steps=[1", "not YAML"),
        ("sampler={name: ddpm, eta: 0.5}", "sampler.eta is of DDIM; ddpm is always as eta 1"),
    ],
)
def test_refused_overrides(pair: str, message: str) -> None:
    assert message in error_of(TEXT, pair)


def test_clipping_that_a_sampler_never_does_is_refused_where_it_is_asked_for() -> None:
    """In a file it may be of the sampler that the command line has replaced."""
    written = TEXT.replace("eta: 0", "clip_denoised: true")
    parse_config(written, "x.yaml", ["sampler.name=plms"])
    told = error_of(TEXT, "sampler.name=plms", "sampler.clip_denoised=true")
    assert "--set sampler.clip_denoised: sampler.clip_denoised is not for plms" in told


def test_overrides_are_yaml_and_the_last_wins() -> None:
    pairs = ["sampler.steps=5", "sampler={name: ddpm, steps: 7}", "schedule.beta_start=1e-4"]
    config = parse_config(TEXT, "x.yaml", [*pairs, "sampler.steps=9"])
    assert (config.sampler.name, config.sampler.steps, config.sampler.eta) == ("ddpm", 9, 0.0)
    assert config.schedule.beta_start == 1e-4


def test_checkpoint_beside_the_file_and_of_the_command_line(tmp_path: Path, monkeypatch) -> None:
    folder, elsewhere = tmp_path / "configs", tmp_path / "elsewhere"
    for place in (folder, elsewhere):
        place.mkdir()
        (place / "small.pt").touch()
    (folder / "x.yaml").write_text(TEXT)
    monkeypatch.chdir(elsewhere)
    assert load_config(folder / "x.yaml").model.checkpoint == str(folder / "small.pt")
    config = load_config(folder / "x.yaml", ["model.checkpoint=small.pt"])
    assert config.model.checkpoint == str(elsewhere / "small.pt")
    assert load_config(folder / "x.yaml", ["model.checkpoint=a.pt"]).model.checkpoint == "a.pt"
    inside = load_config(ROOT / "configs/emoji32.yaml").model.checkpoint
    assert inside == "models/pretrained/emoji32.pt"


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_unreadable_file(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


def test_reading_a_configuration_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of another kind may hold millions of values, each of which takes a while."""
    monkeypatch.setattr(schema, "MOST_VALUES", 50)
    numbers = ", ".join(["1"] * 50)
    assert "not YAML: more than 50 values" in error_of(TEXT, f"sampling.classes=[{numbers}]")
    monkeypatch.setattr(files, "LARGEST_TEXT", 1 << 20)
    with open(tmp_path / "x.yaml", "w") as file:
        file.write(TEXT)
        file.truncate((1 << 20) + 1)
    with pytest.raises(ConfigError, match=r"x.yaml: cannot be read \(larger than 1 MiB\)"):
        load_config(tmp_path / "x.yaml")


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(TEXT)), st.integers(0, 6), st.text(max_size=6))
def test_mutated_text_gives_a_configuration_or_one_line(start: int, cut: int, text: str) -> None:
    mutated = TEXT[:start] + text + TEXT[start + cut :]
    try:
        parse_config(mutated, "x.yaml")
    except ConfigError as error:
        assert "\n" not in str(error)


def is_exponent(text: str) -> bool:
    """A number such as 1e-4, which YAML 1.1 takes for text and the configuration does not."""
    return re.fullmatch(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+", text) is not None


TEXTS = st.text().filter(lambda text: not is_exponent(text))


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(1 - 2**63, 2**63 - 1)
        | st.floats(allow_nan=False)
        | TEXTS,
        lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner),
    )
)
def test_strict_reading_agrees_with_yaml(value) -> None:
    """But for numbers with an exponent: test_exponents_are_numbers."""
    text = yaml.safe_dump({"value": value}, allow_unicode=True)
    if "&id" not in text:  # yaml writes equal objects as aliases
        assert read_yaml(text, "x").values == yaml.safe_load(text)


@pytest.mark.parametrize("text", ["1e-4", "0E0", "-2.5e3", "+3.e2"])
def test_exponents_are_numbers(text: str) -> None:
    assert is_exponent(text) and read_yaml(f"value: {text}", "x").values == {"value": float(text)}
    assert read_yaml(f"value: '{text}'", "x").values == {"value": text}


def test_removed_keys_are_forgotten_where_they_were_off() -> None:
    """A quantized file of an earlier version holds them all, at their defaults."""
    text = (ROOT / "configs/emoji32.yaml").read_text()
    off = "\n  reconstruct: {mixed_inputs: false, progressive: false, run_share: 0.1}\n"
    old = text.replace("activation: {bits: 8}", "activation: {bits: 8, step_bits: []}" + off)
    assert old != text
    assert parse_config(old, "x.yaml") == parse_config(text, "x.yaml")
    renamed = text.replace("samples: 2048", "samples: 2048, bins: 9")
    assert parse_config(renamed, "x.yaml").calibration.calibrated_timesteps == 9
    with pytest.raises(ConfigError, match="calibration.bins is called calibration.calibrated_tim"):
        parse_config(text, "x.yaml", ["calibration.bins=9"])
    with pytest.raises(ConfigError, match="x.yaml:2[12]: quant.activation.step_bits was removed"):
        parse_config(old.replace("step_bits: []", "step_bits: [4]"), "x.yaml")
    with pytest.raises(ConfigError, match="--set quant.reconstruct.progressive: .* was removed"):
        parse_config(text, "x.yaml", ["quant.reconstruct.progressive=false"])


def test_the_page_of_all_keys_is_current() -> None:
    page = configuration_reference.PAGE.read_text(encoding="utf-8")
    assert page == configuration_reference.page(), "python scripts/configuration_reference.py"


def test_the_method_has_a_short_form() -> None:
    parser = cli.make_parser("")
    cli.add_config(parser)
    args = parser.parse_args(["--config", "x.yaml", "--method", "ptqd"])
    assert parse_config(TEXT, "x.yaml", args.overrides).quant.method == "ptqd"
    args = parser.parse_args(["--config", "x.yaml", "--method", "gptq"])
    with pytest.raises(ConfigError, match="--method: quant.method is 'gptq', which is unknown"):
        parse_config(TEXT, "x.yaml", args.overrides)


@pytest.mark.parametrize("word", ["--config=--", "--set=--", "-c--", "--device=--", "--classes=--"])
def test_two_dashes_are_no_value(word: str, capsys: pytest.CaptureFixture) -> None:
    """argparse makes an empty list of them, which no option expects."""
    with pytest.raises(SystemExit) as ended:
        sample_diffusion.parse_arguments(["--out", "x", word])
    assert ended.value.code == 2 and f"error: {word}: '--' is no value" in capsys.readouterr().err


def test_keys_of_calibrations_are_noted_where_images_are_made() -> None:
    args = sample_diffusion.parse_arguments(
        ["--out", "x", "--wq", "8", "--set", "calibration.seed=1", "model.bundle=true", "name=x"]
    )
    notes = sample_diffusion.idle_notes(args.overrides)
    assert [note.split()[1] for note in notes] == ["quant.*", "calibration.*", "model.bundle"]


def test_a_checkpoint_that_is_not_read_is_noted() -> None:
    """Whatever it names, where a quantized file holds all that is needed."""
    args = sample_diffusion.parse_arguments(["--out", "x", "--ckpt", "/no/such/file"])
    note = unread_note(args.overrides, {"quantized": "0"})
    assert note is not None and "model.checkpoint was not read" in note
    assert unread_note(args.overrides, {"quantized": "0", "checkpoint": "1"}) is None
    assert unread_note(["name=x"], {"quantized": "0"}) is None


def test_help_leaves_out_what_changes_nothing(capsys: pytest.CaptureFixture) -> None:
    """Sampling accepts the options of calibration, so that one line of them serves both."""
    told = {}
    for command in (calibrate, sample_diffusion):
        with pytest.raises(SystemExit):
            command.parse_arguments(["--help"])
        told[command] = capsys.readouterr().out
    assert "--method" in told[calibrate] and "--weight_bit" in told[calibrate]
    assert "--method" not in told[sample_diffusion] and "--act_bit" not in told[sample_diffusion]
    args = sample_diffusion.parse_arguments(["--out", "x", "--method", "ptqd", "--wq", "8"])
    assert [override.key for override in args.overrides] == ["quant.method", "quant.weight.bits"]


def test_the_mark_at_the_beginning_of_a_file_is_no_text(tmp_path: Path) -> None:
    """Some editors write one before the first prompt, which would be another prompt with it."""
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfa cat\r\n\r\n  a dog \r\n")
    assert yaml.safe_load(cli.lines_of(str(tmp_path / "prompts.txt"))) == ["a cat", "a dog"]
