"""How a perplexity is taken: every decision that changes the number, and the three sets of decisions that the
literature made.

Papers print one name, "perplexity on WikiText-2", for numbers that differ by a factor of two. What differs is written
here field by field, and goes into the record of every number. Windows count all tokens that the model reads, a BOS
included.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Literal, get_args

from compresso.errors import DataError, nearest
from compresso.metrics.record import Setting

Joining = Literal["blank line", "space", "tokens", "separate"]
Bos = Literal["tokenizer", "none", "start", "document", "window"]
Remainder = Literal["dropped", "kept"]
Averaging = Literal["tokens", "windows"]
_CHOICES = {
    "joining": get_args(Joining),
    "bos": get_args(Bos),
    "remainder": get_args(Remainder),
    "averaging": get_args(Averaging),
}


@dataclass(frozen=True)
class PerplexityProtocol:
    """What is read, how it is cut, and which tokens count.

    Args:
        corpus: names the measurement: "wikitext2", "c4", the stem of a file, "held".
        split: of the corpus; "all" for a local file.
        joining: "blank line" or "space": texts are joined by that and tokenised as one; "tokens": each text is
            tokenised by itself and the tokens are put one after the other; "separate": likewise, but no window reaches
            from one text into the next.
        seq_len: tokens that the model reads at once.
        stride: new tokens of a window; those before them are context and not counted again. None: windows do not
            overlap.
        bos: where a beginning-of-sequence token stands, if the tokenizer has one. "tokenizer": where the tokenizer
            itself puts special tokens around what it is given; "start": once before each stream; "document": before
            each text; "window": before each window.
        eos: put an end-of-sequence token after each text.
        group: with "tokens", texts of one stream; what a stream leaves over does not pass to the next. None: all texts
            are one stream.
        remainder: what becomes of a last window that is not full.
        documents: only so many texts, from the first. None: all.
        max_windows: only so many windows of each stream, from its first. None: all.
        averaging: the mean loss is over predicted "tokens", or over "windows" (of their means); the same where all
            windows are full.

    The first token of a window is not predicted, unless there is something before it: a BOS, or the context that a
    stride leaves.

    Raises:
        DataError: the fields contradict each other.
    """

    corpus: str
    split: str
    joining: Joining
    seq_len: int
    stride: int | None = None
    bos: Bos = "tokenizer"
    eos: bool = False
    group: int | None = None
    remainder: Remainder = "dropped"
    documents: int | None = None
    max_windows: int | None = None
    averaging: Averaging = "tokens"

    def __post_init__(self) -> None:
        for name in ("corpus", "split"):
            if not getattr(self, name):
                raise DataError(f"a perplexity protocol with {name}={getattr(self, name)!r}; name what is read")
        for name, valid in _CHOICES.items():
            if getattr(self, name) not in valid:
                raise DataError(
                    f"a perplexity protocol with {name}={getattr(self, name)!r};"
                    f" {nearest(str(getattr(self, name)), valid)}"
                )
        if self.seq_len < 2:
            raise DataError(f"seq_len={self.seq_len} leaves no token to predict; give 2 or more")
        most = self.seq_len - (self.bos == "window")
        if self.stride is not None and not 1 <= self.stride <= most:
            raise DataError(
                f"stride={self.stride} with seq_len={self.seq_len} would leave tokens out; wanted 1 to {most}"
            )
        for name in ("group", "documents", "max_windows"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise DataError(f"a perplexity protocol with {name}={count}; wanted 1 or more, or None for all")
        if self.joining in ("blank line", "space") and (self.eos or self.bos == "document"):
            raise DataError(
                f"texts joined by a {self.joining} have no tokens around each; give joining='tokens' for those"
            )
        if self.joining != "tokens" and self.group is not None:
            raise DataError(
                f"group={self.group} goes with joining='tokens'; leave it out with joining='{self.joining}'"
            )

    def settings(self) -> dict[str, Setting]:
        """All fields, as a measurement records them."""
        return {**asdict(self), "stride": self.stride or "no overlap"}


PRESETS: Mapping[str, PerplexityProtocol] = {
    "sparsegpt": PerplexityProtocol("wikitext2", "test", "blank line", 2048, averaging="windows"),
    "llm-pruner": PerplexityProtocol("wikitext2", "test", "blank line", 128),
    "compresso": PerplexityProtocol("wikitext2", "test", "tokens", 1024, group=1000, averaging="windows"),
}
"""The protocols of the literature, on WikiText-2 (raw, test split); `preset` gives them for other corpora and lengths.

sparsegpt: SparseGPT (arXiv 2301.00774) and Wanda (2306.11695), as their code has it: rows joined by two newlines and
    tokenised once, so a tokenizer's BOS stands at the very start only; windows of 2048, the rest dropped; exp of the
    mean of window means. Wanda takes the model's context for 2048, which is 4096 for LLaMA-2 and changes its number
    from 5.47 to 5.12. On C4: the first 1100 documents of the validation split joined by a space, the first 256 windows.
llm-pruner: LLM-Pruner (2305.11627), as its code has it: the same stream in windows of 128, exp of the mean over the 127
    predicted tokens of each. Little context makes it about twice the number of the first.
compresso: Compresso (2310.05015), as its code has it: rows tokenised one by one, in portions of 1000 put one after the
    other and cut into blocks of 1024, what a portion leaves over dropped; exp of the mean of block means. That each
    row, an empty one too, brings the BOS its tokenizer gives it is our reading of that script.
"""


def preset(
    name: str,
    corpus: str = "wikitext2",
    split: str | None = None,
    *,
    seq_len: int | None = None,
    max_windows: int | None = None,
) -> PerplexityProtocol:
    """A protocol of the literature for a corpus, with another window length or number of windows if one is given.

    Args:
        name: a key of `PRESETS`.
        corpus: what the measurement is named after.
        split: None: that of the corpus ("test" of wikitext2, "validation" of c4, "all" of anything else).

    Raises:
        DataError: an unknown name.
    """
    if name not in PRESETS:
        raise DataError(f"no perplexity protocol '{name}'; {nearest(name, PRESETS)}")
    known = PRESETS[name]
    if name == "sparsegpt" and corpus == "c4":
        known = replace(known, joining="space", documents=1100, max_windows=256)
    return replace(
        known,
        corpus=corpus,
        split=split or usual_split(corpus),
        seq_len=seq_len or known.seq_len,
        max_windows=max_windows or known.max_windows,
    )


def usual_split(corpus: str) -> str:
    """The split on which a corpus is measured: "test" of wikitext2, "validation" of c4, "all" of anything else."""
    return {"wikitext2": "test", "c4": "validation"}.get(corpus, "all")


def every_token(corpus: str, split: str, seq_len: int) -> PerplexityProtocol:
    """Nothing omitted: BOS text EOS, text after text, in windows that do not overlap, the last one kept though it is
    shorter.

    For short texts, such as those of the embedded world, of which the other protocols would count a part.
    """
    return PerplexityProtocol(corpus, split, "tokens", seq_len, bos="document", eos=True, remainder="kept")


def check_context(protocol: PerplexityProtocol, context: int | None) -> None:
    """Refuse a window that is longer than the model's context; None knows no limit.

    Raises DataError.
    """
    if context is not None and protocol.seq_len > context:
        fitting = [name for name, one in PRESETS.items() if one.seq_len <= context]
        other = f"choose --protocol {' or '.join(fitting)}, or " if fitting else ""
        raise DataError(
            f"the perplexity protocol reads {protocol.seq_len} tokens at once, the model was made for {context};"
            f" {other}give seq_len={context} (another length is another number)"
        )
