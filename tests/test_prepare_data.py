"Hearts, made-up and published, to slices for training: whose they are, where they lie, and runs that are stopped."
import importlib
import json
import os
import signal
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import torch

from mgdcr.dataset import (Simulation, SliceDataset, SliceStore, heart_jobs, moments,
                           partial_store, phantom_jobs, prepare, side_of, simulated_frame, simulated_jobs,
                           simulated_slices, source_jobs, split_table, stream, subject_protocol, write_lmdb)
from mgdcr.heart import digital_heart
from mgdcr.label_heart import label_heart, shared_map
from mgdcr.scanner import PROTOCOLS, training_planes
from test_dataset import contents, refused

ROOT = Path(__file__).resolve().parent.parent
ARRAYS = ROOT.parent/"shared/data/acdc"
QUICK = Simulation(("yardstick-1", "ukbb"), planes=3, moments=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Hearts of every side in one data set."
    path = tmp_path_factory.mktemp("store")/"x.lmdb"
    names = [f"phantom-{n}" for n in (3, 10000, 10001, 150, 250)]
    write_lmdb(path, simulated_jobs(names, simulation=QUICK), dict(a=1), workers=2)
    return path


# Whose they are

def test_numbers_keep_their_side():
    sides = lambda count, seed: [side_of(subject) for subject, _ in phantom_jobs(count, seed)]
    assert sides(300, 0) == ["demo"]*100 + ["tune"]*100 + ["report"]*100 and set(sides(50, 10_000)) == {"train"}
    for count, seed in ((1, 300), (2, 299), (1, 9999), (10, 9995)): refused(phantom_jobs, count, seed, words="no side")
    for count, seed in ((0, 10_000), (-3, 10_000), (2, -1)): refused(phantom_jobs, count, seed, words="at least one")
    refused(simulated_jobs, ["heart-13"], words="no side")


@pytest.mark.skipif(not shared_map(1).is_file(), reason="the published anatomies are not here")
def test_anatomies_keep_their_side():
    "And more of them are the same ones and others."
    subjects = lambda count: [subject for subject, _ in heart_jobs(count)]
    assert subjects(12) == [f"heart-{n:02d}" for n in range(1, 13)]
    assert subjects(14) == ["heart-01", "heart-01-v0000", "heart-02", "heart-02-v0000", *subjects(12)[2:]]
    assert set(subjects(30)) < set(subjects(47)) and len(set(subjects(47))) == 47
    assert all(side_of(s) == side_of(s[:8]) for s in subjects(47))


def test_sources_that_do_not_go_together(tmp_path):
    (tmp_path/"phantom-10001").mkdir()
    refused(source_jobs, "phantoms,folders", 3, data_dir=tmp_path, words="phantom-10001 comes from two sources")
    for bad in ("", "phantom", "phantoms,acdc"): refused(source_jobs, bad, words="source")
    refused(source_jobs, "arrays", data_dir=tmp_path, words="no patientXXX_ED.npz")
    for bad in (dict(presets=()), dict(presets=("mine",)), dict(planes=0), dict(moments=2.5), dict(field=0.1)):
        refused(Simulation, **bad)


def test_no_subject_on_two_sides_in_any_table(made):
    store = SliceStore(made)
    records = [store.record(n) for n in range(len(store))]
    assert {r.subject: r.split for r in records} == {
        "phantom-3": "demo", "phantom-10000": "train", "phantom-10001": "train", "phantom-150": "tune", "phantom-250": "report"}
    counts = {side: sum(row[-1] for row in split_table(records) if row[0] == side) for side in ("demo", "train", "tune", "report")}
    assert counts == dict(demo=6, train=12, tune=6, report=6)
    assert sum(counts.values()) == len(store) == 2*QUICK.planes*5
    train = SliceDataset(made, "train", "sax", "pair")
    lax = sum(r.split == "train" and r.view != "sax" for r in records)//2
    loader = torch.utils.data.DataLoader(train, 2, num_workers=2)
    assert sum(len(batch["s"]) for batch in loader) == len(train) == 6 - lax


# What they are

def test_a_subject_is_the_same_whoever_makes_it(tmp_path, made):
    "To the bit: alone or among others, in any order, by one worker or by two."
    names = [f"phantom-{n}" for n in (250, 10001, 150, 3, 10000)]
    write_lmdb(tmp_path/"y.lmdb", simulated_jobs(names, simulation=QUICK), dict(a=1), workers=1)
    of = lambda path: {(r.subject, r.pair, r.kind): (store.image(n), r.to_json()) for store in [SliceStore(path)]
                       for n in range(len(store)) for r in [store.record(n)]}
    one, two = of(made), of(tmp_path/"y.lmdb")
    assert one.keys() == two.keys()
    for key, (image, record) in one.items(): assert (image == two[key][0]).all() and record == two[key][1], key


def test_subjects_differ():
    protocols = [subject_protocol(stream(f"phantom-{n}")) for n in range(10_000, 10_200)]
    assert {p.name for p in protocols} == set(PROTOCOLS) and len(set(protocols)) == 200
    for p in protocols:
        usual = PROTOCOLS[p.name]
        assert 0.99 < p.shape[0]*p.pixel_mm/(1.28*128*1.4) < 1.02 and p.shape[0] == p.shape[1]
        assert 0 <= p.shading <= 1 and 40 < p.flip_deg < 95 and 10 < p.snr < 60
        if p.name != "acdc": assert (p.pixel_mm, p.sax_thickness_mm, p.views) == (usual.pixel_mm, usual.sax_thickness_mm, usual.views)
    beats = np.array([moments(8, stream(f"phantom-{n}")) for n in range(300)])
    assert (beats[:, 0] == 0).all() and (np.diff(beats) > 0).all() and np.histogram(beats[:, 1:], 7, (1/8, 1))[0].min() == 300


def test_a_simulated_heart_lies_as_a_patient_does(made):
    "In stored squares, by the heart's own labels: RV left of the LV, at its height, and both where they are in patients."
    store, seen = SliceStore(made), 0
    for name in ("phantom-3", "phantom-10000"):
        heart = digital_heart(int(name[8:]))
        frame = simulated_frame(heart)
        for n in range(len(store)):
            r = store.record(n)
            if r.subject != name: continue
            j, i = torch.meshgrid(torch.arange(0, 128, 4.), torch.arange(0, 128, 4.), indexing="ij")
            affine = torch.from_numpy(r.affine).float()
            points = i[..., None]*affine[:3, 0] + j[..., None]*affine[:3, 1] + affine[:3, 3]
            labels = heart.labels(points, r.phase)
            at = lambda label: np.array([x[labels == label].mean().item() for x in (i, j)])
            at_axis = frame.axes @ (r.affine[:3, :3] @ [63.5, 63.5, 0] + r.affine[:3, 3] - frame.centre)
            if r.view == "sax" and 0.15 < r.s < 0.7:
                rv, lv = at(1), at(3)
                assert rv[0] < lv[0] - 15 and abs(rv[1] - lv[1]) < 12 and 66 < lv[0] < 84 and 54 < lv[1] < 74
                assert np.abs(at_axis[:2]).max() < 3
                seen += 1
            if r.view != "sax":
                apex, annulus = (np.linalg.inv(r.affine) @ [*heart.landmarks(r.phase)[m], 1] for m in ("apex", "mitral"))
                assert apex[1] < 45 < 80 < annulus[1]
                seen += 1
    assert seen >= 4


def test_a_stored_slice_lands_on_its_plane(made):
    "Pixels put back by `Cut.back` are those the scanner made, on the slice's own pixels, in its units and at its place."
    name = "phantom-10001"
    rng, heart = stream(name), digital_heart(10001)
    protocol = subject_protocol(rng, simulation=QUICK)
    planes = list(training_planes(heart, protocol, rng, moments(QUICK.moments, rng), QUICK.planes))
    store = SliceStore(made)
    numbers = [n for n in range(len(store)) if store.record(n).subject == name]
    assert len(numbers) == 2*len(planes)
    for n in numbers:
        record, plane = store.record(n), planes[store.record(n).pair]
        image, affine = getattr(plane, record.kind)
        assert (record.view, record.slice, record.phase, record.protocol) == (plane.view, plane.slice, plane.phase, protocol.name)
        back, inside = record.cut.back(store.image(n))
        line = record.cut.intensity
        assert back.shape == image.shape and inside.mean() > 0.5
        if record.kind == "thin":  # noise does not survive two resamplings, edges do
            error = (back - line.back(line(image)))[inside]
            assert np.sqrt(np.mean(error**2)) < 0.1*(line.high - line.low)
            assert np.corrcoef(back[inside], line.back(line(image))[inside])[0, 1] > 0.95
        for ij in ([0, 0], [127, 0], [30, 99]):  # one place by the square's affine and by the slice's
            by_square = record.affine @ [*ij, 0, 1]
            pixel = record.cut.to_source @ [*ij, 1]
            np.testing.assert_allclose(affine @ [*pixel[:2], 0, 1], by_square, atol=1e-5)


@pytest.mark.skipif(not shared_map(9).is_file(), reason="the published anatomies are not here")
def test_an_anatomy_lies_as_a_patient_does():
    "By its own labels, as above; nearer to the base a real RV rises to its outflow tract."
    heart, seen = label_heart("heart-09"), 0
    for r, image in simulated_slices("heart-09", simulation=Simulation(("acdc",), planes=12, moments=1)):
        assert r.heart == "healthy anatomy" and np.abs(image).max() <= 1
        if not 0.25 < r.s < 0.7: continue
        j, i = torch.meshgrid(torch.arange(0, 128, 4.), torch.arange(0, 128, 4.), indexing="ij")
        affine = torch.from_numpy(r.affine).float()
        labels = heart.labels(i[..., None]*affine[:3, 0] + j[..., None]*affine[:3, 1] + affine[:3, 3], r.phase)
        rv, lv = (np.array([x[labels == n].mean().item() for x in (i, j)]) for n in (1, 3))
        assert rv[0] < lv[0] - 15 and abs(rv[1] - lv[1]) < 12 and 66 < lv[0] < 84 and 54 < lv[1] < 74
        seen += 1
    assert seen >= 2


def test_thin_and_acquired_are_one_plane(made):
    "The same square and the same line of brightness; the acquired one is blurred and noisy, not moved."
    store = SliceStore(made)
    pairs = {}
    for n in range(len(store)):
        r = store.record(n)
        pairs.setdefault((r.subject, r.pair), {})[r.kind] = (r, store.image(n))
    for both in pairs.values():
        (thin, a), (acquired, b) = both["thin"], both["acquired"]
        np.testing.assert_array_equal(thin.affine, acquired.affine)
        assert thin.cut.intensity == acquired.cut.intensity and thin.s == acquired.s and thin.phase == acquired.phase
        assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.8 and not np.allclose(a, b, atol=0.05)


@pytest.mark.skipif(not ARRAYS.is_dir(), reason="ACDC is not here")
def test_sources_are_joined_and_added_to(tmp_path):
    for n in (1, 61, 71):
        for phase in ("ED", "ES"): os.symlink(ARRAYS.resolve()/f"patient{n:03d}_{phase}.npz", tmp_path/f"patient{n:03d}_{phase}.npz")
    jobs = source_jobs("phantoms,arrays", 1, data_dir=tmp_path, simulation=QUICK)
    only = prepare(tmp_path/"x.lmdb", dict(arrays=jobs["arrays"]), simulation=QUICK, workers=0)
    both = prepare(tmp_path/"x.lmdb", jobs, simulation=QUICK, workers=1)
    assert only.provenance["subjects"] == dict(train=1, tune=1, report=1) and both.slices == 2*QUICK.planes
    assert both.provenance["subjects"] == dict(train=2, tune=1, report=1)
    store = SliceStore(tmp_path/"x.lmdb")
    assert {(r.subject, r.spacing_mm) for r in map(store.record, range(len(store)))} == {
        ("phantom-10000", 1.4), ("acdc-001", None), ("acdc-061", None), ("acdc-071", None)}
    refused(prepare, tmp_path/"x.lmdb", jobs, simulation=Simulation(planes=4), workers=0, words="other parameters")


def test_a_stopped_run_goes_on_to_the_same_data_set(tmp_path):
    "Interrupted, and after that killed."
    code = (f"from mgdcr.dataset import *\nif __name__ == '__main__': prepare({str(tmp_path/'x.lmdb')!r}, "
            "dict(p=phantom_jobs(5, simulation=Simulation(('yardstick-1',), 2, 2))), workers=2, "
            "simulation=Simulation(('yardstick-1',), 2, 2), progress=lambda n, of: print(n, flush=True))")
    start = lambda: subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                                     cwd=ROOT, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    done = [0]
    for how in (signal.SIGINT, signal.SIGKILL):
        run = start()
        done.append(int(run.stdout.readline()))
        run.send_signal(how)
        run.stdout.read()
        assert run.wait(60) != 0 and not (tmp_path/"x.lmdb").exists() and partial_store(tmp_path/"x.lmdb").exists()
    run = start()
    done.append(int(run.stdout.readline()))
    assert run.wait(300) == 0 and not partial_store(tmp_path/"x.lmdb").exists()
    assert done[:2] == [0, 1] and done == sorted(set(done)) and done[-1] <= 5
    simulation = Simulation(("yardstick-1",), 2, 2)
    prepare(tmp_path/"y.lmdb", dict(p=phantom_jobs(5, simulation=simulation)), simulation=simulation, workers=1)
    assert contents(tmp_path/"x.lmdb") == contents(tmp_path/"y.lmdb")


@pytest.mark.skipif(not any(e.value == "mgdcr.jobs:Engine" for e in entry_points(group="papermill.engine")),
                    reason="mgdcr is not installed, so papermill knows nothing of its engine")
def test_the_notebook_as_a_user_runs_it(tmp_path):
    def papermill(*more):
        parameters = dict(count=2, planes=2, moments=2, presets="yardstick-1", out=tmp_path/"d/x.lmdb", out_dir=tmp_path/"results",
                          workers=2) | dict(zip(more[::2], more[1::2]))
        given = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
        return subprocess.run([sys.executable, "-m", "papermill", "nbs/prepare_data.ipynb", *given], cwd=ROOT, text=True,
                              capture_output=True, stdin=subprocess.DEVNULL, env=os.environ | dict(OMP_NUM_THREADS="1"))
    run = papermill()
    assert run.returncode == 0, run.stderr
    folder = tmp_path/"results/prepare_data"
    assert {p.name for p in folder.iterdir()} == {"prepare_data.ipynb", "summary.json", "figures"}
    assert sorted(p.name for p in (folder/"figures").iterdir()) == ["intensities.png", "sheet_phantom.png"]
    summary = json.loads((folder/"summary.json").read_text())
    assert summary["slices_made"] == 8 and summary["subjects"] == {"train": 2} and summary["parameters"]["simulation"]["planes"] == 2
    assert len(SliceStore(tmp_path/"d/x.lmdb")) == 8 and os.listdir(tmp_path/"d") == ["x.lmdb"]
    assert str(tmp_path) not in (folder/"prepare_data.ipynb").read_text() + (folder/"summary.json").read_text()
    for more, said in ((("seed", 5000), "no side"), (("planes", 3), "other parameters")):
        run = papermill(*more)
        assert run.returncode == 2 and said in run.stderr.strip().splitlines()[-1] and "Traceback" not in run.stderr
    assert len(SliceStore(tmp_path/"d/x.lmdb")) == 8


# data_prep

@pytest.mark.parametrize("script", ["acdc", "arrays", "dicom", "mnms2", "ukbiobank"])
def test_help_says_how_a_run_goes_on_and_what_was_left_out(script, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT/"data_prep"))
    with pytest.raises(SystemExit): importlib.import_module(script).main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "stopped and started again" in said and "(.csv)" in said and "left out of it, and why" in said
    assert "un on" in said and "https://" in said
