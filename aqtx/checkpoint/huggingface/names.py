"""Names on disk, which are ours too, and the names of the same weights in transformers' modules.

They are the same for all families but Mixtral, whose checkpoints keep the names of its first code.
"""

_MIXTRAL = ((".block_sparse_moe.", ".mlp."), (".w1", ".gate_proj"), (".w3", ".up_proj"), (".w2", ".down_proj"))


def to_disk(model_type: str, name: str) -> str:
    """The name on disk of a weight or module of transformers' model, experts split."""
    for disk, theirs in _MIXTRAL if model_type == "mixtral" else ():
        name = name.replace(theirs, disk)
    return name


def from_disk(model_type: str, name: str) -> str:
    """The name in transformers' model of a weight or module on disk."""
    for disk, theirs in _MIXTRAL if model_type == "mixtral" else ():
        name = name.replace(disk, theirs)
    return name
