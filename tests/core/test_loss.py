"""A loss as a value: its mean is that of the closed form, its terms add up, and nothing but the labels is hidden from
the model.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from compresso.core.loss import LABEL, NEXT_TOKEN, logits_of
from compresso.core.losses import IGNORED, label_loss


def test_the_loss_of_labels_is_the_mean_negative_log_probability() -> None:
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2, IGNORED, 1, 1])
    chosen = [0, 1, 3, 4]
    wanted = -torch.stack([logits.softmax(-1)[i, labels[i]].log() for i in chosen]).mean()
    torch.testing.assert_close(label_loss(logits, labels), wanted)
    assert LABEL.terms(labels) == 4
    assert label_loss(logits.half(), labels).dtype == torch.float32


@pytest.mark.parametrize(
    ("labels", "said"),
    [([[0, 1]], r"wanted logits \[batch, classes\]"), ([IGNORED, IGNORED], "no example is labelled")],
)
def test_what_has_no_mean_is_refused(labels: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        label_loss(torch.zeros(2, 3), torch.tensor(labels))


@pytest.mark.parametrize("loss", [NEXT_TOKEN, LABEL])
def test_the_mean_of_a_batch_is_that_of_its_examples_weighed_by_their_terms(loss: object) -> None:
    assert loss in (NEXT_TOKEN, LABEL)
    generator = torch.Generator().manual_seed(1)
    tokens = loss is NEXT_TOKEN
    logits = torch.randn(*((4, 6, 7) if tokens else (4, 7)), generator=generator)
    labels = torch.randint(7, (4, 6) if tokens else (4,), generator=generator)
    if tokens:
        labels[1, 3:] = IGNORED
    one_by_one = [slice(i, i + 1) for i in range(4)]
    shares = [NEXT_TOKEN.terms(labels[i]) if tokens else LABEL.terms(labels[i]) for i in one_by_one]
    mean = NEXT_TOKEN.mean if tokens else LABEL.mean
    parts = [mean(logits[i], labels[i]) * n for i, n in zip(one_by_one, shares, strict=True)]
    torch.testing.assert_close(sum(parts) / sum(shares), mean(logits, labels))


def test_only_next_tokens_lose_labels_behind_padding() -> None:
    labels, mask = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1]])
    assert NEXT_TOKEN.predicted(labels, mask).tolist() == [[IGNORED, IGNORED, IGNORED, 8]]
    assert LABEL.predicted(torch.tensor([3]), mask).tolist() == [3]


def test_a_model_sees_everything_but_the_labels() -> None:
    seen: dict[str, object] = {}

    def model(**inputs: object) -> SimpleNamespace:
        seen.update(inputs)
        return SimpleNamespace(logits=torch.zeros(2, 3))

    batch: dict[str, Tensor] = {
        "input_ids": torch.ones(2, 4),
        "token_type_ids": torch.ones(2, 4),
        "labels": torch.zeros(2),
    }
    logits_of(model, batch)
    assert set(seen) == {"input_ids", "token_type_ids", "use_cache"} and seen["use_cache"] is False
