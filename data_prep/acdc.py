"""ACDC, as its owners give it out → study folders with labels at end-diastole and end-systole.

The layout (https://www.creatis.insa-lyon.fr/Challenge/acdc/databases.html; labels: .../acdc/evaluation.html):

    training/patient001/  Info.cfg                        ED: 1, ES: 12 (frames from 1), Group, Height, NbFrame, Weight
                          patient001_4d.nii.gz            X×Y×slices×frames
                          patient001_frame01.nii.gz       the frame ED, patient001_frame12.nii.gz the frame ES
                          patient001_frame01_gt.nii.gz    0 background, 1 RV cavity, 2 myocardium, 3 LV cavity
    testing/patient101/   the same

O. Bernard, A. Lalande, C. Zotti, F. Cervenansky et al., IEEE TMI 37(11):2514-2525, 2018, doi:10.1109/TMI.2018.2837502.

Two things the files do not tell. Slice thickness: it is taken as the spacing, which the study warns of (the paper: 5 to
8 mm thick, 5 to 10 mm apart). Orientation: the headers hold no rotation, and in some the sform has a voxel size of 1 mm
(github.com/MIC-DKFZ/nnUNet issue 2741). Read literally, the stack would be axial, upside down and mirrored. Pictures
are shown as usual, from the apex with the front of the body up, and the labels tell which end is the base and where the
right ventricle lies: that is enough to lay the stack as a usual heart lies, and study.json says so.

Not run on the original, which is not part of this project; tested on files made in its documented layout.
"""
import re, sys
from functools import partial
from pathlib import Path

import numpy as np

import common
from common import StudyError

AXIS = np.array([-0.62, 0.58, -0.53])/np.linalg.norm([-0.62, 0.58, -0.53])  # base to apex of a usual heart, RAS
LATERAL = np.cross([0, 0, 1], AXIS)/np.linalg.norm(np.cross([0, 0, 1], AXIS))  # across it, level, to the left and back
NOMINAL = ("sax: the file does not say how the slices lie in the body; taken as a usual heart's, base and right "
           "ventricle {how}.")


def read_info(path: Path) -> dict:
    "Info.cfg as {key: text}."
    text = path.read_text(encoding="utf-8", errors="replace") if path.stat().st_size < 2**16 else ""
    info = {k.strip(): v.strip() for k, v in re.findall(r"^([^:\n]+):(.*)$", text, re.MULTILINE)}
    if not {"ED", "ES"} <= set(info): raise StudyError("Info.cfg does not name the frames ED and ES.")
    return info


def number(text) -> float | None:
    "A finite number, else None."
    try: value = float(text)
    except (TypeError, ValueError): return None
    return value if np.isfinite(value) else None


def frames_of(info: dict, count: int) -> dict:  # {"ed": frame, "es": frame}, counted from 0
    "The two frames, checked against the film."
    said = number(info.get("NbFrame"))
    if said is not None and said != count:
        raise StudyError(f"Info.cfg speaks of {said:g} frames, the film has {count}.")
    frames = {}
    for name in ("ED", "ES"):
        value = number(info[name])
        if value is None or value != int(value) or not 1 <= value <= count:
            raise StudyError(f"Info.cfg: {name} is {info[name][:20]!r}, but the film has the frames 1 to {count}.")
        frames[name.lower()] = int(value) - 1
    return frames


def usual_affine(shape, zooms, labels) -> np.ndarray:  # (4, 4)
    "Where a stack of pictures, seen from the apex with the front up, lies if the heart lies as usual; centred on 0."
    first, angle = True, 0.0  # as in every stack of ACDC that was looked at
    if labels is not None:
        first = common.base_first(labels)
        both = [k for k in range(shape[2]) if {1, 3} <= set(np.unique(labels[..., k]))]
        middle = lambda k, n: np.argwhere(labels[..., k] == n).mean(0)*zooms[:2]
        x, y = np.sum([middle(k, 3) - middle(k, 1) for k in both], axis=0) if both else (1, 0)
        angle = np.arctan2(-y, x)  # of the way from RV to LV; rows run downwards
    up = np.cross(AXIS, LATERAL)
    affine = np.eye(4)
    affine[:3, 0] = zooms[0]*(np.cos(angle)*LATERAL - np.sin(angle)*up)
    affine[:3, 1] = -zooms[1]*(np.sin(angle)*LATERAL + np.cos(angle)*up)
    affine[:3, 2] = zooms[2]*AXIS*(1 if first else -1)
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape[:3]) - 1)/2
    return affine


def convert(source: Path, subject: str, folder: Path, notes: list) -> None:
    "One patient's folder → one study folder."
    name, info = source.name, read_info(source/"Info.cfg")
    film = common.load(common.find(source, f"{name}_4d"))
    if film.ndim != 4: raise StudyError(f"{name}_4d.nii.gz is no film: it has no frames.")
    frames, labels = frames_of(info, film.shape[3]), {}
    for phase, frame in frames.items():
        stem = f"{name}_frame{frame + 1:02d}"
        try:
            still = common.load(common.find(source, stem))
            found = common.frame_of(np.asarray(still.dataobj), np.asarray(film.dataobj), stem)
            same = np.array_equal(film.dataobj[..., found], film.dataobj[..., frame])
            if not same: raise StudyError(f"{stem} shows frame {found + 1} of the film.")
            labels["sax", phase] = common.read_labels(common.find(source, f"{stem}_gt"), film, {1: 1, 2: 2, 3: 3})
        except StudyError as error: notes.append(("left out", f"sax_labels_{phase}", str(error)))
    affine = common.header_affine(film)
    known = labels.get(("sax", "ed"), labels.get(("sax", "es")))
    nominal = affine is None
    if nominal: affine = usual_affine(film.shape, np.array(film.header.get_zooms()[:3], float), known)
    patient = dict(height_cm=number(info.get("Height")), weight_kg=number(info.get("Weight")))
    said = dict(ed_frame=frames["ed"], es_frame=frames["es"], patient=patient)
    study = common.study_of(dict(sax=(film, affine)), said, subject)
    if nominal: study.warnings.append(NOMINAL.format(how="by the labels" if known is not None else "as in other files"))
    study.save(folder)
    group = info.get("Group", "")
    common.write_labels(folder, labels, {("sax", phase): frame for phase, frame in frames.items()},
                        group if group in ("NOR", "MINF", "DCM", "HCM", "RV") else "")


def script(argv=None) -> int:
    parser = common.command(__doc__, "the folder database, training, testing, or any that holds patient folders")
    args = parser.parse_args(argv)
    folders = sorted(p.parent for p in args.source.rglob("Info.cfg") if re.fullmatch(r"patient\d{3}", p.parent.name))
    if not folders: raise StudyError("There is no patientXXX/Info.cfg below the source: give the unpacked ACDC folder.")
    return common.run(convert, [(f"acdc-{f.name[7:]}", f) for f in folders], args.out, "acdc", args.workers)


def main(argv=None) -> int: return common.main(partial(script, argv))


if __name__ == "__main__": sys.exit(main())
