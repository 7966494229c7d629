"""A command that dies at any change of what it writes leaves nothing stuck, nothing lost and nothing doubled.

Without Ray: what the tasks of a job do to the table and its run folder is done here, one after the other. After each
crash every command runs, in an order that differs, and the table is that of an unbroken job.
"""

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.captioning import plan
from captioner.captioning.plan import describe_model, plan_job
from captioner.config import CaptionJobConfig, ModelConfig, VerifyConfig
from captioner.inputs import load_frozen
from captioner.query.runs import read_runs
from captioner.schema import captioned_schema
from captioner.storage import open_store
from captioner.storage.folder_copy import copy_folder
from captioner.storage.urls import name
from captioner.tables import CaptionTable, Stamp, deduplicate_late_parts, findings
from captioner.tables.verification import verify
from tests.caption_tables import caption_row, failure_row
from tests.faults.conftest import tar_of
from tests.faults.crashes import Moment, crashing, empty_memory
from tests.sample_images import encoded

PER_TAR = 4
MOMENTS: tuple[Moment, ...] = ("before", "half", "after")


@pytest.fixture(autouse=True)
def one_description(bundle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Describe the model once: no command changes it, and each job would read all its weights again."""
    described = describe_model(ModelConfig(model=bundle))
    monkeypatch.setattr(plan, "describe_model", lambda _: described)


class World:
    """Some images, and the table of a job that reads them."""

    def __init__(self, folder: Path, bundle: str, kind: str, store: str) -> None:
        self.folder, self.kind = folder / "images", kind
        output = f"memory://{folder}/out" if store == "memory" else str(folder / "out")
        shutil.rmtree(folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.config = CaptionJobConfig(input_path=str(self.folder), output=output, model=ModelConfig(model=bundle))
        self.num_images = 0
        self.saved: dict[str, bytes] = {}

    @property
    def table(self) -> CaptionTable:
        return CaptionTable(self.config.output)

    def add_images(self) -> None:
        """Add two tars or tables of images, or as many image files."""
        for _ in range(2):
            seeds = range(self.num_images, self.num_images + PER_TAR)
            if self.kind == "tars":
                tar = tar_of([encoded(seed=seed) for seed in seeds])
                (self.folder / f"{self.num_images:03d}.tar").write_bytes(tar)
            elif self.kind == "tables":
                rows = {"image": [encoded(seed=seed) for seed in seeds]}
                pq.write_table(pa.table(rows), self.folder / f"{self.num_images:03d}.parquet")
            else:
                for seed in seeds:
                    (self.folder / f"{seed:03d}.jpg").write_bytes(encoded(seed=seed))
            self.num_images += PER_TAR

    # The files of the table, to begin at the same ones again

    def files(self) -> dict[str, bytes]:
        store, root = open_store(self.config.output), self.config.output + "/"
        found = [entry.url for page in store.pages(root) for entry in page]
        return {url.removeprefix(root): store.read_bytes(url) for url in found}

    def save(self) -> None:
        self.saved = self.files()

    def restore(self) -> None:
        store, root = open_store(self.config.output), self.config.output + "/"
        if self.config.output.startswith("memory://"):
            for below in self.files():
                store.remove(root + below)
        else:
            shutil.rmtree(self.config.output, ignore_errors=True)
        for below, data in self.saved.items():
            store.write_atomic(root + below, data)

    # Commands

    def job(self, *, refresh: bool = False) -> None:
        """What `jobs/caption.py` does."""
        with ExitStack() as held:
            config = replace(self.config, refresh=refresh)
            made = plan_job(config, take_lease=lambda table: held.enter_context(table.take_lease("caption")))
            assert made.lease is not None
            assert made.stop_file is not None
            run_id, table = made.lease.run_id, made.table
            facts = {"config": {"model": {"dtype": "auto"}}, "started": "2026-01-01T00:00:00Z"}
            table.record(run_id, facts)
            stamp, parts = Stamp(run_id, table.digest, is_leased=True), list[str]()
            for piece in made.slices:
                for rows in made.reader.read(piece):
                    parts += table.write(outcome(rows), stamp).parts
            made.stop_file.write()  # as after Ctrl-C
            made.stop_file.remove()
            deduplicate_late_parts(table, made.done.parts.union(parts), run_id)
            table.record(run_id, {**facts, "summary": {"read": 1}})

    def dry_run(self) -> None:
        plan_job(replace(self.config, dry_run=True))

    def audit(self) -> Mapping[str, Any]:
        return self._verify()

    def repair(self) -> Mapping[str, Any]:
        return self._verify(repair=True)

    def compact(self) -> None:
        self._verify(repair=True, compact=True)

    def query(self) -> None:
        read_runs(self.table)
        self.table.sample(3)

    def _verify(self, **flags: bool) -> Mapping[str, Any]:
        if self.table.identity() is None:
            return {}  # no run has begun: refused, as any folder without a table is
        return verify(VerifyConfig(table=self.config.output, **flags))

    # Laws

    def check(self) -> None:
        """Once it is repaired, the table is that of an unbroken job, and nothing else is left."""
        found = self.repair()
        assert found["ok"], found
        is_corrupt = [position % PER_TAR == 1 for position in range(self.num_images)]
        assert (found["read"], found["failed"]) == (self.num_images, sum(is_corrupt))
        rows = Counter(row["key"] for row in self.rows("captions"))
        assert len(rows) == self.num_images - sum(is_corrupt)
        assert set(rows.values()) == {1}
        attempts = Counter((row["key"], row["attempt"]) for row in self.rows("failures"))
        assert set(attempts.values()) <= {1}
        frozen = load_frozen(self.table.run_folder)
        assert frozen is not None
        assert list(findings(self.table, frozen, problems=())) == []
        left = [below for below in self.files() if "/removed/" not in f"/{below}"]
        assert [
            below for below in left if name(below).startswith(".") or "compact-" in below or "lease/" in below
        ] == []

    def rows(self, folder: str) -> Iterator[dict[str, Any]]:
        for url in self.table.parts(folder):
            yield from pq.read_table(pa.BufferReader(self.table.store.read_bytes(url))).to_pylist()


def outcome(rows: pa.Table) -> pa.Table:
    """What becomes of rows that were read: of four one is corrupt, and one cannot be fetched at the first try."""
    made = []
    for read in rows.select(["key", "image_id", "attempt"]).to_pylist():
        key, image_id, attempt = read.values()
        reason = {1: "corrupt", 2: "fetch_failed" if attempt == 1 else None}.get(key % PER_TAR)
        row = failure_row(0, image_id, reason) if reason else caption_row(0, image_id, f"caption {key}")
        made.append({**row, "key": key, "attempt": attempt})
    return pa.Table.from_pylist(made, captioned_schema())


def damage(world: World) -> None:
    """Leave what crashes of earlier releases, disks and late writers leave."""
    table = world.table
    table.record("20200101T000000Z-aaaa", {})
    rows = list(world.rows("captions"))[:3]
    late = [caption_row(0, row["image_id"], row["caption"]) | {"key": row["key"]} for row in rows]
    stamp = Stamp("20200101T000000Z-aaaa", table.digest)
    table.write(pa.Table.from_pylist(late, captioned_schema()), stamp)
    for folder in ("captions", "_run/runs", "_run/counts"):
        table.store.write_atomic(f"{world.config.output}/{folder}/.0-15.0123.tmp", b"half")
    table.store.write_atomic(f"{world.config.output}/failures/part-torn.parquet", b"PAR1")


def begin(world: World, command: str) -> Callable[[], None]:
    """Prepare a world for a command, and return the command."""
    world.add_images()
    if command == "first job":
        return world.job
    world.job()
    if command == "second job":
        return world.job  # retries what could not be fetched
    if command == "refresh":
        world.add_images()
        return lambda: world.job(refresh=True)
    if command == "repair":
        damage(world)
        return world.repair
    world.job()
    return world.compact


COMMANDS = ["first job", "second job", "refresh", "repair", "compact"]
WORLDS = [("tars", "local"), ("files", "local"), ("tars", "memory")]
ALL = [
    (command, world)
    for command in COMMANDS
    for world in WORLDS
    if command not in ("repair", "compact")
    or world[0] == "tars"  # neither reads an image, and tars are counted besides
]


def recover(world: World, order: Sequence[str], command: str) -> None:
    """Run every command in an order, among them a job, and two more; the laws hold at the end."""
    with crashing(None):
        for step in order:
            getattr(world, step)()
        for _ in range(2):  # the first may read what was never read, the second tries again what failed
            world.job(refresh=command == "refresh")
        world.check()


def crashes(world: World, command: str, chance: random.Random) -> list[tuple[int, Moment]]:
    """Every state in which a command can die."""
    world.restore()
    with crashing(None) as crash:
        begin_again(world, command)
    return crash.deaths(chance)


def begin_again(world: World, command: str) -> None:
    commands = {"refresh": lambda: world.job(refresh=True), "repair": world.repair, "compact": world.compact}
    commands.get(command, world.job)()


def order_of(chance: random.Random) -> list[str]:
    return chance.sample(steps := ["dry_run", "audit", "repair", "compact", "query", "job"], len(steps))


def try_crashes(
    folder: Path, bundle: str, command: str, place: tuple[str, str], chance: random.Random, most: int
) -> int:
    """Let a command die, recover, and look; return how often."""
    world = World(folder, bundle, *place)
    with crashing(None):
        begin(world, command)
    world.save()
    points = crashes(world, command, chance)
    chosen = points if most >= len(points) else chance.sample(points, most)
    for at, moment in chosen:
        world.restore()
        order = order_of(chance)
        if command == "repair":  # a torn part, which no crash leaves, keeps a job from the table until then
            order.insert(0, "repair")
        with crashing(at, moment) as crash:
            begin_again(world, command)
        assert crash.is_dead or crash.num_changes < at, "the injector did nothing"
        try:
            recover(world, order, command)
        except BaseException as error:
            error.add_note(f"{command} on {place}, dead {moment} change {at}, then {', '.join(order)}")
            raise
    empty_memory(folder)
    return len(chosen)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_dies_at_some_change_leaves_nothing_stuck_lost_or_doubled(
    command: str, tmp_path: Path, bundle: str
) -> None:
    number = COMMANDS.index(command)
    chance = random.Random(number)
    for place in (WORLDS[number % 3], WORLDS[(number + 1) % 3]):
        assert try_crashes(tmp_path / place[1] / place[0], bundle, command, place, chance, most=2)


def test_a_copy_of_a_model_that_dies_at_any_change_is_made_whole_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"bundle.json": b"{}", "llama/model.safetensors": bytes(range(250)) * 3}
    store = fsspec.filesystem("memory")
    for file, data in files.items():
        store.pipe_file(f"/{tmp_path}/model/{file}", data)

    def copy() -> Path:
        return copy_folder(store, f"/{tmp_path}/model", "memory://model", ["*"], range_bytes=100, num_ranges=2)

    monkeypatch.setenv("CAPTIONER_CACHE", str(tmp_path / "unbroken"))
    with crashing(None) as unbroken:
        copy()
    assert unbroken.num_changes > len(files)
    for at, moment in product(range(1, unbroken.num_changes + 1), MOMENTS):
        monkeypatch.setenv("CAPTIONER_CACHE", str(tmp_path / f"{at}-{moment}"))
        with crashing(at, moment) as crash:
            copy()
        assert crash.is_dead
        with crashing(None):
            folder = copy()
        assert {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")} == files
        assert [path.name for path in folder.parent.iterdir() if ".partial" in path.suffixes] == []


@pytest.mark.slow
@pytest.mark.parametrize(("command", "place"), ALL, ids=lambda one: one if isinstance(one, str) else "-".join(one))
def test_a_command_that_dies_at_any_change_leaves_nothing_stuck_lost_or_doubled(
    command: str, place: tuple[str, str], tmp_path: Path, bundle: str
) -> None:
    seed = int(os.environ.get("CAPTIONER_TEST_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"CAPTIONER_TEST_SEED={seed}")
    num = try_crashes(tmp_path / "world", bundle, command, place, random.Random(seed), most=10_000)
    print(f"{command} on {place}: {num} crashes")
    assert num


def soak(world: World, chance: random.Random, num_rounds: int) -> int:
    """Let a job over an input that grows die again and again, whatever command it is in; return how often it died."""
    num_deaths = 0
    world.add_images()
    with crashing(None):
        world.job()
    for number in range(num_rounds):
        if number % 4 == 3:
            world.add_images()
        command = chance.choice(["job", "refresh", "repair", "compact", "audit"])
        run = {"refresh": lambda: world.job(refresh=True)}.get(command, getattr(world, command, world.job))
        moment = chance.choice(("before", "after") if "memory" in world.config.output else MOMENTS)
        with crashing(chance.randint(1, 12), moment) as crash:
            run()
        num_deaths += crash.is_dead
    recover(world, order_of(chance), "refresh")
    return num_deaths


@pytest.mark.parametrize("place", [("tars", "local"), ("tables", "local"), ("tables", "memory")], ids="-".join)
def test_a_table_whose_jobs_die_one_after_the_other_ends_as_if_none_had(
    place: tuple[str, str], tmp_path: Path, bundle: str
) -> None:
    assert soak(World(tmp_path / "world", bundle, *place), random.Random("-".join(place)), num_rounds=8) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("place", [*WORLDS, ("tables", "local"), ("tables", "memory")], ids="-".join)
def test_a_soak_over_tars_tables_and_files_runs_to_its_end(place: tuple[str, str], tmp_path: Path, bundle: str) -> None:
    """Sixty commands each, most of which die."""
    assert soak(World(tmp_path / "world", bundle, *place), random.Random(2026), num_rounds=60) >= 20
