"""ACDC as arrays that have lost their geometry (../shared/data/acdc) → an LMDB of slices to train on.

The layout (../shared/DATA.md; a third-party copy in github antares0811/3DCardiac of patients 001 to 080 of ACDC,
https://www.creatis.insa-lyon.fr/Challenge/acdc/):

    patient001_ED.npz  patient001_ES.npz     image: uint16 (slices, rows, columns), 0 to 1023
                                             label: 0 background, 1 RV cavity, 2 myocardium, 3 LV cavity

Spacing was lost, in plane and between slices. So no study folder is made and nothing is in millimetres: pictures are
turned and centred by their labels and keep their own pixels, and a slice's place along the LV axis is its number among
the slices that show the cavity. Full ACDC with its geometry goes through acdc.py.

Terms of ACDC: research, CC BY-NC-SA 4.0. Run on the arrays in ../shared/data/acdc, which are not the original.
"""
import csv, os, re, sys, zipfile
from functools import partial
from pathlib import Path

import numpy as np

import common
from common import StudyError
from mgdcr.dataset import Preparation, array_slices, write_lmdb

FRAMES = {0: "ED", 1: "ES"}
NAME = re.compile(r"patient(\d{3})_(ED|ES)\.npz")
MAX_BYTES = 2**28  # unpacked; ten real stacks and more


def read(path: Path) -> tuple:  # images (Z, H, W) uint16, labels (Z, H, W) uint8
    "One moment of one patient, checked."
    if not path.is_file(): raise StudyError(f"{path.name} is missing.")
    try:
        with zipfile.ZipFile(path) as archive: size = sum(m.file_size for m in archive.infolist())
        if size <= MAX_BYTES:
            with np.load(path, allow_pickle=False) as arrays: image, label = arrays["image"], arrays["label"]
    except Exception: raise StudyError(f"{path.name} cannot be read: it needs the arrays image and label.") from None
    if size > MAX_BYTES: raise StudyError(f"{path.name} is larger than any real stack.")
    if image.ndim != 3 or image.shape != label.shape or not {image.dtype.kind, label.dtype.kind} <= set("ui"):
        raise StudyError(f"{path.name}: image and label need to be whole numbers of one shape (slices, rows, columns).")
    if not np.isin(label, (0, 1, 2, 3)).all(): raise StudyError(f"{path.name} holds other labels than 0 to 3.")
    return image, label.astype(np.uint8)


def slices(folder: Path, number: str, preparation: Preparation):  # yields (SliceRecord, image)
    "One patient's slices at end-diastole and end-systole, on one scale of brightness."
    stacks = {frame: read(folder/f"patient{number}_{name}.npz") for frame, name in FRAMES.items()}
    if len({images.shape for images, _ in stacks.values()}) > 1:
        raise StudyError(f"patient{number}: ED and ES have different shapes.")
    yield from array_slices(f"acdc-{number}", stacks, preparation, phases={0: 0.0})


def write_log(path: Path, subjects: list, left_out: dict) -> None:
    "The same table that the other scripts keep."
    part = path.with_suffix(".part")
    with open(part, "w", newline="", encoding="utf-8") as file:
        rows = [[s, "failed" if s in left_out else "done", "", left_out.get(s, "")] for s in subjects]
        csv.writer(file).writerows([common.COLUMNS, *rows])
    os.replace(part, path)


def script(argv=None) -> int:
    parser = common.command(__doc__, "the folder of patientXXX_ED.npz and patientXXX_ES.npz",
                            "the data set to write, such as datasets/acdc_arrays_128.lmdb")
    args = parser.parse_args(argv)
    numbers = sorted({m[1] for p in args.source.glob("*.npz") if (m := NAME.fullmatch(p.name))})
    if not numbers: raise StudyError("There is no patientXXX_ED.npz in the source.")
    preparation = Preparation(orientation="labels", centring="labels")
    jobs = [(f"acdc-{n}", partial(slices, args.source, n, preparation)) for n in numbers]
    about = dict(source="ACDC arrays", spacing="unknown", normalisation=preparation.normalisation)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    left_out = write_lmdb(args.out, jobs, about, args.workers)["left_out"]
    write_log(args.out.with_suffix(".csv"), [subject for subject, _ in jobs], left_out)
    for subject, why in left_out.items(): print(f"{subject}: {why}", file=sys.stderr)
    print(f"{len(jobs) - len(left_out)} done, {len(left_out)} failed; {args.out.stem}.csv says why.")
    return int(bool(left_out))


def main(argv=None) -> int: return common.main(partial(script, argv))


if __name__ == "__main__": sys.exit(main())
