"""Images that come in order from a data set too large to download."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sae_lightning.data.columns import Columns, encoded, first_caption
from sae_lightning.data.decode import Item
from sae_lightning.data.errors import DataError, brief
from sae_lightning.data.levels import AS_FILED, Reading
from sae_lightning.data.splits import WITHHELD, class_name


@dataclass(frozen=True)
class StreamCut:
    """Keeps ``split`` of a stream from which one image in ``block`` of each class goes to each of ``held_out``.

    The images of a class within a shard are counted in blocks of ``block``; from each block one place for
    each held-out split is drawn by (seed, shard, class, block). So a split is a share of every class, needs
    neither a second pass nor memory, and does not depend on how the shards are divided among readers.
    """

    split: str
    held_out: tuple[str, ...]
    block: int
    seed: int

    @classmethod
    def of(cls, held_out: Mapping[str, float], split: str, seed: int) -> StreamCut:
        """The cut for equal shares ``held_out``; DataError unless each leaves something for the others."""
        share = max(held_out.values())
        block = round(1 / share) if share > 0 else 0
        if block <= len(held_out):
            raise DataError(
                f"data.held_out={share:g} cannot be cut from a stream for {' and '.join(held_out)}; "
                f"take more than 0 and at most {1 / (len(held_out) + 1):.2g}."
            )
        return cls(split, tuple(held_out), block, seed)

    def keeps(self, label: str, shard: int, count: int) -> bool:
        """Whether the ``count``-th image (from 0) of class ``label`` in ``shard`` is in the split."""
        number, place = divmod(count, self.block)
        drawn = self._drawn(f"{self.seed}/{shard}/{number}/{label}")
        owner = self.held_out[drawn.index(place)] if place in drawn else "train"
        return owner == self.split

    def _drawn(self, key: str) -> list[int]:
        """A different place in the block for each held-out split, all equally likely."""
        digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
        draws = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(len(self.held_out))]
        places: list[int] = []
        for i, draw in enumerate(draws):
            place = draw % (self.block - i)
            for taken in sorted(places):
                place += place >= taken
            places.append(place)
        return places


AT_ONCE = 32  # rows that are taken from the library at a time

LOOK = 10_000  # rows of train in which a class called -1 is looked for


class ImageStream:
    """One split of a streamed data set: ``items()`` yields its images in order, undecoded.

    ``class_names`` is None when only the end of the stream tells them: then labels are texts. ``places`` are the places
    of the data set's own class numbers among ``class_names``. ``train`` is the label column of train where this is
    another split: a label that is withheld is told by it. ``length`` is the number of images, or None where it is not
    known beforehand. ``fingerprint`` is of what chooses the images
    (data set, revision, columns, split, limit); it is the same for all parts of a stream. An image's id names
    its shard and row in the data set, so it depends neither on splits nor on parts. ``files`` are those of the
    shards, where these are local files.
    """

    def __init__(
        self,
        name: str,
        split: str,
        data: Any,
        columns: Columns,
        source: str,
        class_names: Sequence[str] | None,
        length: int | None,
        fingerprint: str,
        cut: StreamCut | None = None,
        limit: int | None = None,
        places: Sequence[int] | None = None,
        train: Any = None,
        files: Sequence[str] = (),
    ) -> None:
        self._places, self._train = places, train
        self._of_train: set[str] | None = None
        self.name, self.split, self.fingerprint = name, split, fingerprint
        self.class_names = None if class_names is None else list(class_names)
        self._data, self._columns, self._source, self._cut, self._limit = data, columns, source, cut, limit
        self._length = length
        self._reading, self._files = AS_FILED, list(files)
        self._shards = (0, data.num_shards)
        self._at = self._start()

    def read_as(self, reading: Reading) -> ImageStream:
        """The same images, their pictures read as ``reading`` says."""
        if reading == AS_FILED:
            return self
        other = copy.copy(self)
        other._reading = reading
        other.fingerprint = hashlib.sha256(f"{self.fingerprint} {reading}".encode()).hexdigest()
        other._at = other._start()
        return other

    @property
    def length(self) -> int | None:
        """Images that ``items()`` yields from the start, or None."""
        if self._length is None or self._limit is None:
            return self._length
        return min(self._length, self._limit)

    @property
    def num_shards(self) -> int:
        """Into how many parts the stream can be divided at most."""
        return self._shards[1] - self._shards[0]

    def part(self, index: int, count: int) -> ImageStream:
        """Share ``index`` of ``count``, disjoint from the others: whole shards side by side, the limit divided too.

        DataError when there are fewer shards than parts, or fewer images in the limit.
        """
        if not 0 <= index < count:
            raise DataError(f"There is no part {index} of {count}; parts are counted from 0.")
        if count > min(self.num_shards, self._limit or count):
            raise DataError(
                f"The {self.split} split of '{self.name}' has {self.num_shards} shards and data.limit={self._limit}, "
                f"so it cannot be divided into {count} parts; use fewer readers."
            )
        part = copy.copy(self)
        first = self._shards[0]
        part._shards = (first + self.num_shards * index // count, first + self.num_shards * (index + 1) // count)
        if self._limit is not None:
            part._limit = self._limit * (index + 1) // count - self._limit * index // count
        part._length = self._length if count == 1 else None
        part._at = part._start()
        return part

    def state_dict(self) -> dict[str, Any]:
        """Where ``items`` stands, right after the last item it yielded; JSON holds it."""
        return copy.deepcopy(self._at)

    def items(self, state: dict[str, Any] | None = None) -> Iterator[Item]:
        """The images from the start, or from where ``state`` was taken; one iterator at a time.

        Raises DataError when the state is of another stream or part, when an image has no label, and when the
        stream breaks (then go on later from ``state_dict()``).
        """
        start = self._start()
        at = start if state is None else copy.deepcopy(state)
        if any(at.get(key) != start[key] for key in ("fingerprint", "shards")):
            raise DataError(f"This state is not of this part of the {self.split} split of '{self.name}'; start anew.")
        self._at = at
        return self._run(at)

    def _start(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint, "shards": list(self._shards),
            "shard": self._shards[0],  # the one being read,
            "row": 0,  # rows of it that were read, of whatever split,
            "seen": {},  # how many of them were of each class, where splits are cut,
            "given": 0,  # and items yielded from the start
        }  # fmt: skip

    def _run(self, at: dict[str, Any]) -> Iterator[Item]:
        while at["shard"] < self._shards[1] and not self._finished(at):
            for row in self._rows(at):
                item, kept = self._item(row, at)
                at["row"] += 1
                if kept:
                    at["given"] += 1
                    yield item
                    if self._finished(at):
                        return
            at.update(shard=at["shard"] + 1, row=0, seen={})

    def _finished(self, at: dict[str, Any]) -> bool:
        return self._limit is not None and at["given"] >= self._limit

    def _rows(self, at: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The rows of the shard from where it stands. (Batches, as rows one by one are divided among
        DataLoader workers by the library itself.)"""
        try:
            shard = self._data.shard(self._data.num_shards, at["shard"])
            for batch in (shard.skip(at["row"]) if at["row"] else shard).iter(AT_ONCE):
                yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
        except Exception as error:
            where = f"broke in shard {at['shard']} after row {at['row']}"
            todo = "run again to go on from the last finished part"
            if len(self._files) == self._data.num_shards:
                where = f"{where} of {self._files[at['shard']]}"
                todo = f"copy that file again, then {todo}"
            raise DataError(f"The stream of '{self.name}' {where} ({brief(error)}); {todo}.") from error

    def _item(self, row: dict[str, Any], at: dict[str, Any]) -> tuple[Item, bool]:
        image_id = f"{self._source}-{at['shard']:05d}-{at['row']:08d}"
        label = self._label(row, image_id)
        kept = True
        if self._cut is not None:
            own = "0" if self._columns.label is None else str(row[self._columns.label])
            count = at["seen"].get(own, 0)
            at["seen"][own] = count + 1
            kept = self._cut.keeps(own, at["shard"], count)
        caption = first_caption(row[self._columns.caption]) if self._columns.caption else None
        return Item(encoded(row[self._columns.image]), image_id, label, caption, self._reading), kept

    def _label(self, row: dict[str, Any], image_id: str) -> int | str:
        if self._columns.label is None:
            return 0
        label = row[self._columns.label]
        if self.class_names is not None:
            known = label is not None and label >= 0
            if known and (self._places is None or label < len(self._places)):
                return int(label) if self._places is None else self._places[label]
        else:
            known = label is not None and label == label  # NaN is no label
            if isinstance(label, float) and known and not label.is_integer():
                raise DataError(
                    f"Image '{image_id}' of '{self.name}' has label {label:g}; numbers that are labels must be whole. "
                    "Name another data.label_column, or say data.label_column=none."
                )
            if known and not self._withheld(class_name(label)):
                return class_name(label)
        raise DataError(
            f"Image '{image_id}' of '{self.name}' has no label; name another split or data.label_column, or say "
            "data.label_column=none."
        )

    def _withheld(self, label: str) -> bool:
        """Whether ``label`` stands for none: -1 or an empty text, unless the beginning of train has such a class."""
        if self._train is None or label.strip() not in WITHHELD:
            return False
        if self._of_train is None:
            rows = (next(iter(row.values())) for row in self._train.take(LOOK))
            self._of_train = {class_name(held) for held in rows if held is not None}
        return label not in self._of_train
