"""Extractive question answering: where in a text the answer to a question begins and ends, by an encoder with two
logits a token on top (Devlin et al., arXiv 1810.04805, section 4.2).

Questions without an answer (SQuAD 2, arXiv 1806.03822) point at the first token, and are scored by whether nothing is
found. A base model has no such head; the stage `finetune` gives it one, drawn as its family draws it. Examples are
split by title: no text lies on both sides.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AutoModelForQuestionAnswering, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from compresso.checkpoint.kinds import auto_class
from compresso.core.loss import SPAN, Loss
from compresso.core.row import Row
from compresso.data.answer_groups import by_group, of_one_group
from compresso.data.answers import ANSWERED, encode_answered
from compresso.data.batches import encoder_inputs
from compresso.data.record_forms import RecordForm
from compresso.data.records import Records
from compresso.data.survival import Encoded
from compresso.metrics.answers import F1, NEVER, WHOLE, AnswerScore, answer_score
from compresso.metrics.guard import Guard
from compresso.metrics.label_guard import judge_labels
from compresso.tasks import encoders
from compresso.tasks.base import Reading, register
from compresso.training.halves import Compare, Whole, examples
from compresso.training.noise import mixed_seed


@dataclass(frozen=True)
class QuestionAnswering:
    """The task of encoders that find answers."""

    name: str = "question-answering"
    auto_class: str = "AutoModelForQuestionAnswering"
    pipeline: str = "question-answering"
    form: RecordForm = ANSWERED
    metric: str = F1
    head: str = "a new head of two logits a token"
    usage: str = (
        "from transformers import AutoModelForQuestionAnswering, AutoTokenizer\n\n"
        "model, tokenizer = (one.from_pretrained({folder}) for one in (AutoModelForQuestionAnswering, AutoTokenizer))\n"
        "given = tokenizer('Who came?', 'A man came in.', return_tensors='pt')\n"
        "said = model(**given)\n"
        "first, last = said.start_logits.argmax(), said.end_logits.argmax()\n"
        "print(tokenizer.decode(given['input_ids'][0, first : last + 1]))"
    )
    reads_text: bool = True
    data_settings: tuple[str, ...] = ("max_length", "limit")
    writes_text: bool = False
    loss: Loss = SPAN
    compare: Compare = examples

    def obstacle(self, config: PreTrainedConfig) -> str:
        """Why no model with this config does it; "" for an encoder of texts."""
        return encoders.obstacle(config, AutoModelForQuestionAnswering, self.name)

    def lacks_head(self, config: PreTrainedConfig) -> bool:
        """Whether it is a base model, or has a head for another task."""
        return auto_class(config) is not AutoModelForQuestionAnswering

    def with_head(self, model: PreTrainedModel, labels: Sequence[str], seed: int) -> PreTrainedModel:
        """The encoder under a new linear with two outputs."""
        return encoders.under_new_head(
            model, AutoModelForQuestionAnswering, {"num_labels": 2}, mixed_seed("head", seed)
        )

    def encode(
        self, records: Records, tokenizer: PreTrainedTokenizerBase | None, reading: Reading, config: PreTrainedConfig
    ) -> Encoded:
        """Windows of question and text. Raises DataError as `encode_answered`."""
        tokenizer = encoders.with_tokenizer(tokenizer, records)
        segments = encoders.tells_segments(config)
        return encode_answered(
            records,
            tokenizer,
            reading.max_length,
            reading.limit,
            int(config.vocab_size),
            segments,
            learns=reading.learns,
        )

    def held_places(self, rows: Sequence[Row], n: int) -> set[int]:
        """Windows of whole titles."""
        return by_group(rows, n)

    def undivided(self, rows: Sequence[Row]) -> str:
        """That all windows are of one title, where they are."""
        return of_one_group(rows)

    def held_out(self, n_rows: int) -> int:
        """A fifth, but enough for a score and no more than takes seconds."""
        return encoders.held_out(n_rows)

    def halves(self, model: PreTrainedModel, blocks: Sequence[nn.Module]) -> Whole:
        """The model whole: its logits are few."""
        return Whole(model, blocks, int(model.config.max_position_embeddings), "positions")

    def collate(self, rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
        """What `encoder_inputs` gives, and labels [len(rows), 2], int64. Raises DataError as `encoder_inputs`."""
        labels = torch.tensor([row["labels"] for row in rows])
        return {**encoder_inputs(rows, pad_id), "labels": labels}

    def again(self, row: Row, seed: int) -> Row:
        """The example as it is: nothing is drawn."""
        return row

    def probe(self, rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
        """A few examples with their padding."""
        return encoder_inputs(rows[: encoders.PROBED], pad_id)

    def score(
        self, model: PreTrainedModel, rows: Sequence[Row], counted_as: Sequence[Row] | None = None
    ) -> AnswerScore:
        """F1 and exact match of answers."""
        return answer_score(model, rows, partial(self.collate, pad_id=encoders.padding(model.config)))

    def judge(self, config: PreTrainedConfig, dense: Mapping[str, float], pruned: Mapping[str, float]) -> Guard:
        """By what is left of the lead in F1 over answering with the whole text, or never, whichever is better."""
        n, whole, never = pruned.get("examples"), pruned.get(WHOLE), pruned.get(NEVER)
        silent = whole is not None and never is not None and never > whole
        return judge_labels(
            dense.get(F1),
            pruned.get(F1),
            never if silent else whole,
            None if n is None else int(n),
            what="F1",
            guessing="no answer" if silent else "the whole text",
        )


QUESTION_ANSWERING = QuestionAnswering()
register(QUESTION_ANSWERING)
