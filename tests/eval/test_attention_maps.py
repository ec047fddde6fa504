"""The figure of attention maps shows the models' own attention, and the table what it says."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from eval import attention_maps
from eval.attention_maps import attention_of, concentration, with_noise

KWARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


def vit() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=3, **KWARGS).eval()


@pytest.fixture
def pictures(tmp_path):
    path = tmp_path / "pictures.npz"
    rng = np.random.default_rng(0)
    np.savez(path, images=rng.integers(0, 256, (9, 16, 16, 3), dtype=np.uint8), labels=np.arange(9) % 3)
    return path


@torch.no_grad()
def test_maps_are_softmax_over_scaled_products_averaged_over_heads():
    model, x = vit(), torch.randn(2, 3, 16, 16)
    maps = attention_of(model, x)
    assert maps.shape == (2, 2, 17, 17)
    tokens = model.pos_drop(model._pos_embed(model.patch_embed(x)))
    query, key, _ = (
        model.blocks[0].attn.qkv(model.blocks[0].norm1(tokens)).reshape(2, 17, 3, 2, 8).permute(2, 0, 3, 1, 4)
    )
    torch.testing.assert_close(maps[0], (query @ key.mT * 8**-0.5).softmax(-1).mean(1))


def test_concentration_is_a_tenth_where_attention_is_even_and_all_where_one_token_gets_it():
    even = torch.full((2, 3, 20, 20), 1 / 20)
    assert concentration(even) == (pytest.approx(0.1), 0)
    one = torch.zeros(2, 3, 20, 20)
    one[..., 4] = 1
    assert concentration(one) == (pytest.approx(1), pytest.approx(1))


def test_noise_is_the_same_for_every_arm():
    x = torch.zeros(2, 3, 4, 4)
    assert torch.equal(with_noise(x, 0.5), with_noise(x, 0.5))
    assert with_noise(x, 0.5).std() == pytest.approx(0.5, rel=0.3)


def test_it_draws_and_writes_numbers(pictures, tmp_path):
    save_file(vit().state_dict(), tmp_path / "a-seed0.safetensors")
    out = tmp_path / "maps.png"
    attention_maps.main(
        [
            *("--data", str(pictures), "--model", "vit_tiny_patch16_224", "--out", str(out), "--pictures", "5"),
            *("--model-kwargs", ",".join(f"{key}={value}" for key, value in KWARGS.items()), "--shown", "2"),
            *(
                "--arm",
                f"plain@{tmp_path}/a-seed{{seed}}.safetensors=",
                "--arm",
                f"tap@{tmp_path}/a-seed0.safetensors=tap",
            ),
        ]
    )
    assert out.read_bytes().startswith(b"\x89PNG")
    content = json.loads(out.with_suffix(".json").read_text())
    assert content["pictures"] == 5
    assert [(each["arm"], each["condition"]) for each in content["concentration"]] == [
        (arm, condition) for arm in ("plain", "tap") for condition in ("clean", "noise")
    ]


def test_a_fresh_checkout_has_digits_to_train_on(tmp_path, capsys):
    attention_maps.main(["--quick", "--out", str(tmp_path / "maps.png"), "--pictures", "40"])
    content = json.loads((tmp_path / "maps.json").read_text())
    assert [each["arm"] for each in content["concentration"][::2]] == ["plain", "tap-adl"]
    right = [
        float(line.split()[1]) for line in capsys.readouterr().err.splitlines() if "test pictures are right" in line
    ]
    assert len(right) == 2 and min(right) > 15  # an untrained one guesses 10 %


def test_arms_without_weights_and_models_without_maps_are_refused(pictures, capsys):
    with pytest.raises(ValueError, match="plain has no weights"):
        attention_maps.main(["--data", str(pictures), "--model", "test_vit", "--arm", "plain="])
    with pytest.raises(ValueError, match="takes a ViT of timm"):
        attention_of(timm.create_model("test_resnet"), torch.zeros(1, 3, 32, 32))
    with pytest.raises(SystemExit):
        attention_maps.main(["--data", str(pictures)])
    assert "--data, --model and --arm go together" in capsys.readouterr().err
