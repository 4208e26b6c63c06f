"Figures and the browser: right place, right link, nothing fetched from outside the package."
import io
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest

from mgdcr import solvers, viewer
from mgdcr.inverse import slice_residuals
from mgdcr.metrics import hold_out_scores
from mgdcr.scanner import phantom_study


@pytest.fixture(scope="module")
def case():
    study = phantom_study(2, frames=2, sax_slices=6, shape=(64, 64), pixel_mm=2.8, acquired_mm=(2.8, 2.8), spacing_mm=2.8)
    grid = study.reference_grid
    slices = study.slices(0, grid)
    solution = solvers.linear(slices, grid)
    result = SimpleNamespace(volume=np.stack([solution.volume, 0.9 * solution.volume]), grid=grid, slices=slices,
                             labels=None, poses=np.zeros((len(slices), 6)), frames=[0, 1],
                             gains=solution.gains, offsets=solution.offsets)
    yield study, result
    plt.close("all")


@pytest.mark.parametrize("draw", [
    lambda s, r: viewer.views_in_space(r.slices),
    lambda s, r: viewer.volume_beside_input(r.volume[0], r.grid, r.slices),
    lambda s, r: viewer.stack_figure(r.volume[0], r.grid, r.slices),
    lambda s, r: viewer.stack_figure(r.volume[0], r.grid, r.slices, s.reference),
    lambda s, r: viewer.residual_figure(slice_residuals(r.volume[0], r.grid, r.slices, None, np.ones(len(r.slices)), np.zeros(len(r.slices)))),
    lambda s, r: viewer.holdout_figure(hold_out_scores(r.volume[0], r.grid, r.slices.select("lax_4ch"),
                                                       r.slices.without("lax_4ch"))),
    lambda s, r: viewer.loss_figure({"a": [dict(loss=3.0, seconds=0.1), dict(loss=1.0, seconds=0.2)],
                                     "b": [dict(loss=2.0, seconds=0.3)]}),
    lambda s, r: viewer.alignment_figure(SimpleNamespace(poses=r.poses + 1,
                                                         crossings=[dict(ncc_before=0.5, ncc_after=0.9)]), r.slices),
    lambda s, r: viewer.alignment_figure(SimpleNamespace(poses=r.poses, crossings=[]), r.slices),
])
def test_figures_draw(case, draw):
    file = io.BytesIO()
    draw(*case).savefig(file, dpi=40)
    assert plt.imread(io.BytesIO(file.getvalue())).std() > 0.05, "something is drawn"


def test_figures_need_no_long_axis_views(case):
    _, r = case
    sax = r.slices.select("sax")
    for figure in (viewer.views_in_space(sax), viewer.volume_beside_input(r.volume[0], r.grid, sax),
                   viewer.stack_figure(r.volume[0], r.grid, sax)):
        figure.savefig(io.BytesIO(), dpi=30)


def test_crossing_is_drawn_where_the_planes_cross(case):
    "The line of the middle SAX slice in a LAX picture passes through the point where the figure has its origin."
    _, r = case
    about = viewer.middle_of(r.slices, r.grid)
    sax, lax = viewer.example_slices(r.slices)[:2]
    fig, ax = plt.subplots()
    affine = r.slices.planes.affines[lax]
    viewer.draw_planes(ax, affine, r.slices.planes.shape, about, r.slices.planes[[sax]], ["sax"])
    (x, y), = [line.get_data() for line in ax.lines]
    off = (y[1] - y[0]) * x[0] - (x[1] - x[0]) * y[0]
    assert abs(off) / np.hypot(x[1] - x[0], y[1] - y[0]) < 0.05, "mm from the origin to the line"


def test_cut_is_empty_outside(case):
    _, r = case
    affine, shape = viewer.long_cut(r.grid, r.grid.centre, 30)
    image = viewer.cut(r.volume[0], r.grid, affine, shape)
    rows = np.isfinite(image).any(1)
    assert rows.any() and not rows.all(), "a long cut is longer than the stack"
    assert abs(rows.sum() * 0.7 - r.grid.shape[0] * r.grid.spacing[2]) < 2


def test_browser_links_its_cuts(case):
    box = viewer.browse(*case)
    pictures = [bytes(box.picture.value)]
    for name, value in dict(depth=12.0, degrees=60.0, slice=1, frame=1, planes=False).items():
        box.controls[name].value = value
        pictures.append(bytes(box.picture.value))
    low, high = box.controls["window"].value
    box.controls["window"].value = (low, 0.7 * high)
    pictures.append(bytes(box.picture.value))
    assert len(set(pictures)) == len(pictures), "every control changes the picture"
    picture = lambda depth: plt.imread(io.BytesIO(viewer.png(box.scene.draw(depth=depth, planes=False))))
    changed = np.any(picture(0) != picture(9), axis=-1)
    h, w = np.array(changed.shape) // 2
    assert changed[:h, w:].any(), "the line of the short-axis cut moves in the long-axis cut"
    assert not changed[h + 20:].any(), "the acquired slice stays"
    box.close()


def test_3d_browser_carries_the_volume(case):
    _, r = case
    box = viewer.browse3d(r)
    assert len(box.view.volumes) == 1 and len(box.children) == 2
    box.frame.value = 1
    assert box.view.volumes[0].frame_4d == 1
    labelled = SimpleNamespace(**{**vars(r), "volume": r.volume[0], "labels": np.zeros(r.grid.shape, np.uint8)})
    still = viewer.browse3d(labelled)
    assert len(still.view.volumes) == 2 and len(still.children) == 1
    box.close(), still.close()
