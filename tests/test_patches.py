"""The prior of patches: what it learns from, what it sees, its file, and the reconstruction that uses it."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from mgdcr import reconstruct
from mgdcr.dataset import Intensity, intensity_of, side_of
from mgdcr.dicom import StudyError
from mgdcr.diffusion import REACH_MM, brought_to, expected, from_axis
from mgdcr.geometry import Grid
from mgdcr.patches import (AROUND, CENTRE, LEFT, TURNS, Context, PatchNet, PatchPrior, PatchRecipe, PatchStream, PatchValidation, Volumes, coded, context, decoded, left_over, load_patches,
                           load_volumes, save_patches, save_volumes, simulated_volumes, varied_protocol, volume_jobs)
from mgdcr.scanner import PROTOCOLS, phantom_study
from mgdcr.solvers import DataTerm
from mgdcr.training import begin, train
from mgdcr.unet3d import CropStream, VolumeRecipe


def small(seed=0):
    rng = np.random.default_rng(seed)
    near = np.zeros((2, 16, 50, 40), bool)
    near[:, 3:12, 10:40, 10:30] = True
    picture = lambda: rng.integers(0, 256, near.shape).astype(np.uint8)
    return Volumes(picture(), picture(), near, picture(), rng.integers(0, 120, (2, *near.shape[1:])).astype(np.uint8))


@pytest.fixture
def folder(tmp_path):
    for name in ("phantom-10000", "phantom-112"): save_volumes(tmp_path/f"{name}.npz", small())
    return tmp_path


def test_nobody_who_is_reported_is_learnt_from():
    names = volume_jobs(3, anatomies=2, tune=2)
    assert {side_of(name) for name in names} == {"train", "tune"} and "phantom-112" in names
    both = names.keys() & volume_jobs(3, anatomies=2, tune=2, round=2).keys()
    assert {side_of(name) for name in both} == {"tune"}  # a later round learns from other hearts


def test_plans_differ_and_half_are_the_yardstick():
    plans = [varied_protocol(np.random.default_rng(n)) for n in range(60)]
    assert 15 < sum(p.name == "yardstick-1" for p in plans) < 45
    assert len({p.sax_spacing_mm for p in plans}) > 3 and {len(p.views) for p in plans} >= {2, 3, 4} and all(p.views[0] == "sax" for p in plans)


def test_bytes_keep_what_lies_beyond_the_line():
    values = np.array([-20.0, 10.0, 110.0, 210.0, 260.0])
    assert np.allclose(decoded(coded(values, Intensity(10.0, 210.0)).astype(float)), (values - 110)/100, atol=0.01)


def test_beyond_the_border_the_border_goes_on():
    volume = np.arange(5*6*7.0).reshape(5, 6, 7)
    x = context(volume, np.zeros((2, 5, 6, 7)), np.zeros((5, 6, 7))).look(np.array([[4, 5, 6]]))[0]
    after = [n for n, (channel, *step) in enumerate(AROUND) if channel == 0 and min(step) >= 0 and n != CENTRE]
    assert len(after) > 10 and torch.all(x[after] == 0) and x[CENTRE] == 2.5*volume[4, 5, 6]


@pytest.mark.parametrize("n, axes, swapped", [(0, (), False), (1, (), True), (2, (2,), False), (4, (1,), False), (8, (0,), False), (15, (0, 1, 2), True)])
def test_a_turned_heart_looks_turned(n, axes, swapped):
    values = np.random.default_rng(0).normal(size=(5, 24, 36, 36)).astype(np.float32)
    here, one = np.array([[11, 17, 16]]), (1,)*5
    there = np.flip(values, [a + 1 for a in axes])
    at = np.where(np.isin(range(3), axes), np.array(values.shape[1:]) - 1 - here, here)
    if swapped: there, at = there.swapaxes(2, 3), at[:, [0, 2, 1]]
    assert torch.equal(Context(there, one, (0,)*5).look(at), Context(values, one, (0,)*5).look(here)[:, TURNS[n]])


def test_turned_bundles(folder):
    plain, all_turned = (PatchStream(PatchRecipe(str(folder), samples=16, varied=True, turned=share))[3] for share in (0.0, 1.0))
    assert torch.equal(plain["y"], all_turned["y"]) and torch.equal(plain["x"][:, CENTRE], all_turned["x"][:, CENTRE])
    assert any(torch.equal(plain["x"][:, turn], all_turned["x"]) for turn in TURNS)
    with pytest.raises(StudyError, match="no share"): PatchRecipe(str(folder), samples=16, turned=2.0)


def test_samples_depend_on_seed_and_number_alone(folder):
    recipe = PatchRecipe(str(folder), samples=16)
    one, other = PatchStream(recipe), PatchStream(recipe)
    for n in (5, 2, 9):
        a, b = one[n], other[n]
        assert all(torch.equal(v, b[k]) for k, v in a.items()) and a["x"].shape == (32, len(AROUND)) and a["y"].shape == (32,)
    assert set(one.subjects) == {"phantom-10000"} and set(PatchStream(recipe, "tune").subjects) == {"phantom-112"}
    with pytest.raises(StudyError, match="no volumes"): PatchStream(PatchRecipe(str(folder/"none"), samples=16))


def test_what_is_to_be_added_is_the_difference_from_the_truth(folder):
    stream = PatchStream(PatchRecipe(str(folder), samples=16, varied=False))
    where = np.array([[4, 20, 15], [7, 30, 28]])
    x, y = stream.sample(0, where)
    heart = small()
    assert torch.allclose(y, torch.as_tensor([(float(heart.truth[0][tuple(at)]) - float(heart.classical[0][tuple(at)]))/85 for at in where], dtype=torch.float32))
    assert torch.allclose(x[:, CENTRE], torch.as_tensor([2.5*decoded(float(heart.classical[0][tuple(at)])) for at in where], dtype=torch.float32), atol=1e-5)


def test_training_goes_on_and_its_file(folder):
    recipe = PatchRecipe(str(folder), samples=16, batch=8)
    run = train(recipe, folder/"run", folder/"log", "cpu")
    longer = train(PatchRecipe(str(folder), samples=32, batch=8), folder/"run", folder/"log", "cpu")
    assert run.step == 2 and longer.step == 4
    prior = longer.learnt()
    card = save_patches(prior, folder/"w.safetensors")
    around, where = PatchStream(recipe).hearts[0][0], np.argwhere(small().near[0])[:50]
    again = load_patches(str(folder/"w.safetensors"))
    assert card["kind"] == "patches" and all(torch.allclose(a, b, atol=0.01) for a, b in zip(again(around, where), prior(around, where)))
    assert begin(PatchRecipe(str(folder), samples=16, init=str(folder/"w.safetensors"))).started_from == card["samples"]
    with pytest.raises(StudyError, match="no prior of patches"): load_patches(_other(folder))
    with pytest.raises(StudyError, match="no patches 'x'"): load_patches("x")


def test_a_second_round_is_learnt_after_the_first(folder, tmp_path):
    first = train(PatchRecipe(str(folder), samples=32, batch=8), folder/"run", folder/"log", "cpu").learnt()
    save_patches(first, folder/"one.safetensors")
    later = tmp_path/"later"
    later.mkdir()
    for name in ("phantom-10000", "phantom-112"): save_volumes(later/f"{name}.npz", replace(small(1), round=2))
    recipe = PatchRecipe(str(later), samples=32, batch=8, round=2, init=str(folder/"one.safetensors"), lr=1e-2)
    start = begin(recipe)
    around, where = PatchStream(recipe).hearts[0][0], np.argwhere(small().near[0])[:50]
    assert start.started_from == 0 and not start.learnt()(around, where, 2)[0].any()  # nothing is added before something is learnt
    assert torch.equal(start.network.layers[0].weight, load_patches(str(folder/"one.safetensors")).networks[0].layers[0].weight)
    run = train(recipe, folder/"run2", folder/"log2", "cpu")
    card = save_patches(run.learnt(), folder/"two.safetensors")
    both = load_patches(str(folder/"two.safetensors"))
    assert card["rounds"] == len(both.networks) == 2 and PatchValidation(recipe)(both)[0]["what"] == "phantom"
    assert torch.allclose(both(around, where)[0], first(around, where)[0], atol=0.01) and both(around, where, 2)[0].abs().max() > 0
    assert [known["samples"] for known in both.cards()] == [32, 32] and both.before(2).cards() == load_patches(str(folder/"one.safetensors")).cards()
    assert begin(replace(recipe, init=str(folder/"two.safetensors"))).started_from == card["samples"]
    assert begin(replace(recipe, data=str(folder), init=str(folder/"two.safetensors"), round=1)).network.state_dict().keys() == first.networks[0].state_dict().keys()
    with pytest.raises(StudyError, match="was made for round 1"): PatchStream(replace(recipe, data=str(folder)))
    with pytest.raises(StudyError, match="was made for round 2"): CropStream(VolumeRecipe(str(later), samples=8))  # the 3D U-Net starts from tv
    with pytest.raises(StudyError, match="from 2 to 3"): begin(replace(recipe, init=str(folder/"two.safetensors"), round=4))
    with pytest.raises(StudyError, match="no earlier rounds"): PatchRecipe(str(later), samples=8, round=2)


def test_what_ships_is_known():
    from mgdcr.diffae import sha256_of, shipped, weights_folder
    rounds = {}
    for name in shipped("patches"):
        prior, path = load_patches(name), weights_folder()/f"{name}.safetensors"
        card = json.loads(path.with_suffix(".json").read_text())
        assert card["sha256"] == sha256_of(path) and card["bytes"] == path.stat().st_size and card["name"] == name
        assert all(known["subjects"] > 100 and known["validation"]["heart"]["gain"] > 0.5 for known in prior.cards())
        rounds[name] = len(prior.networks)
    assert rounds == dict(cine_patches=2)


def test_studies_for_a_second_round_show_what_the_first_expects():
    plan = replace(PROTOCOLS["yardstick-1"], sax_spacing_mm=20.0, views=("sax", "lax_4ch"))
    one, two = (simulated_volumes("phantom-112", 1, plan, round=n) for n in (1, 2))
    near, wrong = one.near, lambda volumes: float(np.square(volumes.classical[one.near]/85. - volumes.truth[one.near]/85.).mean())
    assert (one.round, two.round) == (1, 2) and np.array_equal(one.truth, two.truth) and np.array_equal(near, two.near)
    assert wrong(two) < 0.8*wrong(one) and np.abs(two.left[near] - 128.).mean() != np.abs(one.left[near] - 128.).mean()


def _other(folder):
    from mgdcr.diffae import weights_folder
    return weights_folder()/"cine128_labels.safetensors"


class Brighter(PatchNet):
    "Adds a tenth everywhere."
    def forward(self, x): return torch.full(x.shape[:-1], 0.1), torch.full(x.shape[:-1], -1.0)


class Told(PatchNet):
    "Adds what it is told that slices have left at the voxel itself."
    def forward(self, x): return x[:, HERE]/LEFT, torch.full(x.shape[:-1], -1.0)


HERE = int(np.flatnonzero((AROUND == (4, 0, 0, 0)).all(1))[0])  # of the channel "left"


@pytest.fixture(scope="module")
def blob():
    "A blob on a grid of 1.4 mm, and slices of something else."
    k, j, i = np.indices((24, 96, 140))
    volume = (100*np.exp(-((j - 48)**2 + (i - 70)**2)/300.)).astype(np.float32) + 5
    grid = Grid.centred((0, 0, 0), np.eye(3), volume.shape, 1.4)
    slices = phantom_study(103, sax_slices=3, shape=(56, 56), pixel_mm=3.0, acquired_mm=(3.0, 3.0), reference=False).slices("ED")
    return volume, slices, grid


def expect(networks, blob, **options):
    volume, slices, grid = blob
    return expected(PatchPrior(torch.nn.ModuleList(networks), {}), volume, DataTerm(slices, grid), slices.views, **options)


def test_what_the_prior_adds_goes_where_it_may_speak(blob):
    added, error = expect([Brighter(), Brighter()], blob)
    more, away = added[0]/(error/np.exp(-1.0)), from_axis(blob[2])
    assert added.shape == (2, *blob[0].shape) and np.allclose(more[:, away < REACH_MM[0]], 0.1, atol=1e-3) and not more[:, away >= REACH_MM[1]].any()


def test_where_the_prior_is_not_asked_the_usual_is_added(blob):
    only, usual = np.zeros(blob[0].shape, bool), np.random.default_rng(0).normal(size=(2, *blob[0].shape)).astype(np.float32)
    only[8:12, 40:50, 40:50] = True
    added, _ = expect([Brighter(), Brighter()], blob, only=only, usual=usual)
    assert np.array_equal(added[:, ~only], usual[:, ~only]) and np.ptp(added[:, only]) < 1e-5 and added[0, 9, 45, 45] > 1


class Here(PatchNet):
    "Adds more where it is bright."
    def forward(self, x): return 0.1*x[:, CENTRE].sigmoid(), torch.full(x.shape[:-1], -1.0)


def test_a_later_round_is_asked_where_the_last_one_has_added_most(blob):
    added, error = expect([Here(), Brighter()], blob)
    told = added[1] > 0
    asked = np.broadcast_to(from_axis(blob[2]) < REACH_MM[1], told.shape)
    bright = np.argsort(blob[0][asked])
    assert 0.45 < told[asked].mean() < 0.55 and told[asked][bright[-9999:]].all() and not told[asked][bright[:9999]].any() and np.ptp(error[asked]) == 0


def test_each_round_is_told_what_the_last_one_left(blob):
    volume, slices, grid = blob
    added, _ = expect([Told(), Told()], blob)
    data, line = DataTerm(slices, grid), intensity_of(volume)
    for n, before in enumerate((volume, volume + added[0])):
        unit = data.from_units(before)
        data.fit_gains(data.op.A(unit))
        left = np.clip(left_over(data, unit).numpy(), -0.128, 0.127)*(line.high - line.low)/2
        inside = np.broadcast_to(from_axis(grid) < REACH_MM[0], volume.shape)
        if n: inside = inside & (added[n] != 0)
        assert np.allclose(added[n][inside], left[inside], atol=1e-3) and abs(left[inside]).max() > 1 and inside.mean() > 0.2


def test_another_grid_sees_the_same_volume():
    fine, coarse = Grid.centred((3, 2, 1), np.eye(3), (20, 30, 40), 1.4), Grid.centred((3, 2, 1), np.eye(3), (10, 15, 20), 2.8)
    x, y, z = np.moveaxis(fine.points(), -1, 0)
    volume = 50 + x + 2*y - z
    again = brought_to(brought_to(volume, fine, coarse), coarse, fine)
    assert np.allclose(again[4:-4, 4:-4, 4:-4], volume[4:-4, 4:-4, 4:-4], atol=0.02) and abs(again - volume).max() < 10
    noise = np.random.default_rng(0).standard_normal(fine.shape)
    assert brought_to(noise, fine, coarse).std() < 0.6 and np.allclose(brought_to(noise, fine, fine), noise, atol=1e-5)


def test_reconstructing_with_another_prior(folder):
    save_patches(begin(PatchRecipe(samples=16)).learnt(), folder/"g.safetensors")
    study, told = phantom_study(103, sax_slices=6, shape=(56, 56), pixel_mm=3.0, acquired_mm=(3.0, 3.0)), []
    options = dict(prior=str(folder/"g.safetensors"), segmenter=None, align="none", spacing_mm=2.0, seed=3, raises=0)
    one, again = (reconstruct(study, "diffae", callback=told.append, **options) for _ in range(2))
    assert np.array_equal(one.volume, again.volume) and np.isfinite(one.volume).all()
    summary = one.summary()
    assert summary["prior"] == "cine_patches" and len(summary["prior_sha256"]) == 64 and summary["network_evaluations"] == np.ceil(len(one.volume)*2/1.4)
    assert "trust" in summary["parameters"] and any(record.get("share") == 1.0 for record in told)
    assert reconstruct(study, "tv", segmenter=None, align="none", spacing_mm=4.0, rounds=2).summary()["prior"] is None


def test_broken_files_are_refused(folder):
    good, bad = (folder/"phantom-10000.npz").read_bytes(), folder/"phantom-10001.npz"
    for data in (b"", good[:500], b"\xff"*99):
        bad.write_bytes(data)
        with pytest.raises(StudyError, match="phantom-10001.npz"): load_volumes(bad)
    np.savez(bad, **{name: np.zeros((1, 2, 3, 3)) for name in ("classical", "truth", "near", "left", "seen")})
    with pytest.raises(StudyError): load_volumes(bad)
