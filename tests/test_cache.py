"""Caches: the same numbers with and without them, filled as training goes, resumed after a kill."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from sdprep.errors import DataError, RecipeError, UserError
from sdtrain import checkpoint
from sdtrain.cache.entries import pack
from sdtrain.cache.fill import fill, wanted_slots
from sdtrain.cache.store import EntryStore
from sdtrain.cache.verify import verify
from sdtrain.check import describe
from sdtrain.check_text import check_text
from sdtrain.cli import app
from sdtrain.recipe import load_train_recipe
from sdtrain.setup import Setup, open_setup
from sdtrain.trainer import train
from tests.tiny import as_trained

torch.set_num_threads(1)

Recipe = Callable[..., Path]
FIXED = ("data.cached_crops=2", "prompt.score.position=none")  # score tags are drawn anew
CACHED = ("cache.latents=true", "cache.text=true", *FIXED)
SHORT = ("train.samples=18", "checkpoint.every_samples=100")


def setup_of(path: Path, *overrides: str) -> Setup:
    return open_setup(load_train_recipe(path, (*CACHED, *SHORT, *overrides)))


def store_of(path: Path, name: str = "latents") -> EntryStore:
    return EntryStore(path.parent / "sdtrain-cache" / f"{name}.lance")


def trained(path: Path, *overrides: str) -> dict[str, Tensor]:
    outcome = train(load_train_recipe(path, (*SHORT, *overrides)))
    assert outcome.checkpoint is not None
    return checkpoint.read_trained(Path(outcome.checkpoint))


def losses(path: Path) -> list[np.ndarray]:
    found = sorted((path.with_suffix("") / "validation").glob("*/*.npz"))
    return [np.load(file)["loss"] for file in found]


def decoded_rows(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows whose pictures are decoded from now on."""
    rows: list[int] = []
    decode = type(setup.data.train).image

    def noted(self: Any, row: int) -> Any:
        rows.append(row)
        return decode(self, row)

    monkeypatch.setattr(type(setup.data.train), "image", noted)
    return rows


def wanted(setup: Setup) -> int:
    """How many different crops there are; images that fit their bucket have one."""
    keys = {key for _, key in wanted_slots(setup, range(len(setup.train.kept)))}
    assert 14 < len(keys) < 28
    return len(keys)


@pytest.mark.slow
def test_a_run_ends_the_same_without_with_an_empty_and_with_a_full_cache(
    train_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes = ("validation.images=2", "validation.train_probe_images=1", *FIXED)
    probes += ("validation.timesteps_per_image=2", "validation.every_samples=100")
    paths = {name: train_recipe(output=name) for name in ("plain", "filling", "full")}
    without = trained(paths["plain"], *probes)
    assert not store_of(paths["plain"]).path.exists()
    while_filling = trained(paths["filling"], *CACHED, *probes)
    setup = setup_of(paths["full"])
    filled = fill(setup)["latents"]
    assert filled["wanted"] == wanted(setup)
    assert 14 < filled["found"] < filled["wanted"]  # what the other run has asked for
    assert filled["encoded"] == filled["missing"] == filled["wanted"] - filled["found"]
    decoded = decoded_rows(setup, monkeypatch)
    ahead = trained(paths["full"], *CACHED)
    assert not decoded
    for other in (while_filling, ahead):
        assert all(torch.equal(without[key], other[key]) for key in without)
    there, here = losses(paths["plain"]), losses(paths["filling"])
    assert len(there) == 4
    assert all(np.array_equal(a, b) for a, b in zip(there, here, strict=True))


@pytest.mark.parametrize("uncond", ["empty", "zero"])
def test_two_encoders_and_a_pooled_vector_come_back_as_they_were(
    train_recipe: Recipe, uncond: str
) -> None:
    setup = setup_of(train_recipe("sdxl"), f"model.uncond={uncond}", "prompt.dropout_p=0.5")
    fill(setup)
    dropped = 0
    for part in setup.micro_batches():
        read = setup.reader(stored=True).batch(part.slots, part.u)
        assert read.stored_text is not None
        assert len(read.stored_text.entries) == len(part.slots)
        latents, text = as_trained(setup.family, setup.reader().batch(part.slots, part.u))
        batch = setup.encoder.encoded(read)
        assert batch.latents is not None
        assert torch.equal(batch.latents, latents)
        assert torch.equal(batch.conditioning.pooled, text.pooled)
        groups = zip(batch.conditioning.groups, text.groups, strict=True)
        assert all(a == c and torch.equal(b, d) for (a, b), (c, d) in groups)
        dropped += sum(slot.text.is_dropped for slot in part.slots)
    assert dropped > 3


@pytest.mark.slow
def test_workers_read_the_cache_as_this_process_does(train_recipe: Recipe) -> None:
    path = train_recipe()
    setup = setup_of(path, "data.workers=2", "data.micro_batch_size=4")
    fill(setup)
    from sdtrain.loader import load

    ahead = list(load(setup.reader(stored=True), list(setup.micro_batches()), workers=2))
    here = list(load(setup.reader(stored=True), list(setup.micro_batches()), workers=0))
    assert len(ahead) == len(here) > 4
    for (_, one), (_, two) in zip(ahead, here, strict=True):
        assert not len(one.pixels)
        assert one.micro == two.micro
        first, second = setup.encoder.encoded(one), setup.encoder.encoded(two)
        assert first.latents is not None
        assert second.latents is not None
        assert torch.equal(first.latents, second.latents)


def test_each_sample_is_what_its_picture_alone_gives(train_recipe: Recipe) -> None:
    setup = setup_of(train_recipe(), "data.flip_prob=0.5")
    fill(setup)
    vae: Any = setup.family.parts["vae"]
    plain, stored = setup.reader(), setup.reader(stored=True)
    flips = 0
    for part in setup.micro_batches():
        shown, read = plain.batch(part.slots, part.u), stored.batch(part.slots, part.u)
        assert not len(read.pixels)
        assert shown.micro == read.micro
        batch = setup.encoder.encoded(read)
        assert batch.latents is not None
        for at, pixels in enumerate(shown.pixels):
            with torch.no_grad():
                mean = vae.encode(pixels[None]).latent_dist.mean[0]
            expected = mean.half().float() * vae.config.scaling_factor
            assert torch.equal(batch.latents[at], expected)
            flips += part.slots[at].visit  # the second visit is another crop
    assert flips > 0


def test_a_sample_of_the_posterior_is_keyed_by_visit_and_the_same_from_the_cache(
    train_recipe: Recipe,
) -> None:
    path = train_recipe()
    asked = ("cache.posterior=sample", "data.cached_crops=1")
    cached, plain = setup_of(path, *asked), setup_of(path, *asked, "cache.latents=false")
    fill(cached)
    first: dict[str, Tensor] = {}
    again = 0
    for part in cached.micro_batches():
        batch = cached.encoder.encoded(cached.reader(stored=True).batch(part.slots, part.u))
        other = plain.encoder.encoded(plain.reader().batch(part.slots, part.u))
        assert batch.latents is not None
        assert other.latents is not None
        assert torch.equal(batch.latents, other.latents)
        for id_, latents in zip(batch.ids, batch.latents, strict=True):
            if id_ in first:
                assert not torch.equal(first[id_], latents)
                again += 1
            first[id_] = latents
    assert again == 4


@pytest.mark.slow
def test_a_killed_fill_goes_on_where_it_was(train_recipe: Recipe) -> None:
    path = train_recipe()
    script = f"""
import os
from pathlib import Path
from sdtrain.cache import store, writing
from sdtrain.cache.fill import fill
from sdtrain.recipe import load_train_recipe
from sdtrain.setup import open_setup
writing.BLOCK_BYTES = 1500  # a few entries
append, calls = store.EntryStore.append, []
def killed(self, entries):
    if len(calls) == 3:
        os._exit(9)
    calls.append(len(entries))
    append(self, entries)
store.EntryStore.append = killed
fill(open_setup(load_train_recipe(Path({str(path)!r}), {(*CACHED, *SHORT)!r})))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    setup = setup_of(path)
    before = len(store_of(path))
    assert 3 <= before < wanted(setup)
    filled = fill(setup)
    assert filled["latents"] | {"bytes": 0} == {
        **{"wanted": wanted(setup), "found": before, "missing": wanted(setup) - before},
        **{"encoded": wanted(setup) - before, "entries": wanted(setup), "bytes": 0},
    }
    assert filled["text"]["missing"] == filled["text"]["encoded"] == 15  # 14 captions and none
    found = verify(setup, sample=100)
    assert found["latents"]["encoded_again"] == wanted(setup)
    assert found["text"]["encoded_again"] == 15
    assert found["latents"]["bad"] == found["text"]["bad"] == []
    assert found["latents"]["most_difference"] == found["text"]["most_difference"] == 0
    again = fill(setup)
    assert again["latents"]["missing"] == again["text"]["missing"] == 0


def test_verify_names_a_flipped_byte_and_repair_has_it_encoded_anew(train_recipe: Recipe) -> None:
    path = train_recipe()
    setup = setup_of(path)
    fill(setup)
    victim = next(store_of(path).scan())
    for file in (store_of(path).path / "data").iterdir():
        content = file.read_bytes()
        if victim.data in content:
            at = content.index(victim.data) + 7
            file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    sets = [word for each in (*CACHED, *SHORT) for word in ("--set", each)]
    done = CliRunner().invoke(app, ["cache", "verify", str(path), "--json", *sets])
    assert isinstance(done.exception, DataError)
    assert victim.label in str(done.exception)
    found = json.loads(done.stdout)
    assert [each["label"] for each in found["latents"]["bad"]] == [victim.label]
    assert found["text"]["bad"] == []
    with pytest.raises(DataError, match=f"{victim.label} is damaged"):
        trained(train_recipe(output="stops"), *CACHED)
    done = CliRunner().invoke(app, ["cache", "verify", str(path), "--json", "--repair", *sets])
    assert done.exit_code == 0, done.exception  # nothing is left to mend
    assert f"{victim.label}: its checksum differs" in " ".join(done.stderr.split())
    assert len(json.loads(done.stdout)["latents"]["bad"]) == 1
    assert fill(setup_of(path))["latents"]["missing"] == 1
    assert verify(setup_of(path))["latents"]["bad"] == []


def test_verify_names_an_entry_that_is_another_picture_and_training_one_of_another_size(
    train_recipe: Recipe,
) -> None:
    path = train_recipe()
    setup = setup_of(path)
    slots = [(slot, key) for slot, key in wanted_slots(setup, range(3))]
    shape = (4, slots[0][0].bucket.height // 2, slots[0][0].bucket.width // 2)
    other = pack(slots[0][1], slots[0][0].sample_id, "fp16", {"mean": torch.ones(shape).half()})
    store_of(path).append([other])
    bad = verify(setup_of(path))["latents"]["bad"]
    assert [each["label"] for each in bad] == [slots[0][0].sample_id]
    small = torch.ones(4, 8, 8).half()
    store = EntryStore(path.parent / "small" / "latents.lance")
    store.append([pack(key, slot.sample_id, "fp16", {"mean": small}) for slot, key in slots])
    with pytest.raises(DataError, match="mean:4x8x8, its bucket asks for mean:4x"):
        trained(path, *CACHED, f"cache.path={store.path.parent}")


@pytest.mark.parametrize("at", [None, -20, -200])
def test_a_table_whose_files_are_damaged_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int | None
) -> None:
    monkeypatch.setattr("sdtrain.cache.store._FIRST_PAUSE_SECONDS", 0.001)
    entries = [
        pack(bytes([n]) * 16, f"image {n}", "fp16", {"mean": torch.ones(4, 16, 16).half()})
        for n in range(8)
    ]
    EntryStore(tmp_path / "latents.lance").append(entries)
    file = max((tmp_path / "latents.lance/data").iterdir(), key=lambda each: each.stat().st_size)
    content = bytearray(file.read_bytes())
    if at is None:
        del content[len(content) // 2 :]
    else:
        content[at] ^= 255
    file.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"latents\.lance is damaged and cannot be read"):
        list(EntryStore(tmp_path / "latents.lance").scan())
    with pytest.raises(DataError, match=r"latents\.lance is damaged and cannot be read"):
        EntryStore(tmp_path / "latents.lance").get([entries[0].key])


@pytest.mark.parametrize("is_begun", [False, True])
def test_a_full_disk_of_a_cache_is_said_to_be_that_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_begun: bool
) -> None:
    import lance

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError("LanceError(IO): No space left on device (os error 28), commit.rs:1663")

    store = EntryStore(tmp_path / "latents.lance")
    entry = pack(b"a" * 16, "x", "fp32", {"mean": torch.ones(2)})
    if is_begun:
        store.append([entry])
    monkeypatch.setattr(lance, "write_dataset", full)
    with pytest.raises(UserError, match=r"disk of the cache \S+latents\.lance is full: .*No space"):
        store.append([entry])


@pytest.mark.parametrize("is_begun", [False, True])
def test_many_writers_may_fill_one_cache_at_once(tmp_path: Path, is_begun: bool) -> None:
    path = tmp_path / "a folder, größer" / "latents.lance"
    if is_begun:  # what is there before the first version, or after a kill at that moment
        (path / "_versions").mkdir(parents=True)

    def write(writer: int) -> None:
        for block in range(4):
            key = bytes([writer, block]) * 8
            EntryStore(path).append([pack(key, "x", "fp32", {"mean": torch.ones(2) * writer})])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write, range(6)))
    store = EntryStore(path)
    keys = [bytes([writer, block]) * 8 for writer in range(6) for block in range(4)]
    assert len(store) == 24
    found = store.get([*keys, b"\xff" * 16])
    assert sorted(found) == list(range(24))
    assert all(float(entry.tensors()["mean"][0]) == keys[at][0] for at, entry in found.items())


def test_blocks_are_joined_and_dropped_while_others_append(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdtrain.cache.store._MANY_FRAGMENTS", 3)
    path = tmp_path / "latents.lance"

    def write(writer: int) -> None:
        for block in range(12):
            key = bytes([writer, block]) * 8
            EntryStore(path).append([pack(key, "x", "fp32", {"mean": torch.ones(2)})])
            if block % 4 == 3:
                EntryStore(path).tidy()
                EntryStore(path).drop([key])
                assert EntryStore(path).get([key]) == {}

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write, range(6)))
    kept = [bytes([writer, block]) * 8 for writer in range(6) for block in range(12)]
    kept = [key for key in kept if key[1] % 4 != 3]
    assert len(EntryStore(path)) == len(kept) == len(EntryStore(path).get(kept))


def test_a_scan_says_that_another_process_joined_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lance

    store = EntryStore(tmp_path / "latents.lance")
    in_small_files = partial(lance.write_dataset, max_rows_per_file=1)
    monkeypatch.setattr(lance, "write_dataset", in_small_files)
    store.append(  # more than are read ahead
        [
            pack(bytes([n % 256]) * 16, "x", "fp16", {"mean": torch.zeros(3).half()})
            for n in range(500)
        ]
    )
    entries = EntryStore(store.path).scan(rows_at_once=1)
    next(entries)
    store.tidy()
    with pytest.raises(DataError, match="joined the blocks"):
        list(entries)


def test_a_reader_survives_that_another_process_joins_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdtrain.cache import store as module

    monkeypatch.setattr(module, "_MANY_FRAGMENTS", 3)
    store = EntryStore(tmp_path / "latents.lance")
    keys = [bytes([number]) * 16 for number in range(6)]
    for number, key in enumerate(keys):
        store.append([pack(key, "x", "fp16", {"mean": torch.full((3,), number).half()})])
    reader = EntryStore(store.path)
    assert len(reader) == 6
    store.tidy()
    assert len(list((store.path / "data").iterdir())) == 1
    found = reader.get(keys)
    assert [float(found[at].tensors()["mean"][0]) for at in range(6)] == list(range(6))


def test_what_is_not_finite_is_not_kept(train_recipe: Recipe) -> None:
    setup = setup_of(train_recipe())
    with torch.no_grad():
        dict(setup.family.parts["vae"].named_parameters())["quant_conv.bias"].fill_(1e5)
    with pytest.raises(DataError, match="the latents of image .* not finite in fp16"):
        fill(setup)


def test_check_says_what_is_there(train_recipe: Recipe) -> None:
    path = train_recipe()
    setup = setup_of(path)
    before, count = describe(setup), wanted(setup)
    assert before["cache"]["latents"] == {"wanted": count, "found": 0, "entries": 0, "bytes": 0}
    sets = [word for each in (*CACHED, *SHORT) for word in ("--set", each)]
    done = CliRunner().invoke(app, ["cache", str(path), "--json", *sets])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["latents"]["encoded"] == count
    after = describe(setup_of(path))
    assert after["cache"]["latents"]["found"] == count
    assert after["cache"]["text"]["found"] == after["cache"]["text"]["wanted"] == 15
    assert f"latents: {count} of {count} are there" in check_text(after, "")
    assert describe(open_setup(load_train_recipe(path)))["cache"] is None


def test_without_lance_only_a_cached_run_is_refused(
    train_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lance", None)
    path = train_recipe()
    trained(path, "train.samples=6")
    with pytest.raises(UserError, match="pip install pylance"):
        setup_of(path)


def test_crops_that_never_repeat_are_not_cached(train_recipe: Recipe) -> None:
    path = train_recipe()
    with pytest.raises(RecipeError, match="a new crop at every visit"):
        load_train_recipe(path, ("cache.latents=true",))
    with pytest.raises(RecipeError, match="cached_crops does nothing"):
        load_train_recipe(path, ("data.crop=centre", "data.cached_crops=2"))
    with pytest.raises(UserError, match="caches nothing"):
        fill(open_setup(load_train_recipe(path)))
    centre = open_setup(load_train_recipe(path, ("cache.latents=true", "data.crop=centre")))
    assert fill(centre)["latents"]["wanted"] == 14


def test_text_is_cached_only_where_it_is_fixed(train_recipe: Recipe, prepared_folder: Path) -> None:
    path = train_recipe()
    rules = 'train.rules=[{ match = "unet.**", lr = 1e-3 }, { match = "text_enc*.**", lr = 1e-4 }]'
    with pytest.raises(UserError, match=r"a text encoder trains, by the rule 'text_enc\*\.\*\*'"):
        setup_of(path, rules)
    setup = setup_of(path, rules, 'cache.text="auto"')
    assert setup.caches.text is None
    assert "text_enc*.**" in setup.caches.why_no_text
    part = next(iter(setup.micro_batches()))
    batch = setup.encoder.encoded(setup.reader(stored=True).batch(part.slots, part.u))
    assert batch.conditioning is None  # the forward makes it, with gradients
    assert batch.stored_text is None


def test_an_empty_prompt_that_is_zeros_is_sound(train_recipe: Recipe) -> None:
    options = ("cache.latents=false", "model.uncond=zero")
    setup = setup_of(train_recipe("sdxl"), *options)
    fill(setup)
    count = setup.caches.text.store
    found = verify(setup, sample=len(count))["text"]
    assert found["encoded_again"] == len(count)
    assert found["bad"] == []
    (empty,) = [entry for entry in count.scan() if entry.label == "''"]
    assert not any(tensor.any() for tensor in empty.tensors().values())
    count.drop([empty.key])
    ones = {name: torch.ones_like(tensor) for name, tensor in empty.tensors().items()}
    count.append([pack(empty.key, empty.label, empty.dtype, ones)])
    bad = verify(setup, sample=len(count))["text"]["bad"]
    assert [each["label"] for each in bad] == ["''"]
