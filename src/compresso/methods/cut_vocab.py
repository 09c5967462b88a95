"""Takes tokens that a domain does not use out of embedding, head and tokenizer (contextual pruning, arXiv 2312.12682,
embeddings).

The paper scores a token by its share of the domain's text and zeroes the embedding and head rows of those at or below a
threshold.

Departures: The rows leave, and the tokenizer with them. A zeroed head row still gives the logit 0, which wins wherever
    others are negative. Tokens stay that a used token is merged from, special and added tokens, and bytes or
    characters: any text can still be written, and text whose tokens all stay is encoded as before. Shares are counted
    on training examples alone. Held-out and training examples with a removed token are re-tokenised with the kept ones;
    without a tokenizer they are dropped. Both are counted in the records. The number of tokens may be limited, and
    filled up to a multiple that hardware likes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Lt
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from compresso.arch.base import Arch
from compresso.core.axis import Axis, Kind
from compresso.core.budget import InfeasibleBudget
from compresso.core.cost import CostModel
from compresso.core.plan import Plan
from compresso.core.row import Row
from compresso.data import subwords
from compresso.data.cut_tokenizer import required_ids, state_of
from compresso.data.windows import check_window
from compresso.edit.token_ids import token_ids
from compresso.errors import ArchError, BudgetError
from compresso.job import Job
from compresso.solve.tokens import keep_tokens, shares
from compresso.stage import Effects, Passes, stage


@stage(
    "cut_vocab",
    title="takes tokens that the data does not use out of the vocabulary",
    paper="2312.12682",
    effects=Effects.SHAPES,
    needs=("data",),
    when=(
        "For models of one domain or language whose embeddings weigh much. Before all other stages, so that they train"
        " on the new tokens."
    ),
    failures=(
        "Other text costs more tokens and loses quality: look at removed_mass and at how many held-out examples were"
        " re-tokenised."
    ),
    once="tokens that the data does not use are the same before training and after it",
)
class CutVocab:
    """Knobs of the cut.

    Args:
        threshold: a token leaves where its share of the training examples' tokens is at or below this; 0 takes what
            never occurs.
        most: tokens that stay at most, the most frequent first; null for no limit.
        multiple_of: fill up with the lowest ids to a multiple of this; 64 suits GPUs.
    """

    threshold: Annotated[float, Ge(0), Lt(1)] = 0.0
    most: Annotated[int, Ge(1)] | None = None
    multiple_of: Annotated[int, Ge(1)] = 1

    def budget(self) -> None:
        """None: no share of the model describes the choice."""

    def dry_run_plan(self, axes: Sequence[Axis], cost: CostModel) -> Plan:
        """The first `most` tokens; without data nobody knows which ones stay, or how many without a limit."""
        size = _vocab(axes).size
        return Plan() if self.most is None or self.most >= size else Plan({"vocab": tuple(range(self.most))})

    def check_data(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase | None,
        config: PreTrainedConfig,
        window: int | None,
    ) -> None:
        """Raises DataError for plain text of less than a window, CheckpointError for a tokenizer that cannot be cut,
        InfeasibleBudget for a limit below what must stay.
        """
        check_window(rows, window)
        words = _Words.of(tokenizer)
        keep_tokens(torch.zeros(config.vocab_size, dtype=torch.float64), words.lasting, words.made_of, most=self.most)

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """None: it counts the tokens of the data."""
        return []

    def __call__(self, job: Job) -> Job:
        """Count, choose, cut."""
        axis = _vocab(job.arch.axes(job.model))
        words = _Words.of(job.tokenizer)
        used = shares((row["input_ids"] for row in job.rows), axis.size)
        lasting = {*words.lasting, *token_ids(job.model), job.pad_id}
        try:
            kept = keep_tokens(
                used, lasting, words.made_of, threshold=self.threshold, most=self.most, multiple_of=self.multiple_of
            )
        except InfeasibleBudget as error:
            raise BudgetError(f"stage 'cut_vocab': {error}") from error
        mask = torch.zeros(axis.size)
        mask[list(kept)] = 1
        facts = {
            "tokens_used": int((used > 0).sum()),
            "text_left_whole": round(float(used[list(kept)].sum()), 6),
            "kept_though_unused": int((used[list(kept)] == 0).sum()),
        }
        return job.without({axis.name: mask}, "cut_vocab", **facts)


def _vocab(axes: Sequence[Axis]) -> Axis:
    """The axis of tokens. Raises ArchError where the architecture describes none."""
    found = next((axis for axis in axes if axis.kind == Kind.VOCAB), None)
    if found is None:
        raise ArchError(
            "stage 'cut_vocab': this architecture's tokens are not described as an axis; leave the stage out"
        )
    return found


@dataclass(frozen=True)
class _Words:
    """What a tokenizer says of its tokens: which ones last, and what each is made of."""

    lasting: frozenset[int]
    made_of: Callable[[int], Iterable[int]]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase | None) -> "_Words":
        """Without a tokenizer every token is made of itself and none has to last. Raises CheckpointError if it cannot
        be cut.
        """
        if tokenizer is None:
            return cls(frozenset(), lambda i: (i,))
        state = state_of(tokenizer)
        vocab, parts = subwords.vocabulary(state), subwords.constituents(state)
        names = {i: piece for piece, i in vocab.items()}
        return cls(
            frozenset(required_ids(tokenizer)),
            lambda i: [vocab[part] for part in parts(names[i])] if i in names else (i,),
        )
