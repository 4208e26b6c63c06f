"""ACDC as arrays that have lost their geometry (../shared/data/acdc) → an LMDB of slices to train on.

The layout (../shared/DATA.md; a third-party copy in github antares0811/3DCardiac of patients 001 to 080 of ACDC,
https://www.creatis.insa-lyon.fr/Challenge/acdc/):

    patient001_ED.npz  patient001_ES.npz     image: uint16 (slices, rows, columns), 0 to 1023
                                             label: 0 background, 1 RV cavity, 2 myocardium, 3 LV cavity

Spacing was lost, in plane and between slices. So no study folder is made and nothing is in millimetres: pictures are
turned and centred by their labels and keep their own pixels, and a slice's place along the LV axis is its number among
the slices that show the cavity. Full ACDC with its geometry goes through acdc.py. (nbs/prepare_data.ipynb puts the same
slices into a data set with others: source arrays.)

Terms of ACDC: research, CC BY-NC-SA 4.0. Run on the arrays in ../shared/data/acdc, which are not the original.
"""
import csv, os, sys
from functools import partial
from pathlib import Path

import common
from common import StudyError
from mgdcr.dataset import Preparation, array_jobs, write_lmdb


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
    preparation = Preparation(orientation="labels", centring="labels")
    jobs = array_jobs(args.source, preparation)
    about = dict(source="ACDC arrays", spacing="unknown", normalisation=preparation.normalisation)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    left_out = write_lmdb(args.out, jobs, about, args.workers)["left_out"]
    write_log(args.out.with_suffix(".csv"), [subject for subject, _ in jobs], left_out)
    for subject, why in left_out.items(): print(f"{subject}: {why}", file=sys.stderr)
    print(f"{len(jobs) - len(left_out)} done, {len(left_out)} failed; {args.out.stem}.csv says why.")
    return int(bool(left_out))


def main(argv=None) -> int: return common.main(partial(script, argv))


if __name__ == "__main__": sys.exit(main())
