"""What every layout promises: the round trip, the refusals, the names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit import FORMATS, quantize
from quantkit.layouts import (
    LAYOUTS,
    check_fused,
    exact_global_scale,
    expert_matrices,
    fused_groups,
    get_layout,
    layout_of,
)
from quantkit.tensor import QuantizedTensor
from tests.quantkit.layouts.stored import byte, every_code, random_weight, same, scalar

HELD = [(name, held) for name, layout in LAYOUTS.items() for held in layout.holds]
OFFERED = [(fmt, size) for fmt in FORMATS.values() for size in fmt.block_sizes]


def experts_of(q: QuantizedTensor) -> QuantizedTensor:
    return dataclasses.replace(q, codes=q.codes[None], scales=q.scales[None])


@pytest.mark.parametrize("name, held", HELD)
def test_every_code_at_every_scale_survives_the_round_trip(name: str, held: tuple[str, int]) -> None:
    q = every_code(FORMATS[held[0]], held[1])
    q = experts_of(q) if name == "gpt_oss" else q
    layout = LAYOUTS[name]
    tensors = layout.to_tensors("model.layer", q)
    assert layout.names(tensors) == ["model.layer"]
    found = layout.from_tensors("model.layer", tensors)
    assert same(found, q)
    assert torch.equal(found.dequantize(), q.dequantize())


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(HELD),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(0, 2**31 - 1),
    st.floats(2.0**-100, 2.0**60, width=32),
)
def test_any_weight_survives_the_round_trip(
    case: tuple[str, tuple[str, int]], rows: int, blocks: int, seed: int, scale: float
) -> None:
    name, (format_name, block_size) = case
    fmt, layout, generator = FORMATS[format_name], LAYOUTS[name], torch.Generator("cpu").manual_seed(seed)

    def bytes_(*shape: int, last: int = 255) -> torch.Tensor:
        return torch.randint(0, last + 1, shape, generator=generator, dtype=torch.uint8, device="cpu")

    global_scale = exact_global_scale(scalar(scale)) if fmt.two_level else scalar(1.0)
    q = QuantizedTensor(
        bytes_(2, rows, 32 * blocks),
        bytes_(2, rows, 64 * blocks // block_size, last=fmt.scale.max_code),
        global_scale,
        fmt,
        block_size,
    )
    if name in ("compressed_tensors", "modelopt"):  # these keep each matrix apart
        q = q[0]
    assert same(layout.from_tensors("a.b", layout.to_tensors("a.b", q)), q)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("fmt, block_size", OFFERED, ids=lambda value: getattr(value, "name", value))
def test_what_cannot_be_expressed_is_refused_with_the_alternative(name: str, fmt: object, block_size: int) -> None:
    layout = LAYOUTS[name]
    if (fmt.name, block_size) in layout.holds:
        layout.check(fmt, block_size)
        return
    q = quantize(random_weight(2, 64), fmt, block_size)
    for attempt in (
        lambda: layout.check(fmt, block_size),
        lambda: layout.to_tensors("a.b", q),
        lambda: layout.config(fmt, block_size, []),
    ):
        with pytest.raises(ValueError) as refusal:
            attempt()
        message = str(refusal.value)
        assert f"{name} cannot hold {fmt.name} with block size {block_size}; it holds " in message
        assert layout.instead in message and "\n" not in message


def test_a_format_of_the_same_name_with_other_grids_is_refused() -> None:
    other = dataclasses.replace(FORMATS["nvfp4"], scale=FORMATS["fp4_ue5m3"].scale)
    with pytest.raises(ValueError, match="cannot hold nvfp4"):
        get_layout("modelopt").check(other, 16)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_vector_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"a\.b is \[64\]; a layer's weight is \[N, K\]"):
        LAYOUTS[name].to_tensors(
            "a.b",
            quantize(random_weight(64), "mxfp4" if name == "gpt_oss" else "nvfp4", 32 if name == "gpt_oss" else 16),
        )


def damaged() -> Iterator[tuple[str, str, dict[str, torch.Tensor], str]]:
    for name in ("compressed_tensors", "modelopt", "gguf"):
        layout = LAYOUTS[name]
        whole = layout.to_tensors("p", every_code(FORMATS["nvfp4"], 16))
        for end in layout.parts:
            yield name, f"without {end}", {k: v for k, v in whole.items() if k != "p" + end}, f"p{end} is missing"
        weight = next(end for end in layout.parts if whole["p" + end].dtype == torch.uint8)
        yield name, "float codes", {**whole, "p" + weight: whole["p" + weight].float()}, "is float32, not uint8"
        scale = (
            layout.parts[-1]
            if name == "gguf"
            else next(end for end in layout.parts if "scale" in end and whole["p" + end].numel() == 1)
        )
        for wrong in (0.0, float("nan"), -1.0):
            yield (
                name,
                f"global scale {wrong}",
                {**whole, "p" + scale: whole["p" + scale] * 0 + wrong},
                "global scale is",
            )


@pytest.mark.parametrize(
    "name, kind, tensors, message", [pytest.param(*case, id=f"{case[0]} {case[1]}") for case in damaged()]
)
def test_damaged_tensors_are_named(name: str, kind: str, tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LAYOUTS[name].from_tensors("p", tensors)


@pytest.mark.parametrize("name", ["compressed_tensors", "modelopt"])
@pytest.mark.parametrize("wrong", [0x7F, 0x80, 0xFF])
def test_scales_off_the_grid_are_counted(name: str, wrong: int) -> None:
    tensors = LAYOUTS[name].to_tensors("p", every_code(FORMATS["nvfp4"], 16))
    tensors["p.weight_scale"].view(torch.uint8)[3, 1] = wrong
    with pytest.raises(ValueError, match="p: 1 of its 504 scales are NaN or negative"):
        LAYOUTS[name].from_tensors("p", tensors)


def test_shapes_that_do_not_fit_are_named() -> None:
    tensors = LAYOUTS["modelopt"].to_tensors("p", every_code(FORMATS["nvfp4"], 16))
    tensors["p.weight"] = tensors["p.weight"][:, :16]
    with pytest.raises(ValueError, match=r"p: codes \[126, 16\] do not fit scales \[126, 4\] of blocks of 16"):
        LAYOUTS["modelopt"].from_tensors("p", tensors)


def test_experts_are_stored_apart_and_gate_and_up_are_halves() -> None:
    q = quantize(random_weight(2, 6, 32), global_scale="amax_per_expert")
    found = dict(expert_matrices("m.experts.gate_up_proj", q))
    assert list(found) == [f"m.experts.{e}.{p}_proj" for e in range(2) for p in ("gate", "up")]
    for expert in range(2):
        whole = q[expert].dequantize()
        for half, name in enumerate(("gate", "up")):
            one = found[f"m.experts.{expert}.{name}_proj"]
            assert torch.equal(one.dequantize(), whole[3 * half : 3 * half + 3])
            assert torch.equal(one.global_scale, q.global_scale[expert, 0, 0])
    assert list(dict(expert_matrices("m.experts.down_proj", q))) == ["m.experts.0.down_proj", "m.experts.1.down_proj"]
    assert next(expert_matrices("m.q_proj", q[0]))[0] == "m.q_proj"


def test_fused_layers_need_one_global_scale() -> None:
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkvo"] + ["m.gate_proj", "m.up_proj"]
    assert fused_groups(names) == [
        [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"],
        [f"model.layers.1.self_attn.{p}_proj" for p in "qkv"],
        ["m.gate_proj", "m.up_proj"],
    ]
    assert fused_groups(["a.q_proj", "b.k_proj"]) == []
    weight = random_weight(4, 32)
    equal = {name: quantize(weight, global_scale=0.5) for name in names}
    check_fused(equal)
    check_fused({**equal, names[3]: quantize(weight, global_scale=0.25)})  # o_proj stands alone
    with pytest.raises(
        ValueError, match=r"up_proj \[0\.25\]; quantize them with the same global_scale, or export gguf"
    ):
        check_fused({**equal, "m.up_proj": quantize(weight, global_scale=0.25)})


def test_layouts_are_found_by_name_and_by_configuration() -> None:
    for name, layout in LAYOUTS.items():
        assert get_layout(name) is layout and layout.name == name
        if name != "gguf":
            entry = layout.config(FORMATS[layout.holds[0][0]], layout.holds[0][1], ["lm_head"])
            assert layout_of(entry["config.json"]["quantization_config"]) is layout
    assert layout_of({"quant_method": "gptq"}) is None
    assert layout_of({}) is None
    with pytest.raises(ValueError, match="unknown layout 'awq'; known layouts: compressed_tensors, modelopt"):
        get_layout("awq")


def test_the_tensors_share_no_memory_that_safetensors_would_refuse() -> None:
    q = quantize(random_weight(2, 4, 64), global_scale=0.5)
    tensors = LAYOUTS["compressed_tensors"].to_tensors("m.experts.gate_up_proj", q)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    places = [tensor.data_ptr() for tensor in tensors.values()]
    assert len(set(places)) == len(places)


def test_the_smallest_weight_by_hand() -> None:
    assert byte(1, 255).tolist() == [1, 255]
    q = QuantizedTensor(byte(0x21, *[0] * 7)[None], byte(0x38)[None], scalar(2.0), FORMATS["nvfp4"], 16)
    assert q.dequantize()[0, :3].tolist() == [1.0, 2.0, 0.0]  # codes 1 and 2: 0.5 and 1, times 1 · 2
