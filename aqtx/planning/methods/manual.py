"""`manual`: what a file says; `aqtx.planning.manual` reads it."""

from aqtx.planning.method import Method, register

register(
    Method(
        name="manual",
        summary="what a JSON file says",
        options=("plan",),
        budget="own",
        base=False,
        keep=(),
    )
)
