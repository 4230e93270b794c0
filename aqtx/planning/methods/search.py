"""`search`: the plan of `base` with the fewest bits below a perplexity ceiling; `aqtx.planning.search` finds it."""

from aqtx.planning.method import OF_COSTS, OF_DECISIONS, Method, register

register(
    Method(
        name="search",
        summary="the bits of method `base` lowered as far as a perplexity ceiling allows",
        options=(*OF_DECISIONS, *OF_COSTS, "average_bits", "cost_model", "base", "perplexity_ceiling", "search_steps"),
        needs_text=True,
        walks=lambda own: ("forward", None),
        budget="optional",
        base=False,
    )
)
