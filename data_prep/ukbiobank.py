"""UK Biobank heart MRI, as its bulk fields are downloaded → study folders.

The layout (https://biobank.ndph.ox.ac.uk/showcase/field.cgi?id=20208 and id=20209; the protocol: S. E. Petersen et al.,
J Cardiovasc Magn Reson 18:8, 2016, doi:10.1186/s12968-016-0227-4): one zip a participant, field and visit,

    <eid>_20208_2_0.zip     long-axis films:  CINE_segmented_LAX_2Ch, _3Ch, _4Ch
    <eid>_20209_2_0.zip     short-axis films: CINE_segmented_SAX_b1, _b2 …; CINE_segmented_SAX_InlineVF, a drawn-on copy

with DICOM files side by side and a table manifest.csv (manifest.cvs in older ones) of what they are. The table repeats
the headers and adds identifiers and dates: it is not read. InlineVF series are left out; of a slice filmed twice, the
later series is taken.

No eid reaches an output, the log or the terminal: a participant is called what your own list says (--names), or
ukb- and twelve hexadecimal digits of HMAC-SHA256(key, eid) (--key), so that who holds the key can find a zip again
and nobody else can. One visit goes into one output folder: --visit 2 the first imaging visit, 3 the repeat.

The zips are taken for hostile: only what begins as DICOM does is unpacked, under numbers, into a temporary folder;
names inside the zip are never used; zips, files, counts and sizes beyond any real study are refused.

Not run on the original, which is not part of this project; tested on files made in its documented layout.
"""
import re, sys, tempfile, warnings, zipfile, zlib
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np

import common
from common import StudyError
from mgdcr.study import Study

ZIP = re.compile(r"(\d+)_(20208|20209)_([23])_0\.zip")
FIELDS = {"20209": "short-axis", "20208": "long-axis"}
MAX_ZIP, MAX_DIRECTORY = 2**31, 2**23  # bytes of a zip and of its table of contents; ten real studies and more
MAX_FILES, MAX_FILE, MAX_TOTAL = 20_000, 2**26, 2**32  # number, bytes unpacked of one and of all
DEFLATED = b"1.2.840.10008.1.2.1.99"  # DICOM that is packed once more inside, without a limit
TAGS = ["SeriesDescription", "SeriesInstanceUID", "SeriesNumber", "ImagePositionPatient", "ImageOrientationPatient"]


def refuse_hostile(path: Path, field: str) -> None:
    "Refuse a zip by its size and by that of its directory, before the directory is read into memory."
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - 2**16 - 42))
        tail = file.read()
    plain = tail[-22:-18] == b"PK\5\6" and tail[-2:] == bytes(2)  # the end record, without a comment behind it
    at = len(tail) - 22 if plain else tail.rfind(b"PK\5\6")
    directory = int.from_bytes(tail[at + 12:at + 16], "little") if at >= 0 else 0
    zip64 = at >= 20 and tail[at - 20:at - 16] == b"PK\6\7"  # for what is larger than any real study
    if size > MAX_ZIP or directory > MAX_DIRECTORY or zip64:
        raise StudyError(f"The {field} zip is larger than any real one.")


def unpack(path: Path, folder: Path, field: str) -> int:  # number of DICOM files
    "Write the DICOM files of a zip into a folder as 00000.dcm, 00001.dcm … whatever they are called."
    refuse_hostile(path, field)
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if not m.is_dir()]
            if len(members) > MAX_FILES or sum(m.file_size for m in members) > MAX_TOTAL:
                raise StudyError(f"The {field} zip declares more or larger files than any real one.")
            return sum(_unpack_one(archive, m, folder/f"{n:05d}.dcm", field) for n, m in enumerate(members))
    except StudyError: raise
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError):
        raise StudyError(f"The {field} zip is damaged, encrypted or no zip: download it again.") from None


def _unpack_one(archive, member, target, field):
    "Whether a member begins as DICOM does; if so it is written, and no further than a real file goes."
    with archive.open(member) as file:  # never gives more than the size that the member declares
        start = file.read(132)
        if start[128:] != b"DICM": return False
        data = start + file.read(MAX_FILE)
    if len(data) > MAX_FILE or DEFLATED in data:
        raise StudyError(f"The {field} zip holds a file larger than any real one.")
    target.write_bytes(data)
    return True


def leave_out(folder: Path, notes: list) -> None:
    "Delete drawn-on copies, and of each slice that was filmed more than once all but the last whole film."
    import pydicom
    places, gone = defaultdict(lambda: defaultdict(list)), set()  # place → (series number, UID) → files
    for path in sorted(folder.glob("*.dcm")):
        try:
            with warnings.catch_warnings(action="ignore"):
                ds = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=TAGS)
            own = int(ds.get("SeriesNumber") or 0), str(ds.get("SeriesInstanceUID", ""))
            place = tuple(np.round([float(x) for x in [*ds.ImagePositionPatient, *ds.ImageOrientationPatient]], 1))
        except Exception: continue  # without a place, or broken: for the reader to judge
        if "inlinevf" in str(ds.get("SeriesDescription", "")).lower():
            path.unlink()
            gone.add((f"Se{own[0]}", "a drawn-on copy (InlineVF)"))
        else: places[place][own].append(path)
    for films in places.values():
        most = max(map(len, films.values()))
        last = max(films, key=lambda own: (2*len(films[own]) >= most, own))
        for own in set(films) - {last}:
            for path in films[own]: path.unlink()
            gone.add((f"Se{own[0]}", f"filmed again at the same place, as Se{last[0]}"))
    notes += [("left out", *row) for row in sorted(gone)]


def convert(zips: dict, subject: str, folder: Path, notes: list) -> None:
    "One participant's zips {field: path} → one study folder."
    if "20209" not in zips: raise StudyError("There is no short-axis zip (field 20209).")
    if "20208" not in zips: notes.append(("left out", "lax", "There is no long-axis zip (field 20208)."))
    with tempfile.TemporaryDirectory() as scratch:
        for field, path in sorted(zips.items()):
            (Path(scratch)/field).mkdir()
            if not unpack(path, Path(scratch)/field, FIELDS[field]):
                notes.append(("left out", field, f"The {FIELDS[field]} zip holds no DICOM file."))
            leave_out(Path(scratch)/field, notes)
        try: study = Study.from_dicom(scratch, subject)
        except StudyError as error: raise StudyError(str(error).replace(Path(scratch).name, subject)) from None
    notes += [("left out", d["series"], d["why"]) for d in study.decisions if d["view"] == "ignore"]
    study.save(folder)


def script(argv=None) -> int:
    parser = common.command(__doc__, "a folder of zips such as <eid>_20209_2_0.zip, however nested")
    common.add_names(parser.add_mutually_exclusive_group(required=True))
    parser.add_argument("--visit", choices=["2", "3"], default="2", help="imaging visit (default 2, the first)")
    args = parser.parse_args(argv)
    name, people, unnamed = common.namer(args.names, args.key, args.out, "ukb-"), defaultdict(dict), set()
    for path in sorted(args.source.rglob("*.zip")):
        match = ZIP.fullmatch(path.name)
        if not match or match[3] != args.visit: continue
        subject = name(match[1])
        if subject: people[subject][match[2]] = path
        else: unnamed.add(match[1])
    if not people:
        raise StudyError(f"There is no zip such as <eid>_20209_{args.visit}_0.zip below the source, or nobody there "
                         "has a name.")
    left_out = [f"{len(unnamed)} participants are not in the list of names."] if unnamed else []
    return common.run(convert, list(people.items()), args.out, "ukbiobank", args.workers, left_out)


def main(argv=None) -> int: return common.main(partial(script, argv))


if __name__ == "__main__": sys.exit(main())
