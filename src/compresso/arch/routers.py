"""What transformers' routers compute, read off their fields; see `compresso.core.routing`."""

from torch import Tensor, nn

from compresso.core.routing import Routing
from compresso.errors import ArchError

ROUTERS = ("gate", "router")
"""What families call the router."""
CORRECTION = "e_score_correction_bias"
"""The buffer of a router whose choice is not by its scores alone."""
METHOD = "topk_method"
"""The field of a router that says whether groups limit its choice."""
ALL, _LIMITED = "greedy", "group_limited_greedy"


def routing_of(router: nn.Module) -> Routing:
    """How a router chooses; one without the field `norm_topk_prob` divides by the sum (Mixtral, gpt-oss), but for those
    with a `topk_method` (DeepSeek-V2), which never do.

    Raises:
        ArchError: its `topk_method` is one that transformers does not compute.
    """
    sigmoid = CORRECTION in dict(router.named_buffers(recurse=False))
    method = getattr(router, METHOD, None)
    if hasattr(router, METHOD) and method not in (ALL, _LIMITED):
        raise ArchError(
            f"{METHOD}={method!r} of a {type(router).__name__} is a choice that nobody described; wanted {ALL} or"
            f" {_LIMITED} in config.json"
        )
    grouped = method != ALL
    return Routing(
        top_k=int(router.top_k),  # pyright: ignore[reportArgumentType]
        sigmoid=sigmoid,
        normalised=bool(getattr(router, "norm_topk_prob", not hasattr(router, METHOD))),
        scale=float(getattr(router, "routed_scaling_factor", 1.0)),
        groups=int(getattr(router, "num_group", 1) or 1) if grouped else 1,
        of_groups=int(getattr(router, "topk_group", 1) or 1) if grouped else 1,
        counts_chosen=sigmoid or hasattr(router, METHOD),
    )


def router_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights and biases of a model's routers by full name; empty without any."""
    return {
        f"{where}.{name}": parameter
        for where, module in model.named_modules()
        if where.rpartition(".")[2] in ROUTERS and hasattr(module, "top_k")
        for name, parameter in module.named_parameters(recurse=False)
    }


def correction_of(router: nn.Module) -> Tensor | None:
    """What is added to scores for the choice [experts]; None where nothing is."""
    return dict(router.named_buffers(recurse=False)).get(CORRECTION)
