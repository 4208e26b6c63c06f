"The simulated scanner: planes as a technologist lays them, poses and times that mean what they say, noise as asked for."
from dataclasses import replace

import numpy as np
import pytest
import torch

from mgdcr.dicom import CineSlice, StudyError
from mgdcr.geometry import Planes, apply_poses
from mgdcr.heart import digital_heart
from mgdcr.scanner import (GAIN, PROTOCOLS, Protocol, acquire, draw_protocol, heart_phase, phantom_study, plan, thin_plane,
                           training_planes, truth)
from mgdcr.study import Study, project_root
from mgdcr.views import recognise

SMALL = dict(shape=(56, 56), pixel_mm=3.0, acquired_mm=(3.0, 3.0))


@pytest.fixture(scope="module")
def heart():
    return digital_heart(7)


def recognised(study):
    "View by view, which views of the study the slices came from, with nothing but geometry and pictures to go by."
    slices = [CineSlice(v.images[s], v.affines[s], v.thickness_mm, v.acquired_mm, v.times[s], v.rr_ms[s], f"Se{n}.{s}", "", n)
              for n, v in enumerate(study.views.values()) for s in range(len(v.images))]
    names = list(study.views)
    return {view: {names[found.order] for found in members} for view, members in recognise(slices)[0].items()}


def test_seed_decides(heart):
    one, same, other = (phantom_study(seed, reference=False, heart=heart, **SMALL) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.sax.images, same.sax.images)
    np.testing.assert_array_equal(one.sax.affines, same.sax.affines)
    assert not np.array_equal(one.sax.affines, other.sax.affines)


@pytest.mark.parametrize("seed", [7, 8, 11, 15])
def test_views_of_digital_hearts_are_recognised(seed):
    study = phantom_study(seed, reference=False, frames=8, **SMALL)
    assert recognised(study) == {view: {view} for view in study.views}


@pytest.mark.parametrize("number", [1, 5, 9])
def test_views_of_real_anatomies_are_recognised(number):
    if not (project_root() / "../shared/data/hearts").is_dir(): pytest.skip("no ../shared/data/hearts")
    from mgdcr.label_heart import label_heart
    study = phantom_study(number, reference=False, heart=label_heart(f"heart-{number:02d}"), **SMALL)
    assert recognised(study) == {view: {view} for view in study.views}


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_stack_covers_the_ventricle(name, heart):
    at = heart.landmarks(0.0)
    axis = at["apex"] - at["mitral"]
    for seed in range(8):
        protocol = draw_protocol(name, np.random.default_rng(seed))
        centres = Planes(plan(heart, protocol, np.random.default_rng(seed))["sax"], protocol.shape, np.ones(1), np.ones((1, 2))).centres
        s, step = (centres - at["mitral"]) @ axis / (axis @ axis), protocol.sax_spacing_mm / np.linalg.norm(axis)
        assert s[0] < 0.15 and s[-1] > 1 - 0.55 * step and (np.diff(s) > 0.95 * step).all(), "base first, one step apart"


def test_unknown_protocol_is_refused():
    with pytest.raises(StudyError, match="yardstick-1"): phantom_study(1, "siemens")


def test_poses_lead_to_where_pictures_were_taken(heart):
    study = phantom_study(5, snr=1e9, tilts_deg=2.0, heart=heart, spacing_mm=3.0, **SMALL)
    protocol = replace(PROTOCOLS["yardstick-1"], **SMALL)
    n, view = len(study.sax.images), study.sax
    planes = Planes(view.affines, SMALL["shape"], np.full(n, 8.0), np.full((n, 2), 3.0))
    poses = study.reference_poses["sax"]
    assert 0.5 < poses[:, :3].std() < 4 and 0.5 < poses[:, 3:].std() < 4
    again = GAIN * acquire(heart, apply_poses(planes, poses).affines, 0.0, protocol, 8.0).numpy()
    header = GAIN * acquire(heart, planes.affines, 0.0, protocol, 8.0).numpy()
    alike = lambda a: np.mean([np.corrcoef(x.ravel(), y.ravel())[0, 1] for x, y in zip(a, view.images[:, 0])])
    assert alike(again) > 0.995 > alike(header)


def test_slices_of_one_phase_differ_in_time_not_in_anatomy(heart):
    "Long and short beats of one heart show the same moment at their own times."
    times = [np.interp(heart.es_phase, heart_phase(np.arange(rr), rr, heart), np.arange(rr)) for rr in (700, 900, 1100)]
    steps = np.diff(times) / 200
    np.testing.assert_allclose(steps, 0.15, atol=0.01)


def test_noise_grows_away_from_the_heart_and_is_as_asked_at_it(heart):
    quiet, loud = (phantom_study(3, reference=False, heart=heart, snr=snr, shifts_mm=0.0, **SMALL).sax.images[:, 0]
                   for snr in (1e9, 20))
    blood = (quiet > 0.85 * GAIN)[:, 20:36, 20:36]
    assert abs((loud - quiet)[:, 20:36, 20:36][blood].std() * 20 / GAIN - 1) < 0.15


def test_truth_is_the_thin_heart(heart):
    study = phantom_study(4, heart=heart, spacing_mm=2.8, **SMALL)
    lv, wall = (np.median(study.reference[study.reference_labels == n]) for n in (3, 2))
    assert 0.9 * GAIN < lv < 1.1 * GAIN and 0.2 * GAIN < wall < 0.45 * GAIN
    pair = next(training_planes(heart, replace(PROTOCOLS["yardstick-1"], **SMALL), np.random.default_rng(0)))
    grid = thin_plane(pair.thin[1], replace(PROTOCOLS["yardstick-1"], **SMALL))
    np.testing.assert_allclose(pair.thin[0], GAIN * truth(heart, grid, PROTOCOLS["yardstick-1"].look)[0], atol=1e-3)
    assert pair.view == "sax" and -0.2 < pair.s < 0.2 and pair.acquired[0].shape == (56, 56)


def test_study_survives_its_folder(heart, tmp_path):
    study = phantom_study(6, "ukbb", frames=3, heart=heart, spacing_mm=3.0, sax_slices=4, **SMALL)
    again = Study.load(study.save(tmp_path / "made"))
    assert list(again.views) == list(study.views) and again.es_frame == study.es_frame
    np.testing.assert_allclose(again.sax.images, study.sax.images, atol=0.51)
    np.testing.assert_allclose(again.sax.rr_ms, study.sax.rr_ms)
    np.testing.assert_allclose(again.reference, study.reference, rtol=1e-3, atol=0.5)
    np.testing.assert_allclose(again.reference_poses["sax"], study.reference_poses["sax"], atol=1e-3)
    np.testing.assert_array_equal(again.reference_labels, study.reference_labels)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_sees_the_same(heart):
    protocol = replace(PROTOCOLS["yardstick-1"], **SMALL)
    affines = plan(heart, protocol, np.random.default_rng(0))["sax"][:2]
    a, b = (acquire(heart, affines, 0.0, protocol, 8.0, device=d).cpu() for d in ("cpu", "cuda"))
    assert (a - b).abs().max() < 1e-3


def test_yardstick_is_frozen():
    "Results are compared across versions on this preset: neither its protocol nor the hearts it shows may drift."
    p = PROTOCOLS["yardstick-1"]
    assert p == Protocol(name="yardstick-1", field_T=1.5, flip_deg=60.0, tr_ms=3.0, te_ms=1.5, pixel_mm=1.4, acquired_mm=(1.4, 1.4),
                         shape=(128, 128), sax_thickness_mm=8.0, sax_spacing_mm=10.0, sax_slices=None, lax_thickness_mm=6.0,
                         views=("sax", "lax_2ch", "lax_3ch", "lax_4ch"), snr=30.0, apodisation=0.3, shading=0.0, flow=0.35,
                         swirl=0.0, rv_blood=0.97, texture=0.05, planning_deg=3.0, planning_mm=3.0, shifts_mm=2.0,
                         tilts_deg=0.0, rr_sd=0.04)
    study = phantom_study(200)
    facts = [len(study.sax.images), *study.reference.shape, *np.bincount(study.reference_labels.ravel())[1:]]
    np.testing.assert_allclose(facts, [11, 85, 128, 128, 37083, 31993, 63297], atol=3)   # voxels; rounding may turn one over
    means = [view.images.mean() for view in study.views.values()] + [study.reference.mean()]
    np.testing.assert_allclose(means, [121.79, 157.4, 151.23, 154.25, 118.84], rtol=1e-3)
