"Studies in and out, bad input refused before anything is written, and no identity in any file."
import gzip
import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

from made_dicom import AXIS, FRAMES, PIXEL, SIZE, hand, ring, write_slice, write_study
from mgdcr.study import Study, StudyError, View, safe_subject

REAL = Path(__file__).parents[1]/"../shared/data/real_study/dicom"


def plane(normal, centre, size=SIZE, pixel=PIXEL):
    i = np.cross(normal, [0.3, 0.5, 0.8])
    i /= np.linalg.norm(i)
    affine = np.eye(4)
    affine[:3, :3] = np.stack([pixel*i, pixel*np.cross(normal, i), normal], 1)
    affine[:3, 3] = np.asarray(centre) - affine[:3, :3] @ [(size - 1)/2, (size - 1)/2, 0]
    return affine


def view(name, affines, frames=FRAMES, thickness=8.0):
    S = len(affines)
    film = np.array([ring(t, frames) for t in range(frames)], np.float32)
    rr = 800.0 + 20*np.arange(S)
    return View(name, np.repeat(film[None], S, 0), np.array(affines), thickness, (PIXEL, PIXEL),
                np.arange(frames)/frames*rr[:, None]/1000, rr, [f"{name}_{s:02d}" for s in range(S)])


def study(slices=4, gap=10.0, frames=FRAMES, lax=("lax_4ch",)):
    clock = dict(lax_2ch=25, lax_4ch=85, lax_3ch=145)
    views = dict(sax=view("sax", [plane(AXIS, n*gap*AXIS) for n in range(slices)], frames))
    views |= {n: view(n, [plane(np.cross(AXIS, hand(clock[n])), 15*AXIS)], frames, 6.0) for n in lax}
    return Study("made-up", views)


def corners(v):
    return np.array([[i, j, 0, 1] for i in (0, v.images.shape[3]) for j in (0, v.images.shape[2])], float).T


def assert_same(a, b):
    assert list(a.views) == list(b.views)
    for name, v in a.views.items():
        w = b.views[name]
        assert np.abs((w.affines - v.affines) @ corners(v)).max() < 1e-3
        np.testing.assert_array_equal(w.images, v.images)
        np.testing.assert_allclose(w.times, v.times)
        np.testing.assert_allclose(w.rr_ms, v.rr_ms)
        assert w.thickness_mm == v.thickness_mm and w.series == v.series
        np.testing.assert_allclose(w.acquired_mm, v.acquired_mm)
        np.testing.assert_array_equal(w.mask, v.mask)


def refused(call, *args, words=None, **options):
    with pytest.raises(StudyError, match=words) as error: call(*args, **options)
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text and len(text) < 320
    return text


def test_round_trip(tmp_path):
    s = study(lax=("lax_2ch", "lax_3ch", "lax_4ch"))
    s.ed_frame, s.es_frame, s.patient, s.source = 1, 3, dict(age=60, sex="F"), dict(vendor="GE", field=1.5)
    s.given_poses = {n: np.random.default_rng(0).normal(size=(len(v.images), 6)) for n, v in s.views.items()}
    again = Study.load(s.save(tmp_path/"a"))
    assert_same(s, again)
    assert (again.ed_frame, again.es_frame, again.patient, again.source) == (1, 3, s.patient, s.source)
    for name in s.views: np.testing.assert_allclose(again.given_poses[name], s.given_poses[name], rtol=1e-7)
    assert sorted(p.name for p in (tmp_path/"a").iterdir()) == [
        "lax_2ch.nii.gz", "lax_3ch.nii.gz", "lax_4ch.nii.gz", "poses.csv", "sax.nii.gz", "study.json"]
    assert_same(again, Study.load(again.save(tmp_path/"a")))  # saving over itself


def test_round_trip_of_slices_that_share_no_affine(tmp_path):
    s = study()
    s.sax.affines[1, :3, 3] += 0.01*AXIS  # unequal gaps
    names = {p.name for p in s.save(tmp_path/"a").iterdir()}
    assert {"sax_00.nii.gz", "sax_03.nii.gz"} <= names and "sax.nii.gz" not in names
    assert_same(s, Study.load(tmp_path/"a"))
    t = study()
    t.sax.affines[:, :3, 3] += np.arange(4)[:, None]*hand(0)  # sheared
    assert (t.save(tmp_path/"b")/"sax_02.nii.gz").exists()
    assert_same(t, Study.load(tmp_path/"b"))
    study().save(tmp_path/"b")  # one file again: the old ones are gone
    assert not list((tmp_path/"b").glob("sax_*"))


def test_saving_touches_nothing_else_and_nothing_at_all_when_refused(tmp_path):
    (tmp_path/"a").mkdir()
    (tmp_path/"a"/"mine.txt").write_text("keep")
    study().save(tmp_path/"a")
    before = {p.name: p.read_bytes() for p in (tmp_path/"a").iterdir()}
    bad = study()
    bad.sax.images[0, 0, 0, 0] = np.nan
    refused(bad.save, tmp_path/"a")
    refused(bad.save, tmp_path/"b")
    assert {p.name: p.read_bytes() for p in (tmp_path/"a").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_dicom_to_nifti_and_back(tmp_path):
    s = Study.from_dicom(write_study(tmp_path/"d"), subject="x")
    assert set(s.views) == {"sax", "lax_2ch", "lax_3ch", "lax_4ch"}
    assert_same(s, Study.load(s.save(tmp_path/"n")))


def test_dicom_stack_of_different_sizes_and_frames(tmp_path):
    write_study(tmp_path)
    write_slice(tmp_path, 2, AXIS, 10*AXIS, shape=(40, 44), frames=FRAMES)
    write_slice(tmp_path, 3, AXIS, 20*AXIS, frames=FRAMES - 1)
    (tmp_path/"3_6.dcm").unlink()  # the sixth frame of the first writing
    s = Study.from_dicom(tmp_path)
    assert s.sax.images.shape == (4, FRAMES, SIZE, SIZE) and s.sax.mask[1].sum() == 40*44
    assert any("numbers of frames" in w for w in s.warnings)
    np.testing.assert_allclose(s.sax.at(0.0)[2], s.sax.images[2, 0])
    assert_same(s, Study.load(s.save(tmp_path/"n")))
    assert np.linalg.norm(np.cross(s.heart_centre(), AXIS)) < 3


@pytest.mark.skipif(not REAL.is_dir(), reason="the real study is not here")
def test_real_study(tmp_path):
    s = Study.from_dicom(REAL, subject="real")
    assert s.sax.series == ["Se11", "Se1", "Se2", "Se3", "Se4", "Se5"]
    assert {n: v.series for n, v in s.views.items() if n != "sax"} == dict(
        lax_2ch=["Se8"], lax_2ch_2=["Se9"], lax_3ch=["Se7"], lax_4ch=["Se6"])
    assert [d["view"] for d in s.decisions if d["series"] == "Se10"] == ["ignore"]
    assert 8 <= s.find_es() <= 11 and 75 < s.long_axis().length_mm < 105
    assert s.grid().shape == (75, 128, 128)
    assert_same(s, Study.load(s.save(tmp_path/"real")))
    t = Study.from_dicom(REAL, views={"Se9": "lax_2ch", "Se8": "ignore"})
    assert t.views["lax_2ch"].series == ["Se9"] and "lax_2ch_2" not in t.views


# --- bad input ---

def spoil(tmp_path, **changes):
    "A saved study, with values of study.json replaced."
    folder = study().save(tmp_path/"s")
    info = json.loads((folder/"study.json").read_text())
    (folder/"study.json").write_text(json.dumps(info | changes))
    return folder


def rewrite(path, data=None, affine=None):
    image = nib.load(path)
    data, affine = np.asarray(image.dataobj) if data is None else data, image.affine if affine is None else affine
    new = nib.Nifti1Image(data, None)
    new.header.set_zooms([1.0]*data.ndim)
    new.header["sform_code"], new.header["qform_code"] = 1, 0
    for row, name in enumerate(("srow_x", "srow_y", "srow_z")): new.header[name] = affine[row]
    new.header.set_sform(affine, 1)
    nib.save(new, path)


def test_no_sax(tmp_path):
    folder = study().save(tmp_path/"s")
    (folder/"sax.nii.gz").unlink()
    refused(Study.load, folder, words="no short-axis")
    lax = tmp_path/"lax"
    for n, degrees in ((1, 25), (2, 85), (3, 145)): write_slice(lax, n, np.cross(AXIS, hand(degrees)), [0, 0, 0])
    refused(Study.load, lax, words="No short-axis")
    refused(Study.load, tmp_path/"missing", words="no folder")


def test_one_sax_slice(tmp_path):
    refused(study(slices=1).check, words="only one slice")
    write_slice(tmp_path, 1, AXIS, [0, 0, 0], description="SAX")
    write_slice(tmp_path, 2, np.cross(AXIS, hand(85)), [0, 0, 0])
    refused(Study.from_dicom, tmp_path, words="Only one short-axis")


def test_sax_not_parallel(tmp_path):
    s = study()
    s.sax.affines[2] = plane((AXIS + 0.3*hand(0))/np.linalg.norm(AXIS + 0.3*hand(0)), 20*AXIS)
    refused(s.check, words="not parallel, sax_02")
    write_study(tmp_path)
    write_slice(tmp_path, 9, (AXIS + 0.3*hand(0))/np.linalg.norm(AXIS + 0.3*hand(0)), 15*AXIS)
    assert Study.from_dicom(tmp_path).sax.series == ["Se1", "Se2", "Se3", "Se4"]  # left out by itself
    told = refused(Study.from_dicom, tmp_path, views={str(n): "sax" for n in (1, 2, 3, 4, 9)}, words="not parallel")
    assert "Se9" in told


def test_sax_doubled_names_both_and_the_way_out(tmp_path):
    write_study(tmp_path)
    write_slice(tmp_path, 9, AXIS, 10.2*AXIS)
    text = refused(Study.from_dicom, tmp_path, words="same place")
    assert "Se2" in text and "Se9" in text
    leave = re.search(r"views=\{'(\w+)': 'ignore'\}", text)[1]
    assert len(Study.from_dicom(tmp_path, views={leave: "ignore"}).sax.images) == 4
    (tmp_path/"study.json").write_text(json.dumps(dict(views={leave: "ignore"})))  # the same, beside the files
    assert len(Study.load(tmp_path).sax.images) == 4


def test_nifti_slices_and_views_can_be_left_out(tmp_path):
    s = study(lax=("lax_2ch", "lax_4ch"))
    s.sax.affines[3, :3, 3] = s.sax.affines[2, :3, 3]
    bad = tmp_path/"s"
    good = study(lax=("lax_2ch", "lax_4ch"))
    good.save(bad)
    for n, a in enumerate(s.sax.affines): rewrite_slice(bad, n, a, good)
    (bad/"sax.nii.gz").unlink()
    text = refused(Study.load, bad, words="same place")
    leave = re.search(r"views=\{'(\w+)': 'ignore'\}", text)[1]
    left = Study.load(bad, views={leave: "ignore", "lax_2ch": "ignore"})
    assert len(left.sax.images) == 3 and list(left.views) == ["sax", "lax_4ch"]
    refused(Study.load, bad, views={"lax_3ch": "ignore"}, words="no view or slice")


def rewrite_slice(folder, n, affine, s):
    affine = affine.copy()
    affine[:3, 2] *= 8
    nib.save(nib.Nifti1Image(s.sax.images[n].transpose(2, 1, 0)[:, :, None], affine), folder/f"sax_{n:02d}.nii.gz")


def test_missing_slice_is_named_and_the_rest_goes_on():
    s = study(slices=6)
    s.views["sax"] = s.sax.without({3})
    s.check().check()
    assert [w for w in s.warnings if "missing between sax_02 and sax_04" in w and "20.0 mm" in w] == s.warnings
    assert s.grid().shape[0] == int(np.ceil(68/1.4))


def test_frame_counts_that_disagree(tmp_path):
    s = study()
    s.sax.affines[1, :3, 3] += 0.3*AXIS
    folder = s.save(tmp_path/"s")
    rewrite(folder/"sax_02.nii.gz", np.asarray(nib.load(folder/"sax_02.nii.gz").dataobj)[..., :-1])
    assert "sax_02.nii.gz" in refused(Study.load, folder, words="frames")


def test_both_forms_of_a_stack(tmp_path):
    folder = study().save(tmp_path/"s")
    (folder/"sax_00.nii.gz").write_bytes((folder/"sax.nii.gz").read_bytes())
    refused(Study.load, folder, words="keep one")


@pytest.mark.parametrize("affine", [np.zeros((4, 4)), np.full((4, 4), np.nan), np.diag([1.0, 1, 0, 1])])
def test_zero_or_nan_affine(tmp_path, affine):
    folder = study().save(tmp_path/"s")
    rewrite(folder/"lax_4ch.nii.gz", affine=affine)
    assert "lax_4ch.nii.gz" in refused(Study.load, folder, words="affine")
    s = study()
    s.sax.affines[1] = affine
    refused(s.check, words="affine of sax, slice sax_01")


def test_nan_and_constant_images(tmp_path):
    folder = study().save(tmp_path/"s")
    data = np.asarray(nib.load(folder/"sax.nii.gz").dataobj).copy()
    data[3, 3, 1, 0] = np.nan
    rewrite(folder/"sax.nii.gz", data)
    assert "sax.nii.gz" in refused(Study.load, folder, words="not numbers")
    data[:, :, 1] = 7
    rewrite(folder/"sax.nii.gz", data)
    assert "sax_01" in refused(Study.load, folder, words="constant")


@pytest.mark.parametrize("thickness", [-8, 0, 1e6, "thick", [8, 8]])
def test_impossible_thickness(tmp_path, thickness):
    refused(Study.load, spoil(tmp_path, slice_thickness_mm=dict(sax=thickness)), words="thickness")


def test_missing_thickness_is_the_spacing_with_a_warning(tmp_path):
    s = Study.load(spoil(tmp_path, slice_thickness_mm={}))
    assert s.sax.thickness_mm == pytest.approx(10) and s.views["lax_4ch"].thickness_mm == pytest.approx(6)
    assert sum("thickness" in w for w in s.warnings) == 2


@pytest.mark.parametrize("keep", [0.9, 0.3, 0.002, 0])
def test_truncated_nifti_is_named(tmp_path, keep):
    folder = study().save(tmp_path/"s")
    data = (folder/"sax.nii.gz").read_bytes()
    (folder/"sax.nii.gz").write_bytes(data[:int(keep*len(data))])
    assert "sax.nii.gz" in refused(Study.load, folder, words="truncated")


def test_header_that_declares_an_absurd_size(tmp_path):
    folder = study().save(tmp_path/"s")
    raw = bytearray(gzip.decompress((folder/"sax.nii.gz").read_bytes()))
    raw[42:50] = np.array([30000, 30000, 30000, 1000], "<i2").tobytes()
    (folder/"sax.nii.gz").write_bytes(gzip.compress(bytes(raw)))
    refused(Study.load, folder, words="declares")


def test_lax_that_does_not_cross(tmp_path):
    s = study()
    s.views["lax_4ch"].affines[0, :3, 3] += 500*hand(175)
    refused(s.check, words="does not cross")
    write_study(tmp_path, lax=[])
    write_slice(tmp_path, 9, np.cross(AXIS, hand(85)), 300*hand(175), description="4CH")
    d = Study.from_dicom(tmp_path)
    assert list(d.views) == ["sax"] and "does not cross" in d.decisions[-1]["why"]
    refused(Study.from_dicom, tmp_path, views={"Se9": "lax_4ch"}, words="does not cross")


@pytest.mark.parametrize("changes, words", [
    (dict(frame_times=dict(sax=[[0, 1]])), "frame_times"), (dict(frame_times=dict(sax=[[0.0]*FRAMES]*4)), "same time"),
    (dict(rr_interval_ms=dict(sax=[0]*4)), "times"), (dict(rr_interval_ms=dict(sax=["a"]*4)), "rr_interval_ms"),
    (dict(ed_frame=99), "ed_frame"), (dict(views=["x"]), "views"), (dict(es_frame="x"), "es_frame"),
    (dict(acquired_mm=dict(sax=[0, 1])), "acquired_mm")])
def test_study_json_that_does_not_fit(tmp_path, changes, words):
    refused(Study.load, spoil(tmp_path, **changes), words=words)


def test_broken_json_and_poses(tmp_path):
    folder = study().save(tmp_path/"s")
    (folder/"poses.csv").write_text("view,slice,tx\nsax,0,1\n")
    refused(Study.load, folder, words="poses.csv")
    (folder/"poses.csv").write_text("view,slice,tx,ty,tz,rx,ry,rz\nsax,77,1,0,0,0,0,0\n")
    refused(Study.load, folder, words="poses.csv")
    (folder/"study.json").write_text("{")
    refused(Study.load, folder, words="study.json")


@pytest.mark.parametrize("name", ["", " ", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", ".x", "-p", "record",
                                  "C:x", "a\nb", "x"*500, None, 7])
def test_subject_names(name): refused(safe_subject, name, words="subject name")


@pytest.mark.parametrize("name", ["patient 1", "007", "1234567_20208_2_0", "phantom-3", "Grüße"])
def test_good_subject_names(name): assert safe_subject(name) == name


def test_frames_and_views_that_do_not_exist():
    s = study()
    for frame in (FRAMES, -1, "MID", None): refused(s.phase, frame, words="rame")
    refused(s.slices, "ED", hold_out=("lax_2ch",), words="held out")
    refused(s.grid, 0.01, words="spacing_mm")


# --- what is computed ---

def test_common_phases():
    s = study()
    s.sax.times[2] += 0.25*s.sax.rr_ms[2]/1000  # a slice triggered a quarter of a beat later
    np.testing.assert_allclose(s.sax.at(0.25)[2], s.sax.images[2, 0], atol=1e-3)
    assert s.slices("ED").images.shape == (5, SIZE, SIZE) and s.phase("ED") == 0
    seen = s.slices(0.25, s.grid(), hold_out="lax_4ch")
    assert seen.views == ["sax"]*4 and seen.images.dtype == np.float32 and seen.mask.all()


def test_one_frame():
    s = study(frames=1, slices=6, lax=("lax_2ch", "lax_4ch"))
    s.check()
    assert s.frames == 1 and s.find_es() == 0 and s.phase("ES") == 0
    assert np.linalg.norm(np.cross(s.heart_centre(), AXIS)) < 4
    assert s.long_axis().base_sd_mm > 8 and 2 < s.noise()["sax"] < 5


def test_grid_and_long_axis():
    s = study(slices=8, gap=10.0, lax=("lax_2ch", "lax_3ch", "lax_4ch"))
    grid = s.grid()
    assert np.linalg.det(grid.affine[:3, :3]) > 0
    np.testing.assert_allclose(grid.affine[:3, 2]/1.4, AXIS, atol=1e-6)
    ends = np.linalg.inv(grid.affine) @ np.c_[[-9*AXIS, 79*AXIS], [1, 1]].T
    assert abs(ends[2, 0] + 0.5) < 0.5 and abs(ends[2, 1] - (grid.shape[0] - 0.5)) < 0.5
    moved = s.grid(2.0, centre_mm=[1, 2, 3]).centre - [1, 2, 3]  # only along the normal, to the middle of the stack
    np.testing.assert_allclose(moved, AXIS*((grid.centre - [1, 2, 3]) @ AXIS), atol=1e-6)
    axis = s.long_axis()
    np.testing.assert_allclose(axis.s(np.array([axis.base_mm, axis.apex_mm])), [0, 1], atol=1e-9)
    assert (axis.apex_mm - axis.base_mm) @ AXIS > 50


def test_noise_to_a_tenth():
    s = study(frames=12)
    rng = np.random.default_rng(0)
    for sigma in (4.0, 20.0):
        for v in s.views.values():
            v.images = (np.array([ring(0, pixel=3.0)])*np.ones((len(v.images), 12, 1, 1))).astype(np.float32)
            v.images += sigma*rng.standard_normal(v.images.shape).astype(np.float32)
            v._sigma = None
        for value in s.noise().values(): assert abs(value/sigma - 1) < 0.1


# --- privacy ---

MARK = "ZQMARKQZ"
IDENTITY = dict(
    PatientName=f"{MARK}^A", OtherPatientNames=f"{MARK}^B", PatientBirthName=f"{MARK}^C",
    PatientMotherBirthName=MARK, OtherPatientIDs=MARK, PatientAddress=MARK, PatientTelephoneNumbers=MARK,
    PatientBirthDate="19770707", PatientComments=MARK, MilitaryRank=MARK, EthnicGroup=MARK, Occupation=MARK,
    AdditionalPatientHistory=MARK, MedicalRecordLocator=MARK, CountryOfResidence=MARK, RegionOfResidence=MARK,
    PatientReligiousPreference=MARK, ResponsiblePerson=MARK, IssuerOfPatientID=MARK, InstitutionName=MARK,
    InstitutionAddress=MARK, InstitutionalDepartmentName=MARK, ReferringPhysicianName=MARK,
    ReferringPhysicianAddress=MARK, PerformingPhysicianName=MARK, OperatorsName=MARK,
    NameOfPhysiciansReadingStudy=MARK, PhysiciansOfRecord=MARK, RequestingPhysician=MARK, StationName=MARK,
    DeviceSerialNumber=MARK, AccessionNumber=MARK, StudyID=MARK, StudyDescription=MARK,
    SeriesDescription=f"SAX {MARK}", ProtocolName=MARK, ImageComments=MARK, RequestedProcedureDescription=MARK,
    PerformedProcedureStepDescription=MARK, AdmissionID=MARK, CurrentPatientLocation=MARK,
    Manufacturer=f"Siemens {MARK}", ManufacturerModelName=MARK, SoftwareVersions=MARK, SequenceName=MARK,
    ScanningSequence=["GR", MARK],
    SequenceVariant=MARK, StudyDate="19780808", SeriesDate="19780808", AcquisitionDate="19780808",
    ContentDate="19780808", InstanceCreationDate="19780808", AcquisitionDateTime="19780808101010",
    StudyTime="111213", PatientSex=MARK, PatientAge="094Y", PatientID=MARK, StudyInstanceUID="1.2.777888.1",
    FrameOfReferenceUID="1.2.777888.2")
FORBIDDEN = re.compile(rb"ZQMARKQZ|19770707|19780808|111213|777888|1\.2\.3\.|094Y|\"age\"|MARK", re.I)


def test_no_identity_in_any_output(tmp_path):
    source = tmp_path/f"{MARK} 1977"/MARK
    with pydicom.config.disable_value_validation():
        write_study(source, **IDENTITY)
    study = Study.from_dicom(source, subject="p1")
    folder = study.save(tmp_path/"out"/"p1")
    again = Study.load(folder)
    files = list(folder.iterdir())
    assert len(files) == 5
    for path in files:
        data = path.read_bytes()
        data = gzip.decompress(data)[:400] + data[:200] if path.suffix == ".gz" else data  # NIfTI's and gzip's header
        assert not FORBIDDEN.search(data), (path.name, FORBIDDEN.search(data))
        assert str(tmp_path).encode() not in data
    for s in (study, again):
        labels = {n: v.series for n, v in s.views.items()}
        told = repr((s, s.decisions, s.warnings, s.patient, s.source, labels)).encode()
        assert not FORBIDDEN.search(told)
    assert study.patient == {} and study.source == dict(vendor="Siemens", sequence="GR")
    image = nib.load(folder/"sax.nii.gz")
    assert not bytes(image.header["descrip"].tobytes()).strip(b"\0") and not image.header.extensions


def test_study_json_passes_on_only_what_is_allowed(tmp_path):
    folder = spoil(tmp_path, patient=dict(name="Doe", age=95, sex="F", weight_kg=70), anything="Doe",
                   source=dict(vendor="GE", hospital="X"))
    s = Study.load(folder)
    assert Study.load(spoil(tmp_path/"u", decisions=5, warnings="x", patient=[], source=3)).warnings == []
    assert s.patient == dict(sex="F", weight_kg=70) and s.source == dict(vendor="GE")
    assert "Doe" not in (s.save(tmp_path/"t")/"study.json").read_text()
