"""One-stage distillation: the published layer map and loss, and what padding does not change."""

import pytest
import torch

from compresso.core.distillation import divergences
from compresso.core.one_stage import LayerMap, attention_distance, layer_map, soft_cross_entropy


def test_the_published_map_of_five_layers_of_twelve() -> None:
    assert layer_map(5, 12, (2, 4, 6, 8, 10)) == LayerMap((2, 4, 6, 8, 10), (1, 3, 5, 7, 9, 11))


def test_maps_without_reduction_and_of_every_second_layer() -> None:
    assert layer_map(3, 3) == LayerMap((0, 1, 2), (0, 1, 2, 3)) == layer_map(3, 3, (0, 1, 2))
    assert layer_map(3, 6) == LayerMap((1, 3, 5), (0, 2, 4, 6)) == layer_map(3, 6, (1, 3, 5))


def test_a_map_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="4 layers of the student do not divide the teacher's 6"):
        layer_map(4, 6)
    for taken in ((1, 2), (1, 2, 6), ()):
        with pytest.raises(ValueError, match="wanted 3 of the teacher's 0 to 5"):
            layer_map(3, 6, taken)


def test_soft_labels_are_the_published_numbers() -> None:
    """M18 of the specification: the sum over classes, and the scripts' mean."""
    student, teacher = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    (found,) = soft_cross_entropy(student, teacher).tolist()
    assert found == pytest.approx(1.4805708) and found / 3 == pytest.approx(0.4935236)


def test_soft_labels_are_a_divergence_and_the_teacher_s_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    entropy = soft_cross_entropy(teacher, teacher, 2.0)
    torch.testing.assert_close(
        soft_cross_entropy(student, teacher, 2.0) - entropy, divergences(student, teacher, "forward", 2.0)
    )


def test_bad_logits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3\] and \[2, 4\]"):
        soft_cross_entropy(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="temperature=0"):
        soft_cross_entropy(torch.ones(2, 3), torch.ones(2, 3), 0)


def test_attention_distance_is_the_mean_over_pairs_that_count() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.rand(2, 3, 5, 5, generator=generator) for _ in range(2))
    whole = torch.ones(2, 5, dtype=torch.bool)
    torch.testing.assert_close(attention_distance(ours, theirs, whole), (ours - theirs).square().mean())
    short = whole.clone()
    short[1, 3:] = False
    wanted = torch.cat([(ours - theirs)[0].flatten(), (ours - theirs)[1, :, :3, :3].flatten()]).square().mean()
    torch.testing.assert_close(attention_distance(ours, theirs, short), wanted)
    with pytest.raises(ValueError, match="select the heads that are left"):
        attention_distance(ours[:, :2], theirs, whole)
