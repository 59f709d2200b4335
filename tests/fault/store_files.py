"""An eye of its own on the files of a store."""

import json
from pathlib import Path

import torch
import xxhash


def read_striped(directories, layout):
    """The bytes of a striped store, put together without any code of the store.

    Whose turn it is: of those whose share so far is smallest for their weight, by the rule that
    each slot adds every weight to its path's credit and takes their sum from the richest one.
    """
    files = [(Path(path) / "offload-store" / "data").read_bytes() for path in directories]
    unit, weights = layout["unit_nbytes"], layout["weights"]
    credit, taken, whole = [0] * len(files), [0] * len(files), bytearray()
    while any(taken[path] < len(file) for path, file in enumerate(files)):
        credit = [have + weight for have, weight in zip(credit, weights, strict=True)]
        path = credit.index(max(credit))
        credit[path] -= sum(weights)
        whole += files[path][taken[path] :][:unit].ljust(unit, b"?")
        taken[path] += unit
    return bytes(whole)


def read_commit(directory, *others):
    """(step, {name: bytes}) that the files of ``directory`` hold, or None if there is no commit.

    Reads the files without any code of the store, and checks every checksum. ``others`` are the
    further directories of a striped store.
    """
    folder = Path(directory) / "offload-store"
    try:
        digest, _, body = (folder / "commit.json").read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    assert digest.decode() == xxhash.xxh3_64_hexdigest(body)
    record = json.loads(body)
    assert ("layout" in record) == bool(others)
    if others:
        data = read_striped([directory, *others], record["layout"])
    else:
        data = (folder / "data").read_bytes()
    found = {}
    for name, entry in record["tensors"].items():
        nbytes = getattr(torch, entry["dtype"]).itemsize * torch.Size(entry["shape"]).numel()
        raw = data[entry["offset"] :][:nbytes]
        chunks = [
            raw[at : at + entry["chunk_nbytes"]] for at in range(0, nbytes, entry["chunk_nbytes"])
        ]
        assert [f"{xxhash.xxh3_64_intdigest(chunk):016x}" for chunk in chunks] == entry["checksums"]
        found[name] = raw
    return record["step"], found
