"Hearts from label maps: they keep to their side of the split, eject what they are asked to, and look like the digital heart's kin."
import json
from importlib import resources

import numpy as np
import pytest
import torch

from mgdcr.dataset import side_of
from mgdcr.dicom import StudyError
from mgdcr.heart import Look, digital_heart
from mgdcr.label_heart import label_heart, read_label_map, shared_map, siblings

here = pytest.mark.skipif(not shared_map(1).is_file(), reason="../shared/data/hearts is not here")
NAMES = ["heart-10", "heart-12", "heart-01-v0002", "heart-09-v0000"]


@pytest.fixture(scope="module", params=NAMES)
def heart(request):
    return label_heart(request.param)


def test_variations_go_only_towards_their_own_side():
    for n in range(1, 13):
        sides = {side_of(f"heart-{k:02d}") for k in [n, *siblings(n)]}
        assert len(sides) == 1 and side_of(f"heart-{n:02d}-v0007") in sides and n not in siblings(n)
    families = json.loads((resources.files("mgdcr") / "splits.json").read_text())["families"]
    told = next(f["sides"] for f in families if f["name"].startswith("heart-"))
    assert told == {"train": [1, 8], "tune": [9, 10], "report": [11, 12]}


@here
def test_beat_is_physiological(heart):
    p = heart.parameters
    beat = [heart.volumes(f, step=1.25) for f in (0.0, 0.5 * p.es_phase, p.es_phase, 0.5 * (1 + p.es_phase))]
    mass, (ed, _, es, _) = [b["mass_g"] for b in beat], beat
    assert abs(1 - es["lv_ml"] / ed["lv_ml"] - p.ef) < 0.01 and abs(1 - es["rv_ml"] / ed["rv_ml"] - p.rv_ef) < 0.01
    assert max(mass) / min(mass) < 1.03
    rest, now = heart.landmarks(0.0), heart.landmarks(p.es_phase)
    down = {n: (now[n] - rest[n]) @ heart.axes[2] for n in rest}
    assert np.linalg.norm(now["apex"] - rest["apex"]) < 2
    assert down["mitral"] == pytest.approx(p.mapse_mm, abs=0.5) and down["rv_free"] == pytest.approx(p.tapse_mm, rel=0.1)


@here
def test_volumes_are_the_maps():
    m, h = read_label_map(shared_map(7)), label_heart("heart-07")
    now = h.volumes(0.0)
    assert now["lv_ml"] == pytest.approx(m.millilitres("lv"), rel=0.015)
    assert now["mass_g"] == pytest.approx(1.05 * m.millilitres("lv_wall"), rel=0.04)


@here
def test_the_same_name_is_the_same_heart_and_numbers_differ():
    one, two, other = label_heart("heart-03-v0001"), label_heart("heart-03-v0001"), label_heart("heart-03-v0002")
    assert torch.equal(one.anatomy.fields, two.anatomy.fields) and one.parameters == two.parameters and one.gains == two.gains
    assert one.anatomy.rings.ne(other.anatomy.rings).any()


@here
def test_tissues_are_the_digital_hearts():
    "Each label is as bright as in the digital heart, and both stand in the same kind of chest."
    look, bright = Look(texture=0.0, trabeculae=False), {}
    for h in (label_heart("heart-04"), digital_heart(3)):
        middle = h.landmarks(0.0)["lv_centre"]
        cube = torch.rand(60_000, 3, generator=torch.Generator().manual_seed(0)) - 0.5
        points = torch.as_tensor(middle, dtype=torch.float32) + 200 * cube
        labels, image = h.labels(points), h.intensity(points, look=look)
        bright[type(h).__name__] = [float(image[labels == n].median()) for n in (1, 2, 3)] + [float(image[labels == 0].quantile(q)) for q in (0.1, 0.9)]
    label, digital = bright.values()
    np.testing.assert_allclose(label, digital, atol=0.06)


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(StudyError, match="absent.nii.gz"): label_heart(tmp_path / "absent.nii.gz")
    (tmp_path / "text.nii").write_text("no image")
    with pytest.raises(StudyError, match="text.nii"): label_heart(tmp_path / "text.nii")
