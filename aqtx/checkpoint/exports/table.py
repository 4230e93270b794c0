"""All forms of export by name. A new one is a file beside this and a row here."""

from aqtx.checkpoint.exports import compressed_tensors, dequantized, gguf, torchao
from aqtx.checkpoint.exports.target import Target

TARGETS: dict[str, Target] = {
    target.name: target for target in (dequantized.TARGET, compressed_tensors.TARGET, gguf.TARGET, torchao.TARGET)
}
