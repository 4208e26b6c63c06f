"The digital heart: the same everywhere and for ever, whole where it is asked only in part, and moving as a heart does."
from dataclasses import replace

import numpy as np
import pytest
import torch

from mgdcr import heart as module
from mgdcr.dicom import StudyError
from mgdcr.heart import Look, digital_heart, integrate, ventricles
from mgdcr.population import CONDITIONS, draw

N = 60_000


def points_of(heart, n=N, size=230.0, seed=0):
    "Points (n, 3) in a cube about the heart, mm RAS."
    cube = torch.rand(n, 3, generator=torch.Generator().manual_seed(seed)) - 0.5
    return torch.as_tensor(heart.base_mm, dtype=torch.float32) + size * cube


@pytest.fixture(scope="module")
def hearts():
    return {c: digital_heart(7, c) for c in CONDITIONS}


def test_a_seed_is_the_same_person_everywhere():
    "Six significant digits, drawn with nothing but sums and products of uniform numbers: no machine rounds them otherwise."
    p = draw(7)
    assert (p.condition, p.sex, p.age) == ("dilated", "F", 63) and draw(7) == p != draw(8)
    assert (p.edv_ml, p.esv_ml, p.mass_g, p.rv_edv_ml) == (204.807, 145.824, 89.6072, 138.539)


def test_asking_in_part_gives_the_whole(hearts, monkeypatch):
    "Parts of the world are only asked about points that may lie in them: the picture must be as if all were asked about all."
    plain, cases = Look(texture=0.0), [(h, f, points_of(h)) for h in hearts.values() for f in (0.0, h.es_phase)]
    parts = [h.intensity(points, f, plain) for h, f, points in cases]
    everywhere = lambda x: torch.ones_like(x[0], dtype=torch.bool)
    monkeypatch.setattr(module, "in_reach", lambda heart, x, m, where: everywhere(x))
    monkeypatch.setattr(module, "high_up", lambda x, m, where: everywhere(x))
    for (h, f, points), part in zip(cases, parts):
        torch.testing.assert_close(h.intensity(points, f, plain), part, atol=1e-5, rtol=0)


@pytest.mark.parametrize("how", ["one rounding away", "few at a time", "on one thread"])
def test_rounding_and_processor_hardly_matter(hearts, monkeypatch, how):
    "What another machine may do differently: labels differ in less than 1e-5 of the voxels, images by less than 1e-4."
    h, threads = hearts["healthy"], torch.get_num_threads()
    points = points_of(h, 400_000, 160.0)
    labels, image, other = h.labels(points), h.intensity(points), points
    if how == "one rounding away": other = torch.nextafter(points, points + 1)
    if how == "few at a time": monkeypatch.setattr(module, "CHUNK", 777)
    if how == "on one thread": torch.set_num_threads(1)
    try:
        assert (h.labels(other) != labels).float().mean() < 1e-5
        assert (h.intensity(other) - image).abs().max() < 1e-4
    finally: torch.set_num_threads(threads)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_gives_the_same(hearts):
    h = hearts["healthy"]
    points = points_of(h, 400_000, 160.0)
    assert (h.labels(points.cuda()).cpu() != h.labels(points)).float().mean() < 1e-5
    assert (h.intensity(points.cuda()).cpu() - h.intensity(points)).abs().max() < 1e-4


def test_no_right_ventricle_on_the_lateral_wall(hearts):
    "Where the RV's ellipse dips below the epicardium of the LV there is no RV, not even a film."
    for h in hearts.values():
        points = points_of(h, 300_000, 160.0)
        u, v, w = h.local(points)
        assert not ((h.labels(points) == 1) & (u > 0.6 * h.shape.endo_mm) & (v < 0.5 * h.shape.endo_mm)).any()


def test_volumes_do_not_depend_on_the_lattice(hearts):
    h = hearts["healthy"]
    for phase in (0.0, h.es_phase):
        coarse, fine = h.volumes(phase), h.volumes(phase, step=0.7)
        assert all(abs(coarse[n] / fine[n] - 1) < 2e-3 for n in fine)


def test_muscle_is_kept_and_chambers_fill_in_antiphase(hearts):
    for condition, h in hearts.items():
        phases = np.linspace(0, 1, 13)
        beat = [integrate(h, h.moment(f), 2.0) for f in phases]
        lv, rv, mass = (np.array([b[n] for b in beat]) for n in ("lv_ml", "rv_ml", "mass_g"))
        la = np.array([np.prod(h.places(h.moment(f)).la_size) for f in phases])
        assert np.ptp(mass) < 0.03 * mass.mean(), condition
        assert lv[0] == pytest.approx(lv[-1]) and rv[0] == pytest.approx(rv[-1]), "the beat is periodic"
        assert np.corrcoef(lv, rv)[0, 1] > 0.95 and np.corrcoef(lv, la)[0, 1] < -0.9, condition
        assert abs(phases[lv.argmin()] - h.es_phase) < 0.1


def test_motion_is_smooth_in_time(hearts):
    "No phase at which anything jumps: the change over a hundredth of a beat is nowhere much larger than over its neighbours."
    h = hearts["healthy"]
    curve = np.array([[*h.places(h.moment(f)).mitral, *h.places(h.moment(f)).tricuspid, h.moment(f).squeeze]
                      for f in np.linspace(0, 1, 401)])
    acceleration = np.abs(np.diff(curve, 2, axis=0)).max(0) / np.maximum(np.ptp(curve, axis=0), 1e-9)
    assert acceleration.max() < 0.004


def test_apex_is_nearly_still_and_the_base_descends(hearts):
    for h in hearts.values():
        rest, squeezed = h.landmarks(0.0), h.landmarks(h.es_phase)
        move = {n: np.linalg.norm(squeezed[n] - rest[n]) for n in rest}
        assert move["apex"] < 2 < move["mitral"] and move["mitral"] == pytest.approx(h.parameters.mapse_mm, rel=0.15)
        assert move["rv_free"] == pytest.approx(h.parameters.tapse_mm, rel=0.15)


def test_an_infarct_does_not_move(hearts):
    "The endocardium comes in by less than a third of what it does on the other side."
    h = hearts["infarct"]
    p = h.parameters
    a = np.deg2rad([p.infarct_angle_deg, p.infarct_angle_deg + 180])
    spots = torch.tensor(np.stack([np.cos(a), np.sin(a), 0 * a], -1), dtype=torch.float32) * 10
    radii = []
    for phase in (0.0, h.es_phase):
        m = h.moment(phase)
        spots[:, 2] = m.base + p.infarct_s * p.length_mm * m.lam
        radii.append(ventricles(h, spots.unbind(-1), m, h.places(m)).endo_radius)
    inwards = 1 - radii[1] / radii[0]
    assert inwards[0] < inwards[1] / 3


def test_a_heart_that_cannot_be_is_told():
    with pytest.raises(StudyError, match="alpha that seed 7 asks for .* draw another seed"): digital_heart(replace(draw(7), esv_ml=0.5))
