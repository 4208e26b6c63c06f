"data_prep: tiny data sets in their official layouts become study folders; bad and hostile ones stop and tell nothing."
import csv, gzip, importlib, json, os, subprocess, sys, zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

from made_dicom import AXIS, FRAMES, SIZE, hand, write_slice, write_study
from mgdcr.study import Study, StudyError
from mgdcr.views import to_apex

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT/"data_prep"
REAL, ARRAYS = ROOT/"../shared/data/real_study/dicom", ROOT/"../shared/data/acdc"
sys.path.insert(0, str(SCRIPTS))
import common  # noqa: E402
acdc, mnms2, dicom, ukbiobank = map(importlib.import_module, ("acdc", "mnms2", "dicom", "ukbiobank"))

ES = 3
SHAPE, ZOOMS = (40, 36, 6), (2.0, 2.2, 9.0)


def as_user(script, *args):
    "Run a script as a user does: exit status and all that it printed."
    done = subprocess.run([sys.executable, SCRIPTS/f"{script}.py", *map(str, args)], cwd=SCRIPTS, capture_output=True,
                          text=True, env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)))
    return done.returncode, done.stdout + done.stderr


def rows(path):
    with open(path, newline="") as file: return list(csv.DictReader(file))


def everything(folder):
    "Every byte below a folder, gzip unpacked, with the names of files and folders."
    names = "\n".join(str(p.relative_to(folder)) for p in folder.rglob("*")).encode()
    return names + b"".join(gzip.decompress(p.read_bytes()) if p.suffix == ".gz" else p.read_bytes()
                            for p in folder.rglob("*") if p.is_file())


def heart(base_first=True):
    "ACDC labels (X, Y, slices, frames) of a tapering heart: pictures as usual, RV on the left and lower."
    x, y, k, t = np.ogrid[:SHAPE[0], :SHAPE[1], :SHAPE[2], :FRAMES]
    size = (1 - 0.1*(k if base_first else SHAPE[2] - 1 - k))*(1 - 0.15*(t == ES))
    r = np.hypot(ZOOMS[0]*(x - 22), ZOOMS[1]*(y - 18))/size
    rv = np.hypot(ZOOMS[0]*(x - 11), ZOOMS[1]*(y - 20))/size
    return np.select([r < 13, r < 20, rv < 15], [3, 2, 1], 0).astype(np.uint8)


def film_of(labels):
    "What the labels look like, with a chest wall up and noise."
    film = np.array([30.0, 200, 70, 220])[labels]
    film[:, :4] = 250
    return (film + np.random.default_rng(0).normal(0, 3, film.shape)).clip(0).astype(np.int16)


def write(path, data, affine, seconds=0.03, sform=None):
    "One NIfTI file with an affine as qform, and another one as sform where there is one."
    image = nib.Nifti1Image(data, affine)
    image.set_qform(affine, 1)
    image.set_sform(affine if sform is None else sform, 1)
    image.header.set_xyzt_units("mm", "sec")
    if data.ndim == 4: image.header["pixdim"][4] = seconds
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)


def plane(normal, spacing=ZOOMS, shape=SHAPE):
    "An affine (X, Y, Z) centred on 0; the slices go along the normal."
    i = np.cross(normal, [0.3, 0.5, 0.8])
    i /= np.linalg.norm(i)
    affine = np.eye(4)
    affine[:3, :3] = np.stack([i*spacing[0], np.cross(normal, i)*spacing[1], np.asarray(normal)*spacing[2]], 1)
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1)/2
    return affine


# ACDC

FLAT = np.diag([-ZOOMS[0], -ZOOMS[1], ZOOMS[2], 1])  # as the real headers are: no rotation, and an sform of 1 mm voxels


def acdc_patient(folder, number, base_first=True, affine=FLAT, sform=np.diag([-1.0, -1, 1, 1]), info="", **change):
    name = f"patient{number:03d}"
    labels = heart(base_first)
    film = film_of(labels)
    text = dict(ED=1, ES=ES + 1, Group="DCM", Height=184.0, NbFrame=FRAMES, Weight=95.0) | change
    where = folder/"training"/name
    write(where/f"{name}_4d.nii.gz", film, affine, sform=sform)
    for n in (0, ES):
        write(where/f"{name}_frame{n + 1:02d}.nii.gz", film[..., n], affine, sform=sform)
        write(where/f"{name}_frame{n + 1:02d}_gt.nii.gz", labels[..., n], affine, sform=sform)
    (where/"Info.cfg").write_text(info or "".join(f"{k}: {v}\n" for k, v in text.items()))
    return where


def test_acdc_as_a_user_runs_it(tmp_path):
    source, out = tmp_path/"database", tmp_path/"out"
    for n in (1, 4): acdc_patient(source, n, base_first=n == 1)
    (acdc_patient(source, 2)/"patient002_frame04_gt.nii.gz").unlink()
    acdc_patient(source, 3, NbFrame=FRAMES + 1)
    status, said = as_user("acdc", source, out, "--workers", 2)
    assert status == 1 and "3 done, 0 there already, 1 failed" in said
    assert sorted(p.name for p in out.iterdir()) == ["acdc-001", "acdc-002", "acdc-004", "acdc.csv"]
    log = rows(out/"acdc.csv")
    assert {r["subject"]: r["why"] for r in log if r["status"] == "failed"} == {
        "acdc-003": f"Info.cfg speaks of {FRAMES + 1} frames, the film has {FRAMES}."}
    assert [(r["subject"], r["part"], r["why"]) for r in log if r["status"] == "left out"] == [
        ("acdc-002", "sax_labels_es", "patient002_frame04_gt.nii.gz is missing.")]
    assert {p.name for p in (out/"acdc-001").iterdir()} == {
        "sax.nii.gz", "study.json", "labels.json", "sax_labels_ed.nii.gz", "sax_labels_es.nii.gz"}

    image = nib.load(out/"acdc-001/sax.nii.gz")
    np.testing.assert_allclose(image.header.get_zooms()[:3], ZOOMS, rtol=1e-5)  # not the sform's 1 mm
    np.testing.assert_array_equal(image.get_fdata(), film_of(heart()))
    for phase, n in (("ed", 0), ("es", ES)):
        labels = nib.load(out/f"acdc-001/sax_labels_{phase}.nii.gz")
        np.testing.assert_array_equal(labels.get_fdata(), heart()[..., n])
        np.testing.assert_array_equal(labels.affine, image.affine)
    assert json.loads((out/"acdc-001/labels.json").read_text()) == dict(frames=dict(sax=dict(ed=0, es=ES)), group="DCM")
    study = Study.load(out/"acdc-001")
    assert list(study.views) == ["sax"] and study.ed_frame == 0 and study.es_frame == ES
    assert study.patient == dict(height_cm=184.0, weight_kg=95.0) and study.sax.thickness_mm == ZOOMS[2]
    assert any("taken as the slice spacing" in w for w in study.warnings)
    assert any("one second" in w for w in study.warnings)  # 6 frames of 30 ms are no beat

    times = {p: p.stat().st_mtime_ns for p in out.rglob("*.nii.gz")}
    acdc_patient(source, 3)
    status, said = as_user("acdc", source, out)
    assert status == 0 and "1 done, 3 there already, 0 failed" in said
    assert {p: p.stat().st_mtime_ns for p in times} == times
    log = rows(out/"acdc.csv")
    assert sorted(r["subject"] for r in log if r["status"] == "done") == [f"acdc-00{n}" for n in (1, 2, 3, 4)]
    assert not [r for r in log if r["status"] == "failed"] and len([r for r in log if r["part"]]) == 1


@pytest.mark.parametrize("base_first", [True, False])
def test_acdc_hearts_lie_as_hearts_do(tmp_path, base_first):
    "The header's axes are nobody's: read literally, base would be apex and the heart its mirror image."
    acdc_patient(tmp_path, 1, base_first)
    assert acdc.main([str(tmp_path), str(tmp_path/"out")]) == 0
    affine = nib.load(tmp_path/"out/acdc-001/sax.nii.gz").affine
    where = lambda number: affine[:3] @ [*np.argwhere(heart(base_first)[..., 0] == number).mean(0), 1]
    along = affine[:3, 2]*(1 if base_first else -1)
    assert to_apex(along) == 1 and np.linalg.det(affine[:3, :3])*(-1 if base_first else 1) > 0  # seen from the apex
    right, front, up = where(1) - where(3)
    assert right > 5 and front > 0  # the right ventricle: right and in front of the left one
    wall = affine[:3] @ [20, 0, 0, 1] - affine[:3] @ [20, SHAPE[1] - 1, 0, 1]
    assert wall[1] > 0 and wall[2] > 0  # the upper border of the picture: front and head
    study = Study.load(tmp_path/"out/acdc-001")
    assert any("usual heart's" in w and "by the labels" in w for w in study.warnings)
    assert study.grid(4.0).affine[:3, 2] @ along > 0


def test_acdc_keeps_an_orientation_that_there_is(tmp_path):
    affine = plane(AXIS)
    acdc_patient(tmp_path, 1, affine=affine, sform=affine)
    assert acdc.main([str(tmp_path), str(tmp_path/"out")]) == 0
    np.testing.assert_allclose(nib.load(tmp_path/"out/acdc-001/sax.nii.gz").affine, affine, atol=1e-4)
    assert not [w for w in Study.load(tmp_path/"out/acdc-001").warnings if "usual heart" in w]


@pytest.mark.parametrize("why, spoil", [
    ("ES is '9'", lambda f: acdc_patient(f, 1, ES=9)), ("ED is '0'", lambda f: acdc_patient(f, 1, ED=0)),
    ("does not name the frames", lambda f: acdc_patient(f, 1, info="Group: DCM\n")),
    ("4d.nii.gz is missing", lambda f: (acdc_patient(f, 1)/"patient001_4d.nii.gz").unlink()),
    ("cannot be read", lambda f: (acdc_patient(f, 1)/"patient001_4d.nii.gz").write_bytes(b"\x1f\x8b nonsense")),
    ("not numbers", lambda f: write(acdc_patient(f, 1)/"patient001_4d.nii.gz", np.nan*film_of(heart()), FLAT)),
    ("no film", lambda f: write(acdc_patient(f, 1)/"patient001_4d.nii.gz", film_of(heart())[..., 0], FLAT)),
])
def test_acdc_refuses(tmp_path, why, spoil):
    spoil(tmp_path)
    assert acdc.main([str(tmp_path), str(tmp_path/"out")]) == 1
    assert [p.name for p in (tmp_path/"out").iterdir()] == ["acdc.csv"]
    (row,) = rows(tmp_path/"out/acdc.csv")
    assert row["status"] == "failed" and why in row["why"]


@pytest.mark.parametrize("why, spoil", [
    ("other labels", lambda p: write(p, heart()[..., 0]*2, FLAT)),
    ("another shape", lambda p: write(p, heart()[:-1, ..., 0], FLAT)),
    ("is empty", lambda p: write(p, 0*heart()[..., 0], FLAT)),
    ("another shape or voxel size", lambda p: write(p, heart()[..., 0], np.diag([-3.0, -3, 9, 1]))),
])
def test_labels_that_do_not_fit_are_left_out(tmp_path, why, spoil):
    spoil(acdc_patient(tmp_path, 1)/"patient001_frame01_gt.nii.gz")
    assert acdc.main([str(tmp_path), str(tmp_path/"out")]) == 0
    assert {p.name for p in (tmp_path/"out/acdc-001").glob("*labels_*")} == {"sax_labels_es.nii.gz"}
    assert why in rows(tmp_path/"out/acdc.csv")[0]["why"]


def test_labels_of_another_frame_are_left_out(tmp_path):
    where = acdc_patient(tmp_path, 1)
    write(where/"patient001_frame04.nii.gz", film_of(heart())[..., 1], FLAT)
    assert acdc.main([str(tmp_path), str(tmp_path/"out")]) == 0
    assert rows(tmp_path/"out/acdc.csv")[0]["why"] == "patient001_frame04 shows frame 2 of the film."


def test_label_files_disturb_neither_reading_nor_saving(tmp_path):
    acdc_patient(tmp_path, 1)
    acdc.main([str(tmp_path), str(tmp_path/"out")])
    folder = tmp_path/"out/acdc-001"
    study = Study.load(folder)
    before = {p.name: p.read_bytes() for p in folder.glob("*labels*")}
    study.save(folder)
    assert len(before) == 3 and {p.name: p.read_bytes() for p in folder.glob("*labels*")} == before
    np.testing.assert_array_equal(Study.load(folder).sax.images, study.sax.images)


def test_labels_of_slices_that_share_no_affine(tmp_path):
    film = np.zeros((4, 5, 1, 2), np.float32)
    for n in range(3): write(tmp_path/f"sax_{n:02d}.nii.gz", film, plane(AXIS, shape=(4, 5, n)))
    data = np.arange(60).reshape(4, 5, 3).astype(np.uint8) % 4
    common.write_labels(tmp_path, {("sax", "ed"): data}, {("sax", "ed"): 1}, "")
    for n in range(3):
        part = nib.load(tmp_path/f"sax_labels_ed_{n:02d}.nii.gz")
        np.testing.assert_array_equal(part.get_fdata()[..., 0], data[..., n])
        np.testing.assert_array_equal(part.affine, nib.load(tmp_path/f"sax_{n:02d}.nii.gz").affine)


# M&Ms-2

SWAP = np.array([0, 3, 2, 1], np.uint8)  # ours → theirs, and back


def mnms2_subject(folder, number, lax=True, axis=AXIS):
    "One subject: slices from base to apex, ES the fourth frame of the SAX film and the third of the LAX film."
    name, labels = f"{number:03d}", heart()
    where = folder/"MnM2/dataset"/name
    parts = dict(SA=(film_of(labels), SWAP[labels], plane(axis), ES))
    if lax:
        flat = np.roll(labels[:, :, :1], -1, axis=3)  # ES one frame earlier
        parts["LA"] = film_of(flat), SWAP[flat], plane(np.cross(AXIS, hand(85)), (2, 2, 8), (*SHAPE[:2], 1)), ES - 1
    for view, (film, truth, affine, es) in parts.items():
        write(where/f"{name}_{view}_CINE.nii.gz", film, affine, 0.15)
        for phase, n in (("ED", 0), ("ES", es)):
            write(where/f"{name}_{view}_{phase}.nii.gz", film[..., n], affine)
            write(where/f"{name}_{view}_{phase}_gt.nii.gz", truth[..., n], affine)
    (folder/"MnM2/dataset_information.csv").write_text(
        "SUBJECT_CODE,DISEASE,VENDOR,SCANNER,FIELD\n1,HCM,Philips Medical Systems,A,1.5\n2,NOR,SIEMENS,Avanto,3\n")
    return where


def test_mnms2_as_a_user_runs_it(tmp_path):
    out = tmp_path/"out"
    mnms2_subject(tmp_path, 1)
    far = mnms2_subject(tmp_path, 2)/"002_LA_CINE.nii.gz"
    affine = plane(np.cross(AXIS, hand(85)), (2, 2, 8), (*SHAPE[:2], 1))
    affine[:3, 3] += 500
    write(far, nib.load(far).get_fdata().astype(np.int16), affine, 0.15)
    mnms2_subject(tmp_path, 3, lax=False, axis=-AXIS)
    (mnms2_subject(tmp_path, 4)/"004_SA_CINE.nii.gz").unlink()
    status, said = as_user("mnms2", tmp_path/"MnM2", out, "--workers", 2)
    assert status == 1 and "3 done, 0 there already, 1 failed" in said
    study = Study.load(out/"mnms2-001")
    assert list(study.views) == ["sax", "lax_4ch"] and (study.ed_frame, study.es_frame) == (0, ES)
    assert study.source == dict(vendor="Philips", field=1.5) and study.sax.rr_ms[0] == pytest.approx(900)
    assert json.loads((out/"mnms2-001/labels.json").read_text()) == dict(
        frames=dict(sax=dict(ed=0, es=ES), lax_4ch=dict(ed=0, es=ES - 1)), group="HCM")
    for phase, n in (("ed", 0), ("es", ES)):
        labels = nib.load(out/f"mnms2-001/sax_labels_{phase}.nii.gz")
        np.testing.assert_array_equal(labels.get_fdata(), heart()[..., n])  # theirs are renumbered
        np.testing.assert_allclose(labels.affine, plane(AXIS), atol=1e-4)
        lax = nib.load(out/f"mnms2-001/lax_4ch_labels_{phase}.nii.gz")
        np.testing.assert_array_equal(lax.get_fdata(), heart()[:, :, :1, n])
        np.testing.assert_array_equal(lax.affine, nib.load(out/"mnms2-001/lax_4ch.nii.gz").affine)
    assert list(Study.load(out/"mnms2-002").views) == ["sax"]
    log = rows(out/"mnms2.csv")
    why = {(r["subject"], r["status"], r["part"]): r["why"] for r in log}
    assert "does not cross" in why["mnms2-002", "left out", "lax_4ch"]
    assert why["mnms2-003", "left out", "lax_4ch"] == "003_LA_CINE.nii.gz is missing."
    assert "towards what the header calls the base" in why["mnms2-003", "check", "sax_labels_ed"]
    assert why["mnms2-004", "failed", ""] == "004_SA_CINE.nii.gz is missing."
    assert not [r for r in log if r["subject"] == "mnms2-001" and r["part"]]
    assert not list((out/"mnms2-002").glob("lax*"))


# DICOM

WORDS = ["DOE^JANE", "PID-4711", "DOE^JOHN", "PID-0815", "Jane Doe", "1.2.826.7.7", "19991231", "ACME Hospital"]


def patient(folder, which, **more):
    write_study(folder, PatientID=WORDS[2*which + 1], PatientName=WORDS[2*which], StudyDate=WORDS[6],
                StudyInstanceUID=f"{WORDS[5]}.{which}", InstitutionName=WORDS[7], **more)


def test_dicom_of_many_patients_as_a_user_runs_it(tmp_path):
    source, out, key = tmp_path/"archive", tmp_path/"out", tmp_path/"key"
    patient(source/"Jane Doe", 0)
    patient(source/"x/y", 1)
    patient(source/"x/later", 1)
    for n, path in enumerate(sorted((source/"x/later").iterdir())):  # the same man, a year later
        ds = pydicom.dcmread(path)
        ds.StudyInstanceUID, ds.StudyDate, ds.SOPInstanceUID = "1.2.826.7.7.9", "20001231", f"1.2.826.7.7.8.{n}"
        ds.save_as(path)
    (source/"Jane Doe/broken.dcm").write_bytes(bytes(128) + b"DICM" + b"\x02\x00\x00\x00XX")
    (source/"notes.txt").write_text("nothing")
    status, said = as_user("dicom", source, out, "--key", key, "--workers", 2)
    assert status == 0 and "3 done" in said
    names = sorted(p.name for p in out.iterdir() if p.is_dir())
    assert len(names) == 3 and sum(n.endswith("-2") for n in names) == 1 and all(n.startswith("p-") for n in names)
    assert {tuple(Study.load(out/n).views) for n in names} == {("sax", "lax_2ch", "lax_3ch", "lax_4ch")}
    assert rows(out/"dicom.csv")[0] == dict(subject="", status="left out", part="",
                                            why="1 DICOM files are too damaged to tell whose they are.")
    assert not [w for w in WORDS if w.encode() in everything(out)]
    assert oct(key.stat().st_mode)[-3:] == "600"
    status, said = as_user("dicom", source, out, "--key", key)
    assert status == 0 and "0 done, 3 there already" in said and len(rows(out/"dicom.csv")) == 4


def test_dicom_of_one_patient_and_by_folder(tmp_path, capsys):
    patient(tmp_path/"in/anna", 0)
    patient(tmp_path/"in/berta", 1)
    write_slice(tmp_path/"in/berta", 50, AXIS, 5*AXIS, frames=1, PatientID=WORDS[3])
    (tmp_path/"in/berta/study.json").write_text('{"views": {"Se103": "ignore"}}')
    assert dicom.main([str(tmp_path/"in"), str(tmp_path/"out"), "--by-folder"]) == 0
    assert list(Study.load(tmp_path/"out/anna").views) == ["sax", "lax_2ch", "lax_3ch", "lax_4ch"]
    assert list(Study.load(tmp_path/"out/berta").views) == ["sax", "lax_2ch", "lax_4ch"]
    assert {r["part"]: r["why"][:7] for r in rows(tmp_path/"out/dicom.csv") if r["status"] == "left out"} == {
        "Se103": "as told", "Se50": "no cine"}
    assert dicom.main([str(tmp_path/"in/anna"), str(tmp_path/"out"), "--subject", "one"]) == 0
    assert (tmp_path/"out/one/sax.nii.gz").exists()
    assert dicom.main([str(tmp_path/"in"), str(tmp_path/"out"), "--subject", "two"]) == 1  # of two patients
    assert "2 patients" in rows(tmp_path/"out/dicom.csv")[-1]["why"]
    assert dicom.main([str(tmp_path/"in"), str(tmp_path/"out"), "--subject", "../two"]) == 2
    assert dicom.main([str(tmp_path/"none"), str(tmp_path/"out"), "--subject", "a"]) == 2


def test_dicom_by_a_list_of_names_and_a_damaged_file(tmp_path, capsys):
    patient(tmp_path/"in", 0)
    patient(tmp_path/"in/other", 1)
    secret = tmp_path/"in/other/DOE_JOHN_4.dcm"
    (tmp_path/"in/other/4_3.dcm").rename(secret)
    secret.write_bytes(secret.read_bytes()[:-100])
    names = tmp_path/"names.csv"
    names.write_text("id,name\nPID-0815,berta\n")
    assert dicom.main([str(tmp_path/"in"), str(tmp_path/"out"), "--names", str(names)]) == 1
    log = rows(tmp_path/"out/dicom.csv")
    assert log[0]["why"] == "1 patients are not in the list of names."
    assert log[1]["subject"] == "berta" and "truncated" in log[1]["why"]
    assert b"DOE_JOHN" not in everything(tmp_path/"out")
    assert "DOE_JOHN_4.dcm" in capsys.readouterr().err  # the terminal says which file it is
    assert [p.name for p in (tmp_path/"out").iterdir()] == ["dicom.csv"]


def test_a_key_is_kept_apart(tmp_path):
    patient(tmp_path/"in", 0)
    assert dicom.main([str(tmp_path/"in"), str(tmp_path/"out"), "--key", str(tmp_path/"out/key")]) == 2
    (tmp_path/"short").write_text("abc")
    with pytest.raises(StudyError, match="too short"): common.read_key(tmp_path/"short")
    name = common.namer(None, tmp_path/"a", tmp_path/"out", "x-")
    assert name("1") == common.namer(None, tmp_path/"a", tmp_path/"out", "x-")("1") != name("2")
    assert name("1") != common.namer(None, tmp_path/"b", tmp_path/"out", "x-")("1")


@pytest.mark.skipif(not REAL.is_dir(), reason="the real study is not here")
def test_dicom_on_the_real_study(tmp_path):
    assert dicom.main([str(REAL), str(tmp_path/"out"), "--subject", "real"]) == 0
    read, direct = Study.load(tmp_path/"out/real"), Study.from_dicom(REAL)
    assert list(read.views) == list(direct.views) and read.sax.series == direct.sax.series
    for name, view in direct.views.items():
        np.testing.assert_array_equal(read.views[name].images, view.images)
        np.testing.assert_allclose(read.views[name].affines, view.affines, atol=1e-4)
    assert [r["part"] for r in rows(tmp_path/"out/dicom.csv")] == ["Se10", ""]


# UK Biobank

DICM = bytes(128) + b"DICM"  # how a DICOM file begins
EIDS = [f"999999{n}" for n in range(5)]  # as long as an eid, and none


def zipped(path, folder, extra=()):
    "A zip in the official layout: files side by side, with a manifest; and what an attacker adds."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*.dcm")): archive.write(file, file.name)
        table = f"filename,patientid,date,series discription\n{file.name},{path.name[:7]},Jan 1, 2016,x\n"
        archive.writestr("manifest.cvs", table)
        for name, data in extra: archive.writestr(name, data)


def participant(folder, eid, scratch, extra=(), visit=2):
    folder.mkdir(exist_ok=True)
    sax, lax = scratch/f"{eid}s", scratch/f"{eid}l"
    write_study(sax, lax=(), PatientID=eid, description="CINE_segmented_SAX_b1")
    write_slice(sax, 2, AXIS, 10*AXIS, PatientID=eid, pixel=3.0)  # filmed once more below, as series 42
    write_slice(sax, 42, AXIS, 10*AXIS, PatientID=eid, rr=777.0)
    drawn = dict(PatientID=eid, description="CINE_segmented_SAX_InlineVF")
    for n in range(4): write_slice(sax, 60 + n, AXIS, 10*n*AXIS, **drawn)
    write_study(lax, sax=0, PatientID=eid, description="")
    for n, (number, degrees) in enumerate([(101, 25), (102, 85), (103, 145)]):
        write_slice(lax, number, np.cross(AXIS, hand(degrees)), 15*AXIS, PatientID=eid)
    zipped(folder/f"{eid}_20209_{visit}_0.zip", sax, extra)
    zipped(folder/f"{eid}_20208_{visit}_0.zip", lax)


def test_ukbiobank_as_a_user_runs_it(tmp_path):
    source, out, key = tmp_path/"bulk", tmp_path/"out", tmp_path/"key"
    participant(source, EIDS[0], tmp_path)
    participant(source, EIDS[1], tmp_path, [("../../escaped.txt", b"z"), ("/etc/escaped", b"x"), ("a/b/c.zip", b"PK")])
    participant(source, EIDS[2], tmp_path, [("../../escaped.dcm", DICM + bytes(50)), ("..\\escaped.dcm", b"y")])
    participant(source, EIDS[3], tmp_path)
    (source/f"{EIDS[3]}_20209_2_0.zip").unlink()
    participant(source, EIDS[4], tmp_path, visit=3)
    status, said = as_user("ukbiobank", source, out, "--key", key, "--workers", 2)
    assert "2 done, 0 there already, 2 failed" in said and status == 1
    assert not [eid for eid in EIDS if eid.encode() in everything(out) or eid in said]
    assert not list(tmp_path.rglob("*escaped*"))
    done = sorted(p for p in out.iterdir() if p.is_dir())
    assert len(done) == 2 and all(p.name.startswith("ukb-") for p in done)
    for folder in done:
        study = Study.load(folder)
        assert list(study.views) == ["sax", "lax_2ch", "lax_3ch", "lax_4ch"] and len(study.sax.images) == 4
        assert study.sax.rr_ms.tolist() == [800, 777, 840, 860]  # the slice that was filmed again
    log = rows(out/"ukbiobank.csv")
    parts = {(r["part"], r["why"]) for r in log if r["status"] == "left out"}
    assert {("Se60", "a drawn-on copy (InlineVF)"), ("Se2", "filmed again at the same place, as Se42")} <= parts
    failed = {r["why"] for r in log if r["status"] == "failed"}
    assert "There is no short-axis zip (field 20209)." in failed and len(failed) == 2
    status, said = as_user("ukbiobank", source, out, "--key", key)
    assert "0 done, 2 there already, 2 failed" in said and status == 1


def hostile(tmp_path, write):
    "Convert a participant whose short-axis zip is what `write` makes of a path: why it failed."
    path = tmp_path/"in"/f"{EIDS[0]}_20209_2_0.zip"
    path.parent.mkdir()
    write(path)
    assert ukbiobank.main([str(tmp_path/"in"), str(tmp_path/"out"), "--key", str(tmp_path/"key")]) == 1
    assert [p.name for p in (tmp_path/"out").iterdir()] == ["ukbiobank.csv"]
    assert EIDS[0].encode() not in everything(tmp_path/"out")
    return rows(tmp_path/"out/ukbiobank.csv")[-1]["why"]


def with_members(members):
    def write(path):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members: archive.writestr(name, data)
    return write


def flagged(path):
    "A zip that says its members are encrypted."
    with_members([("a.dcm", bytes(500))])(path)
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)): data[data.index(signature) + offset] |= 1
    path.write_bytes(data)


def lying(path):
    "A zip whose table declares a byte where a megabyte comes."
    with_members([("a.dcm", bytes(128) + b"DICM" + bytes(2**20))])(path)
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\1\2") + 24
    data[at:at + 4] = (200).to_bytes(4, "little")
    path.write_bytes(data)


@pytest.mark.parametrize("why, limits, write", [
    ("damaged", {}, lambda p: p.write_bytes(b"no zip at all")),
    ("damaged", {}, lambda p: p.write_bytes(b"")),
    ("damaged", {}, flagged),
    ("damaged", {}, lying),
    ("damaged", {}, lambda p: (with_members([("a.dcm", DICM)])(p), p.write_bytes(p.read_bytes()[:-60]))),
    ("more or larger files", dict(MAX_TOTAL=2**20), with_members([(f"{n}", DICM + bytes(2**17)) for n in range(9)])),
    ("more or larger files", dict(MAX_FILES=5), with_members([(f"{n}", b"") for n in range(9)])),
    ("larger than any real", dict(MAX_FILE=2**16), with_members([("a", DICM + bytes(2**17))])),
    ("larger than any real", dict(MAX_ZIP=100), with_members([("a", os.urandom(1000))])),
    ("larger than any real", dict(MAX_DIRECTORY=1000), with_members([(f"{n}", b"") for n in range(99)])),
    ("larger than any real", {}, with_members([("a", DICM + ukbiobank.DEFLATED + bytes(99))])),  # a bomb inside
    ("larger than any real", {}, lambda p: (with_members([("a", b"x")])(p), p.write_bytes(
        p.read_bytes()[:-22] + b"PK\6\6" + bytes(52) + b"PK\6\7" + bytes(16) + p.read_bytes()[-22:]))),  # zip64
    ("no MR image", {}, with_members([("a.dcm", b"text"), ("manifest.csv", b"x")])),
])
def test_hostile_zips(tmp_path, monkeypatch, why, limits, write):
    for name, value in limits.items(): monkeypatch.setattr(ukbiobank, name, value)
    assert why in hostile(tmp_path, write)


# What all share

def dies(source, subject, folder, notes):
    "A conversion that kills its process for one subject."
    if source == "bad": os._exit(9)
    folder.mkdir()
    (folder/"study.json").write_text("{}")


def fails(source, subject, folder, notes): raise KeyError(source)


def test_a_process_that_dies_takes_nobody_along(tmp_path):
    jobs = [(f"s{n}", "bad" if n == 1 else "good") for n in range(5)]
    assert common.run(dies, jobs, tmp_path/"out", "log", workers=2) == 1
    status = {r["subject"]: r["status"] for r in rows(tmp_path/"out/log.csv")}
    assert status == dict(s0="done", s1="failed", s2="done", s3="done", s4="done")


def test_an_unexpected_error_tells_no_path(tmp_path, capfd):
    assert common.run(fails, [("a", "/data/jane doe"), ("b", "/data/jane doe")], tmp_path, "log") == 1
    assert [r["why"] for r in rows(tmp_path/"log.csv")] == ["An unexpected KeyError; the terminal says where."]*2
    said = capfd.readouterr()
    assert "jane" not in said.err + said.out and "fails" in said.err


def test_a_folder_that_is_in_the_way_is_not_touched(tmp_path):
    (tmp_path/"a").mkdir()
    (tmp_path/"a/mine.txt").write_text("keep")
    assert common.run(dies, [("a", "good")], tmp_path, "log") == 1
    assert [p.name for p in (tmp_path/"a").iterdir()] == ["mine.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "log.csv"]
    with pytest.raises(StudyError, match="Two subjects"): common.run(dies, [("b", 1), ("b", 2)], tmp_path, "log")


@pytest.mark.parametrize("script, original", [
    *((name, "Not run on the original") for name in ("acdc", "mnms2", "ukbiobank")), ("dicom", "Run on a real study"),
    ("arrays", "which are not the original")])
def test_help_says_what_it_is_for_and_what_it_was_run_on(script, original, capsys):
    if script == "arrays": pytest.importorskip("mgdcr.dataset")
    with pytest.raises(SystemExit): importlib.import_module(script).main(["--help"])
    said = capsys.readouterr().out
    assert original in said and "https://" in said
    assert f"`{script}.py`" in (SCRIPTS/"README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("script, more", [("acdc", []), ("mnms2", []), ("dicom", ["--subject", "a"]),
                                          ("ukbiobank", ["--key", "k"]), ("arrays", [])])
def test_nothing_to_do_is_said_in_one_sentence(script, more, tmp_path, monkeypatch, capsys):
    if script == "arrays": pytest.importorskip("mgdcr.dataset")
    monkeypatch.chdir(tmp_path)
    (tmp_path/"empty").mkdir()
    status = importlib.import_module(script).main([str(tmp_path/"empty"), str(tmp_path/"out"), *more])
    said = capsys.readouterr().err.strip()
    assert (status == 2 or script == "dicom" and status == 1) and said.endswith(".") and "\n" not in said


# Arrays without geometry

def stack(folder, number, phase, **change):
    labels = np.kron(heart()[..., ES*(phase == "ES")].T, np.ones((1, 4, 4), np.uint8))  # (slices, rows, columns)
    images = np.kron(film_of(heart())[..., 0].T, np.ones((1, 4, 4))).astype(np.uint16)
    np.savez_compressed(folder/f"patient{number:03d}_{phase}.npz", **dict(image=images, label=labels) | change)


def test_arrays_fill_a_data_set(tmp_path):
    pytest.importorskip("mgdcr.dataset")
    from mgdcr.dataset import SliceStore
    for n in (1, 61, 62, 63, 64):
        for phase in ("ED", "ES"): stack(tmp_path, n, phase)
    (tmp_path/"patient062_ES.npz").unlink()
    stack(tmp_path, 63, "ED", label=np.full((6, 144, 160), 7, np.uint8))
    (tmp_path/"patient064_ED.npz").write_bytes(b"no arrays")
    status, said = as_user("arrays", tmp_path, tmp_path/"made/arrays.lmdb", "--workers", 2)
    assert status == 1 and "2 done, 3 failed" in said
    why = {r["subject"]: r["why"] for r in rows(tmp_path/"made/arrays.csv")}
    assert why == {"acdc-001": "", "acdc-061": "", "acdc-062": "patient062_ES.npz is missing.",
                   "acdc-063": "patient063_ED.npz holds other labels than 0 to 3.",
                   "acdc-064": "patient064_ED.npz cannot be read: it needs the arrays image and label."}
    store = SliceStore(tmp_path/"made/arrays.lmdb")
    records = [store.record(n) for n in range(len(store))]
    assert len(records) == 2*2*6
    assert {(r.subject, r.split) for r in records} == {("acdc-001", "train"), ("acdc-061", "tune")}
    assert {(r.view, r.kind, r.spacing_mm, r.affine is None, r.frame) for r in records} == {
        ("sax", "acquired", None, True, 0), ("sax", "acquired", None, True, 1)}
    for n in (62, 63, 64): stack(tmp_path, n, "ED"), stack(tmp_path, n, "ES")
    status, said = as_user("arrays", tmp_path, tmp_path/"made/arrays.lmdb")
    assert status == 0 and len(SliceStore(tmp_path/"made/arrays.lmdb")) == 5*2*6
    assert {r["status"] for r in rows(tmp_path/"made/arrays.csv")} == {"done"}


@pytest.mark.skipif(not ARRAYS.is_dir(), reason="the arrays are not here")
def test_arrays_on_what_there_is(tmp_path):
    pytest.importorskip("mgdcr.dataset")
    from mgdcr.dataset import SliceStore
    for n in (1, 80):
        for phase in ("ED", "ES"):
            name = f"patient{n:03d}_{phase}.npz"
            os.symlink(ARRAYS.resolve()/name, tmp_path/name)
    assert importlib.import_module("arrays").main([str(tmp_path), str(tmp_path/"a.lmdb")]) == 0
    store = SliceStore(tmp_path/"a.lmdb")
    assert {store.record(n).split for n in range(len(store))} == {"train", "report"}
