"DICOM as archives really are: `read_dicom` and what it refuses."
import shutil
import warnings

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, JPEGLosslessSV1, RLELossless

from made_dicom import (AXIS, FRAMES, PIXEL, SIZE, dataset, hand, ring, save, write_enhanced, write_slice,
                        write_study)
from mgdcr.dicom import StudyError, read_dicom
from mgdcr.study import Study
from mgdcr.views import recognise


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return write_study(tmp_path_factory.mktemp("study"))


def one_sentence(error):
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text and len(text) < 320 and "Traceback" not in text
    return text


def test_one_series_a_slice(folder):
    slices = read_dicom(folder)
    assert [s.series for s in slices] == ["Se1", "Se2", "Se3", "Se4", "Se101", "Se102", "Se103"]
    assert all(s.images.shape == (FRAMES, SIZE, SIZE) and s.images.dtype == np.float32 for s in slices)
    for n, s in enumerate(slices[:4]):
        middle = s.affine @ [(SIZE - 1)/2, (SIZE - 1)/2, 0, 1]
        np.testing.assert_allclose(middle[:3], 10*n*AXIS, atol=1e-3)
        np.testing.assert_array_equal(s.images[2], ring(2).astype(np.uint16))
        assert s.rr_ms == 800 + 20*n and abs(s.times[1] - s.rr_ms/FRAMES/1000) < 1e-6


def test_other_files_copies_and_nesting(folder, tmp_path):
    shutil.copytree(folder, tmp_path/"a"/"b")
    shutil.copytree(folder, tmp_path/"second copy of the same files")
    (tmp_path/"DICOMDIR").write_bytes(b"x"*500)
    (tmp_path/"notes.txt").write_text("nothing")
    (tmp_path/"a"/"._x.dcm").write_bytes(b"apple double")
    ct = dataset(tmp_path/"ct.dcm", "1.2.840.10008.5.1.4.1.1.2", Rows=4, Columns=4, PixelData=bytes(32), Modality="CT")
    save(ct, tmp_path/"ct.dcm")
    write_slice(tmp_path, 50, AXIS, 5*AXIS, frames=1, description="localizer")
    left_out = []
    slices = read_dicom(tmp_path, left_out=left_out)
    assert len(slices) == 7 and all(len(s.images) == FRAMES for s in slices)
    assert [d["series"] for d in left_out] == ["Se50"]


def test_one_series_a_stack_in_any_order(tmp_path):
    for n in np.random.default_rng(0).permutation(4): write_slice(tmp_path/f"{9 - n}", 5, AXIS, 10*n*AXIS)
    slices = read_dicom(tmp_path)
    assert sorted(s.series for s in slices) == ["Se5.1", "Se5.2", "Se5.3", "Se5.4"]
    views, _ = recognise(slices)
    along = [(s.affine @ [(SIZE - 1)/2, (SIZE - 1)/2, 0, 1])[:3] @ AXIS for s in views["sax"]]
    np.testing.assert_allclose(along, [0, 10, 20, 30], atol=1e-3)
    views, _ = recognise(slices, {views["sax"][0].series: "ignore"})
    assert len(views["sax"]) == 3


def test_enhanced_multi_frame(tmp_path):
    write_enhanced(tmp_path/"stack.dcm", 9, [(AXIS, 10*n*AXIS) for n in range(3)])
    write_enhanced(tmp_path/"lax.dcm", 10, [(np.cross(AXIS, hand(85)), 10*AXIS)])
    slices = read_dicom(tmp_path)
    assert [s.series for s in slices] == ["Se9.1", "Se9.2", "Se9.3", "Se10"]
    lax = slices[-1]
    np.testing.assert_allclose(lax.images[1], 0.5*ring(1).astype(np.uint16))  # rescale slope of each frame
    np.testing.assert_allclose(lax.times, np.arange(FRAMES)*0.85/FRAMES)
    assert lax.rr_ms == 850 and lax.thickness_mm == 8
    np.testing.assert_allclose(lax.acquired_mm, (PIXEL, PIXEL*48/32))
    study = Study.from_dicom(tmp_path)
    assert list(study.views) == ["sax", "lax_4ch"] and len(study.sax.images) == 3


def test_rescale_and_pixels_that_are_not_square(tmp_path):
    write_slice(tmp_path, 1, AXIS, [0, 0, 0], RescaleSlope=2.5, RescaleIntercept=-4, PixelSpacing=[3, 1.5])
    s = read_dicom(tmp_path)[0]
    np.testing.assert_allclose(s.images[0], 2.5*ring(0).astype(np.uint16) - 4)
    np.testing.assert_allclose(np.linalg.norm(s.affine[:3, :3], axis=0), [1.5, 3, 1])


def test_velocity_maps_and_perfusion_are_left_out(folder, tmp_path):
    shutil.copytree(folder, tmp_path/"cine")
    write_slice(tmp_path, 60, AXIS, 5*AXIS, ImageType=["ORIGINAL", "PRIMARY", "P", "ND"])
    write_slice(tmp_path, 61, AXIS, 5*AXIS, rr=60_000.0)  # contrast passing for a minute
    left_out = []
    assert len(read_dicom(tmp_path, left_out=left_out)) == 7
    assert {d["series"]: d["why"] for d in left_out}["Se60"] == "a velocity map" and len(left_out) == 2


def test_times_without_trigger_or_interval(tmp_path):
    write_slice(tmp_path, 1, AXIS, [0, 0, 0], NominalInterval=None)
    write_slice(tmp_path, 2, AXIS, 10*AXIS, TriggerTime=0, NominalInterval=750)  # a time that never changes
    a, b = read_dicom(tmp_path)
    assert a.rr_ms == pytest.approx(900) and b.rr_ms == 750
    np.testing.assert_allclose(b.times, np.arange(FRAMES)/FRAMES*0.75)


def test_folder_names_that_could_be_names_are_no_labels(tmp_path):
    write_slice(tmp_path/"Doe_John_1951", 7, AXIS, [0, 0, 0])
    write_slice(tmp_path/"series_12", 8, AXIS, 10*AXIS)
    assert [s.series for s in read_dicom(tmp_path)] == ["Se7", "series_12"]


def test_compressed_pixels(tmp_path):
    write_slice(tmp_path/"rle", 1, AXIS, [0, 0, 0])
    for path in (tmp_path/"rle").iterdir():
        ds = pydicom.dcmread(path)
        ds.compress(RLELossless, generate_instance_uid=False)
        ds.save_as(path)
    np.testing.assert_array_equal(read_dicom(tmp_path/"rle")[0].images[0], ring(0).astype(np.uint16))
    for syntax in (JPEG2000Lossless, JPEGLosslessSV1):
        place = tmp_path/syntax.keyword
        for path in sorted((tmp_path/"rle").iterdir()):
            ds = pydicom.dcmread(path)
            ds.file_meta.TransferSyntaxUID = syntax
            ds.PixelData = encapsulate([b"\xff\x4f no picture"])
            ds["PixelData"].is_undefined_length = True
            save(ds, place/path.name)
        with pytest.raises(StudyError, match=r"pip install mgdcr\[dicom\]") as error: read_dicom(place)
        one_sentence(error)


@pytest.mark.parametrize("keep", [0.999, 0.6, 0.05])
def test_truncated_file_is_named(folder, tmp_path, keep):
    shutil.copytree(folder, tmp_path/"x")
    broken = tmp_path/"x"/"3_2.dcm"
    data = broken.read_bytes()
    broken.write_bytes(data[:int(len(data)*keep)])
    with pytest.raises(StudyError, match="3_2.dcm") as error: read_dicom(tmp_path/"x")
    one_sentence(error)


@pytest.mark.parametrize("values, words", [
    (dict(NumberOfFrames=2_000_000_000), "declares"), (dict(Rows=65535, Columns=65535), "declares"),
    (dict(SliceThickness=-8), "thickness"), (dict(PixelSpacing=[0, 3]), "impossible"),
    (dict(ImageOrientationPatient=[0]*6), "impossible"),
    (dict(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "impossible")])
def test_impossible_headers(tmp_path, values, words):
    write_slice(tmp_path, 1, AXIS, [0, 0, 0], **values)
    with pytest.raises(StudyError, match=words) as error: read_dicom(tmp_path)
    one_sentence(error)


def test_nothing_to_read(tmp_path):
    (tmp_path/"notes.txt").write_text("nothing")
    with pytest.raises(StudyError, match="no MR image") as error: read_dicom(tmp_path)
    one_sentence(error)


def test_two_patients_are_not_mixed(tmp_path):
    write_slice(tmp_path, 1, AXIS, [0, 0, 0])
    write_slice(tmp_path, 2, AXIS, 10*AXIS, PatientID="another")
    with pytest.raises(StudyError, match="2 patients") as error: read_dicom(tmp_path)
    assert "another" not in one_sentence(error)


def test_views_by_geometry_before_headers(folder, tmp_path):
    shutil.copytree(folder, tmp_path/"x")
    centre, beside = 15*AXIS, 15*AXIS + 45*hand(115)
    write_slice(tmp_path/"x", 103, np.cross(AXIS, hand(145)), centre, description="cine 4CH")  # 3CH with a wrong name
    write_slice(tmp_path/"x", 104, np.cross(AXIS, hand(25)), beside, description="RVOT")
    write_slice(tmp_path/"x", 105, [0, 0.2, 0.98], centre)  # a transverse cine
    views, decisions = recognise(read_dicom(tmp_path/"x"))
    named = {s[0].series: v for v, s in views.items() if v != "sax"}
    assert named == {"Se101": "lax_2ch", "Se102": "lax_4ch", "Se103": "lax_3ch"}
    assert [s.series for s in views["sax"]] == ["Se1", "Se2", "Se3", "Se4"]
    assert {d["series"] for d in decisions if d["view"] == "ignore"} == {"Se104", "Se105"}
    assert all(d["why"] for d in decisions)
    views, decisions = recognise(read_dicom(tmp_path/"x"), {"Se104": "lax_2ch", "101": "ignore"})
    assert views["lax_2ch"][0].series == "Se104" and "lax_2ch_2" not in views
    assert "as told" in next(d["why"] for d in decisions if d["series"] == "Se104")
    for told in ({"Se999": "ignore"}, {"Se104": "lax_9ch"}):
        with pytest.raises(StudyError): recognise(read_dicom(tmp_path/"x"), told)


def test_no_warning_and_no_bar(folder, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Study.from_dicom(folder)
    out, err = capfd.readouterr()
    assert out == err == ""
