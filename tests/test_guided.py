"""The guided prior: what it learns from, and that it starts as the prior it was made from."""
import numpy as np
import pytest
import torch

from mgdcr import reconstruct
from mgdcr.dataset import side_of
from mgdcr.ddim import Schedule
from mgdcr.dicom import StudyError
from mgdcr.diffae import guided_start, load_prior, save_prior
from mgdcr.guided import (OFFSETS, GuidedRecipe, GuidedStream, Volumes, coded, decoded, guide_of, load_volumes, posterior_mean, save_volumes,
                          varied_protocol, volume_jobs)
from mgdcr.scanner import phantom_study
from mgdcr.training import begin, train


def small(seed=0):
    rng = np.random.default_rng(seed)
    near = np.zeros((2, 16, 128, 128), bool)
    near[:, 3:12, 40:90, 40:90] = True
    picture = lambda: rng.integers(0, 256, near.shape).astype(np.uint8)
    return Volumes(picture(), picture(), near, rng.integers(0, 120, (2, *near.shape[1:])).astype(np.uint8))


@pytest.fixture
def folder(tmp_path):
    for name in ("phantom-10000", "phantom-112"): save_volumes(tmp_path/f"{name}.npz", small())
    return tmp_path


def test_nobody_who_is_reported_is_learnt_from():
    names = volume_jobs(3, anatomies=2, tune=2)
    assert {side_of(name) for name in names} == {"train", "tune"} and "phantom-112" in names


def test_plans_differ_and_half_are_the_yardstick():
    plans = [varied_protocol(np.random.default_rng(n)) for n in range(60)]
    assert 15 < sum(p.name == "yardstick-1" for p in plans) < 45
    assert len({p.sax_spacing_mm for p in plans}) > 3 and {len(p.views) for p in plans} >= {2, 3, 4} and all(p.views[0] == "sax" for p in plans)


def test_bytes_keep_what_lies_beyond_the_line():
    from mgdcr.dataset import Intensity
    line = Intensity(10.0, 210.0)
    values = np.array([-20.0, 10.0, 110.0, 210.0, 260.0])
    assert np.allclose(decoded(coded(values, line)), (values - 110)/100, atol=0.01)


def test_the_guide_is_the_planes_around_and_where_they_were_measured():
    planes, seen = torch.arange(30.0)[:, None, None].expand(30, 4, 4), torch.ones(2, 30, 4, 4)*torch.tensor([0.5, 9.0])[:, None, None, None]
    guide = guide_of(planes, seen, [0, 15, 29])
    assert guide.shape == (3, 7, 4, 4) and guide[1, :5, 0, 0].tolist() == [15.0 + off for off in OFFSETS] and guide[0, 1, 0, 0] == 0 and guide[2, 4, 0, 0] == 29
    assert torch.equal(guide[:, 0, 0, 0], torch.tensor([0.0, 15.0, 29.0])) and guide[0, 5, 0, 0] == -0.5 and guide[0, 6, 0, 0] == 1


def test_samples_depend_on_seed_and_number_alone(folder):
    recipe = GuidedRecipe(str(folder), samples=16)
    one, other = GuidedStream(recipe), GuidedStream(recipe)
    for n in (5, 2, 9):
        a, b = one[n], other[n]
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(b[k])) for k, v in a.items())
        assert a["guide"].shape == (7, 128, 128) and 0.0999 <= a["weight"].min() < a["weight"].max() <= 1
    assert one.subjects == ["phantom-10000"] and GuidedStream(recipe, "tune").subjects == ["phantom-112"]
    with pytest.raises(StudyError, match="no volumes"): GuidedStream(GuidedRecipe(str(folder/"none"), samples=16))


def test_it_starts_from_the_classical_plane_with_the_priors_insides():
    plain, run = load_prior("cine128_compact", bf16=False), begin(GuidedRecipe(samples=16, precision="float32"))
    guide = torch.rand(2, 7, 128, 128, generator=torch.Generator().manual_seed(0))*2 - 1
    assert (posterior_mean(run.learnt(), guide) - guide[:, :1]).abs().max() < 0.05  # √ᾱ_T of the noise is left
    known, now = plain.network.state_dict(), run.network.state_dict()
    other = {k for k in known if now[k].shape != known[k].shape or not torch.equal(now[k], known[k])}
    assert other == {"input_blocks.0.0.weight", "out.2.weight", "out.2.bias"}
    with pytest.raises(StudyError, match="another network"): begin(GuidedRecipe(samples=16, init="cine128_compact_ddim"))


def test_the_start_is_the_part_of_v_that_the_classical_plane_answers():
    "With ε unknown, v = √ᾱ ε − √(1−ᾱ) x_0 leaves −√(1−ᾱ) x_0: at small t the guide says nothing about the noise."
    guide, schedule = torch.ones(3, 7, 2, 2), Schedule()
    start = guided_start(schedule, torch.tensor([0, 500, 999]), guide)[:, 0, 0, 0]
    assert torch.allclose(start, -(1 - schedule.alphas_cumprod[[0, 500, 999]]).sqrt().float()) and start[0] > -0.02 and start[2] < -0.999


def test_training_and_its_file(folder):
    recipe = GuidedRecipe(str(folder), samples=16, batch=8, precision="float32")
    run = train(recipe, folder/"run", folder/"log", "cpu")
    prior = run.learnt()
    card = save_prior(prior, folder/"w.safetensors")
    again = load_prior(str(folder/"w.safetensors"), bf16=False)
    guide = guide_of(torch.as_tensor(decoded(small().classical[0])), torch.zeros(2, 16, 128, 128))[:2]
    assert card["network"]["guide"] == 7 and torch.allclose(posterior_mean(again, guide), posterior_mean(prior, guide), atol=0.05)
    assert torch.allclose(posterior_mean(prior, guide, batch=1), posterior_mean(prior, guide, batch=2), atol=1e-4) and posterior_mean(prior, guide).shape == (2, 1, 128, 128)


def test_reconstructing_with_a_guided_prior(folder):
    save_prior(begin(GuidedRecipe(samples=16)).learnt(), folder/"g.safetensors")
    study, told = phantom_study(103), []
    with pytest.raises(StudyError, match="sees no classical volume"): reconstruct(study, "diffae", prior="cine128_compact", segmenter=None)
    with pytest.raises(StudyError, match="train_guided"): reconstruct(study, "diffae", segmenter=None)
    with pytest.raises(StudyError, match="uses no prior"): reconstruct(study, "tv", prior="cine128_compact", segmenter=None)
    options = dict(prior=str(folder/"g.safetensors"), segmenter=None, align="none", spacing_mm=2.0, draws=1, seed=3)
    one, again = (reconstruct(study, "diffae", callback=told.append, **options) for _ in range(2))
    assert np.array_equal(one.volume, again.volume) and np.isfinite(one.volume).all()
    summary = one.summary()
    assert summary["prior"] == "cine128_guided" and len(summary["prior_sha256"]) == 64 and summary["network_evaluations"] == 2*len(one.volume)
    assert summary["parameters"]["tau"] == 0.09 and any(record.get("stage") == "solve" for record in told)


def test_broken_files_are_refused(folder):
    good, bad = (folder/"phantom-10000.npz").read_bytes(), folder/"phantom-10001.npz"
    for data in (b"", good[:500], b"\xff"*99):
        bad.write_bytes(data)
        with pytest.raises(StudyError, match="phantom-10001.npz"): load_volumes(bad)
    np.savez(bad, classical=np.zeros((1, 2, 3, 3)), truth=np.zeros((1, 2, 3, 3)), near=np.zeros((1, 2, 3, 3), bool), seen=np.zeros((2, 2, 3, 3), np.uint8))
    with pytest.raises(StudyError): load_volumes(bad)
