"""Evaluations: killed and started again nothing is done twice, settings change what they say and nothing else, and what cannot be is refused before it costs anything."""
import os, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest

from mgdcr.alignment import true_poses
from mgdcr.batch import read_table
from mgdcr.dicom import StudyError
from mgdcr.inverse import METHODS, Method
from mgdcr.protocols import BEFALLS, PROTOCOLS, ROBUSTNESS, compare, grid_of, only_lax, read_setting, score, subject_study, wrong_lax

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent/"shared/data/acdc"
COARSE = dict(methods=("nearest", "linear"), settings=("spacing_mm:4",))


def test_a_killed_evaluation_does_nothing_twice(tmp_path):
    record = tmp_path/"scores.csv"
    code = f"from mgdcr.protocols import compare; compare(['phantom-8', 'phantom-9', 'phantom-10'], ('nearest', 'linear'), settings=('spacing_mm:4',), record={str(record)!r})"
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"), start_new_session=True)
    end = time.time() + 240
    while not read_table(record) and time.time() < end: time.sleep(0.1)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    before, told = read_table(record), []
    assert {row["subject"] for row in before} == {"phantom-8"}, "what was done is kept"
    rows = compare(["phantom-8", "phantom-9"], record=str(record), progress=told.append, **COARSE)
    assert [line["stage"] for line in told] == ["phantom-9 done"] and read_table(record)[:len(before)] == before
    assert {(row["subject"], row["method"]) for row in rows} == {(f"phantom-{n}", name) for n in (8, 9) for name in COARSE["methods"]}
    again = compare(["phantom-9"], record=str(record), progress=told.append, **COARSE)
    assert again == [row for row in read_table(record) if row["subject"] == "phantom-9"] and len(told) == 1


def test_settings_change_what_they_say():
    psnr = lambda setting, method="linear": next(row["value"] for row in score("phantom-8", setting=f"spacing_mm:4,{setting}", methods=[method]) if row["metric"] == "psnr")
    plain = psnr("shifts_mm:0")
    assert plain > psnr("shifts_mm:4") + 1 and plain > psnr("shifts_mm:0,sax_spacing_mm:18") + 0.2
    study = subject_study("phantom-8")
    assert set(only_lax(study, "2ch+4ch").views) == {"sax", "lax_2ch", "lax_4ch"}
    wrong = wrong_lax(study, "4ch")
    assert np.array_equal(wrong.views["lax_4ch"].affines, study.views["lax_4ch"].affines) and not np.allclose(wrong.views["lax_4ch"].images, study.views["lax_4ch"].images)
    assert np.array_equal(wrong.views["lax_2ch"].images, study.views["lax_2ch"].images)


def test_slices_that_are_lost_take_their_places_with_them(monkeypatch):
    study = subject_study("phantom-8")
    less = BEFALLS["lost_slices"](study, 2)
    for n, affine in enumerate(less.sax.affines):
        was = next(m for m, other in enumerate(study.sax.affines) if np.array_equal(other, affine))
        assert np.array_equal(less.reference_poses["sax"][n], study.reference_poses["sax"][was])
    seen = []
    def spy(problem):
        seen.append((problem.slices.planes.affines, problem.poses))
        return METHODS["nearest"].solve(problem)
    monkeypatch.setitem(METHODS, "spy", Method(spy, uses_lax=False))
    score("phantom-8", "slice_drop", "spacing_mm:4,lost_slices:2,align:true", ["spy"])
    (affines, poses), known = seen[0], true_poses(study, every := study.slices("ED"))
    for affine, pose in zip(affines, poses):
        was = np.argmin([np.abs(a[:3, 2] - affine[:3, 2]).sum() + abs((a[:3, 3] - affine[:3, 3]) @ a[:3, 2]) for a in every.planes.affines])
        np.testing.assert_allclose(pose[:3], known[was][:3], atol=0.8)  # of one slice, whose crop and so whose middle is another


def test_every_level_of_the_robustness_study_can_be_read():
    study = subject_study("phantom-8")
    for setting in grid_of(ROBUSTNESS):
        scan, befalls, run = read_setting(setting)
        assert len(scan) + len(befalls) == bool(setting) and not run
        for name, level in befalls.items(): BEFALLS[name](study, level)


@pytest.mark.parametrize("ask, sentence", [
    (lambda: compare(["phantom-8"], ["lineer"]), "no method 'lineer'"), (lambda: compare(["phantom-8"], protocol="tooth"), "no protocol 'tooth'"),
    (lambda: compare(["phantom-8"], settings=["snr=8"]), "says nothing that is known"), (lambda: compare(["phantom-8"], settings=["snrr:8"]), "says nothing that is known"),
    (lambda: score("patient-12", setting="snr:8"), "was scanned already"), (lambda: score("acdc-7"), "three digits"), (lambda: score("acdc-001", data_dir="nowhere"), "is missing"),
    (lambda: score("phantom-8", setting="lax:5ch"), "has no lax_5ch"), (lambda: score("heart-11", setting="condition:dilated"), "heart of a person"), (lambda: score("phantom-8", "held_out", "lax:none,spacing_mm:4"), "no long-axis view")])
def test_what_cannot_be_is_refused(ask, sentence):
    with pytest.raises(StudyError, match=sentence): ask()


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ACDC arrays in ../shared/data/acdc")
def test_slices_of_a_patient_are_predicted():
    "Linear interpolation of every second slice: published for other patients, 17.9 dB."
    values = {row["metric"]: row["value"] for row in score("acdc-061", "slice_drop", methods=["linear"], data_dir=str(SHARED))}
    assert 13 < values["psnr"] < 22 and values["ncc"] > 0.4 and values["slices"] == 8
    with pytest.raises(StudyError, match="no truth is known"): score("acdc-061", "truth", methods=["linear"], data_dir=str(SHARED))


def test_held_out_views_are_scored_by_name():
    found = {row["metric"] for row in score("phantom-8", "held_out", "spacing_mm:4,lax:2ch+4ch", ["linear"])}
    assert found == {f"lax_{view} {name}" for view in ("2ch", "4ch") for name in ("ncc", "psnr", "ssim")} and set(PROTOCOLS) == {"truth", "slice_drop", "held_out", "labels"}
