"""Labels, surfaces and indices: across notebooks, in results on disk, and what bad input gets."""
import json
import time

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mgdcr import reconstruct
from mgdcr.clinical import Indices, indices
from mgdcr.dataset import heart_frame, labels_in_plane, side_of, simulated_heart
from mgdcr.diffae import sha256_of, shipped, weights_folder
from mgdcr.dicom import StudyError
from mgdcr.label_report import film, long_axis_scores, patient_scores, simulated_scores, study_report
from mgdcr.scanner import PROTOCOLS, lax_plane, phantom_study
from mgdcr.segmentation import (LabelRecipe, LabelStream, Stack, calibrated, doubts, labelled_jobs, load_segmenter, load_stacks,
                                save_segmenter, save_stacks, segment_study, segment_volume, simulated_stacks, stack_probabilities, tidy)
from mgdcr.study import project_root
from mgdcr.training import train


@pytest.fixture(scope="module")
def segmenter(): return load_segmenter()


@pytest.fixture(scope="module")
def study(): return phantom_study(102, frames=2)


def test_what_ships_is_small_known_and_quick_to_load():
    for name in shipped("segmenter"):
        path = weights_folder()/f"{name}.safetensors"
        card = json.loads(path.with_suffix(".json").read_text())
        assert card["sha256"] == sha256_of(path) and path.stat().st_size <= 10_000_000
        for key in ("name", "recipe", "samples", "subjects", "labels", "pixel_mm", "frame", "validation", "licence"): assert key in card, (name, key)
        load_segmenter(name)  # once for the disk
        start = time.perf_counter()
        load_segmenter(name)
        assert time.perf_counter() - start < 1
    assert shipped("segmenter") and not set(shipped("segmenter")) & set(shipped())


def test_volumes_of_a_true_image_are_the_hearts(segmenter, study):
    "A tuning heart, so that nothing reported is looked at."
    labels = segment_volume(study.reference, study.reference_grid, heart_frame(study), segmenter)
    truth, ml = simulated_heart("phantom-102").volumes(0.0), 1.4**3/1000
    assert abs((labels == 3).sum()*ml/truth["lv_ml"] - 1) < 0.03 and abs((labels == 1).sum()*ml/truth["rv_ml"] - 1) < 0.08
    from mgdcr.metrics import dice
    assert all(dice(labels == n, study.reference_labels == n) > least for n, least in ((3, 0.95), (2, 0.85), (1, 0.9)))


def test_labels_do_not_depend_on_how_a_grid_lies(segmenter, study):
    "The same volume with its rows and columns turned by 90° in the plane."
    from dataclasses import replace
    grid, frame = study.reference_grid, heart_frame(study)
    turned, affine = np.rot90(study.reference, axes=(1, 2)).copy(), grid.affine.copy()
    affine[:3, 3] = grid.affine[:3, 3] + 127*grid.affine[:3, 0]
    affine[:3, 0], affine[:3, 1] = grid.affine[:3, 1], -grid.affine[:3, 0]
    one = segment_volume(study.reference, grid, frame, segmenter)
    other = segment_volume(turned, replace(grid, affine=affine), frame, segmenter)
    assert (np.rot90(other, -1, axes=(1, 2)) != one).mean() < 1e-3


def test_a_stack_is_labelled_whatever_its_order(segmenter, study):
    from dataclasses import replace
    upside = replace(study, views=study.views | {"sax": replace(study.sax, images=study.sax.images[::-1], affines=study.sax.affines[::-1],
                                                                  times=study.sax.times[::-1], rr_ms=study.sax.rr_ms[::-1], series=study.sax.series[::-1])})
    one, other = segment_study(study, segmenter), segment_study(upside, segmenter)
    assert (one["sax"] != other["sax"][::-1]).mean() < 1e-3 and set(one) == set(study.views)
    assert all(labels.shape == study.views[name].images.shape for name, labels in one.items())


def test_a_long_axis_plane_through_the_right_ventricle_is_told_so(segmenter):
    folder = project_root()/"../shared/data/real_study"
    if not folder.is_dir(): pytest.skip("the real study is not here")
    from mgdcr.study import Study
    labels = segment_study(Study.load(folder, subject="real_study"), segmenter)
    assert not (labels["lax_2ch_2"] == 3).any() and (labels["lax_2ch_2"] == 1).sum() > 10_000
    assert all((labels[view] == 3).any() for view in ("lax_2ch", "lax_3ch", "lax_4ch"))


def test_a_cavity_drawn_too_small_is_made_right(segmenter):
    from dataclasses import replace
    shrunk = replace(segmenter, card=segmenter.card | dict(cavity_logit=-1.5))
    stacks = [s for s in simulated_stacks("phantom-112") if s.kind == "dense"][:2]
    error = lambda segmenter: np.mean([(tidy(stack_probabilities(segmenter, s).argmax(1).numpy().astype(np.uint8)) == 3).sum()/(s.labels == 3).sum() - 1 for s in stacks])
    assert error(shrunk) < -0.03 and abs(error(calibrated(shrunk, stacks))) < 0.005


def test_a_failure_of_the_network_is_seen(segmenter, study):
    labels = segment_study(study, segmenter)
    assert not doubts(study, labels, 0)
    middle = int(np.argmax((labels["sax"][:, 0] == 3).sum((1, 2))))
    missed, moved = ({k: v.copy() for k, v in labels.items()} for _ in range(2))
    missed["sax"][middle] = 0
    moved["sax"][middle] = np.roll(moved["sax"][middle], 12, -1)
    mistaken = {k: v.copy() for k, v in labels.items()}
    mistaken["sax"][mistaken["sax"] == 3] = 1
    assert any(doubt.startswith("lax_4ch") and "is RV cavity" in doubt for doubt in doubts(study, mistaken, 0))
    assert "no LV cavity" in doubts(study, missed, 0)[0] and "agree" in doubts(study, moved, 0)[0]


def test_results_hold_labels_surfaces_and_indices(tmp_path, study):
    result = reconstruct(study, "linear", frame="all", spacing_mm=2.0, align="none")
    files = result.save(tmp_path/"x")
    image = nib.load(tmp_path/"x/labels.nii.gz")
    assert image.get_data_dtype() == np.uint8 and image.shape == nib.load(tmp_path/"x/volume.nii.gz").shape and set(np.unique(image.dataobj)) == {0, 1, 2, 3}
    assert {"surfaces/lv_endo.stl", "surfaces/lv_epi.stl", "surfaces/rv.stl"} <= set(files)
    assert all(surface.closed for surface in result.surfaces.values())
    summary = json.loads((tmp_path/"x/summary.json").read_text())
    found, truth = summary["clinical_indices"], simulated_heart("phantom-102").volumes(0.0)
    assert abs(found["truth"]["edv_ml"]/truth["lv_ml"] - 1) < 0.02 and abs(found["true_image"]["edv_ml"]/truth["lv_ml"] - 1) < 0.05
    for how in ("stack", "volume"): assert abs(found[how]["edv_ml"]/truth["lv_ml"] - 1) < 0.12 and 0 < found[how]["ef"] < 90
    assert summary["parameters"]["segmenter"] == "cine128_labels" and len(found["curves"]["stack"]["lv_ml"]) == 2


def test_labels_may_be_left_away_and_cannot_spoil_a_reconstruction(tmp_path, study):
    from dataclasses import replace
    result = reconstruct(study, "nearest", spacing_mm=6.0, align="none", segmenter=None)
    assert result.labels is None and json.loads(json.dumps(result.summary(), default=str))["clinical_indices"] is None
    with pytest.raises(StudyError, match="no segmenter 'nobody'"): reconstruct(study, "nearest", spacing_mm=6.0, segmenter="nobody")
    flat = replace(study, views=study.views | {"lax_2ch": replace(study.views["lax_2ch"], images=np.zeros_like(study.views["lax_2ch"].images))})
    result = reconstruct(flat, "nearest", spacing_mm=6.0, align="none")
    assert result.labels is None and "one brightness" in result.doubts[0] and np.isfinite(result.volume).all()


def test_bad_segmenters_are_refused_in_one_sentence(tmp_path, segmenter):
    save_segmenter(segmenter, tmp_path/"good.safetensors")
    good, bad = (tmp_path/"good.safetensors").read_bytes(), tmp_path/"bad.safetensors"
    tensors = {k: v.half().contiguous() for k, v in segmenter.network.state_dict().items()}
    name, card = next(iter(tensors)), {"card": json.dumps(dict(kind="segmenter"))}
    for make in (lambda: bad.write_bytes(good[:1000]), lambda: bad.write_bytes(b""), lambda: bad.write_bytes(b"\xff"*64),
                 lambda: save_file({"a": torch.ones(2)}, bad), lambda: save_file(tensors, bad, {"card": json.dumps(dict(kind="prior"))}),
                 lambda: save_file({k: v for k, v in tensors.items() if k != name}, bad, card),
                 lambda: save_file(tensors | {name: torch.ones(3)}, bad, card),
                 lambda: save_file(tensors, bad, {"card": json.dumps(dict(kind="segmenter", cavity_logit=float("nan")))}),
                 lambda: save_file(tensors, bad, {"card": json.dumps(dict(kind="segmenter", cavity_logit="much"))}),
                 lambda: save_file(tensors | {name: tensors[name]*float("nan")}, bad, card)):
        make()
        with pytest.raises(StudyError) as refused: load_segmenter(bad)
        assert "bad.safetensors" in str(refused.value) and "\n" not in str(refused.value) and str(tmp_path) not in str(refused.value)


def test_nobody_who_is_reported_is_learnt_from(tmp_path):
    for n in (1, 61, 71):
        for moment in ("ED", "ES"): np.savez(tmp_path/f"patient{n:03d}_{moment}.npz", image=np.zeros((1, 2, 2), np.uint16), label=np.zeros((1, 2, 2), np.uint8))
    jobs = labelled_jobs(3, tune=2, patients=tmp_path)
    assert {side_of(name) for name in jobs} == {"train", "tune"} and "acdc-001" in jobs and "acdc-071" not in jobs


def small_hearts(folder, names=("phantom-10000", "phantom-112")):
    rng = np.random.default_rng(0)
    j, i = np.mgrid[:128, :128]
    for name in names:
        stacks = []
        for kind, Z in (("dense", 12), ("sax acquired", 5), ("lax_4ch acquired", 1)):
            labels = np.zeros((Z, 128, 128), np.uint8)
            r = np.hypot(i - 70, j - 60)
            labels[:, r < 30], labels[:, r < 20], labels[:, np.hypot(i - 30, j - 60) < 14] = 2, 3, 1
            stacks.append(Stack(kind, np.clip(np.array([60, 200, 30, 220])[labels] + 15*rng.normal(size=labels.shape), 0, 255).astype(np.uint8), labels, 1.4))
        save_stacks(folder/f"{name}.npz", stacks)


def test_training_is_carried_on_to_the_bit(tmp_path):
    small_hearts(tmp_path)
    recipe = LabelRecipe(str(tmp_path), samples=48, batch=8, precision="float32")
    whole = train(recipe, device="cpu")
    train(recipe, tmp_path/"run", device="cpu", stop=lambda run: run.step == 3)
    parts = train(recipe, tmp_path/"run", device="cpu")
    assert all(torch.equal(v, parts.ema[k]) for k, v in whole.ema.items())
    first = train(LabelRecipe(str(tmp_path), samples=8, batch=8, init=_saved(whole, tmp_path), precision="float32"), device="cpu")
    assert first.card()["samples"] == 56 and first.card()["warm_start_samples"] == 48


def _saved(run, folder):
    save_segmenter(run.learnt(), folder/"w.safetensors")
    return str(folder/"w.safetensors")


def test_samples_depend_on_seed_and_number_alone(tmp_path):
    small_hearts(tmp_path)
    recipe = LabelRecipe(str(tmp_path), samples=8)
    one, other = LabelStream(recipe), LabelStream(recipe)
    for n in (7, 3, 11):
        a, b = one[n], other[n]
        assert torch.equal(a["x"], b["x"]) and torch.equal(a["labels"], b["labels"]) and a["x"].shape == (3, 128, 128) and a["x"].abs().max() <= 1
    with pytest.raises(StudyError, match="no labelled hearts"): LabelStream(LabelRecipe(str(tmp_path/"none"), samples=8))


def test_broken_stacks_are_refused(tmp_path):
    small_hearts(tmp_path, ("phantom-10000",))
    good, bad = (tmp_path/"phantom-10000.npz").read_bytes(), tmp_path/"phantom-10001.npz"
    rng = np.random.default_rng(1)
    for n in range(30):
        data = bytearray(good[:rng.integers(1, len(good))] if n % 2 else good)
        for at in rng.integers(0, len(data), 20): data[at] = rng.integers(256)
        bad.write_bytes(data)
        try: load_stacks(bad)
        except StudyError as refused: assert "phantom-10001.npz" in str(refused)
    np.savez(bad, kinds=np.array(["dense"]), steps_mm=np.ones(1), images_0=np.zeros((2, 3, 3), np.uint8), labels_0=np.full((2, 3, 3), 9, np.uint8))
    with pytest.raises(StudyError): load_stacks(bad)


def test_tidying_keeps_the_largest_piece_and_fills_holes():
    labels = np.zeros((3, 30, 30), np.uint8)
    labels[:, 5:20, 5:20], labels[:, 8:17, 8:17], labels[:, 25:28, 25:28] = 2, 3, 3
    labels[1, 12, 12], labels[:, 2, 28], labels[:, 22:29, 2:10] = 0, 1, 1
    found = tidy(labels)
    assert (found[:, 25:28, 25:28] == 0).all() and found[1, 12, 12] == 3 and (found[:, 2, 28] == 0).all() and (found[:, 23, 5] == 1).all()
    assert (tidy(np.zeros((4, 4), np.uint8)) == 0).all()


def test_a_scrap_without_wall_is_no_cavity_but_an_outflow_tract_is():
    labels = np.zeros((3, 40, 40), np.uint8)
    labels[1:, 5:30, 5:30], labels[1:, 8:27, 8:27] = 2, 3
    labels[0, 10:14, 10:14] = 3
    assert not tidy(labels)[0].any() and (tidy(labels)[1:] == labels[1:]).all()
    labels[0, 8:20, 8:20] = 3
    assert (tidy(labels) == labels).all()
    labels[1, 34:38, 8:20], labels[2, 30:38, 8:20] = 2, 2  # hangs on in the next plane: no piece by itself in the whole
    assert not tidy(labels)[1, 34:38].any()


def test_length_and_mapse_of_true_labels_are_the_hearts():
    heart, plane = simulated_heart("phantom-104"), PROTOCOLS["yardstick-1"]
    rng, stacks = np.random.default_rng(0), []
    for view in ("lax_2ch", "lax_4ch"):
        affine = lax_plane(heart, view, plane, rng)
        for phase in (0.0, heart.es_phase):
            stacks.append(Stack(f"{view} acquired", np.zeros((1, 128, 128), np.uint8), labels_in_plane(heart, affine, 128, phase)[None]))
    class Nobody:  # labels nothing, so that only the true labels are measured
        def __call__(self, planes): return torch.eye(4)[torch.zeros(len(planes), 128, 128, dtype=int)].movedim(-1, 1)
    rows = long_axis_scores(Nobody(), stacks, heart)
    assert {row["on"] for row in rows} == {"long axis, true labels"} and len(rows) == 6
    assert all(abs(row["value"]) < 4 for row in rows), rows


def test_the_film_of_a_study(segmenter, study):
    report, labels = study_report(segmenter, study)
    assert report["frames"] == 2 and len(report["curves"]["lv_ml"]) == 2 and report["indices"]["edv_ml"] > 50 and set(report["long_axis"]["mapse_mm"]) <= set(study.views)
    axes = film(study, labels).axes
    assert len(axes) == 2*sum(len(view.images) for view in study.views.values()) and sum(bool(ax.collections) for ax in axes) > len(axes)/2


def test_reports_of_a_heart_and_of_a_patient(segmenter):
    rows = simulated_scores(segmenter, "phantom-103")
    lv = {row["moment"]: row["value"] for row in rows if row["on"] == "volume, network" and row["structure"] == "lv_ml" and row["metric"] == "volume error, %"}
    assert set(lv) == {"ED", "ES"} and abs(lv["ED"]) < 3 and abs(lv["ES"]) < 5
    assert all(abs(row["value"]) < 1.5 for row in rows if row["on"] == "volume, true labels" and row["structure"] == "lv_ml" and row["metric"] == "volume error, %")
    assert {row["metric"] for row in rows} >= {"EF error, points", "doubted, %", "hd95"}
    folder = project_root()/"../shared/data/acdc"
    if not folder.is_dir(): pytest.skip("ACDC is not here")
    rows = patient_scores(segmenter, folder, "061")  # of the tuning side
    assert np.mean([row["value"] for row in rows if row["metric"] == "dice" and row["structure"] == "LV cavity" and row["part"] == "middle"]) > 0.75


def test_indices_of_nothing_are_no_numbers():
    nothing = indices(dict(lv_ml=[0.0], rv_ml=[0.0], mass_g=[0.0]), 0, 0)
    assert isinstance(nothing, Indices) and np.isnan(nothing.ef) and nothing.sv_ml == 0


def test_views_may_have_different_numbers_of_frames(segmenter):
    "A long-axis film of five frames beside a stack of ten: the same moments are compared."
    from dataclasses import replace
    from mgdcr.clinical import mapse_mm
    study = phantom_study(102, frames=10)
    lax = study.views["lax_4ch"]
    few = replace(lax, images=lax.images[:, ::2], times=lax.times[:, ::2])
    mixed = replace(study, views=study.views | {"lax_4ch": few})
    assert [few.frame_at(study.phase(t)) for t in (0, 4, 8)] == [0, 2, 4]
    one, other = (mapse_mm(s, segment_study(s, segmenter), 0, 4) for s in (study, mixed))
    assert one["mapse_mm"]["lax_4ch"] == other["mapse_mm"]["lax_4ch"] and 4 < one["mapse_mm"]["lax_4ch"] < 20
