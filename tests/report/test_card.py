"""The model card says what the records say, and nothing else."""

from compresso.export.card import model_card


def test_card_of_a_native_checkpoint() -> None:
    text = model_card(
        {
            "model": "owner/name",
            "recipe": "compresso",
            "layout": "native",
            "prompt": "1",
            "before": {"parameters": {"total": 2000, "blocks": 1600}, "bytes": 4000},
            "after": {"parameters": {"total": 1500, "blocks": 1120}, "bytes": 3000},
        }
    )
    assert text.startswith("---\n")
    assert "base_model: owner/name" in text
    assert "| parameters, blocks | 1,600 | 1,120 | 70.0 % |" in text
    assert "| bytes on disk | 4,000 | 3,000 | 75.0 % |" in text
    assert "import compresso" in text
    assert "trust_remote_code" in text
    assert "collaborative prompt, version 1" in text
    assert text.endswith("\n")


def test_card_of_a_plain_checkpoint_leaves_out_what_is_unknown() -> None:
    text = model_card({"model": "local", "layout": "uniform"})
    for absent in ("import compresso", "trust_remote_code", "base_model", "prompt", "| before |", "padded", "None"):
        assert absent not in text
    assert "zero-padded" in model_card({"layout": "padded"})
