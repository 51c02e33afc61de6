"""Each reason for which a file is refused, with the words for it; no refusal in the code is without its row."""

from __future__ import annotations

import ast
import os
import traceback
from functools import cache
from pathlib import Path

import pytest
import torch
from cache_files import HEAD_DIM, SMALL, fill, hybrid_cache, indexed_cache, mixed_cache, opaque_cache, sliding_config
from mutated_files import Image
from transformers import T5Config

import kvq.files
import kvq.persistence
from kvq import KVQ, EncoderDecoderKVQ
from kvq.errors import CacheFileError
from kvq.files.container import ContainerReader

FOLDER, FILES = Path(kvq.persistence.__file__).parent, Path(kvq.files.__file__).parent


@cache
def reading_raises():
    """Return where the code that reads files refuses them: file, first and last line of each raise."""
    trees = {path.stem: ast.parse(path.read_text()) for folder in (FOLDER, FILES) for path in folder.glob("*.py")}
    del trees["writing"]
    return {
        (name, node.lineno, node.end_lineno) for name, tree in trees.items() for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and node.exc is not None and "CacheFileError" in ast.unparse(node.exc)
    }  # fmt: skip


def reached(error):
    """Yield the raises of the reading code that an error came through."""
    while error is not None:
        for frame, line in traceback.walk_tb(error.__traceback__):
            folder, _, file = frame.f_code.co_filename.rpartition(os.sep)
            if folder in (str(FOLDER), str(FILES)):
                yield from (at for at in reading_raises() if at[0] == file[:-3] and at[1] <= line <= at[2])
        error = error.__cause__


def header(length, text=b"{}"):
    return length.to_bytes(8, "little") + text


def cache_of(*path, to):
    """Return an edit of the description of the cache."""

    def edit(image):
        place = image.cache
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = to

    return edit


def entry(name, **fields):
    """Return an edit of a tensor's entry."""
    return lambda image: image.table[name].update(fields)


def signed(data, edit):
    image = Image(data)
    edit(image)
    return image.build(sign=True)


def a_piece_of_a_later_release(image):
    cache_of(*FIRST, "key", "others", to={"scores": {"dtype": "float32", "shape": [0]}})(image)
    image.table["layers.0.key.scores"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def shifted(image):
    first = next(name for name, spec in image.table.items() if spec["data_offsets"][0] == 0)
    start, stop = image.table[first]["data_offsets"]
    image.table[first]["data_offsets"] = [start + 2, stop + 2]


def rows_out_of_reach(image):
    start, stop = image.table["layers.0.key.runs.0.rows"]["data_offsets"]
    image.data = image.data[:start] + (7).to_bytes(8, "little") * ((stop - start) // 8) + image.data[stop:]


def no_checksum(data):
    image = Image(data)
    image.facts["checksum"] = "none"
    return image.build(sign=False)


FIRST = ("layers", 0, "states")


def dropped(image):
    states = image.cache["layers"][0]["states"]
    states.update(dropped=states["window"], window=0)


BYTES = {
    "7 bytes, fewer": lambda data: data[:7],
    "a header of 0 bytes": lambda data: header(0),
    "1,000 bytes is announced, 2 are there": lambda data: header(1000),
    "its header is not JSON": lambda data: header(2, b"{]"),
    "its header is not text": lambda data: header(2, b"\xff\xff"),
    "not a table of tensors": lambda data: header(2, b"[]"),
    "has no metadata": lambda data: header(2),
    "of something else than a cache": lambda data: signed(data, lambda image: image.facts.update(format="pt")),
    "format version '6', and this release": lambda data: signed(
        data, lambda image: image.facts.update(format_version="6")
    ),
    "checksum is missing": no_checksum,
    "damaged or changed": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "entry 'layers.0.key.window' of its header is not a tensor": lambda data: signed(
        data, entry("layers.0.key.window", more=1)
    ),
    "dtype 'C64' and shape": lambda data: signed(data, entry("layers.0.key.window", dtype="C64")),
    r"lies at \[0, 1\], but takes": lambda data: signed(data, entry("layers.0.key.window", data_offsets=[0, 1])),
    "begins at byte": lambda data: signed(data, shifted),
    "its tensors take": lambda data: signed(data, lambda image: setattr(image, "data", image.data + b"1234")),
    "description of the cache is not JSON": lambda data: signed(
        data, lambda image: setattr(image, "cache", float("nan"))
    ),
    r"wrong at layers.0.quantized.states.window: .* greater than or equal to 0": lambda data: signed(
        data, cache_of(*FIRST, "window", to=-1)
    ),
    "which is not a state of a cache": lambda data: signed(data, cache_of(*FIRST, "window", to=1)),
    "sinks of the keys are there or missing": lambda data: signed(data, cache_of(*FIRST, "key", "sinks", to=False)),
    "5 tokens at position 7 are not a cropped group": lambda data: signed(
        data, cache_of(*FIRST, "key", "survivors", to=[[7, 5]])
    ),
    "which is not a number of flushes": lambda data: signed(
        data, cache_of(*FIRST, "value", "runs", to=[{"blocks": 1, "rows": None}])
    ),
    "tokens are forgotten, which the layer does not do": lambda data: signed(data, dropped),
    "does not say how many tokens of a layer that slides": lambda data: signed(
        data, cache_of("layers", 0, "sliding_window", to=4)
    ),
    "1 are missing": lambda data: signed(data, lambda image: image.table.update(x=image.table.pop("token_ids"))),
    "and by its configuration torch.bfloat16": lambda data: signed(
        data, cache_of("layers", 1, "states", "key", to=[1, 16])
    ),
    r"it holds \['scores'\], which this release does not know": lambda data: signed(data, a_piece_of_a_later_release),
    "order of the batch names rows outside the 1": lambda data: signed(data, rows_out_of_reach),
    r"names the backends \['x'\]": lambda data: signed(
        data, lambda image: image.cache.update(backends={"x": image.cache["backends"]["native"]})
    ),
    "10 tokens are held of 120, where 49": lambda data: signed(data, cache_of("layers", 1, "states", "tokens", to=10)),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache.safetensors"


@pytest.fixture
def data(path):
    cache = mixed_cache()
    cache.save(path, token_ids=torch.zeros(2, cache.get_seq_length(), dtype=torch.int64))
    return path.read_bytes()


def refuse(path, match, **options):
    """Check that a file is refused for a reason, and return the raises that the error came through."""
    with pytest.raises(CacheFileError, match=match) as caught:
        KVQ.load(path, **options)
    assert str(path) in str(caught.value)
    return set(reached(caught.value))


def no_file(data, path, models):
    path.unlink()
    return refuse(path, "No such file")


def a_folder(data, path, models):
    path.unlink()
    path.mkdir()
    found = refuse(path, "it is a folder, and no file")
    path.rmdir()
    return found


def another_number_of_layers(data, path, models):
    path.write_bytes(signed(data, cache_of("model", to=None)))
    more = sliding_config(num_hidden_layers=3, layer_types=["full_attention", "sliding_attention", "full_attention"])
    with pytest.warns(UserWarning, match="does not say which model"):
        return refuse(path, "has 2 layers, and the cache of the model has 3", model=more)


def another_kind_of_layer(data, path, models):
    path.write_bytes(signed(data, cache_of("model", to=None)))
    with pytest.warns(UserWarning, match="does not say which model"):
        return refuse(path, "layer 1 is sliding in it, and a Dyn", model=sliding_config(sliding_window=60))


def another_configuration(data, path, models):
    return refuse(path, "sliding_window is 50 there and 60 here", model=sliding_config(sliding_window=60))


def another_release_of_a_backend_that_stores_in_its_own_way(data, path, models):
    opaque_cache().save(path)
    release = {"origin": "elsewhere 3.1", "requires": {}}
    path.write_bytes(signed(path.read_bytes(), cache_of("backends", "norm_codebook", to=release)))
    return refuse(path, "was elsewhere 3.1 when the file was written, but is register_backend here")


def another_state_of_full_precision(data, path, models):
    opaque_cache().save(path)
    path.write_bytes(signed(path.read_bytes(), cache_of("config", "layers", to={"0": {"full_precision": True}})))
    return refuse(path, "quantized in it, and by its configuration in full precision")


def a_file_that_shrinks_while_it_is_read(data, path, models):
    check = ContainerReader.check_checksum

    def check_and_cut(container):
        check(container)
        path.write_bytes(data[: len(data) // 2])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ContainerReader, "check_checksum", check_and_cut)
        return refuse(path, "ended while it was read")


def the_weights_of_another_model(data, path, models):
    model, other = models
    cache = KVQ(model=model)
    model(torch.arange(4, 204)[None], past_key_values=cache)
    cache.save(path)
    assert KVQ.load(path, model=model).get_seq_length() == 200
    names = "model.layers.0.self_attn.k_proj, model.layers.2.self_attn.k_proj"
    return refuse(path, f"the weights of {names} differ", model=other)


def no_such_states_beside_keys(data, path, models):
    hybrid_cache().save(path)
    plain, found = path.read_bytes(), set()
    for name, to, match in (
        ("previous", [True, True], "1, 2. states are described, 2 are expected"),
        ("kernel_sizes", [3], "its kernel has a size of 3"),
        ("conv", [{"dtype": "bfloat16", "shape": [1, 2, 4, 16]}], "beside keys and values of 2"),
    ):
        path.write_bytes(signed(plain, cache_of("layers", 0, "carried", name, to=to)))
        found |= refuse(path, match)
    return found


def no_such_keys_of_an_indexer(data, path, models):
    indexed_cache().save(path)
    shape = [2, 39, HEAD_DIM]
    path.write_bytes(signed(path.read_bytes(), cache_of("layers", 0, "carried", "keys", "shape", to=shape)))
    return refuse(path, "keys of an indexer are .2, 39, 16., of 40 tokens")


def one_attention_for_two(data, path, models):
    path.write_bytes(signed(data, cache_of("model", to=None)))
    config = T5Config(num_layers=2, vocab_size=9)
    with pytest.warns(UserWarning, match="which model"), pytest.raises(CacheFileError, match="no cross-att") as caught:
        EncoderDecoderKVQ.load(path, model=config)
    return set(reached(caught.value))


def two_attentions_for_one(data, path, models):
    path.write_bytes(signed(data, cache_of("cross_layers", to=[])))
    return refuse(path, "the two attentions of an encoder-decoder model")


SITUATIONS = (
    no_such_states_beside_keys,
    no_such_keys_of_an_indexer,
    one_attention_for_two,
    two_attentions_for_one,
    no_file,
    a_folder,
    another_number_of_layers,
    another_kind_of_layer,
    another_configuration,
    another_release_of_a_backend_that_stores_in_its_own_way,
    another_state_of_full_precision,
    a_file_that_shrinks_while_it_is_read,
    the_weights_of_another_model,
)


@pytest.fixture
def models(recall_model, other_recall_model):
    return recall_model, other_recall_model


def wrong_file(reason, data, path):
    path.write_bytes(BYTES[reason](data))
    return refuse(path, reason)


@pytest.mark.parametrize("reason", BYTES)
def test_a_wrong_file(reason, data, path):
    assert wrong_file(reason, data, path)


@pytest.mark.filterwarnings("ignore:nbits_k=4 is below")
@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_wrong_situation(situation, data, path, models):
    assert situation(data, path, models)


@pytest.mark.filterwarnings("ignore:nbits_k=4 is below")
def test_no_refusal_is_left_out(data, path, models):
    seen = set()
    for reason in BYTES:
        seen |= wrong_file(reason, data, path)
    for situation in SITUATIONS:
        path.write_bytes(data)
        seen |= situation(data, path, models)
    assert len(reading_raises()) > 25
    assert {f"{name}.py:{first}" for name, first, _ in reading_raises() - seen} == set()


def test_another_release_of_an_affine_backend_is_told_and_loaded(path):
    cache = fill(KVQ(backend="quanto", **SMALL), 80)
    cache.save(path)
    edit = cache_of("backends", "quanto", "requires", to={"optimum-quanto": "0.1"})
    path.write_bytes(signed(path.read_bytes(), edit))
    with pytest.warns(UserWarning, match=r"optimum-quanto 0.1 when the file was written and is .* here"):
        loaded = KVQ.load(path)
    assert torch.equal(loaded.materialize(0)[0], cache.materialize(0)[0])
