"""The prior: equal to the official networks' numbers; bad files refused in one sentence; weights that ship load at once.

The fixtures are the tiny networks' weights and the numbers that the official implementation (github phizaz/diffae, MIT)
gave for them, and the names and shapes of its 128×128 networks' tensors.
"""
import json
import os
import pickle
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mgdcr.ddim import Schedule, eps_loss, q_sample, timesteps
from mgdcr.dicom import StudyError
from mgdcr.diffae import load_latents, load_official, load_prior, save_prior, sha256_of, shipped, weights_folder
from mgdcr.unet import NETWORKS, UNet, config_of

FIXTURES = Path(__file__).parent / "fixtures"


def official_checkpoint(folder, name, **more):
    "A checkpoint in the official layout; `model.` holds other numbers, which must not be used."
    tensors = load_file(FIXTURES / f"diffae_tiny_{name}.safetensors")
    x_T = tensors.pop("x_T")
    state = {f"model.{k}": v + 1 for k, v in tensors.items()} | {f"ema_model.{k}": v for k, v in tensors.items()}
    torch.save(dict(state_dict={**state, "x_T": x_T}, global_step=12345, epoch=3, **more), folder / "last.ckpt")
    return folder / "last.ckpt"


@pytest.fixture
def expected(): return load_file(FIXTURES / "diffae_tiny_expected.safetensors")


def close(a, b, most): assert float((a - b).abs().max()) <= most


def close_on_the_whole(a, b):
    """A walk towards the noise amplifies rounding: in exact arithmetic, too, the worst pixel of the official x_T is off by 1.6e-3, but the RMS by 5e-5.
    Which pixels round how depends on the processor and its threads, so the whole is held to the RMS, and no pixel may be far off."""
    close(a, b, 5e-3)
    assert float((a - b).square().mean().sqrt()) <= 1.5e-4


@torch.no_grad()
def test_the_official_autoencoders_numbers(tmp_path, expected):
    prior, e = load_official(official_checkpoint(tmp_path, "autoenc")), expected
    assert prior.config.mult == (1, 2) and prior.config.encoder_mult == (1, 2, 2) and prior.config.attention == (1,)
    close(prior.schedule.alphas_cumprod, e["alphas_cumprod"], 1e-12)
    z = prior.encode(e["x0"])
    close(z, e["z_sem"], 1e-4)
    close(q_sample(prior.schedule, e["x0"], e["t"], e["noise"]), e["x_t"], 1e-6)
    close(prior.eps(e["x_t"], e["t"], z), e["eps"], 1e-4)
    close(eps_loss(prior.schedule, lambda x, t: prior.eps(x, t, z), e["x0"], e["t"], e["noise"]), e["loss_per_sample"], 1e-4)
    for steps in (10, 20):
        assert timesteps(steps).tolist() == e[f"timesteps_{steps}"].tolist()
        close_on_the_whole(prior.encode_stochastic(e["x0"], z, steps), e[f"x_T_{steps}"])
        close_on_the_whole(prior.render(e[f"x_T_{steps}"], z, steps), e[f"render_{steps}"])
        close(prior.render(e["noise"], z, steps), e[f"render_from_noise_{steps}"], 2e-4)


@torch.no_grad()
def test_the_official_plain_diffusion_models_numbers(tmp_path, expected):
    prior, e = load_official(official_checkpoint(tmp_path, "ddim")), expected
    assert not prior.config.has_encoder
    close(prior.eps(e["x_t"], e["t"]), e["ddim_eps"], 1e-4)
    close(prior.render(e["noise"], steps=10), e["ddim_render_10"], 2e-4)
    with pytest.raises(ValueError, match="no encoder"): prior.encode(e["x0"])


@pytest.mark.parametrize("name, listed", [("diffae128", "autoenc128"), ("ddim128", "ddim128")])
def test_the_128_networks_have_the_official_tensors(name, listed):
    with torch.device("meta"): state = UNet(NETWORKS[name]).state_dict()
    official = json.loads((FIXTURES / f"{listed}_tensors.json").read_text())
    assert {k: list(v.shape) for k, v in state.items()} == official
    assert config_of(official) == NETWORKS[name]


def test_gradients_reach_z_and_x_T_through_a_whole_walk(tmp_path, expected):
    prior = load_official(official_checkpoint(tmp_path, "autoenc"))
    z = prior.encode(expected["x0"]).detach().requires_grad_()
    x_T = expected["x_T_10"].clone().requires_grad_()
    prior.render(x_T, z, 4, clip=False).square().mean().backward()
    assert z.grad.abs().sum() > 0 and x_T.grad.abs().sum() > 0


class Trap:
    "Unpickled, it would leave a trace."
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.system, (f"touch {self.path}",)


class Callback:
    "As training frameworks put into their checkpoints, as values and as keys."
    def __init__(self): self.best = 3
    def __setstate__(self, state): raise AssertionError("its code was run")


def test_nothing_in_a_checkpoint_is_run(tmp_path):
    trace = tmp_path / "trace"
    path = official_checkpoint(tmp_path, "autoenc", callbacks={Callback: dict(best=3)}, more=Callback())
    assert load_official(path).config.z == 64  # the class became an empty stand-in
    with pytest.raises(StudyError): load_official(official_checkpoint(tmp_path, "autoenc", callbacks=Trap(trace)))
    (tmp_path / "raw.ckpt").write_bytes(pickle.dumps(Trap(trace)))
    with pytest.raises(StudyError): load_official(tmp_path / "raw.ckpt")
    assert not trace.exists()


def bad_checkpoints(folder):
    good = official_checkpoint(folder, "autoenc").read_bytes()
    tensors = load_file(FIXTURES / "diffae_tiny_autoenc.safetensors")
    tensors.pop("x_T")

    def saved(**changes):
        state = {f"ema_model.{k}": v for k, v in {**tensors, **changes}.items() if v is not None}
        torch.save(dict(state_dict=state), folder / "bad.ckpt")

    yield "damaged", lambda: (folder / "bad.ckpt").write_bytes(good[:len(good) // 2])
    yield "damaged", lambda: (folder / "bad.ckpt").write_bytes(b"")
    yield "damaged", lambda: (folder / "bad.ckpt").write_text("no checkpoint")
    yield "no checkpoint", lambda: torch.save([1, 2], folder / "bad.ckpt")
    yield "no state_dict", lambda: torch.save(dict(a=1), folder / "bad.ckpt")
    yield "no ema_model", lambda: torch.save(dict(state_dict=dict(a=torch.ones(1))), folder / "bad.ckpt")
    yield "out.2.bias is missing", lambda: saved(**{"out.2.bias": None})
    yield "out.9.bias is unknown", lambda: saved(**{"out.9.bias": torch.ones(3)})
    yield r"out.2.bias has the shape \(3,\)", lambda: saved(**{"out.2.bias": torch.ones(3)})
    yield "not finite", lambda: saved(**{"out.2.bias": torch.tensor([float("nan")])})
    yield "time_embed", lambda: saved(**{"time_embed.time_embed.0.weight": torch.ones(4)})
    yield "impossible sizes", lambda: torch.save(dict(
        state_dict={"ema_model.a": torch.ones(1)}, config=dict(channels=10**9)), folder / "bad.ckpt")
    yield "none that is known", lambda: torch.save(dict(
        state_dict={"ema_model.a": torch.ones(1)}, config=dict(channels="64")), folder / "bad.ckpt")


def test_bad_checkpoints_are_refused_in_one_sentence(tmp_path):
    for words, make in bad_checkpoints(tmp_path):
        make()
        with pytest.raises(StudyError, match=words) as refused: load_prior(tmp_path / "bad.ckpt")
        assert "bad.ckpt" in str(refused.value) and "\n" not in str(refused.value) and str(tmp_path) not in str(refused.value)


def test_bad_safetensors_are_refused_in_one_sentence(tmp_path):
    prior = load_official(official_checkpoint(tmp_path, "autoenc"))
    save_prior(prior, tmp_path / "good.safetensors")
    good = (tmp_path / "good.safetensors").read_bytes()
    bad = tmp_path / "bad.safetensors"
    makers = [lambda: bad.write_bytes(good[:1000]), lambda: bad.write_bytes(good[:-5]), lambda: bad.write_bytes(b"\xff" * 64),
              lambda: bad.write_bytes(b""), lambda: save_file({"a": torch.ones(2)}, bad),
              lambda: save_file({"a": torch.ones(2)}, bad, {"card": "{"}), lambda: save_file({"a": torch.ones(2)}, bad, {"card": "{}"}),
              lambda: save_file({"a": torch.ones(2)}, bad, {"card": json.dumps(dict(network=dict(channels=64, mult=[], patch=0)))})]
    for make in makers:
        make()
        with pytest.raises(StudyError) as refused: load_prior(bad)
        assert "bad.safetensors" in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(StudyError, match="no file"): load_prior(tmp_path / "none.safetensors")
    with pytest.raises(StudyError, match="There is no prior 'heart'"): load_prior("heart")


def test_latents_of_the_official_layout(tmp_path):
    torch.save(dict(conds=torch.randn(7, 5), conds_mean=torch.zeros(1, 5), conds_std=torch.ones(1, 5)), tmp_path / "latent.pkl")
    found = load_latents(tmp_path / "latent.pkl")
    assert found["conds"].shape == (7, 5) and found["conds_mean"].shape == (5,)
    for bad in (dict(conds=torch.ones(3, 2)), dict(conds=torch.ones(3, 2), conds_mean=torch.ones(3), conds_std=torch.ones(2)),
                dict(conds=1, conds_mean=2, conds_std=3)):
        torch.save(bad, tmp_path / "latent.pkl")
        with pytest.raises(StudyError, match="latent.pkl"): load_latents(tmp_path / "latent.pkl")


def test_what_ships_is_small_known_and_quick_to_load():
    total = 0
    for name in shipped():
        path = weights_folder() / f"{name}.safetensors"
        card = json.loads(path.with_suffix(".json").read_text())
        assert card["sha256"] == sha256_of(path) and path.stat().st_size <= 10_000_000
        for key in ("name", "data", "network", "recipe", "samples", "slab_mm", "pixel_mm", "validation", "licence"): assert key in card, (name, key)
        total += path.stat().st_size
        load_prior(name)  # once for the disk
        start = time.perf_counter()
        load_prior(name)
        assert time.perf_counter() - start < 1
    assert total <= 40_000_000


def test_a_changed_weight_file_is_noticed(tmp_path, monkeypatch):
    import mgdcr.diffae as diffae
    prior = load_official(official_checkpoint(tmp_path, "autoenc"))
    save_prior(prior, tmp_path / "mine.safetensors")
    monkeypatch.setattr(diffae, "weights_folder", lambda: tmp_path)
    assert diffae.shipped() == ["mine"] and diffae.load_prior("mine").config == prior.config
    data = bytearray((tmp_path / "mine.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "mine.safetensors").write_bytes(data)
    with pytest.raises(StudyError, match="not the file that its card describes"): diffae.load_prior("mine")
