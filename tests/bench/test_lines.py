"""Which combinations are measured, and that the others are named with a reason."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repvgg.bench.lines import (
    FILE_RUNTIMES,
    FORMS,
    LAYOUTS,
    OWN_LAYOUT,
    PRECISIONS,
    RUNTIMES,
    Line,
    Setting,
    inference_settings,
    training_settings,
)


def some(choices: tuple[str, ...]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(choices), min_size=1, unique=True)


@given(
    some(FORMS), some(("float32", "bfloat16", "int8")), some(RUNTIMES), some(LAYOUTS), st.sampled_from(["cpu", "cuda"])
)
def test_every_combination_is_a_line_or_left_out_with_a_reason(forms, precisions, runtimes, layouts, device) -> None:
    try:
        settings, left_out = inference_settings(forms, precisions, runtimes, layouts, device)
    except ValueError as error:
        settings, left_out = [], str(error).removeprefix("nothing is left to measure: ").split("; ")
    assert len(set(settings)) == len(settings)
    for form, precision, runtime in product(forms, precisions, runtimes):
        of_it = [s.layout for s in settings if (s.form, s.precision, s.runtime) == (form, precision, runtime)]
        reasons = [reason for reason in left_out if reason.startswith(f"{form} {precision} {runtime}: ")]
        if reasons:
            assert not of_it
            assert len(reasons) == 1
        else:
            assert of_it == ([OWN_LAYOUT] if runtime in FILE_RUNTIMES else layouts)


@pytest.mark.parametrize(
    ("precision", "runtime", "device", "says"),
    [
        ("int8", "eager", "cpu", "a quantized graph runs compiled or in a runtime"),
        ("int8", "compile", "cuda", "int8 is measured on the processor"),
        ("bfloat16", "onnxruntime", "cpu", "ONNX Runtime has no bfloat16 convolution"),
        ("float32", "openvino", "cuda", "runs on the processor here: --device cpu"),
    ],
)
def test_what_does_not_exist_says_why(precision: str, runtime: str, device: str, says: str) -> None:
    with pytest.raises(ValueError, match=f"nothing is left to measure: deploy {precision} {runtime}: {says}"):
        inference_settings(["deploy"], [precision], [runtime], ["contiguous"], device)


def test_only_the_deploy_form_is_quantized() -> None:
    settings, left_out = inference_settings(FORMS, ["int8"], ["compile"], ["channels_last"], "cpu")
    assert settings == [Setting("deploy", "int8", "compile", "channels_last")]
    assert left_out == ["train_form int8 compile: it is the deploy form that is quantized"]


def test_float16_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match=r"--precisions float16 needs a GPU .*choose float32 or bfloat16"):
        inference_settings(["deploy"], ["float32", "float16"], ["eager"], ["contiguous"], "cpu")
    settings, left_out = inference_settings(["deploy"], ["float16"], ["eager"], ["contiguous"], "cuda")
    assert settings == [Setting("deploy", "float16", "eager", "contiguous")]
    assert not left_out


def test_a_training_has_all_combinations_and_no_form() -> None:
    settings = training_settings(PRECISIONS[:2], RUNTIMES[:2], LAYOUTS)
    assert len(set(settings)) == 8
    assert {setting.form for setting in settings} == {""}


def test_a_line_reads_as_words() -> None:
    assert str(Line("repvgg_a0", "timm", Setting("deploy", "float32", "eager", "contiguous"))) == (
        "repvgg_a0 timm deploy float32 eager contiguous"
    )
    assert str(Line("repvgg_a0", "ours", Setting())) == "repvgg_a0 ours"
