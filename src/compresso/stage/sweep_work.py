"""What stages that go through the blocks cost: passes of a sweep and of a search for shares, and bytes that learn."""

from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.stage.contract import FindsShares, LearnsBlocks, Sweeps
from compresso.stage.work import Passes


def learned_bytes(stage: Sweeps) -> int:
    """What a sweep holds for each weight of the block it is at, beside the block; 0 where nothing learns."""
    return stage.learned_bytes if isinstance(stage, LearnsBlocks) else 0


def sweep_passes(stage: Sweeps, model: PreTrainedModel, arch: Arch, looks: int = 0) -> Passes:
    """The passes of a sweep: each block runs for its statistics, and again for what the edited one outputs.

    looks: passes over the dense blocks before it.
    """
    groups, n_blocks = stage.check(model, arch), len(arch.blocks(model))
    of_blocks = [
        len({group.turn for group in here}) if stage.calibration.true_sequential else 1
        for here in groups.values()
        if here
    ]
    again = max(groups, default=0)  # the last edited block's output is not asked for
    return Passes("calibration", stage.calibration.examples, (sum(of_blocks) + again + looks * n_blocks) / n_blocks)


def search_passes(stage: FindsShares, model: PreTrainedModel, arch: Arch, looked_at: int = 0) -> list[Passes]:
    """The passes of a search for shares: a look at the dense model, each layer at each share alone, from its block on,
    and as many candidates as may be asked for at each stage of selection; none where shares are uniform.

    looked_at: examples that statistics of the dense model are taken on.
    """
    if stage.allocation == "uniform":
        return []
    search, n_blocks = stage.search, len(arch.blocks(model))
    sizes = [
        min(n * search.batch, search.examples) for n in search.evolution.sizes(-(-search.examples // search.batch))
    ]
    levels = 2 * int(search.reach / search.step + 0.5) + 1
    alone = levels * sum(n_blocks - layer for layer in stage.check(model, arch)) / n_blocks
    found = [Passes("search", looked_at), Passes("search", sizes[-1], 3), Passes("search", sizes[0], alone)]
    tried = search.evolution.most if stage.allocation == "evolve" else [0] * len(sizes)
    return found + [Passes("search", size, n) for size, n in zip(sizes, tried, strict=True)]
