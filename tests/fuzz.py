"""Files that lie: every reader of the project, given thousands of damaged and hostile files.

    python tests/fuzz.py --count 400 --seed 7 --record results/record/fuzz.json

Each kind of input has a small valid sample. A mutation is drawn from (seed, kind, number) alone, and read in a child process that has a limit
of memory and of time. A reader either reads it, or refuses it with a `StudyError`: one sentence that names what it is about. Anything else is a
defect: another exception, a crash, more than 20 s, more than 1 GB, or memory that was asked for before the size was judged.
"""
import argparse, csv, gzip, io, json, os, pickle, resource, select, shutil, signal, struct, sys, tempfile, time, warnings, zipfile, zlib
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path

import lmdb
import nibabel as nib
import numpy as np
import pydicom
import torch

import mgdcr.diffae as diffae
from made_dicom import AXIS, write_enhanced, write_slice
from mgdcr.dataset import SliceDataset, SliceRecord, SliceStore, _close, folder_labels, read_arrays, write_lmdb
from mgdcr.diffae import LATENT_PARTS, LatentModel, Prior, load_latents, load_prior, save_prior, shipped
from mgdcr.dicom import StudyError
from mgdcr.label_heart import read_label_map
from mgdcr.patches import AROUND, PatchNet, PatchPrior, Volumes, load_patches, load_volumes, save_patches, save_volumes
from mgdcr.segmentation import Segmenter, Stack, label_network, load_segmenter, load_stacks, save_segmenter, save_stacks
from mgdcr.study import Study
from mgdcr.training import Recipe, begin
from mgdcr.unet import NETWORKS, UNet
from mgdcr.unet3d import VolumePrior, load_unet3d, save_unet3d, volume_network
from test_study import study as made_up_study

MOST_SECONDS, MOST_BYTES, LIMIT_BYTES = 20.0, 1 << 30, 3 << 30  # of one file; and what a child may ask for at all
SMALL = replace(NETWORKS["cine128_compact"], channels=8, mult=(1, 2), encoder_mult=(1, 2), attention=(1,), embed=16, z=8, z_map=2)
RECIPE = dict(data="none", network="small", samples=8, batch=4, precision="float32")


# --- what can happen to any file ---

NUMBERS = [struct.pack(f, x) for f, x in (
    ("<i", 2**31 - 1), ("<i", -1), ("<i", 0), ("<I", 2**31), ("<q", 2**63 - 1), ("<q", -1), ("<Q", 2**40), ("<h", 32767), ("<h", -1), ("<h", 0),
    ("<f", np.nan), ("<f", np.inf), ("<f", 1e38), ("<f", -1.0), ("<d", np.nan), ("<d", -np.inf), ("<d", 1e308), (">i", 2**31 - 1), (">h", 30000))]


def damaged(rng, data: bytes) -> bytes:
    "Bits flipped, blocks removed, doubled, zeroed or inserted, the end cut off, an extreme number somewhere."
    data, n = bytearray(data), len(data)
    if not n: return b"x"
    head = rng.random() < 0.5  # headers are small and decide everything
    at = int(rng.integers(min(n, 600) if head else n))
    size = int(2**rng.uniform(0, np.log2(min(n, 4096) + 1)))
    match rng.integers(9):
        case 0 | 1:
            for _ in range(int(rng.integers(1, 9))): data[int(rng.integers(min(n, 600) if head else n))] ^= 1 << int(rng.integers(8))
        case 2: del data[at:]
        case 3: del data[at:at + size]
        case 4: data[at:at] = data[at:at + size]
        case 5: data[at:at] = rng.bytes(size)
        case 6: data[at:at + size] = bytes(len(data[at:at + size]))
        case 7: data[at:at + size] = b"\xff"*len(data[at:at + size])
        case 8:
            number = NUMBERS[int(rng.integers(len(NUMBERS)))]
            data[at:at + len(number)] = number
    return bytes(data)


def damage(rng, path):
    "A file damaged once or several times, or replaced by something else."
    data = path.read_bytes()
    if rng.random() < 0.05: data = [b"", b"\0"*1000, b"no such file", rng.bytes(2000), b"PK\x03\x04", b"\x1f\x8b\x08\0"][int(rng.integers(6))]
    for _ in range(int(rng.integers(1, 4))): data = damaged(rng, data)
    path.write_bytes(data)


# --- JSON and CSV ---

ODD = [None, True, False, 0, -1, 1, 2**31, -2**63, 10**400, 1e308, float("nan"), float("inf"), 0.5, "", "x", "9"*50, "\0\u202e\x1b[31m", "é\n\r\n", "y"*5000,
       [], [[]], {}, {"a": 1}, [1, 2], [[0.0]*3]*4, [None], ["a", 1], {"sax": None}, {"sax": [1]}, [10**400], [float("nan")]*4, list(range(3000))]


def odd(rng): return ODD[int(rng.integers(len(ODD)))]


def places(value, at=()):
    "Every place in a JSON value, as a path of keys."
    yield at
    for key, inner in (value.items() if isinstance(value, dict) else enumerate(value[:8]) if isinstance(value, list) else ()):
        yield from places(inner, (*at, key))


def odd_value(rng, value):
    "A JSON value with one of its parts changed, removed, doubled or buried."
    value = json.loads(json.dumps(value))
    paths = [p for p in places(value) if p]
    if not paths: return odd(rng)
    *way, last = paths[int(rng.integers(len(paths)))]
    holder = value
    for key in way: holder = holder[key]
    match rng.integers(6):
        case 0: del holder[last]
        case 1: holder[last] = [holder[last]]
        case 2 if isinstance(holder[last], list): holder[last] = holder[last]*3
        case 3 if isinstance(holder[last], (int, float)) and abs(holder[last]) < 1e300: holder[last] = [-holder[last], holder[last]*1e9, holder[last]*1e-9][int(rng.integers(3))]
        case 4 if isinstance(holder, dict): holder["unknown " + "k"*int(rng.integers(200))] = odd(rng)
        case _: holder[last] = odd(rng)
    return value


def odd_text(rng, text: str) -> bytes:
    "Text in odd encodings, nested deeply, cut short or empty."
    raw = text.encode()
    match rng.integers(9):
        case 0: return text.encode("utf-16")
        case 1: return raw.replace(b"a", b"\xe9").replace(b"e", b"\xff")
        case 2: return b"\xef\xbb\xbf" + raw
        case 3: return b"["*int(rng.integers(1000, 200_000))
        case 4: return b'{"a":'*int(rng.integers(1000, 200_000)) + b"1" + b"}"*1000
        case 5: return b"9"*int(rng.integers(1, 100_000))
        case 6: return raw[:int(rng.integers(len(raw)))]
        case 7: return raw.replace(b"0", b"NaN").replace(b"1", b"1e999")
    return damaged(rng, raw)


def odd_json(rng, path):
    text = path.read_text(encoding="utf-8")
    if rng.random() < 0.3: return path.write_bytes(odd_text(rng, text))
    value = json.loads(text)
    for _ in range(int(rng.integers(1, 4))): value = odd_value(rng, value)
    path.write_text(json.dumps(value, ensure_ascii=bool(rng.random() < 0.5)), encoding="utf-8", errors="surrogatepass")


def odd_csv(rng, path):
    text = path.read_text()
    if rng.random() < 0.3: return path.write_bytes(odd_text(rng, text))
    rows = list(csv.reader(io.StringIO(text)))
    row, column = int(rng.integers(len(rows))), int(rng.integers(len(rows[0])))
    match rng.integers(8):
        case 0:
            for r in rows: del r[column]
        case 1: rows[row] = rows[row][:column]
        case 2: rows[row] += ["1"]*int(rng.integers(1, 50))
        case 3: rows[row][column] = "z"*200_000
        case 4: rows[row][column] = str(rng.choice(["nan", "inf", "-1", "1e400", "9"*30, "1.5", "", " 1 ", "\0", "９", "1_0", '"', "-0", "sax\n"]))
        case 5: rows.insert(row, [])
        case 6: rows = rows*3
        case _: rows[row][column] = str(odd(rng))
    out = io.StringIO()
    csv.writer(out, quoting=csv.QUOTE_NONE, escapechar="\\").writerows(rows) if rng.random() < 0.1 else csv.writer(out).writerows(rows)
    path.write_text(out.getvalue(), encoding="utf-8", errors="surrogatepass")


# --- DICOM and NIfTI ---

DICOM_VALUES = dict(
    Rows=[0, 1, 65535], Columns=[0, 1, 65535], NumberOfFrames=["0", "-1", "2000000000", "7"], SamplesPerPixel=[0, 3, 65535], BitsAllocated=[0, 1, 8, 32, 64, 65535],
    BitsStored=[0, 65535], HighBit=[0, 65535], PixelRepresentation=[1, 65535], PhotometricInterpretation=["", "RGB", "YBR_FULL", "X" * 16],
    PixelSpacing=[["0", "0"], ["-3", "3"], ["1e30", "1e30"], ["1e-30", "3"], ["nan", "3"], ["3"], []], SliceThickness=["0", "-8", "1e30", "nan", "inf", ""],
    ImagePositionPatient=[["0", "0", "0"], ["1e30", "0", "0"], ["nan"] * 3, ["1"], ["-1e300", "1e300", "0"]],
    ImageOrientationPatient=[["0"] * 6, ["nan"] * 6, ["1e200"] * 6, ["1", "0", "0", "1", "0", "0"], ["1"]], TriggerTime=["-1e9", "nan", "1e300", "", "0"],
    NominalInterval=["0", "-5", "2147483647"], RescaleSlope=["0", "nan", "inf", "1e300", "-1"], RescaleIntercept=["nan", "-1e308", "inf"],
    AcquisitionMatrix=[[0, 0, 0, 0], [65535] * 4, [1]], InstanceNumber=["-2147483648", "2147483647"], SeriesNumber=["-2147483648", "2147483647", ""],
    SeriesInstanceUID=["", "1.2.3.1", "9" * 64], SOPInstanceUID=["", "1"], SOPClassUID=["1.2.840.10008.5.1.4.1.1.4.1", "1.2.840.10008.5.1.4.1.1.4", "", "x"],
    SeriesDescription=["\x1b[2J", "sax" * 20, "\\\\"], PatientAge=["999Y", "x"], PatientSize=["nan", "1e300"], PatientID=["\0", "q"], Manufacturer=["\xff", "GE"],
    ImageType=[["P"] * 3, [], ["\0"]], InPlanePhaseEncodingDirection=["", "XYZ"], PixelData=[b"", b"\0", bytes(2 * 48 * 48 - 2), bytes(10**6)], MagneticFieldStrength=["nan", "-1"])
SYNTAXES = ["1.2.840.10008.1.2", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.1.99", "1.2.3", ""]


def odd_dicom(rng, path):
    "Extreme values in the header, one or a few."
    ds = pydicom.dcmread(path)
    for _ in range(int(rng.integers(1, 4))):
        holder = ds
        if "PerFrameFunctionalGroupsSequence" in ds and rng.random() < 0.5:
            groups = ds.PerFrameFunctionalGroupsSequence if rng.random() < 0.7 else ds.SharedFunctionalGroupsSequence
            inner = groups[int(rng.integers(len(groups)))]
            element = list(inner)[int(rng.integers(len(list(inner))))]
            if rng.random() < 0.2: del inner[element.tag]; continue
            holder = element.value[0] if len(element.value) else ds
        name = str(rng.choice([k for k in DICOM_VALUES if k in holder] or list(DICOM_VALUES)) if rng.random() < 0.8 else rng.choice(list(DICOM_VALUES)))
        if rng.random() < 0.15 and name in holder: delattr(holder, name); continue
        element = pydicom.dataelem.DataElement(pydicom.datadict.tag_for_keyword(name), "UN", None)
        vr = "OW" if name == "PixelData" else pydicom.datadict.dictionary_VR(element.tag).split(" ")[0]
        value = DICOM_VALUES[name][int(rng.integers(len(DICOM_VALUES[name])))]
        raw = value if isinstance(value, bytes) else np.array(value, "<u2").tobytes() if vr == "US" else (
            "\\".join(value) if isinstance(value, list) else value).encode("latin-1")
        holder[element.tag] = pydicom.dataelem.RawDataElement(element.tag, vr, len(raw) + len(raw) % 2, raw + b" "*(len(raw) % 2), 0, False, True)
    if rng.random() < 0.1: ds.file_meta.TransferSyntaxUID = SYNTAXES[int(rng.integers(len(SYNTAXES)))]
    kept = path.read_bytes()
    try: ds.save_as(path, enforce_file_format=False, little_endian=True, implicit_vr=False)
    except Exception: path.write_bytes(damaged(rng, kept))  # pydicom would not write it


def dicom_bomb(rng, path):
    "A deflated file that is a thousand times larger unpacked; sequences within sequences."
    data = path.read_bytes()
    ds = pydicom.dcmread(path)
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    meta = io.BytesIO()
    pydicom.filewriter.write_file_meta_info(meta, ds.file_meta)
    start = data.index(b"\x08\x00\x16\x00UI")  # SOPClassUID: where the data set begins
    if rng.random() < 0.6: body = data[start:] + struct.pack("<HH2sHI", 0x7fe1, 0x1010, b"OB", 0, 1_500_000_000) + bytes(8)
    else: body = data[start:] + struct.pack("<HH2sHI", 0x7fe1, 0x1010, b"SQ", 0, 0xffffffff)*1 + struct.pack("<HHIHH2sHI", 0xfffe, 0xe000, 0xffffffff, 0x9, 0x10, b"SQ", 0, 0xffffffff)*3000
    if rng.random() < 0.5: return path.write_bytes(data[:start] + body)
    squeeze = zlib.compressobj(6, zlib.DEFLATED, -15)
    first, zeros = (squeeze.compress(part) + squeeze.flush(zlib.Z_FULL_FLUSH) for part in (body, bytes(1 << 24)))
    packed = first + zeros*(100 if rng.random() < 0.5 else 2) + squeeze.flush()
    path.write_bytes(bytes(128) + b"DICM" + meta.getvalue() + packed)


NIFTI = dict(sizeof_hdr=(0, "<i"), dim=(40, "<8h"), datatype=(70, "<h"), bitpix=(72, "<h"), pixdim=(76, "<8f"), vox_offset=(108, "<f"), slope=(112, "<f"), inter=(116, "<f"),
             units=(123, "<B"), qform_code=(252, "<h"), sform_code=(254, "<h"), quatern=(256, "<6f"), srow=(280, "<12f"), extension=(348, "<B"), magic=(344, "<I"))
SHORTS = [0, 1, -1, 2, 7, 32767, -32768, 30000, 512, 4096]
FLOATS = [np.nan, np.inf, -np.inf, 0, -1, 1e38, 1e-38, 348, 352, 2**31, 1e6, 1e3, 1e-3]
TYPES = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304, -1, 9999]


def odd_nifti(rng, path):
    "Extreme numbers in the header, or far more zeros than a file of its size could hold."
    raw = bytearray(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
    for _ in range(int(rng.integers(1, 4))):
        name = str(rng.choice(list(NIFTI)))
        offset, form = NIFTI[name]
        kind, size = form[-1], struct.calcsize("<" + form[-1])
        at = offset + size*int(rng.integers(int(form[1:-1] or 1)))
        choices = TYPES if name == "datatype" else FLOATS if kind == "f" else SHORTS
        value = choices[int(rng.integers(len(choices)))]
        raw[at:at + size] = struct.pack("<" + kind, value if kind in "hif" else value & 255)
    bomb = rng.random() < 0.06
    if bomb:
        shape = [(8192, 8192, 3), (16000, 16000, 1), (2000, 2000, 60), (500, 500, 10, 100)][int(rng.integers(4))]
        raw[40:56] = struct.pack("<8h", len(shape), *shape, *[1]*(7 - len(shape)))
        code, bits = [(4, 16), (16, 32), (64, 64), (1792, 128)][int(rng.integers(4))]
        raw[70:74] = struct.pack("<2h", code, bits)
    if path.suffix != ".gz": return path.write_bytes(bytes(raw))
    path.write_bytes(gzip.compress(bytes(raw)) + gzip.compress(bytes(1 << 24))*60*bomb)


# --- archives of arrays ---

def odd_npy(rng, data: bytes) -> bytes:
    "An array whose header lies, or another array."
    array = np.atleast_1d(np.load(io.BytesIO(data)))
    with io.BytesIO() as out:
        if rng.random() < 0.5:
            shape = [(2**40,), (-1, 4), (2**62, 4), (0,), (), (2**31, 1, 1), array.shape[::-1], (1, *array.shape), (10**9, *array.shape[1:])][int(rng.integers(9))]
            kind = str(rng.choice([array.dtype.str, "<f8", "|O", "<U100000000", "<m8[ns]", "|V99999", "<c16", "|b1"]))
            text = repr(dict(descr=kind, fortran_order=bool(rng.random() < 0.5), shape=shape))
            if rng.random() < 0.15: text = "("*5000 + text
            text = text.ljust(117) + "\n"
            out.write(b"\x93NUMPY\x01\0" + struct.pack("<H", len(text) & 0xffff) + text.encode() + array.tobytes())
        else:
            number = array if array.dtype.kind in "uifb" else np.arange(2)
            other = [number.astype(float), np.full(array.shape, np.nan), array.ravel(), array[..., None], array[:0], number.astype(np.int64) - 5, np.array(3), np.array(["x"]),
                     number.astype(complex), array[:1]][int(rng.integers(10))]
            np.save(out, other)
        return out.getvalue()


def odd_archive(rng, path, change, deflated=True):
    "A zip whose members were changed, and whose sums are right again; or one that unpacks to far more."
    with zipfile.ZipFile(path) as old: members = {m.filename: old.read(m) for m in old.infolist()}
    names = list(members)
    name = names[int(rng.integers(len(names)))]
    match rng.integers(8):
        case 0: del members[name]
        case 1: members[name + "x"] = members.pop(name)
        case 2: members[name] = damaged(rng, members[name])
        case 3 if rng.random() < 0.05: members[name] = members[name][:128] + bytes(1_200_000_000)
        case _: members[name] = change(rng, name, members[name])
    how = zipfile.ZIP_DEFLATED if deflated or len(members.get(name, b"")) > 1 << 28 else zipfile.ZIP_STORED
    if rng.random() < 0.05: how = [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED][int(rng.integers(3))] if len(members.get(name, b"")) < 1 << 26 else how
    with zipfile.ZipFile(path, "w", how, compresslevel=1) as new:
        for key, data in members.items(): new.writestr(key, data)


def odd_npz(rng, path): odd_archive(rng, path, lambda rng, name, data: odd_npy(rng, data))


# --- checkpoints ---

class Trap:
    "Unpickled, it would leave a trace."
    def __reduce__(self): return [(os.system, ("touch trace",)), (eval, ("open('trace', 'w')",)), (exec, ("open('trace', 'w')",)), (bytearray, (2**40,)), (torch.Tensor, (2**20, 2**20)),
                                  (print, ("x",)), (os.getcwd, ())][self.n]
    def __init__(self, n): self.n = int(n)


def odd_tensor(rng, tensor):
    if tensor.layout != torch.strided or tensor.is_meta or tensor.numel() > 1e7: return torch.zeros(3)
    x = tensor.detach().clone()
    match rng.integers(10):
        case 0: return x*float("nan")
        case 1: return x.flatten()
        case 2: return torch.zeros(1).expand(*x.shape[:-1], 2**40) if x.dim() else x.bool()
        case 3: return x.to(torch.complex64)
        case 4: return x[:0] if x.dim() else x[None]
        case 5: return x.to_sparse() if x.dim() else x[None]
        case 6: return torch.empty(x.shape, device="meta")
        case 7: return (x*1000).to(torch.int8)
        case 8: return x.double()*1e300
    return x.transpose(0, -1) if x.dim() else torch.zeros(2**10, 2**10).expand(2, -1, -1)


def odd_state(rng, found):
    "One thing in a checkpoint changed, at any depth."
    places, todo = [], [found]
    while todo:
        holder = todo.pop()
        for key, value in (holder.items() if isinstance(holder, dict) else enumerate(holder)):
            places.append((holder, key))
            if isinstance(value, (dict, list)): todo.append(value)
    if rng.random() < 0.3: places = [p for p in places if p[0] is found]
    holder, key = places[int(rng.integers(len(places)))]
    value = holder[key]
    match rng.integers(5):
        case 0: del holder[key]
        case 1 if isinstance(holder, dict): holder[str(key) + "x\n"*100] = value
        case 2: holder[key] = Trap(rng.integers(7))
        case 3 if not isinstance(value, torch.Tensor): holder[key] = odd(rng)
        case _: holder[key] = odd_tensor(rng, value) if isinstance(value, torch.Tensor) else torch.zeros(3) if rng.random() < 0.2 else odd(rng)


def odd_numbers(rng, name, data):
    "The pickle inside an archive, with other integers: how many numbers a storage holds, shapes, strides, offsets."
    if not name.endswith("data.pkl"): return damaged(rng, data)
    ops = [(op.name, at) for op, _, at in pickle_ops(data)]
    ints = [(op, at) for op, at in ops if op in ("BININT", "BININT1", "BININT2")]
    if not ints: return damaged(rng, data)
    for _ in range(int(rng.integers(1, 3))):
        op, at = ints[int(rng.integers(len(ints)))]
        size = dict(BININT=4, BININT1=1, BININT2=2)[op]
        data = data[:at + 1] + rng.choice([b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\1\0", b"\2\1\0\0"])[:size].ljust(size, b"\0") + data[at + 1 + size:]
    return data


def pickle_ops(data):
    import pickletools
    return pickletools.genops(data)


def odd_checkpoint(rng, path):
    "What a checkpoint holds, changed and saved again; its archive, with other numbers; or another kind of pickle."
    match rng.integers(10):
        case 0: path.write_bytes(pickle.dumps(Trap(rng.integers(7)), int(rng.integers(2, 5))))
        case 1: torch.save(torch.load(path, weights_only=False), path, _use_new_zipfile_serialization=False); damage(rng, path)
        case 2 | 3 | 4: odd_archive(rng, path, odd_numbers, deflated=False)
        case 5: damage(rng, path)
        case _:
            found = torch.load(path, weights_only=False)
            for _ in range(int(rng.integers(1, 3))): odd_state(rng, found)
            torch.save(found, path)


# --- safetensors ---

def odd_weights(rng, path):
    "Another header, another card in it, or other numbers."
    data = path.read_bytes()
    if rng.random() < 0.2: return damage(rng, path)
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8:8 + size]), bytearray(data[8 + size:])
    names = [k for k in header if k != "__metadata__"]
    name = names[int(rng.integers(len(names)))]
    match rng.integers(8):
        case 0 | 1 | 2:
            card = json.loads(header["__metadata__"]["card"])
            for _ in range(int(rng.integers(1, 3))): card = odd_value(rng, card)
            header["__metadata__"]["card"] = json.dumps(card) if rng.random() < 0.8 else odd_text(rng, json.dumps(card)).decode("latin-1")
        case 3: header = odd_value(rng, header)
        case 4: header[name] = odd_value(rng, header[name])
        case 5:
            first, last = header[name]["data_offsets"]
            body[first:last] = (rng.choice([b"\xff\xff", b"\0\x7c", b"\x80\x7f", b"\xff\x7b"])*(last - first))[:last - first]
        case 6: header[name + rng.choice(["x", "\n", "\x1b", "q"*3000])] = header.pop(name)
        case 7: header[name]["shape"] = header[name]["shape"][::-1] + [1]*int(rng.integers(3))
    text = json.dumps(header).encode()
    length = len(text) if rng.random() < 0.9 else int(rng.choice([0, 2**31, 2**62, len(text) + 1]))
    path.write_bytes(length.to_bytes(8, "little") + text + bytes(body))


# --- data sets ---

def odd_store(rng, path):
    "A record or a picture of a data set, changed; or the file itself, damaged, most often in the pages that hold its tree."
    if rng.random() < 0.5:
        with lmdb.open(str(path.parent), map_size=1 << 28, lock=False) as env, env.begin(write=True) as write:
            keys = [k for k, _ in write.cursor()]
            key = keys[int(rng.integers(len(keys)))]
            value = write.get(key)
            if rng.random() < 0.1: return write.delete(key)
            if value[:1] == b"{" and rng.random() < 0.8: value = json.dumps(odd_value(rng, json.loads(value))).encode() if rng.random() < 0.7 else odd_text(rng, value.decode())
            else: value = damaged(rng, value)
            write.put(key, value)
        return
    data = path.read_bytes()
    page = 4096*int(rng.integers(len(data)//4096))
    inner = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        at, number = page + int(rng.integers(200 if rng.random() < 0.7 else 4096)), NUMBERS[int(rng.integers(len(NUMBERS)))]
        if rng.random() < 0.5: inner[at] ^= 1 << int(rng.integers(8))
        else: inner[at:at + len(number)] = number
    path.write_bytes(bytes(inner)) if rng.random() < 0.7 else damage(rng, path)


# --- the kinds: a valid sample, what is done to it, how it is read ---

@dataclass(frozen=True)
class Kind:
    make: object            # (folder): writes a valid sample
    files: tuple            # patterns of the files that are mutated, one of them at a time
    mutate: tuple           # functions (rng, path), one of which is drawn
    read: object            # (folder)
    names: str = ""         # what a refusal may name instead of the file, a regular expression


def make_dicom(folder):
    for n in range(3): write_slice(folder, n + 1, AXIS, 10*n*AXIS, frames=3)


def make_enhanced(folder):
    write_enhanced(folder/"stack.dcm", 9, [(AXIS, 10*n*AXIS) for n in range(3)], frames=3)


def make_study(folder):
    s = made_up_study(slices=3, frames=3)
    s.given_poses = {n: np.ones((len(v.images), 6)) for n, v in s.views.items()}
    s.save(folder/"patient")


def make_reference(folder):
    make_study(folder)
    from mgdcr.study import _save_nifti
    cube = np.arange(8*9*10.0).reshape(8, 9, 10)
    for name in ("reference", "reference_labels"): _save_nifti(folder/"patient"/f"{name}.nii", cube.astype(np.float32) % 4, np.diag([1.4, 1.4, 1.4, 1]))


def read_study(folder):
    study = Study.load(folder/"patient")
    study.slices(study.phase("ED")), study.noise(), study.intensity_range()
    return study


def read_dicom_study(folder):
    study = Study.load(folder)
    study.slices(study.phase("ED")), study.noise()


def make_store(folder):
    def source(n):
        image = np.zeros((128, 128), np.float32)
        image[:12] = np.random.default_rng(n).uniform(-1, 1, (12, 128))  # enough for a page of its own
        cut = dict(affine=np.eye(4), s=0.5, phase=0.0, spacing_mm=1.4)
        for k in range(8):
            for kind in ("thin", "acquired"): yield SliceRecord(f"phantom-{n}", "sax", kind, k, k, **cut), np.roll(image, k*997 + n)
    write_lmdb(folder/"x.lmdb", [(f"phantom-{n}", lambda n=n: source(n)) for n in (10000, 10001)])
    shutil.rmtree(folder/"x.lmdb"/"lock.mdb", ignore_errors=True)


def read_store(folder):
    _close(folder/"x.lmdb")
    store = SliceStore(folder/"x.lmdb")
    store.provenance
    data = SliceDataset(folder/"x.lmdb", "train", "sax", "pair")
    for n in range(len(data)): data[n]
    _close(folder/"x.lmdb")


def small_prior(config=SMALL, samples=5):
    torch.manual_seed(0)
    z, d = config.z, torch.float64
    latents = LatentModel(torch.linspace(0, 1, 3, dtype=d), torch.zeros(3, z, dtype=d), torch.eye(z, dtype=d), *(torch.full((z,), x, dtype=d) for x in (1.0, 0.2, 0.1)))
    return Prior(UNet(config), dict(name="small", kind="prior", samples=samples, pixel_mm=1.4, slab_mm=0), latents if config.has_encoder else None)


def make_plain(folder): save_prior(small_prior(replace(SMALL, encoder_mult=(), z_map=0)), folder/"mine.safetensors")


@torch.no_grad()
def read_prior(folder, name="mine.safetensors"):
    prior = load_prior(folder/name, bf16=False)
    z, side = (torch.zeros(1, prior.config.z) if prior.config.has_encoder else None), prior.config.patch*2**(len(prior.config.mult) - 1)*4
    if prior.config.z_map: side = prior.config.size
    prior.eps(torch.zeros(1, prior.config.image_channels, side, side), torch.zeros(1, dtype=torch.long), z)
    if prior.latents: prior.latents.mean(torch.zeros(2, dtype=torch.float64)), prior.latents.covariance(torch.zeros(2, dtype=torch.float64))
    int(prior.card.get("samples") or 0)


def make_cards(folder): save_prior(small_prior(), folder/"mine.safetensors")


def read_cards(folder):
    "As if the folder were the package's own, whose cards say which weights ship."
    kept, diffae.weights_folder = diffae.weights_folder, lambda: folder
    try: shipped("prior"), load_prior("mine")
    finally: diffae.weights_folder = kept


def make_checkpoint(folder):
    NETWORKS["small"] = SMALL
    run = begin(Recipe(**RECIPE))
    for p in run.network.parameters(): p.grad = torch.zeros_like(p)
    run.optimizer.step()
    run.step = 1
    run.save(folder/"last.ckpt")


def read_checkpoint(folder):
    "Used for its weights, gone on from, and, where that went well, trained for a step."
    NETWORKS["small"] = SMALL
    refused = None
    try: read_prior(folder, "last.ckpt")
    except StudyError as error: refused = error
    run = begin(Recipe(**RECIPE), checkpoint=folder/"last.ckpt")
    for p in run.network.parameters(): p.grad = torch.zeros_like(p)
    run.optimizer.step(), run.samples
    from mgdcr.training import _average
    _average(run.ema, run.network, 0.9)
    if refused: raise refused


def make_official(folder):
    from safetensors.torch import load_file
    tensors = load_file(Path(__file__).parent/"fixtures"/"diffae_tiny_autoenc.safetensors")
    x_T = tensors.pop("x_T")
    torch.save(dict(state_dict={**{f"ema_model.{k}": v for k, v in tensors.items()}, "x_T": x_T}, global_step=1, epoch=3, hyper=dict(a=[1, 2])), folder/"last.ckpt")


def make_latents(folder): torch.save(dict(conds=torch.ones(7, 5), conds_mean=torch.zeros(1, 5), conds_std=torch.ones(1, 5)), folder/"latent.pkl")


def make_patches(folder): save_patches(PatchPrior(torch.nn.ModuleList([PatchNet()]), dict(kind="patches", inputs=len(AROUND), samples=3)), folder/"mine.safetensors")
def make_segmenter(folder): save_segmenter(Segmenter(label_network(), dict(kind="segmenter", cavity_logit=0.1, samples=3)), folder/"mine.safetensors")
def make_unet3d(folder): save_unet3d(VolumePrior(volume_network(), dict(kind="unet3d", samples=3)), folder/"mine.safetensors")


def make_arrays(folder):
    image = np.arange(3*20*24, dtype=np.uint16).reshape(3, 20, 24)
    np.savez_compressed(folder/"patient001_ED.npz", image=image, label=(image % 4).astype(np.uint8))


def make_volumes(folder):
    x = np.arange(2*4*9*10, dtype=np.uint8).reshape(2, 4, 9, 10)
    save_volumes(folder/"phantom-10000.npz", Volumes(x, x, x > 100, x, x[:, :, :9, :10]))


def make_stacks(folder):
    x = np.arange(3*20*24).astype(np.uint8).reshape(3, 20, 24)
    save_stacks(folder/"phantom-10000.npz", [Stack("thin", x, x % 4, 1.4), Stack("acquired", x[:2], x[:2] % 4, 10.0)])


def make_map(folder):
    x, y, z = np.mgrid[:60, :60, :70] - 30
    r = np.sqrt(x**2 + y**2 + (z/1.3)**2)
    data = np.where(r < 16, 1, np.where(r < 22, 2, 0))
    for label, where in ((3, x < -8), (4, z < -20)): data[(r >= 22) & (r < 28) & where] = label
    nib.save(nib.Nifti1Image(data.astype(np.uint8), np.diag([2.0, 2, 2, 1])), folder/"heart.nii.gz")


def make_labels(folder):
    x = np.arange(20*24*3, dtype=np.uint8).reshape(20, 24, 3) % 4
    nib.save(nib.Nifti1Image(x, np.diag([1.4, 1.4, 8, 1])), folder/"sax_labels_ed.nii.gz")


def read_map(folder): read_label_map(folder/"heart.nii.gz", dict(lv=1, lv_wall=2, rv=3, la=4))


STUDY = r"study\.json|poses\.csv|\bsax|SAX|lax_4ch|patient|ed_frame|es_frame|reference"
SERIES = r"Se-?\d+|\bmade holds|DICOM|short-axis|SAX|\bsax|lax_\dch"
KINDS = {
    "dicom": Kind(make_dicom, ("*.dcm",), (damage, odd_dicom, odd_dicom, odd_dicom, dicom_bomb), read_dicom_study, SERIES),
    "dicom_enhanced": Kind(make_enhanced, ("stack.dcm",), (damage, odd_dicom, odd_dicom, dicom_bomb), read_dicom_study, SERIES),
    "nifti": Kind(make_study, ("patient/*.nii.gz",), (damage, odd_nifti, odd_nifti, odd_nifti), lambda folder: read_study(folder).find_es(), STUDY),
    "nifti_reference": Kind(make_reference, ("patient/reference*.nii",), (damage, odd_nifti, odd_nifti), read_study, STUDY),
    "study_json": Kind(make_study, ("patient/study.json",), (odd_json,), read_study, STUDY),
    "poses_csv": Kind(make_study, ("patient/poses.csv",), (odd_csv,), read_study, STUDY),
    "lmdb": Kind(make_store, ("x.lmdb/data.mdb",), (odd_store,), read_store, r"x\.lmdb"),
    "checkpoint": Kind(make_checkpoint, ("last.ckpt",), (odd_checkpoint,), read_checkpoint),
    "official_checkpoint": Kind(make_official, ("last.ckpt",), (odd_checkpoint,), lambda folder: read_prior(folder, "last.ckpt")),
    "latents": Kind(make_latents, ("latent.pkl",), (odd_checkpoint,), lambda folder: load_latents(folder/"latent.pkl")),
    "prior": Kind(make_cards, ("mine.safetensors",), (odd_weights,), read_prior),
    "ddim": Kind(make_plain, ("mine.safetensors",), (odd_weights,), read_prior),
    "cards": Kind(make_cards, ("mine.json",), (odd_json, odd_json, damage), read_cards, r"'mine'|mine\.safetensors"),
    "patches": Kind(make_patches, ("mine.safetensors",), (odd_weights,), lambda folder: load_patches(folder/"mine.safetensors")),
    "segmenter": Kind(make_segmenter, ("mine.safetensors",), (odd_weights,), lambda folder: load_segmenter(folder/"mine.safetensors")),
    "unet3d": Kind(make_unet3d, ("mine.safetensors",), (odd_weights,), lambda folder: load_unet3d(folder/"mine.safetensors")),
    "arrays": Kind(make_arrays, ("*.npz",), (damage, odd_npz, odd_npz), lambda folder: read_arrays(folder/"patient001_ED.npz")),
    "volumes": Kind(make_volumes, ("*.npz",), (damage, odd_npz, odd_npz), lambda folder: load_volumes(folder/"phantom-10000.npz")),
    "stacks": Kind(make_stacks, ("*.npz",), (damage, odd_npz, odd_npz), lambda folder: load_stacks(folder/"phantom-10000.npz")),
    "labels_beside": Kind(make_labels, ("*.nii.gz",), (damage, odd_nifti, odd_nifti), folder_labels),
    "label_map": Kind(make_map, ("heart.nii.gz",), (damage, odd_nifti, odd_nifti), read_map),
}


# --- one case, and many in children ---

def mutated(kind: str, sample: Path, place: Path, seed: int, number: int) -> Path:
    "A copy of the sample with one file mutated: that file."
    rng = np.random.default_rng([seed, list(KINDS).index(kind), number])
    shutil.copytree(sample, place)
    found = sorted(path for pattern in KINDS[kind].files for path in place.glob(pattern))
    path = found[int(rng.integers(len(found)))]
    with warnings.catch_warnings(action="ignore"): KINDS[kind].mutate[int(rng.integers(len(KINDS[kind].mutate)))](rng, path)
    return path


def verdict(error: BaseException | None, path: Path, names: str) -> str:
    "'read', 'refused', or what is wrong."
    import re
    if error is None: return "read"
    text, chain = str(error), error
    while chain:
        if isinstance(chain, MemoryError) or "can't allocate memory" in str(chain): return f"memory was asked for without measure ({text[:100]})"
        chain = chain.__cause__ or chain.__context__
    if not isinstance(error, StudyError): return f"{type(error).__name__}: {text[:200]}"
    if not (text.endswith(".") and text.isprintable() and len(text) < 320 and "Traceback" not in text): return f"no sentence: {text[:400]!r}"
    if str(path.parent) in text: return f"an absolute path: {text}"
    return "refused" if path.name in text or names and re.search(names, text) else f"it names nothing: {text}"


def memory(key):
    "VmRSS or VmHWM of this process, bytes."
    with open("/proc/self/status") as file: return next(int(line.split()[1])*1024 for line in file if line.startswith(key))


def case(kind, sample, folder, seed, number):
    "One mutation, read: what came of it, seconds, and the growth of memory in bytes."
    place = folder/"made"
    shutil.rmtree(place, ignore_errors=True)
    path, error = mutated(kind, sample, place, seed, number), None
    os.chdir(place)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before, start = memory("VmRSS"), time.perf_counter()
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stderr(io.StringIO()): KINDS[kind].read(place)
    except Exception as found: error = found
    seconds, grown = time.perf_counter() - start, max(0, memory("VmHWM") - before)
    told = verdict(error, path, KINDS[kind].names)
    if any(place.rglob("trace")): told = "a pickle was run"
    if grown > MOST_BYTES: told = f"{grown >> 20} MB of memory"
    return told, seconds, grown


def child(kind, sample, folder, seed, numbers, out):
    "Cases one after another, each told as a line."
    import logging
    logging.disable(logging.CRITICAL)
    size = int(Path("/proc/self/statm").read_text().split()[0])*os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + LIMIT_BYTES,)*2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in numbers: os.write(out, (json.dumps([number, *case(kind, sample, folder, seed, number)]) + "\n").encode())


def run(kind, count, seed, folder: Path, first=0, tell=None) -> dict:
    "Read `count` mutations of a kind in children; the figures, and the defects as (number, what)."
    sample, numbers, lines = folder/f"{kind} sample", list(range(first, first + count)), []
    sample.mkdir()
    with warnings.catch_warnings(action="ignore"): KINDS[kind].make(sample)
    with warnings.catch_warnings(action="ignore"): KINDS[kind].read(sample)  # the sample itself is good
    while numbers:
        done, why = _batch(kind, sample, folder, seed, numbers)
        lines += done
        numbers = numbers[len(done):]
        if numbers: lines.append([numbers.pop(0), why, 0.0 if "signal" in why else MOST_SECONDS, 0])
        if tell: tell(lines)
    told = [line[1] for line in lines]
    defects = [(line[0], line[1]) for line in lines if line[1] not in ("read", "refused")]
    return dict(tried=len(lines), read=told.count("read"), refused=told.count("refused"), defects=defects,
                slowest_s=round(max(line[2] for line in lines), 2), most_memory_mb=round(max(line[3] for line in lines)/2**20))


def _batch(kind, sample, folder, seed, numbers):
    "Run a child until it ends, dies or is too slow: the lines it told, and what ended it."
    into, out = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(into)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        try: child(kind, sample, folder, seed, numbers, out)
        except BaseException as error: os.write(out, f"\n{type(error).__name__}: {error}".encode()[:500])
        finally: os._exit(0)
    os.close(out)
    data, slow = b"", False
    while True:
        ready, _, _ = select.select([into], [], [], MOST_SECONDS + 15)  # making a case takes time, too
        if not ready:
            slow = True
            os.kill(pid, signal.SIGKILL)
        part = os.read(into, 1 << 16)
        if not part: break
        data += part
    os.close(into)
    _, status = os.waitpid(pid, 0)
    lines, rest = [], ""
    for text in data.decode().split("\n"):
        try: lines.append(json.loads(text))
        except ValueError: rest = text or rest
    for line in lines:
        if line[2] > MOST_SECONDS: line[1] = f"{line[2]:.0f} s"
    return lines, "too slow" if slow else f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else rest or "the child ended"


def versions():
    from importlib.metadata import version
    return {name: version(name) for name in ("pydicom", "nibabel", "numpy", "torch", "safetensors", "lmdb", "pillow")} | {"python": sys.version.split()[0]}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--count", type=int, default=100, help="mutations of each kind")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--kinds", default="", help="separated by commas; all by default")
    p.add_argument("--first", type=int, default=0, help="number of the first mutation")
    p.add_argument("--record", help="a JSON file for the figures")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.kinds.split(",") if args.kinds else KINDS:
            start = time.perf_counter()
            found[kind] = run(kind, args.count, args.seed, Path(folder), args.first)
            f = found[kind]
            print(f"{kind:20s} {f['tried']:5d} tried {f['read']:5d} read {f['refused']:5d} refused {len(f['defects']):4d} defects; "
                  f"slowest {f['slowest_s']:.2f} s, {f['most_memory_mb']} MB; {time.perf_counter() - start:.0f} s in all", flush=True)
            for number, what in f["defects"]: print(f"    {number}: {what}", flush=True)
    if args.record:
        kinds = {kind: f | dict(defects=len(f["defects"])) for kind, f in found.items()}
        total = {key: sum(f[key] for f in kinds.values()) for key in ("tried", "read", "refused", "defects")}
        facts = dict(seed=args.seed, most_seconds=MOST_SECONDS, most_memory_mb=MOST_BYTES >> 20, total=total, kinds=kinds, versions=versions())
        Path(args.record).write_text(json.dumps(facts, indent=1) + "\n")
    return int(any(f["defects"] for f in found.values()))


if __name__ == "__main__": sys.exit(main())
