"""A folder of DICOM files, of one patient or of many → study folders.

Any folder will do, however nested, with other files between. Views are recognised by geometry (nbs/01_views.ipynb);
what each series became and why is in study.json, what was left out also in the log. How the folders are to be called
is yours to say, because a patient's name or number goes no further:

    --subject NAME   all files are one patient's
    --by-folder      each folder in the source is a patient's, and its name is fit to be the subject's
    --names CSV      patients are told apart by their DICOM header (PatientID, StudyInstanceUID), wherever their files
    --key FILE       lie; a second examination of one patient, by date, is called NAME_exam2 or, with a key, NAME-2,
                     which the split into training and reporting takes for the same person

With --subject and --by-folder a study.json beside the files may overrule views: {"views": {"Se9": "ignore"}}.
Messages count the files of a patient (file 00012), because a file's name may hold a patient's: the terminal tells which
file that is.

The standard: DICOM PS3.3, https://dicom.nema.org/medical/dicom/current/output/html/part03.html (C.7.6.2 Image Plane).
Run on a real study: Siemens, 11 series of 25 frames (github UOA-Heart-Mechanics-Research/biv-me, example).
"""
import os, re, shutil, sys, tempfile, warnings
from collections import defaultdict
from functools import partial
from pathlib import Path

import common
from common import StudyError
from mgdcr.study import Study, safe_subject

SERIES = re.compile(r"(?i)(s|se|ser|series|scan)[ _-]?\d{1,5}")  # a folder's name that is only a series number
NAMED = (".dcm", ".ima")


def files_below(folder: Path) -> list:
    "Every file that might be DICOM, in order."
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".") and p.name != "study.json")


def by_patient(folder: Path, left_out: list) -> dict:  # {PatientID: [files of an examination, by date]}
    "The files below a folder by what their headers say of patient and examination."
    import pydicom
    patients = defaultdict(lambda: defaultdict(list))
    for path in files_below(folder):
        try:
            with warnings.catch_warnings(action="ignore"):
                ds = pydicom.dcmread(path, stop_before_pixels=True, force=path.suffix.lower() in NAMED,
                                     specific_tags=["PatientID", "StudyInstanceUID", "StudyDate"])
        except Exception: ds = ()
        if not len(ds):  # no DICOM, or too broken to belong to anybody
            if path.suffix.lower() in NAMED: left_out.append(path)
            continue
        uid = str(ds.get("StudyInstanceUID", ""))
        patients[str(ds.get("PatientID", "")).strip() or uid][str(ds.get("StudyDate", "")), uid].append(path)
    return {patient: [found[exam] for exam in sorted(found)] for patient, found in patients.items()}


def gather(files: list, folder: Path) -> dict:  # {name in the folder: file}
    "Bring a patient's files together, links where the system has them, under numbers and plain series names only."
    placed = {}
    for n, path in enumerate(files):
        place = folder/(path.parent.name if SERIES.fullmatch(path.parent.name) else "files")
        place.mkdir(exist_ok=True)
        new = place/f"{n:05d}{path.suffix.lower() if path.suffix.lower() in NAMED else ''}"
        try: os.symlink(path.resolve(), new)
        except OSError: shutil.copyfile(path, new)
        placed[new.name] = path
    return placed


def convert(files: list, subject: str, folder: Path, notes: list) -> None:
    "One patient's files → one study folder."
    with tempfile.TemporaryDirectory() as scratch:
        placed = gather([f for f in files if f.name != "study.json"], Path(scratch))
        for told in [f for f in files if f.name == "study.json"]: shutil.copyfile(told, Path(scratch)/told.name)
        try: study = Study.from_dicom(scratch, subject)
        except StudyError as error:
            text = str(error).replace(Path(scratch).name, subject)
            for name, path in placed.items():
                if name in text: print(f"{subject}: file {name} is {path}", file=sys.stderr)
            raise StudyError(text) from None
    notes += [("left out", d["series"], d["why"]) for d in study.decisions if d["view"] == "ignore"]
    study.save(folder)


def with_views(folder: Path) -> list:
    "The files below a folder, and a study.json in it that a person wrote."
    return files_below(folder) + [p for p in [folder/"study.json"] if p.is_file()]


def jobs_of(args, left_out: list) -> list:  # (subject, files) pairs
    if args.subject: return [(safe_subject(args.subject), with_views(args.source))]
    if args.by_folder:
        return [(safe_subject(f.name), with_views(f)) for f in sorted(args.source.iterdir())
                if f.is_dir() and not f.name.startswith(".")]
    name, jobs, unnamed, broken = common.namer(args.names, args.key, args.out, "p-"), [], 0, []
    for patient, exams in sorted(by_patient(args.source, broken).items()):
        own = name(patient)
        unnamed += own is None
        again = "-" if args.names is None else "_exam"  # a listed name may itself end in -2
        if own: jobs += [(f"{own}{again}{n}" if n > 1 else own, files) for n, files in enumerate(exams, 1)]
    if unnamed: left_out.append(f"{unnamed} patients are not in the list of names.")
    if broken: left_out.append(f"{len(broken)} DICOM files are too damaged to tell whose they are.")
    for path in broken: print(f"damaged: {path}", file=sys.stderr)
    return jobs


def script(argv=None) -> int:
    parser = common.command(__doc__, "a folder of DICOM files")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--subject", help="the name of the one patient")
    group.add_argument("--by-folder", action="store_true", help="the folders in the source name the patients")
    common.add_names(group)
    args = parser.parse_args(argv)
    if not args.source.is_dir(): raise StudyError(f"There is no folder {args.source.name!r}.")
    left_out = []
    jobs = jobs_of(args, left_out)
    if not jobs: raise StudyError("There is no DICOM file below the source, or nobody there has a name.")
    return common.run(convert, jobs, args.out, "dicom", args.workers, left_out)


def main(argv=None) -> int: return common.main(partial(script, argv))


if __name__ == "__main__": sys.exit(main())
