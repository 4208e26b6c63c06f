"Slices in and out of a data set: sides that never touch, runs that are killed, files that lie, workers of every kind."
import io
import itertools
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import lmdb
import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from mgdcr.dataset import (SIDES, Cut, HeartFrame, Intensity, Preparation, SliceDataset, SliceRecord, SliceStore, _close,
                           array_slices, augment, encode, folder_slices, heart_frame, n4, partial_store, random_moves,
                           side_of, splits, study_slices, upright, write_lmdb)
from mgdcr.study import Study, StudyError
from test_study import study as made_up_study

HERE = Path(__file__).parent
REAL, ACDC = (HERE.parents[0]/"../shared/data"/name for name in ("real_study/dicom", "acdc"))


def refused(call, *args, words=None, **options):
    "The one sentence with which input is refused."
    with pytest.raises(StudyError, match=words) as error: call(*args, **options)
    assert str(error.value).count("\n") == 0 and len(str(error.value)) < 300
    return str(error.value)


def source(subject, planes=3, seconds=0.0):
    "Planes of noise, thin and acquired; the same for the same subject."
    time.sleep(seconds)
    rng = np.random.default_rng(list(subject.encode()))
    for n in range(planes):
        thin = rng.uniform(-1, 1, (128, 128)).astype(np.float32)
        yield SliceRecord(subject, "sax", "thin", n, n, n/planes), thin
        yield SliceRecord(subject, "sax", "acquired", n, n, n/planes), thin/2


def jobs(count=4, **options):
    names = [f"phantom-{10000 + n}" for n in range(count)]
    return [(name, partial(source, name, **options)) for name in names]


def contents(path):
    "All keys and values of an LMDB, read by LMDB itself."
    _close(path)
    with lmdb.open(str(path), readonly=True, lock=False, create=False) as env, env.begin() as read:
        return dict(read.cursor())


@pytest.fixture
def made(tmp_path):
    "A small data set."
    write_lmdb(tmp_path/"small.lmdb", jobs(), {"source": "test"})
    return tmp_path/"small.lmdb"


def change(path, **values):
    "Write values under keys (with - for _), or delete the ones that are None."
    _close(path)
    with lmdb.open(str(path), map_size=2**24) as env, env.begin(write=True) as write:
        for key, value in values.items():
            key = key.replace("_", "-").lstrip("k").encode()
            write.delete(key) if value is None else write.put(key, value)
    (path/"lock.mdb").unlink(missing_ok=True)


# Sides

def test_sides_never_touch():
    "Each number is on one side at most, each name in one family at most."
    for family in splits()["families"]:
        ranges = sorted(family.get("sides", {}).values())
        assert all(first <= last for first, last in ranges)
        assert all(a[1] < b[0] for a, b in itertools.pairwise(ranges)), family["name"]
        assert set(family.get("sides", {})) <= set(SIDES)
    names = ["phantom-5", "heart-03", "heart-03-v0005", "acdc-001", "patient001", "1234567_20208_2_0", "somebody",
             "p-0123456789ab", "p-0123456789ab-2"]
    for name in names: assert sum(bool(re.fullmatch(f["name"], name)) for f in splits()["families"]) <= 1
    assert abs(sum(splits()["others"].values()) - 1) < 1e-9


def test_sides_are_those_of_the_design():
    expected = {"phantom-{}": dict(demo=range(100), tune=range(100, 200), report=range(200, 300),
                                     train=range(10000, 10050)),
                "heart-{:02d}": dict(train=range(1, 9), tune=range(9, 11), report=range(11, 13)),
                "acdc-{:03d}": dict(train=range(1, 61), tune=range(61, 71), report=range(71, 81))}
    for name, sides in expected.items():
        for side, numbers in sides.items(): assert {side_of(name.format(n)) for n in numbers} == {side}
    for n in range(1, 13): assert side_of(f"heart-{n:02d}-v0017") == side_of(f"heart-{n:02d}")
    for n in range(1, 81): assert side_of(f"patient{n:03d}") == side_of(f"acdc-{n:03d}")
    for nobody in ("phantom-300", "phantom-9999", "heart-13", "acdc-081", "patient150"):
        refused(side_of, nobody, words="no side")


def test_others_keep_their_side():
    "Forever: a name's side must not change with a version, or what was trained on becomes what is reported."
    other = {n: side_of(f"person-{n}") for n in range(16)}
    assert {n: side for n, side in other.items() if side != "train"} == {0: "tune", 8: "tune", 9: "report"}
    assert side_of("2345678_20208_2_0") == side_of("2345678_20209_3_0")
    keyed = [f"p-{n:012x}" for n in range(40)]
    assert len({side_of(name) for name in keyed}) == 3
    for name in [*keyed, "somebody", "patient-12", "acdc-071", "heart-11"]:
        for again in ("_exam2", "_exam13", *(["-2", "-13"] if name in keyed else [])): assert side_of(name + again) == side_of(name)
    assert side_of("x", {"tune": 1.0}) == "tune"


def test_no_subject_on_two_sides(made):
    store = SliceStore(made)
    sides = {}
    for n in range(len(store)): sides.setdefault(store.record(n).subject, set()).add(store.record(n).split)
    assert len(sides) == 4 and all(len(s) == 1 for s in sides.values())
    wrong = json.loads(contents(made)[b"record-00001"]) | {"split": "report"}
    change(made, record_00001=json.dumps(wrong).encode())
    refused(SliceDataset, made, "train", words="two sides")


def test_splits_are_shipped():
    assert '"splits.json"' in (HERE.parent/"setup.py").read_text()
    assert "include mgdcr/splits.json" in (HERE.parent/"MANIFEST.in").read_text().splitlines()


# Writing

def test_workers_change_nothing(tmp_path):
    about = {"source": "test", "pixel_mm": 1.4}
    one = write_lmdb(tmp_path/"one.lmdb", jobs(), about)
    two = write_lmdb(tmp_path/"two.lmdb", jobs(), about, workers=2)
    assert one == two and contents(tmp_path/"one.lmdb") == contents(tmp_path/"two.lmdb")
    assert one["slices"] == {"train/sax/acquired": 12, "train/sax/thin": 12} and one["parameters"] == about
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.lmdb", "two.lmdb"]


def running(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError: return False


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_goes_on(tmp_path, workers):
    "Killed without warning: nothing half-written, no process left behind, and what was done is not done again."
    path = tmp_path/"x.lmdb"
    code = (f"import sys; sys.path.insert(0, {str(HERE)!r}); import test_dataset as t; from pathlib import Path\n"
            f"if __name__ == '__main__': t.write_lmdb({str(path)!r}, t.jobs(40, seconds=0.15), dict(a=1), {workers}, "
            "progress=lambda n, of: print(n, flush=True))")
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=HERE.parent)
    for line in run.stdout:
        if int(line) == 5: break
    listed = Path(f"/proc/{run.pid}/task/{run.pid}/children")  # Linux
    children = [int(c) for c in listed.read_text().split()] if listed.exists() else []
    run.kill()
    run.wait()
    assert not path.exists()
    refused(SliceStore(path).image, 0, words="no data set")
    done = sum(key.startswith(b"subject-") for key in contents(partial_store(path)))
    assert 5 <= done < 40
    late = time.monotonic() + 20
    while any(map(running, children)) and time.monotonic() < late: time.sleep(0.1)
    assert not any(map(running, children))
    seen = []
    write_lmdb(path, jobs(40), dict(a=1), progress=lambda n, of: seen.append(n))
    assert seen == list(range(done + 1, 41)) and not partial_store(path).exists()
    write_lmdb(tmp_path/"y.lmdb", jobs(40), dict(a=1))
    assert contents(path) == contents(tmp_path/"y.lmdb")


def test_an_interrupted_run_goes_on(tmp_path):
    def stop(n, of):
        if n == 2: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): write_lmdb(tmp_path/"x.lmdb", jobs(), progress=stop)
    refused(write_lmdb, tmp_path/"x.lmdb", jobs(), dict(other=1), words="other parameters")
    write_lmdb(tmp_path/"x.lmdb", jobs())
    assert len(SliceStore(tmp_path/"x.lmdb")) == 24 and len(list(tmp_path.iterdir())) == 1


def test_two_runs_at_once(tmp_path):
    again = lambda n, of: refused(write_lmdb, tmp_path/"x.lmdb", jobs(), words="Another run")
    write_lmdb(tmp_path/"x.lmdb", jobs(2), progress=again)


def test_subjects_are_added_while_readers_read(made):
    old = SliceDataset(made)
    first = old[0]["x_start"]
    more = write_lmdb(made, jobs(6), {"source": "test"})
    assert more["subjects"] == {"train": 6} and len(SliceDataset(made)) == 18
    assert torch.equal(old[0]["x_start"], first)


def test_what_is_not_ours_is_left_alone(tmp_path):
    (tmp_path/"mine").mkdir()
    (tmp_path/"mine/thesis.txt").touch()
    refused(write_lmdb, tmp_path/"mine", jobs(), words="no data set")
    assert (tmp_path/"mine/thesis.txt").exists() and len(list(tmp_path.iterdir())) == 1


def none(): return []
def unreadable(): raise StudyError("It cannot be read.")
def wrong_size(): yield SliceRecord("x", "sax"), np.zeros((64, 64))
def not_numbers(): yield SliceRecord("x", "sax"), np.full((128, 128), np.nan)
def dies(): os._exit(9)


def test_subjects_that_fail_are_told_and_stop_nothing(tmp_path):
    bad = [("a", none), ("b", unreadable), ("c", wrong_size), ("d", not_numbers), ("phantom-500", none)]
    made = write_lmdb(tmp_path/"x.lmdb", bad + jobs(1))
    assert list(made["left_out"]) == ["a", "b", "c", "d", "phantom-500"] and made["subjects"] == {"train": 1}
    refused(write_lmdb, tmp_path/"y.lmdb", bad, words="Not one subject")
    refused(write_lmdb, tmp_path/"z.lmdb", [], words="Not one subject")
    refused(write_lmdb, tmp_path/"w.lmdb", [*jobs(1), ("dead", dies)], workers=2, words="fewer workers")


def test_the_file_grows(tmp_path, monkeypatch):
    opened = lmdb.open
    small = lambda options: options | {"map_size": 2**18} if "map_size" in options else options
    monkeypatch.setattr(lmdb, "open", lambda path, **options: opened(path, **small(options)))
    write_lmdb(tmp_path/"x.lmdb", jobs())
    assert len(SliceStore(tmp_path/"x.lmdb")) == 24 and (tmp_path/"x.lmdb/data.mdb").stat().st_size > 2**18


# Reading

@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_read_after_their_parent_did(made, method):
    data = SliceDataset(made, kind="pair")
    alone = torch.stack([data[n]["acquired"] for n in range(len(data))])
    loader = torch.utils.data.DataLoader(data, 4, num_workers=2, multiprocessing_context=method)
    assert torch.equal(torch.cat([b["acquired"] for b in loader]), alone)
    assert torch.equal(torch.cat([b["acquired"] for b in loader]), alone)  # and again


def test_kinds(tmp_path):
    only = [("somebody", lambda: ((r, i) for r, i in source("somebody") if r.kind == "acquired"))]
    write_lmdb(tmp_path/"x.lmdb", jobs(1) + only)
    count = lambda kind: len(SliceDataset(tmp_path/"x.lmdb", None, kind=kind))
    assert [count(k) for k in ("any", "thin", "acquired", "pair")] == [6, 3, 6, 3]
    starts = lambda kind: SliceDataset(tmp_path/"x.lmdb", None, kind=kind)[0]["x_start"]
    assert torch.equal(starts("any"), starts("thin"))
    assert torch.allclose(starts("acquired"), starts("thin")/2, atol=4e-5)


def diffae_lmdb(folder, form, size=128, mode="RGB"):
    "As DiffAE's own scripts write theirs: encoded pictures, their keys, and the length."
    ramp = np.tile(np.linspace(0, 255, size).astype(np.uint8), (size, 1))
    with lmdb.open(str(folder), map_size=2**24) as env, env.begin(write=True) as write:
        for n in range(3):
            with io.BytesIO() as file:
                Image.fromarray(ramp).convert(mode).save(file, form)
                write.put(f"{size}-{n:05d}".encode(), file.getvalue())
        write.put(b"length", b"3")
    return ramp/127.5 - 1


@pytest.mark.parametrize("form, mode", [("jpeg", "RGB"), ("jpeg", "L"), ("png", "RGB"), ("png", "L")])
def test_data_sets_of_diffae(tmp_path, form, mode):
    ramp = diffae_lmdb(tmp_path/"ffhq.lmdb", form, 64, mode)
    data = SliceDataset(tmp_path/"ffhq.lmdb", split=None, size=64)
    assert len(data) == 3 and data[1]["x_start"].shape == (1, 64, 64)
    assert np.abs(data[1]["x_start"][0].numpy() - ramp).max() < 0.03
    refused(SliceDataset, tmp_path/"ffhq.lmdb", size=64, words="split=None")
    refused(SliceStore(tmp_path/"ffhq.lmdb").image, 0, words="128-00000")
    refused(write_lmdb, tmp_path/"ffhq.lmdb", jobs(), size=64, words="not made here")


def png(width, height, mode="L"):
    with io.BytesIO() as file:
        Image.new(mode, (width, height)).save(file, "png")
        return file.getvalue()


UNPICKLED = Path(tempfile.gettempdir())/f"unpickled-by-mgdcr-{os.getpid()}"  # what a bomb that goes off leaves behind


class Bomb:
    def __reduce__(self): return Path.touch, (UNPICKLED,)


PICTURES = {"empty": b"", "noise": os.urandom(3000), "cut short": encode(np.zeros((128, 128)))[:100],
            "pickle": pickle.dumps(Bomb()), "too small": png(64, 64), "not square": png(128, 64),
            "huge": png(9000, 9000, "1"), "palette": png(128, 128, "P"),
            "transparent": png(128, 128, "RGBA"), "long": png(128, 128) + bytes(10**6), "bmp": b"BM" + bytes(500)}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_that_are_none(made, name):
    change(made, k128_00000=PICTURES[name])
    refused(SliceStore(made).image, 0, words="128-00000 in the data set 'small.lmdb' is not usable")
    assert SliceStore(made).image(1).shape == (128, 128)


GOOD = json.loads(SliceRecord("phantom-10000", "sax", cut=Cut(np.eye(3), (128, 128), Intensity(0, 1))).to_json())
RECORDS = {"empty": b"", "noise": os.urandom(300), "pickle": pickle.dumps(Bomb()), "list": b"[1]",
           "deep": b"["*100000, "number": b"1", "long": b'{"subject": "' + b"x"*2**21 + b'"}',
           **{f"{key} {value!r}": json.dumps(GOOD | {key: value}).encode() for key, value in [
               ("subject", 7), ("view", None), ("kind", "thick"), ("split", "test"), ("pair", "1"), ("pair", True),
               ("s", "far"), ("s", float("nan")), ("s", 1e300), ("affine", [[1]]),
               ("affine", np.zeros((4, 4)).tolist()),
               ("affine", {}), ("affine", "x"), ("affine", [[10**400]*4]*4), ("cut", []), ("cut", {"size": 128}),
               ("cut", GOOD["cut"] | {"source": ["a", "b"]}), ("cut", GOOD["cut"] | {"source": 5}),
               ("cut", GOOD["cut"] | {"low": None}), ("more", 1), ("heart", [])]}}


@pytest.mark.parametrize("name", RECORDS)
def test_records_that_are_none(made, name):
    change(made, record_00000=RECORDS[name])
    refused(SliceStore(made).record, 0, words="record-00000 in the data set 'small.lmdb' is not usable")
    refused(SliceDataset, made)


def test_keys_that_are_missing(made):
    change(made, k128_00002=None, record_00003=None)
    refused(SliceStore(made).image, 2, words="missing")
    refused(SliceStore(made).record, 3, words="missing")
    for number in (24, -1):
        with pytest.raises(IndexError): SliceStore(made).image(number)
    for length in (None, b"", b"many", b"-3", b"9"*30):
        change(made, length=length)
        refused(len, SliceStore(made), words="length")
    change(made, length=b"24", provenance=b"[]")
    refused(lambda: SliceStore(made).provenance, words="provenance")


def test_files_that_are_no_lmdb(made, tmp_path):
    whole = (made/"data.mdb").read_bytes()
    bad = {"empty": b"", "text": b"data "*1000, "half": whole[:len(whole)//2//4096*4096], "header": whole[:8192],
           "zeros": bytes(100_000)}
    for name, data in bad.items():
        (tmp_path/name).mkdir()
        (tmp_path/name/"data.mdb").write_bytes(data)
        refused(len, SliceStore(tmp_path/name), words="damaged")
    refused(len, SliceStore(tmp_path/"nowhere"), words="no data set")


def test_nothing_is_unpickled(): assert not UNPICKLED.exists()


# From the scanner to the square, and back

def planned(study, turn_deg, flip):
    "The same study with the pixels of its slices turned in plane, or each slice seen from behind, as if planned so."
    angle = np.radians(turn_deg)
    for view in study.views.values():
        H, W = view.images.shape[2:]
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        if flip: turn = turn @ np.diag([-1.0, 1.0])
        pixels = np.eye(3)
        pixels[:2, :2] = turn
        pixels[:2, 2] = (np.eye(2) - turn) @ [(W - 1)/2, (H - 1)/2]
        cut = Cut(pixels, (H, W), Intensity(float(view.images.min()), float(view.images.max())), H)
        view.images = np.array([[cut.intensity.back(cut(f)) for f in film] for film in view.images])
        whole = np.eye(4)
        whole[np.ix_((0, 1, 3), (0, 1, 3))] = pixels
        whole[2, 2] = np.linalg.det(turn)
        view.affines = view.affines @ whole
    return study


def blob(study):
    "A bright spot beside the ring of every slice: nothing of a made-up study is the same when mirrored."
    for view in study.views.values():
        y, x = np.mgrid[:view.images.shape[2], :view.images.shape[3]]
        view.images = view.images + 150*np.exp(-((x - 24)**2 + (y - 38)**2)/8).astype(np.float32)
    return study


@pytest.mark.parametrize("turn, flip", [(50, False), (180, False), (0, True), (-70, True)])
def test_the_square_does_not_depend_on_how_the_slices_were_planned(turn, flip):
    "However the technologist turned the field of view, and from whichever side the slices are seen."
    plain, other = blob(made_up_study()), planned(blob(made_up_study()), turn, flip)
    frame = heart_frame(plain)
    for name, view in plain.views.items():
        assert view.images.shape[2] == view.images.shape[3]
        for a, b, one, two in zip(view.affines, other.views[name].affines, view.images, other.views[name].images):
            square = upright(a, frame, name, 1.4)
            np.testing.assert_allclose(upright(b, frame, name, 1.4), square, atol=1e-9)
            cuts = [Cut.between(affine, view.images.shape[2:], square, Intensity(0, 400)) for affine in (a, b)]
            seen, again = cuts[0](one[0]), cuts[1](two[0])
            y, x = np.mgrid[:128, :128] - 63.5
            rms = lambda change: np.sqrt(np.mean(change[np.hypot(x, y) < 35]**2))
            assert rms(seen - again) < 0.04 < 0.1 < rms(seen[:, ::-1] - again), rms(seen - again)


@pytest.mark.parametrize("options", [dict(), dict(centring="crossings"), dict(normalisation="minmax"),
                                     dict(normalisation="zscore"), dict(pixel_mm=2.0, size=96)])
def test_every_option_goes_through(options):
    study, preparation = made_up_study(lax=("lax_2ch", "lax_4ch")), Preparation(**options)
    made = list(study_slices(study, preparation, frames=2))
    assert len(made) == (4 + 2)*2 and {r.frame for r, _ in made} == {0, study.frames//2}
    for record, image in made:
        assert image.shape == (preparation.size,)*2 and -1 <= image.min() < image.max() <= 1
        np.testing.assert_allclose(np.linalg.norm(record.affine[:3, :2], axis=0), preparation.pixel_mm)
        assert np.linalg.det(record.affine[:3, :3]) > 0
        assert SliceRecord.from_json(record.to_json()).subject == study.subject


@pytest.mark.parametrize("options", [dict(orientation="up"), dict(centring="eye"), dict(normalisation="none"),
                                     dict(size=5), dict(pixel_mm=0), dict(pixel_mm="1.4")])
def test_options_that_do_not_exist(options): refused(Preparation, **options)


def test_labels_that_are_not_there(tmp_path):
    folder = made_up_study().save(tmp_path/"one")
    refused(lambda: list(folder_slices(folder, Preparation(orientation="labels"))), words="no labels")
    refused(lambda: list(study_slices(made_up_study(lax=()), Preparation(centring="crossings"))), words="long-axis")


def test_labels_beside_a_study(tmp_path):
    "The RV to the left wherever the labels say it is."
    study = made_up_study()
    folder = study.save(tmp_path/"one")
    image = nib.load(folder/"sax.nii.gz")
    labels = np.zeros(image.shape[:3], np.uint8)
    W, H = labels.shape[:2]
    x, y = np.mgrid[:W, :H]
    labels[np.hypot(x - W/2, y - H/2) < 8] = 3
    labels[np.hypot(x - W/2 + 4, y - H/2 - 16) < 6] = 1
    nib.save(nib.Nifti1Image(labels, image.affine), folder/"sax_labels_ed.nii.gz")
    frame = None
    by_labels = Preparation(orientation="labels", centring="labels", pixel_mm=2.0)
    for record, _ in folder_slices(folder, by_labels, frames=1):
        if record.view != "sax": continue
        to_square = np.linalg.inv(record.cut.to_source)
        lv, rv = (to_square @ [i, j, 1] for i, j in ((W/2, H/2), (W/2 - 4, H/2 + 16)))
        assert rv[0] < lv[0] and abs(rv[1] - lv[1]) < 1
        frame = record
    assert frame is not None


@pytest.mark.skipif(find_spec("SimpleITK") is not None, reason="SimpleITK is installed")
def test_bias_correction_says_what_it_needs():
    refused(lambda: list(study_slices(made_up_study(), Preparation(bias_field=True))), words="pip install SimpleITK")


@pytest.mark.skipif(find_spec("SimpleITK") is None, reason="SimpleITK is not installed")
def test_bias_correction_flattens():
    y, x = np.mgrid[:96, :96]/48 - 1
    truth = 100 + 50*(np.hypot(x, y) < 0.5) + np.random.default_rng(0).normal(0, 2, (96, 96))
    film = np.stack([truth*np.exp(0.5*x)]*3)
    flat, field = n4(film)
    np.testing.assert_allclose(flat*field, film, rtol=1e-5)
    assert np.std(flat[0]/truth) < 0.65*np.std(film[0]/truth)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real study is not here")
def test_a_real_study_there_and_back():
    "Geometry and motion alone; the RV's side, the LV's place, and the way back into the patient."
    study = Study.load(REAL, "real-study")
    frame = heart_frame(study)
    np.testing.assert_allclose(frame.axes @ frame.axes.T, np.eye(3), atol=1e-9)
    lv = study.centre_line()
    for record, image in study_slices(study, frames=1):
        view = study.views[record.view]
        affine, film = view.affines[record.slice], view.images[record.slice]
        source = film[record.frame][:record.cut.source[0], :record.cut.source[1]]
        back, inside = record.cut.back(image)
        line = record.cut.intensity
        kept = line.back(line(source))
        assert inside.mean() > 0.25 and np.sqrt(np.mean((back - kept)[inside]**2)) < 0.04*(line.high - line.low)
        for ij in ([0, 0, 1], [127, 5, 1]):
            by_slice = affine[:3, [0, 1, 3]] @ record.cut.to_source @ ij
            np.testing.assert_allclose(record.affine[:3, [0, 1, 3]] @ ij, by_slice, atol=1e-6)
        if record.view != "sax": continue
        i, j = (np.linalg.inv(record.affine) @ [*lv.at(affine), 1])[:2]
        assert 64 < i < 90 and 50 < j < 78, "the LV is in the middle, a little to the right"
        left, right = image[50:85, 25:50].mean(), image[50:85, 100:125].mean()
        assert left > right + 0.2 or not 0.1 < record.s < 0.6, "RV on the left, lung on the right"
        assert (np.linalg.inv(affine) @ [*lv.at(affine), 1])[2] == pytest.approx(0, abs=1e-6)


@pytest.mark.skipif(not ACDC.is_dir(), reason="ACDC is not here")
def test_acdc_is_turned_by_its_labels():
    "Numbers only: in the squares, the RV's labels lie left of the LV's, at its height, and the heart in the middle."
    for number in ("003", "012", "021"):
        files = [np.load(ACDC/f"patient{number}_{n}.npz") for n in ("ED", "ES")]
        stacks = {frame: (file["image"], file["label"]) for frame, file in enumerate(files)}
        made = list(array_slices(f"acdc-{number}", stacks))
        assert len(made) == 2*len(stacks[0][0]) and all(r.spacing_mm is None and r.affine is None for r, _ in made)
        s = [r.s for r, _ in made if r.frame == 0]
        assert np.allclose(np.diff(s), s[1] - s[0]) and 0 < np.median(s) < 1
        cut = made[0][0].cut
        labels = stacks[0][1]
        to_square = np.linalg.inv(cut.to_source)
        place = lambda n: (to_square @ np.r_[np.argwhere(np.isin(labels, n))[:, :0:-1].mean(0), 1])[:2]
        rv, lv, heart = place([1]), place([3]), place([1, 2, 3])
        assert rv[0] < lv[0] - 15 and abs(rv[1] - lv[1]) < 8
        np.testing.assert_allclose(heart, 63.5, atol=1e-6)
        low = [min(r.cut.intensity.low for r, _ in made), max(r.cut.intensity.low for r, _ in made)]
        assert low[0] == low[1], "one intensity map a subject, never one a slice"


# Augmentation

def handedness(picture):
    "Of three spots, bright, grey and dark: +1 as they were drawn, −1 where the picture is their mirror image."
    places = []
    for low, high in ((0.7, 1.1), (0.1, 0.6), (-0.5, -0.1)):
        found = np.argwhere((picture > low) & (picture < high))
        places.append(np.median(found, 0))
    a, b = places[1] - places[0], places[2] - places[0]
    return np.sign(a[0]*b[1] - a[1]*b[0])


def test_no_augmentation_mirrors_a_heart():
    "Whatever it draws, at a strength beyond any use: three spots keep their sense, and the map of pixels its sign."
    picture = torch.full((1, 1, 128, 128), -1.0)
    y, x = np.mgrid[:128, :128]
    for (j, i), level in (((48, 60), 0.9), ((70, 52), 0.35), ((72, 76), -0.3)):
        picture[0, 0, torch.from_numpy(np.hypot(y - j, x - i) < 8)] = level
    first = handedness(picture[0, 0].numpy())
    assert handedness(picture[0, 0].numpy()[:, ::-1]) == handedness(picture[0, 0].numpy()[::-1]) == -first
    batch = dict(x_start=picture.repeat(100, 1, 1, 1), acquired=picture.repeat(100, 1, 1, 1))
    for rotate, scale in ((10, 0.08), (80, 0.2)):
        varied = augment(batch, torch.Generator().manual_seed(1), rotate, scale, 0.04, gamma=0, bias=0, noise=0)
        for name in batch: assert {handedness(p[0].numpy()) for p in varied[name]} == {first}
        moves = random_moves(10_000, torch.Generator().manual_seed(2), rotate, scale)
        assert torch.linalg.det(moves[:, :, :2]).min() > 0


def test_no_preparation_mirrors_a_heart():
    "A stored square's pixels lead to its slice's by a proper rotation, in the patient and in the pixels."
    rng = np.random.default_rng(0)
    for _ in range(200):
        axes = np.linalg.qr(rng.standard_normal((3, 3)))[0]
        axes *= np.sign(np.linalg.det(axes))
        affine = np.eye(4)
        affine[:3, :3] = np.linalg.qr(rng.standard_normal((3, 3)))[0]
        affine[:3, 2] = np.cross(affine[:3, 0], affine[:3, 1])
        for view in ("sax", "lax_2ch", "lax_3ch", "lax_4ch"):
            square = upright(affine, HeartFrame(rng.normal(0, 30, 3), axes), view, 1.4)
            assert np.linalg.det(square[:3, :3]) > 0
            if view == "sax" and abs(affine[:3, 2] @ axes[2]) > 0.8:
                assert square[:3, 2] @ axes[2] < 0, "one looks from the apex towards the base"
