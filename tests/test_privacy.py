"""Who was imaged, when and where appears in no output: the whole job on a study whose every identifying field is planted."""
import base64, gzip, json, os, re, socket, subprocess, sys, time
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from mgdcr.scanner import phantom_study

ROOT = Path(__file__).resolve().parent.parent
UID = "1.2.826.0.1.3680043.9.7433"  # every UID below begins so
TEXTS = """PatientName PatientID OtherPatientNames PatientBirthName PatientMotherBirthName PatientAddress PatientTelephoneNumbers
    PatientComments PatientReligiousPreference MilitaryRank BranchOfService CountryOfResidence RegionOfResidence EthnicGroup Occupation
    AdditionalPatientHistory MedicalRecordLocator IssuerOfPatientID PatientInsurancePlanCodeSequence InstitutionName InstitutionAddress
    InstitutionalDepartmentName StationName DeviceSerialNumber DeviceID GantryID ReferringPhysicianName ReferringPhysicianAddress
    PerformingPhysicianName OperatorsName PhysiciansOfRecord NameOfPhysiciansReadingStudy RequestingPhysician RequestingService AccessionNumber
    StudyID StudyDescription SeriesDescription ProtocolName ImageComments AcquisitionDeviceProcessingDescription DerivationDescription
    RequestedProcedureDescription RequestedProcedureID ScheduledProcedureStepID PerformedProcedureStepID PerformedProcedureStepDescription
    AdmissionID CurrentPatientLocation ServiceEpisodeID PerformedStationName PerformedLocation PerformedStationAETitle
    ManufacturerModelName SoftwareVersions SequenceName ClinicalTrialSubjectID ClinicalTrialSponsorName ClinicalTrialSiteName""".split()
DATES = """PatientBirthDate StudyDate SeriesDate AcquisitionDate ContentDate InstanceCreationDate PerformedProcedureStepStartDate
    DateOfLastCalibration""".split()
TIMES = "PatientBirthTime StudyTime SeriesTime AcquisitionTime ContentTime InstanceCreationTime PerformedProcedureStepStartTime".split()
UIDS = "StudyInstanceUID FrameOfReferenceUID InstanceCreatorUID DeviceUID".split()


def plant(ds):
    "Give every identifying field of a dataset its own recognisable value; the values."
    planted = {}
    for n, name in enumerate(TEXTS):
        sequence = pydicom.datadict.dictionary_VR(pydicom.datadict.tag_for_keyword(name)) == "SQ"
        if not sequence: planted[name] = f"QX{n:02d}ZV"
    planted |= {name: f"1931{n + 1:02d}2{n % 9}" for n, name in enumerate(DATES)} | {name: f"0914{n:02d}.73{n}" for n, name in enumerate(TIMES)}
    planted |= {name: f"{UID}.{n}" for n, name in enumerate(UIDS)}
    for name, value in planted.items(): setattr(ds, name, value)
    inner = Dataset()
    inner.PatientID, inner.StudyDescription = "QXinZV", "QXdeZV"
    ds.RequestAttributesSequence = [inner]
    block = ds.private_block(0x0029, "QXprZV", create=True)
    block.add_new(1, "LO", "QXvaZV")
    ds.PatientAge, ds.PatientSex = "093Y", "F"  # above 90 an age identifies
    return [*planted.values(), "QXinZV", "QXdeZV", "QXprZV", "QXvaZV"]


def write_dicom(path, pixels, affine, series, instance, frames, thickness):
    "One MR image with everything planted."
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, "1.2.840.10008.5.1.4.1.1.4"
    meta.MediaStorageSOPInstanceUID = f"{UID}.{series}.{instance}"
    ds = FileDataset(path, {}, file_meta=meta, preamble=bytes(128))
    meta.SourceApplicationEntityTitle = "QXaeZV"
    words = [*plant(ds), meta.SourceApplicationEntityTitle]
    lps = np.diag([-1, -1, 1.0]) @ affine[:3]
    step = np.linalg.norm(lps[:, :2], axis=0)
    values = dict(
        SOPClassUID=meta.MediaStorageSOPClassUID, SOPInstanceUID=meta.MediaStorageSOPInstanceUID, SeriesInstanceUID=f"{UID}.{series}",
        SeriesNumber=series, InstanceNumber=instance, Modality="MR", Manufacturer="SIEMENS", MagneticFieldStrength=1.5,
        ImageType=["ORIGINAL", "PRIMARY", "M"], Rows=pixels.shape[0], Columns=pixels.shape[1], PixelSpacing=[float(step[1]), float(step[0])],
        SliceThickness=thickness, ImagePositionPatient=[round(float(x), 5) for x in lps[:, 3]],
        ImageOrientationPatient=[round(float(x), 7) for x in (lps[:, :2]/step).T.ravel()], NominalInterval=900, CardiacNumberOfImages=frames,
        TriggerTime=900*(instance - 1)/frames, SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2", BitsAllocated=16,
        BitsStored=16, HighBit=15, PixelRepresentation=0, PixelData=np.clip(pixels, 0, None).astype("<u2").tobytes())
    for name, value in values.items(): setattr(ds, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return words + [UID]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    "A data folder with one small DICOM study, and the words that must not come out of it."
    data, words, series = tmp_path_factory.mktemp("QXfoZV_data"), set(), 0
    study = phantom_study(5, frames=4, sax_slices=6, shape=(56, 56), pixel_mm=3.0, acquired_mm=(3.0, 3.0), reference=False)
    for view in study.views.values():
        for images, affine in zip(view.images, view.affines):
            series += 1
            for n, image in enumerate(images):
                words |= set(write_dicom(data/f"s01/series{series}/{n}.dcm", image, affine, series, n + 1, len(images), view.thickness_mm))
    return data, sorted(words)


def everything(folder):
    "Every byte that a reader of a folder can get at: names, contents, gzip unpacked, a notebook's pictures decoded."
    for path in sorted(folder.rglob("*")):
        yield path, path.name.encode()
        if not path.is_file(): continue
        data = path.read_bytes()
        yield path, gzip.decompress(data) if path.name.endswith(".gz") else data
        if path.suffix != ".ipynb": continue
        for cell in json.loads(data)["cells"]:
            for output in cell.get("outputs", []):
                for kind, text in output.get("data", {}).items():
                    if kind in ("image/png", "image/jpeg"): yield path, base64.b64decode("".join(text))


def assert_absent(words, folder):
    found = [(str(path.name), word) for path, data in everything(folder) for word in words if word.encode() in data]
    assert not found


def run(command, folder):
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
                          env=os.environ | dict(OMP_NUM_THREADS="1"))


def machine(*folders):
    "What says where and on which day it was run."
    today = time.strftime("%Y-%m-%d")
    return [*map(str, folders), str(ROOT), str(Path.home()) + "/", sys.prefix, today, today.replace("-", "")] + \
        [name for name in [socket.gethostname()] if len(name) > 5]


def test_a_job_on_a_planted_study_tells_nothing(planted, tmp_path):
    data, words = planted
    settings = "{rounds: 2, spacing_mm: 5, save_every: 1, hold_out: lax_4ch}"
    done = run(["papermill", "nbs/reconstruct.ipynb", "-p", "subject", "s01", "-p", "data_dir", str(data), "-p", "out_dir", str(tmp_path),
                "-y", settings], tmp_path)
    assert done.returncode == 0, done.stderr
    names = {str(path.relative_to(tmp_path/"s01")) for path in (tmp_path/"s01").rglob("*") if path.is_file()}
    assert {"reconstruct.ipynb", "volume.nii.gz", "summary.json", "poses.csv", "residuals.csv", "losses.csv"} <= names
    assert any(name.startswith("intermediate/") for name in names) and any(name.endswith(".png") for name in names)
    assert_absent([*words, *machine(data, tmp_path)], tmp_path)
    summary = json.loads((tmp_path/"s01/summary.json").read_text())
    assert "age" not in summary["patient"] and summary["patient"]["sex"] == "F" and summary["source"]["vendor"] == "Siemens"
    assert not re.search(r"1\.2\.\d+\.\d+\.\d+", (tmp_path/"s01/reconstruct.ipynb").read_text())  # a UID of any root


def test_the_command_tells_nothing(planted, tmp_path):
    data, words = planted
    done = run(["mgdcr.reconstruct", "s01", "--data-dir", str(data), "--out-dir", str(tmp_path), "--method", "linear", "--spacing-mm", "5"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert_absent([*words, *machine(data, tmp_path)], tmp_path)


def test_neither_does_a_log(planted, tmp_path):
    data, words = planted
    done = run(["papermill", "nbs/reconstruct.ipynb", "-p", "subject", "s01", "-p", "data_dir", str(data), "-p", "out_dir", str(tmp_path),
                "-p", "method", "magic"], tmp_path)
    assert done.returncode != 0 and done.stderr.strip().splitlines()[-1].startswith("There is no method 'magic'")
    assert os.listdir(tmp_path) == ["s01.log"]
    assert_absent([*words, *machine(data, tmp_path)], tmp_path)
