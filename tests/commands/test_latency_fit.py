"""Times of modules from times of whole models: exact where times are sums, never negative."""

import pytest

from compresso.commands.latency_fit import LEAST, fit_times, shapes_to_fit

TERMS = (12.0, 0.2, 0.1, 0.05, 0.001)


def time_of(widths: list[tuple[int, int]]) -> float:
    fixed, attention, head, ffn, channel = TERMS
    return fixed + sum(
        attention * (heads > 0) + head * heads + ffn * (channels > 0) + channel * channels for heads, channels in widths
    )


@pytest.mark.parametrize(("heads", "channels", "layers"), [(3, 1536, 30), (1, 64, 2), (8, 14336, 32), (12, 3072, 12)])
def test_sums_are_taken_apart(heads: int, channels: int, layers: int) -> None:
    shapes = shapes_to_fit(heads, channels, layers)
    assert len(shapes) >= LEAST
    assert all(one[0][0] for one in shapes)  # a cache begins with the first attention
    found = fit_times(shapes, [time_of(widths) for widths in shapes])
    assert found.error < 1e-6
    for widths in ([(heads, channels)] * layers, [(1, channels // 2)] * layers, [(heads, channels)]):
        predicted = found.terms[0]
        for width in widths:
            curves = found.curve(0, heads), found.curve(1, channels)
            for units, curve, most in zip(width, curves, (heads, channels), strict=True):
                share = (units - 1) / max(most - 1, 1)
                predicted += curve[1] + share * (curve[most] - curve[1])
        if len(widths) > 1 or heads > 1:
            assert predicted == pytest.approx(time_of(widths), rel=1e-5)


def test_terms_are_not_negative_under_noise() -> None:
    shapes = shapes_to_fit(3, 1536, 30)
    noise = [0.8, 1.3, 0.9, 1.2, 1.0, 0.7, 1.4, 1.1]
    found = fit_times(shapes, [time_of(widths) * by for widths, by in zip(shapes, noise, strict=True)])
    assert min(found.terms) >= 0 and found.error > 0.05
    assert found.curve(1, 1536)[1536] >= found.curve(1, 1536)[1] >= found.curve(1, 1536)[0] == 0


def test_too_few_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="6 are wanted"):
        fit_times([[(2, 8)] * n for n in (1, 2, 3, 4, 4)] * 2, [1.0] * 10)


def test_channels_come_in_whole_blocks() -> None:
    assert all(n % 32 == 0 for widths in shapes_to_fit(3, 1536, 30, 32) for _, n in widths)
