"""Refusals and unpacking; the numbers are compared in tests/parity."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from davae.errors import DavaeError
from davae.interop.official_lightningdit import convert, load
from davae.models.lightningdit import rope_table, sincos_table
from davae.runtime.weight_files import read_state_dict


def official(*, hidden: int = 16, heads: int = 2, side: int = 3) -> dict[str, Tensor]:
    """A random state dict with the official names: one block, three classes, RoPE, QK-norm, SwiGLU."""
    torch.manual_seed(0)
    shapes = {
        "x_embedder.proj.weight": (hidden, 4, 1, 1),
        "y_embedder.embedding_table.weight": (4, hidden),
        "final_layer.norm_final.weight": (hidden,),
        "blocks.0.norm1.weight": (hidden,),
        "blocks.0.norm2.weight": (hidden,),
        "blocks.0.attn.q_norm.weight": (hidden // heads,),
        "blocks.0.attn.k_norm.weight": (hidden // heads,),
    }
    for name, inner, outer in (
        ("t_embedder.mlp.0", 256, hidden),
        ("t_embedder.mlp.2", hidden, hidden),
        ("blocks.0.attn.qkv", hidden, 3 * hidden),
        ("blocks.0.attn.proj", hidden, hidden),
        ("blocks.0.mlp.w12", hidden, 2 * int(8 / 3 * hidden)),
        ("blocks.0.mlp.w3", int(8 / 3 * hidden), hidden),
        ("blocks.0.adaLN_modulation.1", hidden, 6 * hidden),
        ("final_layer.adaLN_modulation.1", hidden, 2 * hidden),
        ("final_layer.linear", hidden, 4),
    ):
        shapes |= {f"{name}.weight": (outer, inner), f"{name}.bias": (outer,)}
    shapes["x_embedder.proj.bias"] = (hidden,)
    cos, sin = (part.repeat_interleave(2, 1) for part in rope_table(side, side, hidden // heads))
    tables = {"pos_embed": sincos_table(side, side, hidden)[None], "feat_rope.freqs_cos": cos}
    return {name: torch.randn(shape) for name, shape in shapes.items()} | tables | {"feat_rope.freqs_sin": sin}


def test_every_tensor_is_used() -> None:
    state = official()
    config, converted = convert(state)
    assert config["num_attention_heads"] == 2
    assert config["num_classes"] == 3
    assert config["sample_size"] == 3
    tables = ("pos_embed", "feat_rope")
    assert sum(v.numel() for k, v in state.items() if not k.startswith(tables)) == sum(
        v.numel() for v in converted.values()
    )


@pytest.mark.parametrize("container", ["safetensors", "bare", "nested", "wrapped"])
def test_containers(container: str, tmp_path: Path) -> None:
    state, path = official(), tmp_path / "weights.pt"
    if container == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    elif container == "bare":
        torch.save(state, path)
    elif container == "nested":
        torch.save({"model": {k: v + 1 for k, v in state.items()}, "ema": state, "step": 3}, path)
    else:
        torch.save({"model": {f"module._orig_mod.{k}": v for k, v in state.items()}}, path)
    assert read_state_dict(path).keys() == state.keys()
    assert torch.equal(load(path).patch_embed.weight, state["x_embedder.proj.weight"])


def test_weights_are_taken_from_the_entry_asked_for(tmp_path: Path) -> None:
    state = official()
    other = {**state, "x_embedder.proj.bias": state["x_embedder.proj.bias"] + 1}
    torch.save({"model": other, "ema": state}, tmp_path / "both.pt")
    assert torch.equal(load(tmp_path / "both.pt").patch_embed.bias, state["x_embedder.proj.bias"])
    raw = load(tmp_path / "both.pt", weights="model")
    assert torch.equal(raw.patch_embed.bias, other["x_embedder.proj.bias"])


def test_missing_unexpected_and_misshapen_tensors_are_all_listed() -> None:
    state = official()
    del state["blocks.0.mlp.w3.bias"]
    state["blocks.0.attn.extra.weight"] = torch.zeros(1)
    state["t_embedder.mlp.0.bias"] = torch.zeros(5)
    with pytest.raises(DavaeError) as error:
        convert(state)
    for part in (
        "ff.net.2.bias",
        "blocks.0.attn.extra.weight",
        r"time_embed.linear_1.bias (5,), expected (16,)",
    ):
        assert part in str(error.value)
    with pytest.raises(DavaeError, match=r"missing: .*x_embedder.proj.weight"):
        convert({"something.weight": torch.zeros(1)})


@pytest.mark.parametrize("table", ["pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"])
def test_another_position_table_is_refused(table: str) -> None:
    state = official()
    state[table] = state[table] + 0.1
    with pytest.raises(DavaeError, match=f"the position table {table}"):
        convert(state)
    del state[table]
    with pytest.raises(DavaeError, match="feat_rope.freqs_sin" if "rope" in table else table):
        convert(state)


def test_heads_must_be_told_where_the_weights_do_not() -> None:
    state = {k: v for k, v in official().items() if "feat_rope" not in k and "_norm.weight" not in k}
    with pytest.raises(DavaeError, match="do not determine num_attention_heads"):
        convert(state)
    assert convert(state, num_attention_heads=4)[0]["num_attention_heads"] == 4


class Harmful:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return (Path.touch, (Path("harm"),))


def test_a_pickle_that_needs_more_than_tensors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pt"
    torch.save({"model": official(), "options": Harmful()}, path)
    with pytest.raises(DavaeError, match="would run code"):
        load(path)
    path.write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(DavaeError, match="would run code"):
        load(path)
    assert not (tmp_path / "harm").exists()


def test_files_without_tensors_are_named(tmp_path: Path) -> None:
    with pytest.raises(DavaeError, match="no file"):
        read_state_dict(tmp_path / "absent.pt")
    torch.save({"step": 3}, tmp_path / "step.pt")
    with pytest.raises(DavaeError, match="holds step; expected named tensors"):
        read_state_dict(tmp_path / "step.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(DavaeError, match="holds a list"):
        read_state_dict(tmp_path / "list.pt")
