"""How fast a store is built beside the tokenizers library alone, and how much memory that takes at two sizes.

    python -m benchmarks.tokenising [--megabytes N] [--repeats N] [--json FILE]

The text is the Python standard library's, as often as it takes. Both sides tokenise the same text with the same BPE
over all cores, alternating; the library's side only encodes (`encode_batch_fast`, 500 files at once, in memory), ours
also starts its processes, reads the files, counts bytes and words, hashes, and writes the store.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from lm.cores import usable_cores
from lm.data import tokenizer
from lm.data.sources import stdlib

STORE = """
import os, resource, sys, time
from lm.data import corpus, tokenizer, tokens
os.environ["LM_CACHE"] = sys.argv[3]
begin = time.perf_counter()
store = tokens.tokenize(corpus.open_corpus(sys.argv[1]), tokenizer.load(sys.argv[2]))
spent = time.perf_counter() - begin
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1e3
built = peak()
for start in range(0, store.num_tokens - 1024, 1024):
    store.read(start, start + 1024)
for document in range(0, len(store), 7):
    store.document_id(document), store.sizes(document)
print(spent, store.num_tokens, built, peak(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3)
"""
LIBRARY = """
import sys, time, pathlib, tokenizers
library = tokenizers.Tokenizer.from_file(sys.argv[2])
texts = [path.read_text() for path in sorted(pathlib.Path(sys.argv[1]).glob("*.txt"))]
begin = time.perf_counter()
tokens = 0
for start in range(0, len(texts), 500):  # everything at once is slower by half: it is all kept in memory
    encodings = library.encode_batch_fast(texts[start : start + 500], add_special_tokens=False)
    tokens += sum(map(len, encodings))
print(time.perf_counter() - begin, tokens)
"""


def write_text(folder: Path, megabytes: int) -> list[str]:
    """Text files of that many megabytes together; gives their contents."""
    texts = list(stdlib.source_files(Path(sysconfig.get_path("stdlib"))).values())
    folder.mkdir()
    size = number = 0
    while size < megabytes * 1e6:
        text = texts[number % len(texts)]
        (folder / f"{number:06}.txt").write_text(text, encoding="utf-8")
        size += len(text.encode())
        number += 1
    return texts


def measured(program: str, *arguments: object) -> list[float]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [float(number) for number in done.stdout.split()]


def measure(megabytes: int, repeats: int) -> dict[str, float]:
    """The ratio of the two rates, and peaks of memory in MB of the process that builds and reads a store."""
    found: dict[str, float] = {"cores": usable_cores()}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        bpe = root / "tokenizer.json"
        texts = write_text(root / "small", megabytes // 4)
        write_text(root / "large", megabytes)
        tokenizer.train_bpe(texts, 4096).save(bpe)
        ours, theirs = [], []
        for number in range(repeats):
            theirs.append(measured(LIBRARY, root / "large", bpe)[0])
            seconds, tokens, built, read, each = measured(
                STORE, f"text:{root}/large/*.txt", bpe, root / f"cache{number}"
            )
            ours.append(seconds)
        found["seconds of ours, median"] = statistics.median(ours)
        found["seconds of the library, median"] = statistics.median(theirs)
        found["tokens per second of ours"] = tokens / statistics.median(ours)
        found["rate beside the library's, median of pairs"] = statistics.median(
            one / two for one, two in zip(theirs, ours, strict=True)
        )
        _, _, small_built, small_read, small_each = measured(STORE, f"text:{root}/small/*.txt", bpe, root / "cache")
        found[f"peak MB while building, {megabytes // 4} MB of text"] = small_built
        found[f"peak MB while building, {megabytes} MB of text"] = built
        found[f"peak MB of the largest of its processes, {megabytes // 4} MB of text"] = small_each
        found[f"peak MB of the largest of its processes, {megabytes} MB of text"] = each
        found[f"peak MB after reading, {megabytes // 4} MB of text"] = small_read
        found[f"peak MB after reading, {megabytes} MB of text"] = read
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=96, help="of text, the larger of two sizes")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    given = parser.parse_args()
    found = measure(given.megabytes, given.repeats)
    for name, value in found.items():
        print(f"{name:60}{value:16,.3f}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
