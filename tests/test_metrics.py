"Scores: what must not matter does not, what must matter does."
import numpy as np
import pytest
from scipy import ndimage

from mgdcr.geometry import Grid
from mgdcr.metrics import (best_line, bootstrap_interval, dice, fit_to_truth, heart_region, hd95, hold_out_scores,
                           meeting_point, ncc, predict, psnr, register_in_plane, score_volume, ssim)
from mgdcr.scanner import phantom_study


@pytest.fixture(scope="module")
def case():
    study = phantom_study(5, snr=1e9, shifts_mm=0.0, spacing_mm=2.8)
    return study, study.reference_grid, study.slices("ED", study.reference_grid)


def test_gain_offset_and_shift_do_not_matter(case):
    study, grid, _ = case
    truth, labels = study.reference, study.reference_labels
    plain = score_volume(ndimage.gaussian_filter(truth, 0.7), truth, labels, grid)
    moved = ndimage.shift(ndimage.gaussian_filter(truth, 0.7), (1, 0, -1), order=1, mode="nearest")
    other = score_volume(7 * moved - 300, truth, labels, grid)
    for key in ("psnr", "ssim", "ncc", "dice_rule_lv", "dice_rule_rv"):
        assert other[key] == pytest.approx(plain[key], rel=0.02), key
    np.testing.assert_allclose(7 * other["gain"], plain["gain"], rtol=0.02)
    np.testing.assert_allclose(np.linalg.norm(other["shift_mm"]), 2.8 * np.sqrt(2), atol=0.15)


def test_blur_and_noise_do_matter(case):
    study, grid, _ = case
    truth, labels = study.reference, study.reference_labels
    scores = [score_volume(ndimage.gaussian_filter(truth, s), truth, labels, grid) for s in (0.3, 1.0, 2.0)]
    for key in ("psnr", "ssim", "dice_rule_lv"):
        assert scores[0][key] > scores[1][key] > scores[2][key], key


def test_region_decides(case):
    study, grid, _ = case
    region = heart_region(study.reference_labels, grid.spacing)
    spoiled = np.where(region, study.reference, 0)
    assert psnr(spoiled, study.reference, region) > 100
    assert ncc(spoiled, study.reference, region) == pytest.approx(1)
    window = np.ones((11, 11, 11), bool)  # as far as SSIM's Gaussian reaches
    assert ssim(spoiled, study.reference, ndimage.binary_erosion(region, window)) == pytest.approx(1, abs=1e-5)
    assert ssim(spoiled, study.reference, region) < 1, "a window at the rim sees its true neighbours"


def test_negative_gain_is_refused():
    x = np.linspace(0, 1, 50)
    assert best_line(-x, x)[0] == 0


def test_labels_scores_of_nothing():
    nothing, box = np.zeros((9, 9, 9), bool), np.pad(np.ones((3, 3, 3), bool), 3)
    assert dice(nothing, nothing) == 1 and dice(nothing, box) == 0 and np.isnan(hd95(nothing, box, (1, 1, 1)))
    assert hd95(np.roll(box, 1, 0), box, (1, 1, 5)) == pytest.approx(5), "spacing is along i, j, k"


def test_fit_stays_within_reach(case):
    study, grid, _ = case
    region = heart_region(study.reference_labels, grid.spacing)
    fit = fit_to_truth(np.roll(study.reference, 4, axis=2), study.reference, grid, region, reach=5.0)
    assert np.linalg.norm(fit.shift) <= 5.0 + 1e-6


def test_hold_out_pixels_are_the_same_for_all_methods(case):
    study, grid, slices = case
    held, others = slices.select("lax_4ch"), slices.without("lax_4ch")
    a = hold_out_scores(study.reference, grid, held, others)
    b = hold_out_scores(ndimage.gaussian_filter(study.reference, 2), grid, held, others)
    np.testing.assert_array_equal(a.region, b.region)
    assert a[0]["pixels"] > 2000 and a[0]["ncc"] > 0.97 and a[0]["shift_mm"] < 0.6
    assert b[0]["ncc"] < a[0]["ncc"] and b[0]["psnr"] < a[0]["psnr"]
    assert {"ncc", "psnr", "ssim", "ncc_header", "psnr_header", "ssim_header", "shift_mm", "turn_deg"} <= set(a[0])


def test_registration_never_makes_it_worse(case):
    study, grid, slices = case
    views = "lax_2ch", "lax_3ch"
    for row in hold_out_scores(study.reference, grid, slices.select(*views), slices.without(*views)):
        assert row["ncc"] >= row["ncc_header"] - 2e-3


def test_meeting_point_without_another_lax(case):
    study, _, slices = case
    affine = slices.select("lax_4ch").planes.affines[0]
    alone, together = meeting_point(affine, slices.select("sax")), meeting_point(affine, slices.without("lax_4ch"))
    for point in (alone, together):
        assert abs((point - affine[:3, 3]) @ affine[:3, 2]) < 1e-6, "on the held-out plane"
    assert np.linalg.norm(alone - together) < 15


def test_a_view_that_misses_the_stack_has_no_score(case):
    study, grid, slices = case
    held = slices.select("lax_4ch")
    far = held.planes.affines.copy()
    far[:, :3, 3] += 500 * far[:, :3, 2]
    away = type(held)(held.images, type(held.planes)(far, held.planes.shape, held.planes.thickness, held.planes.fwhm),
                      held.mask, held.views, held.index, held.sigma)
    row = hold_out_scores(study.reference, grid, away, slices.without("lax_4ch"))[0]
    assert row["pixels"] == 0 and np.isnan(row["ncc"])


def test_registration_is_limited():
    rng = np.random.default_rng(1)
    image = ndimage.gaussian_filter(rng.standard_normal((80, 80)), 4)
    region = np.zeros((80, 80), bool); region[20:60, 20:60] = True
    motion = register_in_plane(image, np.roll(image, 9, axis=0), region, np.array([1.0, 1.0]))
    assert np.hypot(*motion[:2]) <= 5 + 1e-6 and abs(motion[2]) <= 5


def test_prediction_continues_the_border(case):
    study, grid, slices = case
    ones = predict(np.ones(grid.shape, np.float32), grid, slices.select("sax").planes)
    np.testing.assert_allclose(ones[0, 30:100, 30:100], 1, atol=1e-5)


def test_bootstrap_pairs():
    rng = np.random.default_rng(0)
    a = rng.normal(20, 3, 20)
    b = a + 0.5 + 0.1 * rng.standard_normal(20)
    mean, low, high = bootstrap_interval(b, a)
    assert 0.4 < low < mean < high < 0.6
    assert bootstrap_interval(b, a) == (mean, low, high), "the same seed, the same interval"
    assert np.isnan(bootstrap_interval([np.nan, 3.0])[1])
