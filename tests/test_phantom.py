"The made-up study: the same seed gives the same study, its planes lie as a radiographer plans them, its truth fits."
import numpy as np
import pytest

from mgdcr.geometry import sample_volume
from mgdcr.phantom import END_SYSTOLE, GAIN, acquire, chambers, contraction, made_up_heart, phantom_study, plane_points


@pytest.fixture(scope="module")
def study():
    return phantom_study(3)


def test_seed_decides(study):
    again, other = phantom_study(3, reference=False), phantom_study(4, reference=False)
    np.testing.assert_array_equal(study.sax.images, again.sax.images)
    assert not np.array_equal(study.sax.images, other.sax.images)


@pytest.mark.parametrize("seed", range(0, 100, 7))
def test_every_heart_is_plausible(seed):
    heart = made_up_heart(seed)
    assert 75 < heart.length < 101 and 21 < heart.radius < 29 and 7 < heart.wall < 11
    assert -heart.axes[2, 0] > 0.3 and heart.axes[2, 1] > 0.3 and -heart.axes[2, 2] > 0.3, "apex left, forward, down"
    assert heart.axes[0, 0] < -0.4 and heart.axes[1, 2] > 0.4, "RV to the right, anterior wall up"
    k = np.arange(-60, 130, 3.0)
    points = np.moveaxis(np.stack(np.meshgrid(k, k, k, indexing="ij")), 0, -1)
    p = tuple(np.moveaxis(points, -1, 0).astype(np.float32))
    cavity = [(chambers(heart, p, f).lv < 0).sum() * 0.027 for f in (0, END_SYSTOLE)]
    assert 85 < cavity[0] < 200 and 0.45 < 1 - cavity[1] / cavity[0] < 0.75, "EDV in mL and ejection fraction"


def test_beat_is_periodic():
    f = np.linspace(0, 1, 101)
    c = contraction(f)
    assert c.min() >= 0 and c.max() <= 1 and abs(np.diff(c)).max() < 0.06
    np.testing.assert_allclose(contraction(f + 2), c, atol=1e-12)


def test_truth_matches_a_thin_slice(study):
    "A thin noise-free slice, taken where the truth's own voxels are, shows what the truth holds."
    grid, heart = study.reference_grid, made_up_heart(3)
    affine = grid.affine.copy()
    affine[:3, 3] += 30 * affine[:3, 2]
    affine[:3, 2] /= np.linalg.norm(affine[:3, 2])
    thin = GAIN * acquire(heart, affine, grid.shape[1:], grid.spacing[2])
    difference = thin - study.reference[30]
    assert abs(np.median(difference)) < 1 and np.sqrt(np.mean(difference**2)) < 0.06 * GAIN


def test_labels_lie_on_their_tissue(study):
    voxels = study.reference[study.reference_labels == 3], study.reference[study.reference_labels == 2]
    assert np.median(voxels[0]) > 0.9 * GAIN and np.median(voxels[1]) < 0.45 * GAIN


def test_slices_show_the_truth_where_their_poses_lead(study):
    "A mid slice agrees with the truth better at its true pose than at its header's."
    view, pose = study.sax, study.reference_poses["sax"]
    gains = []
    for s in range(3, 7):
        points = plane_points(view.affines[s], view.images.shape[2:])
        fit = [np.corrcoef(sample_volume(study.reference, study.reference_grid, points + t)[20:100, 20:100].ravel(),
                           view.images[s, 0, 20:100, 20:100].ravel())[0, 1] for t in (pose[s, :3], np.zeros(3))]
        gains.append(fit[0] - fit[1])
    assert min(gains) > -0.002 and np.mean(gains) > 0.005


def test_noise_is_what_was_asked_for():
    quiet, loud = phantom_study(3, noise=0.0, reference=False), phantom_study(3, noise=0.05, reference=False)
    blood = quiet.sax.images > 0.9 * GAIN
    assert abs((loud.sax.images - quiet.sax.images)[blood].std() / GAIN - 0.05) < 0.003


def test_frames():
    study = phantom_study(1, frames=4, slices=3, lax=("lax_4ch",), shape=(48, 48), pixel_mm=3.0, reference=False)
    assert study.sax.images.shape == (3, 4, 48, 48) and study.es_frame == 1
    bright = [(study.sax.images[1, f] > 0.75 * GAIN).sum() for f in range(4)]
    assert bright[1] < 0.9 * bright[0]
