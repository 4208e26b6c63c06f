"""The default method on studies that lack something, that lie, or that are interrupted; and what it says of its own certainty."""
import json, os, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mgdcr import uncertainty
from mgdcr.dicom import StudyError
from mgdcr.familiarity import inverted, shown
from mgdcr.inverse import beats, reconstruct, study_of
from mgdcr.jobs import TERMINAL
from mgdcr.protocols import ghost
from mgdcr.scanner import phantom_study

ROOT = Path(__file__).resolve().parent.parent
QUICK = dict(segmenter=None, raises=1)


@pytest.fixture(scope="module")
def study(): return study_of("phantom-113", shifts_mm=2.0)[0]


@pytest.fixture(scope="module")
def small(): return phantom_study(3, frames=2, sax_slices=6, shape=(56, 56), pixel_mm=3.0, acquired_mm=(3.0, 3.0), reference=False)


@pytest.fixture(scope="module")
def whole(study): return reconstruct(study, **QUICK)


def psnr(result): return result.scores["truth"]["psnr"]


def with_views(study, *names): return replace(study, views={name: study.views[name] for name in names})


def test_one_long_axis_view_costs_but_does_not_break(study, whole):
    fewer, linear = reconstruct(with_views(study, "sax", "lax_4ch"), **QUICK), reconstruct(study, "linear", segmenter=None)
    assert np.isfinite(fewer.volume).all() and psnr(linear) + 1 < psnr(fewer) < psnr(whole) + 0.3


def test_the_stack_alone_is_enough_where_nobody_breathed():
    still = study_of("phantom-113", shifts_mm=0.0)[0]  # with shifts, nothing but long-axis views could tell where slices lie
    assert psnr(reconstruct(with_views(still, "sax"), **QUICK)) > psnr(reconstruct(still, "linear", segmenter=None)) + 2


def test_three_slices_are_enough_to_go_on(study):
    three = replace(study, views=study.views | {"sax": study.sax.without([n for n in range(len(study.sax.images)) if n not in (2, 5, 8)])})
    result = reconstruct(three, **QUICK)
    assert len(three.sax.images) == 3 and np.isfinite(result.volume).all() and psnr(result) > psnr(reconstruct(three, "linear", segmenter=None))


@pytest.mark.parametrize("view, slice", [("lax_4ch", 0), ("sax", 5)])
def test_a_corrupted_slice_is_left_out_and_named(study, whole, view, slice):
    result = reconstruct(ghost(study, f"{view}-{slice}"), **QUICK)
    assert result.doubted == [f"{view} {slice} contradicts the others and was left out."] == result.summary()["doubted"] and whole.doubted == []
    assert any(told.startswith(f"{view} {slice} is ") for told in result.beyond)
    assert psnr(result) > psnr(whole) - 0.7


def test_spread_is_deterministic_and_refused_where_there_is_none(small):
    with pytest.raises(StudyError, match="diffae"): reconstruct(small, "tv", spread=4)
    with pytest.raises(StudyError, match="spread=1"): reconstruct(small, spread=1)
    result = reconstruct(small, spread=2, measured=True, align="none", seed=5, **QUICK)
    assert result.spread.shape == result.volume.shape == result.measured.shape and (result.spread > 0).mean() > 0.5
    assert result.measured.min() >= 0 and result.measured.max() <= 1 and np.ptp(result.measured) > 0.3
    again = reconstruct(small, spread=2, align="none", seed=5, **QUICK | dict(segmenter="cine128_labels"))
    assert np.array_equal(result.volume, again.volume) and np.array_equal(result.spread, again.spread) and again.measured is None
    assert set(again.clinical["interval"]) == set(uncertainty.CALIBRATED)
    low, high = again.clinical["interval"]["edv_ml"]
    assert low < again.clinical["volume"]["edv_ml"] < high


def stop_at(rounds):
    def callback(record):
        if record.get("stage") == "solve" and record.get("round") == rounds: raise KeyboardInterrupt
    return callback


@pytest.mark.parametrize("method, rounds", [("tv", 2), ("diffae", 3), ("diffae", 9)])
def test_interrupted_it_leaves_the_best_so_far(small, tmp_path, method, rounds):
    coarse = dict(align="none", spacing_mm=3.0)
    done = reconstruct(small, "linear", **coarse)
    done.save(tmp_path/"x")
    result = reconstruct(small, method, frame="all", callback=stop_at(rounds), segmenter=None, **coarse)
    assert not result.finished and result.frames == [0] and result.volume.shape == done.volume.shape and np.isfinite(result.volume).all() and result.residuals
    result.save(tmp_path/"x")
    assert sorted(os.listdir(tmp_path)) == ["x", "x.unfinished"]
    read = lambda name: json.loads((tmp_path/name/"summary.json").read_text())
    assert read("x")["finished"] and not read("x.unfinished")["finished"] and read("x")["method"] == "linear"


def test_ctrl_c_saves_what_there_is(small, tmp_path):
    replace(small, subject="anna").save(tmp_path/"data/anna")
    command = [sys.executable, "-m", "mgdcr.reconstruct", "anna", "--data-dir", tmp_path/"data", "--out-dir", tmp_path/"out", "--method", "tv", "--option", "tol=-1", "--option",
               "rounds=100000", "--align", "none", "--segmenter", ""]
    (tmp_path/"progress").touch()
    run = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs are deaf to it
                           env=os.environ | {TERMINAL: str(tmp_path/"progress"), "OMP_NUM_THREADS": "1"})
    try:
        while "round 3" not in (tmp_path/"progress").read_text() and run.poll() is None: time.sleep(0.2)
        os.killpg(run.pid, signal.SIGINT)
        out, told = run.communicate(timeout=120)
    finally:
        if run.poll() is None: os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 130 and "Traceback" not in told and out.strip() == "anna: interrupted; the best so far is in anna.unfinished"
    assert os.listdir(tmp_path/"out") == ["anna.unfinished"] and nib.load(tmp_path/"out/anna.unfinished/volume.nii.gz").shape[2] > 10


def test_a_frozen_heart_fails():
    study = phantom_study(5, frames=6, shifts_mm=0.0)
    result = reconstruct(study, "tv", frame="all", align="none", segmenter=None, spacing_mm=2.8)
    assert set(result.beat) == {"lax_2ch", "lax_3ch", "lax_4ch"} and max(beat.error for beat in result.beat.values()) < 0.6
    frames = [(study.slices(study.phase(t), result.grid), result.gains, result.offsets) for t in range(6)]
    still = beats(np.repeat(result.volume[:1], 6, 0), result.grid, frames, result.poses)
    assert all(np.isclose(beat.error, 1, atol=0.02) for beat in still.values()) and result.summary()["motion_error"]["lax_4ch"] == result.beat["lax_4ch"].error


def test_a_study_that_the_prior_does_not_know_is_said_to_be_one(small, tmp_path):
    coarse = dict(align="none", spacing_mm=4.0, frame="ES")
    usual, strange = (reconstruct(s, **coarse, **QUICK) for s in (small, shown(small, inverted)))
    assert not usual.summary()["fit_to_prior"]["strange"] and strange.fit.strange and 'method="tv"' in strange.fit.sentence
    assert [row["slice"] for row in strange.summary()["fit_to_prior"]["slices"]] == list(range(6))
    assert reconstruct(small, "tv", **coarse, segmenter=None, rounds=2).summary()["fit_to_prior"] is None
    replace(shown(small, inverted), subject="anna").save(tmp_path/"data/anna")
    command = [sys.executable, "-m", "mgdcr.reconstruct", "--here", "anna", "--data-dir", tmp_path/"data", "--out-dir", tmp_path/"out", "--align", "none", "--spacing-mm", 4, "--segmenter", ""]
    said = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=True).stderr
    assert "anna: The study does not look like what the prior learned from: 6 of 6" in said
