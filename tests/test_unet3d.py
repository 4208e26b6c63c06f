"""The 3D U-Net: what it sees, what it learns, its file, and the reconstruction that asks it."""
import numpy as np
import pytest
import torch

from mgdcr.dicom import StudyError
from mgdcr.diffusion import REACH_MM, brought_to, from_axis
from mgdcr.geometry import Grid
from mgdcr.inverse import load_subject, reconstruct
from mgdcr.patches import Volumes, decoded, save_volumes
from mgdcr.solvers import tv
from mgdcr.training import begin, read_log, train
from mgdcr.unet3d import CROP, CropStream, VolumePrior, VolumeRecipe, VolumeValidation, channels, corrected, load_unet3d, save_unet3d, unet3d, volume_network


def ball(seed=0, shape=(2, 30, 44, 28)):
    "A bright ball, the second moment a smaller one, and a classical volume that is smoother than it."
    from scipy.ndimage import gaussian_filter
    rng, at = np.random.default_rng(seed), np.indices(shape[1:])
    far = np.sqrt(sum((x - n/2)**2 for x, n in zip(at, shape[1:])))
    truth = np.stack([200.0*(far < radius) + 30 for radius in (10, 8)])
    classical = np.stack([gaussian_filter(x, (4, 1, 1)) for x in truth]) + rng.normal(size=shape)
    as_bytes = lambda x: np.rint(x).clip(0, 255).astype(np.uint8)
    return Volumes(as_bytes(classical), as_bytes(truth), np.stack([far < 15]*2), as_bytes(rng.normal(128, 20, shape)), as_bytes(rng.uniform(0, 120, shape)))


@pytest.fixture
def folder(tmp_path):
    for n, name in enumerate(("phantom-10000", "phantom-10001", "phantom-112")): save_volumes(tmp_path/f"{name}.npz", ball(n))
    return tmp_path


def test_samples_depend_on_seed_and_number_alone(folder):
    recipe = VolumeRecipe(str(folder), samples=16)
    one, other, else_ = CropStream(recipe), CropStream(recipe), CropStream(VolumeRecipe(str(folder), samples=16, seed=1))
    for n in (5, 2, 9):
        a, b = one[n], other[n]
        assert all(torch.equal(v, b[k]) for k, v in a.items()) and not torch.equal(a["x"], else_[n]["x"])
        assert a["x"].shape == (4, *CROP) and a["y"].shape == a["near"].shape == (1, *CROP) and a["near"].any()
    assert set(one.subjects) == {"phantom-10000", "phantom-10001"} and set(CropStream(recipe, "tune").subjects) == {"phantom-112"}
    with pytest.raises(StudyError, match="no volumes"): CropStream(VolumeRecipe(str(folder/"none"), samples=16))


def test_a_sample_is_a_piece_of_the_whole_and_beyond_the_border_the_border_goes_on(folder):
    stream, heart = CropStream(VolumeRecipe(str(folder), samples=16, varied=False)), ball()
    whole, part, wide = stream.sample(0), stream.sample(0, (3, 5, 7), (9, 8, 7)), stream.sample(0, (20, 0, 0), (16, 8, 40))
    assert all(torch.equal(whole[k][:, 3:12, 5:13, 7:14], part[k]) and torch.equal(wide[k][:, 9:, :, :], wide[k][:, 9:10].expand(-1, 7, -1, -1)) for k in part)
    assert torch.allclose(whole["y"][0], torch.as_tensor(decoded(heart.truth[0].astype(float)) - decoded(heart.classical[0].astype(float))).float(), atol=1e-5)
    assert np.allclose(whole["x"][0]/2.5, decoded(heart.classical[0].astype(float)), atol=1e-5)


def test_brighter_pictures_get_as_much_more(folder):
    plain, varied = (CropStream(VolumeRecipe(str(folder), samples=16, varied=how)) for how in (False, True))
    for n in range(4):
        a, b = plain[n], varied[n]
        wanted = a["y"].abs() > 0.1
        gain = float((b["y"][wanted]/a["y"][wanted]).mean())
        offset = (b["x"][0] - gain*a["x"][0])/2.5
        assert 0.7 < gain < 1.4 and torch.allclose(b["y"], gain*a["y"], atol=1e-4) and offset.std() < 1e-4 and torch.equal(a["x"][1:], b["x"][1:])


def test_it_learns_and_is_kept(folder):
    recipe = VolumeRecipe(str(folder), samples=96, warmup=24)
    run = train(recipe, folder/"run", folder/"log", "cpu")
    loss = [float(row["loss"]) for row in read_log(folder/"log"/"losses.csv")]
    assert np.mean(loss[-6:]) < 0.9*np.mean(loss[:3])
    prior, check = run.learnt(), VolumeValidation(recipe)
    assert [row["what"] for row in check(prior)] == ["phantom"] and check(prior)[0]["gain"] > 0.2
    card = save_unet3d(prior, folder/"w.safetensors")
    again, x = load_unet3d(str(folder/"w.safetensors")), CropStream(recipe).sample(0)["x"]
    assert card["kind"] == "unet3d" and card["samples"] == 96 and torch.allclose(again(x), VolumePrior(prior.network, {})(x), atol=0.01)
    assert begin(VolumeRecipe(str(folder), samples=16, init=str(folder/"w.safetensors"))).started_from == 96
    same = [train(VolumeRecipe(str(folder), samples=8), None, None, "cpu") for _ in range(2)]
    assert all(torch.equal(v, same[1].ema[k]) for k, v in same[0].ema.items())


def test_other_files_are_refused_and_a_missing_one_told_how_to_make(folder):
    from mgdcr.diffae import weights_folder
    for path in (weights_folder()/"cine128_labels.safetensors", weights_folder()/"cine_patches.safetensors", folder/"phantom-112.npz"):
        if path.suffix == ".npz": path = path.rename(folder/"x.safetensors")
        with pytest.raises(StudyError, match=r"is no 3D U-Net that can be used: [^\n]*\.$"): load_unet3d(path)
    with pytest.raises(StudyError, match="no unet3d 'x'"): load_unet3d("x")
    with pytest.raises(StudyError, match=r"train_unet3d\.ipynb"): load_unet3d(folder/"none.safetensors")
    with pytest.raises(StudyError, match=r"train_unet3d\.ipynb"): unet3d(None, None, network="checkpoints/nowhere/none.safetensors")


def test_a_file_is_looked_for_from_the_projects_root(folder, monkeypatch):
    from mgdcr.diffae import weights_file
    (folder/"settings.ini").write_text("lib_name = mgdcr")
    (folder/"nbs").mkdir()
    save_unet3d(VolumePrior(volume_network(), dict(kind="unet3d")), folder/"checkpoints"/"u.safetensors")
    monkeypatch.chdir(folder/"nbs")
    assert weights_file("checkpoints/u.safetensors") == folder/"checkpoints"/"u.safetensors" and load_unet3d("checkpoints/u.safetensors").card["kind"] == "unet3d"


class Brighter(torch.nn.Module):
    "Adds a tenth everywhere."
    def __init__(self):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))
    def forward(self, x): return x[:, :1]*0 + 0.1


def test_what_it_adds_goes_where_it_may_speak():
    k, j, i = np.indices((22, 96, 140))
    volume = (100*np.exp(-((j - 48)**2 + (i - 70)**2)/300.)).astype(np.float32) + 5
    grid = Grid.centred((0, 0, 0), np.eye(3), volume.shape, 1.4)
    more = corrected(VolumePrior(Brighter(), {}), volume, grid, np.zeros((2, *volume.shape)), np.zeros(volume.shape)) - volume
    away = from_axis(grid)
    assert np.allclose(more[:, away < REACH_MM[0]], more.max(), atol=1e-3) and more.max() > 1 and not more[:, away >= REACH_MM[1]].any()


def test_sides_need_not_be_multiples_of_anything():
    prior, rng = VolumePrior(volume_network(), {}), np.random.default_rng(0)
    torch.nn.init.normal_(prior.network[-1].weight)
    x = channels(rng.normal(size=(13, 18, 21)), rng.uniform(0, 2, (2, 13, 18, 21)), 0.02*rng.normal(size=(13, 18, 21)))
    more = prior(x)
    assert more.shape == (13, 18, 21) and more.std() > 0.1
    assert torch.equal(more, prior(torch.nn.functional.pad(x, (0, 3, 0, 6, 0, 3), "replicate"))[:13, :18, :21])


@pytest.fixture(scope="module")
def study(): return load_subject("phantom-103")


def test_untrained_it_is_tv_on_any_grid(study):
    whole, untrained, told = study.grid(), VolumePrior(volume_network(), {}), []
    fine, coarse = (Grid.centred(whole.centre, whole.axes, shape, spacing) for shape, spacing in (((16, 48, 56), 1.4), ((8, 24, 28), 2.8)))
    slices = study.slices("ED", fine)
    found = unet3d(slices, fine, network=untrained, callback=told.append)
    assert np.array_equal(found.volume, tv(slices, fine).volume) and found.evaluations == 16 and told[-1] == found.losses[-1] and np.isfinite(found.losses[-1]["loss"])
    other = unet3d(slices, coarse, network=untrained)
    assert other.evaluations == 16 and np.allclose(other.volume, brought_to(found.volume, fine, coarse), atol=1e-3*np.ptp(found.volume))


def test_reconstructing_with_it(study, folder):
    save_unet3d(VolumePrior(volume_network(), dict(kind="unet3d")), folder/"mine.safetensors")
    result = reconstruct(study, "unet3d", segmenter=None, align="none", spacing_mm=6.0, network=str(folder/"mine.safetensors"))
    summary = result.summary()
    assert summary["prior"] == "mine" and len(summary["prior_sha256"]) == 64 and summary["network_evaluations"] > 60 and np.isfinite(result.volume).all()
