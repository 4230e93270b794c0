"""Names on disk, which are ours too, and the names of the same weights in transformers' modules.

They are the same for all families but those whose checkpoints keep the names of their first code.
"""

_OWN = {  # model_type -> (on disk, in transformers' modules)
    "mixtral": ((".block_sparse_moe.", ".mlp."), (".w1", ".gate_proj"), (".w3", ".up_proj"), (".w2", ".down_proj")),
    "granitemoe": ((".router.layer", ".router"),),
    "ernie4_5_moe": ((".mlp.moe_statics.", ".mlp.gate.moe_statics."),),
}


def to_disk(model_type: str, name: str) -> str:
    """The name on disk of a weight or module of transformers' model, experts split."""
    for disk, theirs in _OWN.get(model_type, ()):
        name = name.replace(theirs, disk)
    return name


def from_disk(model_type: str, name: str) -> str:
    """The name in transformers' model of a weight or module on disk."""
    for disk, theirs in _OWN.get(model_type, ()):
        name = name.replace(disk, theirs)
    return name
