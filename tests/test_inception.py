"""The Inception network: conversion, features, classifier, damaged weights, resizing."""

import json
import math

import pytest
import torch
from pytorch_fid import inception as fid_inception

from tests.helpers.images import load_folder, needs_package
from tinydm.scripts.common.errors import ConfigError, MetricError
from tinydm.scripts.experiment.devices import resolve_device
from tinydm.scripts.metrics import inception


def test_layer_names_cover_the_network():
    names = inception.layer_names()
    assert len(names) == len(set(names.values())) == 94
    assert names["mixed_6.conv"] == "Mixed_6d.branch1x1"
    assert names["mixed_7.tower_1.conv_4"] == "Mixed_6e.branch7x7dbl_5"


@pytest.mark.slow
@needs_package
def test_conversion_is_exact_and_marked(weights):
    record = json.loads(weights.with_suffix(".json").read_text())
    assert record["largest_relative_difference"] < 1e-4
    assert "absent" in record["classifier"]
    assert sorted(f.name for f in weights.parent.iterdir()) == sorted(
        [weights.name, weights.with_suffix(".json").name]
    )
    before = weights.stat().st_mtime_ns
    assert inception.prepare_inception(weights.parent) == weights
    assert weights.stat().st_mtime_ns == before


def test_the_weights_are_those_that_pytorch_fid_downloads() -> None:
    assert fid_inception.FID_WEIGHTS_URL == inception.WEIGHTS_URL


@pytest.mark.slow
@needs_package
def test_features_equal_pytorch_fid(weights, network, folders):
    images = torch.from_numpy(load_folder(folders[0])[:2]).permute(0, 3, 1, 2)
    theirs = inception._build(torch.load(weights, weights_only=True), resize=True)
    kept = []
    theirs.blocks[2][6].branch1x1.register_forward_hook(lambda *a: kept.append(a[2]))
    with torch.no_grad():
        pool = theirs(images.float() / 255)[0].flatten(1)
    found = network(images)
    assert found.pool.shape == (2, 2048)
    assert found.spatial.shape == (2, 7 * 17 * 17)
    spatial = kept[0][:, :7].flatten(1)
    assert (found.pool - pool).abs().max() < 1e-5 * pool.abs().max()
    assert (found.spatial - spatial).abs().max() < 1e-5 * spatial.abs().max()


@pytest.mark.slow
@needs_package
def test_classifier(weights, tmp_path, network):
    assert not network.has_classifier
    with pytest.raises(MetricError, match="classifier"):
        network.logits(torch.zeros(1, 2048))
    state = torch.load(weights, weights_only=True)
    state["fc.weight"][5, 9] = 2.0
    state["fc.bias"] += 100  # must not count
    torch.save(state, tmp_path / "official.pth")
    official = inception.InceptionFeatures(tmp_path / "official.pth", device="cpu")
    assert official.has_classifier
    logits = official.logits(torch.full((2, 2048), 3.0))
    assert logits.shape == (2, 1008)
    assert logits[1, 5] == 6 and logits.sum() == 12


@pytest.mark.slow
@needs_package
def test_damaged_weights_are_named(weights, tmp_path):
    cut = tmp_path / "cut.pth"
    cut.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(MetricError, match="cut.pth"):
        inception.InceptionFeatures(cut, device="cpu")
    torch.save({"a": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(MetricError, match="other.pth: not pytorch-fid"):
        inception.InceptionFeatures(tmp_path / "other.pth", device="cpu")
    state = torch.load(weights, weights_only=True)
    state["fc.weight"][3, 3] = math.nan
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(MetricError, match="nan.pth: weights are NaN or infinite"):
        inception.InceptionFeatures(tmp_path / "nan.pth", device="cpu")


def test_tf_resize_reads_without_half_pixel_centres():
    matrix = inception.tf_resize_matrix(4, 8)
    expected = torch.tensor([0, 0.5, 1, 1.5, 2, 2.5, 3, 3])  # the last one sticks to the edge
    torch.testing.assert_close(matrix @ torch.arange(4.0), expected)
    assert torch.equal(inception.tf_resize_matrix(299), torch.eye(299))
    assert torch.allclose(inception.tf_resize_matrix(500).sum(1), torch.ones(299))


def test_device_words():
    assert resolve_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="cuda"):
            resolve_device("cuda")
