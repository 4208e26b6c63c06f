"""M&Ms-2, as its owners give it out → study folders: SAX and four-chamber films with labels at ED and ES.

The layout (https://www.ub.edu/mnms-2/; C. Martín-Isla et al., Deep Learning Segmentation of the Right Ventricle in
Cardiac MRI: The M&Ms Challenge, IEEE JBHI 27(7), 2023, https://ieeexplore.ieee.org/document/10103611):

    MnM2/dataset_information.csv       SUBJECT_CODE, DISEASE, VENDOR, SCANNER, FIELD
    MnM2/dataset/001/  001_SA_CINE.nii.gz  001_SA_ED.nii.gz  001_SA_ED_gt.nii.gz  001_SA_ES.nii.gz  001_SA_ES_gt.nii.gz
                       001_LA_CINE.nii.gz  001_LA_ED.nii.gz  … the four-chamber view

Labels there: 1 LV cavity, 2 myocardium, 3 RV cavity; here: 1 RV cavity, 2 myocardium, 3 LV cavity. No file says which
frames of the film ED and ES are: they are found by comparing the pictures. Slice thickness is not told either: it is
taken as the spacing, which the study warns of. Where slices lie is read from the headers; a four-chamber film that does
not cross the short-axis stack there is left out, and labels that taper towards the base are marked "check" in the log.

Not run on the original, which is not part of this project; tested on files made in its documented layout.
"""
import csv, re, sys
from functools import partial
from pathlib import Path

import numpy as np

import common
from common import StudyError
from mgdcr.dicom import VENDORS
from mgdcr.views import to_apex

NUMBERS = {1: 3, 2: 2, 3: 1}  # theirs: ours
VIEWS = dict(sax="SA", lax_4ch="LA")


def read_table(path: Path) -> dict:  # {"001": row}
    "dataset_information.csv by subject; empty where it is missing."
    if not path.is_file(): return {}
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        rows = [{str(k).strip().upper(): str(v or "").strip() for k, v in row.items()} for row in csv.DictReader(file)]
    return {row["SUBJECT_CODE"].split(".")[0].zfill(3): row for row in rows if row.get("SUBJECT_CODE")}


def source_of(row: dict) -> dict:
    "Vendor and field strength in tesla."
    vendor = next((name for key, name in VENDORS.items() if key in row.get("VENDOR", "").lower() + " "), None)
    field = re.search(r"\d+(\.\d+)?", row.get("FIELD", ""))
    return {k: v for k, v in dict(vendor=vendor, field=field and float(field[0])).items() if v}


def read_view(source: Path, view: str, notes: list):  # → (film, {phase: frame}, {phase: (X, Y, Z) labels})
    "One view: its film, and the frames and labels that can be told."
    stem = f"{source.name}_{VIEWS[view]}"
    film, frames, labels = common.load(common.find(source, f"{stem}_CINE")), {}, {}
    if film.ndim != 4: raise StudyError(f"{stem}_CINE.nii.gz is no film: it has no frames.")
    if common.header_affine(film) is None:
        raise StudyError(f"The header of {stem}_CINE.nii.gz does not say how the slices lie in the body.")
    for phase in ("ed", "es"):
        name = f"{stem}_{phase.upper()}"
        try:
            still = common.load(common.find(source, name))
            frames[phase] = common.frame_of(np.asarray(still.dataobj), np.asarray(film.dataobj), name)
            labels[phase] = common.read_labels(common.find(source, f"{name}_gt"), film, NUMBERS)
        except StudyError as error: notes.append(("left out", f"{view}_labels_{phase}", str(error)))
    return film, frames, labels


def convert(job: tuple, subject: str, folder: Path, notes: list) -> None:
    "One subject's folder and its row of the table → one study folder."
    source, row = job
    read = dict(sax=read_view(source, "sax", notes))
    try: read["lax_4ch"] = read_view(source, "lax_4ch", notes)
    except StudyError as error: notes.append(("left out", "lax_4ch", str(error)))
    _, frames, labels = read["sax"]
    info = dict(ed_frame=frames.get("ed", 0), es_frame=frames.get("es"), source=source_of(row))
    films = {view: (film, common.header_affine(film)) for view, (film, _, _) in read.items()}
    try: study = common.study_of(films, info, subject)
    except StudyError as error:
        if len(films) == 1: raise
        study = common.study_of(dict(sax=films["sax"]), info, subject)  # where the stack itself is wrong, this raises
        read.pop("lax_4ch")
        notes.append(("left out", "lax_4ch", str(error)))
    for phase, data in labels.items():
        if common.base_first(data) != (to_apex(films["sax"][1][:3, 2]) > 0):
            notes.append(("check", f"sax_labels_{phase}", "The labels taper towards what the header calls the base."))
    study.save(folder)
    flat = lambda n: {(view, phase): value for view, parts in read.items() for phase, value in parts[n].items()}
    common.write_labels(folder, flat(2), flat(1), row.get("DISEASE", "")[:20])


def script(argv=None) -> int:
    parser = common.command(__doc__, "the folder MnM2, which holds dataset_information.csv and dataset/")
    args = parser.parse_args(argv)
    folders = sorted(p for p in (args.source, *args.source.rglob("*")) if p.is_dir() and re.fullmatch(r"\d{3}", p.name))
    if not folders: raise StudyError("There is no folder such as 001 below the source: give the unpacked MnM2 folder.")
    tables = sorted(args.source.rglob("dataset_information.csv"))
    table = read_table(tables[0]) if tables else {}
    return common.run(convert, [(f"mnms2-{f.name}", (f, table.get(f.name, {}))) for f in folders], args.out, "mnms2",
                      args.workers)


def main(argv=None) -> int: return common.main(partial(script, argv))


if __name__ == "__main__": sys.exit(main())
