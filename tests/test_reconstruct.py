"""The main job: as a call, as a shell command over many subjects, and as the notebook."""
import json, os, shutil, subprocess, sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import mgdcr
from mgdcr.dicom import StudyError
from mgdcr.inverse import METHODS, Reconstruction, beyond, load_subject, method_of, reconstruct, slice_residuals
from mgdcr.scanner import phantom_study
from mgdcr.reconstruct import main
from mgdcr.solvers import Solution

ROOT = Path(__file__).resolve().parent.parent
COARSE = dict(spacing_mm=6.0, align="none")


@pytest.fixture(scope="module")
def study():
    "A small beating heart, with its truth left out."
    return phantom_study(3, frames=3, sax_slices=6, shape=(56, 56), pixel_mm=3.0, acquired_mm=(3.0, 3.0), reference=False)


@pytest.fixture(scope="module")
def data(study, tmp_path_factory):
    "A data folder: two good studies, one empty folder, and what lies about in such folders."
    folder = tmp_path_factory.mktemp("data")
    for name in ("anna", "007"): replace(study, subject=name).save(folder/name)
    (folder/"broken").mkdir()
    (folder/".cache").mkdir()
    (folder/"notes.txt").touch()
    return folder


def shell(*args):
    return subprocess.run([sys.executable, "-m", *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          stdin=subprocess.DEVNULL, env=os.environ | dict(OMP_NUM_THREADS="1"))


def last_line(text): return text.strip().splitlines()[-1]


def test_a_beat_is_a_4d_volume(study, tmp_path):
    result = reconstruct(study, "tv", frame="all", rounds=3, save_every=2, **COARSE)
    result.save(tmp_path/"x")
    image = nib.load(tmp_path/"x/volume.nii.gz")
    assert image.shape == (*result.grid.shape[::-1], 3) and image.get_data_dtype() == np.float32
    assert image.header.get_xyzt_units() == ("mm", "sec")
    assert np.isclose(image.header["pixdim"][4], study.views["sax"].rr_ms.mean()/1000/3)
    assert [row["frame"] for row in result.losses] == sorted(row["frame"] for row in result.losses) and {row["frame"] for row in result.residuals} == {0, 1, 2}
    assert np.ptp(result.volume, axis=0).max() > 0  # it beats
    assert (tmp_path/"x/intermediate/volume_frame00_002.nii.gz").is_file()


def test_frames_start_from_the_one_before(study):
    given = []

    def remember(slices, grid, poses=None, init=None):
        given.append(init)
        return Solution(np.full(grid.shape, float(len(given)), np.float32), np.ones(len(slices)), np.zeros(len(slices)))
    METHODS["remember"] = method_of(remember, uses_lax=True)  # a method joins by one line
    try: result = reconstruct(study, "remember", frame="all", **COARSE)
    finally: del METHODS["remember"]
    assert given[0] is None and [float(v.mean()) for v in given[1:]] == [1, 2] and result.volume.shape[0] == 3


def test_a_held_out_view_has_no_influence(study):
    views = dict(study.views)
    noise = np.random.default_rng(0).uniform(0, 500, views["lax_4ch"].images.shape).astype(np.float32)
    views["lax_4ch"] = replace(views["lax_4ch"], images=noise)
    options = dict(hold_out="lax_4ch", rounds=2, spacing_mm=6.0)  # aligned
    one, other = (reconstruct(s, "tv", **options) for s in (study, replace(study, views=views)))
    assert np.array_equal(one.volume, other.volume) and np.array_equal(one.poses, other.poses)
    assert one.scores["hold_out"]["lax_4ch"][0]["ncc"] > 0.5 > abs(other.scores["hold_out"]["lax_4ch"][0]["ncc"])


def test_interpolation_ignores_long_axis_views_and_keeps_header_poses(study):
    result = reconstruct(study, "linear", spacing_mm=6.0)  # align="auto"
    assert result.alignment is None and not result.poses.any()
    black = {name: view if name == "sax" else replace(view, images=np.zeros_like(view.images)) for name, view in study.views.items()}
    assert np.array_equal(result.volume, reconstruct(replace(study, views=black), "linear", spacing_mm=6.0).volume)


def test_given_poses_are_used(study):
    poses = {name: np.full((len(view.images), 6), 0.5) for name, view in study.views.items()}
    result = reconstruct(replace(study, given_poses=poses), "linear", spacing_mm=6.0, align="given")
    assert (result.poses == 0.5).all()
    with pytest.raises(StudyError, match="poses.csv"): reconstruct(study, "linear", spacing_mm=6.0, align="given")


def test_the_same_seed_gives_the_same_volume(study):
    one, other = (reconstruct(study, "tv", rounds=2, seed=4, **COARSE) for _ in range(2))
    assert np.array_equal(one.volume, other.volume) and one.summary()["seed"] == 4


@pytest.mark.parametrize("wrong", [dict(method="magic"), dict(hold_out="sax"), dict(hold_out="lax_9ch"), dict(frame=99), dict(frame="noon"),
                                   dict(align="perhaps"), dict(spacing_mm=0), dict(spacing_mm="fine"), dict(lam=1.0, method="linear"),
                                   dict(device="cuda:9"), dict(prior="x.pt")])
def test_wrong_arguments_get_one_sentence(study, wrong):
    if "device" in wrong and __import__("torch").cuda.is_available(): pytest.skip("there is a GPU here")
    with pytest.raises(StudyError) as refusal: reconstruct(study, **wrong)
    assert str(refusal.value).count("\n") == 0 and str(refusal.value).endswith(".")


def test_every_subject_of_a_folder(data, tmp_path):
    command = ["mgdcr.reconstruct", "--all", "--data-dir", data, "--out-dir", tmp_path/"out", "--method", "linear", "--spacing-mm", 6]
    run = shell(*command)
    assert run.returncode == 1 and last_line(run.stdout) == "2 of 3 have a result; not broken"
    assert "Traceback" not in run.stderr and "broken" in last_line(run.stderr)
    assert sorted(os.listdir(tmp_path/"out")) == ["007", "anna"]
    assert {"volume.nii.gz", "poses.csv", "residuals.csv", "losses.csv", "summary.json"} <= set(os.listdir(tmp_path/"out/anna"))
    assert len(os.listdir(tmp_path/"out/anna/figures")) >= 3
    written = (tmp_path/"out/anna/summary.json").stat().st_mtime_ns
    shutil.rmtree(tmp_path/"out/007")
    run = shell(*command)
    assert run.stdout.count("has a result already") == 1 and (tmp_path/"out/007/summary.json").is_file()
    assert (tmp_path/"out/anna/summary.json").stat().st_mtime_ns == written


def test_a_bad_call_touches_nothing(data, tmp_path, capsys):
    out = ["--data-dir", str(data), "--out-dir", str(tmp_path/"out")]
    for wrong in (["../x"], ["record"], [""], ["--here", "nobody"], ["--here", "broken"], ["--here", "anna", "--method", "magic"],
                  ["--here", "anna", "--hold-out", "lax_9ch"], ["--here", "anna", "--frame", "77"], []):
        assert main([*wrong, *out]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.endswith(".\n") and os.listdir(tmp_path) == []


def test_the_notebook_and_the_command_agree(data, tmp_path):
    settings = ["-p", "data_dir", data, "-p", "method", "tv", "-p", "spacing_mm", 6, "-p", "rounds", 2, "-p", "hold_out", "lax_3ch"]
    run = shell("papermill", "nbs/reconstruct.ipynb", tmp_path/"executed.ipynb", "-r", "subject", "007", "-p", "out_dir", tmp_path/"a", *settings)
    assert run.returncode == 0, run.stderr
    assert main(["007", "--data-dir", str(data), "--out-dir", str(tmp_path/"b"), "--method", "tv", "--spacing-mm", "6", "--option", "rounds=2", "--hold-out", "lax_3ch"]) == 0
    one, other = (nib.load(tmp_path/side/"007/volume.nii.gz").get_fdata() for side in "ab")
    assert np.allclose(one, other, rtol=1e-3, atol=1e-3*np.abs(one).max())
    files = [sorted(str(p.relative_to(tmp_path/side)) for p in (tmp_path/side).rglob("*")) for side in "ab"]
    assert files[0] == files[1]


def test_a_subject_that_became_a_number_says_so(tmp_path):
    import papermill
    with pytest.raises(papermill.PapermillExecutionError, match="-r subject"):
        papermill.execute_notebook(ROOT/"nbs/reconstruct.ipynb", None, dict(subject=7, out_dir=str(tmp_path)), progress_bar=False, kernel_name="python3", cwd=ROOT)
    with pytest.raises(StudyError, match="-r"): load_subject(12345672020820)


@pytest.mark.parametrize("seed", [11, 12])
def test_the_noise_is_what_was_planted(seed):
    noisy, clean = (phantom_study(seed, reference=False, **snr) for snr in ({}, dict(snr=1e6)))
    grid = noisy.grid()
    slices, without = noisy.slices("ED", grid), clean.slices("ED", grid)
    for view in noisy.views:
        n = np.flatnonzero(np.isin(slices.views, view))
        middle = (slice(None), *(slice(s//4, -s//4) for s in slices.images.shape[1:]))
        planted = (slices.images[n] - without.images[n])[middle].std()
        assert abs(slices.sigma[n].mean()/planted - 1) < 0.15, view


def test_slices_that_contradict_the_volume_are_named():
    study = phantom_study(103, shifts_mm=0.0)
    result = reconstruct(study, segmenter=None, align="none")
    assert result.method == "diffae" and result.beyond == [] and max(row["heart_sigma"] for row in result.residuals) <= 1.3
    grid, slices = result.grid, result.slices
    poses = np.zeros((len(slices), 6))
    poses[2] = 0, 6, 6, 0, 0, 0
    rows = slice_residuals(result.volume, grid, slices, poses, result.gains, result.offsets)
    assert rows[2]["heart_sigma"] > 2 > 1.3 > rows[2]["heart_sigma_header"] and rows[1]["heart_sigma"] == rows[1]["heart_sigma_header"]
    told = beyond(rows, slices, poses)
    assert len(told) == 2 and told[0].startswith("sax 2 is") and told[1].startswith("sax 2 was moved by 8.5 mm")


def test_function_and_module_share_a_name():
    import mgdcr.reconstruct
    assert callable(mgdcr.reconstruct) and mgdcr.reconstruct.main is main
    with pytest.raises(StudyError): mgdcr.reconstruct(None, method="magic")
    assert Reconstruction is mgdcr.Reconstruction


def test_results_are_never_half_written(study, tmp_path, monkeypatch):
    reconstruct(study, "linear", **COARSE).save(tmp_path/"x")
    before = (tmp_path/"x/summary.json").read_bytes()
    result = reconstruct(study, "nearest", **COARSE)
    monkeypatch.setattr(Reconstruction, "summary", lambda self: 1/0)
    with pytest.raises(ZeroDivisionError): result.save(tmp_path/"x")
    assert os.listdir(tmp_path) == ["x"] and (tmp_path/"x/summary.json").read_bytes() == before
    assert json.loads(before)["method"] == "linear"
