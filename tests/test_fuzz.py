"Files that lie are read or refused in a sentence, never more: some mutations of each kind, and every defect that mutations have found."
import gzip
import io
import json
import pickle
import re
import shutil
import struct
import zipfile
import zlib

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch

import fuzz
from fuzz import KINDS, run
from mgdcr.dataset import _close
from mgdcr.dicom import StudyError, read_dicom
from mgdcr.study import Study


@pytest.mark.parametrize("kind", KINDS)
def test_mutations_are_read_or_refused(kind, tmp_path):
    torch.set_num_threads(1)
    count = 10 if kind in ("checkpoint", "segmenter") else 24  # large files
    found = run(kind, count, 0, tmp_path)
    assert not found["defects"] and found["refused"] > 4 and found["tried"] == count


# --- what was found, as small as it can be made: (kind, what is done to its sample, words of the refusal) ---

def dicom(**values):
    def spoil(path):
        ds = pydicom.dcmread(path)
        for key, (vr, raw) in values.items():
            tag = pydicom.datadict.tag_for_keyword(key)
            ds[tag] = pydicom.dataelem.RawDataElement(pydicom.tag.Tag(tag), vr, len(raw), raw, 0, False, True)
        ds.save_as(path, enforce_file_format=False, little_endian=True, implicit_vr=False)
    return spoil


def syntax_nobody_knows(path):
    ds = pydicom.dcmread(path)
    ds.file_meta.TransferSyntaxUID = "1.2.3"
    ds.PixelData = ds.PixelData[:100]
    ds.save_as(path, enforce_file_format=False, little_endian=True, implicit_vr=False)


def syntax_that_is_text(path):
    data = path.read_bytes()
    path.write_bytes(data.replace(b"\2\0\x10\0UI", b"\2\0\x10\0LO")[:-100])


def deflated(path):
    "A file whose 4 MB unpack to 1.5 GB."
    ds, meta = pydicom.dcmread(path), io.BytesIO()
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    pydicom.filewriter.write_file_meta_info(meta, ds.file_meta)
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    zeros = squeeze.compress(bytes(1 << 24)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    path.write_bytes(bytes(128) + b"DICM" + meta.getvalue() + zeros*90 + squeeze.flush())


def longer_than_the_file(path):
    "An element that declares 2 GB in a file of 6 kB."
    data = path.read_bytes()
    at = data.index(b"\xe0\x7f\x10\x00OW")
    path.write_bytes(data[:at + 8] + struct.pack("<I", 2**31 - 2) + data[at + 12:])


def header(*changes, packed=b""):
    "Bytes of a NIfTI header replaced."
    def spoil(path):
        raw = bytearray(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
        for at, form, *values in changes: raw[at:at + struct.calcsize(form)] = struct.pack(form, *values)
        path.write_bytes(gzip.compress(bytes(raw)) + packed if path.suffix == ".gz" else bytes(raw))
    return spoil


ZEROS = gzip.compress(bytes(1 << 24))*60  # 1 GB


def text(data): return lambda path: path.write_bytes(data if isinstance(data, bytes) else data(path.read_bytes()))


def picture(path):
    "A picture said to be a gigabyte long: the library would copy what lies beyond the end of the file."
    path.write_bytes(re.sub(rb"....(\x01\0\t\x00128-00003)", lambda found: struct.pack("<I", 2**30) + found[1], path.read_bytes(), flags=re.DOTALL))


def changed(change, **options):
    "A checkpoint with something else in it."
    def spoil(path):
        found = torch.load(path, weights_only=False)
        change(found)
        torch.save(found, path, **options)
    return spoil


def put(*way, value):
    "A value at some place in a checkpoint."
    def change(found):
        for key in way[:-1]: found = found[key]
        found[way[-1]] = value(found.get(way[-1])) if callable(value) else value
    return change


class Asks:
    "Unpickled, it asks for a terabyte."
    def __init__(self, kind, *size): self.made = kind, size
    def __reduce__(self): return self.made


def repacked(change=lambda name, data: data, how=zipfile.ZIP_STORED):
    def spoil(path):
        with zipfile.ZipFile(path) as old: members = {m.filename: change(m.filename, old.read(m)) for m in old.infolist()}
        with zipfile.ZipFile(path, "w", how) as new:
            for name, data in members.items(): new.writestr(name, data)
    return spoil


def longer_storage(name, data):
    "A tensor of (7, 5) numbers, and what is stored of it, said to have a million rows."
    if not name.endswith("data.pkl"): return data
    return data.replace(b"K\x23", b"J\x00\x00\x50\x00", 1).replace(b"K\x07K\x05", b"J\x00\x00\x10\x00K\x05", 1)


def tensors(change):
    "The header of a .safetensors file changed."
    def spoil(path):
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        found = json.loads(data[8:8 + size])
        change(found)
        new = json.dumps(found).encode()
        path.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + size:])
    return spoil


def card(**values):
    def change(found):
        known = json.loads(found["__metadata__"]["card"])
        for key, value in values.items(): known[key] = known[key] | value if isinstance(value, dict) and key in known else value
        found["__metadata__"]["card"] = json.dumps(known)
    return tensors(change)


def renamed(more):
    def change(found):
        name = next(k for k in found if k.endswith("weight"))
        found[name + more] = found.pop(name)
    return tensors(change)


def misfit(found): found["latents.means"]["shape"] = found["latents.means"]["shape"][::-1]


def lying(name, data):
    text = repr(dict(descr="<u2", fortran_order=False, shape=(2**34, 2, 2))).ljust(117) + "\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text.encode() + data[128:]


EMA, ADAM = ("state_dict", "ema_model.out.2.bias"), ("optimizer", "state", 0)
FOUND = {
    "one number for a pixel's two sides": ("dicom", dicom(PixelSpacing=("DS", b"3 ")), None),
    "a kind of value that does not exist": ("dicom", text(lambda data: data.replace(b"\2\0\2\0UI", b"\2\0\2\0UA")), "truncated or damaged"),
    "text for a whole number": ("dicom", dicom(NumberOfFrames=("IS", b"many")), "truncated or damaged"),
    "a syntax that does not exist": ("dicom", syntax_nobody_knows, "truncated or damaged"),
    "a matrix of one number": ("dicom", dicom(AcquisitionMatrix=("US", b"\1\0")), None),
    "a syntax that is no UID": ("dicom", syntax_that_is_text, "truncated or damaged"),
    "a DICOM file that unpacks to a thousand times its size": ("dicom", deflated, "deflated"),
    "an element longer than its file": ("dicom", longer_than_the_file, None),
    "a sequence that is none": ("dicom_enhanced", dicom(SharedFunctionalGroupsSequence=("LO", b"ab")), None),
    "a unit of time that does not exist": ("nifti", header((123, "<B", 7)), "cannot be read"),
    "a gigabyte of zeros": ("nifti", header((40, "<8h", 3, 16000, 16000, 1, 1, 1, 1, 1), (70, "<2h", 4, 16), packed=ZEROS), "cannot be read"),
    "a gigabyte of header": ("nifti", header((108, "<f", 2**30), (348, "<B", 1), packed=ZEROS), "cannot be read"),
    "a header of more than the file has": ("nifti_reference", header((40, "<8h", 3, 600, 600, 600, 1, 1, 1, 1)), "cannot be read"),
    "brightness of 1e-38": ("nifti", header((112, "<2f", 1e-40, 1e-38)), "impossible brightness"),
    "slices light years apart": ("nifti", header((252, "<2h", 0, 1), (280, "<f", 1e30)), "enormous"),
    "JSON nested without end": ("study_json", text(b"["*100_000), "cannot be read as JSON"),
    "a number beyond any float": ("study_json", text(json.dumps(dict(slice_thickness_mm=dict(sax=10**400))).encode()), "one number"),
    "a frame beyond any float": ("study_json", text(json.dumps(dict(ed_frame=10**400)).encode()), "ed_frame"),
    "times beyond any float": ("study_json", text(lambda data: json.dumps(json.loads(data) | dict(frame_times=dict(lax_4ch=[[0, 1e308, 2e307]]))).encode()), "same time"),
    "poses in another encoding": ("poses_csv", text(lambda data: data.decode().encode("utf-16")), "poses.csv"),
    "a field of 200,000 letters": ("poses_csv", text(lambda data: data + b"z"*200_000), "poses.csv"),
    "slice -1": ("poses_csv", text(lambda data: data.replace(b"sax,0", b"sax,-1")), "poses.csv"),
    "a picture longer than its file": ("lmdb", picture, "damaged"),
    "a name of many lines": ("checkpoint", changed(put("state_dict", "model.x\nx", value=torch.ones(1))), "cannot be carried on"),
    "an average that lacks a tensor": ("checkpoint", changed(lambda found: found["state_dict"].pop(EMA[1])), "is missing"),
    "a sparse tensor": ("checkpoint", changed(put(*EMA, value=lambda v: v.to_sparse())), "other things than numbers"),
    "a complex tensor": ("checkpoint", changed(put(*EMA, value=lambda v: v.to(torch.complex64))), "other things than numbers"),
    "an expanded tensor": ("official_checkpoint", changed(put("state_dict", "ema_model.out.2.bias", value=torch.ones(1).expand(2**40))), "larger than its file"),
    "an optimizer that lacks a moment": ("checkpoint", changed(lambda found: found["optimizer"]["state"][0].pop("exp_avg")), "another network"),
    "moments of one number": ("checkpoint", changed(put(*ADAM, "exp_avg", value=torch.ones(1))), "another network"),
    "a negative step": ("checkpoint", changed(put(*ADAM, "step", value=torch.tensor(-24.0))), "impossible numbers"),
    "other options of Adam": ("checkpoint", changed(lambda found: found["optimizer"]["param_groups"][0].update(betas="x")), "other options"),
    "negative samples": ("checkpoint", changed(put("global_step", value=-5)), "counts"),
    "a terabyte of bytes": ("latents", changed(put("more", value=Asks(bytearray, 2**40))), "damaged"),
    "a terabyte of numbers": ("latents", changed(put("more", value=Asks(torch.Tensor, 2**20, 2**20))), "damaged"),
    "a checkpoint of torch before 1.6": ("latents", changed(lambda found: None, _use_new_zipfile_serialization=False), "damaged"),
    "a checkpoint packed again": ("latents", repacked(how=zipfile.ZIP_DEFLATED), "damaged"),
    "a tensor longer than its part of the file": ("latents", repacked(longer_storage), "damaged"),
    "a tensor's name that a terminal obeys": ("prior", renamed("\x1b[2J"), "is missing|is unknown"),
    "a tensor's name of 3000 letters": ("segmenter", renamed("q"*3000), "is missing|is unknown"),
    "a schedule of -1000 steps": ("prior", card(schedule=dict(T=-1000)), "schedule is impossible"),
    "dropout that is no number": ("prior", card(network=dict(dropout=float("nan"))), "dropout"),
    "a thousand levels": ("ddim", card(network=dict(mult=[1]*1000)), "too many layers"),
    "samples that are no number": ("prior", card(samples="many"), "samples"),
    "a model of z_sem of another network": ("prior", tensors(misfit), "z_sem"),
    "a card that is no JSON": ("cards", text(b"{"), "no card"),
    "a card in another encoding": ("cards", text(b'{"kind": "\xff"}'), "no card"),
    "a card nested without end": ("cards", text(b"["*100_000), "no card"),
    "arrays that are shorter than they say": ("arrays", repacked(lying), "cannot be read"),
    "volumes that are shorter than they say": ("volumes", repacked(lying), "holds no volumes"),
    "stacks that are shorter than they say": ("stacks", repacked(lambda name, data: lying(name, data) if "images" in name else data), "no labelled stacks"),
}


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    "A sample of each kind, made once."
    made = {}

    def sample(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            KINDS[kind].make(made[kind])
        return made[kind]
    return sample


@pytest.mark.parametrize("what", FOUND)
def test_what_was_found_stays_mended(what, samples, tmp_path):
    kind, spoil, words = FOUND[what]
    place = shutil.copytree(samples(kind), tmp_path/"made")
    path = sorted(p for pattern in KINDS[kind].files for p in place.glob(pattern))[-1]
    spoil(path)
    error = None
    try: KINDS[kind].read(place)
    except Exception as found: error = found
    finally: _close(place/"x.lmdb")
    if words is None and error is None: return  # left out, and the rest is read
    assert fuzz.verdict(error, path, KINDS[kind].names) == "refused", repr(error)
    if words:
        with pytest.raises(StudyError, match=words): raise error


@pytest.mark.parametrize("trap", range(7))
def test_no_pickle_is_run(trap, samples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path/"last.ckpt"
    for protocol in (2, 4):
        path.write_bytes(pickle.dumps(fuzz.Trap(trap), protocol))
        with pytest.raises(StudyError, match="last.ckpt"): fuzz.load_prior(path)
    path.write_bytes((samples("official_checkpoint")/"last.ckpt").read_bytes())
    changed(put("callbacks", value=fuzz.Trap(trap)))(path)
    try: fuzz.load_prior(path)  # a function may have become an empty stand-in
    except StudyError as refused: assert "last.ckpt" in str(refused)
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_is_shown_obeys_no_terminal(samples, tmp_path):
    folder = shutil.copytree(samples("study_json"), tmp_path/"x")/"patient"
    info = json.loads((folder/"study.json").read_text())
    odd = "\x1b[2J\ud800 seen"
    info |= dict(series=dict(sax=[odd]*3), warnings=[odd], decisions=[dict(series=odd)], source=dict(vendor=odd, field=float("nan")))
    (folder/"study.json").write_text(json.dumps(info))
    study = Study.load(folder)
    assert set(study.sax.series) == {"[2J seen"} and study.warnings == ["[2J seen"] and study.source == dict(vendor="[2J seen", field="nan")


def test_flat_places_have_one_class():
    from mgdcr.views import between_classes
    assert between_classes(np.array([1000, 1000, 1000.00006], np.float32)) == pytest.approx(1000)
